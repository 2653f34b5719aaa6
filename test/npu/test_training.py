"""Does a run on NPUs give what the CPU gives, go on where another device stopped, and never make the host wait?

Everything is measured through main.py, on 1 and on 8 NPUs; the optimizers and the clipping also by themselves.
"""

import json
import shutil

import pytest

pytest.register_assert_rewrite("helpers")

# isort: split

import helpers
import timm
import torch
from helpers import CPU, NPU, PLAIN, SAME, SMALL, losses_of, rows, run, trains, usual
from torch import nn

import checkpoint
import devices
import gvt  # noqa: F401  registers the models
import optim
from precision import FlatGradients, Precision

pytest_plugins = ["helpers"]
STEPS = 20
FP32 = ["--amp=off", "--fp32"]


# ---- 20 steps on 1 NPU, on 8 and on the CPU ----

@pytest.fixture(scope="session")
def twenty(data, tmp_path_factory):
    """Twins-SVT-S in fp32, 20 steps of 16 images, then an evaluation: {where: (log, folder)} of three command lines."""
    folder = tmp_path_factory.mktemp("twenty steps")
    common = ["--data-path", data, "--input-size=32", "--num_workers=0", "--epochs=1", "--print-freq=1", "--dist-eval",
              *FP32, *PLAIN]
    done = {}
    for where, ranks, words in (("cpu", None, ["--device=cpu"]), ("npu", None, []), ("8 npus", 8, [])):
        out = folder / where
        counts = helpers.host(counts=folder / f"{where}.json") if where != "cpu" else None
        log = helpers.works(*common, *words, f"--batch-size={16 // (ranks or 1)}", "--output_dir", out, ranks=ranks, on=counts).stdout
        done[where] = (log, out)
    yield done
    shutil.rmtree(folder)  # checkpoints of a gigabyte


@pytest.mark.parametrize("where, device, ranks", [("npu", "npu:0", 1), ("8 npus", "npu:0", 8)])
def test_npus_are_the_default_device(twenty, where, device, ranks):
    said = helpers.setting(twenty[where][0], "device")
    assert said.startswith(f"{device} (") and said.endswith(f"world size {ranks}")


@pytest.mark.parametrize("where", ["npu", "8 npus"])
def test_twenty_steps_have_the_cpus_losses(twenty, where):
    (log, folder), (cpu_log, cpu_folder) = twenty[where], twenty["cpu"]
    expected = losses_of(cpu_log)
    assert len(expected) == STEPS and min(expected) > 1 and len(set(expected)) == STEPS
    assert losses_of(log) == pytest.approx(expected, rel=SAME)  # the log rounds to 1e-4, and no loss is below 1
    assert rows(folder)[0]["train_loss"] == pytest.approx(rows(cpu_folder)[0]["train_loss"], rel=SAME)


@pytest.mark.parametrize("where", ["npu", "8 npus"])
def test_the_evaluation_is_the_cpus(twenty, where):
    (log, folder), (cpu_log, cpu_folder) = twenty[where], twenty["cpu"]
    here, there = rows(folder)[0], rows(cpu_folder)[0]
    assert (here["test_acc1"], here["test_acc5"]) == (there["test_acc1"], there["test_acc5"])
    assert here["test_loss"] == pytest.approx(there["test_loss"], rel=SAME)
    if helpers.SIMULATED:
        assert helpers.evaluation(log) == helpers.evaluation(cpu_log)


def test_an_npus_checkpoint_evaluates_the_same_everywhere(twenty, data):
    log, folder = twenty["8 npus"]
    words = ["--eval", "--resume", folder / checkpoint.LAST, "--data-path", data, "--input-size=32", "--num_workers=0", *FP32]
    for device in ("cpu", "npu"):
        assert helpers.evaluation(trains(*words, f"--device={device}").out) == helpers.evaluation(log)


@pytest.mark.parametrize("where, ranks", [("npu", 1), ("8 npus", 8)])
def test_a_whole_run_meets_no_missing_operator_and_no_float64(twenty, where, ranks, real):
    if real:
        pytest.skip("only the simulator counts")
    found = helpers.counted_by(twenty[where][1].parent / f"{where}.json")
    assert [counts["rank"] for counts in found] == list(range(ranks))
    for counts in found:
        assert counts["launches"]["total"] > 500 * STEPS
        assert counts["unimplemented"] == {} and counts["refused_float64"] == 0
        assert bool(counts["collectives"]["calls"]) == (ranks > 1)


