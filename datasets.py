"""What are the images and labels? Folders, CIFAR, iNaturalist, digits; tar shards are shards.py's.

    python datasets.py digits DIR             # scikit-learn's digits (1,797 scans, 10 classes) as class folders
    python datasets.py shards FOLDER DIR      # class folders as webdataset tar shards in DIR, a new or empty folder
    python datasets.py index DIR              # find the images of shards once, instead of at every start
"""
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

import labels
import shards
from decode import UnreadableImage
from transforms import build_transform  # noqa: F401  upstream's place for it


def build_dataset(is_train, data_path, data_set="IMNET", transform=None, inat_category="name", seed=0):
    """The training or validation set and its class names. Raises ValueError for data that is not there or not right."""
    root, split = Path(data_path), "train" if is_train else "val"
    if data_set == "DIGITS" and not (root / "train").is_dir():
        write_digits(root)
    if not root.is_dir():
        raise ValueError(f"--data-path {root}: no such folder")
    if data_set in ("CIFAR", "CIFAR10"):
        kind = datasets.CIFAR100 if data_set == "CIFAR" else datasets.CIFAR10
        try:
            found = kind(root, train=is_train)
        except RuntimeError as error:
            raise ValueError(f"--data-path {root}: no intact {kind.base_folder} in it: unpack {kind.filename} "
                             "there") from error
        names = [f"{split} image {i} of {kind.base_folder}" for i in range(len(found))]
        return NamedImages(found, names, transform, found.classes), found.classes
    if data_set in ("INAT", "INAT19"):
        found = INatDataset(root, is_train, 2018 if data_set == "INAT" else 2019, inat_category)
        return NamedImages(found, [path for path, _ in found.samples], transform, found.classes), found.classes
    if not (root / split).is_dir():
        raise ValueError(f"--data-path {root}: it has no folder {split}/ (expected train/ and val/)")
    if tars := shards.find(root / split):
        found = shards.ShardedImages(tars, transform)
        return found, found.classes
    try:
        found = datasets.ImageFolder(root / split)
    except FileNotFoundError as error:
        raise ValueError(f"--data-path {root}: {str(error).splitlines()[0].rstrip('.')}: every class is a folder in {split}/ with "
                         "at least one image") from error
    return NamedImages(found, [path for path, _ in found.samples], transform, found.classes), found.classes


def build_datasets(data_path, data_set, train_transform, val_transform, inat_category="name", seed=0, with_train=True, class_map=None):
    """-> (training set or None, validation set, class names); the two must have the same classes, which are numbered as in train/.

    class_map: as labels.read_class_map gives it; with it some class may have no validation image.
    """
    val, classes = build_dataset(False, data_path, data_set, val_transform, inat_category)
    if not with_train:
        return None, val, classes
    train, train_classes = build_dataset(True, data_path, data_set, train_transform, inat_category, seed)
    labels.compare(train_classes, classes, data_path, class_map)
    val.numbering = labels.decide(train_classes).of(classes)
    return train, val, train_classes


class NamedImages(Dataset):
    """(transformed image, class, index): by the index `name` says what it was; an unreadable image says its path.

    numbering: the output of the network for each of `classes`, where it is not the class's own number.
    """

    def __init__(self, dataset, names, transform=None, classes=()):
        self.dataset, self.names, self.transform, self.classes, self.numbering = dataset, names, transform, classes, None

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, target = self.dataset[index]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"cannot read the image {self.name(index)} ({str(error).splitlines()[0]}): "
                                  "replace it or remove it") from error
        target = target if self.numbering is None else self.numbering[target]
        return self.transform(image) if self.transform else image, target, index

    def name(self, index):
        return self.names[int(index)]


