"""What DeiT, DeiT III and timm have for training and fine-tuning, by their names: each against timm, torch or a closed form, and from the
command line; and cut anywhere, each goes on bit for bit."""
import contextlib
import copy
import io
import json
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CPU, ROOT, run, small_transform
from PIL import Image, ImageFilter, ImageOps
from test_main import PLAIN, images_of
from timm.data import Mixup
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import BinaryCrossEntropy
from torchvision import transforms as tv
from torchvision.transforms.functional import InterpolationMode

import engine
import gvt
import main
import networks
import optim
import options
from losses import BinaryCriterion
from precision import make_precision
from samplers import BalancedSampler

SMALL, TWINS = "--model=test_convnext", "--model=alt_gvt_small"
CLASSES = 3


@pytest.fixture(scope="module")
def train(tiny_folder, tmp_path_factory):
    """train(*words) -> main.run in this process: status, out, err, and its folder"""
    squares = tmp_path_factory.mktemp("squares")  # a random crop of the whole is then always the whole
    for path in tiny_folder.glob("*/*/*"):
        made = squares / path.relative_to(tiny_folder).with_suffix(".png")
        made.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((40, 40)).save(made)

    def run(*words, folder=None):
        folder = folder or tmp_path_factory.mktemp("run")
        out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
        usual = ["--device=cpu", "--data-path", str(squares), "--input-size=32", "--num_workers=0", "--batch-size=8", "--epochs=2",
                 "--output_dir", str(folder)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main.run([*usual, *map(str, words)])
            except SystemExit as stop:  # the parser's
                status = stop.code
        signal.signal(signal.SIGTERM, handler)
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), folder=folder)

    run.data = squares
    return run


def trained(done):
    assert done.status == 0, done.err
    return torch.load(done.folder / "checkpoint.pth", weights_only=True)


def rows(done):
    assert done.status == 0, done.err
    return [json.loads(line) for line in (done.folder / "log.txt").read_text().splitlines()]


def refused(done, message):
    assert done.status == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, (done.status, done.err)
    assert message in done.err


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def fresh(model, **settings):
    torch.manual_seed(0)  # as --seed 0 has it
    return timm.create_model(model, num_classes=CLASSES, **settings)


# ---- --bce-loss ----

@pytest.mark.parametrize("smoothing, threshold, sum_classes", [(0.0, None, False), (0.1, None, False), (0.1, 0.2, True), (0.0, 0.2, False)])
@pytest.mark.parametrize("mixed", [False, True])
def test_binary_cross_entropy_is_timms(smoothing, threshold, sum_classes, mixed):
    torch.manual_seed(1)
    logits, targets, images = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,)), torch.rand(8, 3, 8, 8)
    if mixed:
        targets = Mixup(0.8, 1.0, label_smoothing=smoothing, num_classes=5)(images, targets)[1]
    found = BinaryCriterion(smoothing, threshold, sum_classes)(logits, targets)
    theirs = BinaryCrossEntropy(smoothing, threshold, sum_classes=sum_classes)(logits, targets)
    torch.testing.assert_close(found, theirs, rtol=0, atol=0)
    if mixed and threshold is None and not sum_classes:  # DeiT III's
        torch.testing.assert_close(found, torch.nn.BCEWithLogitsLoss()(logits, targets))


def test_binary_cross_entropy_is_summed_in_float32():
    logits, targets = torch.randn(4, 7), torch.tensor([1, 2, 3, 0])
    assert BinaryCriterion()(logits.bfloat16(), targets) == BinaryCriterion()(logits.bfloat16().float(), targets)


@pytest.mark.parametrize("words, settings", [
    (["--bce-loss"], {}), (["--bce-loss", "--bce-sum", "--smoothing=0.3", "--bce-target-thresh=0.2"],
                           dict(smoothing=0.3, target_threshold=0.2, sum_classes=True))])