# ---- what a step costs ----

@pytest.mark.parametrize("amp, waits", [("bf16", 0), ("off", 0), ("fp16", 1)])
def test_the_host_does_not_wait_in_a_step_of_the_usual_recipe(sim, data, amp, waits):
    """Loading, mixup, drop path, clipping, moving average: all of main.py between two lines of the log."""
    words = [SMALL, "--data-path", str(data), "--input-size=32", "--num_workers=0", "--batch-size=8", "--epochs=1", "--max_step=12",
             "--print-freq=100", "--no-eval", "--model-ema", "--repeated-aug", f"--amp={amp}"]
    status, steps = run(*words, program=helpers.counting).status
    assert status == 0
    for step in helpers.between_lines(steps):
        assert step["syncs"]["total"] <= waits, step["syncs"]
        assert step["unimplemented"] == {} and step["d2h"]["calls"] <= waits
    assert steps[1]["syncs"]["total"] > waits  # where a line is shown the host does wait, and that is counted


@pytest.mark.parametrize("amp, waits, opt", [("bf16", 0, "adamw"), ("fp16", 1, "npufusedadamw")])
def test_the_host_does_not_wait_in_a_step_of_several_ranks(sim, data, tmp_path, amp, waits, opt):
    words = [SMALL, "--data-path", data, "--input-size=32", "--num_workers=0", "--batch-size=8", "--epochs=1", "--max_step=12",
             "--print-freq=100", "--no-eval", f"--amp={amp}", f"--opt={opt}"]
    helpers.works(tmp_path / "counts", *words, ranks=2, program="test/npu/helpers.py")
    for rank in range(2):
        for step in helpers.between_lines(json.loads((tmp_path / f"counts.{rank}").read_text())):
            assert step["syncs"]["total"] <= waits, step["syncs"]
            assert step["refused_float64"] == 0 and step["collectives"]["calls"] > 0


@pytest.fixture(scope="session")
def costs(real):
    """{amp: (counts of our step, counts of timm's)}"""
    if real:
        pytest.skip("only the simulator counts")
    import step_cost
    return {amp: step_cost.costs(amp, 2, size) for amp, size in (("bf16", 224), ("fp16", 32), ("off", 32))}


def test_a_step_launches_at_most_60_percent_of_timms_operators(costs):
    ours, timms = costs["bf16"]
    assert ours["launches"]["total"] <= 0.6 * timms["launches"]["total"]


def test_a_step_copies_for_layout_at_most_70_percent_of_timms_bytes(costs):
    ours, timms = costs["bf16"]
    assert 0 < ours["layout_copies"]["bytes"] <= 0.7 * timms["layout_copies"]["bytes"]


@pytest.mark.parametrize("amp, waits", [("bf16", 0), ("off", 0), ("fp16", 1)])
def test_the_host_does_not_wait_in_a_step_of_twins(costs, amp, waits):
    ours, _ = costs[amp]
    assert ours["syncs"]["total"] <= waits and ours["d2h"]["calls"] <= waits and ours["unimplemented"] == {}


# ---- clipping ----

