"""timm's models with their own ways: names, arguments, two heads, pre-processing; timm itself is the oracle."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from test_main import CLASSES, PLAIN, data, evaluations, load, printed_losses, start, works  # noqa: F401  fixtures
from timm.data import create_transform, resolve_data_config
from torchvision import datasets as folders

import assembly
import checkpoint
import losses
import networks
import options
import transforms
from transforms import TWINS, Preprocessing

HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.95)  # as timm's test_convnext
SIZES = dict(
    convmixer_768_32=64, efficientvit_m0=64, ghostnet_050=64, levit_128s=64, pit_ti_distilled_224=64, deit_tiny_distilled_patch16_224=64,
    efficientformerv2_s0=64, crossvit_9_240=240, dla46x_c=64, lcnetv2_small=64, repghostnet_050=64, swiftformer_xs=64,
    xcit_nano_12_p8_224=64)


def build(model, *words, classes=CLASSES, say=lambda *_: None):
    return assembly.build_model(options.parse(["--data-path=x", f"--model={model}", "--device=cpu", *words]), classes, say)


def photograph(width=90, height=70):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)


# ---- names ----

@pytest.mark.parametrize("name, words", [
    ("timm/resnet18", "models are taken by name, not from a hub or a folder: name it resnet18"),
    ("hf-hub:timm/resnet18.a1_in1k", "models are taken by name, not from a hub or a folder: name it resnet18.a1_in1k"),
    ("hf_hub:someone/thing", "models are taken by name, not from a hub or a folder: name one of"),
    ("local-dir:/tmp/thing", "models are taken by name, not from a hub or a folder: name one of"),
    ("data:x", "models are taken by name"), ("C:\\resnet18", "models are taken by name"), ("resnet", "no such model"),
    ("resnet18.nobody", r"Invalid pretrained tag \(nobody\)"), ("", "no such model")])
@pytest.mark.parametrize("option", ["--model", "--teacher-model"])
def test_a_name_that_is_a_place_is_one_line_and_reaches_no_loader(start, data, monkeypatch, option, name, words):  # noqa: F811
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *_, **__: pytest.fail("a hub was asked"))
    monkeypatch.setattr("timm.models._factory.load_model_config_from_path", lambda *_, **__: pytest.fail("a folder was read"))
    if option == "--teacher-model" and name:
        done = start("--model=test_convnext", "--distillation-type=hard", f"--teacher-model={name}")
    else:
        done = start(f"--model={name}")
        option = "--model"
    assert done.status == 2
    assert done.err.startswith(f"error: {option} {name}: ") and done.err.count("\n") == 1
    with pytest.raises(ValueError, match=words):
        networks.create(name, 3, 32)


# ---- arguments ----

@pytest.mark.parametrize("name", SIZES)
def test_the_odd_models_of_timm_train(name):
    """Their arguments are their own; each answers with logits and gives every head a gradient."""
    said, size = [], SIZES[name]
    net = build(name, f"--input-size={size}", say=said.append).train()
    outputs = net(torch.randn(2, 3, size, size))
    assert outputs.shape == (2, CLASSES)
    losses.DistillationLoss(losses.Criterion(0.1))(None, outputs, torch.tensor([0, 2])).backward()
    heads = [parameter for key, parameter in net.named_parameters() if key.startswith(networks.heads(networks.configuration(name)))]
    assert heads and all(parameter.grad.abs().max() > 0 for parameter in heads)
    has_drop_path = any("DropPath" in type(module).__name__ for module in net.modules())
    assert any("--drop-path 0.1 has no effect" in line for line in said) <= (not has_drop_path)


def test_what_a_model_does_not_have_is_said():
    said = []
    build("ghostnet_050", "--input-size=64", "--drop-path=0.2", say=said.append)
    assert said == ["note: --drop-path 0.2 has no effect: ghostnet_050 has none"]
    said.clear()
    build("ghostnet_050", "--input-size=64", "--drop-path=0", say=said.append)
    build("test_vit", "--input-size=64", "--drop-path=0.2", say=said.append)
    assert said == []


def test_a_trial_changes_neither_weights_nor_statistics_nor_random_numbers():
    torch.manual_seed(1)
    expected = timm.create_model("ghostnet_050", num_classes=3)
    after = torch.rand(3)
    torch.manual_seed(1)
    net = build("ghostnet_050", "--input-size=64")
    assert torch.equal(torch.rand(3), after)
    assert net.training and all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name, words, message", [
    ("crossvit_9_240", "--input-size=64", r"--model crossvit_9_240 fails on an image of 64 pixels \(.+\): its own size is .* 240"),
    ("efficientformer_l1", "--input-size=64", r"--model efficientformer_l1 fails on an image of 64 pixels \(.+\): .* --input-size 224"),
    ("coat_tiny", "--input-size=64 --grad-checkpointing", "--grad-checkpointing: coat_tiny cannot recompute its blocks: train it without"),
    ("inception_v3", "--input-size=96 --grad-checkpointing", "--grad-checkpointing: inception_v3 cannot recompute its blocks"),
    ("test_vit", "--pretrained --input-size=32", r"--model test_vit: cannot fetch the published weights \(.+\): check the network"),
])
def test_what_cannot_train_is_one_line(monkeypatch, name, words, message):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        build(name, *words.split())
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_classifier_is_one_line():
    class Encoder(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)), images
    with pytest.raises(ValueError, match=r"^--model encoder: it gives tuple for an image, not logits of 3 classes"):
        networks.try_out(Encoder(), "encoder", 3, 32, 32)


def test_a_model_that_recomputes_in_training_only_is_tried_so():
    """LeViT keeps its biases in an evaluation: its blocks cannot be recomputed there, and can in training."""
    torch.manual_seed(1)
    expected = timm.create_model("levit_128s", num_classes=3, img_size=64).state_dict()
    torch.manual_seed(1)
    net = build("levit_128s", "--input-size=64", "--grad-checkpointing", "--distillation-type=hard", "--teacher-model=x")
    assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    assert net.training and all(parameter.grad is None for parameter in net.parameters())
    sum(logits.square().sum() for logits in net(torch.randn(2, 3, 64, 64))).backward()
    assert net.head.linear.weight.grad.abs().max() > 0


def test_checkpointed_blocks_have_the_same_gradients():
    grads = []
    for words in ([], ["--grad-checkpointing"]):
        torch.manual_seed(0)
        net = build("test_vit", "--input-size=64", "--drop-path=0", *words)
        net(torch.randn(2, 3, 64, 64)).square().sum().backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- two heads ----

DISTILLED = [
    "deit_tiny_distilled_patch16_224", "levit_128s", "efficientformerv2_s0", "swiftformer_xs", "pit_ti_distilled_224", "repvit_m0_9"]


@pytest.mark.parametrize("name", DISTILLED)
def test_of_two_heads_one_learns_from_labels_and_one_from_the_teacher(name):
    """DeiT: the class head's gradient does not know of the teacher; without a distillation both learn from labels."""
    words = ["--input-size=64", "--drop-path=0"]
    net = build(name, *words, "--distillation-type=hard", "--teacher-model=x").train()
    images, targets = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    of_labels, of_teacher = [[p for key, p in net.named_parameters() if key.startswith(f"{head}.")]
                             for head in networks.heads(networks.configuration(name))]
    assert of_labels and of_teacher
    for alpha, learns, rests in ((1.0, of_teacher, of_labels), (0.0, of_labels, of_teacher)):
        net.zero_grad()
        loss = losses.DistillationLoss(losses.Criterion(), lambda x: torch.eye(CLASSES)[[2, 2, 1, 1]], "hard", alpha)
        outputs = net(images)
        assert isinstance(outputs, tuple)
        loss(images, outputs, targets).backward()
        assert all(p.grad.abs().max() > 0 for p in learns)
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in rests)
    net.eval()
    with torch.no_grad():
        assert net(images).shape == (4, CLASSES)
    assert isinstance(build(name, *words).train()(images), torch.Tensor)


