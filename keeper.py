"""Who writes into the folder of a run? One run at a time."""
from pathlib import Path

import checkpoint
from lock import Lock


class Keeper:
    """The folder of one run, which nobody else writes into while it lasts: `with Keeper(folder) as keeper`."""

    def __init__(self, folder, say=print):
        self.folder, self.say, self.lock = Path(folder), say, Lock(folder)

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
        for path in self.folder.glob(".checkpoint*.tmp"):
            path.unlink(missing_ok=True)
        return checkpoint.prepare_folder(self.folder, resumed, auto)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lock.release()
