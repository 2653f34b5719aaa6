"""Which images could not be read, and when are they too many?"""
import torch.distributed as dist

from decode import DataError
from utils import shown


class TooManyUnreadable(DataError):
    """More images cannot be read than was allowed. All ranks raise it alike."""


def over_ranks(met):
    """[(index, name, reason)] of all ranks, rank after rank. Every rank must call this."""
    if not (dist.is_available() and dist.is_initialized()):
        return met
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, met)
    return [one for some in found for one in some]


def some(met, most=3):
    """A few of them, for a message."""
    text = ", ".join(f"{shown(name)} ({reason})" for _, name, reason in met[:most])
    return text + (f" and {len(met) - most} more" if len(met) > most else "")


class Unreadable:
    """What of a training set cannot be read, counted on all ranks alike: each image once, however often it is met.

    images: of the set. fraction: of them that may be so. known: a set of indices, which grows. record(rows): writes rows {path, reason,
    epoch}, of the epoch that met the image first. record and say: of the first rank.
    """

    def __init__(self, images, fraction, known, record, say):
        self.images, self.fraction, self.known, self.record, self.say = images, fraction, known, record, say

    def __call__(self, epoch, met):
        """met: [(index, name, reason)] on this rank since the last call. All ranks call it. Raises TooManyUnreadable."""
        new = {one[0]: one for one in over_ranks(met) if one[0] not in self.known}
        if not new:
            return
        self.known.update(new)
        new = [new[index] for index in sorted(new)]
        self.record([{"path": str(name), "reason": reason, "epoch": epoch} for _, name, reason in new])
        if len(self.known) / self.images > self.fraction:
            raise TooManyUnreadable(
                f"{len(self.known):,} of {self.images:,} training images cannot be read, more than --max-bad-fraction "
                f"{self.fraction:g} allows, now {some(new)}: replace them or remove them (data_errors.jsonl in --output_dir lists "
                "them), or raise the fraction")
        self.say(f"note: {len(new)} training images cannot be read, and others of their classes take their place: {some(new)}; "
                 f"{len(self.known):,} of {self.images:,} so far")
