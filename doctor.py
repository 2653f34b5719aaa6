"""Will a training work here, and if not, what is to be done? Versions, devices, the machine and the data set.

    python doctor.py                                      # this machine, and the device that --device auto takes
    python doctor.py --device npu
    python doctor.py --data-path /data/imagenet           # the data set too: 200 images of each split are decoded
    python doctor.py --data-path /data/imagenet --full    # every image

One line a check, `ok    name: value` or `warn  name: what - remedy` or `fail  name: what - remedy`. Exit status 0 without
a fail, else 1. Importing torch can end a process (beside another build's torch_npu it aborts), so whatever needs torch
runs in a child process, which sends its lines back: this one survives and says what the child died of. Checkpoints' size and
the device's speed are those of alt_gvt_small at 224 pixels.
"""
import argparse
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import options

ROOT = Path(__file__).resolve().parent
MARK = "doctor> "  # before a line of a child's that is a check
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PARAMETERS = 24_060_776  # of alt_gvt_small
CPU_TORCH = "install the CPU-only build of torch {}, from PyTorch's CPU index"
# CANN that torch_npu's releases were published for (its version table): torch's version, {from .postN on: CANN}
CANN_PAIRS = {"2.7.1": {0: "8.3", 2: "8.5", 4: "9.0", 8: "9.1"}, "2.8.0": {0: "8.3", 2: "8.5", 4: "9.0"},
              "2.9.0": {0: "8.5", 2: "9.0", 6: "9.1"}, "2.10.0": {0: "9.0", 4: "9.1"}, "2.11.0": {0: "9.1"}, "2.12.0": {0: "9.1"}}


def ok(name, value):
    return "ok", name, value


def warn(name, what, remedy):
    return "warn", name, f"{what} - {remedy}"


def fail(name, what, remedy):
    return "fail", name, f"{what} - {remedy}"


def told(level, name, error):
    """Another file's error, 'what: remedy', as a check: cut at the first colon after `--option value:` outside brackets."""
    found = re.match(r"((?:--\S+ .+?: )?(?:\((?:[^()]|\([^()]*\))*\)|[^:(]|:(?! ))+): (.+)", one_line(error))
    return level(name, *(found.groups() if found else (one_line(error), "python main.py shows all of it")))


def one_line(error):
    """The message of an error, without the traceback that a loader's worker puts before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].partition(": ")[2] if "Traceback" in str(error) else lines[0]


def in_bytes(n):
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


# ---- versions, without importing ----

def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version):
    return tuple(int(n) for n in re.match(r"(?:\d+(?:\.\d+)*)?", version)[0].split(".") if n)


def cuda_build():
    """The CUDA version of the installed torch, or None: read in its files."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    found = re.search(r"^cuda\b[^=]*= *'([^']+)'", file.read_text(), re.M) if file and file.is_file() else None
    return found[1] if found else (re.findall(r"\+cu(\d+)", installed("torch") or "") or [None])[0]


def wants_npu(args):
    auto = args.device == "auto" and installed("torch_npu") and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0"
    return args.device.startswith("npu") or bool(auto)


def check_versions(args):
    python = sys.version.split()[0]
    yield ok("python", python) if sys.version_info >= (3, 10) else fail("python", f"{python} is too old", "use Python 3.10 or newer")
    file = ROOT / "requirements.txt"
    for line in file.read_text().splitlines() if file.is_file() else ["torch>=2.7", "timm>=1.0.31"]:
        line = line.partition("#")[0].strip()
        if not (name := re.match(r"\w[\w.-]*|", line)[0]):
            continue
        version = installed(name)
        if version is None:
            yield fail(name, "not installed", f'pip install "{line}"')
        elif any(release(version) < release(least) for least in re.findall(r">=([\w.]+)", line)):
            yield fail(name, f"{version} is too old", f'pip install "{line}"')
        elif any(release(version) >= release(end) for end in re.findall(r"<([\w.]+)", line)):
            yield warn(name, f"{version} is newer than what was tried", f'if something fails: pip install "{line}"')
        else:
            kind = (f", for CUDA {cuda_build()}" if cuda_build() else ", CPU-only") if name == "torch" else ""
            yield ok(name, version + kind)


