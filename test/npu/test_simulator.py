"""Is the NPU the CPU, computed elsewhere? Operators, random numbers, streams, a training step; the CPU is the oracle.

On simulated NPUs equal means equal: same bits wherever the same operators run. Real NPUs (`--npu real`) get tolerances.
"""

import pytest
import torch
import torch.nn.functional as F
from operators import CASES, INPLACE, INPLACE_FLOAT, OUT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
REAL = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def name(dtype):
    return str(dtype).removeprefix("torch.")


def assert_same(got, want, real, dtype=None):
    tolerance = (REAL if real else TOLERANCE).get(dtype or want.dtype, 1e-5)
    torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=tolerance, equal_nan=True)


def make_inputs(case, dtype):
    torch.manual_seed(5)
    inputs = [shape() if callable(shape) else torch.randn(shape) for shape in case.shapes]
    if dtype is torch.int64:
        return [(t * 3).long() if t.is_floating_point() else t for t in inputs]
    takes_any = torch.int64 in case.dtypes or len(case.dtypes) > 1  # then integers come in every dtype
    return [t.to(dtype) if t.is_floating_point() or takes_any else t for t in inputs]


def lay_out(t, layout):
    """The same values, elsewhere in memory: contiguous, transposed, or every second element of a larger tensor."""
    if layout == "contiguous" or t.dim() == 0:
        return t.clone()
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros((*t.shape, 2), dtype=t.dtype)
    wide[..., 1] = t
    return wide[..., 1]


def on_npu(t):
    """A copy that keeps the strides."""
    out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="npu")
    return out.copy_(t)


def forward_backward(case, inputs, device):
    leaves = [t.requires_grad_(case.grad and t.is_floating_point()) for t in inputs]
    out = case.fn(*leaves)
    assert out.device.type == device
    grads = []
    if case.grad and out.requires_grad:
        weight = torch.arange(out.numel(), device=device).view(out.shape).to(out.dtype) % 5 - 2
        out.backward(weight)
        grads = [t.grad for t in leaves if t.grad is not None]
        assert grads
    return [out.detach(), *grads]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize(
    ("op", "dtype"), [pytest.param(k, d, id=f"{k}-{name(d)}") for k, c in CASES.items() for d in c.dtypes]
)
def test_operator(op, dtype, layout, real):
    case = CASES[op]
    inputs = [lay_out(t, layout) for t in make_inputs(case, dtype)]
    device_inputs = [on_npu(t) for t in inputs]
    for got, want in zip(
        forward_backward(case, device_inputs, "npu"), forward_backward(case, inputs, "cpu"), strict=True
    ):
        assert got.dtype == want.dtype
        assert_same(got, want, real, dtype)


@pytest.mark.parametrize("part", ["whole", "part"])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [pytest.param(k, d, id=f"{k}-{name(d)}") for d in (*DTYPES, torch.int64) for k in INPLACE]
    + [pytest.param(k, d, id=f"{k}-{name(d)}") for d in DTYPES for k in INPLACE_FLOAT],
)
def test_in_place(op, dtype, part, real):
    torch.manual_seed(5)
    base, other = (torch.randn(6, 6) * 3).to(dtype), (torch.randn(6, 6) * 3).to(dtype)
    fn = {**INPLACE, **INPLACE_FLOAT}[op]
    results = []
    for device in ("cpu", "npu"):
        x, y = base.clone().to(device), other.clone().to(device)
        view = x if part == "whole" else x[1:5, ::2]
        before = x.data_ptr()
        fn(view, y if part == "whole" else y[1:5, ::2])
        assert x.data_ptr() == before
        results += [x, y]
    assert_same(results[2], results[0], real)  # all of x: what the operator must not touch as well
    assert_same(results[3], results[1], real)