def test_the_loss_of_a_run_with_bce(train, words, settings):
    done = train(SMALL, *PLAIN, "--lr=0", "--epochs=1", *words)
    images, targets = images_of(train.data, "train")
    net = fresh("test_convnext").train()
    expected = BinaryCrossEntropy(**{"smoothing": 0.0} | settings)(net(images), targets).item()
    assert rows(done)[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    # what is tested is cross entropy all the same
    images, targets = images_of(train.data, "val")
    assert rows(done)[0]["test_loss"] == pytest.approx(F.cross_entropy(net.eval()(images), targets).item(), rel=1e-5)


# ---- --three-augment, --src ----

def three_augment(image, simple, jitter):
    """DeiT III's, of torchvision's and timm's parts, with what is drawn drawn in its order."""
    if simple:
        first = [tv.Resize(32, InterpolationMode.BICUBIC), tv.RandomCrop(32, padding=4, padding_mode="reflect")]
    else:
        first = [RandomResizedCropAndInterpolation(32, scale=(0.08, 1.0), interpolation="bicubic")]
    one_of = tv.RandomChoice([
        tv.Grayscale(3), lambda image: ImageOps.solarize(image),
        lambda image: image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))])
    last = [tv.ToTensor(), tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return tv.Compose([*first, tv.RandomHorizontalFlip(), one_of, tv.ColorJitter(jitter, jitter, jitter), *last])(image)


@pytest.mark.parametrize("simple", [False, True])
def test_three_augment_is_deit_threes(simple, tiny_folder):
    image = Image.open(next(tiny_folder.glob("train/*/*.jpg"))).convert("RGB")
    transform = small_transform(True, three_augment=True, simple_crop=simple, color_jitter=0.3, reprob=0)
    seen = set()
    for seed in range(30):
        pair = []
        for augment in (transform, lambda image: three_augment(image, simple, 0.3)):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            pair.append(augment(image))
        torch.testing.assert_close(*pair, rtol=0, atol=0)
        seen.add(pair[0].sum().item())
    assert len(seen) == 30


def test_three_augment_with_what_else_is_asked_for(tiny_folder):
    """Erasing at the end, no flip, and CIFAR's padded crop in place of the random one."""
    names = [type(step).__name__ for step in small_transform(True, three_augment=True, hflip=0, native_size=True).transforms]
    assert names == ["RandomCrop", "RandomChoice", "ColorJitter", "MaybeToTensor", "Normalize", "RandomErasing"]
    names = [type(step).__name__ for step in small_transform(True, three_augment=True, simple_crop=True, reprob=0).transforms]
    assert names == ["Resize", "RandomCrop", "RandomHorizontalFlip", "RandomChoice", "ColorJitter", "MaybeToTensor", "Normalize"]


# ---- --unscale-lr, --eval-crop-ratio ----

def test_the_rate_as_it_is(train):
    done = train(SMALL, *PLAIN, "--lr=0.003", "--unscale-lr", "--sched=constant", "--max_step=1", "--no-eval")
    assert rows(done)[0]["train_lr"] == 0.003 and "  effective lr   0.003 = 0.003\n" in done.out
    assert optim.effective_lr(0.003, 4096, True) == 0.003 and optim.effective_lr(0.003, 4096) == 0.024


def test_eval_crop_ratio_is_crop_pct():
    args = [options.parse(["--data-path=x", word]) for word in ("--eval-crop-ratio=0.95", "--eval_crop_ratio=0.95", "--crop-pct=0.95")]
    assert {given.crop_pct for given in args} == {0.95}


# ---- what has no effect ----

@pytest.mark.parametrize("words, message", [
    ("--bce-sum", "--bce-sum has no effect without --bce-loss"), ("--bce-target-thresh=0.2", "--bce-target-thresh has no effect"),
    ("--bce-loss --bce-target-thresh=1", "--bce-target-thresh is 1.0, and must be"),
    ("--src", "--src has no effect without --three-augment"),
    ("--three-augment --aa=v0", "--aa v0 has no effect with --three-augment"),
    ("--window-size=12", "--window-size has no effect: test_convnext is no SVT"), ("--freeze=nose", "there is no module nose"),
    ("--freeze=9", "--freeze 9: ConvNeXt has 4 stages: 1 to 4"), ("--freeze=,", "there is no module"),
    ("--freeze=stem,stages,norm_pre,head", "leaves nothing to train"), ("--layer-decay=0", "--layer-decay is 0.0, and must be at least"),
    ("--layer-decay=0.9 --freeze=backbone", "only one is trained"), ("--head-init-scale=-1", "--head-init-scale is -1.0"),
    ("--dist-bn=reduce", "--dist-bn has no effect: test_convnext has no batch norm"),
    ("--class-balanced --repeated-aug", "--class-balanced and --repeated-aug each say"),
    ("--ThreeAugment --src --train-interpolation=random", "--src resizes all images with one interpolation")])
def test_an_option_without_effect_is_one_line(train, words, message):
    refused(train(SMALL, *words.split()), message)


# ---- cut anywhere, they go on bit for bit ----

CUT = {"layer decay, frozen stage": ["--layer-decay=0.7", "--freeze=1", "--head-init-scale=0.1", "--lr=0.05"],
       "balanced classes": ["--class-balanced", "--lr=0.05"],
       "bce, 3-Augment": ["--bce-loss", "--three-augment", "--src", "--unscale-lr", "--lr=1e-3"]}


@pytest.mark.parametrize("words", CUT.values(), ids=CUT)
def test_a_cut_run_goes_on_bit_for_bit(train, words):
    words = [SMALL, *words, "--warmup-epochs=0", "--sched-lag=0"]
    whole, cut = train(*words), train(*words, "--max_step=4")
    saved = trained(cut)
    assert saved["progress"]["updates"] == 1
    again = trained(train(*words, "--resume=auto", folder=cut.folder))
    assert_same(trained(whole)["model"], again["model"])
    assert rows(whole)[-1]["train_loss"] == rows(cut)[-1]["train_loss"] and rows(whole)[-1]["train_lr"] == rows(cut)[-1]["train_lr"]


# ---- --layer-decay ----

TIMMS = {"alt_gvt_small": "twins_svt_small", "pcpvt_small_v0": "twins_pcpvt_small"}


@pytest.mark.parametrize("model", [*TIMMS, "test_vit", "test_convnext"])
def test_the_groups_of_layer_decay_are_timms(model):
    """Of our models those of timm's twins, whose weights have the same names."""
    ours, theirs = timm.create_model(model, num_classes=CLASSES), timm.create_model(TIMMS.get(model, model), num_classes=CLASSES)
    expected = timm.optim.param_groups_layer_decay(theirs, 0.05, getattr(theirs, "no_weight_decay", tuple)(), layer_decay=0.7)

    def told(groups, net):
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        return {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}

    found = told(optim.decay_groups(ours, 0.05, 0.7), ours)
    assert found == told(expected, theirs) and len(found) == len(list(ours.parameters()))
    assert len({scale for scale, _ in found.values()}) > 4 and found[f"{ours.default_cfg['classifier']}.weight"][0] == 1.0


@pytest.mark.parametrize("words, rates", [
    (["--sched=constant"], [0.01, 0.01]), (["--sched=none"], [0.01, 0.01]), (["--sched=plateau"], [0.01, 0.01]),
    (["--sched=cosine", "--min-lr=0"], [0.01, 0.005])])
def test_each_layer_moves_at_its_own_rate(train, words, rates):
    """With SGD, one update moves a weight by rate * gradient: beside plain torch, by the first update's rates."""
    usual = [SMALL, *PLAIN, "--opt=momentum", "--weight-decay=0", "--clip-grad=0", "--unscale-lr", "--lr=0.01", *words]
    decayed = train(*usual, "--layer-decay=0.5", "--max_step=1", "--batch-size=24")
    net = fresh("test_convnext").train()
    scales = {id(p): group["lr_scale"] for group in timm.optim.param_groups_layer_decay(net, 0, layer_decay=0.5) for p in group["params"]}
    images, targets = images_of(train.data, "train")
    F.cross_entropy(net(images), targets).backward()
    model = trained(decayed)["model"]
    for name, p in net.named_parameters():
        torch.testing.assert_close(model[name], p - 0.01 * scales[id(p)] * p.grad, rtol=1e-5, atol=1e-8)
    assert min(scales.values()) < 0.2
    assert [row["train_lr"] for row in rows(train(*usual, "--layer-decay=0.5"))] == pytest.approx(rates)  # the head's


# ---- --freeze ----

SGD = ["--opt=momentum", "--weight-decay=0", "--clip-grad=0", "--unscale-lr", "--lr=0.1", "--sched=constant"]
STAGES = {"stem": r"patch_embeds\.0\.", "1": r"patch_embeds\.0|blocks\.0\.|pos_block\.0", "backbone": r"(?!head)", "2":
          r"(patch_embeds|blocks|pos_block)\.[01]\.", "4": r"(?!head)", "pos_block,blocks.2.0": r"pos_block|blocks\.2\.0\."}


@pytest.mark.parametrize("what", STAGES)
def test_what_is_frozen(what):
    net = timm.create_model("alt_gvt_small", num_classes=CLASSES)
    frozen, count = networks.freeze(net, what, ("head",))
    names = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert names == {name for name, _ in net.named_parameters() if re.match(STAGES[what], name)}
    assert count == sum(parameter.numel() for name, parameter in net.named_parameters() if name in names)
    engine.set_training(net, frozen)
    asleep = {name for name, module in net.named_modules() if not module.training}
    for name, module in net.named_modules():  # what has weights sleeps with them; a stage's dropout behind its embedding, too
        own = {f"{name}.{parameter}".lstrip(".") for parameter, _ in module.named_parameters()}
        assert not own or (name in asleep) == (own <= names), name
    assert {f"pos_drops.{i}" for i in range(4)} & asleep == {
        "stem": {"pos_drops.0"}, "1": {"pos_drops.0"}, "2": {"pos_drops.0", "pos_drops.1"}, "pos_block,blocks.2.0": set()}.get(
        what, {f"pos_drops.{i}" for i in range(4)})


def test_what_is_frozen_stays_and_all_the_rest_moves(train):
    done = train(TWINS, *PLAIN, *SGD, "--freeze=2", "--max_step=1", "--no-eval", "--batch-size=4")
    before, after = fresh("alt_gvt_small").state_dict(), trained(done)["model"]
    stays = {name for name in before if torch.equal(before[name], after[name])}
    assert stays == {name for name in before if re.match(STAGES["2"], name)}
    count = sum(before[name].numel() for name in stays)
    assert f"Frozen: {count:,} of 23,549,315 parameters (--freeze 2)" in done.out
    assert rows(done)[0]["n_parameters"] == 23_549_315 - count


def test_what_is_frozen_is_computed_as_in_an_evaluation(train):
    """Neither dropout nor drop path, and a batch norm that takes the statistics it has, and keeps them."""
    done = train(TWINS, *PLAIN, "--drop=0.5", "--drop-path=0.9", "--freeze=4", "--lr=0", "--epochs=1", "--no-eval")
    images, targets = images_of(train.data, "train")
    net = fresh("alt_gvt_small").eval()
    assert rows(done)[0]["train_loss"] == pytest.approx(F.cross_entropy(net(images), targets).item(), rel=1e-5)
    done = train("--model=test_efficientnet", *PLAIN, *SGD, "--freeze=backbone", "--epochs=1")
    net, model = fresh("test_efficientnet").eval(), trained(done)["model"]
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, model[name])}
    assert moved == {"classifier.weight", "classifier.bias"}


