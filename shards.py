"""What do tar shards hold? Images and labels, KEY.jpg beside KEY.cls as webdataset names them: found, indexed, read, written.

A shard is as good as a folder: index.npy says where each image and its label stand, so that any of them is one read. Beside it
index.json has the class names, and each shard's number of images and of bytes. Shards without an index, others' too, are read
once from header to header at the start.
"""
import bz2
import contextlib
import errno
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shlex
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from decode import EXTENSIONS, FORMATS, READ_ERRORS, DataError, UnreadableImage, load_rgb, open_file, reason
from folders import is_, spread
from utils import shown

LABELS = (".cls", ".json", ".txt")  # the first of them that holds a class counts
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
COMPRESSED = {b"\x1f\x8b": ("gzip", "gunzip", gzip.open), b"BZh": ("bzip2", "bunzip2", bz2.open),
              b"\xfd7zXZ\0": ("xz", "unxz", lzma.open), b"\x28\xb5\x2f\xfd": ("zstd", "unzstd", None)}
MOST_CLASSES = 1_000_000  # a larger number is no class's
MOST_LABEL_BYTES = 1 << 20
NUMERAL = re.compile("[+-]?[0-9]{1,18}")
BLOCK = tarfile.BLOCKSIZE
# Where an image's and its label's members begin in their tar, how many bytes they have with their headers, and the class.
RECORD = np.dtype([("image", "<i8"), ("image_bytes", "<i8"), ("label", "<i8"), ("label_bytes", "<i8"), ("target", "<i4")])


def find(folder):
    """The tars of a split, sorted; none where it has none. Raises ValueError where class folders stand beside them."""
    try:
        with os.scandir(folder) as entries:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ValueError(f"cannot look into the folder {shown(folder)} ({error.strerror}): make it readable") from error
    tars = sorted(entry.path for entry in entries if entry.name.lower().endswith(SUFFIXES) and not is_(entry, "dir"))
    classes = (entry for entry in sorted(entries, key=lambda entry: entry.name) if is_(entry, "dir"))
    if tars and (first := next((entry.name for entry in classes if holds_images(entry.path)), None)):
        raise ValueError(f"{shown(Path(folder).name)}/ holds class folders ({shown(first)}) and tar files ({shown(Path(tars[0]).name)}): "
                         "which are the data? Move the others away")
    return tars


def holds_images(folder):
    return any(Path(name).suffix.lower() in EXTENSIONS for _, _, names in os.walk(folder) for name in names)


# ---- what is in a tar ----

def unreadable(shard, why, remedy="write it again"):
    return DataError(f"cannot read the shard {shown(shard)} ({why}): {remedy}")


def unreadable_in(shard, why, remedy="write it again"):
    """As `unreadable`, where it is one image that suffers."""
    return UnreadableImage(str(unreadable(shard, why, remedy)), why)


def members(file, size):
    """Each member of an open tar -> (where it begins, where the next one does, its TarInfo).

    Raises ValueError where a header is damaged and where the tar is not whole. tarfile's own loop takes a damaged header for
    the end, and so does webdataset.
    """
    def where():
        return f"after {shown(last)}" if last else "at the start"

    tar, last = tarfile.TarFile(fileobj=file), None
    tar.offset = 0
    while True:
        start = tar.offset
        file.seek(start)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
        except tarfile.EOFHeaderError:
            break
        except OSError:
            raise
        except READ_ERRORS as error:
            if start + BLOCK > size:
                raise ValueError(f"it breaks off {where()}") from error
            raise ValueError(f"the header at byte {start} is damaged, {where()}") from error
        if tar.offset <= start or member.size < 0:
            raise ValueError(f"the header of {shown(member.name)} has a size below 0")
        if tar.offset > size:
            raise ValueError(f"it breaks off within {shown(member.name)}")
        yield start, tar.offset, member
        last = member.name
    if start + 2 * BLOCK > size:
        raise ValueError(f"it breaks off {where()}")
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.count(0) < len(chunk):
            raise ValueError(f"something follows its end mark, which stands {where()}")