@pytest.mark.parametrize("name", [*DISTILLED, "crossvit_9_240", "efficientvim_m1", "iformer_t"])
def test_fine_tuning_to_other_classes_changes_every_head(name):
    with torch.device("meta"):
        old, new = (timm.create_model(name, num_classes=n) for n in (10, 3))
    content, own = old.state_dict(), new.state_dict()
    heads = networks.heads(networks.configuration(name))
    state, classes = checkpoint.adapt_head(new, content, heads)
    assert classes == 10
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in own.items()}
    assert all((value is content[key]) != key.startswith(tuple(f"{head}." for head in heads)) for key, value in state.items())
    fits, none = checkpoint.adapt_head(old, content, heads)
    assert fits is content and none is None
    anew, classes = checkpoint.adapt_head(old, content, heads, anew=True)
    assert classes == 10 and anew is not content


def test_weights_of_another_size_are_told_apart_from_those_of_another_model():
    state = timm.create_model("levit_128s", num_classes=3).state_dict()
    with pytest.raises(ValueError, match=r"it was trained at another --input-size, or is of another model \(--model\); other shapes: "):
        checkpoint.load_weights(timm.create_model("levit_128s", num_classes=3, img_size=64), state)


def test_a_distilled_model_is_fine_tuned_to_other_classes_from_the_command_line(works, tmp_path):  # noqa: F811
    name = "levit_128s"
    torch.save({"model": timm.create_model(name, num_classes=10, img_size=64).state_dict()}, tmp_path / "ten.pth")
    out = works(f"--model={name}", *PLAIN, "--finetune", tmp_path / "ten.pth", "--epochs=1", "--max_step=1",
                "--input-size=64", "--output_dir", tmp_path / "run").out
    assert "its head has 10 classes and the data 3, so the head starts anew" in out
    saved = load(tmp_path / "run" / "checkpoint.pth")["model"]
    assert saved["head.linear.weight"].shape[0] == saved["head_dist.linear.weight"].shape[0] == CLASSES


