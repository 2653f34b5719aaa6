"""What does this machine compute on? This file and precision.py are the only ones that name devices and their libraries.

Import it before torch: for a run on cpu or cuda it keeps torch from loading torch_npu, which breaks such runs where no
NPU is visible. What is said of Ascend here comes from torch_npu's sources and CANN's documents.
"""
import multiprocessing
import os
import random
import re
import resource
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import versions


def asked_for(argv):
    """The value of --device on a command line without its index: cpu, cuda, npu or auto."""
    name = "auto"
    for word, following in zip(argv, [*argv[1:], ""]):
        if word == "--device":
            name = following
        elif word.startswith("--device="):
            name = word.partition("=")[2]
    name = name.partition(":")[0]
    return "cuda" if name in ("gpu", "gp") else name


if asked_for(sys.argv) in ("cpu", "cuda"):
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# CPU threads that spin while they wait make a step 10 times as long where another process has one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
try:
    import torch
    import torchvision  # noqa: F401  another build's does not load, and timm and the data would be the first to meet it
except (ImportError, RuntimeError, OSError, AttributeError) as error:
    raise ImportError(versions.explain_import(error)) from error

import numpy as np
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """Where this process computes, and which of how many processes it is."""
    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self):
        return self.rank == 0


def all_agree(ranks, action):
    """action() on the first rank, which alone has its result. A mistake that only it can meet ends all ranks alike, not the others by a
    lost connection."""
    result, problem = None, [""]
    if ranks.is_main:
        try:
            result = action()
        except ValueError as error:
            problem = [str(error)]
    if ranks.world_size > 1:
        dist.broadcast_object_list(problem, src=0, device=torch.device("cpu"))
    if problem[0]:
        raise ValueError(problem[0])
    return result


class DeviceError(RuntimeError):
    """A known failure of a device or of the communication between ranks, with its remedy in one line."""


class LostConnection(DeviceError):
    """This rank was cut off from the others: never the first thing that went wrong."""


class NeedsRestart(Exception):
    """torch_npu is loaded, no NPU is visible and the run falls back to cpu or cuda: start again without torch_npu."""


def restart_without_npu():
    """Run this program again, from its first line, without torch_npu."""
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})


def available(kind):
    """How many devices of this kind are visible: cuda or npu."""
    module = getattr(torch, kind, None)
    return module.device_count() if module is not None and module.is_available() else 0


def choose(asked, local_rank=0, local_world=1):
    """The torch.device of --device: npu, cuda (gpu), cpu, auto (npu, else cuda, else cpu), or one card as npu:3.

    Raises ValueError for a device that is not there.
    """
    name, _, index = asked.partition(":")
    name = {"gpu": "cuda", "gp": "cuda"}.get(name, name)
    if name not in ("npu", "cuda", "cpu", "auto") or (index and not index.isdigit()):
        raise ValueError(f"--device {asked}: say npu, cuda, gpu, cpu or auto, or one card as npu:3 or cuda:3")
    if name == "auto":
        name = "npu" if available("npu") else "cuda" if available("cuda") else "cpu"
    if name != "npu" and "torch_npu" in sys.modules and not available("npu"):
        raise NeedsRestart
    if name == "cpu":
        return torch.device("cpu")
    count, wanted = available(name), int(index or local_rank)
    visible = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}[name]
    if not count:
        how = "look at `npu-smi info`" if name == "npu" else "look at `nvidia-smi`"
        missing = " (torch_npu is not installed)" if name == "npu" and "torch_npu" not in sys.modules else ""
        raise ValueError(f"--device {asked}: no {name} device is visible{missing}: {how} and at {visible}, or use --device cpu")
    if index and local_world > 1:
        raise ValueError(f"--device {asked} names one card for {local_world} processes: say --device {name} "
                         f"and choose the cards with {visible}")
    if wanted >= count or local_world > count:
        ask = f"card {wanted}" if index else f"{local_world} processes"
        raise ValueError(f"{ask} on this machine, but only {count} {name} device{'s are' if count > 1 else ' is'} "
                         f"visible: start fewer (--nproc), or look at {visible}")
    return torch.device(name, wanted)


