"""What of a run survives: the optimizer's state by name and shape, the moving average, the scaler, progress; others' checkpoints."""
import argparse
import contextlib
import copy
import hashlib
import http.server
import io
import os
import random
import re
import shutil
import subprocess
import threading
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import timm
import timm.optim
import torch
import torch.hub
from conftest import build_optim
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import checkpoint
import engine
import gvt
import optim
from precision import make_precision
from state import MovingAverage, State

CPU = torch.device("cpu")


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16),
                         nn.LayerNorm(16), nn.Linear(16, 4))


def build(model, opt="adamw", **settings):
    return build_optim(model, CPU, **{**dict(lr=1e-2, global_batch=512, epochs=10, opt=opt, eps=1e-8), **settings})[0]


def train(model, optimizer, steps, seed, amp="off"):
    """The training loop of a run, on random images."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    batches = [(torch.randn(4, 3, 8, 8, generator=generator), torch.randint(4, (4,), generator=generator)) for _ in range(steps)]
    engine.train_one_epoch(model, lambda images, outputs, targets: nn.functional.cross_entropy(outputs, targets), batches, optimizer,
                           CPU, 0, make_precision(CPU, amp), 5.0, quiet=True)


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def nearly_equal(model, other, **tolerance):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# ---- every optimizer of timm's ----

@pytest.fixture
def eager():
    """kron compiles its products, for which a machine needs a compiler; their values are not what is asked here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opt", [*timm.optim.list_optimizers(), "lookahead_adamw", "lookahead_sgd", "lookahead_radam"])
def test_every_optimizer_resumes_bit_for_bit_or_is_refused_in_one_line(opt):
    """3 steps, a file, 3 more: the weights of 6 steps; also with the names, which the file has, in another order."""
    straight = small()
    try:
        optimizer = build(straight, opt)
    except ValueError as error:
        assert "\n" not in str(error) and ("CUDA required" in str(error) or "second derivatives" in str(error))
        return
    train(straight, optimizer, 3, seed=1)
    saved = through_a_file({"model": straight.state_dict(), "optimizer": optim.portable_state(optimizer, straight)})
    train(straight, optimizer, 3, seed=2)
    resumed = small(seed=9)
    resumed.load_state_dict(saved["model"])
    other = build(resumed, opt)
    optim.load_state(other, saved["optimizer"], resumed)
    train(resumed, other, 3, seed=2)
    nearly_equal(straight, resumed, rtol=0, atol=0)


# ---- upstream's checkpoints ----

def upstreams_order(model):
    """The names in the order of upstream's ALTGVT and GroupBlock: both delete what they inherit and add their own at the end."""
    order = {"norm1": 0, "norm2": 1, "mlp": 2, "attn": 3}

    def place(name):
        top = ["patch_embeds", "norm", "head", "pos_block", "blocks"].index(name.split(".")[0])
        block = name.split(".")[1:4] if top == 4 else []
        return (top, *(map(int, block[:2])), *(order[part] for part in block[2:]))

    return sorted((name for name, _ in model.named_parameters()), key=place)


