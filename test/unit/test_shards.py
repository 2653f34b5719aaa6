"""Tar shards: what is in them is read or said in one line; each image once an epoch; written whole or not at all."""
import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import ROOT, read_all, small_transform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets as tv

import datasets
import decode
import engine
import loaders
import samplers
import shards
from shards import ShardedImages, run_length
from tools.data import write_shards

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


@pytest.fixture(scope="module")
def shards_root(tiny_folder, tmp_path_factory):
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
def command(tool):
    """python tools data WORDS. -> what it printed; ValueError with its one line where it refuses"""
    def start(*words):
        status, out, said = tool("data", *words)
        assert (status, len(said.splitlines())) in ((0, 0), (2, 1))
        if status:
            raise ValueError(said.removesuffix("\n"))
        return out
    return start


def loader_of(root, is_train, batch_size, workers, rank=0, ranks=1, seed=0):
    found, _ = datasets.build_dataset(is_train, root, "IMNET", small_transform())
    return loaders.build_loader(found, is_train, batch_size, workers, rank, ranks, seed)


def indices(loader, epoch=None):
    """epoch: of a training loader"""
    if epoch is not None:
        loaders.set_epoch(loader, epoch)
    return [batch[2].tolist() for batch in read_all(loader)]


def flat(batches):
    return [i for batch in batches for i in batch]


def refusal(folder):
    """The one line that a split's shards are refused with."""
    with pytest.raises(ValueError) as caught:
        list(ShardedImages(shards.find(folder), plain))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- as good as a folder ----

def test_shards_hold_the_folders_images(shards_root, tiny_folder):
    """Names and numbers of classes, counts, labels and pixels."""
    train, val, classes = datasets.build_datasets(shards_root, "IMNET", plain, plain)
    assert classes == CLASSES and train.named
    assert (len(train), len(val)) == (24, 11)
    content = json.loads((shards_root / "val" / "index.json").read_text())
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


def test_webdataset_reads_what_is_written(shards_root, tiny_folder):
    """The trade's own reader finds the same images and labels."""
    folder, found = tv.ImageFolder(tiny_folder / "val"), {}
    for shard in sorted((shards_root / "val").glob("*.tar")):
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
    found = ShardedImages(shards.find(tmp_path), plain)
    assert [(which(image), label) for image, label, _ in found] == [(10 * part + i, i) for part in range(2) for i in range(5)]
    assert (found.classes, found.named) == (list("01234"), False)
    assert "no index" in found.notes[1] and f"python tools data index {tmp_path.parent}" in found.notes[1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("place", ["shards_root", "one_shard"])
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
@pytest.mark.parametrize("place", ["shards_root", "one_shard"])
def test_training_shows_each_shards_image_once_an_epoch(request, place, ranks, workers):
    """Every rank gets as many full batches; together they see each image once."""
    root = request.getfixturevalue(place)
    ours = [loader_of(root, True, 4, workers, rank, ranks) for rank in range(ranks)]
    for epoch in range(2):
        batches = [indices(loader, epoch) for loader in ours]
        assert all([len(batch) for batch in found] == [4] * (24 // ranks // 4) for found in batches)
        assert sorted(i for found in batches for i in flat(found)) == list(range(24))


def test_the_order_follows_seed_and_epoch(shards_root):
    """Persistent workers see the new epoch; a resumed run has the epoch's order."""
    loader = loader_of(shards_root, True, 4, 2, seed=5)
    first, second = indices(loader, 0), indices(loader, 1)
    assert first != second
    assert [indices(loader_of(shards_root, True, 4, 0, seed=5), epoch) for epoch in (0, 1)] == [first, second]
    assert indices(loader_of(shards_root, True, 4, 0, seed=6), 0) != first


def test_a_training_batch_is_read_at_once(shards_root, monkeypatch):
    """So that neighbours in a shard are one read; and it is what reading image by image gives."""
    found, _ = datasets.build_dataset(True, shards_root, "IMNET", small_transform(True))
    asked, pieces = [], ShardedImages.pieces
    monkeypatch.setattr(ShardedImages, "pieces", lambda images, indices: asked.append(len(indices)) or pieces(images, indices))
    loader = loaders.build_loader(found, True, 8, 0, seed=5)
    batches = list(loader)
    assert asked == [8, 8, 8]
    for (images, _, _), draws in zip(batches, loader.batch_sampler):
        assert torch.equal(images, torch.stack([loader.dataset[draw][0] for draw in draws]))


def test_repeated_augmentation_on_shards(shards_root):
    """Three copies of an image, each with draws of its own."""
    found, _ = datasets.build_dataset(True, shards_root, "IMNET", small_transform(True))
    images, _, index = next(iter(loaders.build_loader(found, True, 24, 0, repeated_aug=True)))
    assert sorted(Counter(index.tolist()).values()) == [3] * 8
    a, b, c = images[index == index[0]]
    assert not torch.equal(a, b) and not torch.equal(b, c)


def test_a_batch_larger_than_a_ranks_shards(shards_root):
    with pytest.raises(ValueError, match="24 images, too few for one batch of 16 on each of 2 ranks"):
        loader_of(shards_root, True, 16, 0, 0, 2)


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


def test_neighbours_are_one_read(shards_root, monkeypatch):
    found, _ = datasets.build_dataset(True, shards_root, "IMNET", plain)
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *place: reads.append(place) or pread(*place))
    a = found.__getitems__([3, 0, 1, 2, 3])
    assert len(reads) == 1 and [index for *_, index in a] == [3, 0, 1, 2, 3]
    b = found.__getitems__([5, 9, 2])
    assert len(reads) == 4 and torch.equal(a[3][0], b[2][0])


# ---- the index ----

@pytest.fixture
def numbered(tmp_path):
    """train/ with 12 pictures in 2 shards, classes 0 to 2, and no index."""
    for part in range(2):
        write_tar(tmp_path / "train" / f"{part}.tar", pairs(6, 6 * part))
    return tmp_path / "train"


def content_of(folder):
    return [(which(image), label) for image, label, _ in ShardedImages(shards.find(folder), plain)]


EXPECTED = [(i, i % 3) for i in range(12)]


def test_shards_without_an_index_are_read_and_it_is_said_once(numbered, command, run_main):
    assert content_of(numbered) == EXPECTED
    count = "train/: 12 images in 3 classes, from 4 (0) to 4 (0) a class"
    remedy = f"python tools data index {numbered.parent} does it once"
    assert ShardedImages(shards.find(numbered)).notes == [
        count, f"{numbered} has no index: every shard (2) was read from header to header; {remedy}"]
    assert "train: 12 images of 3 classes in 2 shards\n" in command("index", numbered.parent)
    assert content_of(numbered) == EXPECTED and ShardedImages(shards.find(numbered)).notes == [count]


def test_an_index_of_an_earlier_version_is_accepted(numbered):
    (numbered / "index.json").write_text(json.dumps({"classes": ["a", "b", "c"], "shards": {"0.tar": 6, "1.tar": 6}}))
    found = ShardedImages(shards.find(numbered))
    assert (len(found), found.classes, found.named) == (12, ["a", "b", "c"], True)
    (numbered / "index.json").write_text(json.dumps({"classes": ["0", "1", "2"], "shards": {"0.tar": 6, "1.tar": 7}}))
    assert "1.tar (it holds 6 images, and 7 by its index)" in refusal(numbered)


def test_names_without_anything_else_are_an_index(numbered, command):
    """A user's file; counting keeps the names."""
    (numbered / "index.json").write_text('{"classes": ["ant", "bee", "cow"]}')
    for _ in range(2):
        found = ShardedImages(shards.find(numbered))
        assert (found.classes, found.named, len(found)) == (["ant", "bee", "cow"], True, 12)
        command("index", numbered.parent)
    assert sorted(path.name for path in numbered.iterdir()) == ["0.tar", "1.tar", "index.json", "index.npy"]


def test_another_tools_index_is_kept(numbered, command):
    wids = json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "0.tar", "nsamples": 6}]})
    (numbered / "index.json").write_text(wids)
    assert content_of(numbered) == EXPECTED
    command("index", numbered.parent)
    assert (numbered / "index.json.old").read_text() == wids and content_of(numbered) == EXPECTED