def check_torch_npu(args):
    torch, torch_npu, bad = installed("torch") or "0", installed("torch_npu"), fail if wants_npu(args) else warn
    if torch_npu is None:
        if args.device.startswith("npu") or list(Path("/dev").glob("davinci[0-9]*")):
            same = ".".join(map(str, release(torch)))
            yield bad("torch_npu", "not installed", f"{CPU_TORCH.format(same)}, then pip install torch_npu=={same}")
        else:
            yield ok("torch_npu", "not installed, and only NPUs need it")
        return
    if args.device.startswith(("npu", "auto")) and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield bad("torch_npu", "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading it", "unset TORCH_DEVICE_BACKEND_AUTOLOAD")
    same = ".".join(map(str, release(torch_npu)[:3]))
    if release(torch)[:3] != release(torch_npu)[:3]:
        yield bad("torch_npu", f"{torch_npu} beside torch {torch}: the versions must be the same", CPU_TORCH.format(same))
    elif cuda_build():
        yield bad("torch_npu", f"{torch_npu} beside a torch for CUDA {cuda_build()}: together they end every process",
                  f"{CPU_TORCH.format(same)}, or train with --device cuda or cpu")
    else:
        yield ok("torch_npu", f"{torch_npu}, the same as torch")
    yield from check_cann(torch_npu, bad)


def cann_version(home):
    """From the files that CANN's installers leave in its folder, else from the folder's name."""
    for pattern in ("*install.info", "*/*install.info", "version.cfg", "*/version.cfg", "version.info"):
        for file in sorted(home.glob(pattern)):
            found = re.search(r"^(?:\w+_)?version *= *\[?(?:[\d.]+:)?(\d+\.\d+[\w.]*)", file.read_text(errors="replace"), re.M | re.I)
            if found:
                return found[1]
    return (re.findall(r"\d+\.\d+[\w.]*", home.resolve().name) or ["of unknown version"])[0]


def check_cann(torch_npu, bad):
    own = os.environ.get("ASCEND_HOME_PATH")
    folders = [root / name for root in (Path("/usr/local/Ascend"), Path.home() / "Ascend")
               for name in ("cann", "ascend-toolkit/latest", "nnae/latest")]
    home = next((path for path in [*([Path(own)] if own else []), *folders] if path.is_dir()), None)
    if home is None:
        where = f"no folder {own}, where ASCEND_HOME_PATH points" if own else "none is installed in /usr/local/Ascend or ~/Ascend"
        yield bad("CANN", where, "install CANN and source its set_env.sh, or train with --device cpu")
        return
    version, script = cann_version(home), next((path for path in (home / "set_env.sh", home.parent / "set_env.sh")
                                                if path.is_file()), home / "set_env.sh")
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    if not any(folder and Path(folder, "libhccl.so").exists() for folder in libraries):
        yield bad("CANN", f"{version} in {home} is not sourced: LD_LIBRARY_PATH has no libhccl.so", f"source {script}")
        return
    plain = re.fullmatch(r"(\d+\.\d+\.\d+)(?:\.post(\d+))?(?:\+.*)?", torch_npu)
    pairs = CANN_PAIRS.get(plain[1], {}) if plain else {}
    wanted = next((cann for post, cann in reversed(pairs.items()) if post <= int(plain[2] or 0)), None)
    if wanted and release(version)[:2] != release(wanted):
        yield warn("CANN", f"{version}, but torch_npu {torch_npu} was published for {wanted}",
                   f"if something fails, install CANN {wanted} or this CANN's torch_npu")
    else:
        yield ok("CANN", f"{version} in {home}, sourced" + ("" if wanted else f" (no published pair for torch_npu {torch_npu} is known)"))


