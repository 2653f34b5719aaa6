"""What a machine computes on: the choice, its errors, precision and scalers. Devices that are not here are stand-ins."""
import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import devices

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NPU = SimpleNamespace(type="npu", index=0)  # what the code reads of torch.device("npu", 0)


# ---- which device ----

@pytest.mark.parametrize("words, kind", [
    ([], "auto"), (["--device", "cpu"], "cpu"), (["--device=cuda:1"], "cuda"), (["--device", "gpu"], "cuda"), (["--device=npu:3"], "npu"),
    (["--device", "npu", "--device=cpu"], "cpu"), (["--batch-size", "4", "--device"], "")])
def test_the_device_asked_for_is_read_before_torch_is(words, kind):
    assert devices.asked_for(words) == kind


@pytest.fixture
def machine(monkeypatch):
    """machine(npu=8): a machine with so many devices."""
    def make(**counts):
        monkeypatch.setattr(devices, "available", lambda kind: counts.get(kind, 0))
        if "npu" in counts:
            monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace())
        else:
            monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        # an x86 torch makes no torch.device("npu"); the name and the index are what is tested
        monkeypatch.setattr(devices.torch, "device", lambda *words: ":".join(map(str, words)))
    return make


@pytest.mark.parametrize("here, asked, chosen", [
    ({}, "auto", "cpu"), ({"cuda": 1}, "auto", "cuda:0"), ({"cuda": 2, "npu": 1}, "auto", "npu:0"), ({"cuda": 1}, "gpu", "cuda:0"),
    ({"cuda": 1}, "cpu", "cpu"), ({"npu": 8}, "npu:3", "npu:3"), ({"cuda": 2}, "cuda:1", "cuda:1")])
def test_one_process_gets_the_device_it_asked_for(machine, here, asked, chosen):
    machine(**here)
    assert devices.choose(asked) == chosen


def test_each_of_several_processes_gets_its_own_card(machine):
    machine(npu=4)
    assert [devices.choose("auto", rank, 4) for rank in range(4)] == ["npu:0", "npu:1", "npu:2", "npu:3"]


@pytest.mark.parametrize("here, asked, rank, ranks, message", [
    ({}, "cuda", 0, 1, "--device cuda: no cuda device is visible: look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or use --device cpu"),
    ({}, "npu", 0, 1, "--device npu: no npu device is visible (torch_npu is not installed): look at `npu-smi info` and at "
                      "ASCEND_RT_VISIBLE_DEVICES, or use --device cpu"),
    ({"npu": 0}, "npu:1", 0, 1, "--device npu:1: no npu device is visible: look at `npu-smi info`"),
    ({"cuda": 1}, "cuda:1", 0, 1, "card 1 on this machine, but only 1 cuda device is visible"),
    ({"npu": 2}, "npu", 0, 8, "8 processes on this machine, but only 2 npu devices are visible: start fewer (--nproc)"),
    ({"npu": 8}, "npu:3", 0, 2, "--device npu:3 names one card for 2 processes: say --device npu and choose the cards with "
                                "ASCEND_RT_VISIBLE_DEVICES"),
    ({}, "tpu", 0, 1, "--device tpu: say npu, cuda, gpu, cpu or auto, or one card as npu:3 or cuda:3"),
    ({"npu": 8}, "npu:x", 0, 1, "--device npu:x: say npu, cuda, gpu, cpu or auto")])
def test_a_device_that_is_not_there_is_one_line_with_the_remedy(machine, here, asked, rank, ranks, message):
    machine(**here)
    with pytest.raises(ValueError) as error:
        devices.choose(asked, rank, ranks)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("asked", ["cpu", "cuda", "auto"])
def test_torch_npu_without_an_npu_makes_the_run_start_again_without_it(machine, asked):
    machine(npu=0, cuda=1)
    with pytest.raises(devices.NeedsRestart):
        devices.choose(asked)


