"""How do batches reach the training? Samplers, worker processes and their seeds."""
import random

import numpy as np
import torch
from torch.utils.data import DataLoader

from samplers import EvalSampler, RASampler, RunSampler, ShuffleSampler
from shards import ShardedImages


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
    common = dict(num_replicas=ranks, rank=rank, seed=seed)
    if not is_train:
        sampler = EvalSampler(dataset, **common)
    elif repeated_aug:
        sampler = RASampler(dataset, **common)
    elif isinstance(dataset, ShardedImages):
        sampler = RunSampler(dataset, **common, batch_size=batch_size)
    else:
        sampler = ShuffleSampler(dataset, **common)
    if is_train and len(sampler) < batch_size:
        raise ValueError(f"the training set has {len(dataset)} images, too few for one batch of {batch_size} on each of {ranks} "
                         "ranks: use a smaller --batch-size")
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_memory,
                      drop_last=is_train, persistent_workers=workers > 0, worker_init_fn=seed_worker,
                      multiprocessing_context=start_method if workers else None,
                      generator=torch.Generator().manual_seed(seed * 1000 + rank))


def set_epoch(loader, epoch):
    loader.sampler.set_epoch(epoch)