# ---- in a child process: torch and the device ----

def check_device(args):
    yield "now", "import torch", ""
    try:
        import devices
    except ImportError as error:
        yield told(fail, "import torch", error)
        return
    try:
        ranks = devices.init_distributed_mode(args.device)
    except devices.NeedsRestart:  # as main.py does
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    except ValueError as error:
        yield told(fail, "device", error)
        return
    import torch
    device = ranks.device
    loaded = "torch_npu" in sys.modules
    yield ok("import torch", f"{torch.__version__}{' with torch_npu' if loaded else ''}")
    yield "now", "import the rest", ""
    try:
        import datasets  # noqa: F401
        import gvt  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:
        fits = ".".join(map(str, (0, release(torch.__version__)[1] + 15)))
        yield fail("import the rest", one_line(error), f"pip install -r requirements.txt (torch {torch.__version__} goes with torchvision "
                   f"{fits} of the same kind, CUDA or CPU-only)")
        return
    yield ok("import the rest", "datasets.py, gvt.py and what they need")

    yield "now", "device", ""
    for kind in ("npu", "cuda"):
        if count := devices.available(kind):
            cards = (torch.get_device_module(kind).get_device_properties(i) for i in range(count))
            kinds = Counter(f"{card.name}, {card.total_memory / 2**30:.0f} GiB" for card in cards)
            yield ok(f"{kind} devices", "; ".join(f"{n} x {card}" for card, n in kinds.items()))
            yield "value", "cards", count
    if args.device == "auto" and device.type != "npu" and installed("torch_npu"):
        yield warn("npu devices", "torch_npu is installed, but no NPU is visible", "look at `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    yield ok("torch.accelerator", str(accelerator or "none"))
    yield ok("device", f"--device {args.device} is {devices.describe(device)}")
    precision = devices.make_precision(device)
    scaler = type(devices.make_scaler(device))
    yield ok("precision", f"--amp auto is {precision.name}; bf16 is {'' if devices.native_bf16(device) else 'not '}native; fp16 has the "
             f"scaler {scaler.__module__}.{scaler.__name__}")
    yield "now", "pin_memory", ""
    if devices.pins_memory(device):
        pinned = torch.ones(1).pin_memory().is_pinned()
        yield ok("pin_memory", "works") if pinned else warn("pin_memory", "memory does not get pinned", "--no-pin-mem")
    yield "now", "step", ""
    _, loss = train_steps(device, precision, batch=2, pixels=64, warmup=0, steps=1)
    if math.isfinite(loss):
        yield ok("step", f"forward and backward of alt_gvt_small work, loss {loss:.3f}")
    else:
        yield fail("step", f"the loss of alt_gvt_small is {loss}", "run `python main.py` with --amp off, and look at the device's driver")
    if args.data_path:
        yield "now", "speed", ""
        batch, warmup, steps = (min(4, args.batch_size), 1, 2) if device.type == "cpu" else (args.batch_size, 3, 10)
        rate, _ = train_steps(device, precision, batch, 224, warmup, steps)
        yield "value", "device", [rate, f"{device} ({precision.name}, batch {batch})"]


def train_steps(device, precision, batch, pixels, warmup, steps):
    """Forward and backward passes of alt_gvt_small over random images. -> images a second, the last loss"""
    import timm
    import torch

    import devices
    model = timm.create_model("alt_gvt_small", num_classes=1000, drop_path_rate=0.3).to(device).train()
    images, targets = torch.randn(batch, 3, pixels, pixels).to(device), torch.randint(1000, (batch,)).to(device)
    for step in range(-warmup, steps):
        if step == 0:
            devices.synchronize(device)
            start = time.perf_counter()
        with precision.autocast():
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        model.zero_grad()
    devices.synchronize(device)
    return batch * steps / (time.perf_counter() - start), loss.item()


# ---- the machine ----

def check_machine(args, cards):
    hccl = {name: value for name, value in sorted(os.environ.items()) if name.startswith("HCCL_")}
    if wrong := [f"{name}={value}" for name, value in hccl.items() if name.endswith("_TIMEOUT") and not value.isdigit()]:
        yield warn("HCCL", f"{', '.join(wrong)}: a limit is a number of seconds", f"unset {wrong[0].partition('=')[0]}")
    elif (args.device.startswith("npu") or (wants_npu(args) and cards > 1)) and "HCCL_CONNECT_TIMEOUT" not in hccl:
        yield warn("HCCL", "HCCL_CONNECT_TIMEOUT is not set, and ranks wait only 120 s for each other", "source test/env_npu.sh")
    elif hccl:
        yield ok("HCCL", ", ".join(f"{name}={value}" for name, value in hccl.items()))
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if value := os.environ.get(name):
            yield warn(name, f"{value} hides every device", f"unset {name}") if value.strip() == "-1" else ok(name, value)
        elif value is not None:
            yield warn(name, "is empty and hides every device", f"unset {name}")

    port = os.environ.get("MASTER_PORT", "29500")
    with socket.socket() as server, socket.socket() as other:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("", 0))
        try:
            server.bind(("", int(port)))
            yield ok("port", f"{port} is free")
        except (OSError, ValueError, OverflowError) as error:
            why = f"{port} cannot be used ({getattr(error, 'strerror', None) or error})"
            remedy = f"export MASTER_PORT={other.getsockname()[1]}"
            yield (fail("port", why, f"{remedy}, or unset it for the scripts") if "MASTER_PORT" in os.environ else
                   warn("port", why, f"for torchrun without --standalone: {remedy} (the scripts take a free one)"))

    need = args.num_workers * 2 * args.batch_size * 3 * 224 * 224 * 4
    formula = f"{in_bytes(need)} a card = {args.num_workers} workers x 2 batches ahead x {args.batch_size} images x 3 x 224 x 224 x 4 bytes"
    if os.path.isdir("/dev/shm"):
        free, remedy = shutil.disk_usage("/dev/shm").free, "docker run --shm-size=32g or --ipc=host, or fewer --num_workers"
        bad = fail if free < need else warn if free < need * cards else None
        yield (bad("shared memory", f"{in_bytes(free)} free in /dev/shm; up to {formula}, {cards} cards", remedy) if bad else
               ok("shared memory", f"{in_bytes(free)} free; up to {formula}"))
    limit, need = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 256 + 32 * args.num_workers
    many = limit == resource.RLIM_INFINITY or limit >= need
    yield (ok("open files", f"{'no limit' if limit == resource.RLIM_INFINITY else limit}") if many else
           warn("open files", f"at most {limit}; {args.num_workers} workers may need {need}", f"ulimit -n {max(need, 65536)}"))

    folder = Path(args.output_dir).absolute()
    present = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, one = shutil.disk_usage(present).free, PARAMETERS * 3 * 4
    text = (f"{in_bytes(free)} free in {present}; the last and the best checkpoint, and one being written, are 3 x {in_bytes(one)} = "
            f"3 x {PARAMETERS:,} parameters x 3 x 4 bytes (weights and AdamW's two moments)")
    if not os.access(present, os.W_OK | os.X_OK):
        yield fail("output folder", f"{present} cannot be written", "choose another --output_dir")
    else:
        yield ok("disk", text) if free >= 3 * one else fail("disk", text, "free some, or choose another --output_dir")