# ---- pre-processing ----

@pytest.mark.parametrize("name, size", [
    ("alt_gvt_small", 224), ("test_convnext", 160), ("vit_tiny_patch16_224.augreg_in21k", 224), ("beit_base_patch16_224", 224),
    ("vit_base_patch16_clip_224", 224), ("tf_efficientnet_b0", 224), ("resnet50", 288), ("resnet50", 224), ("regnety_160", 288),
    ("swinv2_tiny_window8_256", 256), ("eva02_tiny_patch14_336", 336), ("dpn68", 224), ("naflexvit_base_patch16_siglip", 384)])
def test_evaluated_pixels_are_timms(name, size):
    """As timm's validate.py prepares the images of published weights."""
    config = networks.configuration(name)
    test_size = (config.get("test_input_size") or (0,))[-1]
    expected = resolve_data_config({"input_size": (3, size, size)}, config, use_test_size=size == test_size != config["input_size"][-1])
    found = networks.preprocessing(name, size, published=True)
    assert {key: expected[key] for key in found.save()} == found.save()
    ours = transforms.build_transform(False, size, preprocessing=found)
    for width, height in ((300, 200), (70, 91)):
        image = photograph(width, height)
        assert torch.equal(ours(image), create_transform(**expected)(image))


def test_every_published_model_is_prepared_as_timm_says():
    names = timm.list_models(pretrained=True)
    assert len(names) > 1000
    for name in names:
        config = networks.configuration(name)
        found, expected = Preprocessing.published(config, config["input_size"][-1]).save(), resolve_data_config({}, config)
        assert found == {key: expected[key] for key in found}, name


def test_twins_pixels_stay_as_they_are():
    for size in range(32, 1025):
        assert transforms.build_transform(False, size).transforms[1].size == int(256 / 224 * size)
    config = networks.configuration("alt_gvt_small")
    assert Preprocessing.published(config, 224) == TWINS == networks.preprocessing("alt_gvt_small", 224)


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_other_crops_are_timms(mode):
    found = Preprocessing(crop_pct=0.9, crop_mode=mode, interpolation="bilinear")
    expected = create_transform(64, crop_pct=0.9, crop_mode=mode, interpolation="bilinear")
    assert torch.equal(transforms.build_transform(False, 64, preprocessing=found)(photograph()), expected(photograph()))


