"""Is an NPU set up in the order it wants, used in the precision it has, and left alone where it is not asked for?"""

import json
import os
import shutil

import pytest

pytest.register_assert_rewrite("helpers")

# isort: split

import helpers
import torch
from helpers import CPU, NPU, host, one_error, run, setting, trains, usual, works
from loader_probe import Probe

import devices
import loaders
from precision import Precision, optimizer_flavour

pytest_plugins = ["helpers"]
ONE_STEP = ["--epochs=1", "--max_step=1", "--no-eval"]
QUICK = [*ONE_STEP, "--batch-size=2"]


def automatic(folder, *words):
    """A quick run that leaves precision and HF32 to the device."""
    return [word for word in usual(folder, *QUICK) if word not in ("--amp=off", "--fp32")] + list(words)


# ---- setting up ----

@pytest.fixture
def events(monkeypatch):
    """What happens in devices.init_distributed_mode, in order: (name, arguments, keyword arguments)."""
    found = []
    helpers.use_first_npu()

    def record(owner, name, event, result=True):
        original = getattr(owner, name)

        def recording(*given, **words):
            found.append((event, given, words))
            return original(*given, **words) if result else None
        monkeypatch.setattr(owner, name, recording)

    import torch_npu

    record(torch.npu, "set_device", "set_device")
    record(torch_npu._C, "_npu_setOption", "option")
    record(torch.distributed, "init_process_group", "init_process_group", result=False)
    return found


def test_an_npu_is_set_up_before_its_first_tensor_and_before_the_process_group(events, monkeypatch):
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=29500).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(devices, "rendezvous", lambda *ranks: ("store of", *ranks))
    helpers.needs(2)
    try:
        ranks = devices.init_distributed_mode("npu")
    finally:
        torch.npu.set_device(0)
        events.pop()
    assert ranks == devices.Ranks(torch.device("npu", 1), 1, 2, 1)
    (first, given, _), *options, (last, backend, words) = events
    assert (first, given) == ("set_device", (torch.device("npu", 1),))
    assert [option[:2] for option in options] == [("option", ({"jitCompile": "disable"},)),
                                                  ("option", ({"ALLOW_INTERNAL_FORMAT": "disable"},))]
    assert (last, backend, words) == ("init_process_group", ("cpu:gloo,npu:hccl",), {
        "device_id": torch.device("npu", 1), "store": ("store of", 1, 2), "rank": 1, "world_size": 2})


BEFORE_THE_FIRST_TENSOR = """
import json, sys
sys.path.insert(0, sys.argv.pop())
import devices, npu_sim, torch
before = npu_sim.counts()
ranks = devices.init_distributed_mode("npu:3")
after = npu_sim.counts()
print(json.dumps({"device": str(ranks.device), "current": torch.npu.current_device(), "jit": not torch.npu.is_jit_compile_false(),
                  "launches": after["launches"]["total"], "copies": after["h2d"]["calls"]}))
"""


def test_no_tensor_is_made_while_an_npu_is_set_up(real):
    if real:
        pytest.skip("only the simulator counts")
    found = helpers.run_program(helpers.sys.executable, "-c", BEFORE_THE_FIRST_TENSOR, helpers.ROOT, **helpers.clean({}))
    assert json.loads(found.stdout) == {"device": "npu:3", "current": 3, "jit": False, "launches": 0, "copies": 0}


def test_two_ranks_talk_over_hccl_and_gloo(few, tmp_path, real):
    counts = None if real else host(counts=tmp_path / "counts.json")
    log = works(*usual(few, *QUICK), ranks=2, on=counts).stdout
    assert setting(log, "device").startswith("npu:0 (") and "world size 2" in log
    if not real:
        assert all(found["collectives"]["AllReduce"]["calls"] > 0 for found in helpers.counted_by(tmp_path / "counts.json"))


@pytest.mark.parametrize("words, conv, matmul", [([], True, False), (["--fp32"], False, False), (["--hf32"], True, True)])
def test_fp32_and_hf32_set_convolutions_and_products(few, monkeypatch, words, conv, matmul):
    seen = []
    set_tensor_float = devices.set_tensor_float
    monkeypatch.setattr(devices, "set_tensor_float", lambda *given: [
        set_tensor_float(*given), seen.append((torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32))])
    trains(*automatic(few, *words))
    assert seen == [(conv, matmul)]


# ---- which device ----

@pytest.mark.parametrize("asked, index", [("auto", 0), ("npu", 0), ("npu:3", 3)])
def test_the_device_asked_for_computes(few, asked, index):
    helpers.needs(index + 1)
    torch.npu.reset_peak_memory_stats(index)
    done = trains(*usual(few, *QUICK, f"--device={asked}"))
    assert setting(done.out, "device").startswith(f"npu:{index} (")
    assert torch.npu.max_memory_allocated(index) > 1e6


