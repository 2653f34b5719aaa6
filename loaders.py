"""How do batches reach the training? Samplers, worker processes and their seeds."""
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from samplers import EvalSampler, RASampler, ShuffleSampler
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