def test_a_frozen_stem_alone_is_timms(train):
    """Beside timm.utils.freeze and one step of SGD in plain torch: the rest trains, its batch norms too."""
    words = ["--model=test_efficientnet", *PLAIN, "--max_step=1", "--no-eval"]
    done = train(*words, *SGD, "--freeze=conv_stem,bn1,blocks.0", "--batch-size=24")
    net = fresh("test_efficientnet").train()
    timm.utils.freeze(net, ["conv_stem", "bn1", "blocks.0"])
    images, targets = images_of(train.data, "train")
    F.cross_entropy(net(images), targets).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model = trained(done)["model"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(model[name], value, rtol=1e-4, atol=1e-6, msg=name)
    done = train(*words, "--freeze=stem")
    assert "Frozen: " in done.out and done.status == 0


# ---- --head-init-scale ----

def test_a_fresh_head_is_scaled(train):
    done = train(SMALL, *PLAIN, "--head-init-scale=0.001", "--lr=0", "--max_step=1", "--no-eval")
    model, net = trained(done)["model"], fresh("test_convnext", head_init_scale=0.001)
    assert_same(model, net.state_dict())  # timm's convnext has the same by its own argument


def test_a_head_of_other_classes_is_scaled_and_one_that_fits_is_not(train, tmp_path):
    torch.manual_seed(5)
    net = timm.create_model("test_convnext", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "seven.pth")
    words = [SMALL, *PLAIN, "--lr=0", "--max_step=1", "--no-eval"]
    plain, scaled = (trained(train(*words, f"--finetune={tmp_path}/seven.pth", *more))["model"] for more in ([], ["--head-init-scale=0.5"]))
    for name, value in plain.items():
        assert torch.equal(scaled[name], value * 0.5 if name.startswith("head.fc") else net.state_dict()[name])
    torch.save(timm.create_model("test_convnext", num_classes=CLASSES).state_dict(), tmp_path / "three.pth")
    refused(train(*words, f"--finetune={tmp_path}/three.pth", "--head-init-scale=0.5"), "--head-init-scale has no effect")


# ---- --window-size ----

def test_windows_of_twelve_tokens_at_384_pixels_are_timms_and_need_no_padding(monkeypatch):
    ours = timm.create_model("alt_gvt_small", num_classes=CLASSES, window_sizes=(12,) * 4).eval()
    theirs = timm.create_model("twins_svt_small", img_size=384, num_classes=CLASSES, wss=(12,) * 4).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        expected = theirs(images)
        monkeypatch.setattr(gvt.F, "pad", None)
        monkeypatch.setattr(gvt.PadWith, "apply", None)
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-5)


