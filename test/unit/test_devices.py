"""What a machine computes on: the choice, its errors, precision and scalers. Devices that are not here are stand-ins."""
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import devices

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NPU = SimpleNamespace(type="npu", index=0)  # what the code reads of torch.device("npu", 0)


# ---- which device ----

@pytest.mark.parametrize("words, kind", [
    ([], "auto"), (["--device", "cpu"], "cpu"), (["--device=cuda:1"], "cuda"), (["--device", "gpu"], "cuda"), (["--device=npu:3"], "npu"),
    (["--device", "npu", "--device=cpu"], "cpu"), (["--batch-size", "4", "--device"], "")])
def test_the_device_asked_for_is_read_before_torch_is(words, kind):
    assert devices.asked_for(words) == kind


@pytest.fixture
def machine(monkeypatch):
    """machine(npu=8): a machine with so many devices."""
    def make(**counts):
        monkeypatch.setattr(devices, "available", lambda kind: counts.get(kind, 0))
        if "npu" in counts:
            monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace())
        else:
            monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        # an x86 torch makes no torch.device("npu"); the name and the index are what is tested
        monkeypatch.setattr(devices.torch, "device", lambda *words: ":".join(map(str, words)))
    return make


@pytest.mark.parametrize("here, asked, chosen", [
    ({}, "auto", "cpu"), ({"cuda": 1}, "auto", "cuda:0"), ({"cuda": 2, "npu": 1}, "auto", "npu:0"), ({"cuda": 1}, "gpu", "cuda:0"),
    ({"cuda": 1}, "cpu", "cpu"), ({"npu": 8}, "npu:3", "npu:3"), ({"cuda": 2}, "cuda:1", "cuda:1")])
def test_one_process_gets_the_device_it_asked_for(machine, here, asked, chosen):
    machine(**here)
    assert devices.choose(asked) == chosen


def test_each_of_several_processes_gets_its_own_card(machine):
    machine(npu=4)
    assert [devices.choose("auto", rank, 4) for rank in range(4)] == ["npu:0", "npu:1", "npu:2", "npu:3"]


@pytest.mark.parametrize("here, asked, rank, ranks, message", [
    ({}, "cuda", 0, 1, "--device cuda: no cuda device is visible: look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or use --device cpu"),
    ({}, "npu", 0, 1, "--device npu: no npu device is visible (torch_npu is not installed): look at `npu-smi info` and at "
                      "ASCEND_RT_VISIBLE_DEVICES, or use --device cpu"),
    ({"npu": 0}, "npu:1", 0, 1, "--device npu:1: no npu device is visible: look at `npu-smi info`"),
    ({"cuda": 1}, "cuda:1", 0, 1, "card 1 on this machine, but only 1 cuda device is visible"),
    ({"npu": 2}, "npu", 0, 8, "8 processes on this machine, but only 2 npu devices are visible: start fewer (--nproc)"),
    ({"npu": 8}, "npu:3", 0, 2, "--device npu:3 names one card for 2 processes: say --device npu and choose the cards with "
                                "ASCEND_RT_VISIBLE_DEVICES"),
    ({}, "tpu", 0, 1, "--device tpu: say npu, cuda, gpu, cpu or auto, or one card as npu:3 or cuda:3"),
    ({"npu": 8}, "npu:x", 0, 1, "--device npu:x: say npu, cuda, gpu, cpu or auto")])
def test_a_device_that_is_not_there_is_one_line_with_the_remedy(machine, here, asked, rank, ranks, message):
    machine(**here)
    with pytest.raises(ValueError) as error:
        devices.choose(asked, rank, ranks)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("asked", ["cpu", "cuda", "auto"])
def test_torch_npu_without_an_npu_makes_the_run_start_again_without_it(machine, asked):
    machine(npu=0, cuda=1)
    with pytest.raises(devices.NeedsRestart):
        devices.choose(asked)