@pytest.mark.parametrize("out", ["fitting", "empty", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("op", OUT)
def test_out(op, dtype, out, real):
    torch.manual_seed(5)
    x, y = torch.randn(4, 4).to(dtype), torch.randn(4, 4).to(dtype)
    want = OUT[op](x, y, torch.empty(0, dtype=dtype))
    if out == "empty":
        target = torch.empty(0, dtype=dtype, device="npu")
    else:
        wide = torch.zeros(*want.shape, 2, dtype=dtype, device="npu")
        target = wide[..., 0] if out == "strided" else wide[..., 0].contiguous()
    returned = OUT[op](x.to("npu"), y.to("npu"), target)
    assert returned.data_ptr() == target.data_ptr()
    assert target.shape == want.shape
    assert_same(target, want, real)


def test_views_share_memory():
    x = torch.zeros(4, 6, device="npu")
    views = [x[1:3], x.t(), x.view(2, 12), x.unsqueeze(0), x.expand(2, 4, 6), x.permute(1, 0), x.flatten(), x.detach()]
    views += [x.squeeze(), x.unfold(0, 2, 1), x.narrow(1, 2, 2), x.as_strided((2, 2), (6, 1)), x.split(2)[0]]
    for view in views:
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    x.t()[2].fill_(7)
    assert x[:, 2].tolist() == [7.0] * 4
    assert x.sum().item() == 28.0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t_(),
        lambda x: x.transpose_(0, 1),
        lambda x: x.unsqueeze_(1).squeeze_(1),
        lambda x: x.as_strided_((2, 2), (1, 6), 1),
        lambda x: x.resize_(2, 3),
        lambda x: x.set_(x.new_ones(3)),
        lambda x: setattr(x, "data", x.new_zeros(5)),
    ],
    ids=["t_", "transpose_", "squeeze_", "as_strided_", "resize_", "set_", "data"],
)
def test_metadata_in_place(change):
    want, got = torch.arange(24.0).view(4, 6), torch.arange(24.0, device="npu").view(4, 6)
    change(want), change(got)
    assert got.shape == want.shape
    assert got.stride() == want.stride()
    assert torch.equal(got.cpu(), want)


def test_devices_do_not_mix():
    x = torch.ones(3, device="npu")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).tolist() == [2.0] * 3  # but a number may come from the host


def test_autocast_computes_in_half():
    linear = torch.nn.Linear(4, 4).to("npu")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("npu", dtype):
            out = linear(torch.ones(2, 4, device="npu"))
            assert out.dtype is dtype
            assert F.layer_norm(out, (4,)).dtype is torch.float32
            q = torch.ones(1, 2, 3, 4, device="npu")
            assert F.scaled_dot_product_attention(q, q, q).dtype is dtype


def test_inference_mode(real):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU(), torch.nn.LayerNorm(4))
    x = torch.randn(2, 4)
    with torch.inference_mode():
        want = model(x)
        assert_same(model.to("npu")(x.to("npu")), want, real)


# ---- random numbers ----

