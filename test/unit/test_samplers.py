"""Which rank sees which sample: timm's and torch's samplers are the oracle."""
from collections import Counter

import pytest
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler

from samplers import IMAGE, PART, EvalSampler, RASampler, ShuffleSampler, seed_of

LENGTHS = (1, 2, 5, 11, 24, 255, 256, 257, 700, 1000)
RANKS = (1, 2, 3, 5, 8)


def indices(kind, length, ranks, rank, epoch=0, **settings):
    sampler = kind(range(length), num_replicas=ranks, rank=rank, **settings)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


# ---- repeated augmentation ----

@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_repeated_augmentation_is_timms(length, ranks):
    """timm's sampler holds DeiT's; it knows no seed, so its epoch is our seed + epoch."""
    for rank in range(ranks):
        for seed, epoch in ((0, 0), (0, 1), (0, 299), (7, 3)):
            assert indices(RASampler, length, ranks, rank, epoch, seed=seed) == indices(
                RepeatAugSampler, length, ranks, rank, seed + epoch)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_other_repeats_and_no_shuffling_are_timms(repeats):
    for ranks in RANKS:
        for rank in range(ranks):
            for shuffle in (True, False):
                settings = dict(num_repeats=repeats, shuffle=shuffle)
                assert indices(RASampler, 700, ranks, rank, 2, **settings) == indices(
                    RepeatAugSampler, 700, ranks, rank, 2, **settings)


def test_copies_go_to_different_ranks():
    """Three ranks see the same images, each one copy of them."""
    a, b, c = (indices(RASampler, 768, 3, rank) for rank in range(3))
    assert a == b == c
    assert len(set(a)) == len(a) == 256


@pytest.mark.parametrize("length", [1, 3, 24, 255])
def test_small_sets_are_sampled(length):
    """Under 256 images an epoch is still one pass long."""
    assert len(indices(RASampler, length, 1, 0)) == length
    assert len(indices(RASampler, length, 2, 1)) == -(-length // 2)


# ---- shuffling ----

@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ranks", RANKS)
def test_shuffling_is_torchs(length, ranks):
    for rank in range(ranks):
        for seed, epoch in ((0, 0), (0, 5), (3, 2)):
            assert indices(ShuffleSampler, length, ranks, rank, epoch, seed=seed) == indices(
                DistributedSampler, length, ranks, rank, epoch, seed=seed, shuffle=True)


@pytest.mark.parametrize("kind", [ShuffleSampler, RASampler])
def test_order_follows_seed_and_epoch(kind):
    def order(seed, epoch):
        return indices(kind, 300, 2, 1, epoch, seed=seed)
    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(5, 1)


def test_an_epoch_shows_every_image():
    seen = Counter(i for rank in range(3) for i in indices(ShuffleSampler, 100, 3, rank))
    assert set(seen) == set(range(100))
    assert sum(seen.values()) == 102, "two images twice, so that the ranks have equally many"


# ---- evaluation ----

@pytest.mark.parametrize("length", [0, *LENGTHS])
@pytest.mark.parametrize("ranks", RANKS)
def test_evaluation_covers_every_index_once(length, ranks):
    """Also where there are fewer images than ranks; shares differ by one at most."""
    parts = [indices(EvalSampler, length, ranks, rank) for rank in range(ranks)]
    assert sorted(i for part in parts for i in part) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(part == sorted(part) for part in parts)


@pytest.mark.parametrize("kind", [EvalSampler, RASampler, ShuffleSampler])
@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none(kind, rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not one of 2 ranks"):
        kind(range(10), num_replicas=2, rank=rank)


# ---- seeds ----

def test_no_two_places_share_a_seed():
    """Neither two images, epochs, copies or seeds, nor an image and a part of an update of the same numbers."""
    words = [(kind, seed, epoch, number, part) for kind in (IMAGE, PART) for seed in (0, 1, 2**32 - 1) for epoch in range(4)
             for number in range(200) for part in range(3)]
    seeds = [seed_of(*one) for one in words]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**63