def test_windows_come_with_the_weights_unless_said_otherwise(train):
    words = [TWINS, *PLAIN, "--batch-size=4", "--lr=0", "--max_step=1"]
    one = train(*words, "--window-size=4")  # and four runs without it, or with another
    net = fresh("alt_gvt_small", window_sizes=(4,) * 4).eval()
    images, targets = images_of(train.data, "val")
    with torch.no_grad():
        small, usual = (F.cross_entropy(net(images), targets).item(),
                        F.cross_entropy(fresh("alt_gvt_small").eval()(images), targets).item())
    assert abs(small - usual) > 1e-6
    assert rows(one)[0]["test_loss"] == pytest.approx(small, rel=1e-6)
    weights = str(one.folder / "checkpoint.pth")
    for more, loss in (([], small), (["--window-size=7"], usual)):
        done = train(*words, f"--finetune={weights}", *more)
        assert rows(done)[0]["test_loss"] == pytest.approx(loss, rel=1e-6)
        assert ("Windows are 4 x 4 tokens, as the weights' were (--window-size)" in done.out) == (not more)
        side = 7 if more else 4
        assert trained(done)["options"]["window_size"] == side and f"window_size = {side}\n" in (done.folder / "recipe.toml").read_text()
    done = train(*words, "--resume=auto", folder=one.folder)
    assert trained(done)["options"]["window_size"] == 4 and "this is not what" not in done.out


