"""Pictures of a run: the curves of log.txt, and what the saved weights say of validation images."""
import json
import runpy
import shutil
import sys

import pytest
import timm
import torch
from PIL import Image

import checkpoint
import datasets
import main
import report
from datasets import write_shards

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

    def watch(shown, classes, path, *args):
        found.append((shown, classes))
        draw(shown, classes, path, *args)

    monkeypatch.setattr(report, "draw_predictions", watch)
    return found


@pytest.fixture
def command(monkeypatch, capsys):
    """python report.py WORDS in this process. -> what it printed, or its one line of error"""
    def start(*words):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        try:
            runpy.run_path(report.__file__, run_name="__main__")
        except SystemExit as stop:
            assert isinstance(stop.code, str) and len(stop.code.splitlines()) == 1
            return stop.code
        return capsys.readouterr().out
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
