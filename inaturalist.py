"""Which images does iNaturalist have, and of which species? From its own JSON files, which are trusted with nothing."""
import json
import os
from pathlib import Path

import numpy as np

from decode import READ_ERRORS, open_file, reason
from folders import PathList, spread
from utils import shown


def read(root, is_train, year, category):
    """-> PathList, labels (int64), class names, [what a log should say]. A class is what `category` says of the species.

    Classes are numbered as upstream numbers them: by their first annotation in the training file. Raises ValueError for a
    file that is not there or not right, with the entry.
    """
    levels = {}
    for number, level in rows("categories.json", load(root, "categories.json", year), {"id": whole, category: text}):
        if levels.setdefault(number, level) != level:
            raise ValueError(f"categories.json has two entries of the id {number}")

    def annotations(name, content):
        """{image id: class}, in the file's order"""
        found = {}
        for species, image in rows(name, content, {"category_id": whole, "image_id": key}, "annotations"):
            if species not in levels:
                raise ValueError(f"{name}: categories.json has no category_id {species}")
            if found.setdefault(image, levels[species]) != levels[species]:
                raise ValueError(f"{name}: the image_id {shown(image)} has two classes")
        return found

    name = f"train{year}.json"
    content = load(root, name, year)
    known = annotations(name, content)
    classes = list(dict.fromkeys(known.values()))
    numbers = {level: i for i, level in enumerate(classes)}
    if not is_train:
        name = f"val{year}.json"
        content = load(root, name, year)
        known = annotations(name, content)
    paths, labels = [], []
    for image, file_name in rows(name, content, {"id": key, "file_name": inner_path}, "images"):
        if image not in known:
            raise ValueError(f"{name}: the image {shown(image)} has no annotation")
        if known[image] not in numbers:
            raise ValueError(f"{name}: train{year}.json has no image of the class {shown(known[image])}")
        paths.append(find(root, file_name))
        labels.append(numbers[known[image]])
    if not paths:
        raise ValueError(f"{name} has no images")
    labels = np.array(labels, dtype=np.int64)
    return PathList(paths), labels, classes, [spread(name, classes, np.bincount(labels, minlength=len(classes)))]


def load(root, name, year):
    try:
        with open_file(root / name) as file:
            return json.load(file)
    except READ_ERRORS as error:
        raise ValueError(f"cannot read {name} ({reason(error)}): iNaturalist {year} needs train{year}.json, val{year}.json and "
                         "categories.json") from error


def rows(name, content, columns, part=None):
    """The values of the columns {key: its kind} for each entry of content's list `part`, or of content that is the list."""
    found = content if part is None else content.get(part) if isinstance(content, dict) else None
    where = f" of {part}" if part else ""
    if not isinstance(found, list):
        raise ValueError(f"{name} has no list{where}: it is not iNaturalist's")
    for i, entry in enumerate(found):
        for column, kind in columns.items():
            if not isinstance(entry, dict) or not kind(entry.get(column)):
                raise ValueError(f"{name}: entry {i}{where} has no {column} that is {KINDS[kind]}")
        yield [entry[column] for column in columns]


def whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def key(value):
    return whole(value) or text(value)


def text(value):
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def inner_path(value):
    return text(value) and "\0" not in value and not os.path.isabs(value) and ".." not in Path(value).parts


KINDS = {whole: "a whole number", key: "a number or a text", text: "a text", inner_path: "a path inside the data set"}


def find(root, file_name):
    """The archive's path, or upstream's, which leaves out the super-category."""
    path, parts = root / file_name, Path(file_name).parts
    if len(parts) == 4 and not os.path.isdir(root / parts[0] / parts[1]):
        path = root / parts[0] / parts[2] / parts[3]
    return str(path)
