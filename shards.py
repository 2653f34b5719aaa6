"""What do tar shards hold? Reading, indexing and writing of webdataset's KEY.jpg beside KEY.cls."""
import contextlib
import json
import random
import tarfile
from io import BytesIO
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info
from torchvision import datasets

from decode import DataError, UnreadableImage


class ShardedImages(IterableDataset):
    """webdataset tar shards whose samples are KEY.jpg (or png, jpeg, webp) and KEY.cls, a class number.

    Evaluation reads every image once: shards are dealt to ranks and their workers. Training deals an order of the shards
    that is new each epoch, shuffles in a buffer, and gives each rank the same number of batches; a worker whose shards
    hold too few images starts them again. Fewer shards than workers: all read all shards, and take turns at the images.
    """
    BUFFER = 1000  # images to shuffle among, a worker

    def __init__(self, shards, transform, is_train, seed=0):
        self.shards, self.transform, self.is_train, self.seed = shards, transform, is_train, seed
        self.numbering = None  # the output of the network for each of `classes`, where it is not the class's own number
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
        target = target if self.numbering is None else self.numbering[target]
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