# ---- in a child process: the data set ----

def check_data(args):
    yield "now", "data", ""
    try:
        import devices  # noqa: F401, I001  before torch: for --device cpu it keeps torch_npu out
        import datasets
    except (ImportError, RuntimeError, AttributeError) as error:
        yield fail("data", f"not looked at: {one_line(error)}", "mend the import first")
        return
    if args.data_set == "DIGITS" and not Path(args.data_path, "train").is_dir():
        yield ok("data", f"the digits are written into {args.data_path} by the first training")
        return
    folders, found = args.data_set in ("IMNET", "DIGITS"), {}
    for split in ("train", "val"):
        try:
            found[split] = open_split(args, split)
        except ValueError as error:
            yield told(fail, f"{split} data", error)
    if len(found) < 2:
        return
    (train, classes), (val, val_classes) = found["train"], found["val"]
    sharded, failed = any(isinstance(images, datasets.ShardedImages) for images in (train, val)), False
    if classes != val_classes:
        failed = True
        only = [sorted(set(a) - set(b)) for a, b in ((classes, val_classes), (val_classes, classes))]
        names = [", ".join(part[:5]) + (f" and {len(part) - 5} more" if len(part) > 5 else "") or "none" for part in only]
        yield fail("classes", f"train has {len(classes)} and val {len(val_classes)}, and they differ: only in train: {names[0]}; only in "
                   f"val: {names[1]}", "make the folders agree")
    else:
        yield ok("classes", f"{len(classes)}, the same in train and val")
    for split, (images, names) in found.items():
        if isinstance(images, datasets.ShardedImages):
            yield ok(f"{split} images", f"{images.total} in {len(images.shards)} shards")
            continue
        inner = images.dataset
        targets = Counter(inner.targets if hasattr(inner, "targets") else (target for _, target in inner.samples))
        counts = [targets[i] for i in range(len(names))]
        yield ok(f"{split} images", f"{len(images)}, {min(counts)} to {max(counts)} in a class")
        if empty := [name for name, count in zip(names, counts) if not count]:
            failed |= folders
            yield (fail if folders else warn)(f"{split} empty classes", f"no image in {', '.join(empty[:5])}"
                   f"{f' and {len(empty) - 5} more' if len(empty) > 5 else ''}", "put images there, or remove the class in train and val")

    for split, (images, names) in found.items():
        yield "now", f"{split} decode", ""
        count, bad = decode(images, names, args)
        for error in bad[:100]:
            yield told(fail, "image", error)
        failed |= bool(bad)
        text = f"{count - len(bad)} of {count} images looked at are readable, of {getattr(images, 'total', None) or len(images)}"
        remedy = "replace or remove the others" + ("" if args.full else "; --full looks at all images")
        yield fail(f"{split} decode", text, remedy) if bad else ok(f"{split} decode", text)
        if args.full and isinstance(images, datasets.ShardedImages) and count != images.total:
            failed = True
            yield fail(f"{split} shards", f"{count} images, and {images.total} in index.json", f"python datasets.py index {args.data_path}")
    if not sharded and args.data_set not in ("CIFAR", "CIFAR10"):
        yield "now", "same file twice", ""
        count, pairs = same_files(train.names, val.names, args)
        if pairs:
            yield warn("same file twice", f"{len(pairs)} of {count} validation images looked at are training images too: "
                       f"{'; '.join(f'{b} is {a}' for a, b in pairs[:5])}", "remove one of each, or Acc@1 says too much")
        else:
            yield ok("same file twice", f"none of {count} validation images looked at is a training image")
    if failed:
        yield warn("speed", "not measured", "mend the data first")
        return
    yield "now", "speed", ""
    size = getattr(train, "total", None) or len(train)
    yield "value", "loader", [loader_rate(args, min(args.batch_size, size)), f"--num_workers {args.num_workers}, {CORES} cores"]


