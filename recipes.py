"""Which recipes are there, what does one say, and which known run is nearest to this one?

A recipe is a file in recipes/, or anybody's: `lr = 5e-4`, one option a line, under the options' own names. It opens with its command,
its result and source, and what it takes; its table [published] says the numbers once more, for `nearest` and `doubts`.
"""
import contextlib
import difflib
import json
import os
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import utils

FOLDER = Path(__file__).resolve().parent / "recipes"
SAVED = "recipe.toml"  # what a run leaves in its folder
LARGEST = 2**20  # bytes
# What one command does, not how a network is trained: no part of a recipe
OF_A_COMMAND = frozenset(("recipe", "resume", "eval", "no_eval", "throughout", "verify_resume", "world_size", "dist_url", "allow_change",
                          "start_epoch"))
# Where this is done: a recipe may say it, the one that a run leaves does not
OF_A_PLACE = frozenset(("data_path", "output_dir", "device", "predictions", "max_step"))


def names():
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def normal(word):
    """An option's or a recipe's name as this program spells it."""
    return word.strip().replace("-", "_")


def find(word):
    """The file of a recipe's name, or of a path. Raises ValueError with the nearest name."""
    if normal(word) in names():
        return FOLDER / f"{normal(word)}.toml"
    if os.path.isfile(word):
        return Path(word)
    if "/" in word or word.endswith(".toml"):
        raise ValueError(f"--recipe {word}: there is no such file")
    nearest = difflib.get_close_matches(normal(word), names(), 1, cutoff=0)
    raise ValueError(f"--recipe {word}: no such recipe: did you mean {nearest[0]}? There are {', '.join(names())}, and files of your own")


def read(word, spellings, kinds):
    """-> {option: value} and the table [published], {} without one.

    spellings: {name, with underscores: option}. kinds: {option: (type, choices or None)}; a type is bool for a switch, int, float,
    str, or tuple for a list of numbers. Raises ValueError: one line with the file, the key and the remedy.
    """
    path = find(word)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("it is larger than a recipe can be")
        content = tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"--recipe {utils.shown(path)}: {reason}: a recipe has lines such as lr = 5e-4 and aa = \"none\"") from error
    published, found = content.pop("published", {}), {}
    for key, value in content.items():
        where, option = f"--recipe {utils.shown(path)}: {utils.shown(key)}", spellings.get(normal(key))
        if option is None:
            nearest = difflib.get_close_matches(normal(key), spellings, 1, cutoff=0)[0]
            raise ValueError(f"{where} is no option: did you mean {nearest}?")
        if option in OF_A_COMMAND:
            raise ValueError(f"{where} belongs to one command, not to a recipe: give it as --{option.replace('_', '-')}")
        if option in found:
            raise ValueError(f"{where} is said twice, in two spellings")
        found[option] = taken(value, *kinds[option], where)
    return found, published if isinstance(published, dict) else {}


def taken(value, kind, choices, where):
    """`value` of a TOML file as an option has it. ValueError for another type."""
    def number(x):
        return isinstance(x, (int, float)) and not isinstance(x, bool)

    right, wanted = {
        bool: (isinstance(value, bool), "true or false"), int: (number(value) and isinstance(value, int), "a whole number"),
        float: (number(value), "a number"), str: (isinstance(value, str), 'a text, "so"'),
        tuple: (number(value) or (isinstance(value, list) and bool(value) and all(map(number, value))), "numbers, [0.9, 0.999]")}[kind]
    if not right:
        raise ValueError(f"{where} is {utils.shown(json.dumps(value, default=str))[:60]}, and must be {wanted}")
    if choices and value not in choices:
        raise ValueError(f"{where} is {utils.shown(json.dumps(value))[:60]}, and must be one of {', '.join(choices)}")
    try:
        return tuple(map(float, value if isinstance(value, list) else [value])) if kind is tuple else kind(value)
    except OverflowError:
        raise ValueError(f"{where} is too large a number") from None


def text(values, groups, title):
    """A recipe file that says all of `values` again. groups: {heading: options}; title: lines for its head."""
    lines = [f"# {line}".rstrip() for line in title.splitlines()]
    for heading, options in groups.items():
        told = [f"{name} = {literal(values[name])}" for name in options
                if name not in OF_A_COMMAND | OF_A_PLACE and values.get(name) is not None]
        lines += ["", f"# {heading}", *told] if told else []
    return "\n".join(lines) + "\n"


