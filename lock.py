"""Which run has a folder? One at a time."""
import contextlib
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path


class Lock:
    """A file in a folder, which one run holds at a time and which says whose it is: host, process, since when.

    flock tells whether the owner lives, wherever it runs: a dead one holds nothing. On a file system without flock the process
    is asked for, on this host; of another host it cannot be known.
    """

    def __init__(self, folder):
        self.path, self.file = Path(folder, ".lock"), None
        os.register_at_fork(after_in_child=self.forget)  # a loader worker that outlives its killed parent would hold it

    def take(self):
        """-> what a log should say of it, or None. Raises ValueError where another run has it, and OSError."""
        self.forget()  # what was taken away with its folder
        while True:
            try:
                file, created = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                try:
                    file, created = os.open(self.path, os.O_RDWR), False
                except FileNotFoundError:  # its owner has just ended
                    continue
            try:
                owner = {} if created else self.owner(file)
                if self.claim(file, owner, created) and self.is_at_path(file):
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now()}).encode(), 0)
                    self.file, file = file, None
                    return owner and f"{self.path} was left by {described(owner)}, which does not hold it any more"
            finally:
                if file is not None:
                    os.close(file)

    def claim(self, file, owner, created):
        """Whether this process has the lock now; False: try again. Raises ValueError where another has it."""
        folder = self.path.parent
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            raise ValueError(f"--output_dir {folder} is in use by another run ({described(owner)}): wait for it, or choose another "
                             "folder") from None
        except OSError:  # no flock here
            if created:
                return True
        if owner.get("host") == socket.gethostname() and not lives(owner["pid"]):
            if self.is_at_path(file):
                self.path.unlink(missing_ok=True)
            return False
        raise ValueError(f"--output_dir {folder} is in use by another run ({described(owner)}), or was when that was killed: its file "
                         f"system knows no flock, so make sure that it has ended, and: rm {self.path}")

    @staticmethod
    def owner(file):
        """{host, pid, since} of a lock, {} where it does not say."""
        with contextlib.suppress(ValueError, OSError):
            owner = json.loads(os.pread(file, 4096, 0))
            if isinstance(owner, dict) and isinstance(owner.get("pid"), int):
                return owner
        return {}

    def is_at_path(self, file):
        """Whether it is still this file that others find."""
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except OSError:
            return False

    @property
    def held(self):
        return self.file is not None and self.is_at_path(self.file)

    def release(self):
        if self.held:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.forget()

    def forget(self):
        if self.file is not None:
            os.close(self.file)
            self.file = None


def now():
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def described(owner):
    """Of a lock's content."""
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}" if owner else "it does not say which"


def lives(pid):
    """Whether there is another process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return pid != os.getpid()