def test_one_process_joins_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = devices.init_distributed_mode("cpu")
    assert (ranks.device, ranks.rank, ranks.world_size, ranks.is_main) == (CPU, 0, 1, True)
    assert not torch.distributed.is_initialized()


# ---- what went wrong ----

@pytest.mark.parametrize("message, remedy", [
    ("The server socket has failed to listen (EADDRINUSE)", "port 29712 is in use: another run has it; set MASTER_PORT"),
    ("bind: Address already in use", "port 29712 is in use"),
    ("EI0006: Getting socket times out", "the ranks did not find each other in time (EI0006)"),
    ("[ERROR] EI0002 notify wait", "a rank waited too long for another (EI0002)"),
    ("CUDA out of memory. Tried to allocate", "use a smaller --batch-size (and --accum-steps), or --grad-checkpointing"),
    ("NPU out of memory. Tried", "the device is out of memory"),
    ("RuntimeError: No NPUs are available", "no NPU is visible: look at `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES")])
def test_a_known_failure_is_said_with_its_remedy(monkeypatch, message, remedy):
    monkeypatch.setenv("MASTER_PORT", "29712")
    told = devices.explain(RuntimeError(message))
    assert isinstance(told, devices.DeviceError) and remedy in str(told) and "\n" not in str(told)


def test_an_unknown_failure_stays_what_it_is():
    error = RuntimeError("shapes differ")
    assert devices.explain(error) is error


def caused(message, cause):
    error = RuntimeError(message)
    error.__cause__ = cause
    return error


AUTOLOAD = "Failed to load the backend extension: torch_npu. You can disable extension auto-loading with TORCH_DEVICE_BACKEND_AUTOLOAD=0."


@pytest.mark.parametrize("error, remedy", [
    (caused(AUTOLOAD, ImportError("libhccl.so: cannot open shared object file")), "torch_npu finds no CANN: source "),
    (ImportError("libascendcl.so: cannot open shared object file"), "torch_npu finds no CANN: source "),
    (caused(AUTOLOAD, ImportError("undefined symbol: _ZN3c10")),
     "torch_npu does not load (undefined symbol: _ZN3c10): torch and torch_npu must have the same version"),
    (ModuleNotFoundError("No module named 'torch'"), "torch does not load (No module named 'torch'): pip install -r requirements.txt")])
def test_a_failed_import_is_said_with_its_remedy(error, remedy):
    assert devices.explain_import(error).startswith(remedy)


