"""What does an operator of the simulated NPU do? The same operator of the CPU, over the same bytes, counted.

`install()` runs by itself once torch_npu has been imported (sitecustomize/). For a program under test/npu_sim/run:

    import npu_sim
    npu_sim.reset(); step(); print(npu_sim.counts())
"""

import atexit
import collections
import contextlib
import ctypes
import inspect
import json
import os
import sys
import warnings

import torch

CPU = torch.device("cpu")
SOC = os.environ.get("NPU_SIM_SOC", "")
# The 910A computes no bf16, saturates instead of making inf or nan, fuses no attention and has no foreach kernels.
IS_910A = SOC == "Ascend910A"

launches, syncs, transfers, layout = (collections.Counter() for _ in range(4))
overflow = False  # the 910A's flag: set by a result that had to saturate, until npu_clear_float_status

# ---------------------------------------------------------------------------------------------------------------------
# Counters
# ---------------------------------------------------------------------------------------------------------------------


class _CCounter(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("calls", ctypes.c_uint64), ("bytes", ctypes.c_uint64)]


def _cann():
    library = ctypes.CDLL("libascendcl.so")
    library.npu_sim_counters.restype = ctypes.POINTER(_CCounter * 256)
    return library


def _runtime_counts():
    """{group: {name: (calls, bytes)}} of what the C side counted: sync, hccl, kernel, refused, unimplemented."""
    groups = collections.defaultdict(dict)
    for row in _cann().npu_sim_counters().contents:
        if row.name and row.calls:
            group, _, name = row.name.decode().partition(".")
            groups[group][name] = (row.calls, row.bytes)
    return groups


def _total(counter):
    return {"total": sum(counter.values()), **dict(sorted(counter.items(), key=lambda kv: (-kv[1], kv[0])))}


def counts():
    """What a device would have been paid for in this process since `reset()`; README.md says what each entry means."""
    c = _runtime_counts()
    kernels, waits = ({name: calls for name, (calls, _) in c[group].items()} for group in ("kernel", "sync"))
    hccl = {name: {"calls": calls, "bytes": n} for name, (calls, n) in sorted(c["hccl"].items())}
    collectives = {k: sum(row[k] for row in hccl.values()) for k in ("calls", "bytes")}
    return {
        "launches": _total(launches + collections.Counter(kernels)),
        "syncs": _total(syncs + collections.Counter(waits)),
        "h2d": {"calls": transfers["h2d_calls"], "bytes": transfers["h2d_bytes"]},
        "d2h": {"calls": transfers["d2h_calls"], "bytes": transfers["d2h_bytes"]},
        "layout_copies": {"calls": layout["calls"], "bytes": layout["bytes"]},
        "collectives": {**collectives, **hccl},
        "refused_float64": sum(calls for calls, _ in c["refused"].values()),
        "unimplemented": {name: calls for name, (calls, _) in c["unimplemented"].items()},
    }


def reset():
    """Start all counts at zero."""
    for counter in (launches, syncs, transfers, layout):
        counter.clear()
    for row in _cann().npu_sim_counters().contents:
        row.calls = row.bytes = 0