def split_name(name):
    """'a/b.c.JPG' -> 'a/b.c', '.jpg'. Hidden files, such as macOS's ._b.jpg, have no extension."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.rpartition(".")
    return (folder + slash + stem, dot + extension.lower()) if stem and not base.startswith(".") else (name, "")


def first_key(key):
    """webdataset's key: what stands before the first dot of the file's name."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def read_label(extension, content):
    """The class that a label file names, as a number or a name; None where it names none (a caption, other JSON).

    KEY.cls holds a number, or a name. KEY.json has it as "cls" or "label", and what is a text there stays one, "7" too: the other
    labels tell whether it is a name. KEY.txt has a number. Raises ValueError.
    """
    text = content.decode("utf-8-sig").strip()
    if extension == ".json":
        value = json.loads(text)
        value = next((value[key] for key in ("cls", "label") if key in value), None) if isinstance(value, dict) else value
        if isinstance(value, float) and value.is_integer():  # a column of numbers in which some are missing
            value = int(value)
        if isinstance(value, (list, dict, bool, float)):
            raise ValueError(f"its label is {shown(json.dumps(value))[:40]}, no class's number")
        if isinstance(value, str):
            return value.strip() or None
        text = "" if value is None else str(value)
    if NUMERAL.fullmatch(text):
        return int(text)
    if extension == ".cls" and not text:
        raise ValueError("it is empty")
    return (text or None) if extension != ".txt" else None


def scan_shard(shard):
    """-> bytes of the tar, its records without classes, [(label, its member's name)], what was left out. Raises DataError."""
    try:
        with open_file(shard) as file:
            size = os.fstat(file.fileno()).st_size
            check_is_tar(file, shard)
            images, labels, packed = sort_out(file, size)
            if not labels and (images or packed):
                raise unlabelled(shard, images, packed)
            return size, *pair(images, labels)
    except DataError:
        raise
    except tarfile.HeaderError as error:
        raise unreadable(shard, f"damaged: {reason(error)}") from error
    except READ_ERRORS as error:
        raise unreadable(shard, reason(error)) from error


def unlabelled(shard, images, packed):
    """The DataError for a tar that is no shard: ImageNet's of one class, or of all classes' tars. packed: the tars in it."""
    folder, path, tars = (shown(shlex.quote(str(name))) for name in (Path(shard).parent, shard, f"../{Path(shard).parent.name}_tars"))
    if not images:
        return unreadable(shard, f"it holds no images but {len(packed):,} tars, such as {packed[0]}",
                          f"unpack it: tar -xf {path} -C {folder} && mv {path} {folder}/..")
    unpack = (f'cd {folder} && mkdir {tars} && for t in *.tar; do mkdir "${{t%.tar}}" && tar -xf "$t" -C "${{t%.tar}}" && '
              f'mv "$t" {tars}; done')
    return unreadable(shard, f"its {len(images):,} images have no label beside them, such as KEY.cls with a class's number",
                      f"where each tar is a class, as ImageNet's, make folders of them: {unpack}")


def check_is_tar(file, shard):
    """ValueError for an empty or compressed file; the remedy for one that is damaged is another."""
    head = file.read(BLOCK)
    if not head:
        raise ValueError("it is empty")
    for magic, (kind, command, opened) in COMPRESSED.items():
        if head.startswith(magic):
            if opened:
                with opened(shard) as content:
                    try:
                        while content.read(1 << 20):
                            pass
                    except READ_ERRORS as error:
                        raise ValueError(f"{kind} data that are damaged or break off: {reason(error)}") from error
            raise unreadable(shard, f"it is compressed with {kind}, and images are read from the midst of a shard",
                             f"{command} {shown(shlex.quote(str(shard)))}")
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:
        pass
    except tarfile.HeaderError as error:
        raise ValueError("no tar, or its first header is damaged") from error