# ---- --class-balanced ----

class Uneven:
    targets = np.array([0] * 20 + [2] * 3 + [1] * 7 + [2] * 2 + [5] * 1)

    def __len__(self):
        return len(self.targets)


def balanced(epoch, seed=0, ranks=1):
    found = []
    for rank in range(ranks):
        sampler = BalancedSampler(Uneven(), ranks, rank, seed)
        sampler.set_epoch(epoch)
        found.append(list(zip(*(values.tolist() for values in sampler.draws()))))
        assert len(found[-1]) == len(sampler)
    return found


def test_each_class_is_drawn_equally_often():
    """33 images of 4 classes: 8 draws of each, and one more of one of them; no image again before the others of its class."""
    targets, more = Uneven.targets, set()
    for epoch in range(40):
        (draws,) = balanced(epoch)
        assert len(draws) == 33 and len(set(draws)) == 33
        counts = np.bincount(targets[[index for index, _ in draws]], minlength=6)
        assert sorted(counts) == [0, 0, 8, 8, 8, 9] and counts[3] == counts[4] == 0
        more.add(int(counts.argmax()))
        for target in (0, 1, 2, 5):
            images = np.bincount([index for index, _ in draws if targets[index] == target], minlength=33)[targets == target]
            assert images.max() - images.min() <= 1
        for index in {index for index, _ in draws}:
            assert sorted(again for other, again in draws if other == index) == list(range(sum(other == index for other, _ in draws)))
    assert more == {0, 1, 2, 5}  # what is left over goes round
    assert balanced(0) != balanced(1) and balanced(0) != balanced(0, seed=1) and balanced(3) == balanced(3)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_share_one_balanced_order(ranks):
    (whole,), parts = balanced(2), balanced(2, ranks=ranks)
    together = [draw for some in zip(*parts) for draw in some]
    assert together[:33] == whole and len(together) == -(-33 // ranks) * ranks and len(set(together)) == len(together)


def test_a_balanced_run_learns_from_all_classes_alike(train, tmp_path):
    """Classes of 4, 1 and 1 images, of which each image is the same within its class: the mean loss is that of the three classes'."""
    made = tmp_path / "uneven"
    for number, name in enumerate(("flower", "leaves", "temple")):
        path = sorted((train.data / "train" / name).iterdir())[0]
        for split, count in (("train", (4, 1, 1)[number]), ("val", 1)):
            for number_of_copy in range(count):
                (made / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, made / split / name / f"{number_of_copy}.png")
    words = [SMALL, *PLAIN, "--lr=0", "--epochs=1", "--batch-size=6", "--data-path", made]
    images, targets = images_of(made, "train")
    losses = F.cross_entropy(fresh("test_convnext").train()(images), targets, reduction="none")
    assert rows(train(*words, "--class-balanced"))[0]["train_loss"] == pytest.approx(losses[[0, 4, 5]].mean().item(), rel=1e-5)
    assert rows(train(*words))[0]["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


# ---- --dist-bn ----

# One process that has imported all of it, and for each run two that it forks, with what a launcher says
TWO_RANKS = """
import json, os, socket, sys
import main
for words in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        if not (child := os.fork()):
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os._exit(main.run(words))
        ranks.append(child)
    assert [os.waitpid(child, 0)[1] for child in ranks] == [0, 0], words
"""


def statistics(state):
    return {name: value for name, value in state.items() if name.endswith(("running_mean", "running_var"))}


def test_statistics_of_batch_norms_are_reduced_as_timms(train, tmp_path):
    """Two ranks of 4 images, an epoch of 3 updates at rate 0: each update begins with the first rank's statistics, and the last one's are
    averaged; beside plain torch. `broadcast` leaves the first rank's own."""
    data = train.data
    words = ["--model=test_efficientnet", *PLAIN, "--lr=0", "--epochs=1", "--device=cpu", "--input-size=32", "--num_workers=0",
             "--batch-size=4", "--no-eval", "--data-path", data]
    net, (images, _) = fresh("test_efficientnet").train(), images_of(data, "train")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    own, mean = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        for step in range(3):
            batches = [images[order[step * 8:(step + 1) * 8][rank::2]] for rank in range(2)]
            own(batches[0])
            ranks = [copy.deepcopy(mean) for _ in range(2)]
            for rank in range(2):
                ranks[rank](batches[rank])
            mean = ranks[0]
        for (_, a), (_, b) in zip(ranks[0].named_buffers(), ranks[1].named_buffers()):
            if a.is_floating_point():
                a.add_(b).div_(2)
    runs = [("reduce", "whole", [], ranks[0]), ("reduce", "cut", ["--max_step=2"], None), ("reduce", "cut", [], ranks[0]),
            ("broadcast", "first", [], own)]
    done = run([sys.executable, "-c", TWO_RANKS, json.dumps(
        [[*map(str, words), *part, "--dist-bn", how, "--resume=auto", "--output_dir", str(tmp_path / folder)]
         for how, folder, part, _ in runs])], None, {"PYTHONPATH": str(ROOT)}, 300)
    assert done.returncode == 0, done.stderr
    for _, folder, _, expected in runs:
        if expected is not None:
            found = statistics(torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True)["model"])
            assert found and found.keys() == statistics(expected.state_dict()).keys()
            for key, value in found.items():
                torch.testing.assert_close(value, expected.state_dict()[key], rtol=1e-4, atol=1e-6, msg=key)
    # cut and gone on with: bit for bit
    assert_same(*(torch.load(tmp_path / folder / "checkpoint.pth", weights_only=True)["model"] for folder in ("whole", "cut")))


def test_what_ends_a_whole_pass_comes_before_it_is_saved_and_once():
    """A save behind the last update has it already, and the pass that goes on there has nothing left."""
    net, told, progress = torch.nn.Linear(2, 3), [], engine.Progress()
    batches = [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), [0] * 4)] * 3
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def run(batches, total):
        class Loader(list):
            def __len__(self):
                return total
        engine.train_one_epoch(net, lambda images, outputs, targets: F.cross_entropy(outputs, targets), Loader(batches), optimizer, CPU, 0,
                               make_precision(CPU, "off"), quiet=True, progress=progress, max_steps=2 if len(batches) == 3 else 0,
                               at_the_end=lambda: told.append("end"), after_update=lambda settle: told.append("update"))

    run(batches, 3)
    assert told == ["update", "update"]
    run(batches[2:], 3)
    run([], 3)
    assert told == ["update", "update", "end", "update"]


