"""What are the images and labels? Folders, CIFAR, iNaturalist, digits; tar shards are shards.py's, `python tools data` writes both."""
import errno
import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

import inaturalist
import labels
import shards
from decode import EXTENSIONS, READ_ERRORS, DataError, load_rgb, open_file, reason
from folders import ClassFolders, is_
from transforms import build_transform  # noqa: F401  upstream's place for it
from utils import shown


def build_dataset(is_train, data_path, data_set="IMNET", transform=None, inat_category="name"):
    """The training or validation set and its class names. Raises ValueError for data that is not there or not right.

    What a log should say of the data is the set's `notes`.
    """
    root = Path(data_path)
    if data_set == "DIGITS" and not os.path.isdir(root / "train"):
        write_digits(root)
    try:
        found = os.listdir(root)
    except OSError as error:
        why = "no such folder" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else reason(error)
        raise ValueError(f"--data-path {shown(root)}: {why}") from error
    try:
        if data_set in ("CIFAR", "CIFAR10"):
            dataset = CIFARImages(root, is_train, datasets.CIFAR100 if data_set == "CIFAR" else datasets.CIFAR10, transform)
        elif data_set in ("INAT", "INAT19"):
            found = inaturalist.read(root, is_train, 2018 if data_set == "INAT" else 2019, inat_category)
            dataset = ImageFiles(*found, transform)
        else:
            dataset = read_split(root, "train" if is_train else "val", found, transform)
    except DataError:  # has a file's path
        raise
    except ValueError as error:
        raise ValueError(f"--data-path {shown(root)}: {error}") from error
    return dataset, dataset.classes


def build_datasets(data_path, data_set, train_transform, val_transform, inat_category="name", with_train=True, class_map=None,
                   with_val=True):
    """-> (training set, validation set, class names): the same classes, numbered as in train/. What is not wanted is None.

    class_map: as labels.read_class_map gives it; with it some class may have no validation image.
    """
    val, classes = build_dataset(False, data_path, data_set, val_transform, inat_category) if with_val else (None, None)
    if not with_train:
        return None, val, classes
    train, train_classes = build_dataset(True, data_path, data_set, train_transform, inat_category)
    if not with_val:
        return train, None, train_classes
    if len(classes) == 1 < len(train_classes) and not {labels.normal(classes[0])} <= set(map(labels.normal, train_classes)):
        raise ValueError(f"--data-path {shown(data_path)}: val/ is flat: its images lie in one folder, {shown(classes[0])}/, and "
                         f"train/ has {len(train_classes)} classes: put each image into the folder of its class, val/CLASS/")
    labels.compare(train_classes, classes, data_path, class_map, [getattr(part, "named", True) for part in (train, val)])
    val.numbering = labels.decide(train_classes).of(classes)
    return train, val, train_classes


def read_split(root, split, found, transform):
    """Class folders or shards in root/split. found: the names in root."""
    if not os.path.isdir(root / split):
        raise ValueError(f"it has no folder {split}/ (expected train/ and val/)" + elsewhere(root, split, found))
    if tars := shards.find(root / split):
        return shards.ShardedImages(tars, transform)
    folders = ClassFolders(root / split)
    return ImageFiles(folders.paths, folders.labels, folders.classes, folders.notes(), transform)


def elsewhere(root, split, found):
    """Where what should be root/split may be, and what to do. found: the names in root."""
    alike = {"train": ("train", "training"), "val": ("val", "valid", "validation", "eval", "evaluation", "test")}[split]
    if others := [shown(name) for word in alike for name in sorted(found) if name.lower() == word and os.path.isdir(root / name)]:
        return f", but {', '.join(f'{name}/' for name in others)}: rename it, or link it: ln -s {others[0]} {shown(root / split)}"
    if folder := below(root, split):
        return f", but {shown(folder.relative_to(root))}/ has: --data-path {shown(folder)}"
    return "; --no-eval trains without" if split == "val" else ""