def sort_out(file, size):
    """-> images {key: (start, bytes, name)}, labels {key: (rank of its kind, start, bytes, name, label)} and names of tars in a tar"""
    images, labels, packed = {}, {}, []
    for start, end, member in members(file, size):
        key, extension = split_name(member.name)
        if member.isdir() or (extension not in EXTENSIONS and extension not in LABELS):
            packed += [shown(member.name)] if member.isreg() and extension == ".tar" else []
            continue
        name, is_image = shown(member.name), extension in EXTENSIONS
        if not member.isreg() or member.issparse():
            what = "sparse file (tar without -S stores it whole)" if member.isreg() else "link (tar -h --hard-dereference stores the file)"
            raise ValueError(f"{name} is a {what}, without bytes of its own")
        if is_image:
            if key in images:
                raise ValueError(f"{images[key][2]} and {name} are two images of one key")
            images[key] = start, end - start, name
            continue
        rank, before = LABELS.index(extension), labels.get(key)
        if before and before[0] == rank:
            raise ValueError(f"{before[3]} and {name} are two labels of one key")
        if before and before[0] < rank:
            continue
        file.seek(member.offset_data)
        try:
            if member.size > MOST_LABEL_BYTES:
                raise ValueError(f"{member.size:,} bytes are too many for a label")
            label = read_label(extension, file.read(member.size))
        except READ_ERRORS as error:
            label = error  # perhaps none at all: an image that needs it says so
        if label is not None:
            labels[key] = rank, start, end - start, name, label
    return images, labels, packed


def pair(images, labels):
    """-> records, [(label, name)] of the images that have a label, names of images that are only beside one, such as masks.

    Raises ValueError for images without a label, and labels without an image.
    """
    records, found, left, used = [], [], [], set()
    for key, (start, length, name) in images.items():
        label = labels.get(key)
        if label is None:  # a/1.input.jpg beside a/1.cls; but a mask a/1.seg.png beside a/1.jpg is none of ours
            key = first_key(key)
            if key in images and key in labels:
                left.append(name)
                continue
            label = labels.get(key)
            if label is None or key in used:
                raise ValueError(f"{name} has no label beside it: a class's number in KEY.cls, KEY.json (\"cls\" or \"label\") or KEY.txt")
        if isinstance(label[4], Exception):
            raise ValueError(f"{label[3]}: {reason(label[4])}") from label[4]
        used.add(key)
        records.append((start, length, *label[1:3], 0))
        found.append((label[4], label[3]))
    if lost := next((label[3] for key, label in labels.items() if key not in used and label[0] == 0), None):
        raise ValueError(f"{lost} has no image beside it: .jpg, .png or another of {', '.join(sorted(EXTENSIONS))}")
    return np.array(records, RECORD), found, left


# ---- the index ----

class Index(NamedTuple):
    """What is known of the shards of a split without reading them."""
    classes: list  # names
    named: bool  # whether they are names, and not only numbers
    counts: list  # images of each shard
    sizes: list  # bytes of each shard
    records: np.ndarray  # of RECORD, shard after shard
    left: list = ()  # images that were left out, where the shards were read
    aside: list = ()  # [(name, its new name)] of files that were in the way of the index


def numbers(count):
    return [str(i) for i in range(count)]


def number_of(label, name, classes):
    """The class of a label that read_label gave, classes: {name: number}."""
    if isinstance(label, str):
        if label in classes:
            return classes[label]
        if not NUMERAL.fullmatch(label):
            raise ValueError(f"{name}: its label '{shown(label[:80])}' is no class's number, nor the name of one")
        label = int(label)
    if not 0 <= label < len(classes):
        raise ValueError(f"{name}: its label {label} is not one of the {len(classes)} classes, 0 to {len(classes) - 1}")
    return label