def test_one_process_joins_nobody(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = devices.init_distributed_mode("cpu")
    assert (ranks.device, ranks.rank, ranks.world_size, ranks.is_main) == (CPU, 0, 1, True)
    assert not torch.distributed.is_initialized()


# ---- what went wrong ----

@pytest.mark.parametrize("message, remedy", [
    ("The server socket has failed to listen (EADDRINUSE)", "port 29712 is in use: another run has it; set MASTER_PORT"),
    ("bind: Address already in use", "port 29712 is in use"),
    ("EI0006: Getting socket times out", "the ranks did not find each other in time (EI0006)"),
    ("[ERROR] EI0002 notify wait", "a rank waited too long for another (EI0002)"),
    ("CUDA out of memory. Tried to allocate", "use a smaller --batch-size (and --accum-steps), or --grad-checkpointing"),
    ("NPU out of memory. Tried", "the device is out of memory"),
    ("RuntimeError: No NPUs are available", "no NPU is visible: look at `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES")])
def test_a_known_failure_is_said_with_its_remedy(monkeypatch, message, remedy):
    monkeypatch.setenv("MASTER_PORT", "29712")
    told = devices.explain(RuntimeError(message))
    assert isinstance(told, devices.DeviceError) and remedy in str(told) and "\n" not in str(told)


def test_an_unknown_failure_stays_what_it_is():
    error = RuntimeError("shapes differ")
    assert devices.explain(error) is error


@pytest.fixture(scope="module")
def broken_backend(tmp_path_factory):
    """A torch_npu that torch loads by itself and that finds no CANN."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "torch_npu-0.dist-info").mkdir()
    (folder / "torch_npu-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 0\n")
    (folder / "torch_npu-0.dist-info" / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (folder / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    return folder


def import_devices(folder, *argv):
    program = f"import sys; sys.argv = ['main.py', *{argv!r}]; import devices; print('loaded')"
    env = {key: value for key, value in os.environ.items() if key != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env | {"PYTHONPATH": str(folder)}, capture_output=True,
                          text=True, timeout=120)


def test_a_run_on_a_cpu_does_not_load_torch_npu(broken_backend):
    done = import_devices(broken_backend, "--device", "cpu")
    assert done.stdout == "loaded\n", done.stderr


def test_a_torch_npu_that_does_not_load_ends_a_run_with_one_line(broken_backend, run_main):
    done = run_main("--data-path", "data", env={"PYTHONPATH": str(broken_backend)})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["error: torch_npu finds no CANN: source /usr/local/Ascend/ascend-toolkit/set_env.sh (CANN 8.5 and "
                                        "later: /usr/local/Ascend/cann/set_env.sh), or train without an NPU: --device cpu"]


# ---- small things ----

def test_a_seed_decides_what_python_numpy_and_torch_draw():
    import random

    import numpy

    def draws(seed):
        devices.seed_everything(seed)
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    assert draws(5) == draws(5)
    assert not set(draws(5)) & set(draws(6))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_parallel_on_a_cpu_leaves_buffers_alone_and_warns_of_nothing(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = devices.parallel(nn.Linear(2, 1), CPU)
        assert model.device_ids is None and not model.broadcast_buffers and model.gradient_as_bucket_view
        assert not devices.parallel(nn.Linear(2, 1), CPU, flat_gradients=True).gradient_as_bucket_view
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fp32, hf32, allowed", [(True, False, False), (False, True, True), (False, False, "as before")])
def test_fp32_and_hf32_set_the_products_of_a_gpu(monkeypatch, fp32, hf32, allowed):
    matmul, cudnn = SimpleNamespace(allow_tf32="as before"), SimpleNamespace(allow_tf32="as before")
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    devices.set_tensor_float(torch.device("cuda", 0), fp32, hf32)
    assert matmul.allow_tf32 == cudnn.allow_tf32 == allowed



# ---- finding each other ----

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MASTER_TIMEOUT",
            "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture
def surroundings(monkeypatch):
    def put(words):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for word in words.split():
            monkeypatch.setenv(*word.split("="))
    return put


@pytest.mark.parametrize("words, said", [
    ("RANK=5 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1", "RANK=5 is none of 2 (WORLD_SIZE), which count from 0"),
    ("RANK=1", "RANK=1 is none of 1 (WORLD_SIZE)"),
    ("RANK=2 WORLD_SIZE=2", "RANK=2 is none of 2 (WORLD_SIZE)"),
    ("RANK=-1 WORLD_SIZE=2", "RANK='-1' is not a whole number"),
    ("RANK=one WORLD_SIZE=2", "RANK='one' is not a whole number"),
    ("RANK=²", "RANK='²' is not a whole number"),
    ("WORLD_SIZE=0", "WORLD_SIZE=0, and a training is one process at least"),
    ("WORLD_SIZE=2.5", "WORLD_SIZE='2.5' is not a whole number"),
    ("WORLD_SIZE=99999999999999999999", "WORLD_SIZE='99999999999999999999' is not a whole number"),
    ("WORLD_SIZE=2", "WORLD_SIZE=2, but there is no RANK and no MASTER_ADDR and no MASTER_PORT"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x", "WORLD_SIZE=2, but there is no MASTER_PORT"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=abc", "MASTER_PORT='abc' is not a whole number"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=0", "MASTER_PORT=0 is no port"),
    ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=65536", "MASTER_PORT=65536 is no port"),
    ("LOCAL_RANK=x", "LOCAL_RANK='x' is not a whole number"),
    ("LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK=2 is none of 2 (LOCAL_WORLD_SIZE)"),
    ("LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE=0, and"),
])
def test_processes_that_cannot_be_are_said_before_anybody_waits(surroundings, words, said):
    surroundings(words)
    with pytest.raises(ValueError, match=r"torchrun|port") as caught:
        devices.init_distributed_mode("cpu")
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize("words, rank, world, local", [
    ("", 0, 1, 0), ("WORLD_SIZE=1", 0, 1, 0), ("RANK= WORLD_SIZE=", 0, 1, 0), ("MASTER_PORT=abc", 0, 1, 0),
    ("MASTER_ADDR=nowhere MASTER_PORT=0", 0, 1, 0),
    ("RANK=3 WORLD_SIZE=8 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=29500", 3, 8, 3),
    ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=29500", 1, 2, 1)])
def test_processes_that_can_be(surroundings, words, rank, world, local):
    surroundings(words)
    found = devices.environment()
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == (rank, world, local)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds + 1e-3


@pytest.mark.parametrize("host, reason", [
    ("127.0.0.1", "refused"), ("no-such-host.invalid", "nown|resolution|hostname"), ("a..b", "label|nown"), ("x" * 80 + ".y", "long|nown")])
def test_an_unreachable_rank_0_is_said_soon_and_ends_in_time(capsys, host, reason):
    clock = Clock()
    with pytest.raises(devices.DeviceError, match=f"nothing answers at {host}:1 .*({reason}).*MASTER_TIMEOUT=7"):
        devices.reach(host, 1, 7, clock, clock.sleep)
    assert 7 <= clock.now < 9
    said = capsys.readouterr().err
    assert said.startswith(f"waiting 7 seconds at most for rank 0 at {host}:1 (") and said.count("\n") == 1


def test_a_rank_0_that_comes_late_is_found():
    clock = Clock()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))

        def sleep(seconds):
            clock.sleep(seconds)
            if clock.now > 3:
                server.listen()

        devices.reach("127.0.0.1", server.getsockname()[1], 60, clock, sleep)
    assert 3 < clock.now < 10


def test_an_unreachable_rank_0_through_the_command_line(run_main):
    done = run_main("--data-path=x", "--device=cpu", env=dict(
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", MASTER_TIMEOUT="1"), timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: nothing answers at 127.0.0.1:1 (") and done.stderr.count("\n") == 1


def test_a_wrong_rank_through_the_command_line(run_main):
    done = run_main("--data-path=x", "--device=cpu", env=dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="nonsense"), timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error (rank 0): LOCAL_RANK='nonsense' is not a whole number: torchrun") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("message, remedy", [
    ("The client socket has timed out after 3000ms while trying to connect to (a, 1).", "rank 0 cannot be reached at node7:29712"),
    ("Timed out after 4 seconds waiting for clients. 1/2 clients joined.", "not every rank came to node7:29712"),
    ("The IPv6 network addresses of (a, 1) cannot be retrieved (gai error: -2 - Name or service not known).", "cannot be resolved"),
    ("[/pytorch/third_party/gloo] rv: getaddrinfo: Temporary failure in name resolution", "cannot be resolved"),
    ("[enforce fail at gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find address for: ib0", "GLOO_SOCKET_IFNAME"),
    ("[gloo/transport/tcp/pair.cc:144] no error: Connection refused", "look for one that ended"),
    ("[gloo] Timed out waiting 1800000ms for recv operation to complete", "a rank waited too long for another"),
    ("NCCL error in: NCCLUtils.cpp:77, ncclInvalidUsage. Duplicate GPU detected : rank 0 and rank 1 both on CUDA device", "LOCAL_RANK"),
    ("NCCL error: unhandled system error, ncclSystemError: System call failed", "NCCL_DEBUG=INFO"),
    ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.", "out of memory"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out of memory"),
    ("CUDA error: no kernel image is available for execution on the device", "the build of torch"),
    ("The NVIDIA driver on your system is too old (found version 11040).", "update it"),
    ("CUDA error: device-side assert triggered", "class number"),
])
def test_more_known_failures(monkeypatch, message, remedy):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "29712")
    told = devices.explain(RuntimeError(f"{message}\nException raised from somewhere\nframe #0"))
    assert isinstance(told, devices.DeviceError) and remedy in str(told) and "\n" not in str(told)
    said = ValueError(f"there is no folder '{message}'")
    assert devices.explain(said) is said, "a name that sounds like a failure"


def test_no_memory_left_for_python():
    assert "this machine is out of memory" in str(devices.explain(MemoryError()))
