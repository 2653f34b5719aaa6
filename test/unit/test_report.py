"""Pictures of a run: the curves of log.txt, and what the saved weights say of validation images."""
import json
import math
import os
import random
import shutil
import subprocess
import sys
import warnings

import matplotlib.pyplot as plt
import pytest
import timm
import torch
from conftest import ROOT
from PIL import Image

import checkpoint
import datasets
import main
import utils
from tools import report
from tools.data import write_shards

MODEL = "test_convnext"


def train(data, folder, *words):
    assert main.run(["--device=cpu", "--data-path", str(data), "--model", MODEL, "--input-size=32", "--num_workers=0", "--batch-size=8",
                     "--epochs=2", "--warmup-epochs=0", "--lr=0.1", "--output_dir", str(folder), *words]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A run on class folders. -> its folder; copy it"""
    return train(tiny_folder, tmp_path_factory.mktemp("runs") / "fol ders")


@pytest.fixture(scope="module")
def shards(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("shards") / "tiny"
    write_shards(tiny_folder, root, maxcount=4)
    return root


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def shown(monkeypatch):
    """Collects what is drawn as predictions: (shown, classes); the picture is drawn as well."""
    found, draw = [], report.draw_predictions

    def watch(shown, classes, *args, **kwargs):
        found.append((shown, classes))
        draw(shown, classes, *args, **kwargs)

    monkeypatch.setattr(report, "draw_predictions", watch)
    return found


@pytest.fixture
def command(tool):
    """python tools report WORDS. -> what it printed, or its one line of error"""
    def start(*words):
        status, out, said = tool("report", *words)
        assert (status, len(said.splitlines())) in ((0, 0), (2, 1))
        return said.removesuffix("\n") if status else out
    return start


def assert_is_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 400 and image.height > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20


def oracle(folder, data):
    """What the best checkpoint says of each validation image, in plain torch: {pixels: (class, predicted, probability)}"""
    net = timm.create_model(MODEL, num_classes=3).eval()
    net.load_state_dict(torch.load(folder / "checkpoint_best.pth", weights_only=True)["model"])
    found = {}
    for image, label, _ in datasets.build_dataset(False, data, "IMNET", datasets.build_transform(False, input_size=32))[0]:
        with torch.no_grad():
            probability, guess = net(image[None]).softmax(1)[0].max(0)
        found[image.numpy().tobytes()] = label, guess.item(), pytest.approx(probability.item(), abs=1e-4)
    return found


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_both_pictures_of_a_run(run, copy, tiny_folder, shards, tmp_path, shown, kind):
    """Each image has the class, the prediction and the probability that plain torch gives it."""
    data = tiny_folder
    if kind == "shards":
        data, copy = shards, train(shards, tmp_path / "shards")
    paths = report.report(copy, device="cpu")
    assert paths == [copy / "curves.png", copy / "predictions.png"]
    for path in paths:
        assert_is_picture(path)
    (images, classes), = shown
    expected = oracle(copy, data)
    assert classes == ["flower", "leaves", "temple"] and images
    found = {image.numpy().tobytes(): tuple(rest) for image, *rest in images}
    assert len(found) == len(images) and all(expected[key] == value for key, value in found.items())
    assert sum(target == guess for _, target, guess, _ in images) == sum(target == guess for target, guess, _ in expected.values())


def test_the_command_prints_the_paths_and_takes_data_that_has_moved(copy, tiny_folder, tmp_path, command):
    content = checkpoint.read(copy / "checkpoint_best.pth")
    content["options"]["data_path"] = str(tmp_path / "gone")
    checkpoint.save(copy / "checkpoint_best.pth", **content)
    assert command(copy, "--device=cpu") == f"error: --data-path {tmp_path}/gone: no such folder"
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    assert command(copy, "--device=cpu", "--data-path", moved, "--images=8") == f"{copy}/curves.png\n{copy}/predictions.png\n"


def test_an_older_checkpoint_without_some_options_is_drawn_with_their_defaults(copy, shown):
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        content = checkpoint.read(copy / name)
        for option in ("crop_scale", "window_padding", "attn", "hflip", "drop", "remode", "pin_mem", "dist_eval", "grad_checkpointing"):
            del content["options"][option]
        checkpoint.save(copy / name, **content)
    report.report(copy, device="cpu")
    assert_is_picture(copy / "predictions.png")


def test_the_last_checkpoint_serves_where_there_is_no_best(copy, shown):
    (copy / "checkpoint_best.pth").unlink()
    report.report(copy, device="cpu")
    assert_is_picture(copy / "predictions.png")


@pytest.mark.parametrize("better", [None, "model_ema", "model"])
def test_the_weights_that_decided_are_shown(copy, shown, better):
    content = checkpoint.read(copy / "checkpoint_best.pth")
    content.pop("better")  # an older one says nothing
    name, bias = "head.fc.bias", {"model": [99.0, 0, 0], "model_ema": [0, 0, 99.0]}
    content |= {key: content["model"] | {name: torch.tensor(value)} for key, value in bias.items()} | ({"better": better} if better else {})
    checkpoint.save(copy / "checkpoint_best.pth", **content)
    report.report(copy, device="cpu")
    assert {guess for _, _, guess, _ in shown[0][0]} == {0 if better == "model" else 2}


def test_a_run_without_evaluations_has_curves(copy):
    rows = report.read_log(copy / "log.txt")
    for row in rows:
        row.update(test_loss=None, test_acc1=None, test_acc5=None, max_acc1=0.0)
    report.draw_curves(rows, copy / "curves.png")
    assert_is_picture(copy / "curves.png")


def test_a_run_with_a_moving_average_has_curves(copy):
    rows = [{**row, "test_ema_acc1": 10.0} for row in report.read_log(copy / "log.txt")]
    report.draw_curves(rows * 40, copy / "curves.png")
    assert_is_picture(copy / "curves.png")


def spoil(kind, folder):
    if kind == "no folder":
        shutil.rmtree(folder)
    elif kind == "no log":
        (folder / "log.txt").unlink()
    elif kind == "empty log":
        (folder / "log.txt").write_text("")
    elif kind == "no JSON":
        (folder / "log.txt").write_text("Epoch: [0]\n")
    elif kind == "no checkpoint":
        for path in folder.glob("*.pth"):
            path.unlink()
    elif kind == "damaged":
        (folder / "checkpoint_best.pth").write_bytes((folder / "checkpoint_best.pth").read_bytes()[:700])
    elif kind == "weights only":
        checkpoint.save(folder / "checkpoint_best.pth", **checkpoint.read(folder / "checkpoint_best.pth")["model"])
    elif kind == "another model":
        content = checkpoint.read(folder / "checkpoint_best.pth")
        content["options"]["model"] = "test_vit"
        checkpoint.save(folder / "checkpoint_best.pth", **content)
    else:
        assert kind == "no device"


@pytest.mark.parametrize("kind, line", [
    ("no folder", "cannot read RUN/log.txt ("), ("no log", "cannot read RUN/log.txt ("), ("empty log", "RUN/log.txt has no epochs yet"),
    ("no JSON", "cannot read RUN/log.txt ("), ("no checkpoint", "RUN has curves.png now, but no checkpoint for predictions.png"),
    ("damaged", "cannot read the checkpoint RUN/checkpoint_best.pth ("),
    ("weights only", "RUN/checkpoint_best.pth does not say with which options it was trained: "),
    ("another model", "RUN/checkpoint_best.pth does not fit: "), ("no device", "--device cuda: no cuda device is visible: ")])
def test_a_mistake_is_one_line(copy, command, monkeypatch, kind, line):
    monkeypatch.setattr("devices.available", lambda kind: 0)
    spoil(kind, copy)
    said = command(copy, f"--device={'cuda' if kind == 'no device' else 'cpu'}")
    assert said.startswith(f"error: {line.replace('RUN', str(copy))}"), said


def test_a_picture_that_cannot_be_written_is_one_line(copy, command):
    (copy / "curves.png").unlink(missing_ok=True)
    (copy / "curves.png").mkdir()
    said = command(copy, "--device=cpu")
    assert said.strip() == (f"error: cannot write {copy}/curves.png (Is a directory): make its folder writable and room on its disk, or "
                            "copy the run elsewhere")


def test_an_unreadable_image_is_one_line(copy, tiny_folder, shards, tmp_path, command):
    data = shutil.copytree(tiny_folder, tmp_path / "data")
    (data / "val" / "leaves" / "09.png").write_bytes(b"")
    assert command(copy, "--device=cpu", "--data-path", data).startswith(f"error: cannot read the image {data}/val/leaves/09.png (")
    data = shutil.copytree(shards, tmp_path / "shards")
    (data / "val" / "000001.tar").write_bytes(b"no tar" * 200)
    assert command(copy, "--device=cpu", "--data-path", data).startswith(f"error: cannot read the shard {data}/val/000001.tar (")


# ---- which images are shown ----

class Answers(torch.nn.Module):
    """Says the number in the first pixel."""

    def forward(self, images):
        return 9.0 * torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 10)


def samples(count, wrong):
    """Class i % 10; every image of `wrong` looks like the next class."""
    return [(torch.full((3, 2, 2), (i + (i in wrong)) % 10.0), i % 10, i) for i in range(count)]


@pytest.mark.parametrize("count, wrong, errors", [
    (8, [], 0), (8, [3], 1), (8, range(200), 2), (40, range(0, 200, 3), 10), (300, [5, 6], 2)])
def test_some_wrong_answers_come_first_and_right_ones_fill_the_grid(count, wrong, errors):
    found = report.predict(Answers(), samples(200, set(wrong)), torch.device("cpu"), count)
    right = [target == guess for _, target, guess, _ in found]
    assert right == sorted(right) and right.count(False) == errors
    assert right.count(True) == min(count - errors, 200 - len(wrong))
    assert len(found) <= count and all(image[0, 0, 0] == guess for image, _, guess, _ in found)
    assert all(probability > 0.99 for *_, probability in found)


def test_the_log_is_read_row_by_row(tmp_path):
    (tmp_path / "log.txt").write_text("\n".join(json.dumps({"epoch": epoch}) for epoch in range(3)) + "\n\n")
    assert [row["epoch"] for row in report.read_log(tmp_path / "log.txt")] == [0, 1, 2]


# ---- logs as crashes and other programs leave them ----

ROWS = [json.dumps({"epoch": epoch, "train_loss": 2.0 - epoch, "test_acc1": 10.0 * epoch, "max_acc1": 10.0 * epoch}) for epoch in range(3)]


@pytest.mark.parametrize("text, epochs, note", [
    ("\n".join(ROWS) + '\n{"epoch": 3, "train_l', [0, 1, 2], "1 of 4 lines are no epochs and left out, the first is line 4"),
    (f"{ROWS[0]}\n7\n{ROWS[2]}\n", [0, 2], "1 of 3 lines are no epochs and left out, the first is line 2"),
    (f"[]\n{ROWS[0]}\nnull\n{{}}\n", [0], "3 of 4 lines are no epochs and left out, the first is line 1"),
    (b"caf\xe9\n" + ROWS[0].encode(), [0], "1 of 2 lines"), (f"\ufeff{ROWS[0]}\r\n", [0], None),
    ("[" * 10**5 + f"\n{ROWS[1]}\n", [1], "1 of 2"),
    ('{"epoch": true}\n{"epoch": -1}\n{"epoch": "1"}\n{"epoch": 1e400}\n' + ROWS[0], [0], "4 of 5 lines")])
def test_lines_that_are_no_epochs_are_left_out_and_said(tmp_path, text, epochs, note):
    (tmp_path / "log.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = []
    rows = report.read_log(tmp_path / "log.txt", said.append)
    assert [row["epoch"] for row in rows] == epochs and len(said) == (note is not None) and (note or "") in "".join(said)
    report.draw_curves(rows, tmp_path / "curves.png")
    assert_is_picture(tmp_path / "curves.png")


def test_mutated_logs_are_read_or_refused_in_one_line(tmp_path):
    rng, whole, read = random.Random(0), "\n".join(ROWS).encode(), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at, size = rng.randrange(len(data) + 1), rng.choice((0, 1, 8, 80))
            data[at:at + size] = rng.choice((b"", bytes([rng.randrange(256)]), b"\n", b'"', b"[", b"}", b"1e999", b"-", b"null",
                                             b"9" * 5000, b"NaN", b"true", b"\xef\xbb\xbf", bytes(data[:at])))
        (tmp_path / "log.txt").write_bytes(data)
        try:
            rows = report.read_log(tmp_path / "log.txt", lambda note: None)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            continue
        read += 1
        for key in ("train_loss", "test_acc1", "max_acc1"):
            assert all(value is None or math.isfinite(value) for row in rows for value in [report.number(row, key)])
        utils.keep_epochs_before(tmp_path / "log.txt", 2)
        assert all(row is None or row["epoch"] < 2 for _, row in utils.log_rows(tmp_path / "log.txt"))
    assert read > 150


@pytest.mark.parametrize("data", [b"7\n", b"\xff\xfe\x00", "\n".join(ROWS).encode("utf-16"), b"caf\xe9\n", b"null"])
def test_a_log_without_epochs_is_one_line(copy, command, data):
    (copy / "log.txt").write_bytes(data)
    said = f"error: cannot read {copy}/log.txt (line 1 is not a run's JSON): give the --output_dir of a run"
    assert command(copy, "--device=cpu") == said


def test_values_that_are_no_finite_numbers_are_not_drawn(tmp_path):
    odd = [None, "3", [1], True, float("nan"), float("inf"), 10**400, -1e308]
    assert [report.number({"x": value}, "x") for value in odd] == [None] * 8 and report.number({"x": 3}, "x") == 3.0
    report.draw_curves([{"epoch": i, "train_loss": value, "max_acc1": value, "train_lr": value} for i, value in enumerate(odd)],
                       tmp_path / "curves.png")
    assert_is_picture(tmp_path / "curves.png")


def test_a_resumed_run_keeps_a_log_that_is_no_utf_8(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"caf\xe9 7\n7\n" + "\n".join(ROWS).encode() + b'\n{"epoch": 3, "tr')
    utils.keep_epochs_before(path, 2)
    assert path.read_bytes() == b"caf\xe9 7\n7\n" + "\n".join(ROWS[:2]).encode() + b"\n"


# ---- how many images, and of which classes ----

@pytest.mark.parametrize("count", [-3, 0, 1001])
def test_a_number_of_images_that_cannot_be_is_one_line(copy, command, count):
    assert command(copy, "--device=cpu", f"--images={count}") == f"error: --images is {count}, and must be from 1 to 1000"


def drawn(classes, path, **kwargs):
    """What stands over the pictures of one wrong and one right answer, and what was said."""
    titles, said, setter = [], [], plt.Axes.set_title

    def watch(axis, text, **style):
        titles.append((text, style))
        return setter(axis, text, **style)

    image = torch.rand(3, 8, 8)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")  # "Glyph 20154 missing from font(s) DejaVu Sans" is a box in the picture
        patch.setattr(plt.Axes, "set_title", watch)
        report.draw_predictions([(image, 0, 1, 0.5), (image, 1, 1, 0.75)], classes, path, torch.zeros(3, 1, 1), torch.ones(3, 1, 1),
                                say=said.append, **kwargs)
    assert_is_picture(path)
    return [text for text, _ in titles], said


@pytest.mark.parametrize("classes, expected", [
    (["a$b", "$\\frac$"], ["$\\frac$, is a$b", "$\\frac$ 75 %"]), (["a\nb", "\udcff"], ["\\udcff, is a\\nb", "\\udcff 75 %"]),
    (["cafe\u0301", "\u202eevil"], ["\\u202eevil, is caf\u00e9", "\\u202eevil 75 %"]),
    (["x" * 200, "b"], ["b, is " + "x" * 23 + "\u2026", "b 75 %"])])
def test_names_are_written_as_they_are(tmp_path, classes, expected):
    assert drawn(classes, tmp_path / "p.png") == (expected, [])


def test_names_that_no_font_can_draw_become_numbers_and_are_said(tmp_path, monkeypatch):
    own = [font for font in report.font_manager.fontManager.ttflist if font.name == report.OWN_FONT]
    monkeypatch.setattr(report.font_manager.fontManager, "ttflist", own)
    found, (note,) = drawn(["\u732b", "dog"], tmp_path / "p.png")
    assert found == ["dog, is class 0", "dog 75 %"]
    assert note.startswith("note: no installed font has all characters of 1 class names, so numbers stand for them: 0 is \u732b; install")


def test_an_installed_font_draws_what_the_own_one_cannot(tmp_path):
    """The character is looked up in the fonts that matplotlib brings: some have what DejaVu Sans has not."""
    fonts = report.font_manager.fontManager.ttflist
    own, other = (report.ft2font.FT2Font(next(font.fname for font in fonts if font.name == name)).get_charmap()
                  for name in (report.OWN_FONT, "STIXGeneral"))
    character = next(chr(code) for code in sorted(set(other) - set(own)) if chr(code).isprintable())
    families, missing = report.fonts_for(f"cat {character}")
    assert families[0] == report.OWN_FONT and len(families) == 2 and not missing
    assert drawn([character, "dog"], tmp_path / "p.png") == ([f"dog, is {character}", "dog 75 %"], [])


def test_the_normalisation_is_the_transforms_own():
    transform = datasets.build_transform(False, input_size=32)
    pixels = torch.rand(3, 5, 5)
    mean, std = report.normalisation(transform)
    assert torch.allclose(transform.transforms[-1](pixels) * std + mean, pixels, atol=1e-6)


def test_names_that_the_log_cannot_encode_are_escaped(copy, tmp_path):
    """A terminal of another encoding, a note with a name of it."""
    (copy / "log.txt").write_bytes((copy / "log.txt").read_bytes() + b"7\n")
    moved = shutil.move(copy, tmp_path / "\u732b")
    done = subprocess.run([sys.executable, ROOT / "tools", "report", moved, "--device=cpu"], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"\\u732b/log.txt: 1 of 3 lines" in done.stdout and done.stdout.endswith(b"predictions.png\n")


def test_options_that_are_no_dict_are_one_line(copy, command):
    content = checkpoint.read(copy / "checkpoint_best.pth")
    for options in (3, ["a"], None):
        checkpoint.save(copy / "checkpoint_best.pth", **{**content, "options": options})
        assert " does not say with which options it was trained: " in command(copy, "--device=cpu")