def scan(shards, classes=None, named=False):
    """Read shards from header to header. -> Index

    classes: names that are known; numbers alone may turn out to be too few. Without names the numbers in the labels are the
    names, and labels that are all texts, of which some are no numerals, are names and numbered in their order. Raises DataError.
    """
    with ThreadPoolExecutor(8) as pool:  # they wait for the disk
        parts = list(pool.map(scan_shard, shards))
    if not named:
        labels = [label for _, _, found, _ in parts for label, _ in found]
        numerals = [int(label) for label in labels if not isinstance(label, str) or NUMERAL.fullmatch(label)]
        if len(numerals) < len(labels) and all(isinstance(label, str) for label in labels):
            classes, named = sorted(set(labels)), True
        else:
            largest = max((label for label in numerals if label < MOST_CLASSES), default=-1)
            classes = numbers(max(largest + 1, len(classes or ())))
    known = {name: i for i, name in enumerate(classes)}
    for shard, (_, records, found, _) in zip(shards, parts):
        try:
            records["target"] = [number_of(label, name, known) for label, name in found]
        except ValueError as error:
            raise unreadable(shard, str(error), "mend the label, or the names in index.json") from error
    sizes, records, _, left = zip(*parts)
    return Index(classes, named, [len(found) for found in records], list(sizes), np.concatenate(records),
                 [name for some in left for name in some])


def left_out(index):
    """What to say of images that are no samples."""
    return [f"left out: {len(index.left):,} images beside others of a label of their own, such as {index.left[0]}"] if index.left else []


def read_json(folder):
    """The content of a split's index.json, {} where it has none of ours. Raises ValueError where it is not as it must be."""
    path = folder / "index.json"
    try:
        with open_file(path) as file:
            content = json.loads(file.read())
        if isinstance(content, dict) and "shardlist" in content:  # webdataset's own indexed reader has a file of that name
            return {}
        classes, shards, named = content["classes"], content.get("shards", {}), content.get("named", False)
        sizes = content.get("bytes", {})
        for what, right in (("classes", isinstance(classes, list) and all(isinstance(name, str) for name in classes)),
                            ("shards", isinstance(shards, dict) and all(type(n) is int and n >= 0 for n in shards.values())),
                            ("bytes", isinstance(sizes, dict) and all(type(n) is int and n >= 0 for n in sizes.values())),
                            ("named", isinstance(named, bool)), ("crc32", type(content.get("crc32", 0)) is int)):
            if not right:
                raise ValueError(f'"{what}" is of a wrong type')
    except FileNotFoundError:
        return {}
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {shown(path)} ({'no ' + str(error) if isinstance(error, LookupError) else reason(error)}): "
                         f"{remedy(folder)}") from error
    return {"named": classes != numbers(len(classes)), **content}


def remedy(folder):
    return f"python tools data index {shown(shlex.quote(str(folder.parent)))}"


def read_index(folder, shards):
    """-> Index of the shards in the folder, whether they had to be read for it. Raises ValueError.

    An index of an earlier version has no places of the images: the shards are read, and must hold as many as it says.
    """
    content, names = read_json(folder), [Path(shard).name for shard in shards]
    counts, sizes = content.get("shards"), content.get("bytes")
    if counts is not None and (unknown := set(names) ^ set(counts)):
        raise ValueError(f"{shown(folder / 'index.json')} does not fit the shards beside it ({shown(min(unknown))}): {remedy(folder)}")
    known = counts is not None and sizes is not None and set(sizes) == set(names)
    if known:
        index = Index(content["classes"], content["named"], [counts[name] for name in names], [sizes[name] for name in names],
                      read_records(folder, content))
        for shard, size in zip(shards, index.sizes):
            try:
                found = os.stat(shard).st_size
            except OSError as error:
                raise unreadable(shard, reason(error)) from error
            if found != size:
                raise unreadable(shard, f"it has {found:,} bytes, and {size:,} by its index",
                                 f"write it again, or where it is whole its index: {remedy(folder)}")
    else:
        index = scan(shards, content.get("classes"), content.get("named", False))
        for shard, name, count in zip(shards, names, index.counts):
            if counts is not None and counts[name] != count:
                raise unreadable(shard, f"it holds {count} images, and {counts[name]} by its index",
                                 f"write it again, or where it is whole its index: {remedy(folder)}")
    if not sum(index.counts):
        raise ValueError(f"{shown(folder)}: the shards hold no images with a label (KEY.jpg beside KEY.cls)")
    return index, not known


