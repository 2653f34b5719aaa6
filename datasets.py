"""What are the images and labels? Folders, tar shards, CIFAR, iNaturalist, digits; transforms, mixing and loaders.

    python datasets.py digits DIR             # scikit-learn's digits (1,797 scans, 10 classes) as class folders
    python datasets.py shards FOLDER DIR      # class folders as webdataset tar shards
    python datasets.py index DIR              # count the images of shards once, instead of at every start
"""
import contextlib
import glob
import json
import os
import random
import sys
import tarfile
import tempfile
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from samplers import EvalSampler, RASampler, ShuffleSampler


class DataError(ValueError):
    """Something wrong with the data that shows only when they are read, perhaps in a loader's worker."""


class UnreadableImage(DataError):
    """An image that cannot be decoded; the message has its path."""


# ---- transforms ----

def build_transform(is_train, input_size=224, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
                    interpolation="bicubic", reprob=0.25, remode="pixel", recount=1, hflip=0.5, crop_scale=(0.08, 1.0),
                    native_size=False):
    """PIL image -> normalised (3, input_size, input_size), as DeiT trains and evaluates.

    native_size: the images already have the input's size (CIFAR at 32): padded random crops, and no resizing.
    """
    if is_train:
        try:
            transform = create_transform(
                input_size, is_training=True, color_jitter=color_jitter, interpolation=interpolation, re_prob=reprob,
                auto_augment=None if auto_augment in (None, "", "none") else auto_augment, re_mode=remode,
                re_count=recount, hflip=hflip, scale=tuple(crop_scale))
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"--aa {auto_augment}: timm does not know this policy ({error!r}): "
                             "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, v0 or none") from error
        for operator in augment_operators(transform):
            if operator.name.startswith("Posterize"):
                operator.aug_fn = posterize
        if native_size:
            transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
        return transform
    resize = [] if native_size else [transforms.Resize(int(256 / 224 * input_size), InterpolationMode.BICUBIC),
                                     transforms.CenterCrop(input_size)]
    return transforms.Compose([*resize, transforms.ToTensor(),
                               transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


def augment_operators(transform):
    """timm's AugmentOps inside a transform: of RandAugment, AutoAugment or AugMix."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        yield from (operator for policy in getattr(step, "policy", ()) for operator in policy)


def posterize(image, bits, **_):
    """As PIL's before Pillow 13: no bits left is a black image, not an error. The recipe draws it once in 600 images."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class FixedShapeMixup(Mixup):
    """timm's Mixup with its draws, but both mixup and cutmix are x + weight * (x.flip(0) - x).

    One copy and two launches, whose shapes do not depend on the boxes: a device that compiles each new shape (910A)
    compiles once for mixup and once for cutmix, and nothing waits for it. weight: (1 or B, 1, height or 1, width or 1).
    """

    def __call__(self, images, targets):
        """(B, 3, height, width) and classes (B,) -> mixed in place, probabilities (B, classes)"""
        assert len(images) % 2 == 0, "mixing pairs the images: the batch must be even"
        draws = {"batch": 1, "pair": len(images) // 2, "elem": len(images)}[self.mode]
        if draws == 1:
            lam, cutmix = ([x] for x in self._params_per_batch())
        else:
            lam, cutmix = self._params_per_elem(draws)
        lam = np.array(lam, dtype=np.float32)
        height, width = images.shape[-2:] if np.any(cutmix) else (1, 1)
        weight = np.empty((draws, 1, height, width), dtype=np.float32)
        for i in range(draws):
            weight[i] = 1 - lam[i]
            if cutmix[i] and lam[i] != 1:
                (top, bottom, left, right), lam[i] = cutmix_bbox_and_lam(
                    images.shape, lam[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam)
                weight[i] = 0
                weight[i, :, top:bottom, left:right] = 1
        if self.mode == "pair":  # the second half holds the partners
            weight, lam = np.concatenate((weight, weight[::-1])), np.concatenate((lam, lam[::-1]))
        images.lerp_(images.flip(0), to_device(weight, images))
        return images, mixup_target(targets, self.num_classes, to_device(lam[:, None], images), self.label_smoothing)


def to_device(array, like):
    """A host array beside the tensor `like`, without waiting for its device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if like.is_cpu else tensor.pin_memory().to(like.device, non_blocking=True)


# ---- data sets ----

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
        return NamedImages(found, [f"{split} image {i} of {kind.base_folder}" for i in range(len(found))], transform), found.classes
    if data_set in ("INAT", "INAT19"):
        found = INatDataset(root, is_train, 2018 if data_set == "INAT" else 2019, inat_category)
        return NamedImages(found, [path for path, _ in found.samples], transform), found.classes
    if not (root / split).is_dir():
        raise ValueError(f"--data-path {root}: it has no folder {split}/ (expected train/ and val/)")
    if shards := sorted(glob.glob(f"{glob.escape(str(root / split))}/*.tar")):
        found = ShardedImages(shards, transform, is_train, seed)
        return found, found.classes
    try:
        found = datasets.ImageFolder(root / split)
    except FileNotFoundError as error:
        raise ValueError(f"--data-path {root}: {str(error).splitlines()[0].rstrip('.')}: every class is a folder in {split}/ with "
                         "at least one image") from error
    return NamedImages(found, [path for path, _ in found.samples], transform), found.classes


def build_datasets(data_path, data_set, train_transform, val_transform, inat_category="name", seed=0, with_train=True):
    """-> (training set or None, validation set, class names); the two must have the same classes."""
    val, classes = build_dataset(False, data_path, data_set, val_transform, inat_category)
    if not with_train:
        return None, val, classes
    train, train_classes = build_dataset(True, data_path, data_set, train_transform, inat_category, seed)
    if train_classes != classes:
        missing, unknown = (sorted(a - b)[:3] for a, b in ((set(train_classes), set(classes)),
                                                           (set(classes), set(train_classes))))
        raise ValueError(f"--data-path {data_path}: train/ has {len(train_classes)} classes and val/ {len(classes)}, and they "
                         f"differ: only in train {missing}, only in val {unknown}: make the folders agree")
    return train, val, classes


class NamedImages(Dataset):
    """(transformed image, class, index): by the index `name` says what it was; an unreadable image says its path."""

    def __init__(self, dataset, names, transform=None):
        self.dataset, self.names, self.transform = dataset, names, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            image, target = self.dataset[index]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"cannot read the image {self.name(index)} ({str(error).splitlines()[0]}): "
                                  "replace it or remove it") from error
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


# ---- tar shards ----

class ShardedImages(IterableDataset):
    """webdataset tar shards whose samples are KEY.jpg (or png, jpeg, webp) and KEY.cls, a class number.

    Evaluation reads every image once: shards are dealt to ranks and their workers. Training deals an order of the shards
    that is new each epoch, shuffles in a buffer, and gives each rank the same number of batches; a worker whose shards
    hold too few images starts them again. Fewer shards than workers: all read all shards, and take turns at the images.
    """
    BUFFER = 1000  # images to shuffle among, a worker

    def __init__(self, shards, transform, is_train, seed=0):
        self.shards, self.transform, self.is_train, self.seed = shards, transform, is_train, seed
        self.classes, counts = read_index(Path(shards[0]).parent, shards)
        self.counts, self.total = dict(zip(shards, counts)), sum(counts)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.rank, self.ranks, self.batch_size = 0, 1, 1

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def deal(self, rank, ranks, batch_size):
        self.rank, self.ranks, self.batch_size = rank, ranks, batch_size

    def __len__(self):
        """Images of this rank in an epoch of training; of all ranks in an evaluation."""
        return self.total // self.ranks // self.batch_size * self.batch_size if self.is_train else self.total

    def name(self, key):
        return key

    def read(self, order, part, parts):
        own = len(order) >= parts
        order = order[part::parts] if own else order
        if not order:
            return
        for shard in order:
            count = 0
            try:
                for sample in webdataset.DataPipeline(webdataset.SimpleShardList([shard]), webdataset.tarfile_to_samples()):
                    if own or count % parts == part:
                        yield sample
                    count += 1
            except (tarfile.TarError, EOFError, OSError, ValueError) as error:
                raise DataError(f"cannot read the shard {shard} ({error.args[0] if error.args else error!r}): write it again") from error
            if count != self.counts[shard]:  # a tar that breaks off between members ends like a whole one
                raise DataError(f"cannot read the shard {shard}: it ends after {count} of {self.counts[shard]} images: write it "
                                "again, or its index: python datasets.py index")

    def decode(self, sample):
        name = f"{sample['__url__']}/{sample['__key__']}"
        try:
            data = next(sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample)
            image, target = Image.open(BytesIO(data)).convert("RGB"), int(sample["cls"])
        except (StopIteration, OSError, KeyError, ValueError, SyntaxError) as error:
            reason = "no jpg, png or webp beside its label" if isinstance(error, StopIteration) else error
            raise UnreadableImage(f"cannot read the image {name} ({reason}): replace it or remove it") from error
        return self.transform(image) if self.transform else image, target, name

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = worker * self.ranks + self.rank, self.ranks * workers
        if not self.is_train:
            yield from map(self.decode, self.read(self.shards, part, parts))
            return
        epoch = int(self.epoch)
        order = list(self.shards)
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        batches = self.total // self.ranks // self.batch_size
        wanted = (batches // workers + (worker < batches % workers)) * self.batch_size
        rng = random.Random(f"{self.seed}/{epoch}/{part}")
        while wanted > 0:
            got = 0
            for sample in webdataset.shuffle(self.BUFFER, initial=self.BUFFER, rng=rng)(self.read(order, part, parts)):
                yield self.decode(sample)
                got, wanted = got + 1, wanted - 1
                if not wanted:
                    return
            if not got:
                raise DataError(f"{Path(self.shards[0]).parent}: too few images for {parts} workers: use fewer --num_workers")


def scan_shards(shards):
    """-> class names ('0', '1', ...) and {file name: number of images}, by reading every shard's labels."""
    counts, largest = {}, -1
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                labels = [int(tar.extractfile(member).read()) for member in tar if member.name.endswith(".cls")]
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"cannot read the shard {shard} ({error}): write it again") from error
        counts[Path(shard).name] = len(labels)
        largest = max([largest, *labels])
    return [str(i) for i in range(largest + 1)], counts


def read_index(folder, shards):
    """Class names and the number of images of each shard: from index.json in the folder, or by reading the shards."""
    try:
        index = json.loads((folder / "index.json").read_text())
        classes, counts = list(index["classes"]), dict(index["shards"])
    except FileNotFoundError:
        classes, counts = scan_shards(shards)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"cannot read {folder / 'index.json'} ({error!r}): python datasets.py index {folder.parent}") from error
    unknown = {Path(shard).name for shard in shards} ^ set(counts)
    if unknown:
        raise ValueError(f"{folder / 'index.json'} does not fit the shards beside it ({sorted(unknown)[0]}): "
                         f"python datasets.py index {folder.parent}")
    if not sum(counts.values()):
        raise ValueError(f"{folder}: the shards hold no images with a .cls label")
    return classes, [counts[Path(shard).name] for shard in shards]


def write_index(folder, classes=None):
    """index.json for the shards of one split. An older index's class names are kept, where they are enough."""
    found, counts = scan_shards(sorted(map(str, folder.glob("*.tar"))))
    path = folder / "index.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        classes = classes or list(json.loads(path.read_text())["classes"])
    if not classes or len(classes) < len(found):
        classes = found
    path.write_text(json.dumps({"classes": classes, "shards": counts}, indent=1) + "\n")


def write_shards(source, target, maxcount=5000):
    """Class folders (train/, val/) as tar shards of at most maxcount images, with an index."""
    for split in ("train", "val"):
        folder = datasets.ImageFolder(source / split)
        order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist()
        (target / split).mkdir(parents=True, exist_ok=True)
        pattern = str(target / split).replace("%", "%%") + "/%06d.tar"
        with webdataset.ShardWriter(pattern, maxcount=maxcount, verbose=0) as writer:
            for i in order:
                path, label = folder.samples[i]
                kind = Path(path).suffix[1:].lower()
                writer.write({"__key__": f"{i:08d}", kind: Path(path).read_bytes(), "cls": str(label).encode()})
        write_index(target / split, folder.classes)


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


# ---- loaders ----

def seed_worker(_):
    """numpy and random follow torch's seed of this worker, which differs between workers, ranks and epochs."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def build_loader(dataset, is_train, batch_size, workers, rank=0, ranks=1, seed=0, repeated_aug=False, pin_memory=False,
                 start_method=None):
    """Batches of (images, classes, names) for this rank. Training drops the ragged last batch; evaluation pads nothing.

    Raises ValueError for a batch that is larger than this rank's share. Iterate it once an epoch, after set_epoch.
    start_method: how workers start, where the system's own way will not do.
    """
    if isinstance(dataset, ShardedImages):
        if repeated_aug:
            raise ValueError("--repeated-aug needs single images: it does not work on tar shards")
        dataset.deal(rank, ranks, batch_size)
        sampler, share = None, len(dataset) if is_train else 1
        workers = min(workers, max(1, len(dataset.shards) // ranks))
    else:
        kind = EvalSampler if not is_train else RASampler if repeated_aug else ShuffleSampler
        sampler = kind(dataset, num_replicas=ranks, rank=rank, seed=seed)
        share = len(sampler)
    if is_train and share < batch_size:
        total = getattr(dataset, "total", None) or len(dataset)
        raise ValueError(f"the training set has {total} images, too few for one batch of {batch_size} on each of {ranks} "
                         "ranks: use a smaller --batch-size")
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory,
                      drop_last=is_train, persistent_workers=workers > 0, worker_init_fn=seed_worker,
                      multiprocessing_context=start_method if workers else None,
                      generator=torch.Generator().manual_seed(seed * 1000 + rank))


def set_epoch(loader, epoch):
    (loader.dataset if loader.sampler is None or isinstance(loader.dataset, IterableDataset) else loader.sampler).set_epoch(epoch)


if __name__ == "__main__":
    command, *paths = sys.argv[1:] or ["help"]
    paths = [Path(path) for path in paths]
    try:
        if command == "digits" and len(paths) == 1:
            if not (paths[0] / "train").is_dir():
                write_digits(paths[0])
            print(Counter(path.parts[-3] for path in sorted(paths[0].glob("*/*/*.png"))))
        elif command == "shards" and len(paths) == 2:
            write_shards(*paths)
        elif command == "index" and len(paths) == 1:
            for split in ("train", "val"):
                write_index(paths[0] / split)
        else:
            sys.exit(__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
