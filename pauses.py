"""When does a training save, or stop, between two epochs? Every so often, and when it is asked to: all ranks at the same update."""
import contextlib
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from utils import tell

# Ctrl-C, what schedulers send before they end a job, and what Slurm can be asked to send
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
SAVE, STOP = "save", "stop"


class Pauses:
    """Asked once after each update by every rank, it says to all of them the same: SAVE, STOP or None.

    every_updates, every_minutes: between two saves; 0 for never. world_size: ranks that must agree. They tell each other of what
    was asked while the next update is computed, so nobody waits, and a signal or a minute has its effect one update later.
    """

    def __init__(self, every_updates=0, every_minutes=0.0, world_size=1, rank=0, clock=time.monotonic):
        self.every_updates, self.every_seconds, self.world_size, self.rank = every_updates, 60 * every_minutes, world_size, rank
        self.clock, self.signal, self.told, self.since = clock, None, None, 0
        self.began = clock()

    @contextlib.contextmanager
    def listening(self):
        """Inside, a signal asks for a stop, and a second one ends the process at once."""
        before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number, _):
        if self.signal is None:
            self.signal, self.at = signal.Signals(number), self.clock()
            tell(f"{self.signal.name}: this update is finished and saved; a second signal ends the run at once")
        elif self.clock() - self.at > 1:  # one Ctrl-C reaches a rank twice, from the terminal and from torchrun
            os._exit(128 + number)

    def stopped(self):
        """Whether this rank was asked to stop."""
        return self.signal is not None

    def saved(self):
        self.since, self.began = 0, self.clock()

    def __call__(self):
        self.since += 1
        late = bool(self.every_seconds) and self.rank == 0 and self.clock() - self.began >= self.every_seconds
        stop, save = self.agree(self.stopped(), late)
        if stop:
            return STOP
        due = bool(self.every_updates) and self.since >= self.every_updates
        return SAVE if due or (save and self.since > 1) else None  # at 1 it is what was asked before the last save

    def agree(self, stop, save):
        """What the ranks together asked at the update before; on one rank what it asks now."""
        if self.world_size == 1:
            return stop, save
        before, asked = self.told, torch.tensor([stop, save], dtype=torch.int32)
        self.told = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, async_op=True)
        return self.read(before)

    def read(self, told):
        if told is None:
            return False, False
        told[1].wait()
        return tuple(map(bool, told[0].tolist()))

    def last(self):
        """Whether the ranks were asked to stop at the last update of an epoch. All of them call this."""
        told, self.told = self.told, None
        return self.read(told)[0] if self.world_size > 1 else self.stopped()


def leave(status, children=()):
    """End this process now: after an error other ranks may wait for it in a collective, which no orderly end would outlive."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more
            pass
    for child in children:
        child.kill()
    os._exit(status)
