"""Whose labels are these? Which output of a network stands for which class of the data.

Names are what two of data, weights, teacher, shards and reports have in common; a number means nothing between them. They
are compared in Unicode's form NFC. Where two meet, `decide` takes the first that holds:

1. --class-map FILE says which output a name is. It contradicts the names of weights: an error (a new head in fine-tuning).
2. Labels that are only numbers (shards without names) are known by number. Where they meet names in another order, as 2 the
   folder '2' that is the fifth of 0, 1, 10, 11, 2: an error, and in fine-tuning a new head.
3. The weights name their outputs (our checkpoints do). All of the data's names are among them: labels follow the weights'
   outputs by name. The same names in the same order: silently. In another order, or only some of them: said. Fewer names
   than outputs can be evaluated, over all outputs; fine-tuning gives them a new head. Some name is not among them: an error,
   and in fine-tuning a new head, even where the number fits.
4. ImageNet: weights that name nothing but have as many outputs as one of ImageNet's sets (1000: ImageNet-1k) have its outputs
   where all of the data's names are its synsets (n01440764): by name, as in 3. Names that are numbers (ImageNet-V2's 0 to 999;
   some of them, but not 0 to 9, which are anything's) are ImageNet-1k's own numbers where the weights have 1,000 outputs that
   are not named, or named by synsets: said.
5. The weights name nothing, and have as many outputs as the data classes: a guess. Where the ways in which the usual loaders
   number names agree (torchvision: as strings; timm: numbers by value and without case), or a file says the data's order
   (--class-map, numbers in shards), the outputs are the data's classes in their order: said. Where they differ (0, 1, 10, 2),
   or the number of outputs is ImageNet's: an error for an evaluation and for a teacher, whose numbers would be wrong without a
   sign; a note where the head goes on learning.
6. Anything else has another number of outputs, or no head: an error, and in fine-tuning a new head.
"""
import csv
import json
import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from utils import shown

REMEDY = "say which output is which class with --class-map FILE (one name a line, in the order of the outputs)"
EVALUATED = ("evaluate", "teacher")  # nothing learns what a wrong order means


def normal(name):
    """The form in which two names are compared: file systems write é in one or in two code points."""
    return unicodedata.normalize("NFC", name)


@dataclass
class Weights:
    """What weights say of their outputs. names: by output, None: nothing; outputs: how many, 0 without a head, None where it
    is not known."""
    source: str
    outputs: int | None = None
    names: list | None = None
    named: bool = True  # False: the names are only numbers, of shards without names

    def __post_init__(self):
        self.names = list(self.names) if self.names else None  # timm's label_names are a tuple


@dataclass
class Numbering:
    """Which output is which class. names: by output; index: {normal(name): output}; fresh: the weights' head does not fit and
    starts anew; notes: what a user should know; named: the names are more than numbers."""
    names: list
    index: dict
    fresh: bool = False
    notes: list = field(default_factory=list)
    named: bool = True

    def of(self, classes):
        """The outputs of a data set's classes, by their number there. None: they are its own numbers."""
        unknown = [name for name in classes if normal(name) not in self.index]
        if unknown:
            raise ValueError(f"the classes {some(unknown)} of the data are not known: {REMEDY}")
        found = [self.index[normal(name)] for name in classes]
        return None if found == list(range(len(found))) else found


def short(text, quote=repr):
    return quote(text if len(text) <= 60 else text[:59] + "\u2026")


def some(names, count=3, beside=()):
    """A few names for a message: in one line, and with escapes where two of them, or one of `beside`, look alike."""
    looks = [unicodedata.normalize("NFKC", name).casefold().strip() for name in [*names, *beside]]
    quote = ascii if len(set(looks)) < len(looks) else repr
    return f"[{', '.join(short(name, quote) for name in names[:count])}{', ...' if len(names) > count else ''}]"


def named_in(content):
    """The class names that a checkpoint records: ours as `classes`, others as `class_to_idx`. None where it has none."""
    content = content if isinstance(content, dict) else {}
    names = content.get("classes")
    if names is None and isinstance(by_name := content.get("class_to_idx"), dict) and by_name and all(
            type(index) is int for index in by_name.values()) and sorted(by_name.values()) == list(range(len(by_name))):
        names = sorted(by_name, key=by_name.get)
    good = isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names)
    return list(names) if good else None


def of_file(source, content, outputs):
    """The Weights of a checkpoint, from what `checkpoint.read` returned."""
    return Weights(shown(source), outputs, named_in(content), not isinstance(content, dict) or content.get("named") is not False)