class Net(nn.Module):
    """Parameters of several shapes, with and without weight decay."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)


def twins_of(seed=0):
    """The same network on the CPU and on the NPU."""
    torch.manual_seed(seed)
    net = Net()
    copy = Net()
    copy.load_state_dict(net.state_dict())
    return net, copy.to(NPU)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def loss_of(net, step, device=NPU):
    x, y = batch(step)
    return 100 * nn.functional.cross_entropy(net(x.to(device)), y.to(device))


def built(net, opt, device=NPU, precision="fp32"):
    return optim.build(net, device, optim.Settings(opt, weight_decay=0.1), optim.Course("none"), lr=1e-2, global_batch=512, epochs=10,
                       precision=precision)[0]


@pytest.mark.parametrize("max_norm", [0.5, 1e4])
@pytest.mark.parametrize("opt", ["adamw", "npufusedadamw"])
def test_clipping_equals_torchs(opt, max_norm):
    cpu, npu = twins_of()
    optimizer = built(npu, opt)
    clip = FlatGradients()
    for step in range(2):  # the second with gradients that are views already
        optimizer.zero_grad()
        cpu.zero_grad()
        loss_of(npu, step).backward()
        loss_of(cpu, step, CPU).backward()
        norm = clip.clip_(optimizer, list(npu.parameters()), max_norm)
        expected = torch.nn.utils.clip_grad_norm_(cpu.parameters(), max_norm)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5) and 0.5 < expected < 1e4
        for ours, torchs in zip(npu.parameters(), cpu.parameters()):
            torch.testing.assert_close(ours.grad.cpu(), torchs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("opt", ["adamw", "npufusedadamw"])
def test_clipping_is_a_handful_of_launches_without_a_wait(sim, opt):
    _, npu = twins_of()
    optimizer, clip = built(npu, opt), FlatGradients()
    for _ in range(2):  # in the first step the flat optimizer makes its buffers
        loss_of(npu, 0).backward()
        sim.reset()
        clip.clip_(optimizer, list(npu.parameters()), 5.0)
        counts = sim.counts()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < counts["launches"]["total"] <= 8 and counts["syncs"]["total"] == 0


def test_after_clipping_gradients_are_views_of_one_buffer():
    _, npu = twins_of()
    optimizer, clip = built(npu, "adamw"), FlatGradients()
    loss_of(npu, 0).backward()
    clip.clip_(optimizer, list(npu.parameters()), 1.0)
    assert {p.grad.untyped_storage().data_ptr() for p in npu.parameters()} == {clip.buffer.untyped_storage().data_ptr()}
    assert sum(p.grad.numel() for p in npu.parameters()) == clip.buffer.numel()


# ---- the optimizers of an NPU ----

def train(net, optimizer, steps, device=NPU, precision=None, clip=5.0):
    """As engine does."""
    precision = precision or Precision(device, "off")
    optimizer.zero_grad()
    for step in steps:
        with precision.autocast():
            loss = loss_of(net, step, device)
        precision(loss, optimizer, clip)
        optimizer.zero_grad()


@pytest.mark.parametrize("opt, kind", [("npufusedadamw", "NpuFusedAdamW"), ("adamw", "AdamW")])
def test_fifty_steps_with_clipping_equal_torchs_adamw(opt, kind):
    cpu, npu = twins_of()
    optimizer = built(npu, opt)
    assert type(optimizer).__name__ == kind
    train(npu, optimizer, range(50))
    decayed = [p for p in cpu.parameters() if p.ndim > 1]
    others = [p for p in cpu.parameters() if p.ndim == 1]
    torchs = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=1e-2)
    start = {key: value.clone() for key, value in cpu.state_dict().items()}
    for step in range(50):
        torchs.zero_grad()
        loss_of(cpu, step, CPU).backward()
        assert torch.nn.utils.clip_grad_norm_(cpu.parameters(), 5.0) > 5
        torchs.step()
    assert helpers.distance(npu.state_dict(), cpu.state_dict()) < 1e-4 < 0.1 < helpers.distance(start, cpu.state_dict())


@pytest.mark.parametrize("opt", ["npufusedadamw", "adamw"])
def test_resumed_equals_not_resumed(opt, tmp_path):
    _, whole = twins_of()
    optimizers = [built(whole, opt)]  # kept: the flat one owns the memory that its parameters point into
    train(whole, optimizers[0], range(10))
    _, first = twins_of()
    optimizer = built(first, opt)
    train(first, optimizer, range(5))
    checkpoint.save(tmp_path / "state.pth", model=first.state_dict(), optimizer=optim.portable_state(optimizer))
    saved = checkpoint.read(tmp_path / "state.pth")
    _, second = twins_of(seed=1)
    second.load_state_dict(saved["model"])
    optimizer = built(second, opt)
    optim.load_state(optimizer, saved["optimizer"])
    train(second, optimizer, range(5, 10))
    assert helpers.distance(second.state_dict(), whole.state_dict()) == pytest.approx(0, abs=0 if helpers.SIMULATED else 1e-6)


@pytest.mark.parametrize("opt", ["npufusedadamw", "adamw"])
def test_an_optimizers_state_goes_from_the_cpu_to_the_npu_and_back(opt, tmp_path):
    whole, npu = twins_of()
    train(whole, built(whole, "adamw", CPU), range(15), CPU)

    def move(source, target, optimizer):
        checkpoint.save(tmp_path / "state.pth", model=source.state_dict(), optimizer=optim.portable_state(optimizer))
        saved = checkpoint.read(tmp_path / "state.pth")
        assert {t.device for t in helpers.tensors(saved)} == {CPU}
        target[0].load_state_dict(saved["model"])
        optim.load_state(target[1], saved["optimizer"])

    cpu, _ = twins_of()
    on_cpu, on_npu = built(cpu, "adamw", CPU), built(npu, opt)
    train(cpu, on_cpu, range(5), CPU)
    move(cpu, (npu, on_npu), on_cpu)
    train(npu, on_npu, range(5, 10))
    cpu, _ = twins_of(seed=1)
    back = built(cpu, "adamw", CPU)
    move(npu, (cpu, back), on_npu)
    train(cpu, back, range(10, 15), CPU)
    assert helpers.distance(cpu.state_dict(), whole.state_dict()) < 1e-5
    assert {float(entry["step"]) for entry in back.state_dict()["state"].values()} == {15.0}


def test_steps_are_numbers_that_do_not_count_twice():
    cpu, npu = twins_of()
    torchs = built(cpu, "adamw", CPU)
    train(cpu, torchs, range(3), CPU)
    optimizer = built(npu, "npufusedadamw")
    optim.load_state(optimizer, optim.portable_state(torchs))
    steps = [optimizer.state[p]["step"] for group in optimizer.param_groups for p in group["params"]]
    assert steps == [3] * len(steps) and {type(step) for step in steps} == {int}
    train(npu, optimizer, range(2))
    assert {optimizer.state[p]["step"] for p in npu.parameters()} == {5}
    portable = optim.portable_state(optimizer)["state"].values()
    assert len({entry["step"].data_ptr() for entry in portable}) == len(portable)


def test_zero_grad_clears_the_flat_gradients_and_keeps_the_views():
    _, npu = twins_of()
    optimizer = built(npu, "npufusedadamw")
    train(npu, optimizer, range(1))
    buffers = [buffer for buffer in optimizer.get_combined_grads() if buffer is not None]
    loss_of(npu, 1).backward()
    assert len(buffers) == 1 and buffers[0].abs().sum().item() > 0
    optimizer.zero_grad()
    assert buffers[0].abs().sum().item() == 0
    begin, end = buffers[0].data_ptr(), buffers[0].data_ptr() + buffers[0].nbytes
    assert all(begin <= p.grad.data_ptr() < end for p in npu.parameters())


@pytest.mark.parametrize("model", ["alt_gvt_small", "pcpvt_small_v0"])
def test_every_parameter_has_a_gradient_from_the_first_step_on(model):
    """The flat optimizer takes no parameter whose first gradient comes later."""
    net = timm.create_model(model, num_classes=3, drop_path_rate=0.99)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_ddp_leaves_gradients_to_the_flat_optimizer(monkeypatch):
    asked = {}
    monkeypatch.setattr(devices, "DistributedDataParallel", lambda model, **words: asked.update(words))
    devices.parallel(nn.Linear(1, 1), torch.device("npu", 3), flat_gradients=True)
    assert asked == {"device_ids": [3], "broadcast_buffers": False, "gradient_as_bucket_view": False}


@pytest.mark.parametrize("opt", ["npufusedadamw", "adamw"])
def test_fp16_skips_a_step_that_overflows_and_then_trains(opt):
    _, npu = twins_of()
    optimizer, precision = built(npu, opt, precision="fp16"), Precision(NPU, "fp16")
    train(npu, optimizer, [0], precision=precision)
    before, scale = {key: value.clone() for key, value in npu.state_dict().items()}, precision.state_dict()["scale"]
    precision(loss_of(npu, 1) * 1e38, optimizer, 5.0)
    optimizer.zero_grad()
    assert helpers.distance(npu.state_dict(), before) == 0 and precision.state_dict()["scale"] == scale / 2
    precision.scaler.load_state_dict({**precision.state_dict(), "scale": 64.0})
    train(npu, optimizer, range(2, 12), precision=precision)
    assert helpers.distance(npu.state_dict(), before) > 1e-2
    assert precision.state_dict()["scale"] == 64.0 and all(torch.isfinite(p).all().item() for p in npu.parameters())


# ---- runs that go on elsewhere ----

@pytest.fixture(scope="session")
def uninterrupted(few, tmp_path_factory):
    """Four epochs on the CPU, from the command line. -> folder"""
    folder = tmp_path_factory.mktemp("uninterrupted")
    helpers.works(*usual(few, "--device=cpu", "--batch-size=2", "--epochs=4", "--output_dir", folder))
    return folder


@pytest.mark.parametrize("first, then", [
    (["--device=npu"], ["--device=cpu"]), (["--device=cpu"], ["--device=npu"]),
    (["--opt=npufusedadamw"], ["--device=cpu"]), (["--device=cpu"], ["--opt=npufusedadamw"]),
    (["--opt=npufusedadamw"], ["--opt=npufusedadamw"]), (["--opt=adamw"], ["--opt=npufusedadamw"])],
    ids=["npu-cpu", "cpu-npu", "flat-cpu", "cpu-flat", "flat-flat", "npu-flat"])
def test_a_run_goes_on_on_another_device(uninterrupted, few, tmp_path, first, then):
    words = usual(few, "--batch-size=2", "--epochs=4", "--output_dir", tmp_path)
    trains(*words, *first, "--max_step=12")  # two epochs of six steps
    half = helpers.load(tmp_path / checkpoint.LAST)
    assert half["epoch"] == 1 and {t.device for t in helpers.tensors(half)} == {CPU}
    assert len(helpers.tensors(half["optimizer"])) == 3 * len(half["optimizer"]["state"])
    done = trains(*words, *then, "--resume=auto")
    assert "after epoch 1" in done.out
    assert [row["train_loss"] for row in rows(tmp_path)] == pytest.approx([row["train_loss"] for row in rows(uninterrupted)], rel=SAME)
    ends = [helpers.load(folder / checkpoint.LAST) for folder in (tmp_path, uninterrupted)]
    moved = helpers.distance(half["model"], ends[1]["model"])
    assert helpers.distance(ends[0]["model"], ends[1]["model"]) < 100 * SAME * moved
    assert {float(entry["step"]) for entry in ends[0]["optimizer"]["state"].values()} == {24.0}
    assert ends[0]["best_accuracy"] == ends[1]["best_accuracy"]


@pytest.fixture(scope="session")
def scaled(few, tmp_path_factory):
    """train(file or None, where): two steps in fp16 that go on from the file. -> the new checkpoint's file"""
    folder = tmp_path_factory.mktemp("scalers")

    def train(saved, where):
        out = folder / f"{len(list(folder.iterdir()))}"
        words = usual(few, "--amp=fp16", "--batch-size=6", "--epochs=9", "--max_step=2", "--no-eval", "--output_dir", out)
        words = [word for word in words if word != "--amp=off"] + (["--resume", saved, "--allow-change"] if saved else [])
        if where == "910A":
            helpers.works(*words, on=helpers.host(npus=1, soc="910A"))
        else:
            trains(*words, f"--device={where}")
        return out / checkpoint.LAST
    return train


