"""Whose labels are these: names, class maps and ImageNet's numbers; through main.py the accuracy that is known."""
import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import assembly
import datasets
import labels
import main
import networks
from labels import Weights, decide
from options import DEFAULTS
from tools.data import write_shards

MODEL = "test_convnext"

TWELVE = sorted(map(str, range(12)))  # as folders are sorted: 0, 1, 10, 11, 2, ...
SYNSETS = ImageNetInfo().label_names()
NFC, NFD = "caf\u00e9", "cafe\u0301"


def outputs(data, *args, **kwargs):
    found = decide(data, *args, **kwargs)
    return [found.index[labels.normal(name)] for name in data], found


def refusal(*args, **kwargs):
    with pytest.raises(ValueError) as caught:
        decide(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names ----

@pytest.mark.parametrize("use", ["evaluate", "teacher", "resume", "finetune", "measure"])
def test_the_same_names_in_the_same_order_pass_silently(use):
    found = decide(["cat", "dog"], Weights("w", 2, ["cat", "dog"]), use=use)
    assert (found.names, found.notes, found.fresh, found.of(["cat", "dog"])) == (["cat", "dog"], [], False, None)


@pytest.mark.parametrize("use", ["evaluate", "teacher", "resume", "finetune"])
def test_numeric_names_in_numeric_order_where_the_weights_say_so(use):
    names = [str(i) for i in range(12)]
    found = decide(TWELVE, Weights("w", 12, names), use=use)
    assert found.of(TWELVE) == [int(name) for name in TWELVE] and found.names == names and not found.fresh
    assert found.notes == ["w has the data's classes in another order, ['0', '1', '2', ...]: labels follow it, by name"]


def test_fewer_classes_than_the_weights_have_are_evaluated_by_name():
    places, found = outputs(["eel", "cat"], Weights("w", 3, ["cat", "dog", "eel"]), use="evaluate")
    assert places == [2, 0] and found.names == ["cat", "dog", "eel"]
    assert found.notes == ["the data have 2 of the 3 classes of w: accuracy is over all outputs"]
    found = decide(["eel", "cat"], Weights("w", 3, ["cat", "dog", "eel"]), use="finetune")
    assert found.fresh and found.names == ["eel", "cat"] and "its head has 3 classes and the data 2" in found.notes[0]
    said = refusal(["eel", "cat"], Weights("w", 3, ["cat", "dog", "eel"]), use="resume")
    assert "3 and the data 2, only there ['dog'], only here []" in said and "its --class-map FILE" in said
    resumed = decide(["eel", "cat"], Weights("w", 3, ["cat", "dog", "eel"]), {"cat": 0, "dog": 1, "eel": 2}, "resume")
    assert resumed.names == ["cat", "dog", "eel"] and resumed.of(["eel", "cat"]) == [2, 0]


@pytest.mark.parametrize("use", ["evaluate", "teacher", "resume", "measure"])
@pytest.mark.parametrize("theirs, ours, said", [
    (["cat", "dog"], ["cat", "fox"], "2 and the data 2, only there ['dog'], only here ['fox']"),
    (["cat", "dog"], ["cat", "dog", "fox"], "2 and the data 3, only there [], only here ['fox']")])
def test_other_classes_are_named(use, theirs, ours, said):
    assert refusal(ours, Weights("w", len(theirs), theirs), use=use).startswith(f"w was trained on other classes: {said}: ")


def test_other_classes_of_the_same_number_get_a_new_head():
    found = decide(["cat", "fox"], Weights("w", 2, ["cat", "dog"]), use="finetune")
    assert found.fresh and found.names == ["cat", "fox"] and found.of(["cat", "fox"]) is None
    assert found.notes == ["w: its head has other classes than the data, which have ['fox'], so the head starts anew"]


def test_names_are_equal_in_both_forms_of_unicode():
    assert NFC != NFD
    found = decide([NFC, "x"], Weights("w", 2, [NFD, "x"]), use="evaluate")
    assert found.notes == [] and found.of([NFD, "x"]) is None and found.of(["x", NFC]) == [1, 0]
    labels.compare([NFC, "cz"], [NFD, "cz"], "data")
    assert "two classes have the same name, ['caf\\xe9', 'cafe\\u0301']" in refusal([NFC, NFD])


@pytest.mark.parametrize("train, val, said", [
    (["dog"], ["dog "], "only in train ['dog'], only in val ['dog ']"),
    ([NFC], ["\uff43af\u00e9"], "only in train ['caf\\xe9'], only in val ['\\uff43af\\xe9']"),
    (["a", "b"], ["a"], "only in train ['b'], only in val []: make the folders agree, or list all classes in --class-map FILE"),
    (["a\nb"], ["c"], "only in train ['a\\nb'], only in val ['c']")])
def test_differences_between_the_splits_can_be_seen(train, val, said):
    with pytest.raises(ValueError) as caught:
        labels.compare(train, val, "data")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_map_allows_classes_without_validation_images():
    labels.compare(["a", "b"], ["a"], "data", {"a": 0, "b": 1})
    with pytest.raises(ValueError, match=r"only in val \['c'\]"):
        labels.compare(["a", "b"], ["a", "c"], "data", {"a": 0, "b": 1, "c": 2})


@pytest.mark.parametrize("content, names", [
    ({"classes": ["cat", "dog"]}, ["cat", "dog"]), ({"classes": ("a",)}, ["a"]), ({"class_to_idx": {"b": 1, "a": 0}}, ["a", "b"]),
    ({"class_to_idx": {"b": 2, "a": 0}}, None), ({"class_to_idx": {"b": "1"}}, None), ({"classes": None}, None), ({"classes": 2}, None),
    ({"classes": [1, 2]}, None), ({"classes": []}, None), ([1], None), ({"epoch": 3}, None)], ids=str)
def test_names_that_a_checkpoint_records(content, names):
    assert labels.named_in(content) == names


# ---- labels that are only numbers, of shards without names ----

NUMBERS = [str(i) for i in range(12)]


def test_numbers_and_names_in_another_order_are_a_doubt():
    """Label 2 of a shard may be the folder '2', or the third of 0, 1, 10."""
    for use in ("evaluate", "teacher", "resume", "measure"):
        assert "the data's labels are numbers only: say which" in refusal(NUMBERS, Weights("w", 12, TWELVE), use=use, named=False)
        assert "w was trained on numbers only: say which" in refusal(TWELVE, Weights("w", 12, NUMBERS, named=False), use=use)
        assert decide(NUMBERS, Weights("w", 12, NUMBERS), use=use, named=False).notes == []
    assert decide(NUMBERS, Weights("w", 12, TWELVE), use="finetune", named=False).fresh
    found = decide(NUMBERS[:7], Weights("w", 12, NUMBERS, named=False), use="evaluate", named=False)
    assert found.of(NUMBERS[:7]) is None and len(found.names) == 12 and not found.named
    with pytest.raises(ValueError, match="val/ has labels that are numbers only, and train/ has names in another order"):
        labels.compare(TWELVE, NUMBERS, "data", named=(True, False))
    labels.compare(NUMBERS, NUMBERS, "data", named=(True, False))


def test_imagenets_numbers_need_no_names():
    places, _ = outputs([str(i) for i in range(1000)], Weights("w", 1000, SYNSETS[::-1]), use="evaluate", named=False)
    assert places == list(range(999, -1, -1))


def test_what_is_trained_on_numbers_is_known_to_be(tmp_path):
    assert not decide(NUMBERS, named=False).named and decide(NUMBERS).named
    assert decide(NUMBERS, class_map={str(i): i for i in range(12)}, named=False).named
    assert labels.of_file("w", {"classes": NUMBERS, "named": False}, 12) == Weights("w", 12, NUMBERS, False)
    assert labels.of_file("w", {"classes": NUMBERS}, 12).named and labels.of_file("w", [1], None).named


# ---- weights that name nothing ----

@pytest.mark.parametrize("names", [TWELVE, ["Zebra", "ant"], [f"class{i}" for i in (1, 10, 2)]], ids=str)
def test_two_orders_are_a_doubt(names):
    for use in ("evaluate", "teacher"):
        said = refusal(names, Weights("w", len(names)), use=use)
        assert "w does not say what its" in said and "two orders" in said and "--class-map FILE" in said
    for use in ("finetune", "resume", "measure"):
        found = decide(names, Weights("w", len(names)), use=use)
        assert found.of(names) is None and not found.fresh and "taken for the data's classes in their order" in found.notes[0]
    assert decide(names, Weights("w", len(names)), use="teacher", stated=True).of(names) is None


@pytest.mark.parametrize("names", [["ant", "bee"], [str(i) for i in range(12)], ["b", "a"], ["\u00b2", "\u00b3"]], ids=str)
def test_one_order_is_taken_and_said(names):
    """Numbers in numeric order are shards', and the other order is a file's."""
    found = decide(names, Weights("w", len(names)), use="evaluate")
    assert found.of(names) is None and f"w does not say what its {len(names)} outputs are: taken for" in found.notes[0]


def test_another_number_of_outputs():
    said = refusal(["a", "b"], Weights("w", 5), use="evaluate")
    assert "it has 5 outputs without names, and the data 2 classes, ['a', 'b']: say which" in said
    assert refusal(["a", "b"], Weights("w", 1000), use="teacher").endswith("take a teacher of these classes: --teacher-path FILE")
    assert decide(["a", "b"], Weights("w", 5), use="finetune").fresh


# ---- ImageNet ----

@pytest.mark.parametrize("picked", [range(1000), range(0, 1000, 10), (999, 3)], ids=["all", "100", "two"])
@pytest.mark.parametrize("named", [True, False])
def test_synsets_find_their_outputs(picked, named):
    data = [SYNSETS[i] for i in picked]
    places, found = outputs(data, Weights("w", 1000, SYNSETS if named else None), use="evaluate")
    assert places == list(picked) and found.names == SYNSETS
    note = [f"the data have {len(data)} of the 1000 classes of w: accuracy is over all outputs"]
    assert found.notes == (note if len(data) < 1000 else [])


@pytest.mark.parametrize("data", [sorted(map(str, range(1000))), [f"{i:03}" for i in range(1000)], ["7", "21", "999"]],
                         ids=["V2", "padded", "some"])
@pytest.mark.parametrize("names", [None, SYNSETS, SYNSETS[::-1]], ids=["unnamed", "named", "another order"])
def test_numbers_are_imagenets(data, names):
    places, found = outputs(data, Weights("w", 1000, names), use="evaluate")
    assert [found.names[place] for place in places] == [SYNSETS[int(name)] for name in data]
    assert "taken for ImageNet-1k's" in found.notes[0] and ("accuracy is over all" in found.notes[-1]) == (len(data) < 1000)


@pytest.mark.parametrize("use", ["evaluate", "teacher"])
def test_ten_digits_are_not_imagenets_first_ten_fish(use):
    for names, said in ((None, "1000 outputs without names, and the data 10 classes"), (SYNSETS, "was trained on other classes")):
        assert said in refusal(NUMBERS[:10], Weights("w", 1000, names), use=use)
        assert said in refusal(NUMBERS[:10], Weights("w", 1000, names), use=use, named=False) or names


def test_some_outputs_of_a_published_teacher_are_picked_by_name():
    data = SYNSETS[5:500:5]
    places, found = outputs(data, Weights("w", 1000), use="teacher")
    assert places == list(range(5, 500, 5)) and found.notes == ["w: of its 1000 outputs the 99 of the data's classes teach, by name"]


def test_published_weights_are_evaluated_with_their_own_head(tmp_path):
    """A head for the data's two classes would be a random one."""
    args = argparse.Namespace(**DEFAULTS | {"model": "alt_gvt_small", "pretrained": True, "eval": True})
    dataset = argparse.Namespace(classes=[SYNSETS[7], SYNSETS[3]])
    found = assembly.number_classes(args, [dataset], dataset.classes, None, None)
    assert found.names == SYNSETS and dataset.numbering == [7, 3]
    args.eval = False
    assert assembly.number_classes(args, [dataset], dataset.classes, None, None).fresh


def test_what_is_not_imagenets():
    names = [f"{i:04}x" for i in range(1000)]
    assert "are not ImageNet's synsets or numbers" in refusal(names, Weights("w", 1000), use="evaluate")
    assert decide(names, Weights("w", 1000), use="finetune").of(names) is None
    assert decide(["1000"], Weights("w", 1000), use="finetune").fresh
    assert "only here ['x']" in refusal([*SYNSETS[:9], "x"], Weights("w", 1000, SYNSETS), use="evaluate")
    larger = ImageNetInfo("imagenet-12k").label_names()
    assert outputs([larger[5000]], Weights("w", 11821), use="evaluate")[0] == [5000]


# ---- class maps ----

def write(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize("name, text, expected", [
    ("m.txt", "cat\ndog eel\n", {"cat": 0, "dog eel": 1}), ("m.TXT", "\ufeffcat\r\ndog\r\n\r\n", {"cat": 0, "dog": 1}),
    ("m.txt", f"{NFD}\n", {NFC: 0}), ("m.txt", "a\u2028b\nc", {"a\u2028b": 0, "c": 1}),
    ("m.csv", "name,index\ncat,1\n\"a, b\",0\n", {"cat": 1, "a, b": 0}), ("m.csv", "0,11\n1,10\n", {"0": 11, "1": 10}),
    ("m.json", json.dumps({"cat": 3, "dog": 3}), {"cat": 3, "dog": 3}), ("m.json", json.dumps(["cat", "dog"]), {"cat": 0, "dog": 1}),
    ("m.json", json.dumps({"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}), {"n01440764": 0, "n01443537": 1}),
    ("m.json", json.dumps({"1": "cat", "0": "dog"}), {"cat": 1, "dog": 0})])
def test_class_maps(tmp_path, name, text, expected):
    assert labels.read_class_map(write(tmp_path, name, text)) == expected


def test_a_text_file_is_read_as_timm_reads_it(tmp_path):
    from timm.data.readers.class_map import load_class_map
    path = write(tmp_path, "m.txt", "\n".join(SYNSETS[::-1]))
    assert labels.read_class_map(path) == load_class_map(str(path))


@pytest.mark.parametrize("name, text, said", [
    ("m.pkl", b"\x80\x04}.", "a pickle can run anything"), ("m", "cat\n", "its ending says no format"),
    ("m.txt", b"\xff\xfe\x00", "it is no UTF-8"),
    ("m.txt", "", "it is empty"), ("m.txt", " \n\n", "it is empty"), ("m.txt", "cat\n\ndog\n", "line 2 is empty"),
    ("m.txt", "cat\ndog\ncat\n", "the class 'cat' has two numbers, 0 and 2"), ("m.csv", "cat,1\ndog\n", "the row 'dog' is not name,number"),
    ("m.csv", "cat,1\ndog,-1\n", "the row 'dog,-1' is not name,number"), ("m.csv", "", "it is empty"),
    ("m.json", "{", "Expecting property name"), ("m.json", '{"cat": 1.0}', "neither"), ("m.json", '{"cat": true}', "neither"),
    ("m.json", '{"cat": -1}', "numbers from 0"), ("m.json", '{"cat": 1e400}', "neither"), ("m.json", "3", "neither"),
    ("m.json", "[1]", "neither"), ("m.json", '{"cat": 0, "dog": 2, "cat": 1}', "'cat' is there twice, as '0' and as '1'"),
    ("m.json", '{"0": "cat", "0": "dog"}', "'0' is there twice, as 'cat' and as 'dog'"),
    ("m.json", '{"cat": 99999999}', "numbers from 0"), ("m.json", "[" * 100000, "recursion"), ("m.json", '{"0": []}', "neither")])
def test_what_is_no_class_map_is_one_line(tmp_path, name, text, said):
    with pytest.raises(ValueError) as caught:
        labels.read_class_map(write(tmp_path, name, text))
    assert str(caught.value).startswith(f"--class-map {tmp_path / name}: ") and said in str(caught.value) and "\n" not in str(caught.value)


def mutated(data, rng):
    """Bytes with up to four places changed, cut out, doubled or exchanged for what means something to a reader."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.choice((0, 1, 2, 8))
        data[at:at + size] = rng.choice((b"", bytes([rng.randrange(256)]), b"\n", b"\r", b'"', b",", b"[", b"{", b"}", b"1e999", b"-",
                                         b"null", b"\xef\xbb\xbf", b"\0", b"9" * 5000, b"NaN", bytes(data[:at])))
    return bytes(data)


CLASS_MAPS = {"m.txt": b"cat\ndog\n\xc3\xa9el\n", "m.csv": b'name,index\ncat,1\n"a, b",0\n', "m.json": b'{"cat": 1, "dog": 0, "eel": 2}'}


@pytest.mark.parametrize("name", CLASS_MAPS)
def test_mutated_class_maps_are_read_or_refused_in_one_line(tmp_path, name):
    rng, read = random.Random(0), 0
    for _ in range(500):
        path = write(tmp_path, name, mutated(CLASS_MAPS[name], rng))
        try:
            found = labels.read_class_map(path)
        except ValueError as error:
            assert str(error).startswith(f"--class-map {path}: ") and len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        else:
            assert found and all(name and type(number) is int and 0 <= number < 10**6 for name, number in found.items())
            read += 1
    assert 20 < read < 480


def test_a_class_map_that_is_not_there(tmp_path):
    for path in (tmp_path / "m.txt", tmp_path):
        with pytest.raises(ValueError, match=f"--class-map {path}: "):
            labels.read_class_map(path)


def test_a_class_map_orders_a_training():
    class_map = {str(i): i for i in range(12)}
    found = decide(TWELVE, class_map=class_map)
    assert found.of(TWELVE) == [int(name) for name in TWELVE] and found.names == [str(i) for i in range(12)] and found.notes == []
    found = decide(["b"], class_map={"a": 0, "b": 1})
    assert found.of(["b"]) == [1] and found.names == ["a", "b"] and "names 2 classes, and the training images are of 1" in found.notes[0]
    assert "names no class number 1" in refusal(["a"], class_map={"a": 0, "b": 2})
    assert "does not name 1 of the data's 2 classes, ['c']" in refusal(["a", "c"], class_map={"a": 0, "b": 1})


def test_a_class_map_says_what_outputs_are():
    class_map = {str(i): i for i in range(12)}
    for use in ("evaluate", "resume", "finetune"):
        found = decide(TWELVE, Weights("w", 12), class_map, use)
        assert found.of(TWELVE) == [int(name) for name in TWELVE] and not found.notes and not found.fresh
    places, found = outputs(["tench", "cat"], Weights("w", 1000), {"cat": 281, "tench": 0}, "evaluate")
    assert places == [0, 281] and len(found.names) == 1000 and "the data have 2 of 1000 classes" in found.notes[0]
    assert "names class number 12, and w has 12 outputs" in refusal(["x"], Weights("w", 12), {"x": 12}, "evaluate")
    places, found = outputs(["tench"], Weights("w", 1000, SYNSETS), {"tench": 0}, "evaluate")  # another word for it
    assert places == [0] and found.names[0] == SYNSETS[0]


def test_a_class_map_that_contradicts_the_weights():
    said = refusal(["cat", "dog"], Weights("w", 2, ["cat", "dog"]), {"cat": 1, "dog": 0}, "evaluate")
    assert said.startswith("--class-map says that 'cat' is number 1, and w that it is number 0")
    found = decide(["cat", "dog"], Weights("w", 2, ["cat", "dog"]), {"cat": 1, "dog": 0}, "finetune")
    assert found.fresh and found.names == ["dog", "cat"] and found.of(["cat", "dog"]) == [1, 0]
    assert decide(["cat", "dog"], Weights("w", 3), {"cat": 1, "dog": 0}, "finetune").fresh


# ---- through main.py ----

@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Twelve classes 0..11 of coloured noise, and weights whose head is solved for their training images in numeric order.

    -> folder, state dict, logits (48, 12) and classes by number (48,) of the validation images, in the folders' order
    """
    root, rng = tmp_path_factory.mktemp("labels") / "twelve", np.random.default_rng(0)
    colours = rng.integers(0, 256, (12, 2, 3)).repeat(16, 1)[:, :, None]  # two halves, one colour each
    for split, count in (("train", 8), ("val", 4)):
        for number, colour in enumerate(colours):
            (root / split / str(number)).mkdir(parents=True)
            for i in range(count):
                pixels = (colour + rng.normal(0, 60, (32, 32, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / str(number) / f"{i}.png")
    torch.manual_seed(0)
    net = timm.create_model(MODEL, num_classes=12).eval()
    transform = datasets.build_transform(False, input_size=32, preprocessing=networks.preprocessing(MODEL, 32, published=True))

    @torch.no_grad()
    def features(split):
        images, classes = datasets.build_dataset(split == "train", root, "IMNET", transform)
        images, targets, _ = zip(*(images[i] for i in range(len(images))))
        y = torch.tensor([int(classes[i]) for i in targets])
        return net.forward_head(net.forward_features(torch.stack(images)), pre_logits=True), y

    x, y = features("train")
    mean = x.mean(0)
    centred = torch.cat([x - mean, torch.ones(len(x), 1)], 1).double()
    solved = torch.linalg.solve(centred.T @ centred + 1e-3 * torch.eye(centred.shape[1]), centred.T @ torch.eye(12).double()[y]).float()
    state = net.state_dict() | {"head.fc.weight": 10 * solved[:-1].T.contiguous(), "head.fc.bias": 10 * (solved[-1] - mean @ solved[:-1])}
    x, y = features("val")
    return root, state, x @ state["head.fc.weight"].T + state["head.fc.bias"], y


def rearranged(state, outputs, total=None):
    """The state with the row of class i at outputs[i]; other outputs never win."""
    total = total or len(outputs)
    weight, bias = torch.zeros(total, state["head.fc.weight"].shape[1]), torch.full((total,), -1e3)
    weight[list(outputs)], bias[list(outputs)] = state["head.fc.weight"], state["head.fc.bias"]
    return state | {"head.fc.weight": weight, "head.fc.bias": bias}


def accuracy(logits, targets):
    return f"{100 * (logits.argmax(1) == targets).double().mean().item():.3f}%"


@pytest.fixture
def evaluated(capsys, tmp_path):
    """evaluated(data, content, *words) -> its notes on classes, and the accuracy that main.py says or its line of error"""
    def start(data, content, *words):
        torch.save(content, tmp_path / "w.pth")
        status = main.run(["--device=cpu", "--eval", "--model", MODEL, "--input-size=32", "--num_workers=0", "--batch-size=16",
                           "--data-path", str(data), "--resume", str(tmp_path / "w.pth"), *map(str, words)])
        out, err = capsys.readouterr()
        if status:
            assert status == 2 and err.count("\n") == 1 and not out.count("Accuracy")
            return out, err
        notes = [line for line in out.splitlines() if line.startswith("note: ") and "note: images are " not in line]
        return notes, out.splitlines()[-1].partition("images: ")[2]
    return start


def test_weights_without_names_on_twelve_numbered_folders(twelve, evaluated, tmp_path, run_main):
    """As a user starts it; without --class-map these weights would be evaluated as 0, 1, 10, 11, 2."""
    data, state, logits, targets = twelve
    right = accuracy(logits, targets)
    assert float(right[:-1]) > 50, "the weights must be good, or the test shows nothing"
    assert accuracy(logits, torch.tensor([TWELVE.index(str(int(i))) for i in targets])) != right
    _, error = evaluated(data, state)
    assert "does not say what its 12 outputs are, and the data's classes have two orders, ['0', '1', '10', '11', ...]" in error
    write(tmp_path, "map.txt", "\n".join(NUMBERS))
    done = run_main("--device=cpu", "--eval", "--model", MODEL, "--input-size=32", "--num_workers=0", "--data-path", data,
                    "--resume", tmp_path / "w.pth", "--class-map", tmp_path / "map.txt")
    assert done.returncode == 0 and done.stdout.endswith(f"Accuracy of the network on the 48 test images: {right}\n"), done.stderr
    assert not done.stderr and "outputs" not in done.stdout


def test_weights_with_names_find_their_folders(twelve, evaluated):
    data, state, logits, targets = twelve
    order = np.random.default_rng(1).permutation(12).tolist()  # class i is output order[i]
    names = [str(order.index(i)) for i in range(12)]
    notes, found = evaluated(data, {"model": rearranged(state, order), "classes": names})
    assert found == accuracy(logits, targets) and len(notes) == 1 and "in another order" in notes[0]
    notes, found = evaluated(data, {"model": rearranged(state, [int(i) for i in map(TWELVE.index, NUMBERS)]), "classes": TWELVE})
    assert found == accuracy(logits, targets) and not notes


def test_some_of_the_classes_are_evaluated_over_all_outputs(twelve, evaluated, tmp_path):
    data, state, logits, targets = twelve
    some = shutil.copytree(data, tmp_path / "some", ignore=shutil.ignore_patterns("3", "7", "11"))
    kept = torch.tensor([int(i) not in (3, 7, 11) for i in targets])
    notes, found = evaluated(some, {"model": state, "classes": NUMBERS})
    assert found == accuracy(logits[kept], targets[kept])
    assert notes == [f"note: the data have 9 of the 12 classes of {tmp_path}/w.pth: accuracy is over all outputs"]
    _, error = evaluated(some, state)
    assert "12 outputs without names, and the data 9 classes" in error


@pytest.mark.parametrize("kind", ["synsets", "numbers", "a map"])
def test_weights_of_a_thousand_classes_on_twelve_of_them(twelve, evaluated, tmp_path, kind):
    data, state, logits, targets = twelve
    places = np.random.default_rng(2).permutation(1000)[:12].tolist()
    names = {"synsets": [SYNSETS[i] for i in places], "numbers": [str(i) for i in places], "a map": [f"kind {i}" for i in range(12)]}[kind]
    for number, name in enumerate(names):
        shutil.copytree(data / "val" / str(number), tmp_path / "data" / "val" / name)
    words = []
    if kind == "a map":
        words = ["--class-map", write(tmp_path, "map.csv", "".join(f"{name},{i}\n" for name, i in zip(names, places)))]
        assert "another number of classes" in evaluated(tmp_path / "data", rearranged(state, places, 1000))[1]
    notes, found = evaluated(tmp_path / "data", rearranged(state, places, 1000), *words)
    assert found == accuracy(logits, targets) and "accuracy is over all" in notes[-1]
    assert len(notes) == (2 if kind == "numbers" else 1)


def test_names_in_both_forms_of_unicode_are_one_class(twelve, evaluated, tmp_path):
    """train/ from one file system and val/ from another, where café sorts before and behind caff: they must not change places."""
    data, state, logits, targets = twelve
    for split, form in (("train", NFC), ("val", NFD)):
        shutil.copytree(data / split / "0", tmp_path / "data" / split / form)
        shutil.copytree(data / split / "1", tmp_path / "data" / split / "caff")
    train, val, classes = datasets.build_datasets(tmp_path / "data", "IMNET", None, None)
    assert classes == ["caff", NFC] and val.classes == [NFD, "caff"]
    for part in (train, val):
        assert all(labels.normal(classes[part[i][1]]) == labels.normal(Path(part.name(i)).parent.name) for i in range(len(part)))
    content = {"model": state | {key: state[key][[0, 1]] for key in ("head.fc.weight", "head.fc.bias")}, "classes": [NFC, "caff"]}
    two = targets < 2
    notes, found = evaluated(tmp_path / "data", content)
    assert found == accuracy(logits[two][:, :2], targets[two])


def test_shards_carry_names_and_say_numbers(twelve, evaluated, tmp_path):
    data, state, logits, targets = twelve
    write_shards(data, tmp_path / "shards")
    notes, found = evaluated(tmp_path / "shards", {"model": state, "classes": NUMBERS})
    assert found == accuracy(logits, targets) and "in another order" in notes[0]
    for split in ("train", "val"):
        (tmp_path / "shards" / split / "index.json").unlink()
    _, error = evaluated(tmp_path / "shards", {"model": state, "classes": TWELVE})
    assert "the data's labels are numbers only" in error
    by_folder = rearranged(state, [TWELVE.index(name) for name in NUMBERS])
    notes, found = evaluated(tmp_path / "shards", by_folder)
    assert found == accuracy(logits, targets) and "does not say what its 12 outputs are: taken for" in notes[0]


def trained(capsys, data, folder, *words):
    status = main.run(["--device=cpu", "--model", MODEL, "--input-size=32", "--num_workers=0", "--batch-size=16", "--max_step=1", "--lr=0",
                       "--min-lr=0", "--warmup-lr=0", "--mixup=0", "--cutmix=0", "--aa=none", "--color-jitter=0", "--reprob=0",
                       "--data-path", str(data), "--output_dir", str(folder), *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_teacher_is_asked_by_name(twelve, tmp_path, capsys):
    """The same teacher with its outputs in another order: the loss is the same. Of other classes, or in doubt: one line."""
    data, state, _, _ = twelve
    order = np.random.default_rng(1).permutation(12).tolist()
    files = {"same": {"model": rearranged(state, [TWELVE.index(name) for name in NUMBERS]), "classes": TWELVE},
             "order": {"model": rearranged(state, order), "classes": [str(order.index(i)) for i in range(12)]},
             "more": {"model": rearranged(state, order, 20), "classes": [str(order.index(i)) if i < 12 else f"x{i}" for i in range(20)]},
             "doubt": state, "others": {"model": state, "classes": [*NUMBERS[:11], "x"]}}
    losses = []
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        status, out, err = trained(capsys, data, tmp_path / name, "--distillation-type=hard", "--distillation-alpha=1", "--no-eval",
                                   "--num_workers=1", "--drop-path=0",  # nothing else draws from the stream that made the teacher's head
                                   "--teacher-model", MODEL, "--teacher-path", tmp_path / f"{name}.pth")
        if name in ("doubt", "others"):
            assert status == 2 and err.count("\n") == 1
            assert ("have two orders" in err) if name == "doubt" else ("was trained on other classes" in err and "take a teacher" in err)
        else:
            assert status == 0, err
            losses.append(json.loads((tmp_path / name / "log.txt").read_text())["train_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_a_class_map_orders_a_training_and_travels_with_its_checkpoint(twelve, evaluated, tmp_path, capsys):
    data, state, logits, targets = twelve
    torch.save(state, tmp_path / "weights.pth")
    write(tmp_path, "map.json", json.dumps({name: int(name) for name in TWELVE}))
    status, out, err = trained(capsys, data, tmp_path / "run", "--finetune", tmp_path / "weights.pth", "--class-map", tmp_path / "map.json")
    assert status == 0, err
    saved = torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True)
    assert saved["classes"] == NUMBERS and saved["named"]
    row = json.loads((tmp_path / "run" / "log.txt").read_text())
    assert row["test_acc1"] == pytest.approx(float(accuracy(logits, targets)[:-1]), abs=1e-3)
    notes, found = evaluated(data, saved)
    assert found == accuracy(logits, targets) and "in another order" in notes[0]
    status, _, err = trained(capsys, data, tmp_path / "run", "--resume=auto", "--class-map", write(tmp_path, "m.txt", "\n".join(TWELVE)))
    assert status == 2 and "--class-map says that '10' is number 2, and" in err
