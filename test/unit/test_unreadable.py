"""Images that cannot be read: replaced in training, counted as wrong in validation, and too many of them end all ranks alike."""
import contextlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_transform
from test_exact import RECIPE, assert_same, left, train
from torch import nn
from torch.utils.data import DataLoader

import checkpoint
import engine
import keeper
import loaders
import main
import options
import samplers
import unreadable
from datasets import build_dataset
from tools.data import write_shards

BAD = ("train/leaves/03.png", "train/temple/00.jpg", "val/leaves/09.png")
CPU = torch.device("cpu")


def damage_shard(folder, split, label, dataset):
    """Damage what stands in the place of the first image of that class. -> its index"""
    index = int(np.flatnonzero(dataset.targets == label)[0])
    record = dataset.records[index]
    with open(dataset.shards[dataset.shard_of(index)], "r+b") as file:
        file.seek(int(record["image"]) + 512)  # behind its header
        file.write(bytes(200))
    return index


def damage(kind, tiny_folder, folder):
    """-> the data, indices of the 2 of 24 training images and of the 1 of 11 validation images that cannot be read"""
    if kind == "folder":
        shutil.copytree(tiny_folder, folder)
        for path in BAD:
            (folder / path).write_bytes((folder / path).read_bytes()[:200])
        found = {split: list(build_dataset(split == "train", folder)[0].names) for split in ("train", "val")}
        return SimpleNamespace(path=folder, train=sorted(found["train"].index(str(folder / path)) for path in BAD[:2]),
                               val=[found["val"].index(str(folder / BAD[2]))])
    write_shards(tiny_folder, folder, 9)
    parts = {split: build_dataset(split == "train", folder)[0] for split in ("train", "val")}
    return SimpleNamespace(path=folder, train=sorted(damage_shard(folder, "train", label, parts["train"]) for label in (1, 2)),
                           val=[damage_shard(folder, "val", 1, parts["val"])])


@pytest.fixture(scope="module", params=["folder", "shards"])
def broken(request, tiny_folder, tmp_path_factory):
    return damage(request.param, tiny_folder, tmp_path_factory.mktemp("broken") / "data")


@pytest.fixture(scope="module")
def broken_folder(tiny_folder, tmp_path_factory):
    return damage("folder", tiny_folder, tmp_path_factory.mktemp("broken") / "data")


def training_set(data):
    return build_dataset(True, data, transform=small_transform(True))[0]


def batches(images, epochs=2, **settings):
    """(images, classes, indices) of all samples of some epochs, and what was met"""
    settings = {"seed": 5, "workers": 0, **settings}
    loader, samples, met = loaders.build_loader(images, True, 4, goes_on=True, **settings), [], []
    for epoch in range(epochs):
        loaders.set_epoch(loader, epoch)
        for *columns, some in loader:
            samples += [(image.clone(), int(target), int(index)) for image, target, index in zip(*columns)]
            met += some
    return samples, met


# ---- training ----

def test_another_image_of_the_class_takes_its_place_as_seed_and_draw_say(broken):
    images, choices = training_set(broken.path), set()
    drawn = loaders.DrawnImages(images, 5, replaces=True)
    for index in broken.train:
        alike = set(np.flatnonzero(images.targets == images.targets[index]).tolist())
        for draw in [(epoch, index, copy) for epoch in range(4) for copy in range(3)]:
            image, target, shown, met = drawn[draw]
            assert target == images.targets[index] and shown in alike - set(broken.train)
            assert met[0][:2] == (index, images.name(index))
            assert torch.equal(image, drawn.drawn(shown, samplers.seed_of(samplers.IMAGE, 5, *draw))[0])
            again = loaders.DrawnImages(images, 5, replaces=True)[draw]
            assert torch.equal(image, again[0]) and again[1:] == (target, shown, met)
            choices.add((index, shown))
        assert len({shown for bad, shown in choices if bad == index}) >= 3  # not always the same one