def imagenet(outputs):
    """The synsets of the ImageNet set with so many classes, in the order that published weights have. None where there is none."""
    subset = infer_imagenet_subset({"num_classes": outputs})
    return ImageNetInfo(subset).label_names() if subset else None


def numbers(names):
    """The names as numbers, None where some name is none or two are the same number."""
    found = [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 10]
    return found if len(found) == len(names) == len(set(found)) else None


def natural(name):
    """timm's order of class folders: numbers by value, letters without case."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def ambiguous(names):
    """Whether weights that were trained on such folders may number them in another order."""
    return list(names) == sorted(names) != sorted(names, key=natural)


def decide(data, weights=None, class_map=None, use="train", stated=False, named=True):
    """The numbering of the data's classes, given in their order, for `use`: train, finetune, resume, evaluate, measure or teacher.

    weights: a Weights, None without; class_map: as read_class_map gives it; stated: a file says the data's order; named: the
    data's names are more than numbers.
    Raises ValueError, in one line with the remedy.
    """
    data = list(data)
    index = {normal(name): i for i, name in enumerate(data)}
    if len(index) < len(data):
        twice = [name for i, name in enumerate(data) if index[normal(name)] != i or data.count(name) > 1]
        same = [name for name in data if normal(name) == normal(twice[0])]
        raise ValueError(f"two classes have the same name, {some(same)}: rename one of them")
    if class_map is not None:
        return by_map(data, weights, class_map, use)
    if weights is None:
        return Numbering(data, index, named=named)
    if weights.outputs == 0 and (use == "finetune" or not weights.names):
        return headless(data, index, weights, use, named)
    if weights.outputs == 0:  # it has a head for its classes, by another name: of another model, which is said where it does not fit
        weights = replace(weights, outputs=None)
    names, guessed = weights.names, None
    if names is None and weights.outputs:
        guessed = imagenet(weights.outputs)
        names = guessed if guessed and set(index) <= set(guessed) else None
    by_number = numbers(data)
    own = by_number and len(data) < 1000 and max(by_number) == len(data) - 1  # 0 to 9 may be anything's
    if by_number and not own and weights.outputs in (1000, None) and max(by_number) < 1000:
        synsets = imagenet(1000)
        if (names is None and weights.outputs) or sorted(names or ()) == sorted(synsets):
            at = {name: i for i, name in enumerate(names or synsets)}
            found = Numbering(names or synsets, {normal(name): at[synsets[i]] for name, i in zip(data, by_number)})
            found.notes.append(f"{weights.source}: 1000 outputs, taken for ImageNet-1k's in its order, and the data's class names for "
                               "its numbers; --class-map FILE says otherwise")
            return fit(found, data, weights, use)
    if weights.names is not None and named != weights.named and data != weights.names[:len(data)]:
        who = f"{weights.source} names its classes, {some(weights.names)}, and the data's labels are numbers only" if weights.named else (
            f"the data name their classes, {some(data)}, and {weights.source} was trained on numbers only")
        if use == "finetune":
            return Numbering(data, index, True, [f"{who}, so the head starts anew"], named)
        raise ValueError(f"{who}: {REMEDY}")
    if names is not None:
        found = by_name(data, index, names, weights, use)
        found.named = named or (weights.named and not found.fresh)
        return found
    if weights.outputs not in (None, len(data)):
        if use == "finetune":
            return Numbering(data, index, True, [
                f"{weights.source}: its head has {weights.outputs} classes and the data {len(data)}, so the head starts anew"], named)
        remedy = "take a teacher of these classes: --teacher-path FILE" if use == "teacher" else REMEDY
        raise ValueError(f"{weights.source} was trained on another number of classes: it has {weights.outputs} outputs without names, and "
                         f"the data {len(data)} classes, {some(data)}: {remedy}")
    unsaid = f"{weights.source} does not say what its {len(data)} outputs are"
    if use in EVALUATED and guessed:
        raise ValueError(f"{unsaid}, and the data's classes, {some(data)}, are not ImageNet's synsets or numbers: {REMEDY}")
    if use in EVALUATED and ambiguous(data) and not stated:
        raise ValueError(f"{unsaid}, and the data's classes have two orders, {some(sorted(data), 4)} and "
                         f"{some(sorted(data, key=natural), 4)}: {REMEDY}")
    return Numbering(data, index, False, [
        f"{unsaid}: taken for the data's classes in their order, {some(data)}; --class-map FILE says otherwise"], named)


def headless(data, index, weights, use, named):
    if use != "finetune":
        raise ValueError(f"{weights.source} has no head, so it tells no classes: --finetune it first")
    return Numbering(data, index, True, [f"{weights.source} has no head: a new one starts"], named)


def by_name(data, index, names, weights, use):
    at = {normal(name): i for i, name in reversed(list(enumerate(names)))}
    missing = [name for name in data if normal(name) not in at]
    if missing or (weights.outputs not in (None, len(names)) and use != "finetune"):
        if use == "finetune":
            count = f"{len(names)} classes and the data {len(data)}" if len(names) != len(data) else (
                f"other classes than the data, which have {some(missing)}")
            return Numbering(data, index, True, [f"{weights.source}: its head has {count}, so the head starts anew"])
        if not missing:
            raise ValueError(f"{weights.source} names {len(names)} classes and has {weights.outputs} outputs: {REMEDY}")
        only_there = [name for name in names if normal(name) not in index]
        remedy = "take a teacher of these classes" if use == "teacher" else "use its data, --finetune, or --class-map FILE"
        raise ValueError(f"{weights.source} was trained on other classes: {len(names)} and the data {len(data)}, only there "
                         f"{some(only_there, beside=missing)}, only here {some(missing, beside=only_there)}: {remedy}")
    found = Numbering(list(names), {normal(name): at[normal(name)] for name in data})
    if len(names) == len(data) and found.of(data) is not None:
        found.notes.append(f"{weights.source} has the data's classes in another order, {some(list(names))}: labels follow it, by name")
    return fit(found, data, weights, use)


def fit(found, data, weights, use):
    """Fewer classes than outputs: evaluated over all outputs, and fine-tuned with a new head."""
    outputs = len(found.names)
    if len(data) == outputs:
        return found
    if use == "finetune":
        return Numbering(list(data), {normal(name): i for i, name in enumerate(data)}, True, [
            f"{weights.source}: its head has {outputs} classes and the data {len(data)}, so the head starts anew"])
    if use == "resume":
        raise ValueError(f"{weights.source} was trained on other classes: {outputs} and the data {len(data)}, only there "
                         f"{some([name for i, name in enumerate(found.names) if i not in found.index.values()])}, only here []: "
                         "use its data, its --class-map FILE, or --finetune")
    if use == "teacher":
        found.notes.append(f"{weights.source}: of its {outputs} outputs the {len(data)} of the data's classes teach, by name")
    if use == "evaluate":
        found.notes.append(f"the data have {len(data)} of the {outputs} classes of {weights.source}: accuracy is over all outputs")
    return found


def by_map(data, weights, class_map, use):
    """Names by --class-map. A network that starts here has as many outputs as the file names."""
    index = {normal(name): i for name, i in class_map.items()}
    missing = [name for name in data if normal(name) not in index]
    if missing:
        raise ValueError(f"--class-map does not name {len(missing)} of the data's {len(data)} classes, {some(missing)} (it names "
                         f"{some(list(class_map))}): add them, or leave their images out")
    outputs = max(index.values()) + 1
    starts = use in ("train", "finetune")
    gaps = sorted(set(range(outputs)) - set(index.values()))
    if starts and gaps:
        raise ValueError(f"--class-map names no class number {gaps[0]}: to train, it needs every number from 0 to {outputs - 1}")
    if not starts and weights and weights.outputs:
        if outputs > weights.outputs:
            raise ValueError(f"--class-map names class number {outputs - 1}, and {weights.source} has {weights.outputs} outputs: "
                             "take the class map that the weights were trained with")
        outputs = weights.outputs
    known = weights.names if weights else None
    names = [f"output {i}" for i in range(outputs)]
    for i, name in enumerate(known or ()):
        if i < outputs:
            names[i] = name
    for name, i in reversed(class_map.items()):
        if known is None or starts:
            names[i] = name
    found = Numbering(names, {normal(name): index[normal(name)] for name in data})
    at = {normal(name): i for i, name in enumerate(known or ())}
    other = [name for name in data if at.get(normal(name), index[normal(name)]) != index[normal(name)]]
    if other and not starts:
        raise ValueError(f"--class-map says that {short(other[0])} is number {index[normal(other[0])]}, and {weights.source} that it is "
                         f"number {at[normal(other[0])]}: leave --class-map out, or take the right file")
    if starts and weights:
        own = len(known) if known else weights.outputs
        if own not in (None, outputs) or (known and [normal(name) for name in known] != [normal(name) for name in names]):
            what = f"{own} classes and --class-map {outputs}" if own != outputs else "other classes than --class-map, or another order"
            found.fresh = True
            found.notes.append(f"{weights.source}: its head has {what}, so the head starts anew" if own else headless(
                data, index, weights, use, True).notes[0])
    rest = outputs - len({*found.index.values()})
    if rest and use == "evaluate":
        found.notes.append(f"the data have {outputs - rest} of {outputs} classes: accuracy is over all {outputs} outputs")
    elif rest and starts:
        found.notes.append(f"--class-map names {outputs} classes, and the training images are of {outputs - rest}")
    return found


def compare(train, val, path, class_map=None, named=(True, True)):
    """ValueError where the validation images are of other classes. A class that none of them is of needs --class-map, which
    says that it is no mistake. named: whether each split's names are more than numbers."""
    in_train, in_val = ({normal(name) for name in names} for names in (train, val))
    missing, unknown = [name for name in train if normal(name) not in in_val], [name for name in val if normal(name) not in in_train]
    if unknown or (missing and class_map is None):
        a, b = some(sorted(missing), beside=unknown), some(sorted(unknown), beside=missing)
        remedy = "make the folders agree" if unknown else "make the folders agree, or list all classes in --class-map FILE"
        raise ValueError(f"--data-path {shown(path)}: train/ has {len(train)} classes and val/ {len(val)}, and they differ: "
                         f"only in train {a}, only in val {b}: {remedy}")
    if named[0] != named[1] and list(train) != list(val) and class_map is None:
        raise ValueError(f"--data-path {shown(path)}: {'val' if named[0] else 'train'}/ has labels that are numbers only, and "
                         f"{'train' if named[0] else 'val'}/ has names in another order: write the names into index.json, or {REMEDY}")