class INatDataset(Dataset):
    """iNaturalist 2018 and 2019, from their own JSON files. A class is what `category` says of the species.

    Classes are numbered as upstream numbers them: by their first annotation in the training file.
    """

    def __init__(self, root, is_train, year, category):
        def read(name):
            try:
                return json.loads((root / name).read_text())
            except (OSError, ValueError) as error:
                raise ValueError(f"--data-path {root}: cannot read {name} ({error.__class__.__name__}): iNaturalist {year} needs "
                                 f"train{year}.json, val{year}.json and categories.json") from error

        levels = {int(entry["id"]): str(entry[category]) for entry in read("categories.json")}
        train = read(f"train{year}.json")
        self.classes = list(dict.fromkeys(levels[int(a["category_id"])] for a in train["annotations"]))
        number = {name: i for i, name in enumerate(self.classes)}
        part = train if is_train else read(f"val{year}.json")
        species = {a["image_id"]: int(a["category_id"]) for a in part["annotations"]}
        self.samples = [(self.find(root, image["file_name"]), number[levels[species[image["id"]]]])
                        for image in part["images"]]

    @staticmethod
    def find(root, file_name):
        """The archive's path, or upstream's, which leaves out the super-category."""
        path, parts = root / file_name, Path(file_name).parts
        if len(parts) == 4 and not (root / parts[0] / parts[1]).is_dir():
            path = root / parts[0] / parts[2] / parts[3]
        return str(path)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, target = self.samples[index]
        return Image.open(path).convert("RGB"), target


def write_digits(folder):
    """scikit-learn's digits, 8 x 8 scans, as class folders: every fifth image validates. Never half-written."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
            path = Path(made, "digits", "val" if i % 5 == 4 else "train", str(label), f"{i:04d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)
        try:
            os.rename(Path(made, "digits"), folder)
        except OSError as error:  # another rank was faster, or the folder holds something else
            if not (folder / "train").is_dir():
                raise ValueError(f"{folder} is not empty and holds no digits: choose another --data-path") from error


def write_shards(source, target, maxcount=5000):
    """Class folders, train/ and val/ or the one there is, as tar shards of at most maxcount images. -> lines that tell of it

    Whole or not there: written beside `target` and renamed. Raises ValueError where something else stands in its place.
    """
    source, target = Path(source), Path(os.path.realpath(target))
    splits = [split for split in ("train", "val") if (source / split).is_dir()]
    if not splits:
        raise ValueError(f"{source} has neither train/ nor val/ with class folders")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} is not empty: choose a new folder for the shards")
    target.parent.mkdir(parents=True, exist_ok=True)
    said = []
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as made:
        for split in splits:
            images, classes = build_dataset(split == "train", source)
            if isinstance(images, shards.ShardedImages):
                raise ValueError(f"{source / split} holds shards already: python datasets.py index {source} makes their index")
            converted = shards.write(Path(made, "shards", split), images.dataset.samples, classes, maxcount)
            said.append(f"{split}: {len(images)} images of {len(classes)} classes" + "".join(
                f", {count} of them {kind} files, now PNG" for kind, count in converted.items()))
        os.rename(Path(made, "shards"), target)
    return said


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half-written goes away
    command, *paths = sys.argv[1:] or ["help"]
    paths = [Path(path) for path in paths]
    try:
        if command == "digits" and len(paths) == 1:
            if not (paths[0] / "train").is_dir():
                write_digits(paths[0])
            print(Counter(path.parts[-3] for path in sorted(paths[0].glob("*/*/*.png"))))
        elif command == "shards" and len(paths) == 2:
            print(*write_shards(*paths), sep="\n")
        elif command == "index" and len(paths) == 1:
            splits = [paths[0] / split for split in ("train", "val") if (paths[0] / split).is_dir()]
            if not splits:
                raise ValueError(f"{paths[0]} has neither train/ nor val/ with tar shards")
            for split in splits:
                index = shards.write_index(split)
                print(f"{split.name}: {len(index.records)} images of {len(index.classes)} classes in {len(index.counts)} shards")
        else:
            sys.exit(__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
