"""One rank of the collectives' tests: every collective of every dtype, against what its definition gives.

torchrun --nproc_per_node=N collectives_worker.py RESULTS.json     # rank 0 writes {check: "ok" or what went wrong}
"""

import functools
import json
import os
import sys

import torch
import torch.distributed as dist

REDUCED = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
}
MOVED = {**REDUCED, "bool": torch.bool, "float64": torch.float64}
CHECKS = {}


def check(name, dtypes=None):
    """Register a check, once or for each dtype; each returns (what came, what should)."""

    def register(fn):
        if dtypes is None:
            CHECKS[name] = fn
        else:
            CHECKS.update({f"{name}-{k}": functools.partial(fn, d) for k, d in dtypes.items()})
        return fn

    return register


def world():
    return dist.get_rank(), dist.get_world_size()


def device():
    return torch.device("npu", int(os.environ["LOCAL_RANK"]))


def values(rank, n, dtype):
    """What `rank` contributes: small, so that no sum of eight leaves an int8."""
    return ((torch.arange(n) + rank) % 4 + 1).to(dtype)


def everyone(n, dtype):
    return [values(r, n, dtype) for r in range(dist.get_world_size())]


@check("all_reduce_sum", REDUCED)
def _(dtype):
    r, n = world()
    x = values(r, 1000, dtype).to(device())
    dist.all_reduce(x)
    return x, torch.stack(everyone(1000, dtype)).sum(0).to(dtype)


@check("all_reduce_max", REDUCED)
def _(dtype):
    x = values(world()[0], 7, dtype).to(device())
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x, torch.stack(everyone(7, dtype)).amax(0)


@check("all_reduce_min", REDUCED)
def _(dtype):
    x = values(world()[0], 7, dtype).to(device())
    dist.all_reduce(x, dist.ReduceOp.MIN)
    return x, torch.stack(everyone(7, dtype)).amin(0)


@check("all_reduce_product")
def _():
    r, n = world()
    x = (values(r, 7, torch.float32) / 2).to(device())
    dist.all_reduce(x, dist.ReduceOp.PRODUCT)
    return x, (torch.stack(everyone(7, torch.float32)) / 2).prod(0)


@check("all_reduce_of_three_chunks")
def _():
    r, n = world()
    x = torch.arange(700_001.0).add(r).to(device())
    dist.all_reduce(x)
    return x, torch.arange(700_001.0) * n + n * (n - 1) / 2


@check("all_reduce_same_bits_on_all_ranks")
def _():
    r, n = world()
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(r)).to(device())
    dist.all_reduce(x)
    copies = [torch.empty_like(x) for _ in range(n)]
    dist.all_gather(copies, x)
    return torch.stack(copies), x.cpu().expand(n, -1)


@check("all_reduce_float64_is_refused")
def _():
    x = torch.ones(3, dtype=torch.float64, device=device())
    try:
        dist.all_reduce(x)
    except RuntimeError as e:
        return torch.tensor("double" in str(e).lower() or "float64" in str(e)), torch.tensor(True)
    return torch.tensor(False), torch.tensor(True)


@check("all_reduce_noncontiguous_is_refused_or_right")
def _():
    r, n = world()
    x = values(r, 6, torch.float32).view(2, 3).to(device()).t()
    try:
        dist.all_reduce(x)
    except (RuntimeError, ValueError) as e:
        return torch.tensor("contiguous" in str(e)), torch.tensor(True)
    return x, torch.stack(everyone(6, torch.float32)).sum(0).view(2, 3).t()


@check("broadcast", MOVED)
def _(dtype):
    r, n = world()
    x = values(r, 9, dtype).to(device())
    dist.broadcast(x, n - 1)
    return x, values(n - 1, 9, dtype)


@check("all_gather", MOVED)
def _(dtype):
    r, n = world()
    out = [torch.empty(9, dtype=dtype, device=device()) for _ in range(n)]
    dist.all_gather(out, values(r, 9, dtype).to(device()))
    return torch.stack(out), torch.stack(everyone(9, dtype))


@check("all_gather_uneven")
def _():
    r, n = world()
    out = [torch.empty(3 + i, device=device()) for i in range(n)]
    dist.all_gather(out, torch.full((3 + r,), float(r), device=device()))
    return torch.cat(out), torch.cat([torch.full((3 + i,), float(i)) for i in range(n)])


@check("all_gather_into_tensor", MOVED)
def _(dtype):
    r, n = world()
    out = torch.empty(9 * n, dtype=dtype, device=device())
    dist.all_gather_into_tensor(out, values(r, 9, dtype).to(device()))
    return out, torch.cat(everyone(9, dtype))


@check("reduce_scatter_tensor", {k: d for k, d in REDUCED.items() if k != "uint8"})  # torch_npu refuses uint8 here
def _(dtype):
    r, n = world()
    out = torch.empty(5, dtype=dtype, device=device())
    dist.reduce_scatter_tensor(out, values(r, 5 * n, dtype).to(device()))
    return out, torch.stack(everyone(5 * n, dtype)).sum(0).to(dtype)[5 * r : 5 * r + 5]


@check("reduce_scatter_list")
def _():
    r, n = world()
    out = torch.empty(5, device=device())
    dist.reduce_scatter(out, list(values(r, 5 * n, torch.float32).to(device()).split(5)))
    return out, torch.stack(everyone(5 * n, torch.float32)).sum(0)[5 * r : 5 * r + 5]