def test_trained_pixels_have_the_weights_mean_deviation_and_interpolation():
    plain = dict(auto_augment="none", color_jitter=0, reprob=0, hflip=0, crop_scale=(1, 1))
    own = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation="bilinear")
    for asked, used in ((None, "bilinear"), ("bicubic", "bicubic")):
        ours = transforms.build_transform(True, 32, interpolation=asked, preprocessing=own, **plain)
        theirs = create_transform(32, is_training=True, scale=(1, 1), hflip=0, color_jitter=0, interpolation=used, mean=own.mean,
                                  std=own.std)
        torch.manual_seed(0)
        a = ours(photograph(64, 64))
        torch.manual_seed(0)
        assert torch.equal(a, theirs(photograph(64, 64)))


def test_whose_pre_processing_it_is():
    """The checkpoint's own, else what timm publishes; without weights, and of ours that do not say it, Twins'."""
    name, own = "test_convnext", Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.7, "squash", "bilinear")
    assert networks.preprocessing(name, 32) == TWINS
    assert networks.preprocessing(name, 32, published=True) == networks.preprocessing(name, 32, {"model": {}}) == HALF
    assert networks.preprocessing(name, 32, {"stem.0.weight": torch.zeros(1)}) == HALF
    ours = {"model": {}, "options": {}, "classes": []}
    assert networks.preprocessing(name, 32, ours) == TWINS
    assert networks.preprocessing(name, 32, {**ours, "preprocessing": own.save()}) == own
    assert networks.preprocessing(name, 32, {"model": {}, "preprocessing": "another project's word"}) == HALF
    assert Preprocessing.load({**own.save(), "mean": list(own.mean)}) == own
    assert own.override(mean=(0.0, 0.0, 0.0), crop_pct=1.0) == Preprocessing((0.0, 0.0, 0.0), own.std, 1.0, "squash", "bilinear")
    assert own.override() == own


@pytest.mark.parametrize("wrong", [None, 3, [], {}, {**HALF.save(), "mean": [0.5]}, {**HALF.save(), "std": [0, 0, 0]},
                                   {**HALF.save(), "crop_pct": float("nan")}, {**HALF.save(), "interpolation": "x"},
                                   {**HALF.save(), "crop_mode": "x"}, {**HALF.save(), "more": 1}, {**HALF.save(), "crop_pct": "x"}])
def test_a_record_that_is_none_is_one_line(wrong):
    with pytest.raises(ValueError, match=r"^a.pth: its preprocessing is .*: expected mean, std") as caught:
        networks.preprocessing("test_convnext", 32, {"options": {}, "classes": [], "preprocessing": wrong}, path="a.pth")
    assert "\n" not in str(caught.value)


def accuracy(net, data, prepared):  # noqa: F811
    """Acc@1 and loss of plain torch over the validation images, prepared by timm."""
    transform = create_transform(32, **{key: value for key, value in prepared.save().items()})
    images, targets = map(list, zip(*folders.ImageFolder(data / "val", transform)))
    with torch.no_grad():
        logits = net.eval()(torch.stack(images))
    targets = torch.tensor(targets)
    return 100 * (logits.argmax(1) == targets).double().mean().item(), F.cross_entropy(logits, targets).item()


def assert_evaluates(out, net, data, prepared):  # noqa: F811
    (found, _, loss), (expected, expected_loss) = evaluations(out)[-1], accuracy(net, data, prepared)
    assert (found, loss) == (pytest.approx(expected, abs=1e-3), pytest.approx(expected_loss, abs=2e-3))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights of timm's test_convnext as a plain state dict that tells its prepared images apart. -> path, network"""
    torch.manual_seed(0)
    net = timm.create_model("test_convnext", num_classes=CLASSES)
    with torch.no_grad():
        net.head.fc.weight.mul_(30)
    path = tmp_path_factory.mktemp("weights") / "convnext.pth"
    torch.save(net.state_dict(), path)
    return path, net


