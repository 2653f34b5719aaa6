"""What a checkpoint was trained with, and what a resume would change of it: said, or refused."""
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import datasets
import manifest
import shards
from folders import PathList
from tools.data import write_shards


def images(folder):
    return datasets.build_dataset(True, folder)[0]


def test_the_fingerprint_is_of_names_and_sizes_wherever_the_folder_lies(tiny_folder, tmp_path, monkeypatch):
    found = manifest.fingerprint(images(tiny_folder), tiny_folder)
    paths = sorted((tiny_folder / "train").glob("*/*"))
    assert (found["images"], found["bytes"]) == (24, sum(path.stat().st_size for path in paths))
    sizes = " ".join(str(path.stat().st_size) for path in paths)
    assert found["sizes"] == hashlib.sha256(sizes.encode()).hexdigest()[:16]
    copied = shutil.copytree(tiny_folder, tmp_path / "train" / "train")  # a root whose name comes again below it
    monkeypatch.chdir(copied.parent)
    for root in (copied, Path("train"), "./train/", f"{copied}/"):
        assert manifest.fingerprint(images(root), root) == found


def test_a_name_and_a_size_each_make_other_data(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "data")
    first = manifest.fingerprint(images(folder), folder)
    path = folder / "train" / "leaves" / "03.png"
    path.write_bytes(path.read_bytes() + b"\0")
    size = manifest.fingerprint(images(folder), folder)
    path.rename(path.with_name("3.png"))
    name = manifest.fingerprint(images(folder), folder)
    path.with_name("3.png").unlink()
    fewer = manifest.fingerprint(images(folder), folder)
    assert manifest.other_data(first, first) is None
    assert manifest.other_data(first, size) == (
        f"the same names, but other files: {first['bytes']} bytes then and {first['bytes'] + 1} now")
    assert manifest.other_data(size, name) == "24 images as then, with other names"
    assert manifest.other_data(name, fewer) == "24 images then and 23 now"


def test_a_path_that_ends_elsewhere_is_another_name(tmp_path):
    found = [manifest.digest(*manifest.below(PathList(f"/r/{name}" for name in names), "/r")) for names in (("ab", "c"), ("a", "bc"))]
    assert found[0] != found[1]


def test_of_many_files_the_sizes_of_some_are_asked_for(tmp_path, monkeypatch):
    class Images:
        def __init__(self, count):
            self.names = PathList(f"/r/{i}" for i in range(count))

        def __len__(self):
            return len(self.names)

    asked = []
    monkeypatch.setattr(manifest, "SIZES", 100)
    monkeypatch.setattr(manifest, "size", lambda file: asked.append(file) or 1)
    for count, times in ((0, 0), (1, 1), (100, 100), (101, 51), (1000, 100), (1001, 91)):
        asked.clear()
        assert manifest.fingerprint(Images(count), "/r")["bytes"] == len(asked) == times


def test_shards_are_known_by_their_files(tiny_folder, tmp_path):
    write_shards(tiny_folder, tmp_path / "shards", maxcount=10)
    dataset = images(tmp_path / "shards")
    found = manifest.fingerprint(dataset, tmp_path / "shards")
    assert found["images"] == 24 and found["bytes"] == sum(os.path.getsize(path) for path in shards.find(tmp_path / "shards" / "train"))


@pytest.mark.parametrize("saved", [None, {}, [1], {"images": 1}, "text"], ids=str)
def test_a_checkpoint_that_does_not_say_its_data_changes_nothing(saved):
    assert manifest.other_data(saved, {"images": 3, "bytes": 1, "names": "a", "sizes": "b"}) is None


def test_what_is_changed_is_said_with_the_old_and_the_new_value():
    now = {"versions": {"torch": "2.14.1", "timm": "1.0.31"}, "commit": "b" * 40}
    saved = {"options": {"lr": 0.1, "crop_scale": [0.08, 1.0], "resume": "", "mean": None, "gone": 1, "aa": "x" * 90},
             "manifest": {"versions": {"torch": "2.7.1", "timm": "1.0.31", "torch_npu": "2.7.1"}, "commit": "a" * 40}}
    options = {"lr": 0.2, "crop_scale": (0.08, 1.0), "resume": "auto", "mean": (0.5, 0.5, 0.5), "new": 3, "aa": "none"}
    assert manifest.changes(saved, now, options) == [
        "--lr 0.1 -> 0.2", "--mean None -> 0.5 0.5 0.5", f"--aa {'x' * 60}... -> none", "torch 2.7.1 -> 2.14.1", "torch_npu 2.7.1 -> None",
        f"commit {'a' * 40} -> {'b' * 40}"]
    assert manifest.changes({"options": options, "manifest": now}, now, options) == []
    for odd in ({}, {"options": 3, "manifest": 3}, {"manifest": {"versions": 3, "commit": None}}):
        assert manifest.changes(odd, now, options) == []


def test_the_commit_is_gits_and_none_without_a_repository_or_without_git(tmp_path, monkeypatch):
    assert manifest.commit(tmp_path) is None
    git = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("there is no git")
    assert manifest.commit(tmp_path) is None  # nothing is committed
    (tmp_path / "file").write_text("a")
    for words in (["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert manifest.commit(tmp_path) == head
    (tmp_path / "file").write_text("b")
    assert manifest.commit(tmp_path) == head + "+"
    (tmp_path / "below").mkdir()
    assert manifest.commit(tmp_path / "below") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert manifest.commit(tmp_path) is None