def open_split(args, split):
    """-> data set, class names; class folders may be empty here. Raises ValueError for what no training could read."""
    import datasets
    folder = Path(args.data_path, split)
    if args.data_set in ("IMNET", "DIGITS") and not list(folder.glob("*.tar")):
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: --data-path needs train/ and val/")
        try:
            images = datasets.datasets.ImageFolder(folder, allow_empty=True)
        except FileNotFoundError as error:
            raise ValueError(f"{folder} has no class folders: every class is a folder in it") from error
        return datasets.NamedImages(images, [path for path, _ in images.samples]), images.classes
    return datasets.build_dataset(split == "train", args.data_path, args.data_set, lambda image: image.size)


def sample(n, args):
    return range(n) if args.full or n <= args.images else sorted(random.Random(0).sample(range(n), args.images))


def decode(images, classes, args):
    """Read a sample of the images, or all. -> how many, what is wrong with the bad ones"""
    import datasets
    bad, count = [], 0

    def read(get):
        try:
            if not 0 <= (got := get())[1] < len(classes):
                bad.append(f"{got[2]} has the label {got[1]}, of {len(classes)} classes: write it again")
        except datasets.UnreadableImage as error:
            bad.append(str(error))

    if isinstance(images, datasets.ShardedImages):
        for shard in images.shards:
            try:
                stop = None if args.full else math.ceil(args.images / len(images.shards))
                for item in itertools.islice(images.read([shard], 0, 1), stop):
                    count += 1
                    read(lambda item=item: images.decode(item))
            except (tarfile.TarError, OSError, ValueError) as error:
                bad.append(f"cannot read the shard {shard} ({one_line(error)}): write it again")
                count += 1
        return count, bad
    chosen = sample(len(images), args)
    with ThreadPoolExecutor(CORES) as pool:
        for start in range(0, len(chosen), 4096):
            list(pool.map(read, [lambda i=i: images[i] for i in chosen[start:start + 4096]]))
    return len(chosen), sorted(bad)