def _write_counts(path, pid):
    if os.getpid() != pid:  # a forked worker inherits the hook, not the counts
        return
    c = counts()
    if not any(c[k]["total"] for k in ("launches", "syncs")):  # torchrun's own process, a loader's worker
        return
    rank = os.environ.get("RANK", "0")
    root, ext = os.path.splitext(path)
    with open(f"{root}.rank{rank}.pid{pid}{ext or '.json'}", "w") as f:
        json.dump({"rank": int(rank), "pid": pid, "soc": SOC, **c}, f, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# The same bytes, seen from the CPU
# ---------------------------------------------------------------------------------------------------------------------


def host(t):
    """The CPU tensor over the bytes of NPU tensor `t`; it must not outlive `t`."""
    storage = t.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    raw = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    return torch.empty(0, dtype=t.dtype).set_(raw, t.storage_offset(), t.shape, t.stride())


def to_device(h, device):
    """A new NPU tensor with what `h` holds: contiguous, as all that torch_npu's kernels return."""
    out = torch.empty(h.shape, dtype=h.dtype, device=device)
    host(out).copy_(h)
    return out


class Call:
    """The way of one operator's arguments down to the host, and of its results up again."""

    def __init__(self, name, mixes_devices=False):
        self.name, self.device, self.origin, self.alive = name, None, {}, []
        self.stray = None  # a CPU tensor among the arguments
        self.mixes_devices = mixes_devices

    def down(self, x):
        if isinstance(x, torch.Tensor):
            if x.device.type != "npu":
                if x.device.type == "cpu" and x.dim():
                    self.stray = x
                return x
            if self.device is None:
                self.device = x.device
            elif self.device != x.device and not self.mixes_devices:
                self.refuse(x.device)
            if IS_910A and x.dtype is torch.bfloat16:
                raise RuntimeError(f"simulated NPU: {self.name}: bfloat16 is not supported on {SOC}")
            h = host(x)
            self.alive.append(h)
            self.origin[id(h)] = x
            return h
        if isinstance(x, (list, tuple)):
            return type(x)(self.down(i) for i in x) if type(x) in (list, tuple) else x
        if isinstance(x, torch.device) and x.type == "npu":
            self.device = torch.device("npu", torch.npu.current_device()) if x.index is None else x
            return CPU
        return x

    def refuse(self, other):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {self.device} and "
            f"{other}! (simulated NPU: {self.name})"
        )

    def run(self, op, args, kwargs, on_cpu=None):
        """Call `op` on the host views; `on_cpu` are keyword arguments that are the CPU's already."""
        args = [self.down(a) for a in args]
        kwargs = {**{k: self.down(v) for k, v in kwargs.items()}, **(on_cpu or {})}
        if self.stray is not None and self.device is not None and not self.mixes_devices:
            self.refuse(CPU)
        return op(*args, **kwargs)

    def up(self, x):
        if isinstance(x, torch.Tensor):
            if IS_910A:
                saturate(self.name, x)
            known = self.origin.get(id(x))
            return known if known is not None else to_device(x, self.device or "npu")
        if isinstance(x, (list, tuple)):
            values = [self.up(i) for i in x]
            return values if isinstance(x, list) else tuple(values)
        return x


MAKES_INF = {"fill_", "full", "masked_fill", "masked_fill_", "where", "full_like"}  # a written inf is not an overflow


