"""What survives a crash? Checkpoints: save, find, read, load, adapt to another head.

A checkpoint is a plain dict of CPU tensors, numbers and strings: {model, optimizer, schedule, scaler, model_ema, epoch,
best_accuracy, options, classes, preprocessing, manifest}. It reads with weights_only on any device, and is never half-written.
"""
import argparse
import codecs
import hashlib
import os
import pathlib
import pickle
import re
import shutil
import struct
import tempfile
import urllib.parse
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.hub
from safetensors.torch import load_file

import openmmlab
from utils import replacing


class NoCheckpoint(ValueError):
    """A folder has no checkpoint at all, not even a damaged one."""


# What DDP and SWA, torch.compile, Lightning and OpenMMLab put before every name
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.")
LAST, BEST = "checkpoint.pth", "checkpoint_best.pth"
OF_AN_EPOCH = re.compile(r"checkpoint_(\d+)(_milestone)?\.pth")  # --keep and --milestones
SEAL = b"sha256 "
SEAL_LENGTH = len(SEAL) + 64


def to_host(value):
    """The same nested value with detached CPU tensors in memory of their own: whoever trains on does not change them."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_host(item) for item in value)
    return value


def differences(a, b, where="it"):
    """What of two contents is not the same, bit for bit: lines that name it."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{where}/{key}")
            else:
                yield f"{where}/{key} is in one only"
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b)):
            yield from differences(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        if not torch.equal(a, b):
            yield f"{where} differs by up to {(a.double() - b.double()).abs().max():.3g}"
    elif type(a) is not type(b) or (a is not b and a != b):
        yield f"{where} is {a!r:.60} and {b!r:.60}"


class Sealed:
    """A file that torch.save writes to, and the SHA-256 of what it wrote.

    An error is kept until `seal`: in torch's zip writer it would become another one, with a traceback of C++.
    """

    def __init__(self, file):
        self.file, self.hash, self.error = file, hashlib.sha256(), None

    def write(self, data):
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
            self.hash.update(data)
        return memoryview(data).nbytes

    def flush(self):
        pass

    def seal(self):
        """The checksum becomes the comment of the zip, which stands behind all else: its length are the two bytes before it."""
        if self.error is not None:
            raise self.error
        self.file.seek(-2, os.SEEK_END)
        self.file.write(struct.pack("<H", SEAL_LENGTH) + SEAL + self.hash.hexdigest().encode())


def verify(path):
    """Raises ValueError where a file's content is not what was written. Files of others, and our older ones, have no checksum."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END) - SEAL_LENGTH
        file.seek(max(end, 0))
        seal = file.read()
        if not seal.startswith(SEAL):
            return
        file.seek(0)
        found, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
        while (size := file.readinto(buffer[:max(0, min(len(buffer), end - 2 - file.tell()))])):
            found.update(buffer[:size])
    found.update(b"\0\0")
    if found.hexdigest().encode() != seal.removeprefix(SEAL):
        raise ValueError("its SHA-256 is another than when it was written")


def save(path, **content):
    """Write `content` so that there is always one whole file at `path`, the old one or the new one. Raises OSError."""
    write(path, to_host(content))


def write(path, content):
    """`save` of what is on the host already."""
    with replacing(path) as file:
        sealed = Sealed(file)
        torch.save(content, sealed)
        sealed.seal()


def copy(path, other):
    """Put the bytes of the file `path` at `other`, too."""
    with open(path, "rb") as source, replacing(other) as file:
        shutil.copyfileobj(source, file, 2**20)


class Foreign:
    """Stands for an object of a class that is none of ours, so that the numbers beside it can be read. It does nothing."""

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, _):
        pass

    def __call__(self, *_, **__):
        return self

    def append(self, _):
        pass

    extend = update = add = append
    __setitem__ = __init__


def as_dict(*_):
    """A defaultdict's stand-in: torch fills nothing but plain dictionaries."""
    return {}


# Numbers, paths and plain containers in the pickles of others, under every name that a library has given them.
NUMBERS = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
PLAIN = [argparse.Namespace, (as_dict, "collections.defaultdict"), dict, list, int, float, np.dtype, codecs.encode, *NUMBERS,
         *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
         *((pure, f"{module}.{kind}{system}Path") for module in ("pathlib", "pathlib._local") for kind in ("", "Pure")
           for system, pure in (("Posix", pathlib.PurePosixPath), ("Windows", pathlib.PureWindowsPath)))]


def read(path, whole=True):
    """The content of a .pth or .safetensors file, or of an https:// address, on the CPU. Reads official, timm's and the original's.

    NumPy's numbers come as Python's, paths as text; objects of other classes are left out (Foreign). whole: False leaves the
    tensors' bytes on the disk, unread and unverified. Raises ValueError in one line for a file that is not there, not whole, not
    what was written, or not plain data.
    """
    path = fetch(path) if str(path).startswith("https://") else Path(path)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise ValueError(f"no checkpoint {path}: " + (
            "of addresses only https:// ones are fetched" if re.match(r"[a-z][a-z0-9+.-]*:/", str(path)) else
            "look at the path of --resume, --finetune or --teacher-path"))
    foreign = []
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if whole:
            verify(path)
        foreign = foreign_names(path)
        with torch.serialization.safe_globals([*PLAIN, *((Foreign, name) for name in foreign)]):
            content = plain(torch.load(path, map_location="cpu", weights_only=True, mmap=not whole and zipfile.is_zipfile(path)))
    except pickle.UnpicklingError as error:
        unknown = [*re.findall(r"GLOBAL ([\w.]+)", str(error)), *sorted(foreign)]
        if not unknown:  # torch's text then is an advice to trust the file
            raise ValueError(f"cannot read the checkpoint {path} (its pickle is not whole): it is damaged or no checkpoint") from error
        raise ValueError(f"cannot read the checkpoint {path} safely: it holds {unknown[0]}, which is more than weights and numbers; "
                         "save its state dict again") from error
    except Exception as error:  # damaged files fail in every way that readers of zip, pickle and tensors can
        raise ValueError(f"cannot read the checkpoint {path} ({first_line(error)}): it is damaged or no checkpoint") from error
    if isinstance(content, Foreign):
        raise ValueError(f"cannot read the checkpoint {path} safely: it holds a whole object, not weights: save its state_dict()")
    return content


def foreign_names(path):
    """The classes in a torch.save's pickle that are neither torch's nor PLAIN: read from its bytes, nothing is imported."""
    if not zipfile.is_zipfile(path):
        return []
    with torch.serialization.safe_globals(PLAIN):
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [name for name in names if name.partition(".")[0] not in ("builtins", "__builtin__", "torch")]


def plain(value):
    """NumPy's numbers as Python's, paths as text, dictionaries of any kind as plain ones."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**plain(vars(value)))
    return value


def fetch(address):
    """The file at an https:// address, in torch.hub's cache. -> its path

    As torch.hub's, a name like NAME-0123abcd.pth has the beginning of the content's SHA-256, which is checked. Other names may
    mean different files at different addresses: they have a folder each. Raises ValueError where it cannot be had.
    """
    name = Path(urllib.parse.urlsplit(address).path).name
    if not name or name == "..":
        raise ValueError(f"{address} names no file")
    checksum = re.search(r"-([a-f0-9]{8,})\.", name)
    folder = Path(torch.hub.get_dir(), "checkpoints", *([] if checksum else [hashlib.sha256(address.encode()).hexdigest()[:16]]))
    path = folder / name
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), checksum[1] if checksum else None, progress=False)
    except Exception as error:  # of sockets, TLS, HTTP, the disk and the checksum
        raise ValueError(f"cannot fetch {address} ({first_line(error)}): check the address and the network, or give a file") from error
    return path


def first_line(error):
    return (str(error).strip() or error.__class__.__name__).splitlines()[0]


def decided(content):
    """Whose accuracy is a checkpoint's: "model", or "model_ema" where the moving average was the better.

    Ours once did not say: then the average decided. Those of others say nothing of the kind.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model_ema"), dict) or not content["model_ema"]:
        return "model"
    better = content.get("better", "model_ema" if "options" in content else "model")
    return "model_ema" if isinstance(better, str) and better == "model_ema" else "model"


def model_state(content, path="the checkpoint", ema=None, note=lambda text: None):
    """The weights in what `read` returned, without the prefixes that DDP, torch.compile, Lightning and others put before the names.
    A Twins under another's head, or under OpenMMLab's names, comes under ours.

    ema: True for the moving average, False for the weights that were trained, None for those that `decided`. note: is told what
    of a file has no place in a classifier.
    """
    average = decided(content) == "model_ema" if ema is None else ema
    names = ("model_ema", "state_dict_ema") if average else ("model", "state_dict")
    state = next((content[name] for name in names if isinstance(content.get(name), dict)), None) if isinstance(content, dict) else None
    if state is None and isinstance(content, dict) and not average:
        state = content
    if average and not state:
        raise ValueError(f"{path} holds no moving average: it was trained without --model-ema")
    state = state and {name: value for name, value in state.items() if name != "n_averaged"}  # torch's AveragedModel counts there
    if not state or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise ValueError(f"{path} holds no weights: expected a state dict, or one under 'model' or 'state_dict'")
    cleaned = state
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in cleaned)), None):
        cleaned = {name.removeprefix(prefix): value for name, value in cleaned.items()}
    cleaned = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in cleaned.items()}
    if openmmlab.is_backbone(cleaned):
        cleaned, left_out = openmmlab.to_ours(cleaned)
        if left_out:
            parts = sorted({name.partition(".")[0] for name in left_out if not name.startswith("backbone.")} or {"norms of its stages"})
            note(f"{path}: {len(left_out)} of its weights have no place in a classifier and are left out: {', '.join(parts)}")
    return cleaned