def same_files(train, val, args):
    """Files with the same content: sizes first, then hashes. -> how many of val were looked at, [(train, val)]"""
    def size(path):
        return os.path.getsize(path) if os.path.isfile(path) else None

    def content(path):
        return hashlib.blake2b(Path(path).read_bytes()).digest()

    val = [val[i] for i in sample(len(val), args)]
    with ThreadPoolExecutor(16) as pool:
        val_sizes, train_sizes = (list(pool.map(size, paths)) for paths in (val, train))
        both = set(val_sizes) & set(train_sizes) - {None}
        near_train, near_val = ([path for path, n in zip(paths, sizes) if n in both]
                                for paths, sizes in ((train, train_sizes), (val, val_sizes)))
        known = dict(zip(pool.map(content, near_train), near_train))
        return len(val), [(known[key], path) for key, path in zip(pool.map(content, near_val), near_val) if key in known]


def loader_rate(args, batch, seconds=3):
    """Images a second of the training loader with the recipe's transforms, after it filled its queue once."""
    import torch

    import datasets
    import devices
    import main
    recipe = options.get_args_parser().parse_args([
        "--data-path", args.data_path, "--data-set", args.data_set, "--batch-size", str(batch), "--num_workers", str(args.num_workers)])
    loader, _, _ = main.build_data(recipe, devices.Ranks(torch.device("cpu")))
    begun, start, images = time.perf_counter(), None, 0
    for epoch in itertools.count():
        datasets.set_epoch(loader, epoch)
        for i, _ in enumerate(loader, start=epoch * len(loader)):
            now, images = time.perf_counter(), images + batch
            if start is None and (i >= 2 * args.num_workers or now - begun > 10 * seconds):
                start, images = now, 0
            elif start is not None and now - start > seconds:
                return images / (now - start)


# ---- children ----

def child(name, *extra, limit):
    """Run the checks of `name` in a process of their own, for `limit` seconds at most (None: any). Yields its lines."""
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    doing, late = name, threading.Event()

    def kill():
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it has loader workers
        except ProcessLookupError:
            pass

    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], *extra, "--child", name], stdout=subprocess.PIPE, stderr=log,
                                   text=True, errors="replace", env=clean, start_new_session=True)
        timer = threading.Timer(limit or 0, lambda: (late.set(), kill()))
        if limit:
            timer.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    level, check, text = json.loads(line[len(MARK):])
                    if level == "now":
                        doing = check
                    else:
                        yield level, check, text
            process.wait()
        finally:
            timer.cancel()
            kill()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if late.is_set():
        yield fail(doing, f"no answer in {limit} s", "look for other work on the device (npu-smi info, nvidia-smi) or a slow disk")
    elif process.returncode:
        yield died(doing, name, process.returncode, lines)


