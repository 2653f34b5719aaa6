"""Will a training work here, and if not, what is to be done? Versions, devices, the machine and the data set.

    python tools doctor                                      # this machine, and the device that --device auto takes
    python tools doctor --device npu
    python tools doctor --data-path /data/imagenet           # the data set too: 200 images of each split are decoded
    python tools doctor --data-path /data/imagenet --full    # every image

One line a check, `ok    name: value` or `warn  name: what - remedy` or `fail  name: what - remedy`; errors of the training's own
code stand as it says them. Exit status 0 without a fail, else 1; 2 for a wrong command line. Importing torch can end a process
(beside another build's torch_npu it aborts), so what needs torch runs in child processes: this one survives and says what a
child died of. Checkpoints' size and the device's speed are those of alt_gvt_small at 224 pixels.
"""
import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import options
import utils
import versions
from versions import cuda_build, installed, release

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PARAMETERS = 24_060_776  # of alt_gvt_small


def row(level, name, what, *remedy):
    """-> level, name, text. An error brings its remedy itself, as 'what: remedy'."""
    return level, name, " ".join(" - ".join([str(what), *remedy]).split())


ok, warn, fail = (partial(row, level) for level in ("ok", "warn", "fail"))


# ---- versions, without importing ----

def size(count):
    """Bytes in words, in the unit that fits."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def per_second(rate):
    """A slow machine's rate is a fraction, and no 0."""
    return f"{rate:{'.0f' if rate >= 10 else '.2g'}} images/s"


def wants_npu(args):
    auto = args.device == "auto" and installed("torch_npu") and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"
    return args.device.startswith("npu") or bool(auto)


def check_versions():
    python = sys.version.split()[0]
    yield ok("python", python) if sys.version_info >= (3, 10) else fail("python", f"{python} is too old", "use Python 3.10 or newer")
    try:
        from packaging.requirements import Requirement
    except ImportError:  # matplotlib needs it, so a Python without it lacks more
        yield fail("packaging", "not installed", "pip install -r requirements.txt")
        return
    torch = installed("torch")  # remedies keep it: what needs torch would bring another
    for line in Path(versions.__file__).with_name("requirements.txt").read_text().splitlines():
        if not (line := line.partition("#")[0].strip()):
            continue
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        name, version = wanted.name, installed(wanted.name)
        unfit = [part.operator for part in wanted.specifier if version and not part.contains(version, prereleases=True)]
        demanded = torch and version and name == "torchvision" and versions.misfit(importlib.metadata.requires(name), torch)
        remedy = (versions.install(torch, not cuda_build()) if torch and name == "torchvision" else
                  f'pip install "{line}"' + (f" torch=={versions.plain(torch)}" if torch and name == "timm" else ""))
        if version is None or ">=" in unfit:
            yield fail(name, f"{version} is too old" if version else "not installed", remedy)
        elif demanded:
            yield fail(name, f"{version} is for torch {demanded}, not for {torch}", remedy)
        elif unfit:
            yield warn(name, f"{version} is newer than what was tried", f"if something fails: {remedy}")
        else:
            kind = (f", for CUDA {cuda_build()}" if cuda_build() else ", CPU-only") if name == "torch" else ""
            yield ok(name, version + kind)


