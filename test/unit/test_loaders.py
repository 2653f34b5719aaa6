"""Loader workers: what they hold open, what they import, and what is said when one of them dies."""
import os
import re
import signal
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ELASTIC, ROOT
from torch.utils.data import DataLoader, Dataset

import devices
import loaders
from tools import doctor


def test_a_long_window_of_the_log_holds_no_files_open(tiny_folder, tmp_path):
    """24 steps between two lines of the log, 16 files that may yet be opened: names of a batch are numbers, not a worker's memory."""
    program = ("import resource, os, sys\n"
               "import torch.multiprocessing, torch.utils.data\n"
               "class Loader(torch.utils.data.DataLoader):\n"
               "    def __iter__(self):\n"
               "        made = super().__iter__()\n"
               "        used = len(os.listdir('/proc/self/fd'))\n"
               "        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
               "        return made\n"
               "import main, loaders\n"
               "loaders.DataLoader = Loader\n"
               "sys.exit(main.run(sys.argv[1:]))\n")
    env = {key: value for key, value in os.environ.items() if key not in ELASTIC}
    done = subprocess.run([sys.executable, "-c", program, "--device=cpu", "--data-path", tiny_folder, "--input-size=32", "--batch-size=1",
                           "--epochs=1", "--print-freq=1000", "--num_workers=1", "--no-eval", "--aa=none", "--drop-path=0", "--mixup=0",
                           "--cutmix=0", "--model=alt_gvt_small", "--output_dir", tmp_path / "out"],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[23/24]" in done.stdout


# ---- what a forked server has imported ----

PROGRAM = """
import os, sys
from types import SimpleNamespace

sys.path.insert(0, {root!r})


def look(image):
    return [sys.modules[name].__file__ for name in ("datasets", "loaders", "shards", "decode", "transforms", "twins_worker")]


if __name__ == "__main__":
    import datasets, devices, loaders
    method = devices.worker_start_method(SimpleNamespace(type="npu"))
    images, _ = datasets.build_dataset(False, sys.argv[1], transform=look)
    for files, *_ in loaders.build_loader(images, False, 1, 1, start_method=method):
        print(*(file for batch in files for file in batch), sep="\\n")
        break
"""


@pytest.mark.parametrize("inherited", [None, "elsewhere"])
def test_workers_of_a_server_take_our_modules_from_a_foreign_folder(tiny_folder, tmp_path, inherited):
    """Where the working directory holds other modules of the same names, as Hugging Face's `datasets`."""
    foreign = tmp_path / "foreign"
    (foreign / "datasets").mkdir(parents=True)
    (foreign / "datasets" / "__init__.py").write_text("class Dataset: pass\n")
    for name in {path.stem for path in ROOT.glob("*.py")} - {"datasets", "twins_worker"}:
        (foreign / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(root=str(ROOT)))
    env = {key: value for key, value in os.environ.items() if key not in ELASTIC}
    if inherited:  # before what is there: on simulated NPUs torchvision needs that
        env["PYTHONPATH"] = os.pathsep.join([str(foreign), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, program, tiny_folder], cwd=foreign, capture_output=True, text=True, timeout=300, env=env)
    files = [line for line in done.stdout.split("\n") if line.endswith(".py")]
    ours = ("datasets", "loaders", "shards", "decode", "transforms", "twins_worker")
    assert files == [str(ROOT / f"{name}.py") for name in ours], done.stderr


def test_only_workers_of_an_npu_come_from_a_server():
    assert devices.worker_start_method(torch.device("cpu")) is None


# ---- what is said when a worker dies ----

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_is_no_crash(tiny_folder, tmp_path, number):
    """As terminals and schedulers send it: the workers go on for as long as the training needs them."""
    command = [sys.executable, "-u", ROOT / "main.py", "--data-path", tiny_folder, "--device=cpu", "--input-size=32", "--batch-size=2",
               "--num_workers=2", "--epochs=999", "--model=test_convnext", "--print-freq=1", "--no-eval", "--output_dir", tmp_path]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={key: value for key, value in os.environ.items() if key not in ELASTIC})
    next(line for line in process.stdout if line.startswith("Epoch: [0]  [ 2"))
    os.killpg(process.pid, number)
    said, errors = process.communicate(timeout=120)
    assert (errors, process.returncode) == (f"{number.name}: this update is finished and saved; a second signal ends the run at once\n", 75)
    epoch, done = map(int, re.search(r"^Stopped in epoch (\d+) after (\d+) of 12 iterations: ", said, re.M).groups())
    saved = torch.load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["progress"]["updates"]) == (epoch - 1, done)