def literal(value):
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's words are TOML's, but for DEL


def said(text):
    """The lines of a recipe that are no comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def save(folder, written):
    """The recipe in the folder of its run, whole or not at all. Raises ValueError where it cannot be written.

    One that says the same stays. One that says something else is that of the run before it went on: it stays as recipe.toml.1, ...
    """
    path = Path(folder) / SAVED
    try:
        if path.exists():
            if said(path.read_text(errors="replace")) == said(written):
                return
            number = next(n for n in range(1, 10**6) if not Path(f"{path}.{n}").exists())
            with utils.replacing(f"{path}.{number}") as file:
                file.write(path.read_bytes())
        with utils.replacing(path) as file:
            file.write(written.encode(errors="replace"))
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}): choose another --output_dir") from error


@dataclass(frozen=True)
class Run:
    """What decides how a training goes: of one that is known, or of this one.

    options: {name: value} of those that change it. batch: images of an update. rate: the highest learning rate. images, classes: of
    the training set. weights: whether it starts from some.
    """
    options: dict
    batch: int
    rate: float
    images: int
    classes: int
    weights: bool
    name: str = ""
    said: str = ""

    def __post_init__(self):
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        object.__setattr__(self, "options", plain)

    def differences(self, other):
        """In words, what this run has another of than `other`."""
        pairs = [("global batch", self.batch, other.batch), ("highest rate", f"{self.rate:.6g}", f"{other.rate:.6g}"),
                 *((name.replace("_", "-"), self.options[name], other.options[name]) for name in self.options)]
        found = [f"{name} {told(mine)} instead of {told(theirs)}" for name, mine, theirs in pairs if mine != theirs]
        if self.weights != other.weights:
            found.append("it starts from weights" if self.weights else "it starts from nothing")
        if (self.images, self.classes) != (other.images, other.classes):
            found.append(f"{self.images:,} images of {self.classes:,} classes instead of {other.images:,} of {other.classes:,}")
        return found


def known(read, defaults, compared, rate):
    """-> the Runs of the recipes that say in [published] what came of them.

    A file that is wrong or half a recipe is not among them: whoever asks for it is told. read(name) -> as `read`.
    compared: the options that change how a training goes. rate(options, batch) -> the highest learning rate.
    """
    found = []
    for name in names():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values, published = read(name)
            options = {**defaults, **values}
            batch = options["batch_size"] * options["accum_steps"] * published["cards"]
            found.append(Run({key: options[key] for key in compared}, batch, rate(options, batch), published["images"],
                             published["classes"], published.get("weights", False), name, published["said"]))
    return found


def told(value):
    return "nothing" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else value


def nearest(run, known, most=6):
    """One line: which of the `known` runs this one is, or the nearest one and what is different of it. The same model comes first."""
    def distance(other):
        return run.options["model"] != other.options["model"], run.weights != other.weights, len(run.differences(other))

    if not known:
        return "No run is known to compare this one with: no file in recipes/ says what came of it"
    other = min(known, key=distance)
    found = run.differences(other)
    if not found:
        return f"This run is {other.name}: {other.said}"
    more = f", and {len(found) - most} more" if len(found) > most else ""
    return f"The nearest known run is {other.name}: {other.said}. This one differs: {', '.join(found[:most])}{more}"


def doubts(run, known, far=2, small=8):
    """One line for a batch or a rate that is far from all that are known to train with this optimizer: of those that start as it does,
    or, for one that starts from weights, of all. far: so many times the largest; small: so many times below the smallest."""
    alike = [other for other in known if other.options["opt"] == run.options["opt"] and (run.weights or not other.weights)]
    found = []
    for what, own, values in (("global batch", run.batch, {other.batch: other for other in alike}),
                              ("highest rate", run.rate, {other.rate: other for other in alike})):
        if values and own >= far * max(values):
            side = max(values)
        elif values and own * small <= min(values):
            side = min(values)
        else:
            continue
        found.append(f"the {what}, {own:g}, is far from what is known to train with {run.options['opt']}: the "
                     f"{'largest' if own > side else 'smallest'} is {side:g} ({values[side].name})")
        if what == "global batch" and own > side and run.options["opt"] == "adamw":
            found[-1] += ("; with 2048 an upstream user's Twins-SVT-S came to 81.1 % instead of 81.7 % "
                          "(github.com/Meituan-AutoML/Twins/issues/20)")
    return found