def read_class_map(path):
    """{name: output} of a file. .txt: timm's, one name a line, in the order of the outputs. .csv: name,number in each row.
    .json: {name: number}, [names in order], or {number: name or [name, ...]}. Raises ValueError, in one line."""
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".txt", ".csv", ".json"):
        why = "a pickle can run anything; write its names as text" if kind in (".pkl", ".pickle") else "its ending says no format"
        raise ValueError(f"--class-map {shown(path)}: {why}: take .txt (one name a line, in order), .csv (name,number) or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")
        pairs = {".txt": from_lines, ".csv": from_rows, ".json": from_json}[kind](text)
    except OSError as error:
        raise ValueError(f"--class-map {shown(path)}: cannot be read ({error.strerror})") from error
    except (UnicodeError, csv.Error, RecursionError, TypeError, AttributeError, ValueError) as error:
        reason = "it is no UTF-8" if isinstance(error, UnicodeError) else str(error).splitlines()[0]
        raise ValueError(f"--class-map {shown(path)}: {reason}: take .txt (one name a line, in order), .csv (name,number) or "
                         ".json") from error
    found = {}
    for name, number in pairs:
        if not name or number < 0 or number >= 10**6:
            raise ValueError(f"--class-map {shown(path)}: the class {short(name)} has the number {short(str(number), str)}: names and "
                             "numbers from 0 are needed")
        if normal(name) in found and found[normal(name)] != number:
            raise ValueError(f"--class-map {shown(path)}: the class {short(name)} has two numbers, {found[normal(name)]} and {number}")
        found[normal(name)] = number
    if not found:
        raise ValueError(f"--class-map {shown(path)}: it is empty")
    return found


