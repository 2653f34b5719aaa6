"""Tar shards: what is in them is read or said in one line; each image once an epoch; written whole or not at all."""
import hashlib
import io
import json
import os
import runpy
import signal
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torchvision import datasets as tv

import datasets
import decode
import engine
import loaders
import samplers
import shards as shards_module
from datasets import write_shards
from shards import ShardedImages, run_length

CLASSES = ["flower", "leaves", "temple"]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")


def picture(value=0, kind="PNG", size=(8, 6), mode="RGB"):
    """An image file whose pixels say which one it is."""
    data = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).convert(mode).save(data, kind)
    return data.getvalue()


def write_tar(path, members, mode="w", **how):
    """members: [(name, bytes or a TarInfo)], as they stand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **how) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pairs(count, start=0, classes=3, names="{:04d}"):
    return [part for i in range(start, start + count) for part in (
        (names.format(i) + ".png", picture(i)), (names.format(i) + ".cls", str(i % classes).encode()))]


def plain(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def which(image):
    """The number that picture() wrote."""
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def small_transform(is_train=False):
    return datasets.build_transform(is_train, input_size=32)


@pytest.fixture(scope="module")
def shards(tiny_folder, tmp_path_factory):
    """tiny_folder as 6 shards of 4 for training, and 3 of 4, 4 and 3 for validation; read it only."""
    root = tmp_path_factory.mktemp("shards of 100% real") / "tiny"
    write_shards(tiny_folder, root, maxcount=4)
    return root


@pytest.fixture(scope="module")
def one_shard(tiny_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("one") / "tiny"
    write_shards(tiny_folder, root)
    return root


@pytest.fixture
def command(monkeypatch, capsys):
    """python datasets.py WORDS, in this process. -> what it printed; SystemExit where it fails"""
    def start(*words):
        monkeypatch.setattr(sys, "argv", ["datasets.py", *map(str, words)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            runpy.run_path(datasets.__file__, run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, before)
        return capsys.readouterr().out
    return start


def loader_of(root, is_train, batch_size, workers, rank=0, ranks=1, seed=0):
    found, _ = datasets.build_dataset(is_train, root, "IMNET", small_transform())
    return loaders.build_loader(found, is_train, batch_size, workers, rank, ranks, seed)


def read_all(loader):
    """Its batches. Where that fails, its workers end at once: left to the garbage collector they take 5 seconds each."""
    try:
        return list(loader)
    except decode.DataError:
        if loader.num_workers:
            loader._iterator._shutdown_workers()
        raise


def indices(loader, epoch=0):
    loaders.set_epoch(loader, epoch)
    return [batch[2].tolist() for batch in read_all(loader)]


def flat(batches):
    return [i for batch in batches for i in batch]


def refusal(folder):
    """The one line that a split's shards are refused with."""
    with pytest.raises(ValueError) as caught:
        list(ShardedImages(shards_module.find(folder), plain))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- as good as a folder ----

def test_shards_hold_the_folders_images(shards, tiny_folder):
    """Names and numbers of classes, counts, labels and pixels."""
    train, val, classes = datasets.build_datasets(shards, "IMNET", plain, plain)
    assert classes == CLASSES and train.named
    assert (len(train), len(val)) == (24, 11)
    content = json.loads((shards / "val" / "index.json").read_text())
    assert content["classes"] == CLASSES and content["shards"] == {"000000.tar": 3, "000001.tar": 4, "000002.tar": 4}
    folder = tv.ImageFolder(tiny_folder / "val", plain)
    for i in range(11):
        image, label, index = val[i]
        expected, number = folder[int(Path(val.name(index)).stem)]
        assert torch.equal(image, expected)
        assert label == number == val.targets[i] and index == i
    assert sorted(Path(val.name(i)).stem for i in range(11)) == [f"{i:08d}" for i in range(11)]
    with pytest.raises(IndexError):
        val[11]


def test_webdataset_reads_what_is_written(shards, tiny_folder):
    """The trade's own reader finds the same images and labels."""
    folder, found = tv.ImageFolder(tiny_folder / "val"), {}
    for shard in sorted((shards / "val").glob("*.tar")):
        with open(shard, "rb") as stream:
            members = webdataset.tariterators.tar_file_expander([{"url": "x", "stream": stream}])
            found |= {int(sample["__key__"]): sample for sample in webdataset.tariterators.group_by_keys(members)}
    assert len(found) == 11
    for i, (path, label) in enumerate(folder.samples):
        assert found[i]["cls"] == str(label).encode() and found[i][Path(path).suffix[1:]] == Path(path).read_bytes()


