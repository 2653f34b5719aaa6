"""Which samples does this rank see, in which order, from which update on? Everything follows from lengths, ranks, epoch and seed.

A draw is (epoch, index, copy): which image, and which of its appearances in that epoch. What is drawn at random for an image is
a function of the seed and its draw (loaders), so that workers, ranks and restarts change nothing.
"""
import math

import numpy as np
import torch
from torch.utils.data import Sampler

# What is drawn at random for: an image has no draws of a batch's, where their numbers happen to be the same
IMAGE, PART = 0, 1


def seed_of(*words):
    """A number of 63 bits that follows from whole numbers, as independent of that of other words as if it were drawn.

    The first word is IMAGE or PART. Their number must be the same for all of a kind: NumPy takes missing ones for zeros.
    """
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


class RankSampler(Sampler):
    """What the samplers share: a length, this rank among `num_replicas`, and the epoch."""

    def __init__(self, dataset, num_replicas, rank, seed=0):
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not one of {num_replicas} ranks")
        self.total, self.num_replicas, self.rank = len(dataset), num_replicas, rank
        self.run, self.bounds = getattr(dataset, "run", 1), getattr(dataset, "bounds", None)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def draws(self):
        """-> indices (len(self),), copies (len(self),): tensors of this rank's share of the epoch"""
        raise NotImplementedError

    def __iter__(self):
        return iter(self.draws()[0].tolist())

    def permutation(self):
        """All indices in this epoch's order, the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.total, generator=generator)
        return order if self.run == 1 else self.in_runs(order, generator)

    def in_runs(self, order, generator):
        """`order` so that runs of `run` neighbours of a shard, each shuffled, stand together; where runs begin is drawn anew."""
        shift = int(torch.randint(self.run, (), generator=generator))
        starts = np.cumsum([0, *((np.diff(self.bounds) + shift + self.run - 1) // self.run)])  # each shard's first run
        images = order.numpy()
        shard = np.searchsorted(self.bounds, images, side="right") - 1
        runs = starts[shard] + (images - self.bounds[shard] + shift) // self.run
        place = torch.randperm(int(starts[-1]), generator=generator).numpy()
        return torch.from_numpy(images[np.argsort(place[runs], kind="stable")])


class ShuffleSampler(RankSampler):
    """Every rank takes every num_replicas-th index of the epoch's permutation; the front fills up the last round.

    The indices are torch.utils.data.DistributedSampler's.
    """

    def __len__(self):
        return math.ceil(self.total / self.num_replicas)

    def draws(self):
        places = torch.arange(self.rank, len(self) * self.num_replicas, self.num_replicas)
        return self.permutation()[places % self.total], places // self.total


class RASampler(RankSampler):
    """Repeated augmentation (arXiv 1902.05509), as DeiT samples it: copies of an image go to neighbouring ranks.

    Each index stands `num_repeats` times in a row in the epoch's order, the ranks take turns, and each stops after
    its share of one pass over the data: total // 256 * 256 / ranks, or total / ranks in a set under 256 images. With
    seed 0 the indices are timm's RepeatAugSampler's.
    """

    def __init__(self, dataset, num_replicas=1, rank=0, shuffle=True, num_repeats=3, seed=0):
        super().__init__(dataset, num_replicas, rank, seed)
        self.shuffle, self.num_repeats = shuffle, num_repeats

    def __len__(self):
        if self.total < 256:
            return math.ceil(self.total / self.num_replicas)
        return self.total // 256 * 256 // self.num_replicas

    def draws(self):
        order = self.permutation() if self.shuffle else torch.arange(self.total)
        places = self.rank + torch.arange(len(self)) * self.num_replicas
        rounds, places = places // (self.total * self.num_repeats), places % (self.total * self.num_repeats)
        return order[places // self.num_repeats], rounds * self.num_repeats + places % self.num_repeats


class BalancedSampler(RankSampler):
    """As many draws an epoch as there are images, and of each class equally many; what is left over goes to classes that are drawn.

    Of a class each image is drawn before one is drawn again. Its copies are told apart, as repeated augmentation's: each is augmented
    by itself. dataset.targets: the class of each image.
    """

    def __init__(self, dataset, num_replicas, rank, seed=0):
        super().__init__(dataset, num_replicas, rank, seed)
        targets = np.asarray(dataset.targets)
        order = np.argsort(targets, kind="stable")
        self.of_class = np.split(order, np.flatnonzero(np.diff(targets[order])) + 1)

    def __len__(self):
        return math.ceil(self.total / self.num_replicas)

    def draws(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shares = np.full(len(self.of_class), self.total // len(self.of_class))
        shares[torch.randperm(len(shares), generator=generator).numpy()[:self.total % len(shares)]] += 1
        indices, copies = [], []
        for images, share in zip(self.of_class, shares):
            rounds = np.arange(math.ceil(share / len(images)))
            drawn = [images[torch.randperm(len(images), generator=generator).numpy()] for _ in rounds]
            indices.append(np.concatenate(drawn)[:share])
            copies.append(np.repeat(rounds, len(images))[:share])
        order = torch.randperm(self.total, generator=generator)
        places = torch.arange(self.rank, len(self) * self.num_replicas, self.num_replicas)
        mine = order[places % self.total]
        copies = torch.from_numpy(np.concatenate(copies))
        return torch.from_numpy(np.concatenate(indices))[mine], copies[mine] + places // self.total * (int(copies.max()) + 1)


class RunSampler(RankSampler):
    """For shards: each image once an epoch on any number of ranks, but for the last, ragged batch of all ranks together.

    The epoch's order is cut into batches of `batch_size`, which the ranks take in turns, so that the images of a run of neighbours
    come into one batch and are one read. Which images the ranks see at a step together follows from seed, epoch and the size of
    their batch together. A run is as long as the classes of neighbours differ (shards.run_length), at most 8 images; runs are
    shuffled over the whole set, so a batch of 128 comes from 16 places or more.
    """

    def __init__(self, dataset, num_replicas=1, rank=0, seed=0, batch_size=1):
        super().__init__(dataset, num_replicas, rank, seed)
        self.batch_size = batch_size

    def __len__(self):
        return self.total // (self.batch_size * self.num_replicas) * self.batch_size

    def draws(self):
        order = self.permutation()[:len(self) * self.num_replicas]
        mine = order.view(-1, self.num_replicas, self.batch_size)[:, self.rank].flatten()
        return mine, torch.zeros_like(mine)


class EvalSampler(RankSampler):
    """Every index exactly once over all ranks, in order and in one piece each: a rank may get one less than another, or none."""

    def part(self):
        return range(self.total * self.rank // self.num_replicas, self.total * (self.rank + 1) // self.num_replicas)

    def __len__(self):
        return len(self.part())

    def __iter__(self):
        return iter(self.part())


class TrainingBatches(Sampler):
    """The batches of this rank in an epoch, lists of draws; a batch has `batch_size` of them.

    An update is made of ranks * accum_steps parts of a batch each. The parts, not the ranks, share the epoch: rank r computes
    the parts r, r + ranks, r + 2 ranks, ... of each update, so that 4 ranks, 2 that accumulate 2 batches and one that
    accumulates 4 compute the same parts. sampler(num_replicas=, rank=) makes the RankSampler of one part. An epoch is as
    many whole updates as the data fill.
    """

    def __init__(self, sampler, batch_size, rank=0, ranks=1, accum_steps=1):
        self.parts = [sampler(num_replicas=ranks * accum_steps, rank=rank + i * ranks) for i in range(accum_steps)]
        self.batch_size, self.epoch, self.start = batch_size, 0, 0

    def set_epoch(self, epoch, start=0):
        """start: the number of batches of this rank that are done already."""
        self.epoch, self.start = epoch, start
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self):
        return len(self.parts[0]) // self.batch_size * len(self.parts)

    def of(self, steps):
        """The batches of some steps of the epoch."""
        size, epoch, draws = self.batch_size, self.epoch, [part.draws() for part in self.parts]
        for step in steps:
            update, part = divmod(step, len(self.parts))
            indices, copies = (values[update * size:(update + 1) * size].tolist() for values in draws[part])
            yield [(epoch, index, copy) for index, copy in zip(indices, copies)]

    def __iter__(self):
        return self.of(range(self.start, len(self)))
