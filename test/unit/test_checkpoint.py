"""What survives a crash: checkpoints are whole, plain, portable, and found again."""
import argparse
import contextlib
import hashlib
import io
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoint


def net(classes=3):
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 5))
    model.add_module("head", nn.Linear(5, classes))
    return model


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- save ----

def test_what_was_saved_is_read_again_with_weights_only(tmp_path):
    model = net()
    content = dict(model=model.state_dict(), epoch=3, best_accuracy=81.5, options={"lr": 5e-4, "crop_scale": (0.08, 1.0), "aa": None},
                   classes=["cat", "dog"], optimizer={"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"params": [0, 1]}]})
    checkpoint.save(tmp_path / "checkpoint.pth", **content)
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert equal(saved.pop("model"), content.pop("model")) and saved == content
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_a_checkpoint_holds_no_more_of_a_view_than_the_view(tmp_path):
    checkpoint.save(tmp_path / "view.pth", view=torch.arange(1_000_000.0)[10:13], nested=[torch.zeros(1_000_000)[:1]])
    assert (tmp_path / "view.pth").stat().st_size < 10_000
    assert torch.load(tmp_path / "view.pth", weights_only=True)["view"].tolist() == [10, 11, 12]


def test_a_checkpoint_holds_plain_tensors_without_a_gradient(tmp_path):
    checkpoint.save(tmp_path / "a.pth", weight=nn.Parameter(torch.ones(2)), result=torch.ones(2, requires_grad=True) * 2)
    saved = torch.load(tmp_path / "a.pth", weights_only=True)
    assert [type(saved[name]) for name in ("weight", "result")] == [torch.Tensor] * 2
    assert not saved["weight"].requires_grad and not saved["result"].requires_grad and saved["weight"].device.type == "cpu"


@pytest.mark.parametrize("where, error", [("torch.save", OSError("No space left on device")), ("torch.save", KeyboardInterrupt()),
                                          ("os.fsync", OSError("disk gone")), ("os.replace", PermissionError("no"))])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, error):
    checkpoint.save(tmp_path / "checkpoint.pth", epoch=1)
    before = files(tmp_path)

    def fail(*args):
        if where == "torch.save":
            args[1].write(b"half of a checkpoint")
        raise error

    module, _, name = where.partition(".")
    monkeypatch.setattr({"torch": torch, "os": os}[module], name, fail)
    with pytest.raises(type(error)):
        checkpoint.save(tmp_path / "checkpoint.pth", epoch=2)
    assert files(tmp_path) == before


# ---- read ----

LAYOUTS = {  # a state dict, as somebody publishes it
    "plain.pth": torch.save,
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "model.pth": lambda state, path: torch.save({"model": state}, path),
    "state_dict.pth.tar": lambda state, path: torch.save({"state_dict": state, "epoch": 1}, path),
    "original.pth": lambda state, path: torch.save({"model": state, "args": argparse.Namespace(lr=0.1, resume=""), "epoch": 9}, path),
    "weights.safetensors": save_file,
    "ddp.pth": lambda state, path: torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path),
    "compiled.pth": lambda state, path: torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path),
    "both.pth": lambda state, path: torch.save({f"module._orig_mod.{key}": value for key, value in state.items()}, path),
}


@pytest.mark.parametrize("name, write", LAYOUTS.items(), ids=LAYOUTS)
def test_each_published_layout_gives_the_same_weights(tmp_path, name, write):
    model, other = net(), net()
    write(model.state_dict(), tmp_path / name)
    checkpoint.load_weights(other, checkpoint.model_state(checkpoint.read(tmp_path / name), name), name)
    assert equal(other.state_dict(), model.state_dict())


def test_the_moving_average_is_found_where_ours_and_timm_keep_it():
    weights, average = {"a": torch.zeros(1)}, {"module.a": torch.ones(1)}
    for key in ("model_ema", "state_dict_ema"):
        assert checkpoint.model_state({"model": weights, key: average}, ema=True) == {"a": torch.ones(1)}


@pytest.mark.parametrize("content", [{"model": {"a": torch.zeros(1)}}, {"a": torch.zeros(1)}, {"model_ema": {}}, {"model_ema": None}, {},
                                     [1]], ids=str)