def from_lines(text):
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if "" in lines and lines != [""]:
        raise ValueError(f"line {lines.index('') + 1} is empty")
    return [(name, i) for i, name in enumerate(lines) if name]


def from_rows(text):
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    if rows and len(rows[0]) == 2 and numbers(rows[0][1:]) is None:
        del rows[0]  # a header
    wrong = next((row for row in rows if len(row) != 2 or numbers(row[1:]) is None), None)
    if wrong is not None:
        raise ValueError(f"the row {short(','.join(wrong))} is not name,number")
    return [(name, int(number)) for name, number in rows]


def unrepeated(pairs):
    """json takes the last of two without a word."""
    found = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"{short(key)} is there twice, as {short(str(found[key]))} and as {short(str(value))}")
    return found


def from_json(text):
    content = json.loads(text, object_pairs_hook=unrepeated)
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return [(name, i) for i, name in enumerate(content)]
    if isinstance(content, dict):
        if all(type(number) is int for number in content.values()):
            return list(content.items())
        by_number = [(value[0] if isinstance(value, list) and value else value, key) for key, value in content.items()]
        if numbers(list(content)) and all(isinstance(name, str) for name, _ in by_number):
            return [(name, int(number)) for name, number in by_number]
    raise ValueError("the JSON is neither {name: number}, [names] nor {number: name}")