@check("reduce", REDUCED)
def _(dtype):
    r, n = world()
    x = values(r, 5, dtype).to(device())
    dist.reduce(x, 0)
    if r == 0:
        return x, torch.stack(everyone(5, dtype)).sum(0).to(dtype)
    return torch.zeros(1), torch.zeros(1)  # what it leaves on the others is nobody's business


@check("gather")
def _():
    r, n = world()
    out = [torch.empty(5, device=device()) for _ in range(n)] if r == 0 else None
    dist.gather(values(r, 5, torch.float32).to(device()), out, 0)
    return (torch.stack(out), torch.stack(everyone(5, torch.float32))) if r == 0 else (torch.zeros(1), torch.zeros(1))


@check("scatter")
def _():
    r, n = world()
    out = torch.empty(5, device=device())
    dist.scatter(out, [v.to(device()) for v in everyone(5, torch.float32)] if r == 0 else None, 0)
    return out, values(r, 5, torch.float32)


@check("all_to_all_single", REDUCED)
def _(dtype):
    r, n = world()
    out = torch.empty(2 * n, dtype=dtype, device=device())
    dist.all_to_all_single(out, values(r, 2 * n, dtype).to(device()))
    return out, torch.cat([v[2 * r : 2 * r + 2] for v in everyone(2 * n, dtype)])


@check("all_to_all_uneven")
def _():
    r, n = world()
    out = [torch.empty(r + 1, device=device()) for _ in range(n)]
    dist.all_to_all(out, [torch.full((i + 1,), float(10 * r + i), device=device()) for i in range(n)])
    return torch.stack(out), torch.stack([torch.full((r + 1,), 10.0 * i + r) for i in range(n)])


@check("send_recv", MOVED)
def _(dtype):
    r, n = world()
    x = values(r, 100_000, dtype).to(device())
    if r == 0:
        dist.send(x, n - 1)
    elif r == n - 1:
        dist.recv(x, 0)
    return x, values(0 if r == n - 1 else r, 100_000, dtype)


@check("batch_isend_irecv_ring")
def _():
    r, n = world()
    x, y = values(r, 100_000, torch.float32).to(device()), torch.empty(100_000, device=device())
    ring = [dist.P2POp(dist.isend, x, (r + 1) % n), dist.P2POp(dist.irecv, y, (r - 1) % n)]
    for work in dist.batch_isend_irecv(ring):
        work.wait()
    return y, values((r - 1) % n, 100_000, torch.float32)


@check("coalesced_all_reduce")
def _():
    r, n = world()
    tensors = [torch.full((i + 1,), float(r), device=device()) for i in range(3)]
    with dist._coalescing_manager(device=device()):
        for t in tensors:
            dist.all_reduce(t)
    return torch.cat(tensors), torch.full((6,), n * (n - 1) / 2)


@check("async_work")
def _():
    r, n = world()
    x = torch.full((4,), float(r), device=device())
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    return x, torch.full((4,), n * (n - 1) / 2)


@check("barrier")
def _():
    dist.barrier()
    return torch.zeros(1), torch.zeros(1)


@check("objects")
def _():
    r, n = world()
    out = [None] * n
    dist.all_gather_object(out, {"rank": r})
    return torch.tensor([o["rank"] for o in out]), torch.arange(n)


@check("subgroup")
def _():
    r, n = world()
    group = dist.new_group([0, n - 1])
    x = torch.ones(3, device=device())
    if r in (0, n - 1):
        dist.all_reduce(x, group=group)
    return x, torch.full((3,), float(len({0, n - 1}) if r in (0, n - 1) else 1))


@check("ddp_gradients")
def _():
    r, n = world()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    batch = torch.randn(4 * n, 6, generator=torch.Generator().manual_seed(1))
    model(batch).square().mean().backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    model.to(device())
    local = int(os.environ["LOCAL_RANK"])
    ddp = torch.nn.parallel.DistributedDataParallel(model, device_ids=[local], broadcast_buffers=False)
    ddp(batch[4 * r : 4 * r + 4].to(device())).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), want


@check("counts_of_a_reduction")
def _():
    if "NPU_SIM" not in os.environ:
        return torch.zeros(1), torch.zeros(1)
    import npu_sim

    x = torch.ones(1000, device=device())
    npu_sim.reset()
    dist.all_reduce(x)
    c = npu_sim.counts()
    return torch.tensor(
        [c["collectives"]["AllReduce"]["calls"], c["collectives"]["bytes"], c["syncs"]["total"]]
    ), torch.tensor([1, 4000, 0])


def main(path):
    torch.npu.set_device(device())
    dist.init_process_group("hccl", device_id=device())
    r, n = world()
    results = {}
    for name, fn in CHECKS.items():
        try:
            got, want = fn()
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-6)
            results[name] = "ok"
        except Exception as e:  # every check is reported; a hang is the parent's time-out
            results[name] = f"rank {r}: {type(e).__name__}: {e}"
    everybody = [None] * n
    dist.all_gather_object(everybody, results)
    if r == 0:
        merged = {k: "; ".join(p[k] for p in everybody if p[k] != "ok") or "ok" for k in results}
        with open(path, "w") as f:
            json.dump(merged, f)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