@pytest.fixture(scope="module")
def broken_backend(tmp_path_factory):
    """A torch_npu that torch loads by itself and that finds no CANN."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "torch_npu-0.dist-info").mkdir()
    (folder / "torch_npu-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 0\n")
    (folder / "torch_npu-0.dist-info" / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (folder / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    return folder


def import_devices(folder, *argv):
    program = f"import sys; sys.argv = ['main.py', *{argv!r}]; import devices; print('loaded')"
    env = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env | {"PYTHONPATH": str(folder)}, capture_output=True,
                          text=True, timeout=120)


def test_a_run_on_a_cpu_does_not_load_torch_npu(broken_backend):
    done = import_devices(broken_backend, "--device", "cpu")
    assert done.stdout == "loaded\n", done.stderr


def test_a_torch_npu_that_does_not_load_ends_a_run_with_one_line(broken_backend, run_main):
    done = run_main("--data-path", "data", env={"PYTHONPATH": str(broken_backend)})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: torch_npu finds no CANN: source /usr/local/Ascend/ascend-toolkit/set_env.sh (CANN 8.5 and "
                                        "later: /usr/local/Ascend/cann/set_env.sh), or train without an NPU: --device cpu"]


# ---- small things ----

def test_a_seed_decides_what_python_numpy_and_torch_draw():
    import random

    import numpy

    def draws(seed):
        devices.seed_everything(seed)
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    assert draws(5) == draws(5)
    assert not set(draws(5)) & set(draws(6))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_parallel_on_a_cpu_leaves_buffers_alone_and_warns_of_nothing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = devices.parallel(nn.Linear(2, 1), CPU)
        assert model.device_ids is None and not model.broadcast_buffers and model.gradient_as_bucket_view
        assert not devices.parallel(nn.Linear(2, 1), CPU, flat_gradients=True).gradient_as_bucket_view
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fp32, hf32, allowed", [(True, False, False), (False, True, True), (False, False, "as before")])
def test_fp32_and_hf32_set_the_products_of_a_gpu(monkeypatch, fp32, hf32, allowed):
    matmul, cudnn = SimpleNamespace(allow_tf32="as before"), SimpleNamespace(allow_tf32="as before")
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    devices.set_tensor_float(torch.device("cuda", 0), fp32, hf32)
    assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed


# ---- precision ----

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
    precision = devices.make_precision(CPU, amp)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert precision.name == name and (precision.scaler is not None) == (amp == "fp16")


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_follows_the_gradient_and_clips_it(amp):
    precision = devices.Precision(CPU, amp)
    precision.load_state_dict({"scale": 256.0})
    assert step(precision, x=0.5) == pytest.approx(1.5)
    assert step(precision, x=8.0, max_norm=0.25) == pytest.approx(1.75, abs=1e-3)
    assert step(precision, x=8.0, max_norm=0) == pytest.approx(-6.0)


def test_without_an_update_only_the_gradient_grows():
    weight = nn.Parameter(torch.ones(1))
    optimizer, precision = torch.optim.SGD([weight], lr=1.0), devices.Precision(CPU)
    precision((3 * weight).sum(), optimizer, need_update=False)
    assert weight.item() == 1 and weight.grad.item() == 3
    precision((4 * weight).sum(), optimizer)
    assert weight.item() == 1 - 7


def test_fp16_skips_a_step_whose_gradient_overflows_and_halves_the_scale():
    precision = devices.Precision(CPU, "fp16")
    precision.load_state_dict({"scale": 256.0})
    assert step(precision, x=float("inf"), max_norm=5.0) == 2.0
    assert precision.scaler.get_scale() == 128.0
    assert step(precision, x=0.5, max_norm=5.0) == pytest.approx(1.5)


def test_a_device_without_bf16_refuses_it_and_auto_takes_fp16(monkeypatch):
    monkeypatch.setattr(devices, "native_bf16", lambda device: False)
    monkeypatch.setattr(devices, "describe", lambda device: "npu:0 (Ascend910A)")
    monkeypatch.setattr(devices, "make_scaler", lambda device: "a scaler")
    with pytest.raises(ValueError, match=r"--amp bf16: npu:0 \(Ascend910A\) does not compute bfloat16: use --amp fp16"):
        devices.Precision(NPU, "bf16")
    precision = devices.Precision(NPU, "auto")
    assert (precision.name, precision.scaler) == ("fp16", "a scaler")


def test_auto_takes_bf16_where_it_is_native(monkeypatch):
    monkeypatch.setattr(devices, "native_bf16", lambda device: True)
    assert devices.Precision(NPU, "auto").name == "bf16"


@pytest.mark.parametrize("inf_nan_mode, kind", [(True, "torch"), (False, "torch_npu")])
def test_an_npu_without_inf_and_nan_gets_the_scaler_that_reads_its_flag(monkeypatch, inf_nan_mode, kind):
    npu = SimpleNamespace(utils=SimpleNamespace(is_support_inf_nan=lambda: inf_nan_mode),
                          amp=SimpleNamespace(GradScaler=lambda: "torch_npu"))
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: {"npu": "torch"}[device])
    assert devices.make_scaler(NPU) == kind


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_the_flat_clipping_of_an_npu_equals_torchs_step_after_step(max_norm):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((7, 3), (5,), (), (2, 2, 2))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    flat, optimizer = devices.FlatGradients(), torch.optim.SGD(ours, lr=0.1)
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
    precision = devices.Precision(CPU, "fp16")
    precision.load_state_dict(state)
    own = precision.state_dict()
    assert (own["scale"], own["_growth_tracker"]) == (1024.0, 17)
    assert own.keys() == torch.amp.GradScaler("cpu").state_dict().keys()


def test_a_scaler_without_a_saved_state_keeps_its_own_and_fp32_has_none():
    precision = devices.Precision(CPU, "fp16")
    precision.load_state_dict({})
    assert precision.scaler.get_scale() == 65536
    full = devices.Precision(CPU)
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
        devices.make_precision(CPU, "apex")
    assert str(error.value) == message


def test_ascends_apex_trains_as_the_original_did(install):
    amp = FakeAmp()
    install({"amp": amp})
    precision = devices.make_precision(CPU, "apex")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert precision.initialize(model, optimizer) == (model, optimizer) and amp.called == ("O1", True)
    assert step(precision, x=0.5) == pytest.approx(1.5)
    assert step(precision, x=8.0, max_norm=0.25) == pytest.approx(1.75, abs=1e-3)  # the unscaled gradient is clipped


def test_apex_takes_its_own_state_and_torchs(install):
    amp = FakeAmp()
    install({"amp": amp})
    precision = devices.make_precision(CPU, "apex")
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
    monkeypatch.setattr(devices, "native_bf16", lambda device: bf16)
    for name, kind in (("torch_npu.optim", "torch_npu's"), ("apex.optimizers", "apex's")):
        monkeypatch.setitem(sys.modules, name.partition(".")[0], SimpleNamespace())
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(NpuFusedAdamW=kind))
    assert devices.optimizer_flavour(device, opt, precision) == flavour


def test_the_npus_optimizer_runs_nowhere_else():
    with pytest.raises(ValueError, match="--opt npufusedadamw runs on an NPU, not on cpu: use --opt adamw"):
        devices.optimizer_flavour(CPU, "npufusedadamw")


# ---- finding each other ----

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MASTER_TIMEOUT",
            "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture
def surroundings(monkeypatch):
    def put(words):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for word in words.split():
            monkeypatch.setenv(*word.split("="))
    return put


@pytest.mark.parametrize("words, said", [
    ("RANK=5 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", "RANK=5 is none of 2 (WORLD_SIZE), which count from 0"),
    ("RANK=1", "RANK=1 is none of 1 (WORLD_SIZE)"),
    ("RANK=2 WORLD_SIZE=2", "RANK=2 is none of 2 (WORLD_SIZE)"),
    ("RANK=-1 WORLD_SIZE=2", "RANK='-1' is not a whole number"),
    ("RANK=one WORLD_SIZE=2", "RANK='one' is not a whole number"),
    ("RANK=²", "RANK='²' is not a whole number"),
    ("WORLD_SIZE=0", "WORLD_SIZE=0, and a training is one process at least"),
    ("WORLD_SIZE=2.5", "WORLD_SIZE='2.5' is not a whole number"),
    ("WORLD_SIZE=99999999999999999999", "WORLD_SIZE='99999999999999999999' is not a whole number"),
    ("WORLD_SIZE=2", "WORLD_SIZE=2, but there is no RANK and no MASTER_ADDR and no MASTER_PORT"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x", "WORLD_SIZE=2, but there is no MASTER_PORT"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=abc", "MASTER_PORT='abc' is not a whole number"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=0", "MASTER_PORT=0 is no port"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=65536", "MASTER_PORT=65536 is no port"),
    ("LOCAL_RANK=x", "LOCAL_RANK='x' is not a whole number"),
    ("LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK=2 is none of 2 (LOCAL_WORLD_SIZE)"),
    ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE=0, and"),
])
def test_processes_that_cannot_be_are_said_before_anybody_waits(surroundings, words, said):
    surroundings(words)
    with pytest.raises(ValueError, match=r"torchrun|port") as caught:
        devices.init_distributed_mode("cpu")
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words, rank, world, local", [
    ("", 0, 1, 0), ("WORLD_SIZE=1", 0, 1, 0), ("RANK= WORLD_SIZE=", 0, 1, 0), ("MASTER_PORT=abc", 0, 1, 0),
    ("MASTER_ADDR=nowhere MASTER_PORT=0", 0, 1, 0),
    ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=29500", 3, 8, 3),
    ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=29500", 1, 2, 1)])
def test_processes_that_can_be(surroundings, words, rank, world, local):
    surroundings(words)
    found = devices.environment()
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == (rank, world, local)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds + 1e-3


@pytest.mark.parametrize("host, reason", [
    ("127.0.0.1", "refused"), ("no-such-host.invalid", "nown|resolution|hostname"), ("a..b", "label|nown"), ("x" * 80 + ".y", "long|nown")])
def test_an_unreachable_rank_0_is_said_soon_and_ends_in_time(capsys, host, reason):
    clock = Clock()
    with pytest.raises(devices.DeviceError, match=f"nothing answers at {host}:1 .*({reason}).*MASTER_TIMEOUT=7"):
        devices.reach(host, 1, 7, clock, clock.sleep)
    assert 7 <= clock.now < 9
    said = capsys.readouterr().err
    assert said.startswith(f"waiting 7 seconds at most for rank 0 at {host}:1 (") and said.count("\n") == 1


def test_a_rank_0_that_comes_late_is_found():
    clock = Clock()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))

        def sleep(seconds):
            clock.sleep(seconds)
            if clock.now > 3:
                server.listen()

        devices.reach("127.0.0.1", server.getsockname()[1], 60, clock, sleep)
    assert 3 < clock.now < 10


def test_an_unreachable_rank_0_through_the_command_line(run_main):
    done = run_main("--data-path=x", "--device=cpu", env=dict(
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", MASTER_TIMEOUT="1"), timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: nothing answers at 127.0.0.1:1 (") and done.stderr.count("\n") == 1


def test_a_wrong_rank_through_the_command_line(run_main):
    done = run_main("--data-path=x", "--device=cpu", env=dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="nonsense"), timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error (rank 0): LOCAL_RANK='nonsense' is not a whole number: torchrun") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("message, remedy", [
    ("The client socket has timed out after 3000ms while trying to connect to (a, 1).", "rank 0 cannot be reached at node7:29712"),
    ("Timed out after 4 seconds waiting for clients. 1/2 clients joined.", "not every rank came to node7:29712"),
    ("The IPv6 network addresses of (a, 1) cannot be retrieved (gai error: -2 - Name or service not known).", "cannot be resolved"),
    ("[/pytorch/third_party/gloo] rv: getaddrinfo: Temporary failure in name resolution", "cannot be resolved"),
    ("[enforce fail at gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find address for: ib0", "GLOO_SOCKET_IFNAME"),
    ("[gloo/transport/tcp/pair.cc:144] no error: Connection refused", "look for one that ended"),
    ("[gloo] Timed out waiting 1800000ms for recv operation to complete", "a rank waited too long for another"),
    ("NCCL error in: NCCLUtils.cpp:77, ncclInvalidUsage. Duplicate GPU detected : rank 0 and rank 1 both on CUDA device", "LOCAL_RANK"),
    ("NCCL error: unhandled system error, ncclSystemError: System call failed", "NCCL_DEBUG=INFO"),
    ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", "out of memory"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out of memory"),
    ("CUDA error: no kernel image is available for execution on the device", "the build of torch"),
    ("The NVIDIA driver on your system is too old (found version 11040).", "update it"),
    ("CUDA error: device-side assert triggered", "class number"),
])
def test_more_known_failures(monkeypatch, message, remedy):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29712")
    told = devices.explain(RuntimeError(f"{message}\nException raised from somewhere\nframe #0"))
    assert isinstance(told, devices.DeviceError) and remedy in str(told) and "\n" not in str(told)
    said = ValueError(f"there is no folder '{message}'")
    assert devices.explain(said) is said, "a name that sounds like a failure"


def test_no_memory_left_for_python():
    assert "this machine is out of memory" in str(devices.explain(MemoryError()))