def test_visible_devices_are_numbered_anew(few):
    helpers.needs(4)
    visible = {"ASCEND_RT_VISIBLE_DEVICES": "2,3"}
    log = works(*usual(few, *QUICK, "--device=npu:1"), **visible).stdout
    assert setting(log, "device").startswith("npu:1 (")
    done = helpers.start(*usual(few, *QUICK, "--device=npu:3"), **visible)
    assert done.returncode == 2
    assert one_error(done.stderr) == ("error: card 3 on this machine, but only 2 npu devices are visible: start fewer (--nproc), "
                                      "or look at ASCEND_RT_VISIBLE_DEVICES")


@pytest.mark.parametrize("words", [["--device=cpu"], []], ids=["cpu", "auto"])
def test_a_cpu_trains_and_loads_where_no_npu_is_visible(few, words):
    """With torch_npu in the process neither AdamW nor a loader's workers would run."""
    done = works(*usual(few, *QUICK, "--num_workers=2", *words), on=host(npus=0))
    assert setting(done.stdout, "device").startswith("cpu (")
    assert "NPU" not in done.stderr


def test_a_run_on_the_cpu_does_not_load_torch_npu(few):
    program = "import sys, main; status = main.run(); print(status, 'torch_npu' in sys.modules)"
    done = helpers.run_program(helpers.sys.executable, "-c", program, *usual(few, *QUICK, "--device=cpu"),
                               **helpers.clean({"PYTHONPATH": helpers.python_path(helpers.ROOT)}))
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr


# ---- loader workers ----

def test_loader_workers_have_no_torch_npu(monkeypatch):
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")  # and its old state comes back
    start_method = devices.worker_start_method(NPU)
    assert start_method == "forkserver" and devices.worker_start_method(CPU) is None
    torch.ones(1, device=NPU)  # from here on a fork would be fatal
    loader = loaders.build_loader(Probe(), False, 2, 2, start_method=start_method)
    found = [pair for ids, loaded in loader for pair in zip(ids.tolist(), loaded.tolist())]
    assert len(found) == 8 and os.getpid() not in {pid for pid, _ in found} and len({pid for pid, _ in found}) == 2
    assert not any(loaded for _, loaded in found)


def test_a_run_with_loader_workers_uses_the_npu_in_one_process_only(few, tmp_path, real):
    log = works(*usual(few, "--epochs=2", "--batch-size=2", "--num_workers=2"), on=None if real else host(counts=tmp_path / "counts.json"))
    assert setting(log.stdout, "device").startswith("npu:0 (") and "fork" not in log.stderr
    if not real:
        assert len(helpers.counted_by(tmp_path / "counts.json")) == 1


# ---- precision ----

def test_a_910b_trains_in_bf16_with_foreach_adamw(few):
    if not torch.npu.is_bf16_supported():
        pytest.skip("this NPU has no bf16")
    done = trains(*automatic(few))
    assert setting(done.out, "precision") == "bf16" and setting(done.out, "optimizer").startswith("AdamW,")
    assert optimizer_flavour(NPU, "adamw") == (None, {"foreach": True})


def test_fp16_with_inf_and_nan_has_torchs_scaler():
    if not torch.npu.utils.is_support_inf_nan():
        pytest.skip("this NPU has no inf and nan")
    scaler = Precision(NPU, "fp16").scaler
    assert type(scaler) is torch.amp.GradScaler and scaler.is_enabled()


@pytest.fixture(scope="session")
def on_910a(few, tmp_path_factory):
    """-> log, folder of an epoch of Twins-SVT-S on a 910A, as it comes"""
    folder = tmp_path_factory.mktemp("910A")
    words = ["--data-path", few, "--input-size=32", "--num_workers=0", "--batch-size=6", "--epochs=1", "--print-freq=1", "--lr=0.01",
             "--sched-lag=0", "--warmup-epochs=0", "--output_dir", folder]
    yield works(*words, on=host(npus=1, soc="910A")).stdout, folder
    shutil.rmtree(folder)


def test_a_910a_trains_in_fp16_with_torch_npus_scaler_and_the_flat_optimizer(on_910a):
    log, folder = on_910a
    assert setting(log, "device").startswith("npu:0 (Ascend910A)") and setting(log, "precision") == "fp16"
    assert setting(log, "optimizer").startswith("NpuFusedAdamW,")
    assert all(0 < loss < 10 for loss in helpers.losses_of(log)) and len(helpers.losses_of(log)) == 2
    saved = helpers.load(folder / "checkpoint.pth")
    assert saved["scaler"]["dynamic"] is True and {t.device for t in helpers.tensors(saved)} == {CPU}
    assert all(torch.isfinite(t).all() for t in helpers.tensors(saved["model"]))


def test_a_910as_checkpoint_evaluates_on_the_cpu(on_910a, few):
    _, folder = on_910a
    words = ["--data-path", few, "--input-size=32", "--num_workers=0", "--batch-size=6", "--device=cpu"]
    done = run(*words, "--eval", "--resume", folder / "checkpoint.pth")
    assert done.status == 0
    accuracy = helpers.rows(folder)[0]["test_acc1"]
    assert f"Accuracy of the network on the 6 test images: {accuracy:.3f}%" in done.out
