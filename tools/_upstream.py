"""What did upstream's own code train on, for the rows in published/training.json, and does main.py write the same rows?"""
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import networks

MAIN = Path(__file__).resolve().parents[1] / "main.py"
CLASSES = {  # name: (which photograph, the part of it that its images are cut from)
    "flower": (1, (200, 100, 420, 320)), "leaves": (1, (430, 200, 640, 427)), "temple": (0, (120, 130, 500, 330)),
    "sky": (0, (0, 0, 640, 100)), "grass": (0, (0, 330, 640, 427)), "dark": (1, (0, 0, 200, 427))}
# Nothing is drawn at random: a crop of all of a square is the square
OPTIONS = ["--warmup-epochs=1", "--lr=0.02", "--aa=none", "--hflip=0", "--crop-scale", "1", "1", "--color-jitter=0", "--mixup=0",
           "--cutmix=0", "--reprob=0", "--drop-path=0", "--dist-eval", "--amp=off", "--device=cpu", "--num_workers=0"]


def write_images(folder):
    """48 training and 24 validation images of 48 to 79 pixels a side, as class folders."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(0).integers
    for name, (which, (left, top, right, bottom)) in CLASSES.items():
        for i in range(12):
            side = int(draw(48, 80))
            x, y = int(draw(left, right - side)), int(draw(top, bottom - side))
            path = folder / ("train" if i < 8 else "val") / name / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photographs[which].crop((x, y, x + side, y + side)).save(path)


def write_weights(model, path):
    """Weights that a formula gives for each tensor, whose length of name and number of dimensions it takes in."""
    with torch.device("meta"):
        shapes = networks.create(model, len(CLASSES), 224)[0].state_dict()
    state = {}
    for name, like in shapes.items():
        i = torch.arange(like.numel(), dtype=torch.float64)
        waves = torch.sin(0.7 * i + 1.3 * len(name) + (0.001 * i * i) % 7)
        scale, base = {1: (0.0, float(name.endswith("weight"))), 2: (0.035, 0.0), 4: (0.06, 0.0)}[like.dim()]
        state[name] = (scale * waves + base).reshape(like.shape).to(like.dtype)
    torch.save({"model": state}, path)


@contextlib.contextmanager
def trainings(runs, folder, threads=1):
    """main.py trains all of `runs` (published/training.json's) at once, each in a process. -> {model: Training}"""
    folder, started = Path(folder), {}
    write_images(folder / "data")
    try:
        for run in runs:
            write_weights(run["model"], folder / f"{run['model']}.pth")
            started[run["model"]] = Training(run, folder, threads)
        yield started
    finally:
        for training in started.values():
            training.process.kill()
            training.process.wait()


def alone():
    """The environment of one process, also where torchrun started this one."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}


class Training:
    def __init__(self, run, folder, threads):
        self.output, self.log = folder / run["model"], folder / f"{run['model']}.txt"
        words = {"model": run["model"], "input-size": run["input_size"], "batch-size": run["batch_size"], "epochs": run["epochs"],
                 "data-path": folder / "data", "finetune": folder / f"{run['model']}.pth", "output_dir": self.output}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([sys.executable, MAIN, *OPTIONS, *(f"--{name}={value}" for name, value in words.items())],
                                            stdout=log, stderr=subprocess.STDOUT, env=alone() | {"OMP_NUM_THREADS": str(threads)})

    def rows(self):
        """Wait for the end. -> the rows of its log.txt. Raises RuntimeError where it failed."""
        if status := self.process.wait():
            last = (self.log.read_text("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"main.py ended with status {status}: {last}")
        return [json.loads(line) for line in (self.output / "log.txt").read_text().splitlines()]