def environment():
    """What torchrun says of the processes: {RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE}; of several MASTER_PORT too.

    Raises ValueError for what cannot be: ranks that wait for one that does not exist wait for ever.
    """
    how = "torchrun sets it (torchrun --nproc_per_node=8 main.py ...); unset it for one process"
    values = {}
    for name, default in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_PORT=29500).items():
        text = os.environ.get(name) or str(default)
        if name == "MASTER_PORT" and values["WORLD_SIZE"] == 1:
            continue  # nobody asks for it
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ValueError(f"{name}={text!r} is not a whole number: {how}")
        values[name] = int(text)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if values[size] < 1:
            raise ValueError(f"{size}=0, and a training is one process at least: {how}")
        if values[rank] >= values[size] and (os.environ.get(size) or rank == "RANK"):
            raise ValueError(f"{rank}={values[rank]} is none of {values[size]} ({size}), which count from 0: {how}")
    if values["WORLD_SIZE"] > 1:
        if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise ValueError(f"WORLD_SIZE={values['WORLD_SIZE']}, but there is no {' and no '.join(missing)}: torchrun sets them all "
                             "(torchrun --nproc_per_node=8 main.py ...); unset WORLD_SIZE for one process")
        if not 0 < values["MASTER_PORT"] < 2**16:
            raise ValueError(f"MASTER_PORT={values['MASTER_PORT']} is no port: a number from 1 to 65535")
    return values


def rendezvous(rank, world_size):
    """The store through which the ranks find each other. Raises DeviceError where they do not in MASTER_TIMEOUT seconds (300)."""
    text = os.environ.get("MASTER_TIMEOUT") or "300"
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
        raise ValueError(f"MASTER_TIMEOUT={text!r} is not a number of seconds")
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # else this process is who the others ask
        reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(text))
    store, *_ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=int(text))))
    store.set_timeout(timedelta(minutes=30))  # torch's own, for what comes later
    return dist.PrefixStore("default_pg", store)