DRAWS = {
    "rand": lambda d: torch.rand(1000, device=d),
    "randn": lambda d: torch.randn(1000, device=d),
    "randn_odd": lambda d: torch.randn(33, device=d),
    "bernoulli_": lambda d: torch.empty(64, device=d).bernoulli_(0.7),
    "bernoulli": lambda d: torch.bernoulli(torch.full((64,), 0.3, device=d)),
    "uniform_": lambda d: torch.empty(64, device=d).uniform_(-1, 2),
    "normal_": lambda d: torch.empty(64, device=d).normal_(1, 2),
    "randperm": lambda d: torch.randperm(50, device=d),
    "randint": lambda d: torch.randint(0, 9, (64,), device=d),
    "dropout": lambda d: F.dropout(torch.ones(5000, device=d), 0.3),
    "multinomial": lambda d: torch.multinomial(torch.ones(20, device=d), 5),
    "rand_like": lambda d: torch.rand_like(torch.empty(64, dtype=torch.bfloat16, device=d)),
    "trunc_normal_": lambda d: torch.nn.init.trunc_normal_(torch.empty(64, device=d)),
    "randint_square": lambda d: torch.randint(0, 9, (70, 70), device=d),
    "double": lambda d: torch.rand(700, dtype=torch.float64, device=d),
    "large": lambda d: torch.rand(300_000, device=d),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_seed_reproduces(draw):
    torch.npu.manual_seed(11)
    first, next_ = DRAWS[draw]("npu"), DRAWS[draw]("npu")
    torch.npu.manual_seed(11)
    assert torch.equal(DRAWS[draw]("npu"), first)
    assert torch.equal(DRAWS[draw]("npu"), next_)
    assert not torch.equal(first, next_)


@pytest.mark.parametrize("draw", DRAWS)
def test_state_restores(draw):
    torch.npu.manual_seed(11)
    torch.rand(77, device="npu")
    state = torch.npu.get_rng_state()
    first = DRAWS[draw]("npu")
    assert not torch.equal(torch.npu.get_rng_state(), state)
    torch.rand(5, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(DRAWS[draw]("npu"), first)


def test_stream_of_numbers_is_the_cpu_generators(sim):
    torch.manual_seed(4)  # seeds all devices
    for draw in [*DRAWS, *DRAWS]:
        assert torch.equal(DRAWS[draw]("npu").cpu(), DRAWS[draw]("cpu")), draw


def test_state_restores_without_memory_of_it(sim):
    torch.npu.manual_seed(11)
    torch.rand(100_000, device="npu"), torch.randperm(9, device="npu"), F.dropout(torch.ones(99, device="npu"))
    state = torch.npu.get_rng_state()
    want = torch.rand(50, device="npu")
    sim._states.clear()  # as in a new process
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(50, device="npu"), want)


def test_generator_objects():
    a, b = torch.Generator("npu").manual_seed(3), torch.Generator("npu").manual_seed(3)
    torch.npu.manual_seed(3)
    default = torch.npu.get_rng_state()
    first = torch.rand(9, device="npu", generator=a)
    torch.rand(9, device="npu", generator=a)
    assert torch.equal(torch.rand(9, device="npu", generator=b), first)
    assert torch.equal(torch.npu.get_rng_state(), default)


def test_devices_have_their_own_generators():
    if torch.npu.device_count() < 2:
        pytest.skip("one device")
    torch.npu.manual_seed_all(3)
    first = torch.rand(9, device="npu:0")
    torch.rand(9, device="npu:0")
    assert torch.equal(torch.rand(9, device="npu:1").cpu(), first.cpu())


def test_dropout_of_attention_repeats_in_backward():
    q = torch.randn(1, 2, 8, 4, device="npu", requires_grad=True)
    grads = []
    for _ in range(2):
        torch.npu.manual_seed(1)
        grads += torch.autograd.grad(F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum(), q)
    assert torch.equal(*grads)


# ---- streams, events, memory, loaders ----


def test_streams():
    side = torch.npu.Stream()
    x = torch.ones(1000, device="npu")
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        assert torch.npu.current_stream() == side
        y = x * 3
    torch.npu.current_stream().wait_stream(side)
    y.record_stream(torch.npu.current_stream())
    side.synchronize()
    assert side.query()
    assert y.sum().item() == 3000.0


def test_events_measure_time():
    start, middle, end = (torch.npu.Event(enable_timing=True) for _ in range(3))
    x = torch.randn(300, 300, device="npu")
    start.record()
    x @ x
    middle.record()
    for _ in range(20):
        x @ x
    end.record()
    end.synchronize()
    assert end.query()
    assert 0 < start.elapsed_time(middle) < start.elapsed_time(end)
    assert start.elapsed_time(middle) + middle.elapsed_time(end) == pytest.approx(start.elapsed_time(end), rel=0.01)


def test_memory_is_counted():
    torch.npu.synchronize()
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    x = torch.empty(1 << 20, device="npu")
    assert torch.npu.memory_allocated() - before >= 4 << 20
    del x
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() - before >= 4 << 20
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total


def test_too_much_memory_is_an_error():
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(1 << 45, dtype=torch.uint8, device="npu")


def test_loader_pins_memory():
    data = torch.utils.data.TensorDataset(torch.arange(32.0).view(16, 2))
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, pin_memory=True)
    sums = []
    for (x,) in loader:
        assert x.is_pinned()
        sums.append(x.to("npu", non_blocking=True).sum().item())
    assert sums == [28.0, 92.0, 156.0, 220.0]


def test_tensors_travel_through_files(tmp_path):
    x = torch.randn(3, 4, device="npu")
    torch.save({"x": x, "view": x.t()}, tmp_path / "x.pt")
    on_cpu = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=True)
    assert torch.equal(on_cpu["x"], x.cpu())
    assert torch.equal(on_cpu["view"], x.cpu().t())


# ---- optimizers and scalers ----


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))


def train(model, optimizer, device, steps=10, clip=1.0):
    batches = torch.randn(steps, 6, 8, generator=torch.Generator().manual_seed(1))
    for x in batches.to(device):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["foreach", "for_loop", "fused", "NpuFusedAdamW", "SGD"])
def test_optimizers(kind, real):
    options = {"lr": 1e-2, "weight_decay": 0.05}
    if kind == "SGD":
        make = reference = lambda p: torch.optim.SGD(p, momentum=0.9, nesterov=True, **options)
    else:
        import torch_npu

        reference = lambda p: torch.optim.AdamW(p, **options)  # noqa: E731
        make = {
            "foreach": lambda p: torch.optim.AdamW(p, foreach=True, **options),
            "for_loop": lambda p: torch.optim.AdamW(p, foreach=False, **options),
            "fused": lambda p: torch.optim.AdamW(p, fused=True, **options),
            "NpuFusedAdamW": lambda p: torch_npu.optim.NpuFusedAdamW(p, **options),
        }[kind]
    want_model, model = small_model(), small_model().to("npu")
    want = train(want_model, reference(want_model.parameters()), "cpu")
    got = train(model, make(model.parameters()), "npu")
    torch.testing.assert_close(got, want, rtol=1e-3 if real else 1e-5, atol=1e-3 if real else 1e-6)