def test_workers_and_ranks_change_no_replacement(broken):
    images = training_set(broken.path)
    one, met = batches(images)
    assert {index for index, *_ in met} == set(broken.train)
    two, met_by_workers = batches(images, workers=2)
    for (a, *rest), (b, *others) in zip(one, two, strict=True):
        assert torch.equal(a, b) and rest == others
    assert met == met_by_workers
    parts = {rank: iter(batches(images, rank=rank, ranks=2)[0]) for rank in range(2)}
    together, _ = batches(images, accum_steps=2)  # a batch of one part after that of the other
    for i, (a, *rest) in enumerate(together):
        b, *others = next(parts[i // 4 % 2])
        assert torch.equal(a, b) and rest == others
    assert [*parts[0], *parts[1]] == []


def test_what_can_be_read_is_drawn_as_without_the_option(tiny_folder):
    images = training_set(tiny_folder)
    loader = loaders.build_loader(images, True, 4, 0, seed=5)
    loaders.set_epoch(loader, 0)
    samples, met = batches(images, epochs=1)
    plain = [sample for batch in loader for sample in zip(*batch)]
    assert met == [] and len(plain) == len(samples)
    for (a, *rest), (b, *others) in zip(plain, samples):
        assert torch.equal(a, b) and [int(x) for x in rest] == others


def test_a_class_of_which_nothing_can_be_read_ends_the_training(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "data")
    for path in (tmp_path / "data" / "train" / "leaves").iterdir():
        path.write_bytes(b"no image")
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        words = ["--data-path", str(tmp_path / "data"), "--max-bad-fraction=1", "--output_dir", str(tmp_path / "run")]
        assert main.run([*RECIPE, *words]) == 2
    assert re.fullmatch(r"error: cannot read the image .*/train/leaves/0\d\.(png|jpg) "
                        r"\(no image of a known format\), nor any other of its class \(8 images\): replace them or remove them\n",
                        err.getvalue())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "data_errors.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cuts", [(1,), (4, 3)])
def test_a_run_with_them_is_cut_and_goes_on_bit_for_bit(broken, tmp_path, cuts):
    data = ["--data-path", broken.path, "--max-bad-fraction=0.1", "--sched-lag=0"]
    said = train(tmp_path / "whole", *data)
    for cut in cuts:
        train(tmp_path / "cut", *data, "--resume=auto", f"--max_step={cut}")
    train(tmp_path / "cut", *data, "--resume=auto", "--num_workers=2")
    assert_same(left(tmp_path / "cut"), left(tmp_path / "whole"))
    rows = rows_of(tmp_path / "whole")
    assert rows == rows_of(tmp_path / "cut")
    images = training_set(broken.path)
    assert {row["path"] for row in rows} == {images.name(index) for index in broken.train}
    assert len(rows) == 2 and all(row["reason"] and row["epoch"] in (0, 1) for row in rows)
    assert "2 of 24 so far" in said and "others of their classes take their place" in said
    saved = torch.load(tmp_path / "cut" / "checkpoint.pth", weights_only=True)
    assert saved["unreadable"] == broken.train


def test_what_comes_again_after_the_checkpoint_stands_there_once(broken, tmp_path):
    """As after a kill: the rows are on the disk, and the checkpoint is older."""
    data = ["--data-path", broken.path, "--max-bad-fraction=0.1"]
    train(tmp_path, *data, "--max_step=1")
    shutil.copy(tmp_path / "checkpoint.pth", tmp_path / "older.pth")
    train(tmp_path, *data, "--resume=auto")
    rows = rows_of(tmp_path)
    shutil.copy(tmp_path / "older.pth", tmp_path / "checkpoint.pth")
    with open(tmp_path / "data_errors.jsonl", "a") as file:
        file.write('{"path": "/half-wr')
    train(tmp_path, *data, "--resume=auto")
    assert rows_of(tmp_path) == rows and len(rows) == 2


@pytest.mark.parametrize("fraction, status", [("0.0833", 2), ("0.0834", 0)])
def test_above_the_fraction_the_training_ends(broken, tmp_path, fraction, status):
    """2 of 24 are 0.08333."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        words = ["--data-path", str(broken.path), f"--max-bad-fraction={fraction}", "--output_dir", str(tmp_path)]
        assert main.run([*RECIPE, *words]) == status
    if status:
        assert re.fullmatch(rf"error: 2 of 24 training images cannot be read, more than --max-bad-fraction {fraction} allows, now "
                            r".+ \(.+\): "
                            r"replace them or remove them \(data_errors.jsonl in --output_dir lists them\), or raise the fraction\n",
                            err.getvalue())
    assert len(rows_of(tmp_path)) == 2


def test_two_ranks_end_alike_above_it_and_write_each_image_once_below(broken_folder, tmp_path, run_ranks):
    words = [*RECIPE, "--data-path", broken_folder.path, "--batch-size=2", "--dist-eval", "--output_dir", tmp_path]
    done = run_ranks(2, *words, "--max-bad-fraction=0.05")
    assert "exitcode  : 2" in done.stderr
    assert [line[:54] for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: 2 of 24 training images cannot be read, more than"[:54]]
    done = run_ranks(2, *words, "--max-bad-fraction=0.1", "--resume=auto")
    assert done.returncode == 0, done.stderr
    assert "1 of 11 validation images cannot be read" in done.stdout
    images = training_set(broken_folder.path)
    assert sorted(row["path"] for row in rows_of(tmp_path)) == sorted(images.name(index) for index in broken_folder.train)


def test_each_image_counts_once_however_often_it_is_met():
    rows, said, known = [], [], set()
    count = unreadable.Unreadable(4, 0.5, known, rows.extend, said.append)
    count(0, [(3, "c", "cut"), (3, "c", "cut")])
    count(1, [(3, "c", "cut")])
    count(1, [(1, "a\n", "no image"), (3, "c", "cut")])
    assert rows == [{"path": "c", "reason": "cut", "epoch": 0}, {"path": "a\n", "reason": "no image", "epoch": 1}]
    assert len(said) == 2 and "a\\n (no image); 2 of 4 so far" in said[1] and known == {1, 3}
    with pytest.raises(unreadable.TooManyUnreadable, match=r"^3 of 4 training images cannot be read, more than --max-bad-fraction 0\.5 "):
        count(2, [(0, "z", "gone")])


def test_they_are_read_with_the_losses_and_the_host_waits_for_nothing_else(tiny_folder):
    calls = []
    batch = [torch.ones(2, 3, 4, 4), torch.tensor([0, 1]), torch.tensor([0, 1])]
    some = [[], [(7, "x", "cut")], [], [], [(8, "y", "cut"), (9, "z", "cut")], []]
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    from precision import Precision
    engine.train_one_epoch(net, lambda images, outputs, targets: F.cross_entropy(outputs, targets), [[*batch, met] for met in some],
                           torch.optim.SGD(net.parameters(), 0.1), CPU, 0, Precision(CPU, "off"), quiet=True, print_freq=3,
                           unreadable=lambda met: calls.append([index for index, *_ in met]))
    assert calls == [[7], [8, 9]]


def test_a_disk_that_takes_no_rows_is_one_warning_and_they_come_later(tmp_path, monkeypatch):
    said, append = [], keeper.utils.append_json
    row = {"path": "a", "reason": "cut", "epoch": 0}

    def full(path, row):
        raise OSError(28, "No space left on device")
    with keeper.Keeper(tmp_path, said.append) as mine:
        mine.prepare()
        monkeypatch.setattr(keeper.utils, "append_json", full)
        mine.record([row])
        mine.wait()
        mine.report()
        monkeypatch.setattr(keeper.utils, "append_json", append)
        mine.record([row])
    assert len(said) == 1 and "data_errors.jsonl cannot be written (No space left on device)" in said[0]
    assert rows_of(tmp_path) == [row]


@pytest.mark.parametrize("data_set, count", [("CIFAR10", 1), ("IMNET", 0)])
def test_an_option_without_effect_is_said(data_set, count):
    args = options.parse(["--data-path=x", f"--data-set={data_set}", "--max-bad-fraction=0.5"])
    assert sum("--max-bad-fraction has no effect: CIFAR10 is read whole" in note for note in options.notes(args)) == count


# ---- validation ----

class Net(nn.Module):
    """Classes by the mean colour."""
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Linear(3, 3)

    def forward(self, images):
        return self.head(images.mean((2, 3)))


@pytest.mark.parametrize("workers", [0, 1])
def test_in_validation_they_count_as_wrong_and_not_in_the_loss(broken, capsys, workers):
    images, _ = build_dataset(False, broken.path, transform=small_transform())
    good = [images[i] for i in range(11) if i not in broken.val]
    with torch.no_grad():
        logits = Net()(torch.stack([image for image, *_ in good]))
    targets = torch.tensor([target for _, target, _ in good])
    loader = loaders.build_loader(images, False, 4, workers, goes_on=True)
    stats = engine.evaluate(loader, Net(), CPU)
    assert stats == pytest.approx({"loss": F.cross_entropy(logits, targets).item(), "images": 11, "unreadable": 1,
                                   "acc1": 100 * (logits.argmax(1) == targets).sum().item() / 11, "acc5": 100 * 10 / 11}, rel=1e-5)
    said = capsys.readouterr().out
    name = re.escape(images.name(broken.val[0]))
    assert re.search(rf"^1 of 11 validation images cannot be read: they count as wrong, and not in the loss: {name} \(.+\)$", said, re.M)


def test_nothing_that_can_be_read_is_no_accuracy(broken):
    images, _ = build_dataset(False, broken.path, transform=small_transform())
    loader = DataLoader(loaders.EvaluatedImages(images), batch_size=1, sampler=broken.val, collate_fn=loaders.collate_met)
    with pytest.raises(loaders.DataError, match=r"^none of the 1 validation images can be read: "):
        engine.evaluate(loader, Net(), CPU, quiet=True)


def test_a_run_names_them_evaluates_and_writes_their_number(broken, tmp_path):
    said = train(tmp_path, "--data-path", broken.path, "--max-bad-fraction=0.1", "--epochs=1")
    assert said.count("1 of 11 validation images cannot be read") == 2  # the model, and its average
    [row] = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert (row["test_unreadable"], row["test_ema_unreadable"]) == (1, 1)
    assert checkpoint.read(tmp_path / "checkpoint.pth")["epoch"] == 0
