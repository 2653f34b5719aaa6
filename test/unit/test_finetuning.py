"""What DeiT, DeiT III and timm have for training and fine-tuning, by their names: each against timm, torch or a closed form, and from the
command line; and cut anywhere, each goes on bit for bit."""
import contextlib
import io
import json
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import small_transform
from PIL import Image, ImageFilter, ImageOps
from test_main import PLAIN, images_of
from timm.data import Mixup
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.loss import BinaryCrossEntropy
from torchvision import transforms as tv
from torchvision.transforms.functional import InterpolationMode

import main
import optim
import options
from losses import BinaryCriterion

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
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), folder=folder, data=squares)

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
    images, targets = images_of(done.data, "train")
    net = fresh("test_convnext").train()
    expected = BinaryCrossEntropy(**{"smoothing": 0.0} | settings)(net(images), targets).item()
    assert rows(done)[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    # what is tested is cross entropy all the same
    images, targets = images_of(done.data, "val")
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
    ("--ThreeAugment --src --train-interpolation=random", "--src resizes all images with one interpolation")])
def test_an_option_without_effect_is_one_line(train, words, message):
    refused(train(SMALL, *words.split()), message)


# ---- cut anywhere, they go on bit for bit ----

CUT = {"bce, 3-Augment": ["--bce-loss", "--three-augment", "--src", "--unscale-lr", "--lr=1e-3"]}


@pytest.mark.parametrize("words", CUT.values(), ids=CUT)
def test_a_cut_run_goes_on_bit_for_bit(train, words):
    words = [SMALL, *words, "--warmup-epochs=0", "--sched-lag=0"]
    whole, cut = train(*words), train(*words, "--max_step=4")
    saved = trained(cut)
    assert saved["progress"]["updates"] == 1
    again = trained(train(*words, "--resume=auto", folder=cut.folder))
    assert_same(trained(whole)["model"], again["model"])
    assert rows(whole)[-1]["train_loss"] == rows(cut)[-1]["train_loss"] and rows(whole)[-1]["train_lr"] == rows(cut)[-1]["train_lr"]
