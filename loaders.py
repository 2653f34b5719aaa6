"""How do batches reach the training? Samplers, worker processes, and what is drawn at random for an image."""
import contextlib
import os
import random
import signal
import tempfile
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from decode import UNREADABLE, DataError, UnreadableImage
from pauses import SIGNALS
from samplers import IMAGE, BalancedSampler, EvalSampler, RASampler, RunSampler, ShuffleSampler, TrainingBatches, seed_of
from shards import ShardedImages
from utils import shown


def leave_signals_to_the_parent(_):
    """What a terminal or a scheduler sends to the whole group: a worker goes on while the parent ends its update, and ends with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class DrawnImages(Dataset):
    """A training set asked by draws (epoch, index, copy): the augmentation of an image follows from seed and draw alone.

    replaces: where an image cannot be read, another of its class takes its place, which follows from them, too. A sample then has a
    fourth value: [(index, name, reason)] of what could not be read for it.
    """

    def __init__(self, images, seed, replaces=False):
        self.images, self.seed, self.replaces = images, seed, replaces

    def __len__(self):
        return len(self.images)

    def __getitem__(self, draw, read=None):
        epoch, index, copy = draw
        seed = seed_of(IMAGE, self.seed, epoch, index, copy)
        return self.replaced(index, seed, read) if self.replaces else self.drawn(index, seed, read)

    def __getitems__(self, draws):
        readers = [None] * len(draws)
        if hasattr(self.images, "readers"):  # neighbours in a shard are one read
            with contextlib.suppress(UnreadableImage):  # then each by itself, which says which one
                readers = self.images.readers([index for _, index, _ in draws])
        return [self.__getitem__(*pair) for pair in zip(draws, readers)]

    def drawn(self, index, seed, read=None):
        """read: a function that gives the image, in place of asking the data set for it."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which turns to devices that a worker must not touch
        return read() if read else self.images[index]

    def replaced(self, index, seed, read=None):
        met = []
        for candidate in self.candidates(index, seed):
            try:
                return *self.drawn(candidate, seed, read if candidate == index else None), met
            except UnreadableImage as error:
                met.append((candidate, self.images.name(candidate), error.why))
        raise DataError(f"cannot read the image {shown(met[0][1])} ({met[0][2]}), nor any other of its class ({len(met)} images): replace "
                        "them or remove them")

    def candidates(self, index, seed):
        """`index`, and the others of its class in an order that follows from the seed."""
        yield index
        alike = np.flatnonzero(self.images.targets == self.images.targets[index])
        yield from np.random.default_rng(seed).permutation(alike[alike != index]).tolist()


class EvaluatedImages(Dataset):
    """A validation set that leaves no image out: where one cannot be read, a blank of class UNREADABLE stands for it, and the fourth
    value of the sample says [(index, name, reason)]."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        try:
            return *self.images[index], []
        except UnreadableImage as error:
            return self.images.transform(Image.new("RGB", (256, 256))), UNREADABLE, index, [(index, self.images.name(index), error.why)]

    def __getitems__(self, indices):
        if hasattr(self.images, "__getitems__"):  # neighbours in a shard are one read
            with contextlib.suppress(UnreadableImage):
                return [(*sample, []) for sample in self.images.__getitems__(indices)]
        return [self[index] for index in indices]


def collate_met(samples):
    """A batch of samples of four values -> images, classes, indices, and what was met in all of them."""
    return [*default_collate([sample[:3] for sample in samples]), [met for *_, some in samples for met in some]]


def images_of(loader):
    """The data set of a loader, without what the loader itself put around it."""
    return loader.dataset.images if isinstance(loader.dataset, (DrawnImages, EvaluatedImages)) else loader.dataset


def check_sockets(longest=71):
    """ValueError where workers could not hand over a batch: it comes through a socket in the folder for temporary files, whose
    path has few characters: 103 on macOS, with multiprocessing's own 32. The training would wait for ever."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ValueError("there is no folder for temporary files, which loader workers need: set TMPDIR to one that can be written, or "
                         "--num_workers 0") from error
    if len(os.fsencode(folder)) > longest:
        raise ValueError(f"TMPDIR is {folder}, too long a path for the sockets of loader workers: set it to one of at most {longest} "
                         "characters, such as /tmp, or --num_workers 0")


def build_loader(dataset, is_train, batch_size, workers, rank=0, ranks=1, seed=0, repeated_aug=False, pin_memory=False,
                 start_method=None, accum_steps=1, goes_on=False, balanced=False):
    """Batches of (images, classes, names) for this rank. Training is whole updates of ranks * accum_steps batches; evaluation pads
    nothing.

    Raises ValueError where the data are too few for one update. Iterate it once an epoch, after set_epoch.
    start_method: how workers start, where the system's own way will not do. goes_on: an image that cannot be read is no error; a batch
    says with a fourth value what was met. balanced: all classes are drawn equally often.
    """
    if workers:
        check_sockets()
    common = dict(num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0, worker_init_fn=leave_signals_to_the_parent,
                  multiprocessing_context=start_method if workers else None, collate_fn=collate_met if goes_on else None)
    if not is_train:
        return DataLoader(EvaluatedImages(dataset) if goes_on else dataset, batch_size=batch_size,
                          sampler=EvalSampler(dataset, num_replicas=ranks, rank=rank, seed=seed), **common)
    if balanced:
        sampler = partial(BalancedSampler, dataset, seed=seed)
    elif repeated_aug:
        sampler = partial(RASampler, dataset, seed=seed)
    elif isinstance(dataset, ShardedImages):
        sampler = partial(RunSampler, dataset, seed=seed, batch_size=batch_size)
    else:
        sampler = partial(ShuffleSampler, dataset, seed=seed)
    batches = TrainingBatches(sampler, batch_size, rank, ranks, accum_steps)
    if not len(batches):
        update = f" and --accum-steps {accum_steps}" if accum_steps > 1 else ""
        raise ValueError(f"the training set has {len(dataset)} images, too few for one batch of {batch_size} on each of {ranks} "
                         f"ranks{update}: use a smaller --batch-size")
    return DataLoader(DrawnImages(dataset, seed, goes_on), batch_sampler=batches, **common)


def batch_again(loader, step):
    """The batch of a step of the epoch once more, in this process."""
    draws, = loader.batch_sampler.of([step])
    return loader.collate_fn([loader.dataset[draw] for draw in draws])


def set_epoch(loader, epoch, start=0):
    """start: batches of this rank that are done already."""
    loader.batch_sampler.set_epoch(epoch, start)