def test_nothing_that_stands_where_an_index_goes_is_lost(numbered, command):
    """An index of another's, an array of another's, and what was set aside before."""
    for name in ("index.json", "index.json.old", "index.npy"):
        (numbered / name).write_text(f'{{"shardlist": "{name}"}}')
    said = command("index", numbered.parent)
    assert "index.json was another's, and is now index.json.old2; index.npy was another's, and is now index.npy.old" in said
    for name, before in (("index.json.old2", "index.json"), ("index.json.old", "index.json.old"), ("index.npy.old", "index.npy")):
        assert json.loads((numbered / name).read_text()) == {"shardlist": before}
    assert content_of(numbered) == EXPECTED
    assert "another" not in command("index", numbered.parent) and len(list(numbered.glob("*.old*"))) == 3


def test_a_large_file_of_boxes_beside_a_class(tmp_path):
    """It may stand before the .cls in the tar."""
    boxes = json.dumps({"boxes": [[0, 0, 1, 1]] * 100_000}).encode()
    write_tar(tmp_path / "0.tar", [("0007.json", boxes), *pairs(1, start=7)])
    assert [target for _, target, _ in ShardedImages([tmp_path / "0.tar"], plain)] == [1]


@pytest.mark.parametrize("text", [
    "{", "[]", "3", "null", '"x"', "{}", "[" * 100_000, "\xff\xfe", '{"classes": ["a"], "shards": 3}', '{"classes": "abc", "shards": {}}',
    '{"classes": [1, 2, 3], "shards": {}}', '{"classes": ["a", "b", "c"], "shards": {"0.tar": "6", "1.tar": 6}}',
    '{"classes": ["a", "b", "c"], "shards": {"0.tar": -6, "1.tar": true}}', '{"classes": ["a", "b", "c"], "named": 1}',
    '{"classes": ["a", "b", "c"], "shards": {"0.tar": 6, "1.tar": 6}, "bytes": [1]}', '{"classes": null}', '{"classes": [NaN]}'])
def test_an_index_of_wrong_types_is_one_line_and_counting_mends_it(numbered, text, command):
    (numbered / "index.json").write_text(text, encoding="latin-1")
    line = refusal(numbered)
    assert line.startswith(f"cannot read {numbered}/index.json (") and line.endswith(f"): python tools data index {numbered.parent}")
    command("index", numbered.parent)
    assert content_of(numbered) == EXPECTED
    assert (numbered / "index.json.old").read_text(encoding="latin-1") == text


@pytest.mark.parametrize("how", ["cut off", "another's", "empty", "missing", "pickle"])
def test_index_npy_that_is_not_the_one(numbered, how):
    shards.write_index(numbered)
    path = numbered / "index.npy"
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut off": data[:-8], "another's": data[:-1] + b"\1", "empty": b"", "pickle": b"\x80\x04."}[how])
    assert re.match(rf"cannot read {path} \(.+\): python tools data index ", refusal(numbered))


