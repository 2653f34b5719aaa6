"""python tools conformance: it passes, and each of its lines fails where its fact does not hold."""
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ELASTIC, ROOT
from PIL import Image
from timm.optim import param_groups_weight_decay

import optim
from tools import _published, _upstream, conformance

MODELS = _published.models()
LINE = re.compile(r"(\S.*?)  +(\S.*?)  +(\S.*?)  (yes|NO)")


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git keeps here, with nothing beside it; for a test to spoil."""
    folder = tmp_path / "check out"
    names = subprocess.run(["git", "ls-files", "*.py", "published", "tools"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in names:
        if not name.startswith("test/") and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(checkout, *words, cwd=None):
    """-> status, [(what, published, found, ok)], the last line"""
    env = {key: value for key, value in os.environ.items() if key not in ELASTIC}
    done = subprocess.run([sys.executable, checkout / "tools", "conformance", *map(str, words)], cwd=cwd or checkout.parent, env=env,
                          capture_output=True, text=True, timeout=900)
    assert "Traceback" not in done.stderr, done.stderr
    header, *lines, last = done.stdout.splitlines() or ["", ""]
    assert header.split() == ["what", "published", "found", "ok"], done.stderr
    return done.returncode, [LINE.fullmatch(line).groups() for line in lines], last


def test_this_checkout_holds_every_fact(checkout):
    """As on a fresh clone: with what git keeps, and nothing else."""
    status, rows, last = run(checkout)
    assert (status, last) == (0, f"all {len(rows)} facts hold") and {ok for *_, ok in rows} == {"yes"}
    count = {kind: sum(kind in what for what, *_ in rows) for kind in (
        "parameters", "decayed", "multiply-adds", "outputs", "rates", "steps an epoch", "evaluation transform", "upstream's epoch")}
    assert list(count.values()) == [6, 6, 6, 6, 6, 2, 2, 8] and len(rows) == 42


def keep_one(checkout, **changes):
    """Facts of one model and one epoch of upstream's training, for the time that the others take. changes: added to its numbers"""
    model, facts = "pcpvt_small_v0", MODELS["pcpvt_small_v0"]
    with open(checkout / "published" / "models.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["model", *facts], [model, *{key: facts[key] + changes.get(key, type(facts[key])()) for key in facts}.values()]])
    run = _published.training()[1]
    (checkout / "published" / "training.json").write_text(json.dumps([run | {"epochs": 1, "rows": run["rows"][:1]}]))


def spoil(path, there, instead):
    text = path.read_text()
    assert there in text
    path.write_text(text.replace(there, instead))


def test_every_line_fails_where_code_or_fact_is_another(checkout):
    keep_one(checkout, parameters=1, decayed=-1, gmac=0.1)
    spoil(checkout / "gvt.py", "eps=1e-6", "eps=1e-2")  # of the blocks' norms
    spoil(checkout / "optim.py", "self.scheduler.step(epoch - self.lag, metric)", "self.scheduler.step(epoch, metric)")
    spoil(checkout / "samplers.py", "return len(self.parts[0]) // self.batch_size *", "return -(-len(self.parts[0]) // self.batch_size) *")
    spoil(checkout / "samplers.py", "return self.total // 256 * 256 //", "return self.total // 256 * 255 //")
    spoil(checkout / "transforms.py", "crop_pct: float = 0.875", "crop_pct: float = 0.9")
    status, rows, last = run(checkout)
    assert status == 1 and {ok for *_, ok in rows} == {"NO"} and not any("Error" in found for _, _, found, _ in rows), rows
    assert len(rows) == 10 and last.startswith("10 of 10 facts do not hold: pcpvt_small_v0, parameters; pcpvt_small_v0, not decayed ")
    assert rows[-1][0] == "pcpvt_small_v0, upstream's epoch 0" and "1,252" in {found for _, _, found, _ in rows}


def test_a_check_that_fails_in_itself_is_a_line(checkout):
    """Other shapes than timm's, and a main.py that ends with an error."""
    keep_one(checkout)
    spoil(checkout / "gvt.py", "DepthwiseConv2d(dim, dim, 3, padding=1", "DepthwiseConv2d(dim, dim, 5, padding=2")
    spoil(checkout / "engine.py", "def train_one_epoch(", "def train_one_epoch(*_, **__):\n    raise ValueError('no')\n\n\ndef another(")
    status, rows, _ = run(checkout, "parameters", "outputs", "steps", "training")
    found = {what: (said, ok) for what, _, said, ok in rows}
    assert status == 1 and found["pcpvt_small_v0, parameters"][1] == "NO" and found["steps an epoch"][1] == "yes"
    assert found["pcpvt_small_v0, outputs"][0].startswith("RuntimeError: Error(s) in loading state_dict")
    assert found["pcpvt_small_v0, upstream's training"] == ("RuntimeError: main.py ended with status 2: error: no", "NO")


# ---- one fact each ----

@pytest.mark.parametrize("model", MODELS)
def test_the_facts_are_timms(model):
    """Parameters and groups, by timm's own rule of its own model."""
    with torch.device("meta"):
        twin = timm.create_model(MODELS[model]["timm"])
    groups = param_groups_weight_decay(twin, 0.05, no_weight_decay_list=twin.no_weight_decay())
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert sizes == [MODELS[model]["not_decayed"], MODELS[model]["decayed"]] and sum(sizes) == MODELS[model]["parameters"]


def multiply_adds(dims, depths, ratios):
    """Of SVT at 224 pixels, by hand: the products of layers, those of attention's two products."""
    layers = attention = 0
    before, side = 3 * 4 * 4, 56
    for dim, depth, ratio in zip(dims, depths, ratios):
        tokens, keys = side * side, (side // ratio) ** 2
        layers += tokens * before * dim + tokens * 9 * dim  # patches, PEG
        for block in range(depth):
            layers += tokens * dim * dim * (1 + 1 + 8)  # q, what is projected, the two layers of the MLP
            layers += tokens * dim * 2 * dim if block % 2 == 0 else keys * dim * 2 * dim  # k and v
            if block % 2 and ratio > 1:
                layers += keys * ratio ** 2 * dim * dim
            attention += 2 * tokens * dim * (49 if block % 2 == 0 else keys)
        before, side = dim * 4, side // 2
    return (layers + dims[-1] * 1000) / 1e9, attention / 1e9


def test_multiply_adds_are_those_counted_by_hand():
    layers, attention = multiply_adds((64, 128, 256, 512), (2, 2, 10, 4), (8, 4, 2, 1))
    row = conformance.operations("alt_gvt_small", MODELS["alt_gvt_small"])
    assert row.ok and row.found == f"{layers:.3f} / {layers + attention:.3f}"


@pytest.mark.parametrize("spoiled", [{"gmac": 2.9}, {"gmac_with_attention": 2.8}])
def test_each_of_the_two_counts_is_looked_at(spoiled):
    assert not conformance.operations("alt_gvt_small", MODELS["alt_gvt_small"] | spoiled).ok


@pytest.mark.parametrize("epoch", [0, 6, 299])
def test_one_epoch_of_another_rate_is_found_and_named(epoch):
    model, rows = "pcpvt_small_v0", _published.curves()["pcpvt_small_v0"]
    assert conformance.schedule(model, MODELS[model], rows).ok
    rows[epoch]["train_lr"] *= 1.00002
    row = conformance.schedule(model, MODELS[model], rows)
    assert not row.ok and row.found.startswith(f"299 the same, in epoch {epoch} ")


def test_decay_of_one_bias_is_found(monkeypatch):
    plain = optim.decay_groups

    def moved(net, decay):
        groups = plain(net, decay)
        groups[1]["params"] = [*groups[1]["params"], groups[0]["params"][0]]
        groups[0]["params"] = groups[0]["params"][1:]
        return groups

    assert conformance.groups("alt_gvt_small", MODELS["alt_gvt_small"]).ok
    monkeypatch.setattr(optim, "decay_groups", moved)
    assert not conformance.groups("alt_gvt_small", MODELS["alt_gvt_small"]).ok


class Trained:
    def __init__(self, rows):
        self.rows = lambda: rows


@pytest.mark.parametrize("key, off", [("train_lr", 2e-11), ("train_loss", 2e-5), ("test_loss", -2e-5), ("test_acc1", 4), ("test_acc5", -4)])
def test_a_row_that_differs_in_one_number_fails_alone(key, off):
    published = _published.training()[0]
    rows = [dict(row) for row in published["rows"]]
    rows[1][key] += off
    found = list(conformance.epochs(published, {"alt_gvt_small": Trained(rows)}))
    assert [row.ok for row in found] == [True, False, True] and found[1].what == "alt_gvt_small, upstream's epoch 1"
    missing = list(conformance.rows_of("training", lambda: conformance.epochs(published, {"alt_gvt_small": Trained(rows[:1])})))
    assert [row.ok for row in missing] == [True, False]


def test_curves_have_every_epoch_and_column():
    curves = _published.curves()
    assert list(curves) == list(MODELS) and [len(rows) for rows in curves.values()] == [300] * 5 + [296]
    assert all([row["epoch"] for row in rows] == list(range(300 - len(rows), 300)) for rows in curves.values())
    for model, rows in curves.items():  # Acc@1 as it is published is the best of them; the rate's peak is the published one
        assert round(max(row["test_acc1"] for row in rows), 1) == MODELS[model]["acc1"]
        assert max(row["train_lr"] for row in rows) == pytest.approx(MODELS[model]["peak_lr"], rel=0.02)


# ---- Acc@1 of published weights ----

@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Three images of ImageNet's classes, by their numbers."""
    folder = tmp_path_factory.mktemp("imagenet")
    for i, name in enumerate(("n01440764", "n01443537", "n01484850")):
        (folder / "val" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (80 * i, 20, 30)).save(folder / "val" / name / "a.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "some.pth"
    torch.save({"model": timm.create_model("twins_svt_small").state_dict()}, path)
    return path


def test_accuracy_is_main_pys_and_of_all_of_imagenet(imagenet, weights):
    status, rows, last = run(ROOT, "steps", "--weights", weights, "--data-path", imagenet, "--device=cpu", "--num_workers=0",
                             "--batch-size=2", cwd=imagenet)
    assert status == 1 and [ok for *_, ok in rows] == ["yes", "yes", "NO"]
    what, published, found, _ = rows[2]
    assert (what, published) == ("alt_gvt_small, Acc@1 of 50,000 images", "81.7 %") and re.fullmatch(r"\d+\.\d{3} % of 3", found)
    assert last == "1 of 3 facts do not hold: alt_gvt_small, Acc@1 of 50,000 images"


@pytest.mark.parametrize("said, found, ok", [
    ("Accuracy of the network on the 50000 test images: 81.722%", "81.722 %", True),
    ("Accuracy of the network on the 50000 test images: 81.590%", "81.590 %", False),
    ("Accuracy of the network on the 49999 test images: 81.722%", "81.722 % of 49,999", False),
    ("error: --data-path x: no such folder", "error: --data-path x: no such folder", False)])
def test_accuracy_is_compared_with_the_published(tmp_path, monkeypatch, said, found, ok):
    (tmp_path / "main.py").write_text(f"import sys\nprint({said!r})\nsys.exit({2 if 'error' in said else 0})\n")
    monkeypatch.setattr(_upstream, "MAIN", tmp_path / "main.py")
    row = conformance.accuracy("x.pth", "alt_gvt_small", MODELS["alt_gvt_small"], "x", [])
    assert (row.published, row.found, row.ok) == ("81.7 %", found, ok)


def test_a_mistake_is_one_line(tool, weights, tmp_path):
    together = "error: --weights and --data-path go together: published weights, and ImageNet to evaluate them on\n"
    assert tool("conformance", "--weights", weights) == tool("conformance", "--data-path", tmp_path) == (2, "", together)
    status, out, said = tool("conformance", "schedul")
    assert (status, out) == (2, "") and said.startswith("error: there is no check schedul: parameters, groups, ")
    torch.save({"model": timm.create_model("twins_svt_small", num_classes=10).state_dict()}, tmp_path / "other.pth")
    status, out, said = tool("conformance", "--weights", weights, tmp_path / "other.pth", "--data-path", tmp_path)
    assert (status, out) == (2, "") and said.startswith(f"error: {tmp_path}/other.pth holds none of alt_gvt_small, ")


@pytest.mark.parametrize("model", MODELS)
def test_each_models_weights_are_known(model, monkeypatch):
    monkeypatch.setattr("checkpoint.read", lambda path: {"model": conformance.build(model).state_dict()})
    assert conformance.model_of("x.pth") == model