def test_weights_are_evaluated_as_timm_publishes_their_model(works, data, published):  # noqa: F811
    path, net = published
    assert accuracy(net, data, HALF)[1] != pytest.approx(accuracy(net, data, TWINS)[1], abs=0.01), "the oracle must tell them apart"
    done = works("--model=test_convnext", "--eval", "--resume", path)
    assert f"note: images are not prepared as Twins' are, but with {HALF}" in done.out
    assert_evaluates(done.out, net, data, HALF)
    other = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0, "center", "bilinear")
    words = ["--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--crop-pct=1", "--interpolation=bilinear"]
    assert_evaluates(works("--model=test_convnext", "--eval", "--resume", path, *words).out, net, data, other)


def test_pretrained_weights_are_prepared_as_published(works, data, published, monkeypatch):  # noqa: F811
    def fetch(model, *_, **__):
        model.load_state_dict(torch.load(published[0], weights_only=True))
    monkeypatch.setattr("timm.models._builder.load_pretrained", fetch)
    monkeypatch.setattr(assembly.labels, "decide", lambda classes, *_, **__: assembly.labels.Numbering(
        list(classes), {name: i for i, name in enumerate(classes)}))  # the labels are not the question here
    assert_evaluates(works("--model=test_convnext", "--eval", "--pretrained").out, published[1], data, HALF)


def test_images_are_described_as_they_are_prepared():
    assert TWINS.describe() == TWINS.describe("bicubic") == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, bicubic, crop 0.875"
    assert HALF.describe("random") == "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, bicubic, crop 0.95, random crops random"
    assert HALF.describe(native_size=True) == "mean 0.5 0.5 0.5, std 0.5 0.5 0.5, never resized"


@pytest.mark.parametrize("words, message", [
    ("--mean 0.5", "--mean takes three numbers between 0 and 1"), ("--std 0.5 0.5 0", "--std takes three numbers between 0 and 1"),
    ("--mean 128 128 128", "--mean takes three numbers between 0 and 1"), ("--std nan 1 1", "--std takes three numbers"),
    ("--crop-pct 0", "--crop-pct is 0.0, and must be between 0.01 and 1"), ("--crop-pct nan", "--crop-pct is nan"),
    ("--crop-pct 87.5", "--crop-pct is 87.5")])
def test_wrong_numbers_for_images_are_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        options.parse(["--data-path=x", *words.split()])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_fine_tuned_weights_remember_their_images(works, data, published, tmp_path):  # noqa: F811
    """The recipe says them, the checkpoint keeps them, and an evaluation and a resume of it use them; a start from nothing is Twins'."""
    words = ["--model=test_convnext", *PLAIN, "--max_step=1", "--lr=0.1"]
    done = works(*words, "--finetune", published[0], "--epochs=1", "--output_dir", tmp_path / "tuned")
    assert f"  images         {HALF}\n" in done.out
    saved = load(tmp_path / "tuned" / "checkpoint.pth")
    assert Preprocessing.load(saved["preprocessing"]) == HALF
    net = timm.create_model("test_convnext", num_classes=CLASSES)
    net.load_state_dict(saved["model"])
    assert_evaluates(done.out, net, data, HALF)
    again = works("--model=test_convnext", "--eval", "--resume", tmp_path / "tuned" / "checkpoint.pth")
    assert_evaluates(again.out, net, data, HALF)
    resumed = works(*words, "--resume", tmp_path / "tuned" / "checkpoint.pth", "--epochs=2")
    assert f"  images         {HALF}\n" in resumed.out
    fresh = works(*words, "--epochs=1", "--no-eval", "--output_dir", tmp_path / "fresh")
    assert f"  images         {TWINS}\n" in fresh.out and "note: images" not in fresh.out
    assert Preprocessing.load(load(tmp_path / "fresh" / "checkpoint.pth")["preprocessing"]) == TWINS


