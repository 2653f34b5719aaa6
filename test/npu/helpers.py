"""What the tests of training share: a tiny data set, main.py as a user starts it, and what each of its steps costs.

    torchrun --nproc_per_node=2 helpers.py COUNTS.json OPTIONS...   # main.py; COUNTS.json.R: rank R's counts, step by step
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import devices  # noqa: F401  before torch: it decides what torch may load

# isort: split

import numpy as np
import pytest
import torch
from PIL import Image
from programs import RUN, run_program

import losses
import main

SIMULATED = "NPU_SIM" in os.environ
CPU, NPU = torch.device("cpu"), torch.device("npu", 0) if hasattr(torch, "npu") else None  # None: all is skipped
# Equal numbers: the simulated NPU has the CPU's kernels, a real one its own.
SAME = 1e-4 if SIMULATED else 2e-2
SMALL = "--model=test_convnext"
# No randomness after the weights are drawn, and the rate asked for from the first epoch on.
PLAIN = ["--aa=none", "--mixup=0", "--cutmix=0", "--smoothing=0", "--reprob=0", "--drop-path=0", "--hflip=0", "--color-jitter=0",
         "--crop-scale", "1", "1", "--sched-lag=0", "--warmup-epochs=0"]
CLASSES, TRAIN_IMAGES, VAL_IMAGES = 10, 320, 30
ELASTIC = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def write_images(folder, classes=CLASSES, train=TRAIN_IMAGES, val=VAL_IMAGES):
    """Class folders of noise with a tint of the class: learnable, and not in a few steps."""
    rng = np.random.default_rng(0)
    tints = rng.integers(0, 40, (classes, 3))
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = folder / split / f"class{i % classes}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((rng.integers(0, 200, (32, 32, 3)) + tints[i % classes]).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """10 classes, 320 images to train and 30 to validate; read it only."""
    return write_images(tmp_path_factory.mktemp("images") / "da ta")


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """The repository's own code and scripts, so that its test/output stays as it is."""
    copy = tmp_path_factory.mktemp("scripts") / "re po"
    (copy / "test").mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, copy)
    for path in [*(ROOT / "test").glob("*.sh"), *(ROOT / "test").glob("*.txt")]:
        shutil.copy(path, copy / "test")
    yield copy
    shutil.rmtree(copy)  # with the checkpoints of all runs


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """3 classes, 12 images to train and 6 to validate; read it only."""
    return write_images(tmp_path_factory.mktemp("few") / "images", 3, 12, 6)


# ---- main.py in a process of its own ----

def host(npus=None, soc=None, counts=None):
    """The words before a command that make the host it runs on; without any, the host of these tests.

    npus: how many a simulated host has; soc: of which kind; counts: where their counts go.
    """
    if not SIMULATED:
        if npus is not None or soc is not None:
            pytest.skip(f"needs a host with {'another number of' if soc is None else soc} NPUs: simulated ones only")
        return []
    words = [RUN, "-n", os.environ["NPU_SIM"] if npus is None else npus, "--soc", soc or os.environ["NPU_SIM_SOC"]]
    return [*words, "--counts", counts] if counts else words


def clean(env):
    """`env` for a program that starts anew, whatever ran in this process before."""
    return {**dict.fromkeys((*ELASTIC, "TORCH_DEVICE_BACKEND_AUTOLOAD", "NPU_SIM_COUNTS")), **env}


def needs(ranks):
    if torch.npu.device_count() < ranks:
        pytest.skip(f"needs {ranks} NPUs, and {torch.npu.device_count()} are here")


def start(*words, ranks=None, on=None, program="main.py", **env):
    """-> CompletedProcess of main.py, under torchrun where `ranks` says of how many"""
    if ranks and on is None:
        needs(ranks)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return run_program(*(host() if on is None else on), sys.executable, *launcher, ROOT / program, *words, **clean(env))


def works(*words, **how):
    done = start(*words, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def run_script(repo, name, *options, on=None, **env):
    """-> CompletedProcess of test/train_NAME.sh, with this Python first on PATH"""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return run_program(*(host() if on is None else on), shutil.which("bash"), repo / "test" / f"train_{name}.sh", *options,
                       **clean({"PATH": path, **env}))


def counted_by(path):
    """What each process that used an NPU left in the files of --counts, by rank."""
    found = [json.loads(file.read_text()) for file in sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))]
    return sorted(found, key=lambda counts: counts["rank"])


# ---- main.py in this process, which saves the imports ----

def use_first_npu():
    """Autograd aborts in a process that left a device before it used it, so all are used: torch_npu made no stream there."""
    for i in range(torch.npu.device_count()):
        torch.ones(1, device=f"npu:{i}")
    torch.npu.set_device(0)


def run(*words, program=main.run):
    """-> status, out, err of main.run, or of what calls it; what it changes in this process is put back"""
    out, err, handler, env = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM), dict(os.environ)
    hf32 = torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32
    use_first_npu()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = program([str(word) for word in words])
        except SystemExit as stop:  # the parser's
            status = stop.code
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear(), os.environ.update(env)
    torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = hf32
    use_first_npu()
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def trains(*words):
    done = run(*words)
    assert done.status == 0, done.out + done.err
    return done


def usual(folder, *words):
    """The options of a small, quick, repeatable run."""
    return [SMALL, "--data-path", str(folder), "--input-size=32", "--num_workers=0", "--batch-size=8", "--amp=off", "--fp32",
            "--lr=0.03", "--output_dir=", *PLAIN, *words]


# ---- what a run leaves ----

def one_error(text):
    """The one `error:` line of what main.py wrote; torchrun's own report follows it."""
    text = text.partition("failed (exitcode")[0]
    lines = [line for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in text, text
    return lines[0]


def losses_of(text):
    """The loss of each log line: with --print-freq 1, of each step."""
    return [float(loss) for loss in re.findall(r"^Epoch: .* loss: (\S+) ", text, re.MULTILINE)]


def evaluation(text):
    """The last line of an evaluation."""
    return re.findall(r"^\* Acc@1 .*$", text, re.MULTILINE)[-1]


def setting(text, name):
    """A line of the recipe that main.py prints."""
    return re.search(rf"^  {name} +(.*)$", text, re.MULTILINE)[1]


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def load(path):
    """As any machine reads it: no map_location, so a tensor of another device would not load on it."""
    return torch.load(path, weights_only=True)


def tensors(value):
    """All tensors in a nested value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


def distance(a, b):
    """The largest difference between two state dicts of the same keys."""
    assert a.keys() == b.keys()
    return max((a[key].double().cpu() - b[key].double().cpu()).abs().max().item() for key in a)


# ---- what a step costs ----

def counting(argv):
    """main.run. -> status, [counts from one step's loss to the next one's]"""
    import npu_sim

    steps, forward = [], losses.DistillationLoss.forward

    def count(self, *given):
        steps.append(npu_sim.counts())
        npu_sim.reset()
        return forward(self, *given)

    losses.DistillationLoss.forward = count
    try:
        return main.run(argv), steps
    finally:
        losses.DistillationLoss.forward = forward


def between_lines(steps):
    """Of 12 steps those without a log line: --print-freq 100 shows the first, the fifth and the last. By then optimizers
    have made their buffers, also where a loss scaler skipped the first updates."""
    assert len(steps) == 12
    return steps[6:]  # steps[i]: from the loss of step i - 1 to that of step i


def write_package(folder, files):
    """A package for PYTHONPATH, from {path: text}."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def python_path(folder):
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    status, steps = counting(sys.argv[2:])
    Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(steps))
    sys.exit(status)
