"""How fast is a training step? alt_gvt_small as main.py trains it, beside timm's twins_svt_small in a plain loop.

    python tools bench [--device cpu] [--batch-size 8] [--input-size 224] [--amp auto] [--steps 10]

Ours: Precision, clipping and optim's optimizer. timm's: autocast, torch's clip_grad_norm_ and AdamW with its defaults.
The two take turns on the same images, so that the ratio holds where the machine's speed drifts. The first steps do not count.
"""
import argparse
import statistics
import time

import devices  # before torch: it decides what torch may load

# isort: split
import timm
import torch
import torch.nn.functional as F

import gvt  # noqa: F401  registers the models
import optim
from precision import Precision


def ours(device, precision, images, targets, drop_path):
    model = timm.create_model("alt_gvt_small", drop_path_rate=drop_path).to(device).train()
    optimizer, _, _ = optim.build(model, device, lr=5e-4, global_batch=len(images), epochs=300, precision=precision.name)

    def step():
        with precision.autocast():
            loss = F.cross_entropy(model(images), targets)
        precision(loss, optimizer, 5.0)
        optimizer.zero_grad()
    return step


def theirs(device, precision, images, targets, drop_path, criterion=F.cross_entropy):
    model = timm.create_model("twins_svt_small", drop_path_rate=drop_path).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=precision.name == "fp16")  # no overflow, no skipped step

    def step():
        with precision.autocast():
            loss = criterion(model(images), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return step


def seconds(step, device):
    devices.synchronize(device)
    start = time.perf_counter()
    step()
    devices.synchronize(device)
    return time.perf_counter() - start


def main(argv):
    parser = argparse.ArgumentParser("python tools bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"))
    parser.add_argument("--drop-path", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=10, help="pairs of steps that count")
    given = parser.parse_args(argv)
    if min(given.batch_size, given.steps) < 1 or given.input_size < 32 or not 0 <= given.drop_path < 1:
        parser.error("--batch-size and --steps are at least 1, --input-size at least 32, and --drop-path is at least 0 and less than 1")
    device = devices.init_distributed_mode(given.device).device
    devices.seed_everything(0)
    precision = Precision(device, given.amp)
    images = torch.randn(given.batch_size, 3, given.input_size, given.input_size, device=device)
    targets = torch.randint(1000, (given.batch_size,), device=device)
    steps = [make(device, precision, images, targets, given.drop_path) for make in (ours, theirs)]
    pairs = [[seconds(step, device) for step in steps] for _ in range(given.steps + 3)][3:]
    a, b = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"{devices.describe(device)}, {precision.name}, batch {given.batch_size}, {given.input_size} pixels, torch {torch.__version__}, "
          f"timm {timm.__version__}, n = {given.steps}")
    print(f"ours {given.batch_size / a:.1f} images/s, timm's {given.batch_size / b:.1f} images/s, ratio {ratio:.2f}")
