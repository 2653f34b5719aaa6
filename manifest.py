"""What was a checkpoint trained with? Versions, the code, the training files; and what a resume would change of it in silence."""
import hashlib
import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import versions
from folders import PathList
from utils import shown

SIZES = 2**14

# What two commands of one training may say differently: where things are, how long this part of it runs, what is written
FREE = frozenset(("recipe", "resume", "output_dir", "data_path", "max_step", "start_epoch", "keep", "milestones", "ckpt_steps",
                  "ckpt_minutes", "print_freq", "num_workers", "pin_mem", "device", "world_size", "dist_url", "allow_change",
                  "max_bad_fraction", "hang_timeout", "predictions"))


def describe(dataset, root):
    """-> {versions, commit, data} of a training on the images of `dataset`, which lie below `root`."""
    names = ("torch", "torchvision", "timm", "numpy", "torch_npu")
    return {"versions": {"python": platform.python_version(), **{name: found for name in names if (found := versions.installed(name))}},
            "commit": commit(Path(__file__).resolve().parent), "data": fingerprint(dataset, root)}


def commit(folder):
    """The git commit of the code in `folder`, with a + where files have changed since; None where git does not say."""
    if not (folder / ".git").exists():  # it may lie in somebody else's repository
        return None
    try:
        told = subprocess.run(["git", "-C", folder, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"], check=True,
                              capture_output=True, text=True, timeout=30, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip() or None


def fingerprint(dataset, root):
    """{images, bytes, names, sizes} of a data set: the SHA-256 of its files' names below `root` and of their sizes, in its order.

    Sizes are those of SIZES files at most, evenly chosen, and bytes their sum: each is a question to the file system. A set that
    does not lie in files of its own (CIFAR, whose archive is verified) has its number of images only.
    """
    files = getattr(dataset, "names", None)
    files = files if isinstance(files, PathList) else PathList(getattr(dataset, "shards", ()))
    with ThreadPoolExecutor(16) as pool:  # they wait for the disk
        sizes = list(pool.map(size, files[::-(-len(files) // SIZES) or 1]))
    return {"images": len(dataset), "bytes": sum(sizes), "names": digest(*below(files, str(Path(root)))),
            "sizes": digest(" ".join(map(str, sizes)).encode())}


def below(files, root):
    """-> where each path ends, and the bytes of all, both without the `root` that they begin with"""
    cut, kept = len(os.fsencode(root)), np.ones(len(files.text), dtype=bool)
    for i in range(cut):
        kept[files.ends[:-1] + i] = False
    return (files.ends - cut * np.arange(len(files.ends))).tobytes(), files.text[kept].tobytes()


def digest(*parts):
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:16]


def size(file):
    """In bytes; -1 of one that is gone, which the training will meet."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def other_data(saved, now):
    """How the training files differ from those of a checkpoint, in words; None where they do not, or it does not say."""
    if not isinstance(saved, dict) or not saved.keys() >= now.keys() or all(saved[key] == now[key] for key in now):
        return None
    if saved["images"] != now["images"]:
        return f"{short(saved['images'])} images then and {now['images']} now"
    if saved["names"] != now["names"]:
        return f"{now['images']} images as then, with other names"
    return f"the same names, but other files: {short(saved['bytes'])} bytes then and {now['bytes']} now"


def changes(saved, now, options):
    """["what old -> new"] of a checkpoint's options, versions and commit. options: this command's, a dict."""
    then = saved.get("manifest")
    before = saved.get("options")
    pairs = [(f"--{name.replace('_', '-')}", before[name], options[name]) for name in options
             if isinstance(before, dict) and name in before and name not in FREE]
    if isinstance(then, dict):
        known = then.get("versions")
        pairs += [(name, known[name], now["versions"].get(name)) for name in known] if isinstance(known, dict) else []
        pairs += [("commit", then.get("commit"), now["commit"])] if then.get("commit") and now["commit"] else []
    return [f"{name} {short(old)} -> {short(new)}" for name, old, new in pairs if plain(old) != plain(new)]


def plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value


def short(value, most=60):
    text = shown(" ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
    return text if len(text) <= most else text[:most] + "..."
