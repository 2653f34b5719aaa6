"""Which operators does training meet? A table: a function of tensors, and what it is called with."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Case:
    """`fn(*tensors)`; `shapes` are of random normal inputs, or functions that make an input on the CPU."""

    fn: callable
    shapes: tuple
    grad: bool = True
    dtypes: tuple = (torch.float32, torch.float16, torch.bfloat16)


FLOAT = (torch.float32,)
WITH_INT = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
INT = (torch.int64,)


def positive(*shape):
    return lambda: torch.rand(*shape) + 0.5


def integers(high, *shape):
    return lambda: torch.randint(0, high, shape)


def foreach(name, *more):
    """A foreach operator over tensors of one shape, its results stacked."""
    return lambda *ts: torch.stack(getattr(torch, f"_foreach_{name}")(list(ts), *more))


def index_of(values):
    return lambda x: torch.tensor(values, device=x.device)


CASES = {
    # products
    "mm": Case(torch.mm, ((5, 4), (4, 3))),
    "addmm": Case(lambda b, x, w: torch.addmm(b, x, w), ((3,), (5, 4), (4, 3))),
    "linear": Case(F.linear, ((2, 5, 4), (3, 4), (3,))),
    "linear_without_bias": Case(F.linear, ((2, 5, 4), (3, 4))),
    "bmm": Case(torch.bmm, ((2, 5, 4), (2, 4, 3))),
    "baddbmm": Case(torch.baddbmm, ((2, 5, 3), (2, 5, 4), (2, 4, 3))),
    "matmul": Case(torch.matmul, ((2, 3, 5, 4), (2, 3, 4, 3))),
    "matmul_broadcast": Case(torch.matmul, ((2, 1, 5, 4), (3, 4, 3))),
    "matmul_folded": Case(torch.matmul, ((2, 5, 4), (4, 3))),
    "matmul_vector": Case(torch.matmul, ((2, 5, 4), (4,))),
    "dot": Case(torch.matmul, ((4,), (4,))),
    "einsum": Case(lambda x, y: torch.einsum("bij,bjk->bik", x, y), ((2, 5, 4), (2, 4, 3))),
    "conv2d_patches": Case(lambda x, w, b: F.conv2d(x, w, b, stride=4), ((2, 3, 8, 8), (6, 3, 4, 4), (6,))),
    "conv2d_depthwise": Case(
        lambda x, w, b: F.conv2d(x, w, b, padding=1, groups=4), ((2, 4, 7, 7), (4, 1, 3, 3), (4,))
    ),
    "conv2d_1x1": Case(F.conv2d, ((2, 4, 5, 5), (3, 4, 1, 1))),
    # attention, activation, normalisation
    "attention": Case(F.scaled_dot_product_attention, ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))),
    "attention_causal": Case(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), ((2, 2, 5, 8),)),
    "attention_masked": Case(
        lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m > 0),
        ((1, 2, 5, 8), positive(5, 5)),
        grad=False,
    ),
    "attention_of_windows": Case(F.scaled_dot_product_attention, ((2, 3, 2, 5, 8),) * 3, dtypes=FLOAT),
    "softmax": Case(lambda x: x.softmax(-1), ((2, 5, 4),)),
    "softmax_in_float": Case(lambda x: x.softmax(1, dtype=torch.float32), ((2, 5, 4),)),
    "log_softmax": Case(lambda x: x.log_softmax(-1), ((5, 4),)),
    "gelu": Case(F.gelu, ((5, 4),)),
    "gelu_tanh": Case(lambda x: F.gelu(x, approximate="tanh"), ((5, 4),)),
    "relu": Case(F.relu, ((5, 4),)),
    "silu": Case(F.silu, ((5, 4),)),
    "hardswish": Case(F.hardswish, ((5, 4),)),
    "layer_norm": Case(lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-6), ((2, 5, 4), (4,), (4,))),
    "batch_norm": Case(lambda x: F.batch_norm(x, None, None, training=True), ((4, 3, 2, 2),), dtypes=FLOAT),
    "dropout_off": Case(lambda x: F.dropout(x, 0.0), ((5, 4),)),
    # losses
    "cross_entropy": Case(lambda x: F.cross_entropy(x, index_of([0, 3, 1])(x)), ((3, 4),)),
    "cross_entropy_smooth": Case(lambda x: F.cross_entropy(x, index_of([0, 3, 1])(x), label_smoothing=0.1), ((3, 4),)),
    "cross_entropy_soft": Case(lambda x, t: F.cross_entropy(x, t.softmax(-1)), ((3, 4), (3, 4))),
    "soft_target_loss": Case(lambda x, t: -(t.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(), ((3, 4), (3, 4))),
    "nll_loss": Case(lambda x: F.nll_loss(x, index_of([0, 3, 1])(x)), ((3, 4),)),
    "bce_with_logits": Case(
        lambda x, t: F.binary_cross_entropy_with_logits(x, t.sigmoid()), ((3, 4), (3, 4)), dtypes=FLOAT
    ),
    "kl_div": Case(lambda x, t: F.kl_div(x.log_softmax(-1), t.softmax(-1), reduction="batchmean"), ((3, 4), (3, 4))),
    "kl_div_of_logs": Case(
        lambda x, t: F.kl_div(x.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True), ((3, 4), (3, 4))
    ),
    "l1_loss": Case(F.l1_loss, ((3, 4), (3, 4))),
    "mse_loss": Case(F.mse_loss, ((3, 4), (3, 4))),
    # labels and indices
    "one_hot": Case(lambda x: F.one_hot(x, 4), (integers(4, 5),), grad=False, dtypes=INT),
    "scatter": Case(
        lambda x: torch.full((3, 4), 0.1, device=x.device).scatter_(1, x, 0.9),
        (integers(4, 3, 1),),
        grad=False,
        dtypes=INT,
    ),
    "embedding": Case(lambda w: F.embedding(index_of([0, 2, 2])(w), w), ((4, 3),)),
    "topk": Case(lambda x: x.topk(2)[0], ((5, 4),)),
    "topk_indices": Case(lambda x: x.topk(2)[1], ((5, 4),), grad=False),
    "argsort": Case(lambda x: x.argsort(dim=1), ((5, 4),), grad=False),
    "argmax": Case(lambda x: x.argmax(1), ((5, 4),), grad=False),
    "sort": Case(lambda x: x.sort(dim=1)[0], ((5, 4),)),
    "eq": Case(lambda x, y: x == y, (integers(3, 5), integers(3, 5)), grad=False, dtypes=WITH_INT),
    "index": Case(lambda x: x[index_of([0, 2])(x)], ((5, 4),), dtypes=WITH_INT),
    "index_mask": Case(lambda x: x[x[:, 0] > -9], ((5, 4),), dtypes=FLOAT),
    "index_select": Case(lambda x: x.index_select(1, index_of([0, 2])(x)), ((5, 4),), dtypes=WITH_INT),
    "index_put": Case(lambda x, y: x.clone().index_put_((index_of([0, 2])(x),), y), ((5, 4), (2, 4)), dtypes=WITH_INT),
    "gather": Case(lambda x: x.gather(1, index_of([[0], [2]])(x)), ((2, 4),), dtypes=WITH_INT),
    # shapes
    "cat": Case(lambda x, y: torch.cat((x, y), 1), ((5, 4), (5, 3)), dtypes=WITH_INT),
    "stack": Case(lambda x, y: torch.stack((x, y)), ((5, 4), (5, 4)), dtypes=WITH_INT),
    "split": Case(lambda x: x.split(2, 1)[1] * 2, ((5, 4),), dtypes=WITH_INT),
    "unbind": Case(lambda x: x.unbind(0)[1] + 1, ((5, 4),), dtypes=WITH_INT),
    "permute_contiguous": Case(lambda x: x.permute(2, 0, 1).contiguous(), ((2, 3, 4),), dtypes=WITH_INT),
    "transpose_reshape": Case(lambda x: x.transpose(1, 2).reshape(2, -1), ((2, 3, 4),), dtypes=WITH_INT),
    "expand": Case(lambda x: x.expand(4, 3) * 2, ((1, 3),), dtypes=WITH_INT),
    "repeat": Case(lambda x: x.repeat(2, 3), ((2, 3),), dtypes=WITH_INT),
    "flip": Case(lambda x: x.flip(0), ((5, 4),), dtypes=WITH_INT),
    "roll": Case(lambda x: x.roll((1, 2), (0, 1)), ((5, 4),), dtypes=WITH_INT),
    "pad": Case(lambda x: F.pad(x, (0, 0, 0, 2, 1, 0)), ((2, 3, 4),), dtypes=WITH_INT),
    "pad_nothing": Case(lambda x: F.pad(x, (0, 0, 0, 0)), ((3, 4),), dtypes=WITH_INT),
    "interpolate": Case(lambda x: F.interpolate(x, size=(6, 6), mode="bicubic"), ((1, 2, 4, 4),), dtypes=FLOAT),
    "unfold": Case(lambda x: F.unfold(x, 2), ((1, 2, 4, 4),), dtypes=FLOAT),
    "slice_write": Case(lambda x: x.clone().narrow(0, 1, 2).mul_(3), ((5, 4),), dtypes=WITH_INT),
    "triu": Case(lambda x: x.triu(1), ((4, 4),), dtypes=WITH_INT),
    # arithmetic
    "add": Case(torch.add, ((5, 4), (5, 4)), dtypes=WITH_INT),
    "add_broadcast": Case(torch.add, ((5, 4), (4,)), dtypes=WITH_INT),
    "add_scalar": Case(lambda x: x + 2, ((5, 4),), dtypes=WITH_INT),
    "sub": Case(lambda x, y: torch.sub(x, y, alpha=2), ((5, 4), (5, 4)), dtypes=WITH_INT),
    "mul": Case(torch.mul, ((5, 4), (5, 1)), dtypes=WITH_INT),
    "div": Case(torch.div, ((5, 4), positive(5, 4))),
    "floor_divide": Case(lambda x: x // 2, (integers(9, 5),), grad=False, dtypes=WITH_INT),
    "remainder": Case(lambda x: x % 3, (integers(9, 5),), grad=False, dtypes=WITH_INT),
    "neg": Case(torch.neg, ((5, 4),), dtypes=WITH_INT),
    "pow": Case(lambda x: x**2, ((5, 4),), dtypes=WITH_INT),
    "sqrt": Case(torch.sqrt, (positive(5, 4),)),
    "rsqrt": Case(torch.rsqrt, (positive(5, 4),)),
    "exp": Case(torch.exp, ((5, 4),)),
    "log": Case(torch.log, (positive(5, 4),)),
    "sigmoid": Case(torch.sigmoid, ((5, 4),)),
    "tanh": Case(torch.tanh, ((5, 4),)),
    "abs": Case(torch.abs, ((5, 4),), dtypes=WITH_INT),
    "clamp": Case(lambda x: x.clamp(-0.5, 0.5), ((5, 4),)),
    "clamp_int": Case(lambda x: x.clamp(1, 3), (integers(9, 5),), grad=False, dtypes=INT),
    "maximum": Case(torch.maximum, ((5, 4), (5, 4)), dtypes=WITH_INT),
    "where": Case(lambda x, y: torch.where(x > 0, x, y), ((5, 4), (5, 4)), dtypes=WITH_INT),
    "masked_fill": Case(lambda x: x.masked_fill(x > 0, 7), ((5, 4),), dtypes=WITH_INT),
    "masked_fill_infinite": Case(lambda x: x.masked_fill(x > 0, float("-inf")).softmax(-1), ((5, 4),), dtypes=FLOAT),
    "addcmul": Case(lambda x, y, z: torch.addcmul(x, y, z, value=0.5), ((5, 4),) * 3),
    "addcdiv": Case(lambda x, y, z: torch.addcdiv(x, y, z, value=0.5), ((5, 4), (5, 4), positive(5, 4))),
    "lerp": Case(lambda x, y: torch.lerp(x, y, 0.3), ((5, 4), (5, 4))),
    "isfinite": Case(lambda x: torch.isfinite(x / x), (integers(2, 6),), grad=False),
    "logical": Case(lambda x, y: (x > 0) & ~(y > 0) | (x == y), ((5, 4), (5, 4)), grad=False, dtypes=WITH_INT),
    # reductions
    "sum": Case(lambda x: x.sum(1), ((5, 4),), dtypes=WITH_INT),
    "sum_all": Case(torch.sum, ((5, 4),), dtypes=WITH_INT),
    "mean": Case(lambda x: x.mean((0, 2)), ((2, 3, 4),)),
    "norm": Case(torch.linalg.vector_norm, ((5, 4),)),
    "normalize": Case(F.normalize, ((5, 4),)),
    "std": Case(lambda x: x.std(0), ((5, 4),)),
    "max": Case(lambda x: x.max(1)[0], ((5, 4),), dtypes=WITH_INT),
    "any": Case(lambda x: (x > 0).any(1), ((5, 4),), grad=False, dtypes=WITH_INT),
    "cumsum": Case(lambda x: x.cumsum(0), ((5, 4),), dtypes=WITH_INT),
    "logsumexp": Case(lambda x: x.logsumexp(1), ((5, 4),)),
    "adaptive_avg_pool": Case(lambda x: F.adaptive_avg_pool2d(x, 1), ((2, 3, 4, 4),)),
    # foreach
    "foreach_add": Case(foreach("add", 2.0), ((5, 4), (5, 4)), grad=False),
    "foreach_mul": Case(foreach("mul", 0.5), ((5, 4), (5, 4)), grad=False),
    "foreach_sqrt": Case(foreach("sqrt"), (positive(5, 4), positive(5, 4)), grad=False),
    "foreach_norm": Case(foreach("norm", 2.0), ((5, 4), (5, 4)), grad=False),
    "foreach_lerp": Case(
        lambda x, y: torch.stack(torch._foreach_lerp([x, y], [y, x], 0.3)), ((5, 4), (5, 4)), grad=False
    ),
    "foreach_addcmul": Case(
        lambda x, y: torch.stack(torch._foreach_addcmul([x, y], [y, x], [x, x], 2.0)), ((5, 4), (5, 4)), grad=False
    ),
    "foreach_div_by": Case(
        lambda x, y: torch.stack(torch._foreach_div([x, y], [y, y])), ((5, 4), positive(5, 4)), grad=False
    ),
    # casts
    "to_float": Case(lambda x: x.float() * 2, ((5, 4),), dtypes=WITH_INT),
    "to_half": Case(lambda x: x.half(), ((5, 4),), dtypes=(torch.float32, torch.bfloat16)),
    "to_bfloat16": Case(lambda x: x.bfloat16(), ((5, 4),), dtypes=(torch.float32, torch.float16)),
    "to_int": Case(lambda x: x.long(), ((5, 4),), grad=False),
    "to_bool": Case(lambda x: x.bool(), (integers(2, 5),), grad=False, dtypes=WITH_INT),
}

# name -> a function of x that writes into x or into `out`; run on a whole tensor and on a strided part of one.
INPLACE = {
    "add_": lambda x, y: x.add_(y, alpha=2),
    "mul_": lambda x, y: x.mul_(y),
    "copy_": lambda x, y: x.copy_(y),
    "copy_from_transposed": lambda x, y: x.copy_(y.t().contiguous().t()),
    "fill_": lambda x, y: x.fill_(3),
    "zero_": lambda x, y: x.zero_(),
    "clamp_": lambda x, y: x.clamp_(0, 1),
    "masked_fill_": lambda x, y: x.masked_fill_(y > 0, 5),
    "div_scalar_": lambda x, y: x.div_(2) if x.is_floating_point() else x.floor_divide_(2),
    "index_add_": lambda x, y: x.index_add_(0, torch.tensor([0, 1], device=x.device), y[:2]),
    "scatter_": lambda x, y: x.scatter_(1, torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device), 4),
    "setitem": lambda x, y: x.__setitem__((slice(1, 3), 0), y[1:3, 1]),
    "foreach_add_": lambda x, y: torch._foreach_add_([x, y], 2),
    "foreach_mul_": lambda x, y: torch._foreach_mul_([x], [y]),
    "foreach_copy_": lambda x, y: torch._foreach_copy_([x], [y]),
    "foreach_zero_": lambda x, y: torch._foreach_zero_([x]),
}
INPLACE_FLOAT = {
    "addcmul_": lambda x, y: x.addcmul_(y, y, value=0.5),
    "addcdiv_": lambda x, y: x.addcdiv_(y, y.abs() + 1),
    "lerp_": lambda x, y: x.lerp_(y, 0.25),
    "sqrt_": lambda x, y: x.abs_().sqrt_(),
    "foreach_lerp_": lambda x, y: torch._foreach_lerp_([x], [y], 0.25),
    "foreach_addcmul_": lambda x, y: torch._foreach_addcmul_([x], [y], [y], 0.5),
    "foreach_addcdiv_": lambda x, y: torch._foreach_addcdiv_([x], [y], [y.abs() + 1], 0.5),
    "unscale": lambda x, y: torch._amp_foreach_non_finite_check_and_unscale_(
        [x], torch.zeros(1, device=x.device), torch.full((1,), 0.5, device=x.device)
    ),
}
OUT = {
    "add": lambda x, y, out: torch.add(x, y, out=out),
    "mul": lambda x, y, out: torch.mul(x, y, out=out),
    "sum": lambda x, y, out: torch.sum(x, 1, out=out),
    "cat": lambda x, y, out: torch.cat((x, y), out=out),
    "stack": lambda x, y, out: torch.stack((x, y), out=out),
    "mm": lambda x, y, out: torch.mm(x, y.t(), out=out),
    "clamp": lambda x, y, out: torch.clamp(x, 0, 1, out=out),
    "cumsum": lambda x, y, out: torch.cumsum(x, 0, out=out),
    "index_select": lambda x, y, out: torch.index_select(x, 0, torch.tensor([1, 0], device=x.device), out=out),
}