# ---- models with two heads ----

TWO = "--model=deit_tiny_distilled_patch16_224"


def test_both_heads_are_fresh_scaled_trained_alone_and_of_the_whole_rate(train, tmp_path):
    torch.manual_seed(5)
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, img_size=48)
    torch.save({"model": net.state_dict()}, tmp_path / "deit.pth")
    words = [TWO, *PLAIN, "--max_step=1", "--no-eval", f"--finetune={tmp_path}/deit.pth"]
    plain, scaled = (trained(train(*words, "--lr=0", *more))["model"] for more in ([], ["--head-init-scale=0.5"]))
    for name, value in plain.items():
        assert torch.equal(scaled[name], value * 0.5 if name.startswith("head") else value), name
    frozen = trained(train(*words, "--freeze=backbone", *SGD))["model"]
    assert {name for name in plain if not torch.equal(plain[name], frozen[name])} == {
        "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    net = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32)
    scales = {id(p): group["lr_scale"] for group in optim.decay_groups(net, 0.05, 0.5) for p in group["params"]}
    assert scales[id(net.head.weight)] == scales[id(net.head_dist.weight)] == 1.0 and scales[id(net.patch_embed.proj.weight)] < 1e-3
    # the weights are of 48 pixels: timm's own interpolation of positions
    expected = timm.models.deit.checkpoint_filter_fn({"model": torch.load(tmp_path / "deit.pth")["model"]}, net)["pos_embed"]
    torch.testing.assert_close(plain["pos_embed"], expected)


def test_two_heads_with_binary_cross_entropy_and_a_teacher(train):
    """DeiT's hard distillation with DeiT III's loss: each head has its half."""
    teacher = train(SMALL, *PLAIN, "--lr=0", "--max_step=1", "--no-eval").folder / "checkpoint.pth"
    words = [TWO, *PLAIN, "--bce-loss", "--lr=0", "--epochs=1", "--no-eval", "--batch-size=24", "--layer-decay=0.7", "--freeze=3"]
    done = train(*words, "--distillation-type=hard", "--teacher-model=test_convnext", "--teacher-path", teacher)
    net, (images, targets) = fresh("deit_tiny_distilled_patch16_224", img_size=32).train(), images_of(train.data, "train")
    net.set_distilled_training(True)
    with torch.no_grad():
        student, learned = net(images)
        decided = fresh("test_convnext").eval()(images).argmax(1)
    expected = (BinaryCrossEntropy(0.0)(student, targets) + F.cross_entropy(learned, decided)) / 2
    assert rows(done)[0]["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