@pytest.mark.parametrize("field, value", [("image", -512), ("image", 1 << 40), ("label_bytes", 1 << 62), ("image_bytes", 0), ("target", 3),
                                          ("target", -1), ("label", -1 << 63)])
def test_places_outside_a_shard_are_refused(numbered, field, value):
    """Even where index.json vouches for them."""
    shards.write_index(numbered)
    records = np.load(numbered / "index.npy")
    records[field][4] = value
    np.save(numbered / "index.npy", records)
    content = json.loads((numbered / "index.json").read_text())
    content["crc32"] = zlib.crc32((numbered / "index.npy").read_bytes())
    (numbered / "index.json").write_text(json.dumps(content))
    assert "outside" in refusal(numbered)


def test_an_index_of_other_shards_never_gives_a_wrong_label(numbered):
    """Of the same sizes, names and places: other labels, another order, other keys."""
    shards.write_index(numbered)
    def again(members):
        write_tar(numbered / "0.tar", members)
        return refusal(numbered)
    line = again([(name, b"2" if name == "0003.cls" else content) for name, content in pairs(6)])
    assert line.endswith(f"0.tar (0003.png and 0003.cls are not what its index says): python tools data index {numbered.parent}")
    assert "are not what its index says" in again([part for i in reversed(range(0, 12, 2)) for part in pairs(6)[i:i + 2]])
    mixed = pairs(6)
    mixed[1], mixed[3] = mixed[3], mixed[1]
    assert "0000.png and 0001.cls are not what its index says" in again(mixed)
    assert "it has " in again(pairs(60)) and " by its index" in again(pairs(60))


@pytest.mark.parametrize("change", ["renamed", "more", "fewer"])
def test_an_index_that_does_not_fit_its_folder(numbered, change):
    shards.write_index(numbered)
    if change == "renamed":
        (numbered / "1.tar").rename(numbered / "9.tar")
    elif change == "more":
        write_tar(numbered / "2.tar", pairs(3, 20))
    else:
        (numbered / "1.tar").unlink()
    assert re.fullmatch(rf"{numbered}/index.json does not fit the shards beside it \([12]\.tar\): python tools data index "
                        rf"{numbered.parent}", refusal(numbered))


def test_offsets_are_flat_and_travel_to_workers(numbered):
    shards.write_index(numbered)
    found = ShardedImages(shards.find(numbered), plain)
    assert found[7][1] == 1
    assert isinstance(found.records, np.ndarray) and found.records.itemsize == 36
    again = pickle.loads(pickle.dumps(found))
    assert [label for _, label, _ in again] == [label for _, label in EXPECTED]


# ---- what others write ----

def split_of(tmp_path, members, **how):
    write_tar(tmp_path / "train" / "x.tar", members, **how)
    return tmp_path / "train"


@pytest.mark.parametrize("name, content", [
    ("k.cls", b"2"), ("k.CLS", b" 2\r\n"), ("k.cls", b"\xef\xbb\xbf2"), ("k.json", b'{"label": 2, "caption": "7 cats"}'),
    ("k.json", b'{"cls": "2"}'), ("k.json", b"2"), ("k.json", b'{"label": 2.0}'), ("k.txt", b"2\n"), ("K.cls", None)])
def test_where_a_label_may_stand(tmp_path, name, content):
    """.cls before .json before .txt; a caption is no label."""
    members = pairs(2) + [("k.PNG", picture(5)), (name, content)] if content else pairs(2) + [("K.JPEG", picture(5)), ("K.cls", b"2")]
    members += [("k.txt", b"a caption, 1")] if name == "k.json" else []
    assert content_of(split_of(tmp_path, members))[-1] == (5, 2)


def test_labels_that_are_names(tmp_path):
    """All of them: classes in their order. With names in index.json: those."""
    members = [part for i, name in enumerate(["dog", "cat", "emu"]) for part in ((f"{i}.png", picture(i)), (f"{i}.cls", name.encode()))]
    folder = split_of(tmp_path, members)
    found = ShardedImages(shards.find(folder), plain)
    assert (found.classes, found.named, found.targets.tolist()) == (["cat", "dog", "emu"], True, [1, 0, 2])
    (folder / "index.json").write_text('{"classes": ["emu", "dog", "cat", "cow"]}')
    assert [label for _, label in content_of(folder)] == [1, 2, 0]
    assert "3.cls: its label 'pig' is no class's number, nor the name of one" in refusal(split_of(
        tmp_path, members + [("3.png", picture()), ("3.cls", b"pig")]))


def test_names_of_which_some_are_numerals_are_names(tmp_path):
    """In JSON a text is no number; texts that are all numerals are the numbers that they always were."""
    names = ["cat", "7", "500", "cat", "7"]
    folder = split_of(tmp_path, [part for i, name in enumerate(names) for part in (
        (f"{i}.png", picture(i)), (f"{i}.json", json.dumps({"label": name}).encode()))])
    for _ in range(2):
        found = ShardedImages(shards.find(folder), plain)
        assert (found.classes, found.named) == (["500", "7", "cat"], True)
        assert [label for _, label in content_of(folder)] == [2, 1, 0, 2, 1]
        shards.write_index(folder)
    numerals = split_of(tmp_path / "numerals", [part for i in range(12) for part in (
        (f"{i:02d}.png", picture(i)), (f"{i:02d}.json", b'{"cls": "%d"}' % i))])
    found = ShardedImages(shards.find(numerals), plain)
    assert (found.classes, found.named, found.targets.tolist()) == ([str(i) for i in range(12)], False, list(range(12)))


