"""What the walk of class folders takes, leaves and says, beside torchvision's ImageFolder; iNaturalist's JSON; what is not there."""
import json
import os
import pickle
import random
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import datasets
import decode
import folders

PIXELS = Image.effect_noise((34, 36), 90).convert("RGB")
KINDS = {".jpg": "JPEG", ".JPEG": "JPEG", ".Jpg": "JPEG", ".jfif": "JPEG", ".jpe": "JPEG", ".png": "PNG", ".gif": "GIF",
         ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", "": "JPEG"}


def images(folder, *names):
    """A file of its kind for each name; a path may be one of several folders."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        PIXELS.save(path, KINDS[path.suffix])
    return Path(folder)


def found(folder):
    walk = folders.ClassFolders(folder)
    return [(os.path.relpath(path, folder), walk.classes[label]) for path, label in zip(walk.paths, walk.labels)]


def refusal(folder):
    with pytest.raises(ValueError) as caught:
        folders.ClassFolders(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- as torchvision's ImageFolder ----

def assert_as_torchvision(folder):
    theirs, ours = ImageFolder(folder), folders.ClassFolders(folder)
    assert ours.classes == theirs.classes
    assert list(zip(ours.paths, ours.labels.tolist())) == theirs.samples
    assert ours.counts.tolist() == np.bincount(theirs.targets).tolist()
    assert ours.left_out == {}


def test_the_tiny_folder_is_torchvisions(tiny_folder):
    for split in ("train", "val"):
        assert_as_torchvision(tiny_folder / split)
        data, _ = datasets.build_dataset(split == "train", tiny_folder)
        for (image, label, index), (theirs, target) in zip(data, ImageFolder(tiny_folder / split)):
            assert np.array_equal(np.array(image), np.array(theirs)) and label == target and data.name(index) == data.names[index]


def test_any_tree_of_folders_is_torchvisions(tmp_path):
    """Nested folders, names that sort oddly, letters of all kinds, a folder behind a link."""
    rng = random.Random(0)
    words = ["a", "B", "a b", "a-b", "a.b", "10", "2", "é", "e\u0301", "中文", "z" * 60, "a\nb", "_", "~", "\udcff"]
    for number in range(12):
        root = tmp_path / str(number)
        for name in rng.sample(words, rng.randint(1, 8)):
            images(root / name, "x.jpg")
            for _ in range(rng.randint(0, 6)):
                folder = root.joinpath(name, *rng.sample(words, rng.randint(0, 3)))
                images(folder, rng.choice(words) + rng.choice([".jpg", ".png", ".JPEG"]))
        assert_as_torchvision(root)
    outside = images(tmp_path / "outside", "1.jpg", "deep/2.jpg")
    (tmp_path / "0" / "linked").symlink_to(outside)
    (tmp_path / "0" / "file").mkdir()
    (tmp_path / "0" / "file" / "link.jpg").symlink_to(images(tmp_path / "store", "s.jpg") / "s.jpg")
    assert_as_torchvision(tmp_path / "0")


def test_paths_are_one_buffer():
    """What the samples need of memory is their letters, and no object a sample: forked workers share it."""
    paths = [f"/data/train/n{i // 7:08d}/é_{i}.JPEG" for i in range(1000)] + ["", "\udcff", "中"]
    known = folders.PathList(paths)
    assert list(known) == paths and len(known) == 1003
    assert known[-1] == "中" and known[torch.tensor(3)] == known[np.int64(3)] == paths[3] and known[2:5] == paths[2:5]
    with pytest.raises(IndexError):
        known[1003]
    assert list(pickle.loads(pickle.dumps(known))) == paths
    assert known.text.nbytes == sum(len(os.fsencode(path)) for path in paths) and known.ends.nbytes == 8 * 1004
    assert list(folders.PathList()) == []


def test_a_data_set_holds_no_list_of_its_images(tiny_folder):
    data, _ = datasets.build_dataset(True, tiny_folder)
    assert isinstance(data.names, folders.PathList) and data.targets.dtype == np.int64
    assert not [value for value in vars(data).values() if isinstance(value, list | tuple | dict) and len(value) >= len(data)]


# ---- what is taken ----

def test_every_ending_of_an_image_and_none(tmp_path):
    images(tmp_path / "all", *(f"{i:02d}{ending}" for i, ending in enumerate(KINDS)))
    shutil.copy(tmp_path / "all" / "00.jpg", tmp_path / "all" / "99.AVIF")
    assert len(found(tmp_path)) == len(KINDS) + 1
    data = datasets.ImageFiles(folders.ClassFolders(tmp_path).paths, np.zeros(20, dtype=np.int64), ["all"])
    with Image.open(tmp_path / "all" / "13") as image:
        assert np.array_equal(np.array(data[13][0]), np.array(image.convert("RGB")))


def test_a_file_without_an_ending_is_known_by_its_first_bytes(tmp_path):
    images(tmp_path / "a", "n0001", "x.jpg")
    for name, content in (("LICENSE", "Images are everybody's."), ("empty", ""), ("readme.txt", "x"), ("old.jpg.bak", "x")):
        (tmp_path / "a" / name).write_text(content)
    assert found(tmp_path) == [("a/n0001", "a"), ("a/x.jpg", "a")]
    assert folders.ClassFolders(tmp_path).left_out == {folders.NO_IMAGE: [4, "a/LICENSE"]}


# ---- what is left out, and said ----

def test_hidden_names_are_no_classes_and_no_images(tmp_path):
    images(tmp_path, "cat/1.jpg", "cat/._1.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg", ".ipynb_checkpoints/1.jpg", "@eaDir/1.jpg",
           "cat/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/cat/1.jpg", "dog/2.jpg", ".hidden.jpg")
    walk = folders.ClassFolders(tmp_path)
    assert walk.classes == ["cat", "dog"] and found(tmp_path) == [("cat/1.jpg", "cat"), ("dog/2.jpg", "dog")]
    assert walk.left_out == {folders.HIDDEN: [7, ".hidden.jpg"]}


def test_loose_images_belong_to_no_class(tmp_path):
    images(tmp_path, "cat/1.jpg", *(f"{i:02d}.jpg" for i in range(50)))
    (tmp_path / "readme.txt").write_text("x")
    walk = folders.ClassFolders(tmp_path)
    assert len(walk.paths) == 1
    assert walk.left_out == {folders.LOOSE: [50, "00.jpg"], folders.NO_IMAGE: [1, "readme.txt"]}


def test_a_folder_linked_into_itself_counts_once(tmp_path):
    images(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(8)))
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "root").symlink_to(tmp_path)
    (tmp_path / "a" / "to b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "self").symlink_to("self")
    walk = folders.ClassFolders(tmp_path)
    assert found(tmp_path) == [(f"{name}/{i}.jpg", name) for name in "ab" for i in range(8)]
    assert walk.left_out == {folders.AGAIN: [3, "a/loop"], folders.NO_IMAGE: [1, "b/self"]}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_each_real_file_counts_once_where_it_lies(tmp_path, link):
    """A link to a file of a later class takes it from nobody; of two names of one file the first counts."""
    images(tmp_path, "a/own.jpg", "b/1.jpg", "b/2.jpg")
    link(tmp_path / "b" / "1.jpg", tmp_path / "b" / "3.jpg")
    outside = images(tmp_path / "a" / "..", "b/4.jpg") / "b"
    (tmp_path / "a" / "all").symlink_to(outside)
    assert found(tmp_path) == [("a/own.jpg", "a"), ("b/1.jpg", "b"), ("b/2.jpg", "b"), ("b/4.jpg", "b")]
    assert folders.ClassFolders(tmp_path).left_out == {folders.AGAIN: [2, "a/all"]}


def test_an_inode_number_stands_for_a_file_only_with_its_device(tmp_path, monkeypatch):
    """Of several file systems below one tree two files may have one inode number: both count."""
    images(tmp_path, "a/1.jpg", "a/2.jpg")
    monkeypatch.setattr(folders, "array", lambda kind, *values: SameNumbers(kind, *values) if kind == "Q" else array_of(kind, *values))
    assert found(tmp_path) == [("a/1.jpg", "a"), ("a/2.jpg", "a")]


array_of = folders.array


class SameNumbers(array_of):
    def append(self, _):
        super().append(7)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_file_that_vanishes_during_the_walk_is_counted(tmp_path, monkeypatch, link):
    """Of two names of one file the walk asks again, and of a link for what it leads to: another process was faster."""
    images(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    link(tmp_path / "a" / "1.jpg", tmp_path / "a" / "3.jpg")
    look = os.stat

    def vanishing(path, *how, **also):
        if str(path).endswith("3.jpg"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return look(path, *how, **also)
    monkeypatch.setattr(os, "stat", vanishing)
    assert found(tmp_path) == [("a/1.jpg", "a"), ("a/2.jpg", "a"), ("b/1.jpg", "b")]
    assert folders.ClassFolders(tmp_path).left_out == {folders.GONE: [1, "a/3.jpg"]}


def test_a_file_that_may_not_be_looked_at_is_one_line(tmp_path, monkeypatch):
    images(tmp_path, "a/1.jpg")
    os.link(tmp_path / "a" / "1.jpg", tmp_path / "a" / "2.jpg")
    look = os.stat

    def guarded(path, *how, **also):
        if str(path).endswith("2.jpg"):
            raise PermissionError(13, "Permission denied", path)
        return look(path, *how, **also)
    monkeypatch.setattr(os, "stat", guarded)  # root may look at all
    assert refusal(tmp_path) == f"cannot look at the file {tmp_path}/a/2.jpg (Permission denied): make it readable, or remove it"


def test_what_is_no_regular_file(tmp_path):
    images(tmp_path, "a/1.jpg")
    os.mkfifo(tmp_path / "a" / "fifo.jpg")
    os.mkfifo(tmp_path / "a" / "fifo")
    (tmp_path / "a" / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a" / "socket.png"))
    assert found(tmp_path) == [("a/1.jpg", "a")]
    assert folders.ClassFolders(tmp_path).left_out == {folders.NO_FILE: [4, "a/fifo.jpg"], folders.NO_IMAGE: [1, "a/fifo"]}


def test_what_a_log_says(tmp_path):
    images(tmp_path / "val", "cat/1.jpg", "cat/2.jpg", "do\ng/1.jpg", "lone.jpg", ".a/1.jpg", ".b.jpg")
    assert folders.ClassFolders(tmp_path / "val").notes() == [
        "val/: 3 images in 2 classes, from 1 (do\\ng) to 2 (cat) a class",
        "val/ left out: hidden names: 2 (.a, ...); images outside the class folders: 1 (lone.jpg)"]


def test_the_log_and_no_eval(tmp_path, run_main, tiny_folder):
    """Training without val/; what the walk found stands in the log once."""
    shutil.copytree(tiny_folder / "train", tmp_path / "data" / "train")
    images(tmp_path / "data" / "train", ".ipynb_checkpoints/1.jpg", "lone.jpg")
    done = run_main("--data-path", tmp_path / "data", "--no-eval", "--epochs", 1, "--max_step", 1, "--batch-size", 2, "--input-size", 32,
                    "--device", "cpu", "--num_workers", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train/: 24 images in 3 classes, from 8 (flower) to 8 (flower) a class\n") == 1
    assert done.stdout.count("train/ left out: hidden names: 1 (.ipynb_checkpoints); images outside the class folders: 1 (lone.jpg)\n") == 1


# ---- what is refused ----

def test_classes_one_level_deeper(tmp_path):
    images(tmp_path / "train", "images/ant/1.jpg", "images/bee/1.jpg", "images/cow/deep/1.jpg", "images/dog/1.jpg")
    assert refusal(tmp_path / "train") == (
        "train/ has one class, images, whose images lie in 4 folders of its own (ant, bee, cow and 1 more): if those are the classes, "
        "move them up: mv train/images/* train/")
    images(tmp_path / "train", "images/1.jpg")
    assert len(found(tmp_path / "train")) == 5


def test_a_flat_split_is_told_apart(tmp_path):
    images(tmp_path / "val", *(f"{i}.jpg" for i in range(5)))
    assert refusal(tmp_path / "val") == "val/ has no class folders, but 5 images: every class is a folder in val/ with at least one image"
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    assert refusal(tmp_path / "empty").startswith("empty/ has no class folders: ")


def test_a_split_that_is_flat_in_one_folder(tmp_path):
    images(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/images/1.jpg")
    with pytest.raises(ValueError, match=r"val/ is flat: its images lie in one folder, images/, and train/ has 2 classes: put"):
        datasets.build_datasets(tmp_path, "IMNET", None, None)


def test_a_class_without_images_says_what_was_left_out(tmp_path):
    images(tmp_path / "val", "cat/1.jpg", "dog/.1.jpg")
    (tmp_path / "val" / "dog" / "1.heic").write_text("x")
    assert refusal(tmp_path / "val") == (
        "val/ has no image in the class folders dog: every class is a folder in val/ with at least one image "
        "(left out: hidden names: 1 (dog/.1.jpg); no images by their names: 1 (dog/1.heic))")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    images(tmp_path / "val", "cat/1.jpg", "dog/1.jpg")
    scan = os.scandir

    def guarded(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)
    monkeypatch.setattr(os, "scandir", guarded)  # root may read all
    assert refusal(tmp_path / "val") == (
        f"cannot look into the folder {tmp_path}/val/dog (Permission denied): make it readable, or remove it")


def missing(root, **settings):
    with pytest.raises(ValueError) as caught:
        datasets.build_datasets(root, "IMNET", None, None, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("names, expected", [
    (["valid"], ", but valid/: rename it, or link it: ln -s valid {}/val"),
    (["Val", "test"], ", but Val/, test/: rename it, or link it: ln -s Val {}/val"),
    (["test", "validation"], ", but validation/, test/: rename it, or link it: ln -s validation {}/val"),
    ([], "; --no-eval trains without")])
def test_other_names_of_val(tmp_path, names, expected):
    images(tmp_path, "train/a/1.jpg", *(f"{name}/a/1.jpg" for name in names))
    assert missing(tmp_path) == f"--data-path {tmp_path}: it has no folder val/ (expected train/ and val/)" + expected.format(tmp_path)
    train, val, classes = datasets.build_datasets(tmp_path, "IMNET", None, None, with_val=False)
    assert (len(train), val, classes) == (1, None, ["a"])


def test_other_names_of_train_and_a_path_one_level_short(tmp_path):
    images(tmp_path, "set/training/a/1.jpg", "set/val/a/1.jpg")
    assert "no folder train/ (expected train/ and val/), but training/: rename it, or link it: ln -s training" in missing(tmp_path / "set")
    assert missing(tmp_path).endswith(f", but set/ has: --data-path {tmp_path / 'set'}")


@pytest.mark.parametrize("above", ["", "imagenet-object-localization-challenge/"])
def test_kaggles_imagenet_named_by_a_folder_above(tmp_path, above):
    """Annotations/CLS-LOC has a train/ and a val/ too, without an image in them."""
    root = tmp_path / above / "ILSVRC"
    images(root / "Data" / "CLS-LOC", "train/n01440764/1.JPEG", "val/1.JPEG", "test/1.JPEG")
    for split in ("train/n01440764", "val"):
        (root / "Annotations" / "CLS-LOC" / split).mkdir(parents=True)
        (root / "Annotations" / "CLS-LOC" / split / "1.xml").write_text("<annotation/>")
    (root / "self").symlink_to("self")
    given = tmp_path / above if above else root
    assert missing(given) == (f"--data-path {given}: it has no folder val/ (expected train/ and val/), but "
                              f"{(root / 'Data' / 'CLS-LOC').relative_to(given)}/ has: --data-path {root}/Data/CLS-LOC")


def test_a_folder_far_above_the_data_is_only_looked_at(tmp_path):
    """Three levels down, and no further."""
    images(tmp_path, "1/2/3/4/val/a/1.jpg")
    assert missing(tmp_path).endswith("(expected train/ and val/); --no-eval trains without")
    assert missing(tmp_path / "1").endswith(f"but 2/3/4/ has: --data-path {tmp_path}/1/2/3/4")


# ---- names ----

def test_a_newline_in_names_stays_within_its_line(tmp_path):
    images(tmp_path / "two\nlines", "train/a/1.jpg", "val/a/x\ny.jpg")
    (tmp_path / "two\nlines" / "val" / "a" / "x\ny.jpg").write_bytes(b"no image")
    _, val, _ = datasets.build_datasets(tmp_path / "two\nlines", "IMNET", None, None)
    with pytest.raises(decode.UnreadableImage) as caught:
        val[0]
    assert str(caught.value) == (
        f"cannot read the image {tmp_path}/two\\nlines/val/a/x\\ny.jpg (no image of a known format): replace it or remove it")
    shutil.rmtree(tmp_path / "two\nlines" / "val")
    assert "two\\nlines" in missing(tmp_path / "two\nlines")
    assert "no\\nwhere" in missing(tmp_path / "no\nwhere")


def test_a_newline_in_a_name_through_the_command_line(tmp_path, run_main):
    images(tmp_path, "train/a/1.jpg", "val/a/x\nerror: y\udcff.jpg")
    os.truncate(tmp_path / "val" / "a" / "x\nerror: y\udcff.jpg", 100)
    model = tmp_path / "m.pth"
    import timm

    import gvt  # noqa: F401
    torch.save({"model": timm.create_model("alt_gvt_small", num_classes=1).state_dict()}, model)
    done = run_main("--data-path", tmp_path, "--eval", "--resume", model, "--input-size", 32, "--device", "cpu", "--num_workers", 1)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot read the image {tmp_path}/val/a/x\\nerror: y\\udcff.jpg (")


# ---- iNaturalist's JSON of every wrong kind ----

def write_inat(root):
    content = {"categories.json": [{"id": i, "name": f"species {i}"} for i in range(2)]}
    for split in ("train", "val"):
        content[f"{split}2018.json"] = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
                                        "annotations": [{"image_id": i, "category_id": i} for i in range(2)]}
    for name, value in content.items():
        (root / name).write_text(json.dumps(value))
    return content


NO_PATH = "val2018.json: entry 0 of images has no file_name that is a path inside the data set"
NO_IMAGE_ID = "train2018.json: entry 1 of annotations has no image_id that is a number or a text"
NO_CATEGORY = "train2018.json: entry 1 of annotations has no category_id that is a whole number"
WRONG = {
    "categories": ("categories.json", [], {"a": 1}, "categories.json has no list: it is not iNaturalist's"),
    "category": ("categories.json", [1], 7, "categories.json: entry 1 has no id that is a whole number"),
    "category id": ("categories.json", [1, "id"], "x", "categories.json: entry 1 has no id that is a whole number"),
    "true": ("categories.json", [1, "id"], True, "categories.json: entry 1 has no id that is a whole number"),
    "level": ("categories.json", [0, "name"], None, "categories.json: entry 0 has no name that is a text"),
    "twice": ("categories.json", [1, "id"], 0, "categories.json has two entries of the id 0"),
    "train": ("train2018.json", [], [1], "train2018.json has no list of annotations: it is not iNaturalist's"),
    "annotations": ("train2018.json", ["annotations"], 3, "train2018.json has no list of annotations: it is not iNaturalist's"),
    "null": ("train2018.json", ["annotations", 1], None, NO_CATEGORY),
    "float": ("train2018.json", ["annotations", 1, "category_id"], 1.5, NO_CATEGORY),
    "unhashable": ("train2018.json", ["annotations", 1, "image_id"], [], NO_IMAGE_ID),
    "category unknown": ("train2018.json", ["annotations", 1, "category_id"], 9, "train2018.json: categories.json has no category_id 9"),
    "two classes": ("train2018.json", ["annotations", 1, "image_id"], 0, "train2018.json: the image_id 0 has two classes"),
    "no annotation": ("val2018.json", ["images", 1, "id"], 5, "val2018.json: the image 5 has no annotation"),
    "images": ("val2018.json", ["images"], "x", "val2018.json has no list of images: it is not iNaturalist's"),
    "empty": ("val2018.json", ["images"], [], "val2018.json has no images"),
    "file name": ("val2018.json", ["images", 0, "file_name"], 3, NO_PATH),
    "above": ("val2018.json", ["images", 0, "file_name"], "../../etc/x.jpg", NO_PATH),
    "absolute": ("val2018.json", ["images", 0, "file_name"], "/etc/x.jpg", NO_PATH),
    "surrogate": ("val2018.json", ["images", 0, "file_name"], "\ud800.jpg", NO_PATH),
    "class of val": ("train2018.json", ["annotations"], [{"image_id": i, "category_id": 0} for i in range(2)],
                     "val2018.json: train2018.json has no image of the class species 1")}


@pytest.mark.parametrize("case", WRONG)
def test_inaturalist_of_a_wrong_kind(tmp_path, case):
    name, place, value, expected = WRONG[case]
    content = write_inat(tmp_path)
    if place:
        *above, last = place
        inner = content[name]
        for step in above:
            inner = inner[step]
        inner[last] = value
    else:
        content[name] = value
    (tmp_path / name).write_text(json.dumps(content[name]))
    with pytest.raises(ValueError) as caught:
        datasets.build_datasets(tmp_path, "INAT", None, None)
    assert str(caught.value).startswith(f"--data-path {tmp_path}: {expected}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"", b"\x80", b"NaN"])
def test_inaturalist_that_is_no_json(tmp_path, content):
    write_inat(tmp_path)
    (tmp_path / "val2018.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"--data-path .*: (cannot read val2018.json \(.*\): iNaturalist|val2018.json has no list)"):
        datasets.build_datasets(tmp_path, "INAT", None, None)


def test_files_that_would_wait_for_ever(tmp_path):
    write_inat(tmp_path)
    (tmp_path / "val2018.json").unlink()
    os.mkfifo(tmp_path / "val2018.json")
    with pytest.raises(ValueError, match=r"cannot read val2018.json \(not a regular file\)"):
        datasets.build_datasets(tmp_path, "INAT", None, None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    os.mkfifo(tmp_path / "cifar-10-batches-py" / "data_batch_1")
    with pytest.raises(ValueError, match=r"no intact cifar-10-batches-py in it \(not a regular file\): unpack "):
        datasets.build_datasets(tmp_path, "CIFAR10", None, None)


def test_random_json_is_one_line(tmp_path):
    """Values of the right files replaced by other values, at random places."""
    rng, odd = random.Random(0), [None, True, 0, -1, 1e400, 2.5, "", "x", "\0", [], {}, [[]], {"id": []}, 10**30]
    for _ in range(300):
        content = write_inat(tmp_path)
        name = rng.choice(list(content))
        inner = content[name]
        while True:
            place = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            if isinstance(inner[place], list | dict) and inner[place] and rng.random() < 0.7:
                inner = inner[place]
            else:
                break
        inner[place] = rng.choice(odd)
        (tmp_path / name).write_text(json.dumps(content[name]))
        try:
            train, val, classes = datasets.build_datasets(tmp_path, "INAT", None, None)
            assert len(train.targets) and max(val.targets) < len(classes)
        except ValueError as error:
            assert str(error).startswith("--data-path ") and "\n" not in str(error)


# ---- digits ----

@pytest.mark.parametrize("place", ["file/digits", "/proc/digits", "/dev/null/digits"])
def test_digits_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"the digits cannot be written to .*digits \(.+\): choose another --data-path"):
        datasets.build_datasets(tmp_path / place, "DIGITS", None, None)