def test_a_file_without_a_moving_average_says_so(content):
    with pytest.raises(ValueError, match=r"^x\.pth holds no moving average: it was trained without --model-ema$"):
        checkpoint.model_state(content, "x.pth", ema=True)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def broken(kind, folder):
    """A file that is no checkpoint."""
    path = folder / ("weights.safetensors" if kind == "safetensors" else "checkpoint.pth")
    if kind == "a folder":
        path.mkdir()
    elif kind == "cut off":
        torch.save(net().state_dict(), path)
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "empty":
        path.touch()
    elif kind in ("text", "safetensors"):
        path.write_text("version https://git-lfs.github.com/spec/v1\n" * 20)
    elif kind == "a program":
        path.write_bytes(pickle.dumps({"model": Trap()}, protocol=2))
    elif kind == "a module":
        torch.save(net(), path)
    return path


@pytest.mark.parametrize("kind", ["missing", "a folder", "cut off", "empty", "text", "safetensors", "a program", "a module"])
def test_what_cannot_be_read_is_one_line_with_the_path(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = broken(kind, tmp_path)
    with pytest.raises(ValueError) as error:
        checkpoint.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not Path("sprung").exists()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A checkpoint like those of a run, in each format. -> {format: bytes}"""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "options": {"lr": 5e-4, "aa": None},
               "classes": ["cat", "dog"], "args": argparse.Namespace(lr=0.1)}
    written = {"safetensors": safetensors.torch.save(model.state_dict())}
    for kind, new in (("zip", True), ("old", False)):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=new)
        written[kind] = file.getvalue()
    path = tmp_path_factory.mktemp("ours") / "checkpoint.pth"
    checkpoint.save(path, **content)
    written["ours"] = path.read_bytes()
    return written


def damage(content, rng):
    """Cut off, or some bytes changed, zeroed, left out or repeated."""
    content, where, length = bytearray(content), rng.randrange(len(content)), rng.randint(1, 64)
    kind = rng.choice(["cut", "flip", "flip", "flips", "zeros", "hole", "twice"])
    if kind == "cut":
        del content[where:]
    elif kind == "zeros":
        content[where:where + length] = bytes(len(content[where:where + length]))
    elif kind == "hole":
        del content[where:where + length]
    elif kind == "twice":
        content[where:where] = content[where:where + length]
    else:
        for _ in range(1 if kind == "flip" else 8):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.filterwarnings("ignore")
def test_whatever_the_damage_a_checkpoint_of_ours_is_read_as_it_was_written_or_refused(tmp_path, healthy):
    """By its checksum: also where a number of a tensor has changed, which no reader of zips sees."""
    rng, path, changed = random.Random(0), tmp_path / "checkpoint.pth", 0
    path.write_bytes(healthy["ours"])
    whole = checkpoint.read(path)
    for number in range(600):
        content = damage(healthy["ours"], rng)
        path.write_bytes(content)
        changed += content != healthy["ours"]
        with contextlib.suppress(ValueError):
            found = checkpoint.read(path)
            assert equal(found["model"], whole["model"]) and found["options"] == whole["options"] and found["epoch"] == 3, number
    assert changed > 500
    content = bytearray(healthy["ours"])
    content[content.index(whole["model"]["body.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^cannot read the checkpoint {path} \(its SHA-256 is another than when it was written\): it is"):
        checkpoint.read(path)
    assert checkpoint.stage_of(path) == (3, 0)  # which looks at no tensor


def test_a_checkpoint_with_its_checksum_is_a_plain_file_of_torchs(tmp_path):
    checkpoint.save(tmp_path / "a.pth", model={"a": torch.arange(5.0)})
    for mapped in (False, True):
        assert torch.load(tmp_path / "a.pth", weights_only=True, mmap=mapped)["model"]["a"].tolist() == [0, 1, 2, 3, 4]
    with zipfile.ZipFile(tmp_path / "a.pth") as file:
        content = (tmp_path / "a.pth").read_bytes()
        assert file.testzip() is None
        assert file.comment.decode() == "sha256 " + hashlib.sha256(content[:-73] + bytes(2)).hexdigest()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_a_damaged_checkpoint_is_one_line_or_can_be_read_whatever_the_damage(tmp_path, healthy, kind):
    """A changed byte of a number is no error that a reader can see. Everything else is a ValueError."""
    rng, path, refused = random.Random(kind), tmp_path / f"checkpoint.{'safetensors' if kind == 'safetensors' else 'pth'}", 0
    path.write_bytes(healthy[kind])
    assert checkpoint.model_state(checkpoint.read(path)).keys() == net().state_dict().keys()
    for number in range(600):
        path.write_bytes(damage(healthy[kind], rng))
        try:
            checkpoint.read(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, number
    assert refused > 200


@pytest.mark.parametrize("error", [
    struct.error("unpack requires 8 bytes"), IndexError("pop from empty list"), AssertionError(), TypeError("x"), MemoryError(),
    OverflowError("large"), RecursionError("deep"), UnicodeDecodeError("utf-8", b"x", 0, 1, "no")], ids=lambda error: type(error).__name__)
def test_every_failure_of_a_reader_is_one_line_and_the_newest_gives_way(tmp_path, monkeypatch, error):
    last, best = put(tmp_path, checkpoint.LAST, 10, epoch=5), put(tmp_path, checkpoint.BEST, 99, epoch=2)
    whole = torch.load

    def fail(path, **kwargs):
        if path == last:
            raise error
        return whole(path, **kwargs)

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(ValueError, match=rf"^cannot read the checkpoint {last} \(.+\): it is damaged or no checkpoint$"):
        checkpoint.read(last)
    assert checkpoint.find_newest(tmp_path) == (best, {"epoch": 2})


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"model": {}}, {"model": {"a": 1}}, "weights", torch.ones(2)], ids=str)
def test_a_file_without_weights_is_refused_in_one_line(content):
    with pytest.raises(ValueError, match=r"x\.pth holds no weights: expected a state dict"):
        checkpoint.model_state(content, "x.pth")


# ---- load ----

def test_weights_of_another_model_name_the_missing_and_the_unexpected_keys():
    model, state = net(), net().state_dict()
    state["blocks.0.weight"] = state.pop("body.weight")
    with pytest.raises(ValueError) as error:
        checkpoint.load_weights(model, state, "other.pth")
    assert str(error.value) == ("other.pth does not fit: it is of another model (--model); missing keys: body.weight; "
                                "unexpected keys: blocks.0.weight")


def test_many_keys_are_named_by_the_first_and_their_number():
    model = nn.ModuleDict({f"part{i}": nn.Linear(1, 1, bias=False) for i in range(9)})
    with pytest.raises(ValueError, match=r"missing keys: part0.weight, part1.weight, part2.weight, part3.weight and 5 more"):
        checkpoint.load_weights(model, {"x": torch.ones(1)})


def test_another_number_of_classes_is_said_with_the_shapes_and_changes_nothing():
    model = net(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another number of classes; other shapes: head.weight \(7, 5\), not \(3, 5\), head.bias"):
        checkpoint.load_weights(model, net(7).state_dict(), "seven.pth")
    assert equal(model.state_dict(), before)


def test_a_head_of_another_number_of_classes_starts_anew_and_the_rest_is_loaded():
    model, saved = net(3), net(7).state_dict()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    state, classes = checkpoint.adapt_head(model, saved)
    checkpoint.load_weights(model, state)
    after = model.state_dict()
    assert classes == 7
    assert all(torch.equal(after[key], (own if key.startswith("head") else saved)[key]) for key in after)


def test_a_head_that_fits_is_loaded():
    saved = net(3).state_dict()
    assert checkpoint.adapt_head(net(3), saved) == (saved, None)


# ---- find ----

def put(folder, name, age, **content):
    """age: of the file, in seconds."""
    checkpoint.save(folder / name, **content)
    os.utime(folder / name, (1_000_000 - age, 1_000_000 - age))
    return folder / name


@pytest.mark.parametrize("last_epoch, best_epoch, expected", [
    (5, 2, "checkpoint.pth"), (5, 5, "checkpoint.pth"), (4, 5, "checkpoint_best.pth")])
def test_the_checkpoint_of_the_latest_epoch_is_found_whatever_the_files_times_say(tmp_path, last_epoch, best_epoch, expected):
    """A folder that was copied has any times; a best that is later than the last is one whose last could not be saved."""
    last, best = put(tmp_path, checkpoint.LAST, 10, epoch=last_epoch), put(tmp_path, checkpoint.BEST, 99, epoch=best_epoch)
    for times in ((1, 2), (2, 1)):
        os.utime(last, (times[0],) * 2)
        os.utime(best, (times[1],) * 2)
        path, content = checkpoint.find_newest(tmp_path)
        assert path.name == expected and content["epoch"] == max(last_epoch, best_epoch)


def test_a_damaged_newest_checkpoint_gives_way_to_the_next(tmp_path):
    last, best = put(tmp_path, checkpoint.LAST, 10, epoch=5), put(tmp_path, checkpoint.BEST, 99, epoch=2)
    last.write_bytes(last.read_bytes()[:200])
    assert checkpoint.find_newest(tmp_path) == (best, {"epoch": 2})
    best.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the checkpoint"):
        checkpoint.find_newest(tmp_path)


def test_the_newest_good_one_of_all_that_a_run_keeps_is_found_with_the_reason(tmp_path):
    names = ["checkpoint.pth", "checkpoint_0007.pth", "checkpoint_0006.pth", "checkpoint_0005_milestone.pth", "checkpoint_best.pth"]
    for epoch, name in zip((7, 7, 6, 5, 2), names):
        checkpoint.save(tmp_path / name, epoch=epoch, weight=torch.ones(9), progress={"updates": 4 if name == "checkpoint.pth" else 0})
    checkpoint.save(tmp_path / "checkpoint_mine.pth", epoch=99)  # nobody's
    for i, name in enumerate(names):
        said = []
        path, content = checkpoint.find_newest(tmp_path, said.append)
        assert (path.name, content["epoch"]) == (name, (7, 7, 6, 5, 2)[i]) and len(said) == i
        assert all(f"cannot read the checkpoint {tmp_path / bad} (" in text and text.endswith(f"; {name} is the newest good one")
                   for bad, text in zip(sorted(names[:i]), sorted(said)))
        damaged = bytearray(path.read_bytes())
        damaged[damaged.index(torch.ones(9).numpy().tobytes())] ^= 1
        path.write_bytes(damaged)
    with pytest.raises(ValueError, match="its SHA-256 is another"):
        checkpoint.find_newest(tmp_path)


def test_what_is_kept_of_an_earlier_run_is_moved_aside_and_what_is_damaged_is_not_overwritten(tmp_path):
    for name, epoch in (("checkpoint.pth", 4), ("checkpoint_0004.pth", 4), ("checkpoint_0006_milestone.pth", 6)):
        checkpoint.save(tmp_path / name, epoch=epoch, weight=torch.ones(9))
    assert checkpoint.prepare_folder(tmp_path, resumed=tmp_path / "checkpoint.pth", auto=True) == ["checkpoint_0006_milestone.pth.1"]
    assert checkpoint.prepare_folder(tmp_path) == ["checkpoint.pth.1", "checkpoint_0004.pth.1"]


def test_a_folder_without_a_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=rf"no checkpoint.pth in {tmp_path}"):
        checkpoint.find_newest(tmp_path)


# ---- the folder of a run ----

NAMES = ("checkpoint.pth", "checkpoint_best.pth", "log.txt")


def write_run(folder, which, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"{name} of {which}")
    return folder


def texts(folder):
    return {path.name: path.read_bytes().decode(errors="backslashreplace") for path in folder.iterdir()}


def test_a_new_run_moves_an_earlier_ones_files_to_the_next_free_number(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert checkpoint.prepare_folder(folder) == []
    for number in (1, 2):
        write_run(folder, f"run {number}")
        (folder / "notes").write_text("mine")
        assert checkpoint.prepare_folder(folder) == [f"checkpoint.pth.{number}", f"checkpoint_best.pth.{number}", f"log.txt.{number}"]
    assert texts(folder) == {f"{name}.{n}": f"{name} of run {n}" for name in NAMES for n in (1, 2)} | {"notes": "mine"}


@pytest.mark.parametrize("name", ["checkpoint.pth", "checkpoint_best.pth"])
@pytest.mark.parametrize("way", ["as given", "relative", "around", "a link"])
def test_a_run_that_goes_on_in_its_own_folder_moves_nothing(tmp_path, monkeypatch, name, way):
    folder = write_run(tmp_path / "run", "run 1")
    for file in ("checkpoint.pth", "checkpoint_best.pth"):
        checkpoint.save(folder / file, epoch=7)
    monkeypatch.chdir(tmp_path)
    if way == "a link":
        (tmp_path / "link").symlink_to(folder)
    given = {"as given": folder, "relative": Path("run"), "around": tmp_path / "run" / ".." / "run", "a link": tmp_path / "link"}[way]
    before = texts(folder)
    assert checkpoint.prepare_folder(folder, resumed=given / name) == []
    assert checkpoint.prepare_folder(given, resumed=folder / name) == []
    assert texts(folder) == before


def test_a_run_that_goes_on_in_another_runs_folder_moves_its_files_and_takes_its_best_along(tmp_path):
    mine, other = write_run(tmp_path / "mine", "mine"), write_run(tmp_path / "other", "other")
    assert checkpoint.prepare_folder(other, resumed=mine / "checkpoint.pth") == [f"{name}.1" for name in NAMES]
    assert texts(mine) == {name: f"{name} of mine" for name in NAMES}
    assert texts(other) == {f"{name}.1": f"{name} of other" for name in NAMES} | {"checkpoint_best.pth": "checkpoint_best.pth of mine"}


@pytest.mark.parametrize("names", [("checkpoint.pth",), ("checkpoint.pth", "checkpoint_best.pth")])
def test_a_run_that_goes_on_in_a_new_folder_takes_its_best_along_where_it_has_one(tmp_path, names):
    mine = write_run(tmp_path / "mine", "mine", names)
    assert checkpoint.prepare_folder(tmp_path / "new", resumed=mine / "checkpoint.pth") == []
    assert texts(tmp_path / "new") == {name: f"{name} of mine" for name in names if "best" in name}


def test_an_earlier_run_that_was_moved_aside_goes_on_without_a_loss(tmp_path):
    folder = write_run(tmp_path, "run 1")
    checkpoint.prepare_folder(folder)
    write_run(folder, "run 2")
    assert checkpoint.prepare_folder(folder, resumed=folder / "checkpoint.pth.1") == [f"{name}.2" for name in NAMES]
    kept = {f"{name}.{n}": f"{name} of run {n}" for name in NAMES for n in (1, 2)}
    assert {name: text for name, text in texts(folder).items() if name in kept} == kept
    assert texts(folder).get("checkpoint_best.pth", "checkpoint_best.pth of run 1") == "checkpoint_best.pth of run 1"


@pytest.mark.parametrize("resumed", [None, "elsewhere/checkpoint.pth"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, resumed):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"--output_dir {tmp_path}/file/run cannot be written \(Not a directory\): choose another"):
        checkpoint.prepare_folder(tmp_path / "file" / "run", resumed)


def test_going_back_to_an_older_best_keeps_the_later_last_checkpoint(tmp_path):
    """--resume out/checkpoint_best.pth --output_dir out, 27 epochs after it."""
    checkpoint.save(tmp_path / "checkpoint.pth", epoch=87)
    checkpoint.save(tmp_path / "checkpoint_best.pth", epoch=60)
    (tmp_path / "log.txt").write_text("88 rows")
    moved = checkpoint.prepare_folder(tmp_path, resumed=tmp_path / "checkpoint_best.pth")
    assert moved == ["checkpoint.pth.1", "checkpoint_best.pth.1", "log.txt.1"]
    epochs = {path.name: checkpoint.epoch_of(path) for path in tmp_path.glob("checkpoint*")}
    assert epochs == {"checkpoint.pth.1": 87, "checkpoint_best.pth.1": 60, "checkpoint_best.pth": 60}


def test_a_damaged_last_checkpoint_is_put_aside_where_the_best_goes_on(tmp_path):
    checkpoint.save(tmp_path / "checkpoint_best.pth", epoch=60)
    (tmp_path / "checkpoint.pth").write_bytes(b"half of it")
    assert checkpoint.prepare_folder(tmp_path, resumed=tmp_path / "checkpoint_best.pth", auto=True) == ["checkpoint.pth.1"]
    assert (tmp_path / "checkpoint.pth.1").read_bytes() == b"half of it"