def test_a_name_among_numbers_is_a_mistake(tmp_path):
    mixed = split_of(tmp_path, [*pairs(3), ("7.png", picture()), ("7.json", b'{"label": "cat"}')])
    assert "7.json: its label 'cat' is no class's number, nor the name of one" in refusal(mixed)


@pytest.mark.parametrize("what", ["dots", "dotted folders", "unsorted", "labels first", "macOS", "README", "upper case",
                                  "masks", "input.png", "long names", "long names of GNU's", "directories", "captions",
                                  "a global header", "an old tar"])
def test_odd_shards_whose_meaning_is_clear(tmp_path, what):
    plainly, how = pairs(12), {}
    if what == "dots":
        plainly = pairs(12, names="img.v1.{:04d}")
    elif what == "dotted folders":
        plainly = pairs(12, names="set.v2/part.0/{:04d}")
    elif what == "unsorted":
        plainly = plainly[::2] + plainly[1::2][::-1]
    elif what == "labels first":
        plainly = plainly[1::2] + plainly[::2]
    elif what == "macOS":
        plainly = [part for name, content in plainly for part in (("._" + name, b"\0\5\26\7"), (name, content))] + [(".DS_Store", b"x")]
    elif what == "README":
        plainly = [("README.txt", b"12 pictures"), ("README.md", b"#"), ("LICENSE", b"MIT"), ("stats.json", b'{"images": 12}'), *plainly]
    elif what == "upper case":
        plainly = [(name.replace("png", "PNG").replace("cls", "CLS"), content) for name, content in plainly]
    elif what == "masks":
        plainly = plainly + [(f"{i:04d}.seg.png", picture(99)) for i in range(12)]
    elif what == "input.png":
        plainly = [(name.replace(".png", ".input.png"), content) for name, content in plainly]
    elif what.startswith("long names"):
        plainly, how = pairs(12, names="d" * 90 + "/" + "é" * 90 + "{:04d}"), dict(
            format=tarfile.GNU_FORMAT if what.endswith("GNU's") else tarfile.PAX_FORMAT)
    elif what == "directories":
        folder = tarfile.TarInfo("a.png")
        folder.type = tarfile.DIRTYPE
        plainly = [("a.png", folder), *pairs(12, names="a.png/{:04d}")]
    elif what == "captions":
        plainly += [(f"{i:04d}.txt", b"two cats on a sofa") for i in range(12)]
    elif what == "a global header":
        how = dict(format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by git archive"})
    folder = split_of(tmp_path, plainly, **how)
    if what == "an old tar":  # V7: no magic, no prefix
        data = bytearray((folder / "x.tar").read_bytes())
        for start in headers(folder / "x.tar"):
            data[start + 257:start + 512] = bytes(255)
            data[start + 148:start + 156] = b" " * 8
            data[start + 148:start + 156] = b"%06o\0 " % sum(data[start:start + 512])
        (folder / "x.tar").write_bytes(data)
    for _ in range(2):
        assert sorted(content_of(folder)) == EXPECTED
        left = shards.left_out(shards.write_index(folder))
        assert left == (["left out: 12 images beside others of a label of their own, such as 0000.seg.png"] if what == "masks" else [])


def link(name, to, kind=tarfile.LNKTYPE):
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, to
    return name, found


@pytest.mark.parametrize("more, words", [
    ([("7.png", picture())], r"7\.png has no label beside it"),
    ([("7.png", picture()), ("7.txt", b"a cat")], r"7\.png has no label beside it"),
    ([("7.png", picture()), ("7.json", b'{"caption": "a cat"}')], r"7\.png has no label beside it"),
    ([("7.cls", b"1")], r"7\.cls has no image beside it"),
    ([("7.npy", b"x"), ("7.cls", b"1")], r"7\.cls has no image beside it"),
    ([("7.png", picture()), ("7.cls", b"-1")], r"7\.cls: its label -1 is not one of the 3 classes"),
    ([("7.png", picture()), ("7.cls", b"999999999")], r"7\.cls: its label 999999999 is not one of the 3 classes, 0 to 2"),
    ([("7.png", picture()), ("7.cls", b"")], r"7\.cls: it is empty"),
    ([("7.png", picture()), ("7.cls", b"1.5")], r"7\.cls: its label '1\.5' is no class's number"),
    ([("7.png", picture()), ("7.cls", b"\xff\xfe")], r"7\.cls: .*can't decode"),
    ([("7.png", picture()), ("7.json", b"{")], r"7\.json: Expecting property name"),
    ([("7.png", picture()), ("7.json", b'{"label": [0, 1]}')], r"7\.json: its label is \[0, 1\], no class's number"),
    ([("7.png", picture()), ("7.json", b'{"label": true}')], r"7\.json: its label is true"),
    ([("7.png", picture()), ("7.json", b"[" * 90_000)], r"7\.json: .*recursion"),
    ([("7.png", picture()), ("7.jpg", picture()), ("7.cls", b"1")], r"7\.png and 7\.jpg are two images of one key"),
    ([("0001.png", picture()), ("0001.cls", b"1")], r"0001\.png and 0001\.png are two images of one key"),
    ([("7.png", picture()), ("7.cls", b"1"), ("7.CLS", b"2")], r"7\.cls and 7\.CLS are two labels of one key"),
    ([link("7.png", "0001.png"), ("7.cls", b"1")], r"7\.png is a link \(tar -h --hard-dereference stores the file\)"),
    ([link("7.png", "/etc/passwd", tarfile.SYMTYPE), ("7.cls", b"1")], r"7\.png is a link"),
    ([("7.png", picture()), link("7.cls", "0001.cls")], r"7\.cls is a link"),
    ([("7\n\x1b[31m.png", picture())], r"7\\n\\x1b\[31m\.png has no label"),
    ([("7.png", picture()), ("7.cls", b"1" * 2_000_000)], r"7\.cls: 2,000,000 bytes are too many for a label")])
def test_shards_that_make_no_sense_are_one_line_with_shard_and_member(tmp_path, more, words):
    folder = split_of(tmp_path, pairs(6) + more)
    assert re.match(rf"cannot read the shard {folder}/x\.tar \({words}.*\): ", refusal(folder))


def test_a_label_outside_the_names_of_the_index(numbered):
    (numbered / "index.json").write_text('{"classes": ["a", "b"]}')
    for _ in range(2):
        assert "0.tar (0002.cls: its label 2 is not one of the 2 classes, 0 to 1): " in refusal(numbered)
        with pytest.raises(ValueError, match="its label 2 is not one of the 2 classes"):
            shards.write_index(numbered)


def test_a_decompression_bomb_in_a_shard(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    folder = split_of(tmp_path, [*pairs(3), ("bomb.png", bomb.getvalue()), ("bomb.cls", b"0")])
    assert re.fullmatch(rf"cannot read the image {folder}/x\.tar/bomb\.png \(.*decompression bomb.*\): replace it or remove it",
                        refusal(folder))


def test_bytes_that_are_no_image_are_named(tmp_path):
    folder = split_of(tmp_path, [*pairs(3), ("a/b.png", b"no image"), ("a/b.cls", b"0")])
    assert refusal(folder) == f"cannot read the image {folder}/x.tar/a/b.png (no image of a known format): replace it or remove it"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_other_formats_in_shards_are_read(tmp_path, kind):
    assert content_of(split_of(tmp_path, [(f"0.{kind.lower()}", picture(3, kind)), ("0.cls", b"0")])) == [(3, 0)]


# ---- whole, to the last zero block ----

def headers(shard):
    """Where its members begin."""
    with tarfile.open(shard) as tar:
        return [member.offset for member in tar]


def test_a_flipped_bit_in_any_header_is_an_error_that_names_the_shard(numbered):
    """Each header once, another bit each time; with and without the index."""
    rng, shard = random.Random(0), numbered / "0.tar"
    whole = shard.read_bytes()
    shards.write_index(numbered)
    index = {path: path.read_bytes() for path in numbered.glob("index.*")}
    for number, start in enumerate(headers(shard)):
        data = bytearray(whole)
        data[start + rng.randrange(512)] ^= 1 << rng.randrange(8)
        shard.write_bytes(data)
        line = refusal(numbered)
        assert re.match(rf"cannot read the shard {shard} \(the header at byte {start}, '.*', is damaged\): ", line)
        for path in index:
            path.unlink()
        line = refusal(numbered)
        where = rf"the header at byte {start} is damaged, after 000{(number - 1) // 2}\." if start else "no tar, or its first header"
        assert re.match(rf"cannot read the shard {shard} \({where}", line)
        for path, content in index.items():
            path.write_bytes(content)


@pytest.mark.parametrize("cut, words", [
    (lambda starts, end: starts[3] + 600, "it breaks off within 0001.cls"),
    (lambda starts, end: starts[3] + 100, "it breaks off after 0001.png"),
    (lambda starts, end: starts[4], "it breaks off after 0001.cls"), (lambda starts, end: end, "it breaks off after 0005.cls"),
    (lambda starts, end: end + 512, "it breaks off after 0005.cls"), (lambda starts, end: 0, "it is empty")])
def test_a_tar_that_breaks_off(numbered, cut, words, command):
    """Also between members, where tar ends like a whole one; `index` says so too."""
    shard = numbered / "0.tar"
    starts = headers(shard)
    shard.write_bytes(shard.read_bytes()[:cut(starts, starts[-1] + 1024)])
    line = f"cannot read the shard {shard} ({words}): write it again"
    assert refusal(numbered) == line
    with pytest.raises(ValueError) as caught:
        command("index", numbered.parent)
    assert str(caught.value) == f"error: {line}" and not (numbered / "index.json").exists()


def test_only_zeros_follow_the_end(numbered):
    shard = numbered / "0.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole + bytes(5000))
    assert content_of(numbered) == EXPECTED
    shard.write_bytes(whole + whole)  # cat a.tar b.tar
    assert "something follows its end mark, which stands after 0005.cls" in refusal(numbered)
    shard.write_bytes(bytes(1024))
    assert content_of(numbered) == EXPECTED[6:]


@pytest.mark.parametrize("data, words", [(b"no tar" * 200, "no tar"), (b"<html>404</html>", "no tar"), (b"PK\3\4" + bytes(600), "no tar")])
def test_what_is_no_tar(numbered, data, words):
    (numbered / "1.tar").write_bytes(data)
    assert refusal(numbered).startswith(f"cannot read the shard {numbered}/1.tar ({words}")


@pytest.mark.parametrize("kind, opened, command", [
    ("gzip", gzip.open, "gunzip"), ("xz", lzma.open, "unxz"), ("bzip2", bz2.open, "bunzip2")])
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_compressed_shards_are_to_be_unpacked_and_the_true_reason_is_said(numbered, kind, opened, command, name):
    data = (numbered / "0.tar").read_bytes()
    (numbered / "0.tar").unlink()
    shard = numbered / name
    with opened(shard, "wb") as file:
        file.write(data)
    assert refusal(numbered) == (f"cannot read the shard {shard} (it is compressed with {kind}, and images are read from the midst of "
                                 f"a shard): {command} {shard}")
    packed = shard.read_bytes()
    for broken in (packed[:len(packed) // 2], packed[:-3], packed[:len(packed) // 2] + b"\xff\xff" + packed[len(packed) // 2 + 2:]):
        shard.write_bytes(broken)
        assert re.fullmatch(rf"cannot read the shard {shard} \({kind} data that are damaged or break off: .+\): write it again",
                            refusal(numbered))


# ---- the folder ----

def test_class_folders_beside_a_tar_are_not_guessed_about(tiny_folder, tmp_path, run_main):
    root = shutil.copytree(tiny_folder, tmp_path / "data")
    write_tar(root / "val" / "backup.tar", pairs(3))
    done = run_main("--data-path", root, "--device=cpu")
    assert (done.returncode, done.stderr) == (2, f"error: --data-path {root}: val/ holds class folders (flower) and tar files "
                                              "(backup.tar): which are the data? Move the others away\n")


def test_imagenets_tars_of_one_class_are_refused_with_the_line_that_unpacks_them(tiny_folder, tmp_path, run_main):
    """The line makes the folders of them, and loses nothing."""
    root = tmp_path / "image net"
    shutil.copytree(tiny_folder / "val", root / "val")
    for folder in sorted((tiny_folder / "train").iterdir()):
        write_tar(root / "train" / f"{folder.name}.tar", [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())])
    line = refusal(root / "train")
    assert line.startswith(f"cannot read the shard {root}/train/flower.tar (its 8 images have no label beside them, such as KEY.cls with a "
                           f"class's number): where each tar is a class, as ImageNet's, make folders of them: cd '{root}/train' && ")
    subprocess.run(["bash", "-euc", line.partition("make folders of them: ")[2]], check=True)
    train, val, classes = datasets.build_datasets(root, "IMNET", None, None)
    assert classes == CLASSES and len(train) == 24 and sorted(os.listdir(root)) == ["train", "train_tars", "val"]
    assert sorted(os.listdir(root / "train_tars")) == ["flower.tar", "leaves.tar", "temple.tar"]


def test_a_tar_of_tars_is_to_be_unpacked(tmp_path):
    inner = split_of(tmp_path / "inner", pairs(2)) / "x.tar"
    folder = split_of(tmp_path, [("n01440764.tar", inner.read_bytes()), ("n01443537.tar", inner.read_bytes())])
    line = refusal(folder)
    assert line == (f"cannot read the shard {folder}/x.tar (it holds no images but 2 tars, such as n01440764.tar): unpack it: "
                    f"tar -xf {folder}/x.tar -C {folder} && mv {folder}/x.tar {folder}/..")
    subprocess.run(["bash", "-euc", line.partition("unpack it: ")[2]], check=True)
    assert sorted(os.listdir(folder)) == ["n01440764.tar", "n01443537.tar"]


def test_a_folder_called_tar_is_a_class(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "pitch.tar").mkdir(parents=True)
        (tmp_path / split / "pitch.tar" / "a.png").write_bytes(picture())
    assert datasets.build_dataset(True, tmp_path)[1] == ["pitch.tar"]


def test_a_newline_in_a_name_stays_in_its_line(tmp_path):
    folder = tmp_path / "two\nlines" / "train"
    write_tar(folder / "a\n.tar", pairs(3))
    assert "two\\nlines" in ShardedImages(shards.find(folder)).notes[1] and "\n" not in ShardedImages(shards.find(folder)).notes[1]
    (folder / "index.json").write_text("{")
    assert "two\\nlines" in refusal(folder)
    (folder / "index.json").unlink()
    (folder / "a\n.tar").write_bytes(gzip.compress(b"x"))
    assert "a\\n.tar" in refusal(folder)


def test_hidden_files_are_no_shards(numbered):
    (numbered / "._0.tar").write_bytes(b"\0\5\26\7")
    (numbered / ".cache").mkdir()
    assert content_of(numbered) == EXPECTED


@pytest.mark.parametrize("what", ["fifo", "broken link"])
def test_what_is_no_file_does_not_wait(numbered, what):
    os.mkfifo(numbered / "2.tar") if what == "fifo" else (numbered / "2.tar").symlink_to("nowhere")
    assert refusal(numbered).startswith(f"cannot read the shard {numbered}/2.tar (")


def test_a_shard_that_is_gone_and_a_folder_that_may_not_be_read_are_one_line(numbered, monkeypatch):
    """The index knows a shard, and its name is left: as a link to nowhere."""
    shards.write_index(numbered)
    (numbered / "1.tar").unlink()
    (numbered / "1.tar").symlink_to("nowhere")
    (numbered / "self").symlink_to("self")
    assert refusal(numbered) == f"cannot read the shard {numbered}/1.tar (No such file or directory): write it again"

    def guarded(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(os, "scandir", guarded)  # root may read all
    assert refusal(numbered) == f"cannot look into the folder {numbered} (Permission denied): make it readable"


@pytest.mark.parametrize("name", ["data:v2", "pipe:touch owned", "pipe:cat x; touch owned", "http:", "$(touch owned)", "a b%d{0..3}::"])
def test_a_path_is_a_path(tiny_folder, tmp_path, monkeypatch, name):
    """webdataset opens URLs and hands pipe: to a shell."""
    monkeypatch.chdir(tmp_path)
    def no_process(*args, **kwargs):
        raise AssertionError(f"a process was started: {args}")
    monkeypatch.setattr(subprocess, "Popen", no_process)
    monkeypatch.setattr(os, "system", no_process)
    write_shards(tiny_folder, name, maxcount=4)
    assert flat(indices(loader_of(Path(name), False, 4, 0))) == list(range(11))
    shards.write_index(Path(name) / "val")
    assert sorted(os.listdir()) == [name]


# ---- writing ----

def test_shards_are_of_the_same_size(tmp_path):
    """5,001 images are not 5,000 and one."""
    class_folder = tmp_path / "data" / "train" / "a"
    class_folder.mkdir(parents=True)
    for i in range(26):
        (class_folder / f"{i:02d}.png").write_bytes(picture(i))
    write_shards(tmp_path / "data", tmp_path / "tars", maxcount=5)
    found, _ = datasets.build_dataset(True, tmp_path / "tars", "IMNET", plain)
    assert sorted(np.diff(found.bounds).tolist()) == [4, 4, 4, 4, 5, 5]
    assert sorted(which(image) for image, _, _ in found) == list(range(26))


def test_one_split_is_enough(tiny_folder, tmp_path, command):
    shutil.copytree(tiny_folder / "train", tmp_path / "data" / "train")
    assert command("shards", tmp_path / "data", tmp_path / "tars") == "train: 24 images of 3 classes\n"
    assert os.listdir(tmp_path / "tars") == ["train"]
    assert command("index", tmp_path / "tars") == "train: 24 images of 3 classes in 1 shard\n"
    (tmp_path / "empty").mkdir()
    for words in (("shards", tmp_path / "empty", tmp_path / "new"), ("index", tmp_path / "empty")):
        with pytest.raises(ValueError) as caught:
            command(*words)
        assert str(caught.value).startswith(f"error: {tmp_path}/empty has neither train/ nor val/")


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["shards", "a file", "in a split"])
def test_a_used_folder_is_refused(tiny_folder, tmp_path, what, command):
    if what == "shards":
        write_shards(tiny_folder, tmp_path / "tars", maxcount=2)
    elif what == "a file":
        (tmp_path / "tars").write_text("thesis")
    else:
        write_tar(tmp_path / "tars" / "val" / "000009.tar", pairs(3))
    before = everything(tmp_path)
    with pytest.raises(ValueError) as caught:
        command("shards", tiny_folder, tmp_path / "tars")
    assert str(caught.value) == f"error: {tmp_path}/tars is not empty: choose a new folder for the shards"
    assert everything(tmp_path) == before


def test_shards_of_shards_are_refused(shards_root, tmp_path, command):
    with pytest.raises(ValueError) as caught:
        command("shards", shards_root, tmp_path / "tars")
    assert "holds shards already: python tools data index " in str(caught.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_killed_shards_never_pass_for_whole(tiny_folder, tmp_path, how):
    """A pause in the middle stands for any moment: the second split's third image is a FIFO's other end."""
    program = f"""
import os, signal, sys, runpy
sys.argv = ["tools", "data", "shards", {str(tiny_folder)!r}, {str(tmp_path / "tars")!r}]
sys.path.insert(0, {str(ROOT)!r})
import shards
stored, count = shards.stored, iter(range(99))
def killed(path):
    if next(count) == 27:
        os.kill(os.getpid(), {int(how)})
    return stored(path)
shards.stored = killed
runpy.run_path({str(ROOT / "tools")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (143 if how == signal.SIGTERM else -9) and not (tmp_path / "tars").exists()
    if how == signal.SIGTERM:
        assert os.listdir(tmp_path) == []
    write_shards(tiny_folder, tmp_path / "tars")
    assert len(datasets.build_dataset(False, tmp_path / "tars")[0]) == 11


def test_two_at_once_to_one_folder(tiny_folder, tmp_path, monkeypatch):
    """Who comes second says so in words, and leaves the first one's alone."""
    def write(folder, *_, plain=shards.write):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / "first").write_text("whole")
        return plain(folder, *_)
    monkeypatch.setattr(shards, "write", write)
    with pytest.raises(ValueError, match=r"s was filled meanwhile .*: choose a new folder for the shards"):
        write_shards(tiny_folder, tmp_path / "s")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["s", "s/first"]


DISK = {errno.ENOSPC: "make room on its disk", errno.EDQUOT: "make room, the quota is used up",
        errno.EACCES: "make the folder writable, or choose another", errno.EROFS: "make the folder writable, or choose another"}


@pytest.mark.parametrize("number", DISK)
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace", "rename"])
def test_a_disk_that_says_no_is_one_line_and_leaves_nothing(tiny_folder, tmp_path, monkeypatch, command, number, call):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ValueError) as caught:
        command("shards", tiny_folder, tmp_path / "tars")
    monkeypatch.undo()
    assert str(caught.value) == f"error: cannot write {tmp_path}/tars ({os.strerror(number)}): {DISK[number]}"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", DISK)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_index_that_cannot_be_written_leaves_the_old_one(numbered, monkeypatch, command, number, call):
    shards.write_index(numbered)
    before = everything(numbered)
    write_tar(numbered / "2.tar", pairs(3, 12))

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ValueError) as caught:
        command("index", numbered.parent)
    monkeypatch.undo()
    assert str(caught.value) == f"error: cannot write {numbered}/index.json ({os.strerror(number)}): {DISK[number]}"
    (numbered / "2.tar").unlink()
    assert everything(numbered) == before and content_of(numbered) == EXPECTED


def test_another_tools_index_stays_where_ours_cannot_be_written(numbered, monkeypatch):
    (numbered / "index.json").write_text('{"shardlist": []}')

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        shards.write_index(numbered)
    assert sorted(os.listdir(numbered)) == ["0.tar", "1.tar", "index.json"]


def test_shards_larger_than_a_file_may_be(tiny_folder, tmp_path):
    """A limit of the system's, in a process of its own: the disk's own no."""
    command = shlex.join(map(str, [sys.executable, ROOT / "tools", "data", "shards", tiny_folder, "tars"]))
    script = f"ulimit -f 8; exec {command}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == f"error: cannot write {tmp_path}/tars (File too large): make the folder writable, or choose another\n"
    assert done.returncode == 2 and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name, said", [("n" * 250, None), ("n" * 256, "File name too long"), ("中" * 80, None)])
def test_long_names_of_the_new_folder(tiny_folder, tmp_path, command, monkeypatch, name, said):
    """One that is too long is said before anything is written; the hidden folder beside it has a short name of its own."""
    if said is None:
        command("shards", tiny_folder, tmp_path / name)
        assert len(datasets.build_dataset(False, tmp_path / name)[0]) == 11
        return
    monkeypatch.setattr(shards, "write", None)
    for words in (("shards", tiny_folder, tmp_path / name), ("digits", tmp_path / name)):
        with pytest.raises(ValueError) as caught:
            command(*words)
        assert said in str(caught.value) and "\n" not in str(caught.value) and "choose a" in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind, mode", [("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "L"), ("PPM", "RGB")])
