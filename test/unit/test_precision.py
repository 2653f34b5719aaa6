"""What one update is: precisions, scalers, clipping, apex, the optimizers' flavours. Devices that are not here are stand-ins."""
import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import devices
from precision import FlatGradients, Precision, make_precision, make_scaler, optimizer_flavour

CPU = torch.device("cpu")
NPU = SimpleNamespace(type="npu", index=0)  # what the code reads of torch.device("npu", 0)


def step(precision, x=1.0, max_norm=None, weight=2.0):
    """One step of SGD on weight * x with rate 1. -> the weight after it"""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with precision.autocast():
        loss = model(torch.full((1, 1), x)).float().sum()
    precision(loss, optimizer, max_norm)
    return model.weight.item()


@pytest.mark.parametrize("amp, name, dtype", [("auto", "fp32", torch.float32), ("off", "fp32", torch.float32),
                                              ("bf16", "bf16", torch.bfloat16), ("fp16", "fp16", torch.float16)])
def test_a_cpu_computes_in_the_precision_asked_for(amp, name, dtype):
    precision = make_precision(CPU, amp)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert precision.name == name and (precision.scaler is not None) == (amp == "fp16")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_follows_the_gradient_and_clips_it(amp):
    precision = Precision(CPU, amp)
    precision.load_state_dict({"scale": 256.0})
    assert step(precision, x=0.5) == pytest.approx(1.5)
    assert step(precision, x=8.0, max_norm=0.25) == pytest.approx(1.75, abs=1e-3)
    assert step(precision, x=8.0, max_norm=0) == pytest.approx(-6.0)


def test_without_an_update_only_the_gradient_grows():
    weight = nn.Parameter(torch.ones(1))
    optimizer, precision = torch.optim.SGD([weight], lr=1.0), Precision(CPU)
    precision((3 * weight).sum(), optimizer, need_update=False)
    assert weight.item() == 1 and weight.grad.item() == 3
    precision((4 * weight).sum(), optimizer)
    assert weight.item() == 1 - 7


def test_fp16_skips_a_step_whose_gradient_overflows_and_halves_the_scale():
    precision = Precision(CPU, "fp16")
    precision.load_state_dict({"scale": 256.0})
    assert step(precision, x=float("inf"), max_norm=5.0) == 2.0
    assert precision.scaler.get_scale() == 128.0
    assert step(precision, x=0.5, max_norm=5.0) == pytest.approx(1.5)


def test_a_device_without_bf16_refuses_it_and_auto_takes_fp16(monkeypatch):
    monkeypatch.setattr("precision.native_bf16", lambda device: False)
    monkeypatch.setattr(devices, "describe", lambda device: "npu:0 (Ascend910A)")
    monkeypatch.setattr("precision.make_scaler", lambda device: "a scaler")
    with pytest.raises(ValueError, match=r"--amp bf16: npu:0 \(Ascend910A\) does not compute bfloat16: use --amp fp16"):
        Precision(NPU, "bf16")
    precision = Precision(NPU, "auto")
    assert (precision.name, precision.scaler) == ("fp16", "a scaler")


def test_auto_takes_bf16_where_it_is_native(monkeypatch):
    monkeypatch.setattr("precision.native_bf16", lambda device: True)
    assert Precision(NPU, "auto").name == "bf16"


@pytest.mark.parametrize("inf_nan_mode, kind", [(True, "torch"), (False, "torch_npu")])
def test_an_npu_without_inf_and_nan_gets_the_scaler_that_reads_its_flag(monkeypatch, inf_nan_mode, kind):
    npu = SimpleNamespace(utils=SimpleNamespace(is_support_inf_nan=lambda: inf_nan_mode),
                          amp=SimpleNamespace(GradScaler=lambda: "torch_npu"))
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: {"npu": "torch"}[device])
    assert make_scaler(NPU) == kind


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_the_flat_clipping_of_an_npu_equals_torchs_step_after_step(max_norm):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((7, 3), (5,), (), (2, 2, 2))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    flat, optimizer = FlatGradients(), torch.optim.SGD(ours, lr=0.1)
    for accumulated in (False, False, True):  # the last gradient is added to the one before
        for own, other in zip(ours, theirs):
            gradient = torch.randn_like(own)
            own.grad = own.grad + gradient if accumulated else gradient.clone()
            other.grad = other.grad + gradient if accumulated else gradient.clone()
        norm = flat.clip_(optimizer, ours, max_norm)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
        torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs])


@pytest.mark.parametrize("state", [
    {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 17},
    {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 17, "dynamic": True},
    {"loss_scaler0": {"loss_scale": 1024.0, "unskipped": 17}}], ids=["torch", "torch_npu", "apex"])
def test_the_state_of_each_scaler_goes_on(state):
    precision = Precision(CPU, "fp16")
    precision.load_state_dict(state)
    own = precision.state_dict()
    assert (own["scale"], own["_growth_tracker"]) == (1024.0, 17)
    assert own.keys() == torch.amp.GradScaler("cpu").state_dict().keys()


