"""Images and labels: every data set kind on files made here, transforms, mixing and loaders."""
import hashlib
import json
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_all, small_transform
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset
from torchvision import datasets as tv
from torchvision import transforms

import datasets
import decode
import loaders
from transforms import FixedShapeMixup

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CLASSES = ["flower", "leaves", "temple"]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")


def photograph(width=90, height=70, x=300, y=150):
    return Image.fromarray(load_sample_image("china.jpg")[y:y + height, x:x + width])


def class_folders(root, classes, counts=(2, 1), image=None):
    for split, count in zip(("train", "val"), counts):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (image or photograph(40, 36, x=40 * i)).save(root / split / name / f"{i}.png")
    return root


def plain(image):
    """An image as a tensor, nothing more."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---- transforms ----

def by_hand(image, size, resize):
    """Shorter side to `resize`, bicubic; the middle; scaled and normalised."""
    short = min(image.size)
    width, height = (resize if side == short else int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.array(image.crop((left, top, left + size, top + size))).astype(np.float64) / 255
    return torch.from_numpy(((pixels - MEAN) / STD).transpose(2, 0, 1)).float()


@pytest.mark.parametrize("size, resize", [(224, 256), (64, 73), (192, 219), (32, 36)])
@pytest.mark.parametrize("width, height", [(90, 70), (70, 91), (300, 200), (64, 64)])
def test_validation_resizes_crops_and_normalises(size, resize, width, height):
    image = photograph(width, height)
    torch.testing.assert_close(datasets.build_transform(False, size)(image), by_hand(image, size, resize), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_the_middle_of_a_very_long_image_is_all_that_is_resized(turned):
    """As if all of it were, in no more memory than another image: 20000 x 1 pixels would be 5,120,000 x 256."""
    image = photograph(400, 20).resize((4000, 20))
    image = image.transpose(Image.Transpose.TRANSPOSE) if turned else image
    transform = datasets.build_transform(False, 64)
    torch.testing.assert_close(transform(image), by_hand(image, 64, 73), rtol=0, atol=1.01 / 255 / min(STD))
    sizes = []
    transform.transforms.insert(2, lambda resized: sizes.append(resized.size) or resized)
    transform(Image.new("RGB", (1, 20000) if turned else (20000, 1)))
    assert max(sizes[0]) == 7300


def test_native_size_is_only_normalised():
    image = photograph(32, 32)
    expected = torch.from_numpy(((np.array(image) / 255.0 - MEAN) / STD).transpose(2, 0, 1)).float()
    torch.testing.assert_close(small_transform(native_size=True)(image), expected, rtol=1e-5, atol=1e-5)


def draw(transform, seed):
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return transform(photograph())


@pytest.mark.parametrize("ours, theirs", [
    ({}, {}),
    (dict(auto_augment="none", color_jitter=0.3), dict(auto_augment=None, color_jitter=0.3)),
    (dict(interpolation="random", reprob=1.0, remode="const", recount=3),
     dict(interpolation="random", re_prob=1.0, re_mode="const", re_count=3)),
    (dict(hflip=1.0, crop_scale=(0.5, 0.6), reprob=0.0), dict(hflip=1.0, scale=(0.5, 0.6), re_prob=0.0)),
])
def test_training_is_timms_as_deit_calls_it(ours, theirs):
    deit = dict(is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", re_prob=0.25,
                re_mode="pixel", re_count=1)
    a, b = datasets.build_transform(True, 64, **ours), create_transform(64, **{**deit, **theirs})
    found = [draw(a, seed) for seed in range(6)]
    assert all(torch.equal(x, draw(b, seed)) for seed, x in enumerate(found))
    assert found[0].shape == (3, 64, 64)
    assert not torch.equal(found[0], found[1])


def test_what_training_is_made_of():
    def kinds(**settings):
        return [type(step) for step in small_transform(True, **settings).transforms]
    assert RandAugment in kinds() and RandomErasing in kinds() and transforms.ColorJitter not in kinds()
    assert RandAugment not in kinds(auto_augment="none") and transforms.ColorJitter in kinds(auto_augment="none")
    assert RandomErasing not in kinds(reprob=0.0)
    crop = small_transform(True, native_size=True).transforms[0]
    assert (type(crop), crop.size, crop.padding) == (transforms.RandomCrop, (32, 32), 4)


def test_unknown_augmentation_is_one_line():
    with pytest.raises(ValueError, match="--aa nonsense"):
        small_transform(True, auto_augment="nonsense")


# ---- mixup and cutmix ----

MIXES = {"both": {}, "mixup": dict(cutmix_alpha=0.0), "cutmix": dict(mixup_alpha=0.0), "minmax": dict(cutmix_minmax=(0.2, 0.8)),
         "only minmax": dict(mixup_alpha=0.0, cutmix_alpha=0.0, cutmix_minmax=(0.3, 0.9)), "seldom": dict(prob=0.4),
         "smooth": dict(label_smoothing=0.3), "sharp": dict(label_smoothing=0.0), "switch": dict(switch_prob=0.9)}


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mix", MIXES)
def test_mixing_is_timms(mix, mode):
    """The same numpy seed, the same images and targets; 40 batches, not square."""
    settings = dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5, mode=mode) | MIXES[mix]
    ours, theirs = FixedShapeMixup(**settings), Mixup(**settings)
    generator, changed = torch.Generator().manual_seed(0), 0
    for seed in range(40):
        images = torch.randn(6, 3, 20, 28, generator=generator)
        classes = torch.randint(5, (6,), generator=generator)
        np.random.seed(seed)
        expected, probabilities = theirs(images.clone(), classes)
        np.random.seed(seed)
        mixed, found = ours(images.clone(), classes)
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, probabilities.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.sum(1), torch.ones(6), rtol=1e-5, atol=0)
        changed += not torch.equal(mixed, images)
    assert changed > 30 if mix != "seldom" else changed > 5


def test_mixing_needs_pairs():
    with pytest.raises(AssertionError, match="must be even"):
        FixedShapeMixup(num_classes=5)(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long))


# ---- class folders ----

def test_class_folders(tiny_folder):
    train, val, classes = datasets.build_datasets(tiny_folder, "IMNET", small_transform(True), small_transform())
    assert classes == CLASSES
    assert (len(train), len(val)) == (24, 11)
    image, label, index = val[10]
    path = Path(val.name(index))
    assert (path.parent.name, label, image.shape) == ("temple", 2, (3, 32, 32))
    with Image.open(path) as opened:
        assert torch.equal(image, small_transform()(opened.convert("RGB")))


def test_evaluation_needs_no_training_images(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "val", tmp_path / "val")
    train, val, classes = datasets.build_datasets(tmp_path, "IMNET", None, small_transform(), with_train=False)
    assert (train, len(val), classes) == (None, 11, CLASSES)


@pytest.mark.parametrize("count", [1, 13])
def test_any_number_of_classes(tmp_path, count):
    names = [f"n{i:02d}" for i in range(count)]
    class_folders(tmp_path, names[::-1])
    train, _, classes = datasets.build_datasets(tmp_path, "IMNET", plain, plain)
    assert classes == names
    assert [train[i][1] for i in range(len(train))] == [i // 2 for i in range(2 * count)]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    image = photograph(40, 36).convert(mode)
    name = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(name)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        shutil.copy(name, tmp_path / "data" / split / "a")
    _, val, _ = datasets.build_datasets(tmp_path / "data", "IMNET", plain, plain)
    assert torch.equal(val[0][0], plain(image.convert("RGB")))


def refusal(root, data_set="IMNET", **settings):
    with pytest.raises(ValueError) as caught:
        datasets.build_datasets(root, data_set, plain, plain, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"--data-path {root}: ")
    return text


def test_other_classes_in_val_are_named(tmp_path):
    class_folders(tmp_path, ["cat", "dog", "eel"])
    shutil.move(tmp_path / "val" / "dog", tmp_path / "val" / "wolf")
    text = refusal(tmp_path)
    assert "only in train ['dog'], only in val ['wolf']" in text


def test_fewer_classes_in_val_are_named(tmp_path):
    class_folders(tmp_path, ["cat", "dog", "eel"])
    shutil.rmtree(tmp_path / "val" / "eel")
    assert "train/ has 3 classes and val/ 2, and they differ: only in train ['eel'], only in val []" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_class_folder_is_named(tmp_path, split):
    class_folders(tmp_path, ["cat", "dog"])
    (tmp_path / split / "dog" / "readme.txt").write_text("no image")
    for image in (tmp_path / split / "dog").glob("*.png"):
        image.unlink()
    text = refusal(tmp_path)
    assert "dog" in text and "cat" not in text and f"a folder in {split}/" in text


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(tmp_path, split):
    class_folders(tmp_path, ["cat", "dog"])
    shutil.rmtree(tmp_path / split)
    assert f"it has no folder {split}/ (expected train/ and val/)" in refusal(tmp_path)


def test_a_split_without_classes(tmp_path):
    class_folders(tmp_path, ["cat"])
    shutil.rmtree(tmp_path / "train" / "cat")
    assert "train/" in refusal(tmp_path)


@pytest.mark.parametrize("data_set", ["IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19"])
def test_a_missing_path(tmp_path, data_set):
    assert "no such folder" in refusal(tmp_path / "nowhere", data_set)


def bad_images(good):
    data = good.read_bytes()
    return {"empty": b"", "text": b"this is no image", "cut off": data[: len(data) // 2], "header only": data[:20],
            "damaged": data[:60] + bytes(40) + data[100:]}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["empty", "text", "cut off", "header only", "damaged"])
def test_an_unreadable_image_says_its_path(tmp_path, what, workers):
    root = class_folders(tmp_path, ["cat", "dog"])
    bad = root / "val" / "dog" / "0.png"
    bad.write_bytes(bad_images(bad)[what])
    _, val, _ = datasets.build_datasets(root, "IMNET", small_transform(), small_transform())
    loader = loaders.build_loader(val, False, 4, workers)
    with pytest.raises(decode.UnreadableImage, match=f"cannot read the image {bad} .*: replace it or remove it"):
        read_all(loader)


# ---- CIFAR ----

def write_cifar(folder, kind, monkeypatch, names):
    """Files in torchvision's format, and their sums in place of the real ones. -> {is_train: (pixels, labels)}"""
    rng, made = np.random.default_rng(0), {}
    (folder / kind.base_folder).mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / kind.base_folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()
    for is_train, place in ((True, "train_list"), (False, "test_list")):
        sums, parts = [], []
        for name, _ in getattr(kind, place):
            pixels, labels = rng.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8), rng.integers(0, len(names), 5).tolist()
            key = "fine_labels" if kind is tv.CIFAR100 else "labels"
            sums.append([name, write(name, {"data": pixels.reshape(5, -1), key: labels})])
            parts.append((pixels, labels))
        monkeypatch.setattr(kind, place, sums)
        made[is_train] = np.concatenate([p for p, _ in parts]), [label for _, part in parts for label in part]
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": write(kind.meta["filename"], {kind.meta["key"]: names})})
    return made