def test_what_webdataset_writes_is_read(tmp_path):
    for part in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{part}.tar")) as writer:
            for i in range(5):
                writer.write({"__key__": f"{part}/{i}", "png": picture(10 * part + i), "cls": i, "json": {"caption": "a picture"}})
    found = ShardedImages(shards_module.find(tmp_path), plain)
    assert [(which(image), label) for image, label, _ in found] == [(10 * part + i, i) for part in range(2) for i in range(5)]
    assert (found.classes, found.named) == (list("01234"), False)
    assert found.notes and "no index" in found.notes[0] and f"python datasets.py index {tmp_path.parent}" in found.notes[0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["shards", "one_shard"])
def test_evaluation_reads_each_shards_image_once(request, place, ranks, workers):
    root = request.getfixturevalue(place)
    seen = [i for rank in range(ranks) for i in flat(indices(loader_of(root, False, 2, workers, rank, ranks)))]
    assert sorted(seen) == list(range(11))


class Recorder(torch.nn.Module):
    """Counts the images that it is shown, and knows the class of each."""

    def __init__(self, known):
        super().__init__()
        self.known, self.seen = known, Counter()

    def forward(self, images):
        keys = [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in images]
        self.seen.update(keys)
        return torch.nn.functional.one_hot(torch.tensor([self.known[key] for key in keys]), len(CLASSES)) * 9.0