def test_formats_that_shards_do_not_know_become_png_of_the_same_pixels(tmp_path, kind, mode, command):
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / f"0.{dict(TIFF='tif').get(kind, kind.lower())}").write_bytes(picture(77, kind, mode=mode))
    (folder / "1.png").write_bytes(picture(1))
    said = command("shards", tmp_path / "data", tmp_path / "tars")
    assert said == f"train: 2 images of 1 classes, 1 of them {kind} files, now PNG\n"
    found, _ = datasets.build_dataset(True, tmp_path / "tars", "IMNET", plain)
    folders, _ = datasets.build_dataset(True, tmp_path / "data", "IMNET", plain)
    assert {found.name(i).rpartition(".")[2] for i in range(2)} == {"png"}
    for image, _, index in found:
        assert torch.equal(image, folders[int(Path(found.name(index)).stem)][0])


def test_an_unreadable_image_is_not_written(tmp_path, command):
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as caught:
        command("shards", tmp_path / "data", tmp_path / "tars")
    assert str(caught.value).startswith(f"error: cannot read the image {folder}/0.png (") and os.listdir(tmp_path) == ["data"]


def test_shards_can_be_read_by_those_who_may_read_the_folder(tiny_folder, tmp_path):
    write_shards(tiny_folder, tmp_path / "tars")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "tars").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask


# ---- the whole way ----

@pytest.mark.parametrize("words", [("shards", "nowhere", "target"), ("index", "nowhere")])
def test_command_with_a_wrong_path(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        command(*words)
    assert str(caught.value).startswith("error: nowhere has neither train/ nor val/")


def test_a_bit_of_a_header_through_the_command_line(shards_root, tmp_path, run_main):
    """Seven of twelve images and status 0, it was."""
    root = shutil.copytree(shards_root, tmp_path / "data")
    (root / "val" / "index.json").unlink()
    shard = root / "val" / "000001.tar"
    data = bytearray(shard.read_bytes())
    data[headers(shard)[4] + 20] ^= 1
    shard.write_bytes(data)
    done = run_main("--data-path", root, "--device=cpu")
    assert done.returncode == 2 and re.fullmatch(rf"error: cannot read the shard {shard} \(the header at byte \d+ is damaged, after "
                                                 r"\d+\.cls\): write it again\n", done.stderr), done.stderr


# ---- mutated tars and indexes ----

@pytest.fixture(scope="module")
def mutable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "train"
    write_tar(folder / "x.tar", pairs(4) + [("9.png", picture(6)), ("9.json", b'{"label": 0}')])
    found = shards.write_index(folder)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}, len(found.records)


def read_mutated(folder, images):
    """Everything is read right, or is one line."""
    try:
        found = ShardedImages(shards.find(folder), plain)
        assert len(found) == images
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
        return
    for i in range(len(found)):
        assert str(folder) in found.name(i)
        try:
            image, label, _ = found[i]
        except decode.DataError as error:
            assert len(str(error).splitlines()) == 1 and str(folder) in str(error)
        else:
            assert image.shape != (3, 6, 8) or which(image) >= 4 or label == which(image) % 3


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_tars_and_indexes(mutable, data):
    folder, files, images = mutable
    for name, content in files.items():
        (folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    if data.draw(st.booleans()):
        (folder / "index.json").unlink()
        (folder / "index.npy").unlink()
        name = "x.tar"
        content = bytearray(files[name])
    for _ in range(data.draw(st.integers(0, 3))):
        place = 512 * data.draw(st.integers(0, (len(content) - 1) // 512)) + data.draw(st.integers(0, 511))
        if place < len(content):
            content[place] = data.draw(st.integers(0, 255))
            header = place // 512 * 512
            if name == "x.tar" and data.draw(st.booleans()) and header + 512 <= len(content):  # a header whose sum is right again
                content[header + 148:header + 156] = b" " * 8
                content[header + 148:header + 156] = b"%06o\0 " % sum(content[header:header + 512])
    content = content[:data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    (folder / name).write_bytes(content)
    read_mutated(folder, images)


KEYS = ["classes", "shards", "bytes", "named", "crc32"]
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "x.tar", "shardlist"]), inner), max_leaves=12)


@settings(max_examples=60, deadline=None)
@given(content=JSON, keys=st.sets(st.sampled_from(KEYS)))
def test_an_index_of_any_types(mutable, content, keys):
    folder, files, images = mutable
    for name, right in files.items():
        (folder / name).write_bytes(right)
    if isinstance(content, dict):
        right = json.loads(files["index.json"])
        content |= {key: right[key] for key in keys}
    (folder / "index.json").write_text(json.dumps(content))
    read_mutated(folder, images)