@pytest.mark.parametrize("data_set, kind, count", [("CIFAR", tv.CIFAR100, 100), ("CIFAR10", tv.CIFAR10, 10)])
def test_cifar(tmp_path, monkeypatch, data_set, kind, count):
    names = [f"thing {i}" for i in range(count)]
    made = write_cifar(tmp_path, kind, monkeypatch, names)
    train, val, classes = datasets.build_datasets(tmp_path, data_set, plain, plain)
    assert classes == names
    assert (len(train), len(val)) == (5 * len(kind.train_list), 5)
    for found, (pixels, labels) in ((train, made[True]), (val, made[False])):
        for i in range(len(found)):
            image, label, index = found[i]
            assert np.array_equal(image.numpy(), pixels[i])
            assert (label, index) == (labels[i], i)
    assert val.name(3) == f"val image 3 of {kind.base_folder}"


@pytest.mark.parametrize("data_set, file", [("CIFAR", "cifar-100-python"), ("CIFAR10", "cifar-10-batches-py")])
def test_cifar_that_is_not_there_or_not_intact(tmp_path, monkeypatch, data_set, file):
    assert f"no intact {file} in it: unpack {file.replace('batches-py', 'python')}.tar.gz there" in refusal(tmp_path, data_set)
    kind = tv.CIFAR100 if data_set == "CIFAR" else tv.CIFAR10
    write_cifar(tmp_path, kind, monkeypatch, ["a"])
    datasets.build_datasets(tmp_path, data_set, plain, plain)
    with open(tmp_path / file / kind.test_list[0][0], "ab") as test:
        test.write(b"x")
    assert f"no intact {file}" in refusal(tmp_path, data_set)