@pytest.mark.parametrize("workers, batch_size, maxcount", [(0, 4, 3), (2, 2, 2), (4, 16, 3), (2, 4, 20)])
def test_an_evaluation_is_shown_each_shards_image_once(tiny_folder, tmp_path, maxcount, workers, batch_size):
    write_shards(tiny_folder, tmp_path, maxcount=maxcount)
    folder = tv.ImageFolder(tiny_folder / "val", small_transform())
    model = Recorder({hashlib.sha1(image.numpy().tobytes()).hexdigest(): label for image, label in folder})
    stats = engine.evaluate(loader_of(tmp_path, False, batch_size, workers), model, torch.device("cpu"), quiet=True)
    assert model.seen == Counter(model.known.keys()) and len(model.known) == 11
    assert stats["images"] == 11 and stats["acc1"] == stats["acc5"] == 100


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["shards", "one_shard"])
def test_training_shows_each_shards_image_once_an_epoch(request, place, ranks, workers):
    """Every rank gets as many full batches; together they see each image once."""
    root = request.getfixturevalue(place)
    ours = [loader_of(root, True, 4, workers, rank, ranks) for rank in range(ranks)]
    for epoch in range(2):
        batches = [indices(loader, epoch) for loader in ours]
        assert all([len(batch) for batch in found] == [4] * (24 // ranks // 4) for found in batches)
        assert sorted(i for found in batches for i in flat(found)) == list(range(24))


def test_the_order_follows_seed_and_epoch(shards):
    """Persistent workers see the new epoch; a resumed run has the epoch's order."""
    loader = loader_of(shards, True, 4, 2, seed=5)
    first, second = indices(loader, 0), indices(loader, 1)
    assert first != second
    assert [indices(loader_of(shards, True, 4, 0, seed=5), epoch) for epoch in (0, 1)] == [first, second]
    assert indices(loader_of(shards, True, 4, 0, seed=6), 0) != first


def test_repeated_augmentation_on_shards(shards):
    """Three copies of an image, each with draws of its own."""
    found, _ = datasets.build_dataset(True, shards, "IMNET", small_transform(True))
    images, _, index = next(iter(loaders.build_loader(found, True, 24, 0, repeated_aug=True)))
    assert sorted(Counter(index.tolist()).values()) == [3] * 8
    a, b, c = images[index == index[0]]
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_a_batch_larger_than_a_ranks_shards(shards):
    with pytest.raises(ValueError, match="24 images, too few for one batch of 16 on each of 2 ranks"):
        loader_of(shards, True, 16, 0, 0, 2)


# ---- dealing by image ----

class Lengths:
    """Shards that are only numbers."""

    def __init__(self, counts, run=8):
        self.bounds, self.run = np.cumsum([0, *counts]), run

    def __len__(self):
        return int(self.bounds[-1])


SETS = {"257 shards": [19] * 257, "5,000 + 1": [5000, 1], "one shard": [1000], "empty ones": [0, 37, 0, 0, 120, 1, 0], "1 image": [1] * 90}


def dealt(counts, ranks, batch_size, epoch=0, seed=0, run=8):
    """-> each rank's batches; a loader gives its workers every n-th of them, so they change nothing."""
    found = []
    for rank in range(ranks):
        sampler = samplers.RunSampler(Lengths(counts, run), ranks, rank, seed, batch_size)
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler)
        found.append([order[i:i + batch_size] for i in range(0, len(order), batch_size)])
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", SETS)
def test_each_image_once_an_epoch_but_for_the_ragged_batch(kind, ranks):
    counts, seen = SETS[kind], []
    total = sum(counts)
    for epoch in range(3):
        batches = dealt(counts, ranks, 4, epoch)
        shown = Counter(i for found in batches for i in flat(found))
        assert set(shown.values()) == {1} and sum(shown.values()) == total // (4 * ranks) * 4 * ranks
        assert len({len(found) for found in batches}) == 1
        seen.append(tuple(flat(batches[0])))
    assert len(set(seen)) == 3


@pytest.mark.parametrize("workers", [2, 10])
def test_workers_share_an_epoch(tmp_path, workers):
    """257 shards on 8 ranks with 10 workers each: what each of them is asked for, as a loader deals it."""
    asked = [found[worker::workers] for found in dealt(SETS["257 shards"], 8, 4) for worker in range(workers)]
    shown = Counter(i for worker in asked for i in flat(worker))
    assert set(shown.values()) == {1} and len(shown) == 257 * 19 // 32 * 32


@pytest.mark.parametrize("kind", SETS)
def test_the_images_of_a_step_do_not_depend_on_the_ranks(kind):
    """Eight images a step, from 1, 2, 4 or 8 ranks."""
    steps = [[sorted(flat(batches)) for batches in zip(*dealt(SETS[kind], ranks, 8 // ranks, 2))] for ranks in (1, 2, 4, 8)]
    assert len(steps[0]) == sum(SETS[kind]) // 8
    assert steps[0] == steps[1] == steps[2] == steps[3]


@pytest.mark.parametrize("counts", [[5000] * 4, [78] * 257])
def test_neighbours_come_into_one_batch(counts):
    """Batches of 128 are about 16 runs of 8; which neighbours are together changes with the epoch."""
    def begins(epoch):
        batches = [sorted(batch) for found in dealt(counts, 8, 128, epoch) for batch in found]
        return [sum(b - a != 1 for a, b in pairwise(batch)) + 1 for batch in batches], {batch[0] for batch in batches}
    runs, first = begins(0)
    assert 14 < np.mean(runs) < 128 / 6
    assert len(first & begins(1)[1]) < len(first) / 2


def test_a_run_of_one_is_a_full_shuffle():
    expected = torch.randperm(1000, generator=torch.Generator().manual_seed(3)).tolist()
    assert flat(dealt([600, 400], 1, 1, epoch=3, run=1)[0]) == expected


def test_runs_are_short_where_neighbours_share_their_class():
    rng = np.random.default_rng(0)
    mixed = rng.integers(0, 100, 20000)
    assert run_length(mixed) == 8
    assert run_length(np.sort(mixed)) == 1
    assert run_length(np.repeat(rng.integers(0, 100, 10000), 2)) == 1  # pairs, as two views of one object
    assert run_length(np.zeros(100, int)) == 8
    assert run_length(np.array([0])) == 8
    partly = np.where(rng.random(20000) < 0.25, np.sort(mixed), mixed)  # a sixteenth of neighbours share it beyond chance
    assert run_length(partly) in (2, 4)


def test_batches_of_shards_written_class_by_class_are_as_mixed_as_random_ones():
    """100 classes of 50 in order: the classes in a batch of 64, against the closed form of drawing 64 of 5,000."""
    targets = np.repeat(np.arange(100), 50)
    kinds = [len(set(targets[batch])) for batch in dealt([1000] * 5, 1, 64, run=run_length(targets))[0]]
    expected = 100 * (1 - np.prod([(4950 - i) / (5000 - i) for i in range(64)]))
    assert abs(np.mean(kinds) - expected) < 1.5


def test_neighbours_are_one_read(shards, monkeypatch):
    found, _ = datasets.build_dataset(True, shards, "IMNET", plain)
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or pread(*place))
    a = found.__getitems__([3, 0, 1, 2, 3])
    assert len(reads) == 1 and [index for *_, index in a] == [3, 0, 1, 2, 3]
    b = found.__getitems__([5, 9, 2])
    assert len(reads) == 4 and torch.equal(a[3][0], b[2][0])