# ---- teachers ----

@pytest.mark.parametrize("own_size", [32, 48])
def test_a_teacher_sees_its_own_size_and_normalisation(own_size):
    seen = []
    teacher = losses.Teacher(lambda images: seen.append(images), own_size, HALF, TWINS)
    image = photograph(64, 64)
    batch = transforms.build_transform(False, 32, preprocessing=TWINS)(image)[None]
    teacher(batch)
    expected = transforms.build_transform(False, 32, preprocessing=Preprocessing(HALF.mean, HALF.std))(image)[None]
    if own_size != 32:
        expected = F.interpolate(expected, (own_size, own_size), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    same = losses.Teacher(lambda images: seen.append(images), 32, TWINS, TWINS)
    same(batch)
    assert seen[1] is batch


def test_teachers_sizes():
    config = networks.configuration("test_convnext")
    assert networks.trained_size(config) == networks.trained_size(config, {"model": {}}) == 160
    assert networks.trained_size(config, {"options": {"input_size": 32}}) == 32
    assert networks.trained_size(config, {"options": {"input_size": "x"}}) == networks.trained_size(config, {"options": 3}) == 160


def test_a_published_teacher_of_other_classes_is_refused(start):  # noqa: F811
    """Its head would be random: the remedy is a teacher of these classes."""
    done = start("--model=test_convnext", "--distillation-type=hard", "--teacher-model=regnety_160")
    assert done.status == 2 and done.err.count("\n") == 1
    assert "--teacher-model regnety_160" in done.err and "1000" in done.err and "--teacher-path" in done.err


def test_a_teacher_of_timms_teaches_from_its_own_pictures(works, data, published):  # noqa: F811
    """Hard distillation at alpha 1 costs the cross entropy with the teacher's decisions: on 160 pixels, normalised by a half."""
    path, net = published
    words = ["--model=test_convnext", *PLAIN, "--max_step=1", "--epochs=1", "--no-eval", "--batch-size=24",
             "--distillation-type=hard", "--distillation-alpha=1", "--teacher-model=test_convnext", "--teacher-path", path]
    done = works(*words, "--finetune", path, "--mean", "0.1", "0.2", "0.3")
    assert f"The teacher sees 160 pixels, {HALF}" in done.out
    own, shown = Preprocessing((0.1, 0.2, 0.3), HALF.std), Preprocessing(HALF.mean, HALF.std)
    size = 32
    images = {}
    for prepared in (own, shown):
        transform = create_transform(size, is_training=True, no_aug=True, interpolation="bicubic", mean=prepared.mean, std=prepared.std)
        images[prepared] = torch.stack([transform(image) for image, _ in folders.ImageFolder(data / "train")])
    with torch.no_grad():
        decided = net.eval()(F.interpolate(images[shown], (160, 160), mode="bicubic", antialias=True)).argmax(1)
        logits = net(images[own])
    (loss,) = printed_losses(done.out)
    assert loss == pytest.approx(F.cross_entropy(logits, decided).item(), abs=2e-2)


def test_on_the_command_line_the_head_of_labels_does_not_learn_from_the_teacher(works, published, tmp_path):  # noqa: F811
    """With the whole loss the teacher's and no decay, a step of AdamW moves only what has a gradient."""
    path = tmp_path / "levit.pth"
    net = timm.create_model("levit_128s", num_classes=CLASSES, img_size=64)
    torch.save(net.state_dict(), path)
    works("--model=levit_128s", "--input-size=64", *PLAIN, "--finetune", path, "--epochs=1", "--max_step=1", "--lr=0.1", "--no-eval",
          "--weight-decay=0", "--distillation-type=soft", "--distillation-alpha=1", "--teacher-model=test_convnext", "--teacher-path",
          published[0], "--output_dir", tmp_path / "run")
    saved = load(tmp_path / "run" / "checkpoint.pth")["model"]
    assert torch.equal(saved["head.linear.weight"], net.head.linear.weight)
    assert not torch.equal(saved["head_dist.linear.weight"], net.head_dist.linear.weight)
