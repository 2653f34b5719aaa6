"""Which files of a folder are images, and of which class?"""
import os
from array import array
from collections import deque
from collections.abc import Sequence

import numpy as np

import decode
from utils import shown

HOUSEKEEPING = frozenset(("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found",
                          "__macosx", "__pycache__"))  # of NAS, Windows, file systems, macOS and Python
HIDDEN, NO_IMAGE, LOOSE, NO_FILE, AGAIN, GONE = (
    "hidden names", "no images by their names", "images outside the class folders", "no regular files", "links to what counts elsewhere",
    "files that were gone when they were looked at")


class PathList(Sequence):
    """Paths in one buffer, which forked workers share: of a list they copy each page on which they look at a path."""

    def __init__(self, paths=()):
        text, ends = bytearray(), array("q", [0])
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self.text, self.ends = np.frombuffer(text, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index]:self.ends[index + 1]].tobytes())


class ClassFolders:
    """The images below root/CLASS/, in the order of torchvision's ImageFolder: classes by name, then folders, then files.

    classes: names. paths: a PathList. labels: int64, one a path. counts: images of each class. left_out: {why: [how many, the
    first of them]}. The ending of a name says whether it is an image, and the file's first bytes where there is no ending. Hidden
    names and those of HOUSEKEEPING are skipped. Each real file counts once, and each folder is entered once, however many links
    lead there; a link takes no file from the folder that it lies in.

    Raises ValueError for no class folder, an empty one, one that cannot be read, and classes that lie one level deeper.
    """

    def __init__(self, root):
        self.root, self.name, self.left_out, self.entered = str(root), shown(os.path.basename(root)), {}, set()
        self.classes = []
        for entry in self.entries(self.root):
            if is_(entry, "dir"):
                self.classes.append(entry.name)
            else:
                self.leave(LOOSE if shows_image(entry) else NO_IMAGE, entry.path)
        self.remedy = f"every class is a folder in {self.name}/ with at least one image"
        if not self.classes:
            loose = self.left_out.get(LOOSE, [0])[0]
            raise ValueError(f"{self.name}/ has no class folders" + (f", but {loose:,} images" if loose else "") + f": {self.remedy}")
        self.paths, self.labels = self.collect()
        self.counts = np.bincount(self.labels, minlength=len(self.classes))
        if not self.counts.all():
            empty = [name for name, count in zip(self.classes, self.counts) if not count]
            raise ValueError(f"{self.name}/ has no image in the class folders {some(empty)}: {self.remedy}"
                             + (f" (left out: {self.omissions()})" if self.left_out else ""))

    def leave(self, why, path):
        self.left_out.setdefault(why, [0, shown(os.path.relpath(path, self.root))])[0] += 1

    def identity(self, path):
        """A file's device and inode number; twice None where another process has just removed it."""
        try:
            status = os.stat(path)
        except FileNotFoundError:
            self.leave(GONE, path)
            return None, None
        except OSError as error:
            raise ValueError(f"cannot look at the file {shown(path)} ({error.strerror}): make it readable, or remove it") from error
        return status.st_dev, status.st_ino

    def entries(self, folder):
        """What lies in a folder, in order; nothing where it was entered before."""
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in self.entered:
                self.leave(AGAIN, folder)
                return
            self.entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                found = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"cannot look into the folder {shown(folder)} ({error.strerror}): make it readable, or remove it") from error
        for entry in found:
            if entry.name.startswith(".") or entry.name.lower() in HOUSEKEEPING:
                self.leave(HIDDEN, entry.path)
            else:
                yield entry

    def collect(self):
        """-> paths and labels of all classes. What lies behind links is looked at last."""
        real, linked, parts = deque(), deque(), []
        for label, name in enumerate(self.classes):
            path = os.path.join(self.root, name)
            (linked if os.path.islink(path) else real).append((path, label))
        while real or linked:
            folder, label = (real or linked).popleft()
            names, inodes = [], array("Q")
            for entry in self.entries(folder):
                if is_(entry, "dir"):
                    (linked if entry.is_symlink() else real).append((entry.path, label))
                elif not shows_image(entry):
                    self.leave(NO_IMAGE, entry.path)
                elif not is_(entry, "file"):
                    self.leave(NO_FILE, entry.path)
                elif (inode := self.identity(entry.path)[1] if entry.is_symlink() else entry.inode()) is not None:
                    names.append(os.fsencode(entry.name))
                    inodes.append(inode)
            if names:
                parts.append((label, folder, len(parts), b"\0".join(names), inodes))
        self.refuse_nested_classes({folder for _, folder, *_ in parts})
        parts.sort(key=lambda part: part[:2])
        paths = PathList(os.path.join(os.fsencode(folder), name) for _, folder, _, names, _ in parts for name in names.split(b"\0"))
        labels, turns = (np.repeat(np.array([part[i] for part in parts], dtype=np.int64), [len(part[4]) for part in parts])
                         for i in (0, 2))
        again = self.found_again(paths, np.concatenate([np.array(part[4]) for part in parts] or [labels]), turns)
        if again:
            kept = np.delete(np.arange(len(paths)), again)
            paths, labels = PathList(map(paths.__getitem__, kept)), labels[kept]
        return paths, labels

    def found_again(self, paths, inodes, turns):
        """Indices of paths to files that were found before, or are gone. An inode number may stand for several: those are asked."""
        _, group, counts = np.unique(inodes, return_inverse=True, return_counts=True)
        suspects = np.flatnonzero(counts[group] > 1)
        known, again = set(), []
        for index in suspects[np.argsort(turns[suspects], kind="stable")]:
            device, inode = self.identity(paths[index])
            if inode is not None and (device, inode) not in known:
                known.add((device, inode))
                continue
            if inode is not None:
                self.leave(AGAIN, paths[index])
            again.append(index)
        return again

    def refuse_nested_classes(self, folders):
        """folders: those with images. One class whose images all lie in several folders of its own is train/images/CLASS."""
        if len(self.classes) > 1:
            return
        top, shown_top = os.path.join(self.root, self.classes[0]), f"{self.name}/{shown(self.classes[0])}"
        inner = sorted({os.path.relpath(folder, top).split(os.sep)[0] for folder in folders})
        if len(inner) > 1 and "." not in inner:
            raise ValueError(f"{self.name}/ has one class, {shown(self.classes[0])}, whose images lie in {len(inner)} folders of its own "
                             f"({some(inner)}): if those are the classes, move them up: mv {shown_top}/* {self.name}/")

    def omissions(self):
        return "; ".join(f"{why}: {count:,} ({example}{', ...' if count > 1 else ''})" for why, (count, example) in self.left_out.items())

    def notes(self):
        """What a log says of them: how many images a class has, and what was left out."""
        found = [spread(f"{self.name}/", self.classes, self.counts)]
        return found + [f"{self.name}/ left out: {self.omissions()}"] if self.left_out else found


def is_(entry, kind):
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:  # a link to itself, among others
        return False


def shows_image(entry):
    ending = os.path.splitext(entry.name)[1].lower()
    return ending in decode.EXTENSIONS or (not ending and decode.is_image(entry.path))


def spread(name, classes, counts):
    """How many images the classes have. counts: an array, one number a class."""
    least, most = counts.argmin(), counts.argmax()
    return (f"{name}: {counts.sum():,} images in {len(classes):,} classes, from {counts[least]:,} ({shown(classes[least])}) to "
            f"{counts[most]:,} ({shown(classes[most])}) a class")


def some(names, most=3):
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")