def below(root, split, depth=3):
    """The nearest folder below root whose `split` holds images or shards, as Data/CLS-LOC of Kaggle's ImageNet; None without one.

    Only a look: of the first names of the first folders.
    """
    level = [root]
    for _ in range(depth):
        level = sorted(Path(entry.path) for folder in level for entry in some_of(folder)
                       if is_(entry, "dir") and not entry.name.startswith("."))[:100]
        if found := next((folder for folder in level if shows_images(folder / split)), None):
            return found
    return None


def some_of(folder):
    try:
        with os.scandir(folder) as entries:
            return list(itertools.islice(entries, 1000))
    except OSError:
        return []


def shows_images(folder, depth=1):
    entries = some_of(folder)
    return any(entry.name.lower().endswith((*EXTENSIONS, *shards.SUFFIXES)) for entry in entries) or (
        depth and any(shows_images(entry.path, depth - 1) for entry in [entry for entry in entries if is_(entry, "dir")][:3]))


class NamedImages(Dataset):
    """(transformed image, class, index); `name` says what the image of an index is.

    classes: names. numbering: the output of the network for each of them, where it is not the class's own number. notes: what
    a log should say of the data.
    """

    def __init__(self, classes, transform=None, notes=()):
        self.classes, self.transform, self.notes, self.numbering = classes, transform, list(notes), None

    def __getitem__(self, index):
        image, label = self.load(index)
        label = label if self.numbering is None else self.numbering[label]
        return self.transform(image) if self.transform else image, label, index


class ImageFiles(NamedImages):
    """names: the images' paths; targets: their classes' numbers: both flat arrays, so that forked workers share them.

    An image that cannot be read is an UnreadableImage with its path.
    """

    def __init__(self, names, targets, classes, notes=(), transform=None):
        super().__init__(classes, transform, notes)
        self.names, self.targets = names, targets

    def __len__(self):
        return len(self.names)

    def load(self, index):
        return load_rgb(self.names[index]), int(self.targets[index])

    def name(self, index):
        return self.names[int(index)]


class CIFARImages(NamedImages):
    """CIFAR-10 or CIFAR-100, whose files torchvision compares with their checksums and reads."""

    def __init__(self, root, is_train, kind, transform=None):
        try:
            for name, _ in [*kind.train_list, *kind.test_list, [kind.meta["filename"], None]]:
                if os.path.exists(path := root / kind.base_folder / name):
                    open_file(path).close()  # torchvision would wait for a FIFO
            self.images = kind(root, train=is_train)
        except READ_ERRORS as error:
            why = "" if type(error) is RuntimeError else f" ({reason(error)})"
            raise ValueError(f"no intact {kind.base_folder} in it{why}: unpack {kind.filename} there") from error
        super().__init__(self.images.classes, transform)
        self.targets = np.array(self.images.targets)
        self.split = "train" if is_train else "val"

    def __len__(self):
        return len(self.images)

    def load(self, index):
        return self.images[index]

    def name(self, index):
        return f"{self.split} image {int(index)} of {self.images.base_folder}"


STANDS_THERE = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)  # why a folder cannot be renamed to a name


def write_digits(folder):
    """scikit-learn's digits, 8 x 8 scans, as class folders: every fifth image validates. Never half-written."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
                path = Path(made, "digits", "val" if i % 5 == 4 else "train", str(label), f"{i:04d}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)
            try:
                os.rename(Path(made, "digits"), folder)
            except OSError as error:  # another rank was faster, or something else stands there
                if error.errno not in STANDS_THERE:
                    raise
                if not os.path.isdir(folder / "train"):
                    raise ValueError(f"{shown(folder)} is not empty and holds no digits: choose another --data-path") from error
    except OSError as error:
        raise ValueError(f"the digits cannot be written to {shown(folder)} ({reason(error)}): choose another --data-path") from error