# ---- iNaturalist ----

LEVELS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")


def write_inat(root, year, with_super=True):
    """Six species in a tree, images of them in an order of their own. -> categories, {is_train: [(species, path, pixels)]}"""
    categories = [{"id": i, "name": f"species {i}", "genus": f"genus {i // 2}", "family": f"family {i // 3}", "order": f"order {i // 4}",
                   "class": f"class {i // 5}", "phylum": "chordates" if i < 5 else "plants", "kingdom": "all",
                   "supercategory": "Birds" if i < 4 else "Trees"} for i in range(6)]
    (root / "categories.json").write_text(json.dumps(categories))
    made, number = {}, 0
    for split, order in (("train", [4, 1, 0, 5, 3, 2, 4, 0]), ("val", [2, 5, 0, 1, 3, 4])):
        images, annotations, made[split == "train"] = [], [], []
        for species in order:
            number += 1
            parts = [f"train_val{year}", categories[species]["supercategory"], str(species), f"{number:03d}.jpg"]
            path = root.joinpath(*parts if with_super else (parts[0], *parts[2:]))
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(34, 34, x=10 * number).save(path)
            images.append({"id": 900 - number, "file_name": "/".join(parts)})
            annotations.append({"id": number, "image_id": 900 - number, "category_id": species})
            made[split == "train"].append((species, path))
        if split == "val":
            annotations.reverse()  # nothing says that annotations have the images' order
        (root / f"{split}{year}.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return categories, made


@pytest.mark.parametrize("category", LEVELS)
@pytest.mark.parametrize("data_set, year, with_super", [("INAT", 2018, True), ("INAT", 2018, False), ("INAT19", 2019, True)])
def test_inaturalist(tmp_path, data_set, year, with_super, category):
    """Classes in the order of the training annotations, as upstream numbers them; with and without the super-category's folder."""
    categories, made = write_inat(tmp_path, year, with_super)
    train, val, classes = datasets.build_datasets(tmp_path, data_set, plain, plain, category)
    expected = []
    for species, _ in made[True]:
        if categories[species][category] not in expected:
            expected.append(categories[species][category])
    assert classes == expected
    for found, wanted in ((train, made[True]), (val, made[False])):
        assert len(found) == len(wanted)
        for i, (species, path) in enumerate(wanted):
            image, label, index = found[i]
            assert classes[label] == categories[species][category]
            assert found.name(index) == str(path)
            with Image.open(path) as opened:
                assert torch.equal(image, plain(opened))


@pytest.mark.parametrize("name", ["categories.json", "train2018.json", "val2018.json"])
@pytest.mark.parametrize("damage", ["missing", "no JSON"])
def test_inaturalist_without_a_file(tmp_path, name, damage):
    write_inat(tmp_path, 2018)
    (tmp_path / name).unlink()
    if damage == "no JSON":
        (tmp_path / name).write_text("{")
    assert f"cannot read {name}" in refusal(tmp_path, "INAT")


def test_inaturalist_image_that_is_missing(tmp_path):
    _, made = write_inat(tmp_path, 2018)
    made[False][2][1].unlink()
    _, val, _ = datasets.build_datasets(tmp_path, "INAT", plain, plain)
    with pytest.raises(decode.UnreadableImage, match=f"cannot read the image {made[False][2][1]} "):
        val[2]


# ---- digits ----

def test_digits(digits_folder):
    """1,438 and 359 scans, every fifth for validation, each pixel 16 grey levels spread over 255."""
    digits = load_digits()
    for split, count in (("train", 1438), ("val", 359)):
        paths = sorted((digits_folder / split).glob("*/*.png"))
        assert len(paths) == count
        for path in paths:
            i = int(path.stem)
            assert (i % 5 == 4) == (split == "val")
            assert path.parent.name == str(digits.target[i])
            with Image.open(path) as image:
                assert np.array_equal(np.array(image), np.rint(digits.images[i] * 255 / 16))


def test_digits_are_written_where_they_are_not(tmp_path, digits_folder):
    for _ in range(2):
        train, val, classes = datasets.build_datasets(tmp_path / "new" / "digits", "DIGITS", plain, plain)
        assert (len(train), len(val), classes) == (1438, 359, list("0123456789"))
    assert os.listdir(tmp_path / "new") == ["digits"]


def test_digits_overwrite_nothing(tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="holds no digits: choose another --data-path"):
        datasets.build_dataset(True, tmp_path, "DIGITS")
    assert os.listdir(tmp_path) == ["thesis.txt"]


# ---- loaders ----

class Draws(Dataset):
    """What numpy, random and torch draw where an item is made, and by which worker."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return np.random.rand(), random.random(), torch.rand(()).item(), i, os.getpid()


def drawn(workers=0, ranks=1, seed=3, epoch=0, repeated=False, start=0, accum_steps=1):
    """{image: its draws of numpy, random and torch, in an order that no worker decides}, and the processes that made them"""
    found, processes = {}, set()
    for rank in range(ranks):
        loader = loaders.build_loader(Draws(), True, 2, workers, rank, ranks, seed, repeated, accum_steps=accum_steps)
        loaders.set_epoch(loader, epoch, start)
        for *draws, index, pid in read_all(loader):
            for i, *own in zip(index.tolist(), *(draw.tolist() for draw in draws)):
                found.setdefault(i, []).append(tuple(own))
            processes |= set(pid.tolist())
    return {i: sorted(found[i]) for i in sorted(found)}, processes


def test_what_is_drawn_for_an_image_follows_from_seed_epoch_and_image():
    """Whatever the workers, ranks and parts; and it differs from that of any other image, epoch and seed."""
    first, _ = drawn()
    assert sorted(first) == list(range(16))
    for words in (dict(workers=2), dict(workers=3), dict(ranks=2), dict(ranks=4, workers=1), dict(accum_steps=4),
                  dict(ranks=2, accum_steps=2)):
        assert drawn(**words)[0] == first, words
    every = [value for found in (first, drawn(epoch=1)[0], drawn(seed=4)[0]) for draws in found.values() for value in draws]
    assert all(len({value[k] for value in every}) == len(every) == 48 for k in range(3))


def test_the_copies_of_an_image_are_drawn_apart():
    found, _ = drawn(repeated=True)
    assert drawn(repeated=True, workers=2, ranks=2)[0] == found
    values = [value for draws in found.values() for value in draws]
    assert max(map(len, found.values())) == 3 and len(set(values)) == len(values) == 16


@pytest.mark.parametrize("repeated", [False, True])
def test_an_epoch_goes_on_in_its_middle(repeated):
    """The batches from the third on, with their draws."""
    def batches(start):
        loader = loaders.build_loader(Draws(), True, 2, 0, 0, 1, 3, repeated)
        loaders.set_epoch(loader, 1, start)
        return [[values.tolist() for values in batch[:4]] for batch in loader]
    assert batches(2) == batches(0)[2:] and len(batches(0)) == 8 and batches(8) == []


def test_workers_persist():
    loader = loaders.build_loader(Draws(), True, 2, 2)
    seen = []
    for epoch in range(2):
        loaders.set_epoch(loader, epoch)
        seen.append({pid for batch in loader for pid in batch[4].tolist()})
    assert seen[0] == seen[1] and len(seen[0]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(tiny_folder, workers):
    """Training drops the ragged last batch, evaluation keeps it, in order and with every image's index."""
    train, val, _ = datasets.build_datasets(tiny_folder, "IMNET", small_transform(), small_transform())
    loader = loaders.build_loader(train, True, 5, workers)
    batches = list(loader)
    assert [len(batch[0]) for batch in batches] == [5] * 4 and len(loader) == 4
    batches = list(loaders.build_loader(val, False, 5, workers))
    assert [tuple(images.shape) for images, _, _ in batches] == [(5, 3, 32, 32), (5, 3, 32, 32), (1, 3, 32, 32)]
    assert [i for batch in batches for i in batch[2].tolist()] == list(range(11))
    assert [label for batch in batches for label in batch[1].tolist()] == [0] * 4 + [1] * 4 + [2] * 3


def names(loader, epoch=0):
    loaders.set_epoch(loader, epoch)
    return [list(batch[2]) for batch in read_all(loader)]


def flat(batches):
    return [name for batch in batches for name in batch]


@pytest.mark.parametrize("repeated", [False, True])
def test_the_order_follows_seed_and_epoch(tiny_folder, repeated):
    """The seed reaches the samplers."""
    train, _, _ = datasets.build_datasets(tiny_folder, "IMNET", small_transform(), small_transform())

    def order(seed, epoch):
        loader = loaders.build_loader(train, True, 6, 0, 0, 2, seed, repeated_aug=repeated)
        return flat([[int(i) for i in batch] for batch in names(loader, epoch)])
    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(9, 0)
    assert (len(set(order(1, 0))) < 12) == repeated


def test_repeated_augmentation_repeats_images_differently(tiny_folder):
    train, _, _ = datasets.build_datasets(tiny_folder, "IMNET", small_transform(True), small_transform())
    batch = next(iter(loaders.build_loader(train, True, 24, 0, repeated_aug=True)))
    assert sorted(Counter(batch[2].tolist()).values()) == [3] * 8
    one = batch[2][0]
    a, b, c = batch[0][batch[2] == one]
    assert not torch.equal(a, b) and not torch.equal(b, c)


@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_evaluation_is_shared_exactly(tiny_folder, ranks):
    """Also by more ranks than there are images."""
    _, val, _ = datasets.build_datasets(tiny_folder, "IMNET", small_transform(), small_transform())
    seen = [int(i) for rank in range(ranks) for batch in loaders.build_loader(val, False, 4, 0, rank, ranks) for i in batch[2]]
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize("batch, ranks, repeated", [(25, 1, False), (13, 2, False), (13, 2, True), (64, 1, True)])
def test_a_batch_larger_than_a_ranks_share(tiny_folder, batch, ranks, repeated):
    train, _, _ = datasets.build_datasets(tiny_folder, "IMNET", small_transform(), small_transform())
    with pytest.raises(ValueError, match=f"24 images, too few for one batch of {batch} on each of {ranks} ranks: .*--batch-size"):
        loaders.build_loader(train, True, batch, 0, 0, ranks, repeated_aug=repeated)


def test_a_small_validation_set_needs_no_full_batch(tiny_folder):
    _, val, _ = datasets.build_datasets(tiny_folder, "IMNET", small_transform(), small_transform())
    assert len(next(iter(loaders.build_loader(val, False, 64, 0)))[0]) == 11


# ---- the command line ----

def test_command_digits(tmp_path, tool, run_tool):
    """As a user starts it; a second time it only counts."""
    done = run_tool("data", "digits", "digits", cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "train: 1438 images\nval: 359 images\n")
    assert tool("data", "digits", tmp_path / "digits") == (0, done.stdout, "")


@pytest.mark.parametrize("words", [(), ("help",), ("digits",), ("shards", "one"), ("dance", "here")])
def test_command_shows_what_there_is(tool, words):
    status, out, said = tool("data", *words)
    assert (status, out) == (2, "") and said.startswith("usage: python tools data")
    status, out, said = tool("data", "--help")
    assert (status, said) == (0, "") and "python tools data digits DIR" in out


@pytest.mark.parametrize("words", [("shards", "nowhere", "target"), ("index", "nowhere")])
def test_command_with_a_wrong_path(tool, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, said = tool("data", *words)
    assert (status, out) == (2, "") and said.startswith("error: nowhere has neither train/ nor val/ with ") and said.count("\n") == 1
