"""Who writes into the folder of a run, and when? One run at a time, in a thread beside the training."""
import contextlib
import os
import threading
from pathlib import Path

import checkpoint
import utils
from lock import Lock

# What a save may write, in this order: a crash before the last one repeats an epoch, and never loses a row or the best.
ROLES = ("best", "milestone", "kept", "last")


class SaveFailed(RuntimeError):
    """The training has ended, and its end is not on the disk."""


class Keeper:
    """The folder of one run, which nobody else writes into while it lasts: `with Keeper(folder) as keeper`.

    keep: of so many epochs the checkpoints stay beside the last and the best one. milestones: of every so many epochs one stays
    for ever. 0: none.

    `save` returns when the checkpoint is copied on the host. A thread writes it, one at a time. One that is saved meanwhile waits,
    and a newer one takes its place: it has all that the older one had, and whoever trains does not wait for a slow disk. Rows, the
    best and the epochs that are to stay are not dropped so. What fails is said once by `save`, and tried again with the next one.
    """

    def __init__(self, folder, say=print, keep=0, milestones=0):
        self.folder, self.say, self.keep, self.milestones, self.lock = Path(folder), say, keep, milestones, Lock(folder)
        self.rows, self.files = [], {}  # what is not on the disk: (file, row) of log.txt and others, {role: (name, content)}
        self.unread = set()  # paths in data_errors.jsonl
        self.mutex, self.thread, self.writing = threading.Lock(), None, False
        self.failure, self.unsaid, self.crash = None, None, None
        os.register_at_fork(before=self.wait)  # a child would inherit what the thread has locked, for ever

    def open(self, make=False):
        """Lock the folder, if it is there, or `make` it. Raises ValueError where it cannot be written, or is another run's."""
        try:
            if make:
                self.folder.mkdir(parents=True, exist_ok=True)
            if self.folder.is_dir() and not self.lock.held and (note := self.lock.take()):
                self.say(f"note: {note}")
        except OSError as error:
            raise ValueError(f"--output_dir {self.folder} cannot be written ({error.strerror}): choose another folder") from error

    def prepare(self, resumed=None, auto=False):
        """checkpoint.prepare_folder, locked. What killed runs left half-written goes."""
        self.open(make=True)
        for path in (*self.folder.glob(".checkpoint*.tmp"), *self.folder.glob(".log.txt.*.tmp")):
            path.unlink(missing_ok=True)
        moved, errors = checkpoint.prepare_folder(self.folder, resumed, auto), self.folder / "data_errors.jsonl"
        try:
            utils.keep_epochs_before(errors, 10**6)
            # what this run has met, and after its checkpoint may meet again
            self.unread = {row.get("path") for _, row in (utils.log_rows(errors) if errors.exists() else ()) if row}
        except OSError as error:
            raise ValueError(f"{errors} cannot be written ({error.strerror}): choose another --output_dir") from error
        return moved

    def save(self, content, row=None, improved=False, done=None):
        """Save a run's state, whose tensors may change afterwards, as the last checkpoint.

        row: of log.txt. improved: it is the best, too. done: the epoch that is complete with it, None within one.
        """
        if self.files.keys() & {"kept", "milestone"}:
            self.wait()
        content, names = checkpoint.to_host(content), {"last": checkpoint.LAST, **({"best": checkpoint.BEST} if improved else {})}
        if done is not None and self.milestones and (done + 1) % self.milestones == 0:
            names["milestone"] = f"checkpoint_{done:04d}_milestone.pth"
        elif done is not None and self.keep:
            names["kept"] = f"checkpoint_{done:04d}.pth"
        self.report()
        with self.mutex:
            self.rows += [(self.folder / "log.txt", row)] if row else []
            self.files |= {role: (name, content) for role, name in names.items()}
        self.start()

    def record(self, rows):
        """Write rows of data_errors.jsonl, each path once."""
        with self.mutex:
            self.rows += [(self.folder / "data_errors.jsonl", row) for row in rows if row["path"] not in self.unread]
        self.unread |= {row["path"] for row in rows}
        self.start()

    def start(self):
        with self.mutex:
            if not self.writing and (self.rows or self.files):
                self.writing, self.thread = True, threading.Thread(target=self.work)
                self.thread.start()

    def work(self):
        """Of the thread: write what there is, until there is nothing more or it fails."""
        try:
            while self.writing:
                with self.mutex:
                    rows, files, self.rows, self.files = self.rows, self.files, [], {}
                failure = self.write(rows, files)
                with self.mutex:
                    newer = bool(self.rows or self.files)
                    self.rows, self.files = rows + self.rows, files | self.files
                    self.failure, self.unsaid = failure, failure or self.unsaid
                    self.writing = newer
        except BaseException as error:
            self.crash, self.writing = error, False

    def write(self, rows, files):
        """Take from `rows` and `files` what is then on the disk. -> why not all of it, or None"""
        failure, written = None, {}
        try:
            if not self.lock.held:  # the folder has vanished
                self.open(make=True)
        except ValueError as error:
            return str(error)
        try:
            while rows:
                utils.append_json(*rows[0])
                del rows[0]
        except OSError as error:
            failure = f"{rows[0][0]} cannot be written ({error.strerror or error})"
        for role in [role for role in ROLES if role in files]:
            name, content = files[role]
            try:
                if id(content) in written:
                    checkpoint.copy(written[id(content)], self.folder / name)
                else:
                    checkpoint.write(self.folder / name, content)
            except (OSError, MemoryError) as error:
                return f"{self.folder / name} cannot be written ({getattr(error, 'strerror', None) or error or 'out of memory'})"
            written[id(content)] = self.folder / name
            del files[role]
            if role == "kept":
                self.thin_out()
        return failure

    def thin_out(self):
        """Remove the oldest of the epochs that --keep keeps, when a newer one is whole."""
        kept = [path for path in checkpoint.checkpoints(self.folder) if checkpoint.kept(path)]
        for path in sorted(kept, key=checkpoint.epoch_named)[:-self.keep]:
            with contextlib.suppress(OSError):
                path.unlink()

    def report(self):
        """Say why the last save has failed, once. Raises what was no fault of the disk."""
        self.crash, crash = None, self.crash
        if crash is not None:
            raise crash
        with self.mutex:
            self.unsaid, failure = None, self.unsaid
        if failure:
            self.say(f"warning: {failure}: the training goes on, what was saved before stays, and the next save tries again")

    def wait(self):
        """Until the thread has done what it can."""
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def finish(self):
        """Wait until all is on the disk; what has failed is tried once more. Raises SaveFailed where it is not."""
        self.wait()
        self.start()
        self.wait()
        if self.rows or self.files:
            self.unsaid = None
            self.report()
            raise SaveFailed(f"{self.failure}: the end of this training is not saved: make room, or mend the folder; --resume auto goes on "
                             "from what is")
        self.report()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is not SaveFailed:
                self.finish()
        except SaveFailed as error:
            if kind is None:
                raise
            self.say(f"warning: {error}")
        finally:
            self.lock.release()