def check_torch_npu(args):
    torch, torch_npu, bad = installed("torch") or "0", installed("torch_npu"), fail if wants_npu(args) else warn
    same = versions.torch_of_npu(torch_npu or torch)
    cpu_torch = versions.install(same, cpu_only=True, with_torch=True)
    if torch_npu is None:
        wanted = args.device.startswith("npu") or list(Path("/dev").glob("davinci[0-9]*"))
        yield (bad("torch_npu", "not installed", f"{cpu_torch}, then pip install torch_npu=={same}, or a .post of it for this CANN")
               if wanted else ok("torch_npu", "not installed, and only NPUs need it"))
        return
    if args.device.startswith(("npu", "auto")) and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield bad("torch_npu", "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading it", "unset TORCH_DEVICE_BACKEND_AUTOLOAD")
    if release(torch)[:3] != release(torch_npu)[:3]:
        yield bad("torch_npu", f"{torch_npu} beside torch {torch}: the versions must be the same", cpu_torch)
    elif cuda_build():
        kind, known = f"{torch_npu} beside a torch for CUDA {cuda_build()}", release(torch)[:2] >= versions.ABORTS_BESIDE_CUDA
        yield (bad("torch_npu", f"{kind}: together they end every process", f"{cpu_torch}, or train with --device cuda or cpu")
               if known else
               warn("torch_npu", f"{kind}: " + ("trained on simulated NPUs, but torch_npu was published for a CPU-only torch"
                    if versions.plain(torch) in versions.TRAINS_BESIDE_CUDA else "not tried"), f"if it ends the process: {cpu_torch}"))
    else:
        yield ok("torch_npu", f"{torch_npu}, the same as torch")

    if not any(folder and Path(folder, "libhccl.so").exists() for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        script = next((root / name / "set_env.sh" for root in (Path("/usr/local/Ascend"), Path(os.path.expanduser("~/Ascend")))
                       for name in ("cann", "ascend-toolkit", "nnae") if (root / name / "set_env.sh").is_file()), None)
        yield bad("CANN", "not sourced: LD_LIBRARY_PATH has no libhccl.so" if script else "not installed: no set_env.sh in "
                  "/usr/local/Ascend or ~/Ascend", f"{f'source {script}' if script else 'install it'}, or train with --device cpu")
        return
    home = Path(os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/cann"))
    files = itertools.chain(home.glob("*install.info"), home.glob("*/*install.info"), home.glob("version.cfg"))
    found = re.search(r"version *= *\[?(?:[\d.]+:)?(\d+\.\d+[\w.]*)", "\n".join(file.read_text("latin-1") for file in files), re.I)
    version = found[1] if found else "of unknown version"
    wanted = versions.cann_for(torch_npu)
    if wanted and release(version)[:2] != release(wanted):
        yield warn("CANN", f"{version}, but torch_npu {torch_npu} was published for {wanted}",
                   f"if something fails, install CANN {wanted} or this CANN's torch_npu")
    else:
        yield ok("CANN", f"{version} in {home}, sourced" + ("" if wanted else f" (no published pair for torch_npu {torch_npu} is known)"))


# ---- in a child process: torch and the device ----

def check_device(args):
    import devices  # first of all: its ImportError says what to do
    try:
        devices.choose(args.device)
    except devices.NeedsRestart:
        devices.restart_without_npu()
    except ValueError as error:
        yield fail("device", error)
        return
    import torch
    yield ok("import torch", f"{torch.__version__}{' with torch_npu' if 'torch_npu' in sys.modules else ''}")
    try:
        import datasets  # noqa: F401
        import gvt  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:
        yield fail("import the rest", str(error).partition("\n")[0], "pip install -r requirements.txt")
        return
    yield ok("import the rest", "datasets.py, gvt.py and what they need")

    for kind in ("npu", "cuda"):
        if count := devices.available(kind):
            cards = (torch.get_device_module(kind).get_device_properties(i) for i in range(count))
            kinds = Counter(f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards)
            yield ok(f"{kind} devices", "; ".join(f"{n} x {card}" for card, n in kinds.items()))
    if args.device == "auto" and not devices.available("npu") and installed("torch_npu"):
        yield warn("npu devices", "torch_npu is installed, but no NPU is visible", "look at `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES")
    device = devices.init_distributed_mode(args.device).device
    from precision import make_precision, native_bf16
    precision = make_precision(device)
    yield ok("device", f"--device {args.device} is {devices.describe(device)}")
    yield ok("precision", f"--amp auto is {precision.name}; bf16 is {'' if native_bf16(device) else 'not '}native")
    if devices.pins_memory(device):
        pinned = torch.ones(1).pin_memory().is_pinned()
        yield ok("pin_memory", "works") if pinned else warn("pin_memory", "memory does not get pinned", "--no-pin-mem")
    loss, _ = train_steps(device, precision, batch=2, pixels=64, warmup=1, steps=1)
    yield (ok("step", f"forward and backward of alt_gvt_small work, loss {loss:.3f}") if math.isfinite(loss) else
           fail("step", f"the loss of alt_gvt_small is {loss}", "run `python main.py` with --amp off, and look at the device's driver"))
    if args.data_path:
        batch, warmup, steps = (min(4, args.batch_size), 1, 2) if device.type == "cpu" else (args.batch_size, 3, 10)
        try:
            _, rate = train_steps(device, precision, batch, 224, warmup, steps)
        except RuntimeError as error:
            raise devices.explain(error) from None
        yield ok("device speed", f"{per_second(rate)} ({device}, {precision.name}, batch {batch})")


def train_steps(device, precision, batch, pixels, warmup, steps):
    """Forward and backward passes of alt_gvt_small over random images. -> the last loss, images a second"""
    import timm
    import torch
    model = timm.create_model("alt_gvt_small", num_classes=1000, drop_path_rate=0.3).to(device).train()
    images, targets = torch.randn(batch, 3, pixels, pixels).to(device), torch.randint(1000, (batch,)).to(device)

    def passes(n):
        for _ in range(n):
            with precision.autocast():
                loss = torch.nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            model.zero_grad()
        return loss.item()  # waits for the device

    passes(warmup)
    start = time.perf_counter()
    return passes(steps), batch * steps / (time.perf_counter() - start)


# ---- the machine ----

def check_machine(args, cards):
    hccl = {name: value for name, value in sorted(os.environ.items()) if name.startswith("HCCL_")}
    if wrong := [name for name, value in hccl.items() if name.endswith("_TIMEOUT") and not value.isdigit()]:
        yield warn("HCCL", f"{wrong[0]}={hccl[wrong[0]]}: a limit is a number of seconds", f"unset {wrong[0]}")
    elif (args.device.startswith("npu") or (wants_npu(args) and cards > 1)) and "HCCL_CONNECT_TIMEOUT" not in hccl:
        yield warn("HCCL", "HCCL_CONNECT_TIMEOUT is not set, and ranks wait only 120 s for each other", "source test/env_npu.sh")
    elif hccl:
        yield ok("HCCL", ", ".join(f"{name}={value}" for name, value in hccl.items()))
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if (value := os.environ.get(name)) is not None:
            yield warn(name, f"'{value}' hides every device", f"unset {name}") if value.strip() in ("", "-1") else ok(name, value)

    port = os.environ.get("MASTER_PORT", "29500")
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", int(port)))
            yield ok("port", f"{port} is free")
        except (OSError, ValueError, OverflowError) as error:
            yield (fail if "MASTER_PORT" in os.environ else warn)(
                "port", f"{port} cannot be used ({getattr(error, 'strerror', None) or error})",
                "export another MASTER_PORT for torchrun, and none for the scripts: they take a free one")

    if os.path.isdir("/dev/shm"):
        free, need = shutil.disk_usage("/dev/shm").free, args.num_workers * 2 * args.batch_size * 3 * 224 * 224 * 4
        text = f"{size(free)} free; 2 batches of each of {args.num_workers} workers take {size(need)} a card, of {cards}"
        yield (ok("shared memory", text) if free >= need * cards else
               (warn if free >= need else fail)("shared memory", text, "docker run --shm-size=32g or --ipc=host, or fewer --num_workers"))
    folder = Path(args.output_dir).absolute()
    present = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(present):
        yield fail("disk", f"{present} is no folder", "choose another --output_dir")
        return
    free, one = shutil.disk_usage(present).free, PARAMETERS * 3 * 4  # weights and AdamW's two moments
    text = f"{size(free)} free in {present}; checkpoints (last, best, one being written) take 3 x {size(one)}"
    bad = f"{present} cannot be written" if not os.access(present, os.W_OK | os.X_OK) else text if free < 3 * one else None
    yield fail("disk", bad, "choose another --output_dir, or make room") if bad else ok("disk", text)


# ---- in a child process: the data set ----

def check_data(args):
    import devices  # noqa: F401, I001  before torch: for --device cpu it keeps torch_npu out
    import datasets
    import labels
    import shards
    if args.data_set == "DIGITS" and not Path(args.data_path, "train").is_dir():
        yield ok("data", f"the digits are written into {args.data_path} by the first training")
        return
    class_map = labels.read_class_map(args.class_map) if args.class_map else None  # a ValueError says what is wrong, as those below
    train, val, classes = datasets.build_datasets(args.data_path, args.data_set, None, None, args.inat_category, class_map=class_map)
    notes = labels.decide(classes, class_map=class_map).notes
    yield ok("classes", f"{len(classes)}, the same in train and val" if len(val.classes) == len(classes) else
             f"{len(classes)} in train, {len(val.classes)} of them in val")
    if class_map:
        yield ok("class map", "; ".join(notes) or f"it names these {len(classes)} classes")
    failed, sharded = False, isinstance(train, shards.ShardedImages) or isinstance(val, shards.ShardedImages)
    for split, images in (("train", train), ("val", val)):
        for i, note in enumerate(images.notes):  # first how many images a class has, then what was left out
            yield (warn if i else ok)(f"{split} images", note)
        wide = []
        count, bad = look_at(images, len(classes), args, wide)
        if wide:
            yield warn(f"{split} depth", f"{len(wide)} of {count} images looked at have more than 8 bits ({min(wide)}): of 16 bits the "
                       "high byte is taken, of floats 0 to 1", "store them with 8 bits where that is too dark")
        text = f"{count - len(bad)} of {count} images looked at are readable, of {len(images)}"
        yield from (fail("image", error) for error in bad[:100])
        yield ok(f"{split} decode", text) if not bad else fail(
            f"{split} decode", text, "replace or remove the others" + ("" if args.full else "; --full looks at all images"))
        failed |= bool(bad)
    if not sharded and args.data_set not in ("CIFAR", "CIFAR10"):
        count, pairs = same_files(train.names, val.names, args)
        shown = "; ".join(utils.shown(f"{b} is {a}") for a, b in pairs[:5])
        yield (warn("same file twice", f"{len(pairs)} of {count} validation images looked at are training images too: {shown}",
                    "remove one of each, or Acc@1 says too much") if pairs else
               ok("same file twice", f"none of {count} validation images looked at is a training image"))
    if not failed:  # a bad image would end the loader
        yield ok("loader speed", f"{per_second(loader_rate(args))} (--num_workers {args.num_workers}, {CORES} cores)")


def sample(n, args):
    return range(n) if args.full or n <= args.images else sorted(random.Random(0).sample(range(n), args.images))


def look_at(images, classes, args, wide=None):
    """Read a sample of the images, or all. -> how many, what is wrong with the bad ones. wide: a list for those of more than 8 bits"""
    import decode
    chosen = sample(len(images), args)

    def fault(index):
        try:
            image, label, _ = images[index]
        except decode.DataError as error:
            return str(error)
        if wide is not None and "narrowed" in image.info:
            wide.append(f"{image.info['narrowed']}: {utils.shown(images.name(index))}")
        return None if 0 <= label < classes else f"{images.name(index)} has the label {label}, of {classes} classes: write it again"

    with ThreadPoolExecutor(CORES) as pool:
        found = list(pool.map(fault, chosen))
    return len(found), sorted(filter(None, found))


def same_files(train, val, args):
    """Files with the same content: sizes first, then hashes. -> how many of val were looked at, [(train, val)]"""
    def size(path):
        return os.path.isfile(path) and os.path.getsize(path)

    def content(path):
        return hashlib.blake2b(Path(path).read_bytes()).digest()

    val = [path for path in map(val.__getitem__, sample(len(val), args)) if os.path.isfile(path)]
    with ThreadPoolExecutor(16) as pool:
        sizes = set(pool.map(size, val))
        near = [path for path, n in zip(train, pool.map(size, train)) if n in sizes and n]
        known = dict(zip(pool.map(content, near), near))
        return len(val), [(known[key], path) for key, path in zip(pool.map(content, val), val) if key in known]


def loader_rate(args, seconds=3):
    """Images a second of the training loader with the recipe's transforms, after it filled its queue once."""
    import torch

    import assembly
    import devices
    import loaders
    loader, _, _ = assembly.build_data(args.training, devices.Ranks(torch.device("cpu")))

    def batches():
        for epoch in itertools.count():
            loaders.set_epoch(loader, epoch)
            yield from loader

    endless, read = batches(), 0
    for _ in range(2 * args.num_workers + 1):
        next(endless)
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(endless)
        read += args.batch_size
    return read / passed


# ---- all of it ----

def child(argv, name, limit=None):
    """Run the checks of `name` in a process of their own, for `limit` seconds at most. Yields its lines, then what it died of.

    argv: the doctor's own words.
    """
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    command, late = [sys.executable, str(Path(__file__).parent), "doctor", *argv, "--child", name], False
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=env,
                               start_new_session=True)
    try:
        out, log = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it has loader workers
    if late:
        out, log = process.communicate()
    lines, status = re.findall(r"^(ok|warn|fail) +(.+?): (.+)", out, re.M), process.returncode
    yield from lines
    doing = f"after {lines[-1][1]}" if lines else {"device": "import torch"}.get(name, name)
    if late:
        yield fail(doing, f"no answer in {limit} s", "look for other work on the device (npu-smi info, nvidia-smi) or a slow disk")
    elif status:
        said = re.findall(r"^ *((?:what\(\)|[\w.]+(?:Error|Image)): .+)", log, re.M) or log.strip().splitlines() or ["it said nothing"]
        kind, _, reason = said[-1].partition(": ")
        if kind.rpartition(".")[2] in ("ValueError", "ImportError", "DeviceError", "DataError", "UnreadableImage"):
            yield fail(name if lines else doing, reason)  # our own errors bring the remedy
            return
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        remedy = {-signal.SIGBUS: "shared memory is full: docker run --shm-size=32g, or fewer --num_workers",
                  -signal.SIGKILL: "the system ended it, most likely for its memory: fewer --num_workers",
                  }.get(status, f"see all of it: {' '.join(command)}")
        if doing == "import torch" and status < 0 and (torch_npu := installed("torch_npu")):
            same = versions.torch_of_npu(torch_npu)
            cpu_torch = versions.install(same, cpu_only=True, with_torch=True)
            remedy = f"torch must be CPU-only and {same}, as torch_npu: {cpu_torch}; or train with --device cpu"
        yield fail(doing, f"the process died ({how}): {said[-1].removeprefix('what():').strip()[:200]}", remedy)


def check_all(args):
    yield from check_versions()
    yield from check_torch_npu(args)
    device = list(child(args.argv, "device", limit=600))
    yield from device
    counts = (int(n) for _, name, text in device if name.endswith(" devices") for n in re.findall(r"(\d+) x ", text))
    yield from check_machine(args, cards=sum(counts) or 1)
    if args.data_path:
        data = list(child([*args.argv, "--device", "cpu"], "data", limit=None if args.full else 1200))
        yield from data
        rates = {name: float(text.split()[0]) for _, name, text in device + data if name.endswith(" speed")}
        if len(rates) == 2 and rates["loader speed"] < rates["device speed"]:
            yield warn("speed", "the device waits for images", "more --num_workers or cores, smaller files, or tar shards on a slow disk")


def main(argv):
    parser = argparse.ArgumentParser("python tools doctor", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-path", "--data_path", default="", help="the data set to look at")
    parser.add_argument("--data-set", "--data_set", default="IMNET", choices=options.DATA_SETS, help="its kind, as main.py's")
    parser.add_argument("--class-map", "--class_map", default="", help="which output is which class, as main.py's")
    parser.add_argument("--inat-category", "--inat_category", default="name", choices=options.INAT_LEVELS, help="as main.py's")
    parser.add_argument("--device", default="auto", help="the device to try, as main.py's")
    parser.add_argument("--full", action="store_true", help="look at every image")
    parser.add_argument("--images", type=int, default=200, help="images of each split to look at without --full")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=128, help="images a card in the training to come")
    parser.add_argument("--num_workers", "--num-workers", type=int, default=10, help="loader processes a card in the training to come")
    parser.add_argument("--output_dir", "--output-dir", default="test/output", help="where its checkpoints go")
    parser.add_argument("--child", choices=("device", "data"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.argv = argv
    try:
        args.training = options.get_args_parser().parse_args([  # the one to come, as main.py takes it
            f"--data-path={args.data_path or '.'}", f"--data-set={args.data_set}", f"--class-map={args.class_map}",
            f"--inat-category={args.inat_category}", f"--batch-size={args.batch_size}", f"--num_workers={args.num_workers}"])
        options.check(args.training)
        if args.images < 1:
            raise ValueError(f"--images is {args.images}, and must be at least 1")
    except ValueError as error:
        parser.error(str(error))
    checks, failed = {"device": check_device, "data": check_data, None: check_all}[args.child], False
    try:
        for level, name, text in checks(args):
            print(f"{level:<6}{name}: {text}", flush=True)
            failed |= level == "fail"
    except Exception:
        if not args.child:
            raise
        traceback.print_exc()  # for the process that looks after this one, whatever it is
        return 1
    return int(failed and not args.child)