@pytest.mark.parametrize("kind", ["torch.amp", "torch.npu.amp"])
def test_scaler_skips_an_overflow(kind):
    model = small_model().to("npu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("npu", 1024.0) if kind == "torch.amp" else torch.npu.amp.GradScaler(1024.0)
    scales, moved = [], []
    for factor in (1.0, float("inf"), 1.0):
        before = model[0].weight.detach().clone()
        with torch.autocast("npu", torch.float16):
            loss = model(torch.ones(2, 8, device="npu")).float().square().mean() * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, model[0].weight))
    assert scales == [1024.0, 512.0, 512.0]
    assert moved == [True, False, True]


# ---- a whole training step ----


class AgainstCPU(TorchDispatchMode):
    """Run every operator of the NPU on the CPU as well, on the same inputs, and compare what both return or write."""

    def __init__(self, real):
        super().__init__()
        self.real, self.compared = real, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        on_device = [t for t in flat if isinstance(t, torch.Tensor) and t.device.type == "npu"]
        skip = (
            op.namespace != "aten"
            or not on_device
            or torch.Tag.nondeterministic_seeded
            in op.tags  # the generators differ; random numbers have tests of their own
            or op.overloadpacket
            in (torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided)
            or op.overloadpacket in (torch.ops.aten.matmul_backward, torch.ops.aten.linear_backward)  # the CPU has none
            or "pin" in op.name()
        )
        if skip:
            return op(*args, **kwargs)
        copies = {}

        def to_cpu(x):
            if isinstance(x, torch.device):
                return torch.device("cpu")
            if not isinstance(x, torch.Tensor) or x.device.type != "npu":
                return x
            if id(x) not in copies:
                whole = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).cpu()
                copies[id(x)] = (x, whole.as_strided(x.shape, x.stride(), x.storage_offset()))
            return copies[id(x)][1]

        cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
        got, want = op(*args, **kwargs), op(*cpu_args, **cpu_kwargs)
        results = zip(tree_flatten(got)[0], tree_flatten(want)[0], strict=True)
        for g, w in [*results, *((x, c) for x, c in copies.values() if x.dtype == c.dtype)]:
            if isinstance(g, torch.Tensor):
                if op is torch.ops.aten._to_copy.default and w.dtype is torch.float64:
                    w = w.float()  # torch_npu casts to float32 when float64 is asked for
                assert g.dtype == w.dtype, op
                assert g.shape == w.shape, op
                if self.real:
                    assert_same(g, w, True)
                else:
                    assert torch.equal(g.cpu().nan_to_num(123.0), w.nan_to_num(123.0)), op
        self.compared.add(op.name())
        return got


def twins():
    import timm

    torch.manual_seed(0)
    return timm.create_model("twins_svt_small", num_classes=10, img_size=64, drop_path_rate=0.2)


def twins_step(model, device, precision, mode=None, drop_path_seed=3):
    """Loss and gradients of one step of timm's Twins-SVT-S on two 64 pixel images."""
    import contextlib

    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(2, 3, 64, 64, generator=generator), torch.tensor([1, 7])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device, enabled=precision == "float16", init_scale=1024.0)
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(drop_path_seed)  # drop-path's masks, on every device
    with mode or contextlib.nullcontext():
        with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
            loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()
    return loss.item(), norm.item(), grads, weights


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_operator_of_a_training_step(precision, real):
    mode = AgainstCPU(real)
    loss, *_ = twins_step(twins().to("npu").train(), "npu", precision, mode)
    assert loss == pytest.approx(2.3, abs=1.5)  # ten classes, untrained
    assert {"aten::native_layer_norm", "aten::convolution_backward", "aten::_foreach_lerp_.Scalar"} <= mode.compared
    assert len(mode.compared) > 50


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_step_equals_cpu(precision, real):
    tolerance = 1e-3 if real else 1e-5 if precision == "float32" else 3e-2
    want_loss, want_norm, want_grads, want_weights = twins_step(twins().train(), "cpu", precision)
    loss, norm, grads, weights = twins_step(twins().to("npu").train(), "npu", precision)
    assert loss == pytest.approx(want_loss, rel=tolerance)
    assert norm == pytest.approx(want_norm, rel=tolerance)
    assert F.cosine_similarity(grads, want_grads, dim=0) > 1 - tolerance
    assert (weights - want_weights).abs().max() <= 2.1e-4  # two steps of lr, where a gradient's sign is noise
