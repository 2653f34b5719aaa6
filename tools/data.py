"""Where do images come from? scikit-learn's digits as class folders; class folders as tar shards; an index of others' shards.

    python tools data digits DIR             # 1,797 scans of 10 digits
    python tools data shards FOLDER DIR      # class folders as webdataset tar shards in DIR, a new or empty folder
    python tools data index DIR              # find the images of shards once, instead of at every start
"""
import argparse
import contextlib
import os
import tempfile
from pathlib import Path

import devices  # noqa: F401  before torch: it decides what torch may load

# isort: split
import datasets
import shards
from datasets import STANDS_THERE
from decode import reason


def main(argv):
    parser = argparse.ArgumentParser("python tools data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words, text in (("digits", ["DIR"], "write scikit-learn's digits as class folders"),
                              ("shards", ["FOLDER", "DIR"], "write class folders as tar shards"),
                              ("index", ["DIR"], "write the index of shards")):
        command = commands.add_parser(name, help=text, description=text)
        for word in words:
            command.add_argument(word.lower(), metavar=word, type=Path)
    given = parser.parse_args(argv)
    print(*{"digits": lambda: write_digits(given.dir), "shards": lambda: write_shards(given.folder, given.dir),
            "index": lambda: write_index(given.dir)}[given.command](), sep="\n")


def write_digits(folder):
    """-> lines that tell of it, and of what was there before"""
    if not os.path.isdir(folder / "train"):
        datasets.write_digits(folder)
    return [f"{split}: {sum(1 for _ in (folder / split).glob('*/*.png'))} images" for split in ("train", "val")]


def write_shards(source, target, maxcount=5000):
    """Class folders, train/ and val/ or the one there is, as tar shards of at most maxcount images. -> lines that tell of it

    Whole or not there: written beside `target` and renamed; a process killed by force leaves a hidden folder beside it. Raises
    ValueError where something else stands in its place.
    """
    source, target = Path(source), Path(os.path.realpath(target))
    splits = [split for split in ("train", "val") if os.path.isdir(source / split)]
    if not splits:
        raise ValueError(f"{source} has neither train/ nor val/ with class folders")
    with shards.writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.stat(target)  # a name that is too long ends here, not when all is written
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ValueError(f"{target} is not empty: choose a new folder for the shards")
    said = []
    with shards.writing(target), tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", dir=target.parent) as made:
        for split in splits:
            images, classes = datasets.build_dataset(split == "train", source)
            if isinstance(images, shards.ShardedImages):
                raise ValueError(f"{source / split} holds shards already: python tools data index {source} makes their index")
            converted = shards.write(Path(made, "shards", split), list(zip(images.names, images.targets.tolist())), classes, maxcount)
            said.append(f"{split}: {len(images)} images of {len(classes)} classes" + "".join(
                f", {count} of them {kind} files, now PNG" for kind, count in converted.items()))
            said += images.notes[1:]  # what was left out
        try:
            os.rename(Path(made, "shards"), target)
        except OSError as error:
            if error.errno not in STANDS_THERE:
                raise
            raise ValueError(f"{target} was filled meanwhile ({reason(error)}): choose a new folder for the shards") from error
    return said


def write_index(folder):
    """-> lines that tell of it"""
    splits = [folder / split for split in ("train", "val") if os.path.isdir(folder / split)]
    if not splits:
        raise ValueError(f"{folder} has neither train/ nor val/ with tar shards")
    said = []
    for split in splits:
        with shards.writing(split / "index.json"):
            index = shards.write_index(split)
        tars = f"{len(index.counts)} shard{'s' if len(index.counts) > 1 else ''}"
        said.append("; ".join([f"{split.name}: {len(index.records)} images of {len(index.classes)} classes in {tars}",
                               *shards.left_out(index), *(f"{old} was another's, and is now {new}" for old, new in index.aside)]))
    return said