def load_weights(model, state, path="the checkpoint"):
    """Strict. Raises ValueError with the missing and the unexpected keys, or the shapes that differ."""
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
              if k in state and state[k].shape != own[k].shape]
    if missing or unexpected or shapes:
        parts = [f"{title} {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
                 for title, keys in (("missing keys:", missing), ("unexpected keys:", unexpected), ("other shapes:", shapes)) if keys]
        remedy = ("it is of another model (--model)" if missing or unexpected else
                  "it was trained on another number of classes" if all("head" in s.split(" ")[0] for s in shapes) else
                  "it was trained at another --input-size, or is of another model (--model)")
        raise ValueError(f"{path} does not fit: {remedy}; {'; '.join(parts)}")
    bad = [k for k in own if state[k].is_floating_point() and not torch.isfinite(state[k]).all()]
    if bad:
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise ValueError(f"{path} holds weights that are not finite: {', '.join(bad[:4])}{more}: its training had failed; take an "
                         "earlier checkpoint")
    model.load_state_dict(state)


def outputs(state, head="head"):
    """The number of classes of the head in a file, 0 where it has no such head."""
    weight = state.get(f"{head}.weight")
    return len(weight) if weight is not None and weight.dim() else 0


def adapt_head(model, state, head="head", anew=False):
    """`state` without a head of another number of classes; the model's own, freshly initialised, takes its place.

    head: its name, or the names of several (of labels and of a teacher): they change together. anew: also where the number fits,
    or where the file has none. -> (state to load, number of classes in the file, or None where the head stays)
    """
    own, heads = model.state_dict(), (head,) if isinstance(head, str) else tuple(head)
    keys = [key for name in heads if (key := f"{name}.weight") in own]
    if not anew and not any(key in state and state[key].shape != own[key].shape for key in keys):
        return state, None
    of_heads = tuple(f"{name}." for name in heads)
    fresh = {k: v for k, v in own.items() if k.startswith(of_heads)}
    return {**{k: v for k, v in state.items() if not k.startswith(of_heads)}, **fresh}, outputs(state, heads[0])