def read_records(folder, content):
    """index.npy, which must be the one that index.json was written with, and lie within the shards."""
    path = folder / "index.npy"
    try:
        data = path.read_bytes()
        if zlib.crc32(data) != content.get("crc32"):
            raise ValueError("it is not the one that index.json was written with")
        records = np.load(BytesIO(data), allow_pickle=False)
        names = sorted(content["shards"])
        ends = np.repeat([content["bytes"][name] for name in names], [content["shards"][name] for name in names])
        if records.dtype != RECORD or records.shape != ends.shape:
            raise ValueError("it holds something else")
        for what in ("image", "label"):
            start, length = records[what], records[f"{what}_bytes"]
            if (start < 0).any() or (length < BLOCK).any() or (length > ends - start).any():
                raise ValueError("a place in it is outside its shard")
        if (records["target"] < 0).any() or (records["target"] >= len(content["classes"])).any():
            raise ValueError("a label in it is outside the classes")
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {shown(path)} ({reason(error)}): {remedy(folder)}") from error
    return records


def write_index(folder, classes=None):
    """index.json and index.npy of the shards of one split, read from header to header. An older index's class names are kept.

    -> Index. Raises ValueError where the shards are not whole or a label is outside the names; an OSError is the disk's (`writing`).
    """
    folder = Path(folder)
    shards = find(folder)
    if not shards:
        raise ValueError(f"{shown(folder)} holds no tar shards")
    try:
        content = read_json(folder)
    except ValueError:
        content = {}
    named = classes is not None or content.get("named", False)
    index = scan(shards, classes if classes is not None else content.get("classes"), named)
    data, names = BytesIO(), [Path(shard).name for shard in shards]
    np.save(data, index.records, allow_pickle=False)
    others = [path for path, ours in ((folder / "index.json", bool(content)), (folder / "index.npy", holds_records(folder / "index.npy")))
              if os.path.lexists(path) and not ours]
    content = {"classes": index.classes, "named": index.named, "shards": dict(zip(names, index.counts)),
               "bytes": dict(zip(names, index.sizes)), "crc32": zlib.crc32(data.getvalue())}
    return index._replace(aside=replace({
        folder / "index.npy": data.getvalue(), folder / "index.json": (json.dumps(content, indent=1) + "\n").encode()}, others))


def holds_records(path):
    """Whether it is an index.npy of ours, fitting or not."""
    try:
        with open_file(path) as file:
            return np.load(file, allow_pickle=False).dtype == RECORD
    except READ_ERRORS:
        return False


def set_aside(path):
    """Another's file makes room and stays: as NAME.old, or NAME.old2 and so on where that is taken. -> its new name"""
    names = (f"{path.name}.old{i if i > 1 else ''}" for i in itertools.count(1))
    name = next(name for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, path.with_name(name))
    return name


