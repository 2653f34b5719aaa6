"""What did a model say of each image, and is it better than another? One row an image, and what two such files prove.

A file is CSV of path (below --data-path), label, top1 to top5 and probability1 to probability5, in the data set's order; label and top
are classes' names. An image that could not be read has its path and label only.
"""
import contextlib
import csv
import errno
import itertools
import math
import os
import tempfile
from pathlib import Path
from statistics import NormalDist

from utils import shown

TOP = 5
COLUMNS = ["path", "label", *(f"top{i + 1}" for i in range(TOP)), *(f"probability{i + 1}" for i in range(TOP))]


def interval(right, count, confidence=0.95):
    """Wilson's score interval of an accuracy (J. Am. Stat. Assoc. 22, 1927): -> its bounds, in percent. count: at least 1"""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = right / count, z * z / count
    middle, half = share + spread / 2, z * math.sqrt((share * (1 - share) + spread / 4) / count)
    return 100 * max(0.0, middle - half) / (1 + spread), 100 * min(1 + spread, middle + half) / (1 + spread)


def said(right, count):
    """An accuracy with its interval, in words."""
    low, high = interval(right, count)
    return f"{100 * right / count:.3f} %, with 95 % confidence from {low:.3f} to {high:.3f} ({right:,} of {count:,} images)"


def mcnemar(a, b):
    """The exact, two-sided p-value of McNemar's test (Psychometrika 12, 1947). a, b: images that only one of two models has right"""
    n, term, total = a + b, 1, 0
    for i in range(min(a, b) + 1):
        total, term = total + term, term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def check(path):
    """ValueError where `save` could not write, before anything is computed."""
    with writing(path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass


@contextlib.contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise ValueError(f"--predictions {shown(path)} cannot be written ({error.strerror}): choose another file") from error


def save(path, rows, dataset, classes, root):
    """Write rows [(index, outputs of the top, their probabilities)], both empty for an image that could not be read.

    classes: the outputs' names. root: of the data. What stood at `path` is renamed to PATH.1, PATH.2, ...: -> its new name, or None.
    Raises ValueError where it cannot be written.
    """
    names, below, path = distinct(classes), f"{root}".rstrip("/") + "/", Path(path)
    with writing(path), tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}.", dir=path.parent) as made:
        with open(Path(made, "csv"), "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for index, top, probabilities in sorted(rows):
                target, pad = int(dataset.targets[index]), [""] * (TOP - len(top))
                writer.writerow([shown(str(dataset.name(index)).removeprefix(below)),
                                 names[target if dataset.numbering is None else dataset.numbering[target]],
                                 *(names[output] for output in top), *pad, *(f"{p:.6g}" for p in probabilities), *pad])
            file.flush()
            os.fsync(file.fileno())
        aside = None
        if os.path.lexists(path):
            aside = next(f"{path}.{i}" for i in itertools.count(1) if not os.path.lexists(f"{path}.{i}"))
            os.rename(path, aside)
        os.rename(file.name, path)
    return aside


def distinct(classes):
    """Names for a file: in one line each, and no two alike."""
    names = [shown(name) for name in classes]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names)]


def read(path):
    """-> [(path, label)], [whether its first answer is right]. Raises ValueError for what is no whole file of `save`."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            head, *rows = list(csv.reader(file)) or [[]]
    except (OSError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read {shown(path)} ({why}): give a file of --predictions") from error
    wrong = next((i + 2 for i, row in enumerate(rows) if len(row) != len(COLUMNS)), None) if head == COLUMNS else 1
    if wrong or not rows:
        why = f"line {wrong} is none of its" if wrong else "it has no images"
        raise ValueError(f"{shown(path)} is no file of --predictions ({why}): give one that a run has written")
    return [(row[0], row[1]) for row in rows], [row[1] == row[2] for row in rows]


def compare(a, b):
    """-> lines: both accuracies, and whether they differ by more than chance. Raises ValueError for files of different images."""
    (images, right), (others, also) = read(a), read(b)
    if images != others:
        first = next((pair for pair in zip(images, others) if pair[0] != pair[1]), None)
        how = (f"{len(images):,} and {len(others):,}" if len(images) != len(others) else
               " where the other has ".join(f"{name} of class {label}" for name, label in first))
        raise ValueError(f"{shown(a)} and {shown(b)} are not of the same images ({how}): give two files of one validation set")
    only_a, only_b = sum(x and not y for x, y in zip(right, also)), sum(y and not x for x, y in zip(right, also))
    p = mcnemar(only_a, only_b)
    return [f"{shown(a)}: Acc@1 {said(sum(right), len(right))}", f"{shown(b)}: Acc@1 {said(sum(also), len(also))}",
            f"right in the first only {only_a:,}, in the second only {only_b:,}: McNemar's exact test, p = {p:.3g}"
            + (": hardly chance" if p < 0.05 else ": it may be chance")]
