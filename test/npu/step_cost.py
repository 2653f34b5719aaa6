"""What does a training step cost a device? Counted on simulated NPUs, ours beside timm's model in a plain loop.

    PATH=$PWD/.venv-npu/bin:$PATH test/npu_sim/run -n 1 python test/npu/step_cost.py [--batch 2] [--size 224] [--detail]

Ours: alt_gvt_small, engine's step with Precision and the default optimizer. timm's: twins_svt_small with
torch.optim.AdamW and torch's clip_grad_norm_. Both: bf16 autocast, drop path 0.2, clipping at 5, one card.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import npu_sim
import timm
import torch

import devices
import engine
import gvt  # noqa: F401  registers the models
import optim
from precision import Precision
from tools import bench


class Window:
    """Counts what happens between two calls of the criterion: one step in the middle of a window of the log."""

    def __init__(self, first=2):
        self.calls, self.first, self.counts = 0, first, None

    def __call__(self, outputs, targets):
        self.calls += 1
        if self.calls == self.first:
            npu_sim.reset()
        elif self.calls == self.first + 1:
            self.counts = npu_sim.counts()
        return torch.nn.functional.cross_entropy(outputs, targets)


class Batches(list):
    batch_size = 1


def ours(device, batch, precision):
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.2).to(device)
    optimizer, _, _ = optim.build(model, device, lr=5e-4, global_batch=len(batch[0]), epochs=300)
    precision.load_state_dict({"scale": 256.0})  # no overflow: a step that is skipped costs less
    window = Window()
    engine.train_one_epoch(model, lambda _, outputs, targets: window(outputs, targets), Batches([batch] * 4), optimizer, device, 0,
                           precision, 5.0, quiet=True)
    return window.counts


def theirs(device, batch, precision):
    window = Window()
    step = bench.theirs(device, precision, *batch, drop_path=0.2, criterion=window)
    for _ in range(4):
        step()
    return window.counts


def costs(amp="bf16", batch=2, size=224):
    """-> the counts of ours and of timm's"""
    device = devices.init_distributed_mode("npu").device
    torch.manual_seed(0)
    data = torch.randn(batch, 3, size, size).to(device), torch.randint(1000, (batch,)).to(device)
    return [make(device, data, Precision(device, amp)) for make in (ours, theirs)]


ROWS = {
    "operator launches": lambda c: c["launches"]["total"],
    "layout copies": lambda c: c["layout_copies"]["calls"],
    "layout-copy bytes": lambda c: c["layout_copies"]["bytes"],
    "waits for the device": lambda c: c["syncs"]["total"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--detail", action="store_true", help="launches by operator")
    given = parser.parse_args()
    a, b = costs(given.amp, given.batch, given.size)
    print(f"| a training step, {given.amp}, batch {given.batch}, {given.size} pixels | ours | timm's | ratio |\n|---|---|---|---|")
    for name, pick in ROWS.items():
        print(f"| {name} | {pick(a):,} | {pick(b):,} | {pick(a) / pick(b) if pick(b) else 1:.2f} |")
    if given.detail:
        names = {*a["launches"], *b["launches"]} - {"total"}
        for name in sorted(names, key=lambda n: -max(c["launches"].get(n, 0) for c in (a, b))):
            print(f"{name:45} {a['launches'].get(name, 0):6} {b['launches'].get(name, 0):6}")


if __name__ == "__main__":
    main()