def saturate(name, h):
    """What the 910A does instead of inf and nan; it remembers that it had to."""
    global overflow
    if h.is_floating_point() and name not in MAKES_INF and not torch.isfinite(h).all():
        overflow = True
        torch.nan_to_num_(h, nan=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers: the device's (seed, offset) names a position in the CPU generator's stream for that seed
# ---------------------------------------------------------------------------------------------------------------------

STEP = 4  # torch_npu wants offsets in fours: offset = STEP * outputs drawn so far
_states = collections.OrderedDict()  # (seed, offset) -> CPU generator state there; what is missing is replayed
_scratch = torch.Generator()


def _words(state):
    """Of a CPU generator's state: the Mersenne twister's next index, and its words."""
    raw = state.numpy()
    return int(raw[16:24].view("uint64")[0]), raw[24 : 24 + 624 * 8].view("uint64")


def _skip(generator, n):
    for start in range(0, n, 1 << 24):
        torch.empty(min(n - start, 1 << 24), dtype=torch.int32).random_(generator=generator)


def _drawn(before, after, sizes):
    """How many 32-bit outputs lie between two states: known modulo 624, then tried where operators of `sizes` end."""
    (a, _), (b, words) = _words(before), _words(after)
    rest = (b - a) % 624
    ends = [0, 624, *sizes, *(2 * n for n in sizes)]
    near = {max(0, (end - rest + 312) // 624) for end in ends}
    for turns in (*sorted(near), *range(8 * max(ends) // 624)):
        _scratch.set_state(before)
        _skip(_scratch, rest + 624 * turns)
        index, reached = _words(_scratch.get_state())
        if index == b and (reached == words).all():
            return rest + 624 * turns
    raise RuntimeError("simulated NPU: lost count of random numbers")


class Draw:
    """A CPU generator, `cpu`, that stands where an NPU's does; `done` moves the NPU's to where it ended."""

    def __init__(self, generator, device):
        if generator is None:
            index = torch.npu.current_device() if device.index is None else device.index
            generator = torch.npu.default_generators[index]
        self.generator, self.cpu = generator, torch.Generator()
        self.seed, self.offset = generator.initial_seed(), generator.get_offset()
        if (self.seed, self.offset) in _states:
            self.cpu.set_state(_states[self.seed, self.offset])
        else:
            self.cpu.manual_seed(self.seed)
            _skip(self.cpu, self.offset // STEP)
        self.before = self.cpu.get_state()

    def done(self, *sizes):
        """`sizes` are the numbers of elements that may have been drawn."""
        after = self.cpu.get_state()
        offset = self.offset + STEP * _drawn(self.before, after, sizes)
        self.generator.set_offset(offset)
        _states[self.seed, offset] = after
        if len(_states) > 256:
            _states.popitem(last=False)


@contextlib.contextmanager
def as_default(cpu):
    """`cpu` in the place of the default CPU generator: for operators that take none."""
    saved = torch.default_generator.get_state()
    torch.default_generator.set_state(cpu.get_state())
    try:
        yield
        cpu.set_state(torch.default_generator.get_state())
    finally:
        torch.default_generator.set_state(saved)


def _numel(x):
    """The number of elements of all tensors in `x`."""
    if isinstance(x, torch.Tensor):
        return x.numel()
    return sum(map(_numel, x)) if isinstance(x, (list, tuple)) else 0


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------

# Allocation and bookkeeping are torch_npu's own code, as are all views; its _to_copy is an empty tensor and a copy_.
OWN = {
    "empty.memory_format", "empty_strided", "empty_like", "new_empty_strided", "is_pinned", "_pin_memory", "pin_memory",
    "record_stream", "is_set_to", "_to_copy", "flatten_dense_tensors",
}  # fmt: skip
# The host must know their result before it can go on: sizes that depend on data, and answers in Python.
WAITS = {
    "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "_unique", "equal", "bincount",
    "repeat_interleave",
}  # fmt: skip
INDEXES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # their indices may be the host's
FUSED_OPTIMIZERS = {"_fused_adamw_", "_fused_adam_", "_fused_sgd_"}  # torch_npu calls its kernel once a parameter


def kernel_launches(name, args):
    if name in FUSED_OPTIMIZERS or (IS_910A and name.startswith("_foreach")):
        return len(args[0])
    return 1


def on_host(op, name):
    """A kernel for NPU tensors: `op` on their host views."""
    schema = op._schema
    seeded = torch.Tag.nondeterministic_seeded in op.tags
    takes_generator = any(a.name == "generator" for a in schema.arguments)
    outs = [a.name for a in schema.arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write]

    def kernel(*args, **kwargs):
        launches[name] += kernel_launches(name, args)
        if name in WAITS or (name in INDEXES and any(t is not None and t.dtype is torch.bool for t in args[1])):
            syncs[name] += 1
        if name in FUSED_OPTIMIZERS:  # torch_npu's neither unscale nor skip
            kwargs.update(grad_scale=None, found_inf=None)
        call = Call(name, mixes_devices=name in INDEXES)
        targets = {k: kwargs.pop(k) for k in outs}
        on_cpu = {k: torch.empty(0, dtype=t.dtype) for k, t in targets.items()}  # grows to what the result needs
        if not seeded:
            result = call.run(op, args, kwargs, on_cpu)
        else:
            draw = Draw(kwargs.pop("generator", None), device_of(args, kwargs))
            if takes_generator:
                result = call.run(op, args, kwargs, {**on_cpu, "generator": draw.cpu})
            else:
                with as_default(draw.cpu):
                    result = call.run(op, args, kwargs, on_cpu)
            draw.done(_numel(args), _numel(result))
        if IS_910A and name.endswith("_"):
            for h in call.alive:
                saturate(name, h)
        if not outs:
            return call.up(result)
        for k, t in targets.items():
            if t.shape != on_cpu[k].shape:
                t.resize_(on_cpu[k].shape)
            if IS_910A:
                saturate(name, on_cpu[k])
            host(t).copy_(on_cpu[k])
        values = tuple(targets.values())
        return values[0] if len(values) == 1 else values

    return kernel


def device_of(args, kwargs):
    """The NPU of a call: its tensors', or the one it asks for."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.device.type == "npu"]
    return tensors[0].device if tensors else kwargs.get("device") or torch.device("npu")


def relaid(src, dst):
    """Whether copying `src` to `dst` lays the elements out anew, rather than moving them as they lie."""
    if src.shape != dst.shape:
        return not src.is_contiguous()
    return any(n > 1 and a != b for n, a, b in zip(src.shape, src.stride(), dst.stride(), strict=True))


def record_layout(t):
    layout["calls"] += 1
    layout["bytes"] += t.numel() * t.element_size()


def record_copy(name, dst, src, non_blocking):
    """Count one copy, or cast, of any kind."""
    if src.device.type == dst.device.type:
        launches[name] += 1
        if relaid(src, dst):
            record_layout(dst)
        return
    way, on_npu, on_cpu = ("h2d", dst, src) if src.device.type == "cpu" else ("d2h", src, dst)
    transfers[f"{way}_calls"] += 1
    transfers[f"{way}_bytes"] += dst.numel() * min(src.element_size(), dst.element_size())
    if not on_npu.is_contiguous():  # the device lays out anew: only contiguous memory travels
        launches[name] += 1
        record_layout(on_npu)
    # CANN's copy from or to pageable memory returns when it is done, even when it was asked not to block.
    if not (non_blocking and on_cpu.is_pinned()):
        syncs[f"{way}_copy"] += 1


def over_host(t):
    return host(t) if t.device.type == "npu" else t


def copy_(dst, src, non_blocking=False):
    on_device = dst.device.type == src.device.type
    if IS_910A and on_device and torch.bfloat16 in (src.dtype, dst.dtype):
        raise RuntimeError(f"simulated NPU: copy_: bfloat16 is not supported on {SOC}")
    if dst.numel():
        record_copy("copy_" if dst.dtype == src.dtype else "cast", dst, src, non_blocking)
    h = over_host(dst)
    h.copy_(over_host(src))
    if IS_910A and on_device:
        saturate("copy_", h)
    return dst


def copy_from(src, dst, non_blocking=False):
    return copy_(dst, src, non_blocking)


def copy_from_and_resize(src, dst):
    if dst.shape != src.shape:
        dst.resize_(src.shape)
    return copy_(dst, src)


def clone(t, *, memory_format=None):
    if memory_format not in (None, torch.preserve_format, torch.contiguous_format):
        raise RuntimeError("NPU only support format is contiguous_format or preserve_format.")
    out = to_device(host(t), t.device)
    record_copy("clone", out, t, True)
    return out


def contiguous(t, *, memory_format=torch.contiguous_format):
    return t if t.is_contiguous(memory_format=memory_format) else t.clone(memory_format=memory_format)


def local_scalar_dense(t):
    syncs["item"] += 1
    transfers["d2h_calls"] += 1
    transfers["d2h_bytes"] += t.element_size()
    return host(t).item()


def matmul_backward(grad, a, b, mask):
    rows = a.unsqueeze(0) if a.dim() == 1 else a
    columns = b.unsqueeze(1) if b.dim() == 1 else b
    grad = grad.unsqueeze(-1) if b.dim() == 1 else grad
    grad = grad.unsqueeze(-2) if a.dim() == 1 else grad
    grad_a = (grad @ columns.mT).sum_to_size(rows.shape).reshape(a.shape) if mask[0] else None
    if not mask[1]:
        return grad_a, None
    if columns.dim() == 2:  # one product for all rows of all batches
        rows, grad = rows.reshape(-1, rows.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return grad_a, (rows.mT @ grad).sum_to_size(columns.shape).reshape(b.shape)


def linear_backward(inp, grad, weight, mask):
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ weight if mask[0] else None,
        rows.t() @ inp.reshape(-1, inp.shape[-1]) if mask[1] else None,
        rows.sum(0) if mask[2] else None,
    )


def softmax(x, dim, dtype=None):
    return torch.ops.aten._softmax(x if dtype is None else x.to(dtype), dim, False)


def log_softmax(x, dim, dtype=None):
    return torch.ops.aten._log_softmax(x if dtype is None else x.to(dtype), dim, False)


class Fused(torch.autograd.Function):
    """An operator that torch_npu gives one kernel each way: `fn` on the host, and the CPU's gradient of it."""

    @staticmethod
    def forward(ctx, fn, name, options, draws, *tensors):
        launches[name] += 1
        call = Call(name)
        plain = [t if t is None else t.detach() for t in tensors]
        ctx.save_for_backward(*tensors)
        ctx.call, ctx.state = (fn, name, options), None
        if not draws:
            return call.up(call.run(fn, plain, options))
        draw = Draw(None, tensors[0].device)
        ctx.state = draw.before
        with as_default(draw.cpu):
            result = call.run(fn, plain, options)
        draw.done(draws)
        return call.up(result)

    @staticmethod
    def backward(ctx, grad):
        fn, name, options = ctx.call
        launches[f"{name}_grad"] += 1
        call = Call(f"{name}_grad")
        needed = ctx.needs_input_grad[4:]
        inputs = [t if t is None else call.down(t.detach()) for t in ctx.saved_tensors]
        leaves = [t.requires_grad_() for t, n in zip(inputs, needed, strict=True) if n]
        with torch.enable_grad(), contextlib.ExitStack() as stack:
            if ctx.state is not None:  # the same numbers again
                cpu = torch.Generator()
                cpu.set_state(ctx.state)
                stack.enter_context(as_default(cpu))
            grads = iter(torch.autograd.grad(fn(*inputs, **options), leaves, call.down(grad.detach())))
        return None, None, None, None, *(call.up(next(grads)) if n else None for n in needed)


def scaled_dot_product_attention(
    q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
):
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    fuses = (
        not IS_910A
        and q.dim() == k.dim() == v.dim() == 4
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and q.shape[-1] <= 512
        and (attn_mask is None or not attn_mask.requires_grad)
    )
    if not fuses:
        parts = torch.ops.aten._scaled_dot_product_attention_math
        return parts(q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
    fn = torch.nn.functional.scaled_dot_product_attention
    draws = q.shape[:-1].numel() * k.shape[-2] if dropout_p else 0
    return Fused.apply(fn, "npu_fusion_attention", options, draws, q, k, v, attn_mask)


def l1_loss(x, target, reduction=1):
    return Fused.apply(torch.ops.aten.l1_loss.default, "l1_loss", {"reduction": reduction}, 0, x, target)


def kl_div(x, target, reduction=1, *, log_target=False):
    options = {"reduction": reduction, "log_target": log_target}
    return Fused.apply(torch.ops.aten.kl_div.default, "kl_div", options, 0, x, target)


def binary_cross_entropy_with_logits(x, target, weight=None, pos_weight=None, reduction=1):
    name = "binary_cross_entropy_with_logits"
    op = torch.ops.aten.binary_cross_entropy_with_logits.default
    return Fused.apply(op, name, {"reduction": reduction}, 0, x, target, weight, pos_weight)


def one_hot(t, num_classes=-1):
    launches["one_hot"] += 1
    if num_classes == -1:  # the largest label decides the shape
        syncs["one_hot"] += 1
    return to_device(torch.ops.aten.one_hot(host(t), num_classes), t.device)


# torch_npu's own operators, as far as training meets them
def npu_dtype_cast(t, dtype, *_):
    return t if t.dtype is dtype else torch.ops.aten._to_copy(t, dtype=dtype)


def npu_dtype_cast_(dst, src):
    return copy_(dst, src)


def npu_format_cast(t, *_, **__):
    return t


def npu_gelu(t, approximate="none"):
    return torch.ops.aten.gelu(t, approximate=approximate)


def npu_gelu_backward(grad, t, approximate="none"):
    return torch.ops.aten.gelu_backward(grad, t, approximate=approximate)


def npu_get_float_status(t):
    out = torch.zeros_like(t)
    return out.fill_(1.0) if overflow else out


def npu_clear_float_status(t):
    global overflow
    overflow = False
    return torch.zeros_like(t)


def npu_alloc_float_status(t):
    return torch.zeros(8, device=t.device)


def amp_foreach_non_finite_check(tensors):
    """1 where any of `tensors` has an inf or nan; on the 910A, where the overflow flag is up."""
    if IS_910A:
        return torch.full((1,), float(overflow), device=tensors[0].device)
    launches["_amp_foreach_non_finite_check"] += 1
    bad = not all(torch.isfinite(host(t)).all() for t in tensors)
    return to_device(torch.tensor([float(bad)]), tensors[0].device)


def amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, inv_scale):
    """On the 910A, whose gradients never hold an inf, the overflow flag is what says that one was too large."""
    name = "_amp_foreach_non_finite_check_and_unscale_"
    launches[name] += len(tensors) if IS_910A else 1
    getattr(torch.ops.aten, name)([host(t) for t in tensors], host(found_inf), host(inv_scale))
    if overflow:
        host(found_inf).fill_(1.0)


ATEN_KERNELS = {
    "_amp_foreach_non_finite_check_and_unscale_": amp_foreach_non_finite_check_and_unscale_,
    "copy_": copy_,
    "_copy_from": copy_from,
    "_copy_from_and_resize": copy_from_and_resize,
    "clone": clone,
    "_local_scalar_dense": local_scalar_dense,
    "matmul_backward": matmul_backward,
    "linear_backward": linear_backward,
}
# Composites for which torch_npu has autograd kernels of its own, that call its operators past the dispatcher.
COMPOSITES = {
    "l1_loss": l1_loss,
    "kl_div": kl_div,
    "binary_cross_entropy_with_logits": binary_cross_entropy_with_logits,
    "one_hot": one_hot,
    "contiguous": contiguous,
    "softmax.int": softmax,
    "log_softmax.int": log_softmax,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
NPU_KERNELS = {
    "npu_dtype_cast": npu_dtype_cast,
    "_npu_dtype_cast": npu_dtype_cast,
    "npu_dtype_cast_backward": npu_dtype_cast,
    "_npu_dtype_cast_backward": npu_dtype_cast,
    "npu_dtype_cast_": npu_dtype_cast_,
    "npu_format_cast": npu_format_cast,
    "_npu_format_cast": npu_format_cast,
    "npu_gelu": npu_gelu,
    "npu_gelu_backward": npu_gelu_backward,
    "npu_get_float_status": npu_get_float_status,
    "npu_clear_float_status": npu_clear_float_status,
    "npu_alloc_float_status": npu_alloc_float_status,
    "_amp_foreach_non_finite_check": amp_foreach_non_finite_check,
}
_libraries = {}
# torch 2.7 overrides without being asked
OVERRIDE = {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}


def _override(namespace, name, fn, *keys):
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "IMPL"))
    for key in keys or ("PrivateUse1",):
        library.impl(name, fn, key, **OVERRIDE)


def _overload(name):
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    overload = overload or "default"
    return base, getattr(packet, overload) if packet is not None and overload in packet.overloads() else None


def _is_view(op):
    """Whether `op` returns a view, or turns its argument into one: metadata, which is the NPU tensor's own."""
    returns_view = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return returns_view or torch.Tag.inplace_view in op.tags


def install():
    """Put a CPU kernel under every operator that torch_npu registers for its device; once."""
    if _libraries:
        return
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overriding is the purpose
        for full in torch._C._dispatch_get_all_op_names():
            namespace, _, name = full.partition("::")
            if namespace != "aten" or name in OWN or name in ATEN_KERNELS or name in COMPOSITES:
                continue
            if has_kernel(full, "PrivateUse1"):
                base, op = _overload(name)
                if op is not None and not _is_view(op):
                    _override("aten", name, on_host(op, base))
        for name, fn in ATEN_KERNELS.items():
            _override("aten", name, fn)
        for name, fn in COMPOSITES.items():
            _override("aten", name, fn, "PrivateUse1", "AutogradPrivateUse1")
        for name, fn in NPU_KERNELS.items():
            _override("npu", name, fn)
    torch_npu = sys.modules["torch_npu"]
    # A queue would run collectives behind the operators' back.
    torch_npu._C._npu_set_task_queue_enable = lambda mode: None
    path = os.environ.get("NPU_SIM_COUNTS")
    if path:
        atexit.register(_write_counts, path, os.getpid())


if "torch_npu" in sys.modules:  # a program that imports this before torch has brought torch_npu in just now
    install()
