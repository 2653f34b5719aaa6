"""Does the simulator count what a device would pay for, and refuse what it cannot do? Against closed forms."""

import ctypes
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from programs import RUN, run_program, run_python

SMALL = dict.fromkeys(
    ["PYTHONPATH", "LD_LIBRARY_PATH", "NPU_SIM", "NPU_SIM_SOC", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH"]
)


def launched(sim):
    counts = sim.counts()["launches"]
    total = counts.pop("total")
    assert total == sum(counts.values())
    return counts


# ---- launches ----


def test_an_operator_is_a_launch(sim):
    x = torch.ones(4, 4, device="npu")
    sim.reset()
    (x + x).mul_(2)
    assert launched(sim) == {"add": 1, "mul_": 1}


def test_views_are_free(sim):
    x = torch.ones(4, 6, device="npu")
    sim.reset()
    x.t().unsqueeze(0).expand(2, 6, 4)[0].view(6, 4).permute(1, 0).reshape(24).view(4, 6).split(2)[0].detach()
    torch.empty(3, 3, device="npu")
    assert launched(sim) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_is_one_launch_each_way(sim, dtype):
    q, k, v = (torch.randn(3, 2, 5, 8, device="npu", dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.ones(3, 2, 5, 8, device="npu", dtype=dtype)
    sim.reset()
    out = F.scaled_dot_product_attention(q, k, v)
    assert launched(sim) == {"npu_fusion_attention": 1}
    out.backward(grad)
    assert launched(sim) == {"npu_fusion_attention": 1, "npu_fusion_attention_grad": 1}


@pytest.mark.parametrize("shape", [(2, 3, 2, 5, 8), (1, 1, 4, 520)], ids=["5d", "head_dim_520"])
def test_attention_that_does_not_fuse_is_its_parts(sim, shape):
    q = torch.randn(shape, device="npu")
    sim.reset()
    F.scaled_dot_product_attention(q, q, q)
    counts = launched(sim)
    assert counts["matmul"] == 2
    assert counts["_softmax"] == 1
    assert "npu_fusion_attention" not in counts


def test_a_layer_forward_and_backward(sim):
    layer = torch.nn.Linear(8, 4).to("npu")
    x = torch.ones(2, 8, device="npu", requires_grad=True)
    grad = torch.ones(2, 4, device="npu")
    sim.reset()
    layer(x).backward(grad)
    assert launched(sim) == {"addmm": 1, "mm": 2, "sum": 1}


def test_foreach_is_one_launch_and_a_loop_is_not(sim):
    tensors = [torch.ones(3, device="npu") for _ in range(7)]
    sim.reset()
    torch._foreach_add_(tensors, 1.0)
    assert launched(sim) == {"_foreach_add_": 1}
    torch._foreach_mul_(tensors, torch.ones((), device="npu"))  # torch_npu has no kernel for this form: one by one
    assert launched(sim)["mul_"] == 7


def test_autocast_casts_are_launches(sim):
    layer = torch.nn.Linear(8, 4, bias=False).to("npu")
    x = torch.ones(2, 8, device="npu")
    sim.reset()
    with torch.autocast("npu", torch.bfloat16):
        layer(x)
    counts = launched(sim)
    assert counts.pop("cast") == 2  # the weight and the input
    assert sum(counts.values()) == 1


# ---- layout copies, transfers, synchronisations ----


def test_layout_copies_and_their_bytes(sim):
    x = torch.arange(12.0, device="npu").view(3, 4)
    sim.reset()
    x.contiguous(), x.clone(), x.reshape(4, 3), x.to(torch.float16), x.t().to(torch.float16)
    assert sim.counts()["layout_copies"] == {"calls": 0, "bytes": 0}
    x.t().contiguous()
    assert sim.counts()["layout_copies"] == {"calls": 1, "bytes": 48}
    x.t().reshape(12)
    x[:, 1:].clone(memory_format=torch.contiguous_format)
    torch.empty(4, 3, dtype=torch.float16, device="npu").copy_(x.t())
    assert sim.counts()["layout_copies"] == {"calls": 4, "bytes": 48 + 48 + 36 + 24}


def test_item_waits(sim):
    x = torch.ones(3, device="npu").sum()
    sim.reset()
    assert x.item() == 3.0
    counts = sim.counts()
    assert counts["syncs"] == {"total": 1, "item": 1}
    assert counts["d2h"] == {"calls": 1, "bytes": 4}


def test_copies_wait_unless_told_and_pinned(sim):
    host = torch.ones(100)
    pinned = host.pin_memory()
    x = torch.empty(100, device="npu")
    sim.reset()
    x.copy_(pinned, non_blocking=True)
    pinned.to("npu", non_blocking=True)
    assert sim.counts()["syncs"] == {"total": 0}
    assert sim.counts()["h2d"] == {"calls": 2, "bytes": 800}
    x.copy_(host, non_blocking=True), x.copy_(pinned), host.to("npu")
    assert sim.counts()["syncs"] == {"total": 3, "h2d_copy": 3}
    assert x.cpu().tolist() == host.tolist()
    assert sim.counts()["d2h"] == {"calls": 1, "bytes": 400}
    assert sim.counts()["syncs"]["d2h_copy"] == 1


def test_a_strided_copy_to_the_host_lays_out_first(sim):
    x = torch.arange(12.0, device="npu").view(3, 4)
    sim.reset()
    assert torch.equal(x.t().cpu(), torch.arange(12.0).view(3, 4).t())
    assert sim.counts()["layout_copies"] == {"calls": 1, "bytes": 48}
    assert sim.counts()["d2h"] == {"calls": 1, "bytes": 48}


def test_every_way_to_wait_is_counted(sim):
    event, stream = torch.npu.Event(), torch.npu.Stream()
    event.record()
    sim.reset()
    torch.npu.synchronize(), stream.synchronize(), event.synchronize()
    assert sim.counts()["syncs"] == {"total": 3, "device": 1, "stream": 1, "event": 1}
    x = torch.ones(4, device="npu")
    x.nonzero(), x[x > 0], torch.equal(x, x)
    assert sim.counts()["syncs"]["total"] == 6  # sizes and answers that depend on data


def test_training_without_waiting(sim):
    model = torch.nn.Linear(4, 4).to("npu")
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.ones(2, 4, device="npu")
    for _ in range(2):
        sim.reset()
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert sim.counts()["syncs"] == {"total": 0}
    assert sim.counts()["h2d"] == sim.counts()["d2h"] == {"calls": 0, "bytes": 0}


# ---- what is not there ----


def test_missing_operators_say_their_names(sim):
    import torch_npu

    x = torch.ones(2, 4, device="npu")
    for call, label in (
        (lambda: torch_npu.npu_swiglu(x), "aclnnSwiGlu"),  # looked up in libopapi, where it is not
        (lambda: torch_npu.fast_gelu(x), "FastGelu"),  # compiled by name, refused by name
        (lambda: torch_npu.npu_iou(x, x), "Iou"),
    ):
        with pytest.raises(RuntimeError, match=label):
            call()
    assert sim.counts()["unimplemented"] == {"FastGelu": 1, "Iou": 1}


def test_no_operator_of_torch_is_left_to_a_stub(sim):
    """What torch declares and torch_npu registers is the simulator's, or bookkeeping, or a view."""
    left, ours = set(), 0
    for full in torch._C._dispatch_get_all_op_names():
        if not full.startswith("aten::") or not torch._C._dispatch_has_kernel_for_dispatch_key(full, "PrivateUse1"):
            continue
        if "schema: (none)" in torch._C._dispatch_dump(full):  # a name of torch_npu's, without an operator to it
            continue
        table = torch._C._dispatch_dump_table(full).splitlines()
        if "npu_sim.py" in next(line for line in table if line.startswith("PrivateUse1:")):
            ours += 1
            continue
        name = full.removeprefix("aten::")
        if name not in sim.OWN and not sim._is_view(sim._overload(name)[1]):
            left.add(name)
    assert left == set()
    assert ours > 1000


def test_refused_names_are_counted_by_the_runtime(sim):
    library = ctypes.CDLL("libascendcl.so")
    assert library.aclopCompileAndExecute(b"Imaginary") != 0
    assert library.rtKernelLaunch() != 0
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert b"rtKernelLaunch is not implemented" in library.aclGetRecentErrMsg()
    assert sim.counts()["unimplemented"] == {"Imaginary": 1, "rtKernelLaunch": 1}


# ---- the 910A ----

ON_910A = """
import json, torch, npu_sim
out = {"name": torch.npu.get_device_name(), "bf16": torch.npu.is_bf16_supported()}
out["inf"] = torch.npu.utils.is_support_inf_nan()
try:
    torch.ones(2, device="npu", dtype=torch.bfloat16) + 1
    out["bf16_add"] = "computed"
except RuntimeError as e:
    out["bf16_add"] = str(e)
x = torch.tensor([6e4], dtype=torch.float16, device="npu")
torch.npu.utils.clear_npu_overflow_flag()
out["flag_before"] = torch.npu.utils.get_npu_overflow_flag()
out["saturated"] = (x * 2).item()
out["flag_after"] = torch.npu.utils.get_npu_overflow_flag()
torch.npu.utils.clear_npu_overflow_flag()
out["flag_cleared"] = torch.npu.utils.get_npu_overflow_flag()
q = torch.ones(1, 2, 3, 4, device="npu")
npu_sim.reset()
torch.nn.functional.scaled_dot_product_attention(q, q, q)
out["fused"] = npu_sim.counts()["launches"].get("npu_fusion_attention", 0)
npu_sim.reset()
torch._foreach_add_([q, q.clone(), q.clone()], 1.0)
out["foreach"] = npu_sim.counts()["launches"]["_foreach_add_"]
model = torch.nn.Linear(4, 4).to("npu")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.npu.amp.GradScaler(1024.0)
out["scales"], out["moved"] = [], []
for factor in (1.0, 1e6, 1.0):
    before = model.weight.detach().clone()
    with torch.autocast("npu", torch.float16):
        loss = model(torch.ones(2, 4, device="npu")).square().mean()
    optimizer.zero_grad()
    scaler.scale(loss * factor).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    out["scales"].append(scaler.get_scale())
    out["moved"].append(not torch.equal(before, model.weight))
print(json.dumps(out))
"""


def test_910a(sim):
    got = run_python(ON_910A, NPU_SIM_SOC="Ascend910A")
    assert got.pop("bf16_add").endswith("bfloat16 is not supported on Ascend910A")
    assert got == {
        "name": "Ascend910A",
        "bf16": False,
        "inf": False,
        "flag_before": False,
        "saturated": 65504.0,
        "flag_after": True,
        "flag_cleared": False,
        "fused": 0,
        "foreach": 3,
        "scales": [1024.0, 512.0, 512.0],
        "moved": [True, False, True],
    }


# ---- the way in ----


@pytest.mark.parametrize(
    ("devices", "visible", "count"),
    [(0, None, 0), (8, None, 8), (8, "3,5", 2), (8, "1,9,2", 1), (8, "", 0), (2, "2", 0)],
)
def test_visible_devices(sim, monkeypatch, devices, visible, count):
    monkeypatch.setenv("NPU_SIM", str(devices))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", visible)
    n = ctypes.c_uint32()
    assert ctypes.CDLL("libascendcl.so").aclrtGetDeviceCount(ctypes.byref(n)) == 0
    assert n.value == count


def test_no_device_is_seen_by_torch(sim):
    code = "import json, torch; print(json.dumps([torch.npu.is_available(), torch.npu.device_count()]))"
    assert run_python(code, NPU_SIM="0") == [False, 0]


def test_without_autoload_torch_is_the_plain_one(sim):
    code = (
        "import json, torch, torchvision.transforms; print(json.dumps([hasattr(torch, 'npu'), torch.ones(2).tolist()]))"
    )
    assert run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0") == [False, [1.0, 1.0]]


WAY_IN = """
import json, os, npu_sim, torchvision, torch
torch.npu.utils.set_task_queue_enable(1)
queue = torch.npu.utils.get_task_queue_enable()
print(json.dumps([os.environ.get("SEEN"), queue, torch.ones(2, device="npu").sum().item()]))
"""


def test_another_sitecustomize_runs_and_the_task_queue_stays_off(sim, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['SEEN'] = 'yes'\n")
    path = f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path}"
    assert run_python(WAY_IN, PYTHONPATH=path, TASK_QUEUE_ENABLE="2") == ["yes", 0, 2.0]


def test_run_starts_a_command_and_writes_counts(sim, tmp_path):
    code = """
import torch
print(torch.npu.get_device_name(), torch.npu.device_count(), (torch.ones(3, device='npu') + 1).sum().item())
"""
    run = run_program(RUN, "-n", 3, "--soc", "950", "--counts", tmp_path / "c.json", sys.executable, "-c", code,
                      PYTHON=sys.executable, RANK="5", **SMALL)  # fmt: skip
    assert run.stdout.split() == ["Ascend950PR_9599", "3", "6.0"], run.stderr
    (path,) = tmp_path.glob("c.rank5.pid*.json")
    counts = json.loads(path.read_text())
    assert counts["soc"] == "Ascend950PR_9599"
    assert counts["rank"] == 5
    assert counts["launches"] == {"total": 3, "add": 1, "ones": 1, "sum": 1}
    assert counts["syncs"] == {"total": 1, "item": 1}


def test_run_gives_back_the_exit_status(sim):
    assert run_program(RUN, "-n", 1, "false", PYTHON=sys.executable, **SMALL).returncode == 1
    assert run_program(RUN, "-n", 1, PYTHON=sys.executable, **SMALL).returncode == 2
    assert run_program(RUN, "--soc", "1234", "true", PYTHON=sys.executable, **SMALL).returncode == 2


def test_libraries_are_built_once_by_whoever_comes_first(sim, tmp_path):
    build = [sys.executable, str(pathlib.Path(RUN).parent / "build.py")]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    together = [subprocess.Popen(build, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {p.communicate()[0].strip() for p in together}
    assert all(p.returncode == 0 for p in together)
    (folder,) = folders
    assert os.path.exists(f"{folder}/lib64/libascendcl.so")
    assert os.listdir(tmp_path / "npu_sim") == [os.path.basename(folder)]