@pytest.mark.parametrize("state", [{"loss_scaler0": 5}, {"loss_scaler0": {}}, {"loss_scaler0": {"loss_scale": "1", "unskipped": 0}},
                                   {"scale": None}])
def test_what_is_no_scalers_state_is_one_line(state):
    precision = Precision(CPU, "fp16")
    before = precision.state_dict()
    with pytest.raises(ValueError, match="loss scaler is not one that torch writes"):
        precision.load_state_dict(state)
    assert precision.state_dict() == before


def test_a_scaler_without_a_saved_state_keeps_its_own_and_fp32_has_none():
    precision = Precision(CPU, "fp16")
    precision.load_state_dict({})
    assert precision.scaler.get_scale() == 65536
    full = Precision(CPU)
    full.load_state_dict({"scale": 1.0})
    assert full.state_dict() == {}


# ---- apex ----

class FakeAmp(SimpleNamespace):
    """As much of Ascend's apex.amp as training calls; it scales the loss by 4."""

    def initialize(self, model, optimizer, opt_level="O1", combine_grad=None):
        self.called = (opt_level, combine_grad)
        return model, optimizer

    @contextlib.contextmanager
    def scale_loss(self, loss, optimizer):
        yield loss * 4
        for parameter in self.master_params(optimizer):
            parameter.grad /= 4

    def master_params(self, optimizer):
        return (parameter for group in optimizer.param_groups for parameter in group["params"])

    def state_dict(self):
        return {"loss_scaler0": {"loss_scale": 4.0, "unskipped": 1}}

    def load_state_dict(self, state):
        self.loaded = state


@pytest.fixture
def install(monkeypatch):
    """install(amp=...): an apex with these parts; install(None): none."""
    def put(parts):
        monkeypatch.delitem(sys.modules, "apex.amp", raising=False)
        if parts is None:
            monkeypatch.setitem(sys.modules, "apex", None)
            return
        module = type(sys)("apex")
        module.__path__ = []
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, "apex", module)
    return put


REMEDY = ": install Ascend's apex, or go on without it: --amp auto"


@pytest.mark.parametrize("parts, message", [
    (None, "--amp apex: apex is not installed" + REMEDY),
    ({}, "--amp apex: the installed apex has no amp (NVIDIA removed it in 2025, and PyPI's package of that name is something "
         "else)" + REMEDY),
    ({"amp": SimpleNamespace(initialize=lambda model, optimizer, opt_level: None)},
     "--amp apex: the installed apex is NVIDIA's, whose amp.initialize has no combine_grad" + REMEDY)], ids=["none", "no amp", "NVIDIA's"])
def test_an_apex_that_is_not_ascends_is_said(install, parts, message):
    install(parts)
    with pytest.raises(ValueError) as error:
        make_precision(CPU, "apex")
    assert str(error.value) == message


def test_ascends_apex_trains_as_the_original_did(install):
    amp = FakeAmp()
    install({"amp": amp})
    precision = make_precision(CPU, "apex")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert precision.initialize(model, optimizer) == (model, optimizer) and amp.called == ("O1", True)
    assert step(precision, x=0.5) == pytest.approx(1.5)
    assert step(precision, x=8.0, max_norm=0.25) == pytest.approx(1.75, abs=1e-3)  # the unscaled gradient is clipped


def test_apex_takes_its_own_state_and_torchs(install):
    amp = FakeAmp()
    install({"amp": amp})
    precision = make_precision(CPU, "apex")
    assert precision.state_dict() == amp.state_dict()
    for state in (amp.state_dict(), {"scale": 4.0, "_growth_tracker": 1, "growth_factor": 2.0}):
        precision.load_state_dict(state)
        assert amp.loaded == {"loss_scaler0": {"loss_scale": 4.0, "unskipped": 1}}


# ---- optimizers ----

@pytest.mark.parametrize("device, opt, precision, bf16, flavour", [
    (CPU, "adamw", "fp32", True, (None, {"fused": True})), (torch.device("cuda", 0), "adamw", "fp16", True, (None, {"fused": True})),
    (CPU, "sgd", "fp32", True, (None, {})), (NPU, "adamw", "fp16", True, (None, {"foreach": True})),
    (NPU, "adamw", "fp16", False, ("torch_npu's", {})), (NPU, "npufusedadamw", "bf16", True, ("torch_npu's", {})),
    (NPU, "adamw", "apex", True, ("apex's", {})), (NPU, "sgd", "apex", True, (None, {}))])
def test_each_device_gets_its_fastest_correct_optimizer(monkeypatch, device, opt, precision, bf16, flavour):
    monkeypatch.setattr("precision.native_bf16", lambda device: bf16)
    for name, kind in (("torch_npu.optim", "torch_npu's"), ("apex.optimizers", "apex's")):
        monkeypatch.setitem(sys.modules, name.partition(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(NpuFusedAdamW=kind))
    assert optimizer_flavour(device, opt, precision) == flavour


def test_the_npus_optimizer_runs_nowhere_else():
    with pytest.raises(ValueError, match="--opt npufusedadamw runs on an NPU, not on cpu: use --opt adamw"):
        optimizer_flavour(CPU, "npufusedadamw")
