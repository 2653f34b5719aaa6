"""Runs that are killed at random, meet in one folder, or go on for very long: is anything lost, torn, different, or growing? See run.sh."""
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from conftest import ELASTIC, ROOT  # it finds main.py, too

# isort: split

import numpy as np
from PIL import Image
from test_exact import RECIPE, assert_same, left, train
from test_watchdog import alive, children, wait_for

import checkpoint


def write_images(folder):
    """3 classes, 8 images each to train with and 3 to validate."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 8), ("val", 3)):
        for i in range(3 * images):
            path = folder / split / f"class{i % 3}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return folder


def start(folder, data, ranks, log, *words):
    """A run of the default recipe, which saves after each update."""
    more = ["--dist-eval", "--batch-size=2"] if ranks > 1 else []
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if ranks > 1 else []
    command = [sys.executable, "-u", *launcher, ROOT / "main.py", *RECIPE, *more, "--data-path", data, "--output_dir", folder,
               "--resume=auto", "--ckpt-steps=1", "--print-freq=1", *words]
    env = {key: value for key, value in os.environ.items() if key not in ELASTIC} | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        return subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=env)


def wait_until_it_trains(log, process):
    try:
        wait_for(lambda: "Epoch: [0]  [0" in log.read_text(), process, seconds=600)
    except AssertionError:
        raise AssertionError(f"it does not train, status {process.poll()}: {log.read_text()[-2000:]}") from None


def finish(folder, data, ranks, log):
    if ranks == 1:
        train(folder, "--data-path", data, "--resume=auto")
        return
    status = start(folder, data, ranks, log).wait()
    assert status == 0, Path(log).read_text()[-2000:]


def stage(folder):
    """Of the last checkpoint on the disk: (epoch, updates), None before there is one. Raises ValueError for a torn one."""
    with contextlib.suppress(checkpoint.NoCheckpoint):
        path = folder / checkpoint.LAST
        if path.exists():
            saved = checkpoint.read(path)
            return saved["epoch"], saved["progress"]["updates"]
    return None


def kill(process, folder, ranks, seconds, in_save, rng):
    """Kill the run when it trains: after some of `seconds`, or in the middle of one of its next saves. -> (who, a save was half-written)"""
    saves = rng.randrange(1, 8)
    if in_save:
        seen = None
        while saves and process.poll() is None:
            found = next(folder.glob(".checkpoint*.tmp"), None) if folder.is_dir() else None
            saves, seen = saves - (found is not None and seen is None), found
    else:
        time.sleep(rng.random() * 0.7 * seconds)
    victims = {"run": process.pid} if ranks == 1 else {"torchrun": process.pid, **{
        f"rank {i}": pid for i, pid in enumerate(children(process.pid))}}
    family = {process.pid, *children(process.pid)}
    who = rng.choice(list(victims)) if ranks > 1 else "run"
    with contextlib.suppress(ProcessLookupError):
        os.kill(victims[who], 9)
    torn = any(folder.glob(".checkpoint*.tmp"))
    process.wait()
    wait_for(lambda: not alive() & family, seconds=60)
    return who, torn


def kills(count, root):
    rng, data = random.Random(0), write_images(root / "data")
    whole, seconds = {}, {}
    for ranks in (1, 2)[:1 + (count > 2)]:
        process = start(root / f"whole{ranks}", data, ranks, root / "log")
        wait_until_it_trains(root / "log", process)
        began = time.monotonic()
        assert process.wait() == 0, (root / "log").read_text()
        whole[ranks], seconds[ranks] = left(root / f"whole{ranks}"), time.monotonic() - began
    found = dict.fromkeys(("lost", "torn", "different", "killed", "inside a save", "two ranks"), 0)
    for trial in range(count):
        ranks, folder, log = 2 if trial % 3 == 2 else 1, root / f"run{trial}", root / f"log{trial}"
        process = start(folder, data, ranks, log)
        wait_until_it_trains(log, process)
        before = stage(folder)
        who, half = kill(process, folder, ranks, seconds[ranks], trial % 3 == 1, rng)
        found["killed"] += "Training time" not in log.read_text()
        found["inside a save"] += half
        found["two ranks"] += ranks == 2
        at = None
        try:
            at = stage(folder)
        except ValueError:
            found["torn"] += 1
        found["lost"] += before is not None and (at is None or at < before)
        finish(folder, data, ranks, log)
        try:
            assert_same(left(folder), whole[ranks])
        except AssertionError as error:
            found["different"] += 1
            print(error, file=sys.stderr)
        print(f"run {trial}: {who} killed{' inside a save' if half else ''}, went on from epoch and updates {at}", flush=True)
    print(f"{count} runs: " + ", ".join(f"{number} {name}" for name, number in found.items()))
    return found["lost"] + found["torn"] + found["different"]


def meet(count, root):
    data, damaged = write_images(root / "data"), 0
    for trial in range(count):
        folder, logs = root / f"run{trial}", [root / f"log{trial}.{i}" for i in range(2)]
        runs = [start(folder, data, 1, log) for log in logs]
        statuses = sorted(run.wait() for run in runs)
        said = "".join(log.read_text() for log in logs)
        try:
            good = statuses == [0, 2] and stage(folder) == (1, 0) and said.count("is in use by another run") == 1
        except ValueError:
            good = False
        damaged += not good
        print(f"pair {trial}: statuses {statuses}{'' if good else ': ' + said[-2000:]}", flush=True)
    print(f"{count} pairs: {damaged} damaged")
    return damaged


def held(pid):
    """-> MB of memory that is no file, and open files; of pages that forked workers share each is counted"""
    told = dict(line.split()[:2] for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(told["Anonymous:"]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def epochs(count, root):
    """A run of `count` epochs with two workers. What it holds is read after each, by a process that only looks on."""
    data, folder, found = write_images(root / "data"), root / "run", []
    words = [f"--epochs={count}", "--num_workers=2", "--model-ema-decay=0.9", "--ckpt-steps=0"]
    process = start(folder, data, 1, root / "log", *words)
    rows = folder / "log.txt"
    while process.poll() is None:
        done = len(rows.read_text().splitlines()) if rows.exists() else 0
        if done > len(found):
            with contextlib.suppress(OSError):  # a worker has just ended: the next look will do
                found += [held(process.pid)] * (done - len(found))
        time.sleep(0.02)
    assert process.returncode == 0, (root / "log").read_text()[-2000:]
    memory, files = np.array(found[10:]).T
    epoch = np.arange(len(memory))
    slope, errors = np.polyfit(epoch, memory, 1, cov=True)
    print(f"{count} epochs: after the tenth {memory[0]:.1f} MB, at the end {memory[-1]:.1f} MB: {1000 * slope[0]:+.2f} kB an epoch "
          f"(standard error {1000 * errors[0, 0] ** 0.5:.2f}); {files[0]:.0f} open files, at the end {files[-1]:.0f}, "
          f"{np.polyfit(epoch, files, 1)[0]:+.4f} an epoch")
    return files[-1] > files[0] + 2 or slope[0] * count > 0.05 * memory[0]


if __name__ == "__main__":
    what, usual = {"kills": (kills, 6), "folder": (meet, 3), "epochs": (epochs, 300)}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(bool(what(int(sys.argv[2]) if len(sys.argv) > 2 else usual, Path(temporary))))