def with_scaler(path, **state):
    """The checkpoint with these words in its scaler's state."""
    content = helpers.load(path)
    content["scaler"].update(state)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("where", [["npu", "cpu"], ["cpu", "npu"]], ids="-".join)
def test_the_loss_scale_goes_on_on_another_device(scaled, where):
    saved = with_scaler(scaled(None, where[0]), scale=48.0, _growth_tracker=100)
    state = helpers.load(scaled(saved, where[1]))["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (48.0, 102) and "dynamic" not in state


def test_the_loss_scale_goes_on_with_the_scaler_of_a_910a_and_back(scaled):
    saved = with_scaler(scaled(None, "cpu"), scale=48.0, _growth_tracker=100)
    on_910a = scaled(saved, "910A")
    state = helpers.load(on_910a)["scaler"]
    assert (state["scale"], state["_growth_tracker"], state["dynamic"]) == (48.0, 102, True)  # torch_npu's own scaler
    for where in ("npu", "cpu"):
        state = helpers.load(scaled(on_910a, where))["scaler"]
        assert (state["scale"], state["_growth_tracker"]) == (48.0, 104) and "dynamic" not in state


@pytest.mark.parametrize("first, then", [("npu", "cpu"), ("cpu", "npu")])
def test_fine_tuning_starts_from_another_devices_weights(data, few, tmp_path, first, then):
    words = ["--epochs=1", "--max_step=1", "--no-eval", "--output_dir"]
    trains(*usual(data, *words, tmp_path / "source", f"--device={first}"))
    source = tmp_path / "source" / checkpoint.LAST
    done = trains(*usual(few, *words, tmp_path / "tuned", f"--device={then}", "--finetune", source, "--lr=0"))
    assert f"note: {source}: its head has 10 classes and the data 3, so the head starts anew" in done.out
    before, after = (helpers.load(path)["model"] for path in (source, tmp_path / "tuned" / checkpoint.LAST))
    body = [key for key in before if not key.startswith("head.fc.")]
    assert len(body) > 10 and all(torch.equal(before[key], after[key]) for key in body)  # --lr=0, and lr is all that decays
    assert after["head.fc.weight"].shape[0] == 3


# ---- Ascend's apex, as far as training meets it ----

AMP = '''
"""Signatures and rules of Ascend's apex.amp: gradients live in one flat buffer of the optimizer's, from the first backward on."""
import contextlib, json, os, types
import torch

scaler = {"loss_scale": 2.0**16, "unskipped": 0}


def say(what, **more):
    with open(os.environ["APEX_CALLS"] + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps({"call": what, **more}) + "\\n")


def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None, patch_torch_functions=None,
               keep_batchnorm_fp32=None, master_weights=None, loss_scale=None, cast_model_outputs=None, num_losses=1, verbosity=1,
               dynamic_init_scale=2.**16, scale_growth_factor=2., scale_backoff_factor=0.5, scale_window=2000, min_loss_scale=None,
               max_loss_scale=2.**24, combine_grad=None, combine_ddp=None, ddp_replica_count=4, user_cast_preferred=None,
               check_combined_tensors=None):
    if isinstance(models, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("Incoming model is an instance of DistributedDataParallel: call amp.initialize before wrapping it")
    say("initialize", model=type(models).__name__, optimizer=type(optimizers).__name__, opt_level=opt_level, combine_grad=combine_grad,
        device=str(next(models.parameters()).device))
    optimizers._amp_stash = types.SimpleNamespace(flat=None, views=None)
    optimizers.is_npu_fused_optimizer = getattr(optimizers, "is_npu_fused_optimizer", False)
    plain_zero_grad, plain_step = optimizers.zero_grad, optimizers.step

    def zero_grad(self):
        self._amp_stash.flat.zero_() if self._amp_stash.flat is not None else plain_zero_grad(set_to_none=False)

    def step(self):
        say("step", unscaled=True)
        return plain_step()

    def get_optimizer_combined_grads(self):
        return [self._amp_stash.flat]

    for method in (zero_grad, step, get_optimizer_combined_grads):
        setattr(optimizers, method.__name__, types.MethodType(method, optimizers))
    return models, optimizers


def master_params(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False, delay_overflow_check=False):
    yield loss.float() * scaler["loss_scale"]
    stash = optimizers._amp_stash
    if stash.flat is None:
        parameters = list(master_params(optimizers))
        stash.flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        stash.views = {p: part.view_as(p) for p, part in zip(parameters, stash.flat.split([p.numel() for p in parameters]))}
        for p, view in stash.views.items():
            p.grad = view
    stash.flat.mul_(1.0 / scaler["loss_scale"])
    scaler["unskipped"] += 1


def state_dict(destination=None):
    return {"loss_scaler0": dict(scaler)}


def load_state_dict(state_dict):
    say("load_state_dict", state=state_dict)
    scaler.update(state_dict["loss_scaler0"])
'''
OPTIMIZERS = '''
import torch


class NpuFusedAdamW(torch.optim.Optimizer):
    """Steps from the flat buffer, whatever p.grad is by then; its first step's number is the group's, and aliases."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False):
        self.is_npu_fused_optimizer = True
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad))
        self.counts = None

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.counts = None

    @torch.no_grad()
    def step(self, closure=None):
        if not hasattr(self, "_amp_stash"):
            raise RuntimeError("apex.optimizers.NpuFusedAdamW should be used with AMP.")
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p].update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        if self.counts is None:
            self.counts = [self.state[group["params"][0]]["step"] for group in self.param_groups]
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                self.state[p]["step"] += 1
            self.counts[i] += 1
            (beta1, beta2), count = group["betas"], float(self.counts[i])
            for p in group["params"]:
                grad, state = self._amp_stash.views[p], self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"].sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
                p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**count))
'''


@pytest.fixture(scope="session")
def apex(few, tmp_path_factory):
    """apex(*options, ranks=None) -> log, calls of rank 0, folder: three epochs of `--amp apex` with the package above."""
    packages = helpers.write_package(tmp_path_factory.mktemp("packages"), {
        "apex/__init__.py": "", "apex/amp.py": AMP, "apex/optimizers.py": OPTIMIZERS})

    def start(*options, ranks=None):
        folder = tmp_path_factory.mktemp("apex")
        words = [word for word in usual(few, "--amp=apex", "--clip-grad=0.5", "--print-freq=1", "--epochs=3", "--output_dir", folder)
                 if word != "--amp=off"]
        words += [f"--batch-size={4 // (ranks or 1)}"]
        done = helpers.works(*words, *options, ranks=ranks, PYTHONPATH=helpers.python_path(packages), APEX_CALLS=str(folder / "calls"))
        return done.stdout, [json.loads(line) for line in (folder / "calls0").read_text().splitlines()], folder
    return start


@pytest.fixture(scope="session")
def fp32(few, tmp_path_factory):
    """The same three epochs in fp32 on the CPU. -> log, folder"""
    folder = tmp_path_factory.mktemp("fp32")
    done = trains(*usual(few, "--device=cpu", "--clip-grad=0.5", "--print-freq=1", "--epochs=3", "--batch-size=4", "--output_dir", folder))
    return done.out, folder


@pytest.fixture(scope="session")
def apexes(apex):
    return apex(ranks=2)


def test_apex_is_initialized_before_ddp(apexes):
    log, calls, _ = apexes
    assert helpers.setting(log, "precision") == "apex" and "NpuFusedAdamW" in helpers.setting(log, "optimizer")
    assert "world size 2" in helpers.setting(log, "device")
    (first, *others) = calls
    assert first == {"call": "initialize", "model": "ConvNeXt", "optimizer": "NpuFusedAdamW", "opt_level": "O1", "combine_grad": True,
                     "device": "npu:0"}
    assert [call["call"] for call in others] == ["step"] * 9


def test_apex_clips_its_master_parameters_and_trains(apexes, fp32):
    """The stand-in computes in fp32: clipping at a norm that every step exceeds, the losses are those of fp32."""
    log, _, folder = apexes
    expected = losses_of(fp32[0])
    assert len(expected) == 9 and losses_of(log) == pytest.approx(expected, rel=SAME, abs=1e-4)
    assert rows(folder)[-1]["test_loss"] == pytest.approx(rows(fp32[1])[-1]["test_loss"], rel=SAME)


def test_apexs_state_is_in_the_checkpoint_and_goes_on(apex, apexes, fp32):
    whole = helpers.load(apexes[2] / checkpoint.LAST)
    assert whole["scaler"] == {"loss_scaler0": {"loss_scale": 2.0**16, "unskipped": 9}}
    _, _, folder = apex("--max_step=3")
    assert helpers.load(folder / checkpoint.LAST)["scaler"]["loss_scaler0"]["unskipped"] == 3
    log, calls, resumed = apex("--resume", folder / checkpoint.LAST)
    assert [call["call"] for call in calls] == ["initialize", "load_state_dict"] + ["step"] * 6
    assert calls[1]["state"] == {"loss_scaler0": {"loss_scale": 2.0**16, "unskipped": 3}}
    assert losses_of(log) == pytest.approx(losses_of(fp32[0])[3:], rel=SAME, abs=1e-4)
    state = helpers.load(resumed / checkpoint.LAST)
    assert state["scaler"] == whole["scaler"]
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {9.0}


def test_apexs_state_is_read_by_torchs_scaler_and_the_other_way(apex, apexes, scaled, few):
    saved = helpers.load(apexes[2] / checkpoint.LAST)
    saved["scaler"]["loss_scaler0"]["loss_scale"] = 48.0
    torch.save(saved, apexes[2] / "moved.pth")
    trained = scaled(apexes[2] / "moved.pth", "npu")
    state = helpers.load(trained)["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (48.0, 9 + 2)
    epoch = helpers.load(trained)["epoch"]
    _, calls, _ = apex("--resume", trained, "--allow-change", f"--epochs={epoch + 2}", "--max_step=1")
    assert calls[1] == {"call": "load_state_dict", "state": {"loss_scaler0": {"loss_scale": 48.0, "unskipped": 11}}}