def upstreams_checkpoint(model, steps=2):
    """What upstream writes: AdamW over timm 0.3.2's two groups of a model whose modules stand in upstream's order, no names."""
    order, parameters = upstreams_order(model), dict(model.named_parameters())
    exempt = [n for n in order if parameters[n].ndim == 1 or n.endswith(".bias") or n.startswith("pos_block.")]
    groups = [{"params": [parameters[n] for n in exempt], "weight_decay": 0.0},
              {"params": [parameters[n] for n in order if n not in set(exempt)], "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = int(entry["step"])  # torch 1.x counted so
    for group in state["param_groups"]:
        for key in ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
    scaler = {"scale": 2.0 ** 14, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 7}
    return {"model": {n: parameters[n].detach().clone() for n in order}, "optimizer": state, "lr_scheduler": {}, "epoch": 4,
            "scaler": scaler}, optimizer


@pytest.fixture(scope="module")
def upstream():
    model = gvt.alt_gvt_small(num_classes=3)
    return model, *upstreams_checkpoint(model)


def test_upstreams_order_is_another_and_most_moments_have_another_shape(upstream):
    model, saved, _ = upstream
    ours = build(model)
    positions = [p for group in ours.param_groups for p in group["params"]]
    assert len(positions) == len(saved["optimizer"]["state"]) == 290
    assert sum(saved["optimizer"]["state"][i]["exp_avg"].shape != p.shape for i, p in enumerate(positions)) == 177


def test_upstreams_moments_find_their_parameters(upstream):
    """Every moment belongs to the parameter that it was made of, and counts its steps."""
    _, saved, theirs = upstream
    model = gvt.alt_gvt_small(num_classes=3)
    model.load_state_dict(saved["model"])
    ours = build(model)
    notes = optim.load_state(ours, through_a_file(saved["optimizer"]), model, list(saved["model"]))
    assert notes == ["the checkpoint does not say its optimizer's kind: by what it keeps it is taken for AdamW"]
    by_name = {name: ours.state[p] for name, p in model.named_parameters()}
    for name, parameter in upstream[0].named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(by_name[name][key], theirs.state[parameter][key]), (name, key)
        assert float(by_name[name]["step"]) == 2


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_positions_are_read_in_one_group_or_two_whatever_the_weight_decay_now(upstream, decay):
    """timm makes one group where nothing decays."""
    _, saved, theirs = upstream
    model = gvt.alt_gvt_small(num_classes=3)
    ours = build(model, weight_decay=decay)
    optim.load_state(ours, copy.deepcopy(saved["optimizer"]), model, list(saved["model"]))
    by_name = {name: ours.state[p] for name, p in model.named_parameters()}
    assert all(torch.equal(by_name[name]["exp_avg"], theirs.state[p]["exp_avg"]) for name, p in upstream[0].named_parameters())


def test_a_state_of_ours_without_names_still_resumes():
    """As our checkpoints were before they had names, and integer steps were floats in tensors; their options say --opt."""
    straight = small()
    optimizer = build(straight, "radamlegacy")
    train(straight, optimizer, 3, seed=1)
    saved = through_a_file({"model": straight.state_dict(), "optimizer": optimizer.state_dict()})
    for entry in saved["optimizer"]["state"].values():
        entry["step"] = torch.tensor(float(entry["step"]))
    train(straight, optimizer, 3, seed=2)
    resumed = small(seed=9)
    resumed.load_state_dict(saved["model"])
    other = build(resumed, "radamlegacy")
    assert optim.load_state(other, saved["optimizer"], resumed, list(saved["model"]), "radamlegacy") == []
    assert {type(entry["step"]) for entry in other.state.values()} == {int}
    train(resumed, other, 3, seed=2)
    nearly_equal(straight, resumed, rtol=0, atol=0)


def test_names_find_their_parameters_whatever_the_order_of_the_modules():
    class Pair(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                setattr(self, name, nn.Linear(4, 4))

    first, second = Pair("ab"), Pair("ba")
    saver, loader = build(first), build(second)
    for number, parameter in enumerate(first.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    saver.step()
    optim.load_state(loader, through_a_file(optim.portable_state(saver, first)), second, [])
    theirs = {name: saver.state[p]["exp_avg"] for name, p in first.named_parameters()}
    assert all(torch.equal(loader.state[p]["exp_avg"], theirs[name]) for name, p in second.named_parameters())


# ---- what does not fit ----

@pytest.mark.usefixtures("eager")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("now", ["nadam", "nadamw", "lion", "lamb", "radam", "adamp", "adam", "sgd", "adan", "kron", "lookahead_adamw"])
@pytest.mark.parametrize("said_by", ["kind", "options", "keys"])
def test_adamws_state_under_another_optimizer_is_one_line(now, said_by):
    """A state without kind and names is of upstream's or an older one of ours: their options say --opt, else what is kept tells."""
    model = small()
    optimizer = build(model)
    train(model, optimizer, 1, seed=1)
    state = optim.portable_state(optimizer, model) if said_by == "kind" else optimizer.state_dict()
    with pytest.raises(ValueError, match=r"^the checkpoint's optimizer is of another kind.*--opt") as caught:
        optim.load_state(build(model, now), copy.deepcopy(state), model, list(model.state_dict()),
                         "adamw" if said_by == "options" else None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opt, kind", [("momentum", "SGD"), ("lion", "Lion")])
def test_a_state_that_does_not_say_its_kind_is_the_running_optimizers_where_only_that_keeps_the_same(opt, kind):
    model = small()
    optimizer = build(model, opt)
    train(model, optimizer, 1, seed=1)
    fresh = build(model, opt)
    notes = optim.load_state(fresh, through_a_file(optimizer.state_dict()), model, list(model.state_dict()))
    assert notes == [f"the checkpoint does not say its optimizer's kind: by what it keeps it is taken for {kind}"]
    for parameter in model.parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(fresh.state[parameter][key], value), key


def spoil(state, what):
    first = next(iter(state["state"].values()))
    if what == "shape":
        first["exp_avg"] = first["exp_avg"].flatten()[:-1]
    elif what == "transposed":
        first = next(entry for entry in state["state"].values() if entry["exp_avg"].shape == (16, 8))
        first["exp_avg_sq"] = first["exp_avg_sq"].t().contiguous()
    elif what == "text":
        first["exp_avg"] = "moments"
    elif what == "step":
        first["step"] = torch.ones(3)
    elif what == "no groups":
        del state["param_groups"]
    elif what == "empty groups":
        state["param_groups"] = []
    elif what == "groups of text":
        state["param_groups"] = ["a", "b"]
    elif what == "no state":
        state["state"] = None
    elif what == "fewer":
        state["param_groups"][0]["params"].pop()
        state["param_groups"][0]["param_names"].pop()
    elif what == "other names":
        state["param_groups"][0]["param_names"][0] = "x"
    return state


@pytest.mark.parametrize("what, said", [
    ("shape", "does not fit the model: of 0.bias, its shape is (7,), not (8,)"), ("transposed", "its shape is (8, 16), not (16, 8)"),
    ("text", "of 0.bias, it is a str"), ("step", "of 0.bias, its shape is (3,), not ()"),
    ("no groups", "is not one that torch writes"), ("empty groups", "is not one that torch writes"),
    ("groups of text", "is not one that torch writes"), ("no state", "is not one that torch writes"),
    ("fewer", "has other parameters: was it another model? It has 9, and the model 10"), ("other names", "has other parameters")])
def test_a_state_that_does_not_fit_is_one_line_and_changes_nothing(what, said):
    model = small()
    optimizer = build(model)
    train(model, optimizer, 1, seed=1)
    state = spoil(copy.deepcopy(optim.portable_state(optimizer, model)), what)
    fresh = build(model)
    with pytest.raises(ValueError) as caught:
        optim.load_state(fresh, state, model, list(model.state_dict()))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not fresh.state


# ---- others' files ----

def net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 5), head=nn.Linear(5, classes)))


STATE = net().state_dict()
NUMPY = {"epoch": np.int64(3), "best": np.float32(81.5), "other": np.float64(0.25), "flag": np.bool_(True)}
OTHERS = {  # how others keep the same weights
    "numpy": {"model": STATE, **NUMPY},
    "paths": {"model": STATE, "args": argparse.Namespace(resume=Path("/a/b"), out=PurePosixPath("c"), lr=0.1),
              "windows": PureWindowsPath("C:/x")},
    "defaultdict": {"model": STATE, "meters": defaultdict(list, {"loss": [1.0]}), "nested": defaultdict(dict)},
    "ordered": OrderedDict(model=OrderedDict(STATE), epoch=1),
    "lightning": {"state_dict": {f"model.{k}": v for k, v in STATE.items()}, "pytorch-lightning_version": "2.1", "epoch": 3},
    "lightning net": {"state_dict": {f"net.{k}": v for k, v in STATE.items()}},
    "backbone": {"state_dict": {f"backbone.{k}": v for k, v in STATE.items()}, "meta": {"mmengine_version": "0.10"}},
    "swa": {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in STATE.items()}},
    "swa of ddp in lightning": {"state_dict": {f"model.module.{k}": v for k, v in STATE.items()}},
    "timm": {"epoch": 3, "arch": "x", "state_dict": STATE, "optimizer": {}, "version": 2, "args": argparse.Namespace(lr=1), "metric": 77.1},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", OTHERS)
def test_checkpoints_of_others_are_read(tmp_path, name, old):
    torch.save(OTHERS[name], tmp_path / "theirs.pth", _use_new_zipfile_serialization=not old)
    content = checkpoint.read(tmp_path / "theirs.pth")
    model = net()
    model.body.weight.data.zero_()
    checkpoint.load_weights(model, checkpoint.model_state(content), "theirs.pth")
    nearly_equal(model, net(), rtol=0, atol=0)
    if name == "numpy":
        assert {key: content[key] for key in NUMPY} == NUMPY and {type(content[key]) for key in NUMPY} == {int, float, bool}
    if name == "paths":
        assert (content["args"].resume, content["args"].out, content["windows"]) == ("/a/b", "c", "C:\\x")
    if name == "defaultdict":
        assert type(content["meters"]) is dict and content["meters"] == {"loss": [1.0]}


def test_numpys_numbers_have_had_two_names(tmp_path):
    """NumPy 1 called it numpy.core, NumPy 2 numpy._core."""
    for new in ("_core", "core"):
        torch.save({"model": STATE, "best": np.float64(2.5)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
        whole = (tmp_path / "a.pth").read_bytes()
        assert b"numpy._core.multiarray" in whole or b"numpy.core.multiarray" in whole
        (tmp_path / "a.pth").write_bytes(re.sub(rb"numpy\._?core\.multiarray", f"numpy.{new}.multiarray".encode(), whole))
        assert checkpoint.read(tmp_path / "a.pth")["best"] == 2.5


class History:
    """As mmengine's: of a class that this project has not."""

    def __init__(self, values):
        self.values = values


def test_objects_of_unknown_classes_are_left_out_and_never_made(tmp_path):
    torch.save({"model": STATE, "hyper_parameters": History([1, 2]), "epoch": 3}, tmp_path / "a.pth")
    content = checkpoint.read(tmp_path / "a.pth")
    assert content["epoch"] == 3 and type(content["hyper_parameters"]) is checkpoint.Foreign
    assert checkpoint.model_state(content).keys() == STATE.keys()


class Config(dict):
    """As Lightning's hyper-parameters."""


def test_what_cannot_be_left_out_is_named(tmp_path):
    torch.save({"model": STATE, "hyper_parameters": Config(lr=0.1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"^cannot read the checkpoint .*a\.pth safely: it holds test_state\.Config, which [^\n]*$"):
        checkpoint.read(tmp_path / "a.pth")


@pytest.mark.parametrize("what", [History([1]), net()], ids=["an object", "a module"])
def test_a_whole_object_is_one_line(tmp_path, what):
    torch.save(what, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"^cannot read the checkpoint .*a\.pth safely: it holds [^\n]*$"):
        checkpoint.read(tmp_path / "a.pth")


class Program:
    def __init__(self, call, *words):
        self.call, self.words = call, words

    def __reduce__(self):
        return self.call, self.words


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("call, words", [(os.system, ("touch sprung",)), (eval, ("open('sprung', 'w')",)), (exec, ("open('sprung', 'w')",)),
                                         (subprocess.call, (["touch", "sprung"],)), (shutil.copy, (__file__, "sprung")),
                                         (getattr, ("", "upper"))])
def test_no_checkpoint_runs_anything(tmp_path, monkeypatch, call, words, old):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "x": Program(call, *words)}, "a.pth", _use_new_zipfile_serialization=not old)
    with contextlib.suppress(ValueError):
        checkpoint.read("a.pth")
    assert not os.path.exists("sprung")


def test_an_average_of_nothing_holds_no_weights():
    with pytest.raises(ValueError, match="holds no weights"):
        checkpoint.model_state({"n_averaged": torch.tensor(5)})


@pytest.mark.parametrize("content", [random.Random(n).randbytes(5000) for n in range(20)] + [b"PK\x03\x04", b"hello", b"\x80\x02}q\x00."],
                         ids=range(23))
def test_torchs_advice_to_trust_a_file_is_never_quoted(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    try:
        checkpoint.read(tmp_path / "a.pth")
    except ValueError as error:
        assert "weights_only" not in str(error) and "\n" not in str(error) and "a.pth" in str(error)


@pytest.mark.parametrize("content, taken", [
    ({"better": "model_ema"}, "average"), ({"better": "model"}, "weights"), ({"options": {}}, "average"), ({}, "weights"),
    ({"better": "model_ema", "model_ema": {}}, "weights"), ({"better": 3}, "weights")], ids=str)
def test_what_decided_is_taken(content, taken):
    """An older one of ours does not say: the average decided then. Others' say nothing: their weights are the trained ones."""
    both = {"model": {"weights": torch.ones(1)}, "model_ema": {"average": torch.ones(1)}, **content}
    assert [*checkpoint.model_state(both)] == [taken] and [*checkpoint.model_state(both, ema=False)] == ["weights"]


def test_the_exported_weights_of_the_readme_are_bare(tmp_path, monkeypatch):
    """What converters take, such as mmsegmentation's: a state dict, or one under 'state_dict'. README's command makes it."""
    monkeypatch.chdir(tmp_path)
    checkpoint.save("checkpoint.pth", model=STATE, optimizer={}, epoch=1)
    command = re.search(r"`(torch\.save\(torch\.load[^`]+)`", (Path(__file__).parents[2] / "README.md").read_text())[1]
    exec(command, {"torch": torch})
    assert {key: value.shape for key, value in torch.load("twins.pth", weights_only=True).items()} == {k: v.shape for k, v in STATE.items()}


# ---- addresses ----

@pytest.fixture
def server(tmp_path, monkeypatch):
    """https://host/ is a folder: a local HTTP server answers in its place. -> the folder, the requests"""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            asked.append(self.path)

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    opened = torch.hub.urlopen
    monkeypatch.setattr(torch.hub, "urlopen", lambda request, *args, **kwargs: opened(
        request.full_url.replace("https://host", f"http://127.0.0.1:{serving.server_port}"), *args, **kwargs))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    yield folder, asked
    serving.shutdown()
    serving.server_close()


def test_an_https_address_is_fetched_once_into_the_hubs_cache(server, tmp_path):
    folder, asked = server
    torch.save({"model": STATE}, folder / "twins.pth")
    for _ in range(2):
        assert checkpoint.model_state(checkpoint.read("https://host/twins.pth?download=1")).keys() == STATE.keys()
    assert asked == ["/twins.pth?download=1"]
    assert len(list((tmp_path / "home" / "hub" / "checkpoints").rglob("twins.pth"))) == 1


def test_a_checksum_in_the_name_is_checked(server, tmp_path):
    folder, _ = server
    torch.save({"model": STATE}, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()
    good, bad = f"twins-{digest[:8]}.pth", "twins-0123abcd.pth"
    for name in (good, bad):
        shutil.copy(folder / "x.pth", folder / name)
    assert checkpoint.model_state(checkpoint.read(f"https://host/{good}")).keys() == STATE.keys()
    assert (tmp_path / "home" / "hub" / "checkpoints" / good).is_file()  # where torch.hub looks for it
    with pytest.raises(ValueError, match=r"^cannot fetch https://host/twins-0123abcd\.pth \(invalid hash value[^\n]*$"):
        checkpoint.read(f"https://host/{bad}")
    assert not list((tmp_path / "home").rglob(bad))


def test_files_of_one_name_at_two_addresses_are_two_files(server):
    folder, _ = server
    for name, value in (("a", 1.0), ("b", 2.0)):
        (folder / name).mkdir()
        torch.save({"model": {"w": torch.tensor([value])}}, folder / name / "best.pth")
    assert [checkpoint.read(f"https://host/{name}/best.pth")["model"]["w"].item() for name in "ab"] == [1.0, 2.0]


@pytest.mark.parametrize("address", ["https://host/missing.pth", "https://host/", "https://host/.."])
def test_what_cannot_be_fetched_is_one_line(server, address):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        checkpoint.read(address)
    assert address in str(caught.value)


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://host/a.pth", "http://host/a.pth", "data:,x", "pipe:x", "HTTPS://host/a.pth"])
def test_nothing_else_is_taken_for_an_address(monkeypatch, address):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: pytest.fail("a path was opened as an address"))
    with pytest.raises(ValueError, match=r"^no checkpoint [^\n]+$"):
        checkpoint.read(address)


def test_a_file_whose_name_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE}, "pipe:touch sprung")
    assert checkpoint.model_state(checkpoint.read("pipe:touch sprung")).keys() == STATE.keys()
    assert os.listdir() == ["pipe:touch sprung"]


# ---- whatever a file holds ----

KEYS = st.text(max_size=3) | st.integers(0, 9)
ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(torch.ones(2)),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=4)


def places(value, at=()):
    """Every place in nested dictionaries and lists, as a path of keys."""
    yield at
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*at, key))


@pytest.fixture(scope="module")
def training():
    model = small()
    optimizer, schedule, _ = build_optim(model, CPU, lr=1e-2, global_batch=512, epochs=10, sched="plateau")
    train(model, optimizer, 1, seed=1)
    return State(model, optimizer, schedule, make_precision(CPU, "fp16"), MovingAverage(model, 0.9), epoch=1).state_dict()


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_state_with_anything_anywhere_is_taken_or_one_line(training, data):
    saved = copy.deepcopy(training)
    where = data.draw(st.sampled_from([at for at in places(saved) if at and at != ("model",)]))
    inner = saved
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = data.draw(ANYTHING)
    model = small()
    optimizer, schedule, _ = build_optim(model, CPU, lr=1e-2, global_batch=512, epochs=10, sched="plateau")
    state = State(model, optimizer, schedule, make_precision(CPU, "fp16"), MovingAverage(model, 0.9))
    try:
        state.load_state_dict(saved)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    train(model, optimizer, 1, seed=2)
