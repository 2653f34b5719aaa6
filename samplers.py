"""Which samples does this rank see, in which order? Everything follows from lengths, ranks, epoch and seed."""
import math

import torch
from torch.utils.data import Sampler


class RankSampler(Sampler):
    """What the samplers share: a length, this rank among `num_replicas`, and the epoch."""

    def __init__(self, dataset, num_replicas, rank, seed=0):
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not one of {num_replicas} ranks")
        self.total, self.num_replicas, self.rank = len(dataset), num_replicas, rank
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def permutation(self):
        """All indices in this epoch's order, the same on every rank."""
        return torch.randperm(self.total, generator=torch.Generator().manual_seed(self.seed + self.epoch))


class ShuffleSampler(RankSampler):
    """Every rank takes every num_replicas-th index of the epoch's permutation; the front fills up the last round.

    The indices are torch.utils.data.DistributedSampler's.
    """

    def __len__(self):
        return math.ceil(self.total / self.num_replicas)

    def __iter__(self):
        order = self.permutation().tolist()
        return iter([order[i % self.total] for i in range(self.rank, len(self) * self.num_replicas, self.num_replicas)])


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

    def __iter__(self):
        order = self.permutation() if self.shuffle else torch.arange(self.total)
        repeated = order.repeat_interleave(self.num_repeats).tolist()
        return iter([repeated[(self.rank + i * self.num_replicas) % len(repeated)] for i in range(len(self))])


class EvalSampler(RankSampler):
    """Every index exactly once over all ranks, in order: a rank may get one less than another, or none."""

    def __len__(self):
        return len(range(self.rank, self.total, self.num_replicas))

    def __iter__(self):
        return iter(range(self.rank, self.total, self.num_replicas))
