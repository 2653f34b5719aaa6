"""What the unit tests share: small data sets of real images, and main.py as a user starts it."""
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import devices  # noqa: F401  before torch: it decides what torch may load

# isort: split

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import datasets
import decode
import optim

torch.set_num_threads(1)
CPU = torch.device("cpu")
ELASTIC = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Class folders of photographs' crops, 37 to 70 pixels a side and not square; read it only.

    3 classes; train/ holds 8 images of each, val/ 4, 4 and 3. JPEG and PNG, one of them grey.
    """
    root = tmp_path_factory.mktemp("data set") / "tiny"
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    photographs = {  # class: (photograph, the part that shows it)
        "flower": (flower, (200, 100, 420, 320)), "leaves": (flower, (430, 200, 640, 427)), "temple": (china, (120, 130, 500, 330))}
    rng = np.random.default_rng(0)
    for name, (photograph, (left, top, right, bottom)) in photographs.items():
        for i in range(12 - (name == "temple")):
            width, height = rng.permutation([rng.integers(37, 55), rng.integers(55, 71)])
            x, y = rng.integers(left, right - width), rng.integers(top, bottom - height)
            image = photograph.crop((x, y, x + width, y + height))
            if name == "temple" and i == 3:
                image = image.convert("L")
            folder = root / ("train" if i < 8 else "val") / name
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory):
    """scikit-learn's digits as class folders; read it only."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    datasets.write_digits(folder)
    return folder


def build_optim(model, device=CPU, **settings):
    """optim.build of flat settings: an optimizer's, a course's, and its own."""
    own = {name: settings.pop(name) for name in ("lr", "global_batch", "epochs", "precision", "seed") if name in settings}
    names = {field.name for field in fields(optim.Settings)}
    settings = {f"opt_{name}" if name in ("eps", "betas") else name: value for name, value in settings.items()}
    return optim.build(model, device, optim.Settings(**{name: settings.pop(name) for name in names & settings.keys()}),
                       optim.Course(**settings), **own)


def small_transform(is_train=False, **settings):
    return datasets.build_transform(is_train, input_size=32, **settings)


def read_all(loader):
    """Its batches. Where that fails, its workers end at once: left to the garbage collector they take 5 seconds each."""
    try:
        return list(loader)
    except decode.DataError:
        if loader.num_workers:
            loader._iterator._shutdown_workers()
        raise


def run(command, cwd, env, timeout):
    clean = {key: value for key, value in os.environ.items() if key not in ELASTIC}
    return subprocess.run([str(word) for word in command], cwd=cwd or ROOT, timeout=timeout, capture_output=True, text=True,
                          env={**clean, "OMP_NUM_THREADS": "1", **(env or {})})


@pytest.fixture
def tool(capsys):
    """tool(name, *words) -> status, output, errors of `python tools NAME WORDS`, in this process"""
    def start(*words):
        from tools.__main__ import run
        before = signal.getsignal(signal.SIGTERM)
        capsys.readouterr()
        try:
            status = run([str(word) for word in words])
        except SystemExit as ended:  # argparse's
            status = ended.code
        finally:
            signal.signal(signal.SIGTERM, before)
        return status, *capsys.readouterr()
    return start


@pytest.fixture(scope="session")
def run_tool():
    """run_tool(name, *words, cwd=None, env=None) -> CompletedProcess of `python tools NAME WORDS`"""
    def start(*words, cwd=None, env=None, timeout=300):
        return run([sys.executable, ROOT / "tools", *words], cwd, env, timeout)
    return start


@pytest.fixture(scope="session")
def run_main():
    """run_main(*args, cwd=None, env=None) -> CompletedProcess of `python main.py ARGS` with one thread. Nothing is saved unless asked."""
    def start(*args, cwd=None, env=None, timeout=600):
        return run([sys.executable, ROOT / "main.py", "--output_dir=", *args], cwd, env, timeout)
    return start


@pytest.fixture(scope="session")
def run_ranks():
    """run_ranks(n, *args, cwd=None, env=None) -> as run_main, of `torchrun --standalone --nproc_per_node=n main.py ARGS`."""
    def start(n, *args, cwd=None, env=None, timeout=600):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        return run([*launcher, ROOT / "main.py", "--output_dir=", *args], cwd, env, timeout)
    return start