def epoch_named(path):
    """The epoch in the name of a checkpoint of --keep or --milestones, None of others."""
    found = OF_AN_EPOCH.fullmatch(Path(path).name)
    return found and int(found[1])


def kept(path):
    """Whether it is one of --keep, which may go."""
    return epoch_named(path) is not None and not Path(path).stem.endswith("_milestone")


def checkpoints(folder):
    """All that a run has left there: the last, the best, those of --keep and --milestones."""
    return [path for path in sorted(Path(folder).glob("checkpoint*.pth"))
            if path.is_file() and (path.name in (LAST, BEST) or OF_AN_EPOCH.fullmatch(path.name))]


def find_newest(folder, note=lambda text: None):
    """The whole checkpoint in `folder` that comes farthest, and its content. note: is told of each that is damaged, and why.

    Only the one that is taken is read and verified. Raises ValueError where none is whole, NoCheckpoint where there is none.
    """
    found, damaged = [], []
    for path in checkpoints(folder):
        try:
            found.append((*stage(read(path, whole=False)), path.name == LAST, path.name == BEST, path))
        except ValueError as error:
            damaged.append(str(error))
    for *_, path in sorted(found, reverse=True):
        try:
            content = read(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            note(f"{text}; {path.name} is the newest good one")
        return path, content
    raise ValueError(damaged[0]) if damaged else NoCheckpoint(f"--resume auto: no {LAST} in {folder}")


def epoch_in(content):
    epoch = content.get("epoch", -1) if isinstance(content, dict) else -1
    return epoch if isinstance(epoch, (int, float)) else -1


def stage(content):
    """(last epoch that is done, updates of the next): how far a checkpoint had come."""
    progress = content.get("progress") if isinstance(content, dict) else None
    updates = progress.get("updates") if isinstance(progress, dict) else 0
    return epoch_in(content), updates if isinstance(updates, (int, float)) else 0


def stage_of(path):
    """`stage` by the file's list of contents; (-2, 0) where it is not there, or damaged as far as that shows."""
    try:
        return stage(read(path, whole=False))
    except ValueError:
        return -2, 0


def epoch_of(path):
    """The epoch of a checkpoint, -1 where it says none, -2 where it is damaged or not there."""
    try:
        return epoch_in(read(path))
    except ValueError:
        return -2


def prepare_folder(folder, resumed=None, auto=False):
    """Make the folder of a run and see that it can be written. resumed: the checkpoint that the run goes on from;
    auto: `find_newest` chose it here, perhaps because the last one was damaged.

    A run that goes on with its last or latest checkpoint keeps the files in its folder; else an earlier run's are renamed to
    NAME.1, NAME.2, ...: nothing is lost. A run that goes on elsewhere, or from an older best, takes the
    best checkpoint along. -> the new names
    """
    folder, moved, best = Path(folder), [], None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}): choose another folder") from error
    epochs = [path for path in checkpoints(folder) if epoch_named(path) is not None]
    present = [*(path for name in (LAST, BEST, "log.txt", "data_errors.jsonl", "recipe.toml") if (path := folder / name).exists()), *epochs]
    resumed_is = [name for name in (LAST, BEST) if resumed is not None and Path(resumed).resolve() == (folder / name).resolve()]
    here = auto or resumed_is == [LAST] or (resumed_is == [BEST] and stage_of(folder / LAST) <= stage_of(folder / BEST))
    if resumed is not None and not here:  # checkpoint.pth.2 of a run that was moved aside has its best beside it, too
        best = Path(resumed).with_name(BEST + Path(resumed).name.removeprefix(LAST).removeprefix(BEST))
    aside = present
    if here:  # its own files stay; but what is damaged, perhaps not beyond rescue, and an epoch that it comes to again
        come_to = stage_of(resumed)
        aside = [path for path in ((folder / LAST, *epochs) if resumed_is != [LAST] else epochs) if path.exists() and (
            stage_of(path)[0] == -2 or stage_of(path) > come_to or (path.name == LAST and epoch_of(path) == -2))]
    if aside:
        number = next(n for n in range(1, 10**6) if not any(Path(f"{path}.{n}").exists() for path in aside))
        for path in aside:
            if best is not None and path.resolve() == best.resolve():
                best = Path(f"{path}.{number}")
            moved.append(path.rename(f"{path}.{number}").name)
    if best is not None and best.is_file():
        shutil.copyfile(best, folder / BEST)
    return moved
