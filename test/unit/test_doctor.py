"""The doctor through its command line: on data sets with known faults, and in environments made of stub packages."""
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import datasets
from tools import doctor
from tools.data import write_shards

TORCH = importlib.metadata.version("torch").partition("+")[0]
CPU_TORCH = "pip install torch==2.13.0 torchvision==0.28.0 --index-url <PyTorch's CPU index>"
AUTOLOAD = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
ABORTS = """
import os
os.write(2, b"terminate called after throwing an instance of 'c10::Error'\\n  what():  duplicate allocator key\\nframe #0\\n")
os.abort()
"""
NO_CANN = """
try:
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")
except ImportError as error:
    raise RuntimeError("Failed to load the backend extension: torch_npu.") from error
"""

LOADER_ERROR = """
class UnreadableImage(ValueError): pass
raise UnreadableImage('''Caught UnreadableImage in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "x.py", line 1, in y
decode.UnreadableImage: cannot read the image /a: b.png (why): replace it
''')
"""


@pytest.fixture
def run(tmp_path):
    """run(*args, **variables) -> {name: [(level, text)]}, in a clean environment. Sees to the form of the lines and the exit status."""
    def start(*args, **variables):
        dropped = ("ASCEND", "HCCL", "CUDA_", "MASTER_", "PYTHON", "TORCH_", "LD_LIBRARY", "RANK", "WORLD_SIZE", "LOCAL_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        env |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in variables.items()}}
        done = subprocess.run([sys.executable, str(ROOT / "tools"), "doctor", *map(str, args)], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=300)
        assert not done.stderr
        found = {}
        for line in done.stdout.splitlines():
            level, name, text = re.fullmatch(r"(ok  |warn|fail)  (\S.*?): (\S.*)", line).groups()
            assert level == "ok  " or " - " in text or ": " in text, line  # the remedy
            found.setdefault(name, []).append((level.strip(), text))
        assert done.returncode == int(any(level == "fail" for rows in found.values() for level, _ in rows)), done.stdout
        return found
    return start


@pytest.fixture
def package(tmp_path):
    """package(name, number, code, version, entry_points) writes a stub package into a folder for PYTHONPATH. -> the folder

    code: its __init__.py; version: its version.py.
    """
    site = tmp_path / "site"

    def write(name, number, code=None, version=None, entry_points=None):
        info = site / f"{name}-{number.partition('+')[0]}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (info / "entry_points.txt").write_text(entry_points or "")
        if code is not None:
            (site / name).mkdir()
            (site / name / "__init__.py").write_text(code)
            (site / name / "version.py").write_text(version or "")
        return site
    return write


@pytest.fixture
def no_torch(package):
    """A folder for PYTHONPATH whose torch ends the process: whoever still answers did not import it."""
    return package("torch", "2.13.0+cpu", ABORTS, version="cuda: Optional[str] = None\n")


def levels(found):
    return {level for rows in found.values() for level, _ in rows}


# ---- data ----

def test_good_folder(run, tiny_folder):
    found = run("--device", "cpu", "--data-path", tiny_folder, "--batch-size", 2, "--num_workers", 1)
    [(level, step)] = found["step"]
    assert level == "ok" and 6 < float(re.search(r"loss ([\d.]+)", step)[1]) < 8  # ln(1000) = 6.9
    assert found["device"] == [("ok", "--device cpu is cpu (1 threads)")]
    assert found["classes"] == [("ok", "3, the same in train and val")]
    assert found["train decode"] == [("ok", "24 of 24 images looked at are readable, of 24")]
    assert found["val decode"] == [("ok", "11 of 11 images looked at are readable, of 11")]
    assert found["same file twice"] == [("ok", "none of 11 validation images looked at is a training image")]
    rates = []
    for name, how in ("loader", "(--num_workers 1, "), ("device", "(cpu, fp32, batch 2)"):
        [(level, text)] = found[f"{name} speed"]
        assert level == "ok" and how in text
        rates.append(float(re.match(r"(\S+) images/s ", text)[1]))
    assert rates[0] > 0
    assert ("speed" in found) == (rates[0] < rates[1])
    assert "image" not in found and "fail" not in levels(found)


def test_folder_with_every_fault(run, tiny_folder, tmp_path):
    data = tmp_path / "da ta"
    shutil.copytree(tiny_folder, data)
    whole = data / "train" / "temple" / "00.jpg"
    cut = data / "train" / "temple" / "02.jpg"
    cut.write_bytes(cut.read_bytes()[:len(cut.read_bytes()) // 2])
    text = data / "val" / "flower" / "text.png"
    text.write_text("no image either")
    shutil.copy(whole, data / "val" / "temple" / "copy.jpg")
    found = run("--device", "cuda", "--data-path", data, "--full", CUDA_VISIBLE_DEVICES="-1")
    images = found["image"]
    assert len(images) == 2 and all(level == "fail" and message.endswith(": replace it or remove it") for level, message in images)
    assert f"cannot read the image {cut} (image file is truncated" in images[0][1]
    assert f"cannot read the image {text} (no image of a known format" in images[1][1]
    assert found["train decode"] == [("fail", "23 of 24 images looked at are readable, of 24 - replace or remove the others")]
    assert found["val decode"] == [("fail", "12 of 13 images looked at are readable, of 13 - replace or remove the others")]
    [(level, text)] = found["same file twice"]
    assert level == "warn" and text.startswith("1 of 13 validation images looked at are training images too: "
                                               f"{data}/val/temple/copy.jpg is {whole} - ")
    assert "loader speed" not in found
    [(level, text)] = found["device"]
    assert level == "fail" and "no cuda device is visible: look at `nvidia-smi`" in text
    assert found["CUDA_VISIBLE_DEVICES"] == [("warn", "'-1' hides every device - unset CUDA_VISIBLE_DEVICES")]


def test_class_folders_that_differ(tiny_folder, tmp_path):
    """Errors of datasets.py stand as they are, and nothing more is looked at."""
    data = tmp_path / "data"
    shutil.copytree(tiny_folder, data)
    words = ["--data-path", str(data), "--device", "cpu"]
    shutil.move(data / "val" / "leaves", data / "val" / "oak")
    assert list(doctor.child(words, "data")) == [
        ("fail", "data", f"--data-path {data}: train/ has 3 classes and val/ 3, and they differ: only in train ['leaves'], only in val "
                         "['oak']: make the folders agree")]
    for path in (data / "val" / "oak").iterdir():
        path.unlink()
    [(level, name, text)] = doctor.child(words, "data")
    assert (level, name) == ("fail", "data") and "no image in the class folders oak" in text and text.endswith("at least one image")


def test_shards_while_torch_npu_ends_the_process(run, package, tiny_folder, tmp_path):
    """The data is looked at all the same: for that torch_npu is not loaded."""
    site = package("torch_npu", TORCH, ABORTS, entry_points=AUTOLOAD)
    write_shards(tiny_folder, tmp_path / "shards", maxcount=10)
    for split, part in (("train", "image"), ("val", "header")):
        place = int(np.load(tmp_path / "shards" / split / "index.npy")["image"][0])
        with open(tmp_path / "shards" / split / "000000.tar", "r+b") as shard:
            shard.seek(place + (512 if part == "image" else 0))
            shard.write(b"no image")
    found = run("--data-path", tmp_path / "shards", "--full", PYTHONPATH=site)
    [(level, text)] = found["import torch"]
    assert level == "fail" and text.startswith("the process died (SIGABRT): duplicate allocator key - torch must be CPU-only and ")
    assert found["train decode"] == [("fail", "23 of 24 images looked at are readable, of 24 - replace or remove the others")]
    (_, image), (level, shard) = found["image"]
    assert f"cannot read the image {tmp_path}/shards/train/000000.tar/000000" in image
    assert level == "fail" and f"cannot read the shard {tmp_path}/shards/val/000000.tar (the header at byte " in shard
    assert found["val decode"] == [("fail", "10 of 11 images looked at are readable, of 11 - replace or remove the others")]


@pytest.mark.parametrize("full", [False, True])
def test_sample_of_the_images(tiny_folder, tmp_path, full):
    args = doctor.argparse.Namespace(images=5, full=full)
    train, val, _ = datasets.build_datasets(tiny_folder, "IMNET", None, None)
    assert doctor.look_at(train, 3, args) == (24 if full else 5, [])
    count, wrong = doctor.look_at(train, 2, doctor.argparse.Namespace(full=True, images=1))
    assert count == 24 and len(wrong) == 8 and wrong[0].endswith("temple/00.jpg has the label 2, of 2 classes: write it again")
    assert doctor.same_files(train.names, val.names, args) == (11 if full else 5, [])
    assert doctor.same_files(train.names, [*val.names, train.names[3]], doctor.argparse.Namespace(full=True)) == (
        12, [(train.names[3], train.names[3])])
    write_shards(tiny_folder, tmp_path, maxcount=10)
    shards, _ = datasets.build_dataset(True, tmp_path)
    assert doctor.look_at(shards, 3, args) == (24 if full else 5, [])
    broken = Path(shards.shards[1])
    broken.write_bytes(b"no tar")
    count, texts = doctor.look_at(shards, 3, args)
    looked = [i for i in doctor.sample(24, args) if 8 <= i < 16]
    assert count == (24 if full else 5) and len(texts) == len(looked) > 0
    assert all(f"cannot read the shard {broken} (" in text for text in texts)


def test_no_data(run, no_torch, tmp_path):
    found = run("--device", "cpu", "--data-path", tmp_path / "nowhere", PYTHONPATH=no_torch)
    assert found["import torch"][0][0] == found["data"][0][0] == "fail"


def test_python_without_docstrings_and_a_user_without_a_home():
    """python -OO, and a container's user whom /etc/passwd does not know: Path.home() has no answer there."""
    environment = {key: value for key, value in os.environ.items() if key != "HOME"} | {"PYTHONOPTIMIZE": "2"}
    code = ("import pwd, sys\ndef getpwuid(_):\n    raise KeyError\npwd.getpwuid = getpwuid\nimport inaturalist\nfrom tools import doctor\n"
            "doctor.installed = lambda name: '2.13.0'\n"
            "print(len([*doctor.check_torch_npu(doctor.argparse.Namespace(device='npu'))]))\n"
            "try:\n    [*inaturalist.rows('x', [{}], {'id': inaturalist.whole})]\nexcept ValueError as error:\n    print(error)\n"
            "doctor.main(['--images', '0'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "--images is 0, and must be at least 1" in done.stderr
    assert done.stdout.splitlines()[0] == "2" and done.stdout.splitlines()[1].endswith("has no id that is a whole number")


# ---- environments ----

def test_torch_npu_without_cann(run, package, tmp_path):
    """torch itself loads a torch_npu that does not find CANN's libraries."""
    site = package("torch_npu", TORCH, NO_CANN.split("except")[0].replace("try:\n    ", ""),
                   entry_points=AUTOLOAD)
    found = run("--device", "npu", PYTHONPATH=site, ASCEND_HOME_PATH=tmp_path / "nowhere")
    [(level, text)] = found["import torch"]
    assert level == "fail" and text.startswith("torch_npu finds no CANN: source /usr/local/Ascend/ascend-toolkit/set_env.sh")
    if not Path("/usr/local/Ascend").exists():
        assert found["CANN"] == [("fail", "not installed: no set_env.sh in /usr/local/Ascend or ~/Ascend - install it, or train with "
                                          "--device cpu")]
    assert found["HCCL"] == [("warn", "HCCL_CONNECT_TIMEOUT is not set, and ranks wait only 120 s for each other - "
                                      "source test/env_npu.sh")]


def test_torch_npu_that_sees_no_npu(run, package):
    """As main.py, the doctor goes on without torch_npu."""
    found = run(PYTHONPATH=package("torch_npu", TORCH, "def _autoload(): pass", entry_points=AUTOLOAD), CUDA_VISIBLE_DEVICES="-1")
    assert found["import torch"][0][0] == "ok" and "torch_npu" not in found["import torch"][0][1]
    assert found["npu devices"] == [("warn", "torch_npu is installed, but no NPU is visible - look at `npu-smi info` and "
                                             "ASCEND_RT_VISIBLE_DEVICES")]
    assert found["device"] == [("ok", "--device auto is cpu (1 threads)")]
    assert found["precision"] == [("ok", "--amp auto is fp32; bf16 is native")]
    assert found["step"][0][0] == "ok"


@pytest.mark.parametrize(("torch", "cuda", "torch_npu", "device", "level", "text"), [
    ("2.13.0+cpu", None, "2.13.0.post3", "npu", "ok", "2.13.0.post3, the same as torch"),
    ("2.14.1", None, "2.13.0", "npu", "fail", f"2.13.0 beside torch 2.14.1: the versions must be the same - {CPU_TORCH}"),
    ("2.14.1", None, "2.13.0", "auto", "fail", f"2.13.0 beside torch 2.14.1: the versions must be the same - {CPU_TORCH}"),
    ("2.14.1", None, "2.13.0", "cpu", "warn", f"2.13.0 beside torch 2.14.1: the versions must be the same - {CPU_TORCH}"),
    ("2.13.0", "13.0", "2.13.0", "npu", "fail", "2.13.0 beside a torch for CUDA 13.0: together they end every process - "
     f"{CPU_TORCH}, or train with --device cuda or cpu"),
])  # fmt: skip
def test_torch_beside_torch_npu(run, package, torch, cuda, torch_npu, device, level, text):
    package("torch", torch, ABORTS, version=f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n")
    found = run("--device", device, PYTHONPATH=package("torch_npu", torch_npu))
    assert found["torch_npu"] == [(level, text)]
    assert found["torch"] == [("ok", f"{torch}, for CUDA {cuda}" if cuda else f"{torch}, CPU-only")]
    [(level, text)] = found["import torch"]
    assert level == "fail" and "the process died (SIGABRT): duplicate allocator key - torch must be CPU-only and 2.13.0" in text
    assert {"port", "shared memory", "disk"} <= set(found)  # the doctor survived


def test_torch_npu_is_missing(run, no_torch):
    found = run("--device", "npu:1", PYTHONPATH=no_torch)
    if importlib.util.find_spec("torch_npu") is None:
        assert found["torch_npu"] == [("fail", f"not installed - {CPU_TORCH}, then pip install torch_npu==2.13.0, "
                                       "or a .post of it for this CANN")]


@pytest.mark.parametrize(("torch_npu", "file", "content", "level", "text"), [
    ("2.7.1.post8", "x86_64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=9.1.0\narch=x86_64\n",
     "ok", "9.1.0 in {home}, sourced"),
    ("2.7.1", "x86_64-linux/ascend_toolkit_install.info", "version=8.3.RC1\n", "ok", "8.3.RC1 in {home}, sourced"),
    ("2.9.0.post1", "version.cfg", "# version: 1.0\nruntime_running_version=[7.5.0.5.220:8.5.0]\n", "ok", "8.5.0 in {home}, sourced"),
    ("2.10.0.post4", "version.cfg", "# version: 1.0\nruntime_running_version=[7.5.0.5.220:8.1.RC1]\n",
     "warn", "8.1.RC1, but torch_npu 2.10.0.post4 was published for 9.1 - if something fails, install CANN 9.1 or this CANN's torch_npu"),
    ("2.13.0", "ascend_toolkit_install.info", "version=9.2.0\n", "ok", "9.2.0 in {home}, sourced"),
    ("2.7.1.post11", "version.cfg", "runtime_running_version=[7.5.0.5.220:9.1.0]\n",
     "warn", "9.1.0, but torch_npu 2.7.1.post11 was published for 9.2 - if something fails, install CANN 9.2 or this CANN's torch_npu"),
    ("2.99.0", "version.cfg", "runtime_running_version=[7.5.0.5.220:9.1.0]\n",
     "ok", "9.1.0 in {home}, sourced (no published pair for torch_npu 2.99.0 is known)"),
])  # fmt: skip
def test_cann(run, package, no_torch, tmp_path, torch_npu, file, content, level, text):
    home = tmp_path / "Ascend" / "ascend-toolkit" / "latest"
    (home / file).parent.mkdir(parents=True)
    (home / file).write_text(content)
    (home / "lib64").mkdir()
    (home / "lib64" / "libhccl.so").touch()
    (home.parent / "set_env.sh").touch()
    package("torch_npu", torch_npu)
    sourced = run(PYTHONPATH=no_torch, ASCEND_HOME_PATH=home, LD_LIBRARY_PATH=home / "lib64")
    assert sourced["CANN"] == [(level, text.format(home=home))]
    if torch_npu == "2.13.0" and not Path("/usr/local/Ascend").exists():
        [(level, text)] = run(PYTHONPATH=no_torch)["CANN"]
        assert (level, text) == ("fail", f"not sourced: LD_LIBRARY_PATH has no libhccl.so - source {home.parent}/set_env.sh, or train "
                                         "with --device cpu")


def test_old_and_missing_packages(run, package, no_torch):
    package("timm", "1.0.20")
    package("torchvision", "1.3.0")
    found = run(PYTHONPATH=no_torch)
    assert found["timm"] == [("fail", '1.0.20 is too old - pip install "timm>=1.0.31,<2" torch==2.13.0')]
    assert found["torchvision"][0][0] == "warn" and found["torchvision"][0][1].startswith("1.3.0 is newer than what was tried - ")
    assert found["numpy"] == [("ok", importlib.metadata.version("numpy"))]


def test_port_in_use(run, no_torch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        [(level, text)] = run(PYTHONPATH=no_torch, MASTER_PORT=port)["port"]
        assert level == "fail" and text.startswith(f"{port} cannot be used (Address already in use) - export another MASTER_PORT")
    assert run(PYTHONPATH=no_torch, MASTER_PORT=port)["port"] == [("ok", f"{port} is free")]


def test_machine(run, no_torch, tmp_path):
    """Full disks, and variables that are wrong."""
    (no_torch / "sitecustomize.py").write_text("""
import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(240_000_000)
""")
    found = run("--num_workers", 5, "--batch-size", 30, "--output_dir", "out/put", PYTHONPATH=no_torch, HCCL_EXEC_TIMEOUT="soon",
                ASCEND_RT_VISIBLE_DEVICES="", CUDA_VISIBLE_DEVICES="2,3")
    assert found["disk"] == [("fail", f"240.0 MB free in {tmp_path}; checkpoints (last, best, one being written) take 3 x 288.7 MB - "
                                      "choose another --output_dir, or make room")]
    assert found["HCCL"] == [("warn", "HCCL_EXEC_TIMEOUT=soon: a limit is a number of seconds - unset HCCL_EXEC_TIMEOUT")]
    assert found["ASCEND_RT_VISIBLE_DEVICES"] == [("warn", "'' hides every device - unset ASCEND_RT_VISIBLE_DEVICES")]
    assert found["CUDA_VISIBLE_DEVICES"] == [("ok", "2,3")]
    if Path("/dev/shm").is_dir():  # 5 x 2 x 30 x 602,112 bytes = 181 MB
        assert found["shared memory"][0][1].startswith("240.0 MB free; 2 batches of each of 5 workers take 180.6 MB a card, of ")
    found = run("--num_workers", 5, "--batch-size", 50, PYTHONPATH=no_torch)
    if Path("/dev/shm").is_dir():
        [(level, text)] = found["shared memory"]
        assert level == "fail" and "5 workers take 301.1 MB a card" in text and "docker run --shm-size" in text


@pytest.mark.parametrize(("option", "text"), [
    ("--batch-size=0", "--batch-size is 0, and must be at least 1"), ("--num_workers=-1", "--num-workers is -1, and must be at least 0"),
    ("--images=0", "--images is 0, and must be at least 1")])
def test_numbers_that_main_refuses(option, text, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main([option])
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"error: {text}\n")


@pytest.mark.parametrize(("code", "text"), [
    ("import time; time.sleep(100)", "no answer in 1 s - look for other work on the device (npu-smi info, nvidia-smi) or a slow disk"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGBUS)", "the process died (SIGBUS): it said nothing - shared memory is full: "
     "docker run --shm-size=32g, or fewer --num_workers"),
    ("raise ImportError('libfoo.so is missing')", "torch does not load (libfoo.so is missing): pip install -r requirements.txt"),
    (NO_CANN, "torch_npu finds no CANN: source /usr/local/Ascend/"),
    (LOADER_ERROR, "cannot read the image /a: b.png (why): replace it"),
    ("class DeviceError(Exception): pass\nraise DeviceError('out of memory: smaller')", "out of memory: smaller"),
    ("raise TypeError('first\\nsecond')", "the process died (exit status 1): TypeError: first - see all of it: "),
], ids=["sleeps", "dies", "torch", "no CANN", "loader", "device", "unknown"])  # fmt: skip
def test_child_without_an_answer(package, monkeypatch, code, text):
    monkeypatch.setenv("PYTHONPATH", str(package("torch", "2.13.0", code)))
    [line] = doctor.child(["--device", "auto"], "device", limit=1 if "sleep" in code else 60)
    assert line[:2] == ("fail", "import torch") and line[2].startswith(text)


def test_a_class_map_is_read_as_main_reads_it(tiny_folder, tmp_path, capsys):
    """A class without a validation image is no mistake with it, and one that it does not name is."""
    data, names = tmp_path / "data", tmp_path / "names.txt"
    shutil.copytree(tiny_folder, data)
    shutil.rmtree(data / "val" / "leaves")
    words = ["--data-path", str(data), "--device", "cpu", "--num_workers", "0", "--batch-size", "4", "--child", "data"]
    assert doctor.main(words) == 1 and "or list all classes in --class-map FILE" in capsys.readouterr().err
    names.write_text("temple\nflower\n")
    assert doctor.main([*words, "--class-map", str(names)]) == 1
    assert "--class-map does not name 1 of the data's 3 classes, ['leaves']" in capsys.readouterr().err
    names.write_text("temple\nleaves\nflower\nship\n")
    assert doctor.main([*words, "--class-map", str(names)]) == 0
    said = capsys.readouterr().out
    assert "ok    classes: 3 in train, 2 of them in val\n" in said and "ok    loader speed: " in said
    assert "ok    class map: --class-map names 4 classes, and the training images are of 3\n" in said


@pytest.mark.parametrize("rate, text", [(0.04, "0.04"), (0.391, "0.39"), (9.96, "10"), (3.0, "3"), (12.3, "12"), (2045.4, "2045")])
def test_a_slow_rate_is_no_0(rate, text):
    assert doctor.per_second(rate) == f"{text} images/s"


@pytest.mark.parametrize("loader, waits", [("0.31", True), ("0.52", False), ("120", False)])
def test_slow_rates_are_compared(monkeypatch, loader, waits):
    said = dict(device=[("ok", "device speed", "0.4 images/s (cpu, fp32, batch 4)")],
                data=[("ok", "loader speed", f"{loader} images/s (--num_workers 1)")])
    monkeypatch.setattr(doctor, "child", lambda argv, name, **_: said[name])
    for name in ("check_versions", "check_torch_npu", "check_machine"):
        monkeypatch.setattr(doctor, name, lambda *_, **__: ())
    assert [line[1] for line in doctor.check_all(SimpleNamespace(argv=[], data_path="x", full=True))][2:] == (["speed"] if waits else [])


@pytest.mark.parametrize("rest", ["", "/run/ckpt"])
def test_an_output_folder_that_is_a_file(tmp_path, rest):
    """Or lies below one, or has a name that no file system takes."""
    (tmp_path / "file").touch()
    args = SimpleNamespace(device="cpu", num_workers=1, batch_size=1, output_dir=f"{tmp_path}/file{rest}")
    level, name, text = list(doctor.check_machine(args, 1))[-1]
    assert (level, name) == ("fail", "disk") and f"{tmp_path}/file is no folder - choose another --output_dir" in text
    args.output_dir = f"{tmp_path}/{'a' * 5000}"
    assert list(doctor.check_machine(args, 1))[-1][1] == "disk"


def test_what_the_walk_left_out_and_images_of_16_bits_are_told(tiny_folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_folder, data)
    for i in range(2):
        Image.fromarray(np.linspace(0, 65535, 40 * 36).reshape(36, 40).astype(np.uint16)).save(data / "val" / "temple" / f"x\n{i}.png")
    (data / "val" / "temple" / ".ipynb_checkpoints").mkdir()
    shutil.copy(data / "val" / "temple" / "08.jpg", data / "val" / "lone.jpg")
    args = doctor.argparse.Namespace(data_set="IMNET", data_path=str(data), class_map="", inat_category="name", images=50, full=False)
    lines, checks = [], doctor.check_data(args)
    while len(lines) < 7:  # the loader's speed is another's question
        lines.append(next(checks))
    assert ("ok", "train images", "train/: 24 images in 3 classes, from 8 (flower) to 8 (flower) a class") in lines
    assert ("ok", "val images", "val/: 13 images in 3 classes, from 4 (flower) to 5 (temple) a class") in lines
    left_out = "images outside the class folders: 1 (lone.jpg); hidden names: 1 (temple/.ipynb_checkpoints)"
    assert ("warn", "val images", f"val/ left out: {left_out}") in lines
    assert ("warn", "val depth", f"2 of 13 images looked at have more than 8 bits (16-bit: {data}/val/temple/x\\n0.png): of 16 bits the "
            "high byte is taken, of floats 0 to 1 - store them with 8 bits where that is too dark") in lines
