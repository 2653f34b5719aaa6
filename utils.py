"""What do people read while it runs? Log lines, the fps they show, a progress bar, and the JSON log."""
import contextlib
import itertools
import json
import os
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

WARMUP_STEPS = 5  # steps of an epoch that fps leaves out: compilers, caches and loader workers start up in them


def shown(name):
    """A file's or a class's name within a line: what would end the line, move the cursor or not be printed is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


class MetricLogger:
    """Follows a loop: yields its batches, and times the windows between two readings of the device.

    A window ends where `window_ends(step)`: at step 0, every print_freq steps, after the warm-up and at the last. There the
    caller waits for the device once and calls `line`. fps is images of all ranks a second since the window began; `fps()`
    is the epoch's without WARMUP_STEPS. On a terminal a bar replaces the lines. quiet: neither (all ranks but the first).
    """

    def __init__(self, header, total, images_a_step, print_freq=10, quiet=False, clock=time.perf_counter):
        self.header, self.total, self.images, self.print_freq = header, total, images_a_step, max(1, print_freq)
        self.quiet, self.clock = quiet, clock
        self.bar = None
        if not quiet and sys.stdout.isatty() and shutil.get_terminal_size((0, 0)).columns:
            from tqdm import tqdm  # here: the doctor speaks where nothing is installed
            self.bar = tqdm(total=total, desc=header, unit="it", dynamic_ncols=True, file=sys.stdout)
        self.sums, self.counts = {}, {}

    def window_ends(self, step):
        return step % self.print_freq == 0 or step in (self.marks[0][0] + WARMUP_STEPS, self.total - 1)

    def follow(self, batches, limit=None, first=0, **sums):
        """Yield (step, batch) for the steps from `first` on, and below `limit`. sums: name=(sum, count) of the steps before."""
        self.start = asked = self.clock()
        self.marks, self.data_time, self.last_step = [(first - 1, self.start)], 0.0, first - 1
        for name, (total, count) in sums.items():
            self.sums[name], self.counts[name] = total, count
        if self.bar:
            self.bar.update(first)
        try:
            for step, batch in zip(itertools.count(first) if limit is None else range(first, limit), batches):
                self.data_time += self.clock() - asked
                self.last_step = step
                yield step, batch
                asked = self.clock()
        finally:
            if self.bar:
                self.bar.close()

    def average(self, name):
        return self.sums[name] / max(1, self.counts[name])

    def add(self, **meters):
        """Note meters: name=(sum over some steps, count)."""
        for name, (total, count) in meters.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + count

    def line(self, step, lr=None, memory=None, norms=(), **meters):
        """Show a window that ended with `step`. norms: of its last update, gradient and step; meters: name=(sum over the window, count)."""
        self.add(**meters)
        (before, then), now = self.marks[-1], self.clock()
        self.marks.append((step, now))
        steps = step - before
        seconds, data, self.data_time = (now - then) / steps, self.data_time / steps, 0.0
        fps = self.images / max(seconds, 1e-9)
        if self.quiet:
            return
        values = {name: f"{total / max(1, count):.4f} ({self.average(name):.4f})" for name, (total, count) in meters.items()}
        if self.bar:
            self.bar.update(step + 1 - self.bar.n)
            self.bar.set_postfix({"lr": f"{lr:.2e}", "fps": f"{fps:.1f}", **values} if lr is not None else {"fps": f"{fps:.1f}"})
            return
        total = max(self.total, step + 1)  # a loop may turn out longer than was said
        eta = timedelta(seconds=int(seconds * (total - step - 1)))
        parts = [f"{self.header}  [{step:>{len(str(total))}}/{total}]", f"eta: {eta}"]
        parts += [f"lr: {lr:.6g}"] if lr is not None else []
        parts += [f"{name}: {value}" for name, value in values.items()]
        parts += [f"time: {seconds:.4f}", f"fps:{fps:.2f}", f"data: {data:.4f}"]
        parts += [f"max mem: {memory:.0f}"] if memory is not None else []
        parts += [f"{name} norm: {norm:.4g}" for name, norm in zip(("grad", "update"), norms)]
        print("  ".join(parts), flush=True)

    def fps(self):
        """Images of all ranks a second over the epoch, without the warm-up where the epoch is longer than that."""
        marks = self.marks
        warm = marks[0][0] + WARMUP_STEPS
        first = next((mark for mark in marks[:-1] if mark[0] >= warm), marks[1] if len(marks) > 2 else marks[0])
        (start, then), (end, now) = first, marks[-1]
        return (end - start) * self.images / max(now - then, 1e-9) if end > start else 0.0

    def summary(self):
        """The closing line of the loop."""
        seconds = self.marks[-1][1] - self.start
        steps = self.last_step - self.marks[0][0]
        if not self.quiet:
            print(f"{self.header} Total time: {timedelta(seconds=int(seconds))} ({seconds / max(1, steps):.4f} s / it)  "
                  f"fps:{self.fps():.2f}", flush=True)


class Output:
    """A stream whose end ends nothing: what cannot be written (its reader has ended, its disk is full) is left out.

    The first time `say` is told, if there is one. Everything else is the stream's own.
    """

    def __init__(self, stream, say=None):
        self.stream, self.say = stream, say

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def attempt(self, action):
        try:
            action()
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # for ever, so what is buffered need not be tried again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            say, self.say = self.say, None
            if say:
                say(f"note: the output cannot be written any more ({error.strerror}): this goes on without")

    def write(self, text):
        self.attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)


def open_output():
    """Standard output and standard error that end no run: where one is closed, its reader has ended or its disk is full, and
    where names of files and classes hold characters that its encoding lacks (they are escaped)."""
    while (file := os.open(os.devnull, os.O_RDWR)) < 3:  # a closed one: the next file that is opened would take its place
        pass
    os.close(file)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  it stays open
        if isinstance(stream, Output):
            continue
        if hasattr(stream, "reconfigure"):
            # a line is one write: with PYTHONUNBUFFERED its end is a second one, and another rank's line may come between
            stream.reconfigure(errors="backslashreplace", line_buffering=True, write_through=False)
        setattr(sys, name, Output(stream, say=(lambda text: print(text, file=sys.stderr, flush=True)) if name == "stdout" else None))


@contextlib.contextmanager
def replacing(path):
    """A file that is open for writing, and gets the name `path` once it is whole and on the disk.

    Until then its name is of this process alone: two that write at once end with the file of one of them, not with a mixture.
    """
    path = Path(path)
    made = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(made, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
        with contextlib.suppress(OSError):  # not every file system knows it of a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # or an older one may be gone, after a loss of power, and this one not there
            finally:
                os.close(folder)
    finally:
        made.unlink(missing_ok=True)


def tell(text):
    """A line on standard error from a signal handler or a thread: by no stream, which may be in the middle of another line."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def append_json(path, row):
    """One epoch, one line, on the disk before the checkpoint that counts on it. Whole, or not at all: then OSError."""
    line = json.dumps(row).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line):]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def log_rows(path):
    """The lines of a log.txt, as bytes, each with its row: a dict with an epoch, None for a line that is torn or no row."""
    found = []
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line.decode("utf-8-sig"))  # bytes would be guessed to be UTF-16
        except (ValueError, RecursionError):
            row = None
        good = isinstance(row, dict) and type(row.get("epoch")) is int and 0 <= row["epoch"] < 10**6
        found.append((line, row if good else None))
    return found


def keep_epochs_before(path, epoch):
    """Drop the rows of `epoch` and later, and a half-written last line: a resumed run writes them again. Other lines stay."""
    path = Path(path)
    if not path.exists():
        return
    lines = log_rows(path)
    kept = [line for i, (line, row) in enumerate(lines) if (row["epoch"] < epoch if row else i + 1 < len(lines))]
    with replacing(path) as file:
        file.writelines(line + b"\n" for line in kept)