def replace(files, others=()):
    """Write {path: data}. All are whole on the disk before the first gets its name: where one fails, nothing has changed.

    others: files that make room first. -> [(name, its new name)] of them
    """
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        for path, data in files.items():
            with open(beside[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        aside = [(other.name, set_aside(other)) for other in others]
        for path in files:
            os.replace(beside[path], path)
        return aside
    finally:
        for path in beside.values():
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def writing(path):
    """A disk's error within becomes a ValueError: one line with the path, and what to do."""
    try:
        yield
    except OSError as error:
        remedy = {errno.ENOSPC: "make room on its disk", errno.EDQUOT: "make room, the quota is used up",
                  errno.ENAMETOOLONG: "choose a shorter name"}.get(error.errno, "make the folder writable, or choose another")
        raise ValueError(f"cannot write {shown(path)} ({reason(error)}): {remedy}") from error


# ---- reading ----

class OpenShard(io.FileIO):
    """A file that closes itself when its last reader is done."""

    def __del__(self):
        self.close()


class ShardedImages(Dataset):
    """(transformed image, class, index) of tar shards; by the index `name` says what it was. As map-style as a folder.

    Each image is read at its place, with its headers and its label: they must be what the index says, so that an index of other
    shards never gives a wrong label. Neighbours that are asked for together are one read.
    classes: names; named: whether they are names, and not only numbers. targets (N,): the class of each image.
    bounds (shards + 1,): the index of each shard's first image. run: neighbours that a batch may take together.
    numbering: the output of the network for each of `classes`, where it is not the class's own number.
    """
    GAP = 64 << 10  # bytes that are read over rather than passed by
    READ = 16 << 20  # bytes of one read, but for a larger image
    OPEN = 128  # files that stay open

    def __init__(self, shards, transform=None):
        self.shards, self.transform, self.numbering = [str(shard) for shard in shards], transform, None
        folder = Path(self.shards[0]).parent
        index, scanned = read_index(folder, self.shards)
        self.classes, self.named, self.records = index.classes, index.named, index.records
        self.known = {name: i for i, name in enumerate(self.classes)}
        self.bounds = np.cumsum([0, *index.counts])
        self.targets = self.records["target"]
        self.run = run_length(self.targets)
        self.notes = [spread(f"{shown(folder.name)}/", self.classes, np.bincount(self.targets, minlength=len(self.classes)))]
        if scanned:
            self.notes.append(f"{shown(folder)} has no index: every shard ({len(self.shards)}) was read from header to header; "
                              f"{remedy(folder)} does it once")
        self.notes += [f"{shown(folder.name)}/ {text}" for text in left_out(index)]
        if self.run == 1:
            self.notes.append(f"{shown(folder)}: its shards were written class by class, so images are read one by one, at random; "
                              "shards in mixed order (python tools data shards) are read in runs")
        self.opened = None

    def __getstate__(self):
        return {**self.__dict__, "opened": None}

    def __len__(self):
        return len(self.records)

    def open(self, number):
        if self.opened is None:
            self.opened = functools.lru_cache(self.OPEN)(lambda number: OpenShard(self.shards[number]))
        return self.opened(number)

    def shard_of(self, index):
        return int(np.searchsorted(self.bounds, index, side="right")) - 1

    def pieces(self, indices):
        """The bytes of images and of their labels, each with its headers. -> {(index, 'image' or 'label'): bytes}"""
        wanted = sorted((self.shard_of(i), int(self.records[i][what]), int(self.records[i][f"{what}_bytes"]), i, what)
                        for i in set(indices) for what in ("image", "label"))
        groups, number, end, begin = [], None, 0, 0
        for part in wanted:
            shard, start, length = part[:3]
            if shard != number or start - end > self.GAP or start + length - begin > self.READ:
                groups.append([])
                number, begin, end = shard, start, start
            groups[-1].append(part)
            end = max(end, start + length)
        found = {}
        for group in groups:
            number, begin = group[0][:2]
            end = max(start + length for _, start, length, *_ in group)
            try:
                file = self.open(number)  # while it is named here, another thread cannot close it
                data = os.pread(file.fileno(), end - begin, begin)
            except READ_ERRORS as error:
                raise unreadable_in(self.shards[number], reason(error)) from error
            found |= {(i, what): data[start - begin:start - begin + length] for _, start, length, i, what in group}
        return found

    def member(self, index, what, piece):
        """-> name and content of the one member in a piece of a tar. Raises DataError where there is none."""
        length, shard = int(self.records[index][f"{what}_bytes"]), self.shards[self.shard_of(index)]
        try:
            if len(piece) < length:
                raise ValueError("it breaks off")
            member, start = tarfile.TarInfo.frombuf(piece[:BLOCK], "utf-8", "surrogateescape"), BLOCK
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):  # a long name's header stands before its own
                (_, _, member), *_ = members(BytesIO(piece + bytes(2 * BLOCK)), length + 2 * BLOCK)
                start = member.offset_data
            if not member.isreg() or member.issparse() or length - start != -(-member.size // BLOCK) * BLOCK:
                raise ValueError(f"{shown(member.name)} is not what its index says")
        except READ_ERRORS as error:
            near = shown(piece[:100].partition(b"\0")[0].decode(errors="replace"))
            why = reason(error) if type(error) is ValueError else f"the header at byte {self.records[index][what]}, '{near}', is damaged"
            raise unreadable_in(shard, why, f"write it again, or where it is whole its index: {remedy(Path(shard).parent)}") from error
        return member.name, piece[start:start + member.size]

    def decode(self, index, image, label):
        shard = self.shards[self.shard_of(index)]
        (image_name, image), (label_name, label) = self.member(index, "image", image), self.member(index, "label", label)
        (key, _), (label_key, kind) = split_name(image_name), split_name(label_name)
        try:
            target = number_of(read_label(kind, label), shown(label_name), self.known)
        except READ_ERRORS:
            target = None
        if label_key not in (key, first_key(key)) or target != self.targets[index]:
            why = f"{shown(image_name)} and {shown(label_name)} are not what its index says"
            raise unreadable_in(shard, why, remedy(Path(shard).parent))
        image = load_rgb(image, f"{shard}/{image_name}")
        target = target if self.numbering is None else self.numbering[target]
        return self.transform(image) if self.transform else image, target, index

    def readers(self, indices):
        """Read the bytes of a batch's images, neighbours at once. -> a function for each image that decodes it"""
        indices = [int(i) for i in indices]
        pieces = self.pieces(indices)
        return [functools.partial(self.decode, i, pieces[i, "image"], pieces[i, "label"]) for i in indices]

    def __getitems__(self, indices):
        """What a loader asks for a batch."""
        return [read() for read in self.readers(indices)]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def name(self, index):
        """Its shard and the name in it."""
        shard = self.shards[self.shard_of(int(index))]
        try:
            piece = self.pieces([int(index)])[int(index), "image"]
            return f"{shard}/{self.member(int(index), 'image', piece)[0]}"
        except DataError:
            return f"{shard}, image {int(index) - self.bounds[self.shard_of(int(index))]}"


def run_length(targets, most=8, inflation=1.25):
    """How many neighbours of a shard a batch may take together: 8, 4, 2 or 1.

    A run of k images stands for fewer than k random ones where neighbours share their class more often than random images do: the
    variance of a class's share of a batch grows by 1 + 2/k * sum over distances d of (k - d) * correlation(d). It may grow by a
    quarter at most. 1: the shards were written class by class.
    """
    chance = float(np.sum((np.bincount(targets) / len(targets)) ** 2))
    distances = range(1, min(most, len(targets)))
    same = [(float(np.mean(targets[d:] == targets[:-d])) - chance) / (1 - chance) if chance < 1 else 0.0 for d in distances]
    k = most
    while k > 1 and 1 + 2 / k * sum((k - d) * r for d, r in zip(distances, same) if d < k) > inflation:
        k //= 2
    return k


# ---- writing ----

KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # what every reader of shards knows


def stored(path):
    """An image file as it goes into a shard. -> its extension, its bytes, and the format that it was converted from, or None

    Other formats become PNG of what the training sees of them. Raises UnreadableImage.
    """
    kind = None
    try:
        with open_file(path) as file:
            data = file.read()
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            kind = image.format
    except READ_ERRORS:
        load_rgb(path)  # says what is wrong
        raise
    if kind in KEPT:
        return KEPT[kind], data, None
    png = BytesIO()
    load_rgb(data, path).save(png, "PNG")
    return "png", png.getvalue(), kind


def write(folder, samples, classes, maxcount=5000):
    """Images as tar shards of about the same size, at most maxcount each, in an order that mixes the classes, with their index.

    samples: [(path, class)]. folder: a new one. -> {format: images that were converted from it to PNG}
    """
    order, converted = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist(), {}
    parts = -(-len(order) // maxcount)
    folder.mkdir(parents=True)
    for part in range(parts):
        with open(folder / f"{part:06d}.tar", "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for i in order[len(order) * part // parts:len(order) * (part + 1) // parts]:
                    path, label = samples[i]
                    kind, data, origin = stored(path)
                    if origin:
                        converted[origin] = converted.get(origin, 0) + 1
                    for extension, content in ((kind, data), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{i:08d}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
    write_index(folder, classes)
    return converted
