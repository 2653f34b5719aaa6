"""Is everybody there, and in time? Who has ended, who is late, and where: the launcher, this rank and the others."""
import contextlib
import faulthandler
import json
import math
import os
import signal
import threading
import time

from utils import tell

PARENT = os.getppid()  # noted before torch is imported, which takes seconds in which the launcher may end


def follow_launcher(leave, parent=PARENT, grace=20.0, sleep=time.sleep):
    """End this rank where torchrun, which started it, has ended without it: killed, it cannot end its ranks, which would train on unseen.

    As at SIGTERM, the update of the moment is finished and saved; after `grace` seconds this process ends however far it is, by
    leave(143). A thread looks who the parent is, as any Unix tells. It does not where a shell or a scheduler started this
    process: that may end before it. -> the thread, or None
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None

    def follow():
        while os.getppid() == parent:
            sleep(0.5)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one of a machine says it
            tell(f"error: torchrun (process {parent}) has ended before its ranks, most likely killed: they finish this update and stop")
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(grace)
        leave(143)

    thread = threading.Thread(target=follow, daemon=True, name="follow_launcher")
    thread.start()
    return thread


# What a rank does at an iteration, in this order, and then the next one. In another pass it begins again.
LOADING, STEP, READING, ADDING = "loading", "forward, backward and step", "reading losses", "adding up over the ranks"
EVALUATING = "evaluating"
EVALUATION = (EVALUATING, ADDING)
ORDER = {LOADING: 0, EVALUATING: 0, STEP: 1, READING: 2, ADDING: 3}


class Watch:
    """Says which rank is late, and where, and ends this one: `with Watch(seconds)`, in which `mark` tells what this rank does.

    seconds: without progress; 0 watches nothing. store: through which `ranks` of them tell each other where they are, a
    torch.distributed.Store of their own; None for one. leave(status) ends the process.

    A thread tells the store every `interval` seconds where this rank is. Only where it makes no progress does it read where the
    others are: no collective, and nothing while all is well. Who is the furthest behind is late, and who does not answer. What may
    well be long is only told: what comes before the first iteration of a training or an evaluation is done (it compiles), and a
    save. Time in which this process itself was stopped does not count.
    """

    def __init__(self, seconds, rank=0, ranks=1, store=None, leave=os._exit, clock=time.monotonic):
        self.seconds, self.rank, self.ranks, self.store, self.leave, self.clock = seconds, rank, ranks, store, leave, clock
        self.interval = max(0.1, min(5.0, seconds / 10))
        self.epoch, self.place, self.busy, self.warm = None, (0, -1, 0, "starting", None), None, set()
        self.known, self.since, self.lived, self.noted, self.beats, self.seen = None, 0.0, 0.0, 0.0, 0, {}
        self.now, self.over = clock(), threading.Event()

    def __enter__(self):
        self.over = threading.Event()
        if self.seconds:
            self.poll()
            threading.Thread(target=self.follow, args=(self.over,), daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_):
        self.over.set()

    def follow(self, over):
        while not over.wait(self.interval):
            self.poll()

    def mark(self, phase, step):
        """This rank begins `phase` of iteration `step`. The ranks of a run go the same way, each at its time."""
        passes, before, order, last, _ = self.place
        kind = phase in EVALUATION
        step = math.inf if phase == ADDING else step  # a rank may have fewer batches to evaluate
        if last == "starting" or kind != (last in EVALUATION) or (step, ORDER[phase]) < (before, order):
            passes += 1
        elif step > before:
            self.warm.add(kind)
        self.place = (passes, step, ORDER[phase], phase, self.epoch)

    @contextlib.contextmanager
    def saving(self):
        """Inside, this rank saves, and the others may wait for it."""
        self.busy = "saving"
        try:
            yield
        finally:
            self.busy = None

    def state(self):
        """Where this rank is, for the others."""
        passes, step, order, phase, epoch = self.place
        where = f"iteration {step} ({phase})" if 0 <= step < math.inf else phase
        patient = bool(self.busy) or (phase in EVALUATION) not in self.warm
        return {"beat": self.beats, "at": [passes, step, order], "stuck": self.lived - self.since, "patient": patient,
                "where": ("" if epoch is None else f"epoch {epoch}, ") + where + (f", {self.busy}" if self.busy else "")}

    def poll(self):
        """Tell where this rank is; where it makes no progress, look at the others, and judge."""
        now = self.clock()
        self.lived, self.now = self.lived + min(now - self.now, 2 * self.interval), now
        known = (self.place, self.busy)
        if known != self.known:
            self.known, self.since, self.seen = known, self.lived, {}
        self.beats += 1
        states = {self.rank: self.state()}
        self.ask(lambda: self.store.set(str(self.rank), json.dumps(states[self.rank])))
        stuck = self.lived - self.since
        if stuck < self.seconds / 2:
            return
        for rank in range(self.ranks):
            if rank != self.rank and self.ask(lambda key=str(rank): self.store.check([key])):
                text = self.ask(lambda key=str(rank): self.store.get(key))
                states |= {rank: json.loads(text)} if text else {}
        for rank in range(self.ranks):
            beat = states[rank]["beat"] if rank in states else None
            if rank not in self.seen or self.seen[rank][0] != beat:
                self.seen[rank] = beat, self.lived
        if stuck >= self.seconds and not self.over.is_set():
            self.judge(states, stuck)

    def ask(self, action):
        """action() with the store. None where there is none, or none any more: then a rank knows of itself only."""
        try:
            return None if self.store is None else action()
        except RuntimeError:
            self.store = None

    def judge(self, states, stuck):
        silent = [] if self.store is None else [
            rank for rank, (_, since) in self.seen.items() if rank != self.rank and self.lived - since >= 3 * self.interval]
        answering = {rank: state for rank, state in sorted(states.items()) if rank not in silent}
        least = min(state["at"] for state in answering.values())
        late = [rank for rank, state in answering.items() if state["at"] == least]
        if silent:
            speakers, late = list(answering)[:1], []
            seen = "; ".join(states[rank]["where"] if rank in states else "nothing" for rank in silent)
            text = f"{named(silent)} not answer (stopped, or gone), last seen in {seen}"
        elif min(answering[rank]["stuck"] for rank in late) < self.seconds:
            return  # who waits for them, waits for some that come
        elif patient := [rank for rank in late if answering[rank]["patient"]]:
            if self.rank == patient[0] and self.lived - self.noted >= self.seconds:
                self.noted = self.lived
                tell(f"note: rank {self.rank} is for {stuck:.0f} s in {answering[self.rank]['where']}: this may be long, so it waits")
            return
        else:
            speakers, text = late, f"{named(late)} not get on in {answering[late[0]]['where']}"
        speaks = True
        if self.rank in speakers:
            tell(f"rank {self.rank}, the stacks of its threads:")
            faulthandler.dump_traceback(2)
            speaks = self.ask(lambda: self.store.add("said", 1)) in (None, 1)  # one of them says why
        elif stuck < self.seconds + 4 * self.interval:
            return  # they say it, and torchrun ends this one
        if speaks:
            waits = "" if self.rank in late else f"; rank {self.rank} waits for it in {answering[self.rank]['where']}"
            tell(f"error: {text}{waits} (--hang-timeout {self.seconds:g})")
        self.leave(1)


def named(ranks):
    """With a verb."""
    return f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} do"