def died(doing, name, status, lines):
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    reason = next((line for line in lines if "what():" in line or "error:" in line.lower()), lines[-1] if lines else "it said nothing")
    torch_npu = installed("torch_npu")
    if doing == "import torch" and torch_npu:
        same = ".".join(map(str, release(torch_npu)[:3]))
        remedy = f"torch must be CPU-only and {same}, as torch_npu: {CPU_TORCH.format(same)}; or train with --device cpu"
    else:
        remedy = {-signal.SIGBUS: "shared memory is full: docker run --shm-size=32g, or fewer --num_workers",
                  -signal.SIGKILL: "the system ended it, most likely for its memory: fewer --num_workers"}.get(
            status, f"see all of it: python doctor.py {' '.join(sys.argv[1:])} --child {name}")
    return fail(doing, f"the process died ({how}): {reason.removeprefix('what():').strip()[:200]}", remedy)


def in_child(checks):
    """What a child does: send each line at once. An exception becomes a line, and its traceback goes to stderr."""
    doing = "?"
    try:
        for level, name, text in checks:
            doing = name if level != "value" else doing
            print(MARK + json.dumps([level, name, text]), flush=True)
    except Exception as error:
        traceback.print_exc()
        known = sys.modules["devices"].explain(error) if "devices" in sys.modules else error
        line = told(fail, doing, known) if known is not error or isinstance(error, ValueError) else fail(
            doing, f"{type(error).__name__}: {one_line(error)}", f"see all of it: python doctor.py {' '.join(sys.argv[1:])}")
        print(MARK + json.dumps(line), flush=True)


def all_checks(args):
    found = {"cards": 1}

    def keep(lines):
        for level, name, text in lines:
            if level == "value":
                found[name] = text
            else:
                yield level, name, text

    yield from check_versions(args)
    yield from check_torch_npu(args)
    yield from keep(child("device", limit=600))
    yield from check_machine(args, found["cards"])
    if args.data_path:
        yield from keep(child("data", "--device", "cpu", limit=None if args.full else 1200))
    if "loader" in found and "device" in found:
        (loader, workers), (device, what) = found["loader"], found["device"]
        text = f"the loader gives {loader:.0f} images/s ({workers}), {what} eats {device:.0f}"
        yield ok("speed", text) if loader >= device else warn(
            "speed", text, "the device waits for images: more --num_workers or cores, smaller files, or tar shards on a slow disk")


def run(argv=None):
    parser = argparse.ArgumentParser("doctor.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data-path", "--data_path", default="", help="the data set to look at")
    parser.add_argument("--data-set", "--data_set", default="IMNET", choices=options.DATA_SETS, help="its kind, as main.py's")
    parser.add_argument("--device", default="auto", help="the device to try, as main.py's")
    parser.add_argument("--full", action="store_true", help="look at every image")
    parser.add_argument("--images", type=int, default=200, help="images of each split to look at without --full")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=128, help="images a card in the training to come")
    parser.add_argument("--num_workers", "--num-workers", type=int, default=10, help="loader processes a card in the training to come")
    parser.add_argument("--output_dir", "--output-dir", default="test/output", help="where its checkpoints go")
    parser.add_argument("--child", choices=("device", "data"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        in_child({"device": check_device, "data": check_data}[args.child](args))
        return 0
    failed = False
    try:
        for level, name, text in all_checks(args):
            print(f"{level:<6}{name}: {' '.join(text.split())}", flush=True)
            failed |= level == "fail"
    except KeyboardInterrupt:
        return 130
    return int(failed)


if __name__ == "__main__":
    sys.exit(run())