class Dies(Dataset):
    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), self.how)


@pytest.mark.parametrize("how, words", [
    (signal.SIGBUS, ("shared memory (/dev/shm)", "--shm-size", "--num_workers", "--batch-size")),
    (signal.SIGKILL, ("the system ended a loader worker", "--num_workers"))])
def test_a_worker_that_is_killed_is_told_in_one_line(how, words):
    with pytest.raises(RuntimeError) as caught:
        list(DataLoader(Dies(how), num_workers=1))
    told = devices.explain(caught.value)
    assert isinstance(told, devices.DeviceError)
    assert "\n" not in str(told) and all(word in str(told) for word in words)


@pytest.mark.parametrize("text, words", [
    ("unable to write to file </torch_1_2_3>: No space left on device (28)", "shared memory"),
    ("unable to allocate shared memory(shm) for file </torch_1_2_3>: Success (0)", "shared memory"),
    ("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)", "ulimit -n"),
    ("received 0 items of ancdata", "ulimit -n"), ("[Errno 24] Too many open files", "ulimit -n")])
def test_what_torch_says_of_shared_memory_and_open_files(text, words):
    told = str(devices.explain(RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\nTraceback\nRuntimeError: {text}")))
    assert words in told and "\n" not in told


def test_other_errors_stay_themselves():
    error = RuntimeError("something else")
    error.__cause__ = ValueError("its reason")
    assert devices.explain(error) is error


@pytest.mark.parametrize("count, words", [(0, "0.0 MB"), (9_633_792, "9.6 MB"), (999_000_000, "999.0 MB"), (25_300_000_000, "25.3 GB")])
def test_doctors_units_fit(count, words):
    assert doctor.size(count) == words


def test_doctor_says_how_much_a_small_shared_memory_has(monkeypatch):
    """64 MB, as docker gives it."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=63_900_000 if path == "/dev/shm" else 10**12))
    monkeypatch.setattr(doctor.os.path, "isdir", lambda path: True)
    args = SimpleNamespace(num_workers=8, batch_size=128, device="cpu", output_dir="", compile=False)
    [row] = [row for row in doctor.check_machine(args, 1) if row[1] == "shared memory"]
    assert row[0] == "fail"
    assert "63.9 MB free; 2 batches of each of 8 workers take 1.2 GB a card, of 1" in " ".join(row)
    assert "--shm-size" in " ".join(row)


def test_a_folder_for_temporary_files_that_sockets_cannot_lie_in(run_main, tiny_folder, tmp_path):
    """Workers would lose each batch, and the training wait for ever. Without workers no socket is needed."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    words = ["--device=cpu", f"--data-path={tiny_folder}", "--input-size=32", "--batch-size=8", "--epochs=1", "--max_step=1", "--no-eval"]
    done = run_main(*words, "--num_workers=1", cwd=tmp_path, env={"TMPDIR": str(folder)}, timeout=120)
    assert done.returncode == 2
    assert done.stderr == (f"error: TMPDIR is {folder}, too long a path for the sockets of loader workers: set it to one of at most 71 "
                           "characters, such as /tmp, or --num_workers 0\n")
    assert run_main(*words, "--num_workers=0", cwd=tmp_path, env={"TMPDIR": str(folder)}, timeout=120).returncode == 0


def test_a_folder_for_temporary_files_of_the_longest_name_serves():
    """What is not refused works."""
    here = tempfile.mkdtemp(dir="/tmp")
    folder = os.path.join(here, "x" * (loaders.check_sockets.__defaults__[0] - len(here) - 1))
    os.mkdir(folder)
    code = ("import sys, torch\nsys.path.insert(0, sys.argv[1])\nimport loaders\n"
            "print(len([*loaders.build_loader(torch.utils.data.TensorDataset(torch.zeros(4, 3)), False, 2, 1)]))")
    try:
        done = subprocess.run([sys.executable, "-c", code, ROOT], env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True,
                              timeout=120)
    finally:
        os.rmdir(folder)
        os.rmdir(here)
    assert done.stdout == "2\n", done.stderr