def reach(host, port, seconds, clock=time.monotonic, sleep=time.sleep):
    """Wait until something answers at host:port: torch's own wait fills the log with traces, and does not say why."""
    start, said = clock(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host at all
            reason = getattr(error, "strerror", None) or str(error)
        waited = clock() - start
        if waited >= seconds:
            raise DeviceError(f"nothing answers at {host}:{port} ({reason}), where MASTER_ADDR and MASTER_PORT say rank 0 is: is it the "
                              f"right machine, and does rank 0 run? (MASTER_TIMEOUT={seconds} seconds are over)")
        if waited > 5 and not said:  # rank 0 may be a little later
            print(f"waiting {seconds} seconds at most for rank 0 at {host}:{port} ({reason})", file=sys.stderr, flush=True)
            said = True
        sleep(min(1.0, seconds - waited))


def init_distributed_mode(asked="auto"):
    """Choose this process's device, set it up and join the others that torchrun started. -> Ranks

    Host tensors are reduced by gloo and device tensors by NCCL or HCCL, in one process group.
    """
    env = environment()
    device = choose(asked, env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    elif device.type == "npu":
        torch.npu.set_device(device)  # before the process group
        torch.npu.set_compile_mode(jit_compile=False)  # both before the first tensor; True by default on 910A
        torch.npu.config.allow_internal_format = False
    if env["WORLD_SIZE"] > 1:
        own = {"cuda": "nccl", "npu": "hccl"}.get(device.type)
        try:
            dist.init_process_group(f"cpu:gloo,{device.type}:{own}" if own else "gloo", device_id=device if own else None,
                                    store=rendezvous(env["RANK"], env["WORLD_SIZE"]), rank=env["RANK"], world_size=env["WORLD_SIZE"])
        except Exception as error:
            raise explain(error) from error
    return Ranks(device, env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"])


def open_store(ranks, name):
    """A store of the ranks for something of its own, on its own connection: the process group's is taken while it waits for others.
    None for one rank."""
    if ranks.world_size == 1:
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                          timeout=timedelta(seconds=30))
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def leave_the_others():
    """End the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        # gloo's thread may still wait for the interpreter, to free what it reduced last, and the group's end waits for the thread:
        # for ever in torch 2.7, which keeps the interpreter locked. Gloo's own object lets go of it, so that must be the last to end.
        gloo = dist.group.WORLD._get_backend(torch.device("cpu"))
        dist.destroy_process_group()
        del gloo


# What the store and gloo say on a rank whose peer, or torchrun's own process, has ended
LOST_CONNECTION = ("connection reset by peer", "connection closed by peer", "connection was likely closed", "broken pipe",
                   "recvvalue failed", "failed to recv, got 0 bytes", "recvbytes", "sendbytes")


def explain(error):
    """The error itself, or a DeviceError that says in one line what a known failure means.

    A ValueError says itself what is wrong, and may quote a file's name that sounds like one of these.
    """
    if isinstance(error, (ValueError, ArithmeticError, DeviceError)):
        return error
    text = f"{error}\n{error.__cause__ or ''}".lower()  # torch says only in the cause which signal ended a loader's worker
    text = "std::bad_alloc" if isinstance(error, MemoryError) else text
    if isinstance(error, RuntimeError) and os.environ.get("WORLD_SIZE", "1") != "1" and any(sign in text for sign in LOST_CONNECTION):
        return LostConnection("the connection to the other ranks was lost: one of them has ended, and said why, or was killed")
    remedy = next((remedy for sign, remedy in known_failures().items() if sign.lower() in text), None)
    if remedy and (worker := re.search(r"dataloader worker \(pid (\d+)\)", text)):
        remedy = remedy.replace("a loader worker", f"a loader worker (process {worker[1]})")
    return error if remedy is None else DeviceError(remedy)


def known_failures():
    """What torch, NCCL, HCCL, gloo and the system say, and what it means: the first that fits, so the closer one first."""
    port = os.environ.get("MASTER_PORT", "29500")
    master = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{port}"
    memory = "the device is out of memory: use a smaller --batch-size (and --accum-steps), or --grad-checkpointing"
    shared_memory = ("the loader workers are out of shared memory (/dev/shm): give the container more (docker run --shm-size=32g, or "
                     "--ipc=host), or use fewer --num_workers or a smaller --batch-size")
    open_files = "too many open files: raise the limit (ulimit -n 65536), or use fewer --num_workers"
    host_memory = "this machine is out of memory: use a smaller --batch-size or --input-size, or fewer --num_workers"
    name = ("the name of a machine cannot be resolved: look at MASTER_ADDR and /etc/hosts; every machine must know its own name "
            "(getent hosts $(hostname)), or say the network's address as MASTER_ADDR")
    network = "the ranks cannot reach each other: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between them (see: ip addr)"
    nccl = "NCCL failed between the GPUs: look for a rank that ended in the log above; NCCL_DEBUG=INFO before the start says why"
    late = "a rank waited too long for another: look for one that died, or does something else for long, in the log above"
    driver = "the NVIDIA driver is older than this torch's CUDA: update it, or install torch for an older CUDA"
    return {
        "EADDRINUSE": f"port {port} is in use: another run has it; set MASTER_PORT to a free one",
        "address already in use": f"port {port} is in use: another run has it; set MASTER_PORT to a free one",
        "clients joined": f"not every rank came to {master} in time (MASTER_TIMEOUT seconds): look for one that died, and "
                          "whether MASTER_ADDR is the machine of rank 0",
        "while trying to connect to": f"rank 0 cannot be reached at {master}: look at MASTER_ADDR and MASTER_PORT, and whether it runs",
        "Name or service not known": name,
        "nodename nor servname": name,
        "Temporary failure in name resolution": name,
        "No address associated with hostname": name,
        "cannot be retrieved (gai error": name,
        "Unable to resolve hostname": name,
        "Unable to find address for": network,
        "Unable to find interface": network,
        "No route to host": network,
        "Network is unreachable": network,
        "Connection refused": f"a rank refused the connection (rank 0 is at {master}): look for one that ended in the log above",
        "Duplicate GPU detected": "two ranks compute on the same GPU: LOCAL_RANK picks it, and torchrun sets it",
        "Watchdog caught collective operation timeout": late,
        "Timed out waiting": late,
        "wait timeout after": late,
        "ncclSystemError": nccl,
        "ncclRemoteError": nccl,
        "ncclInternalError": nccl,
        "ncclUnhandledCudaError": nccl,
        "EI0006": "HCCL: the ranks did not find each other in time (EI0006): look for a rank that died or is late in "
                  "the log above; HCCL_CONNECT_TIMEOUT is the limit in seconds",
        "EI0002": "HCCL: a rank waited too long for another (EI0002): look for a rank that died in the log above; "
                  "HCCL_EXEC_TIMEOUT is the limit in seconds",
        "signal: Bus error": shared_memory,
        "unable to allocate shared memory": shared_memory,
        "unable to write to file </torch_": shared_memory,
        "insufficient shared memory": shared_memory,
        "too many open files": open_files,
        "received 0 items of ancdata": open_files,
        "signal: Killed": "the system ended a loader worker, most likely for its memory: use fewer --num_workers",
        "CUDA out of memory": memory,
        "NPU out of memory": memory,
        "CUBLAS_STATUS_ALLOC_FAILED": memory,
        "DefaultCPUAllocator": host_memory,
        "Cannot allocate memory": host_memory,
        "std::bad_alloc": host_memory,
        "no kernel image is available": "this torch has no code for this GPU: install the build of torch that supports it",
        "driver on your system is too old": driver,
        "driver version is insufficient": driver,
        "device-side assert": "a kernel on the GPU stopped, most often for a class number that the model has not: CUDA_LAUNCH_BLOCKING=1 "
                              "before the start, or --device cpu, shows where",
        "uncorrectable ECC": "the GPU's memory is damaged (ECC): look at `nvidia-smi`, and take another card",
        "fallen off the bus": "the GPU is gone: look at `nvidia-smi` and `dmesg`, and take another card",
        "No NPUs are available": "no NPU is visible: look at `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES, or use "
                                 "--device cpu",
    }


def set_tensor_float(device, fp32, hf32):
    """--fp32: no TF32 or HF32 anywhere; --hf32: in convolutions and products; neither: the device's own defaults."""
    if not fp32 and not hf32:
        return
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = hf32
    elif device.type == "npu":
        torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = hf32


def seed_everything(seed):
    """Seed Python, NumPy and torch, on the host and on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def synchronize(device):
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def max_memory(device):
    """Largest memory so far in MB: the device's, or on a CPU this process's."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def describe(device):
    """The device in words, for the log."""
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{device} ({torch.get_device_module(device).get_device_name(device)})"


def pins_memory(device):
    return device.type != "cpu"


def worker_start_method(device):
    """How loader workers start. A process that has touched an NPU must not fork: a server without torch_npu does it."""
    if device.type != "npu":
        return None
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # read by `import torch` in the server; here it is past
    # Preloaded, or each worker would import torch for itself. The server looks in the working directory first, and then in
    # PYTHONPATH: a name that only we have finds our folder, and that the modules in it.
    here = os.path.dirname(os.path.abspath(__file__))
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, places)])
    multiprocessing.set_forkserver_preload(["twins_worker"])
    return "forkserver"


def parallel(model, device, flat_gradients=False, share_buffers=False):
    """DistributedDataParallel over the process group. flat_gradients: the optimizer keeps gradients in its own buffer. share_buffers: each
    update begins with the first rank's buffers, on all of them."""
    ids = None if device.type == "cpu" else [device.index]
    with warnings.catch_warnings():  # torch 2.14 renames broadcast_buffers; 2.7 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=share_buffers,
                                       gradient_as_bucket_view=device.type != "npu" and not flat_gradients)
