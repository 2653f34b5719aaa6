"""What does a user of NPUs read when something is wrong? One line with its remedy, from main.py and from the scripts."""

import os
import socket
import subprocess
import sys

import pytest

pytest.register_assert_rewrite("helpers")

# isort: split

import helpers
from helpers import ROOT, host, one_error, run_script, usual

pytest_plugins = ["helpers"]
QUICK = ["--epochs=1", "--max_step=2", "--no-eval", "--batch-size=2"]
SIMULATOR = ("PYTHONPATH", "LD_LIBRARY_PATH", "NPU_SIM", "NPU_SIM_SOC", "ASCEND_HOME_PATH", "ASCEND_OPP_PATH")
NO_CANN = ("torch_npu finds no CANN: source /usr/local/Ascend/ascend-toolkit/set_env.sh (CANN 8.5 and later: "
           "/usr/local/Ascend/cann/set_env.sh), or train without an NPU: --device cpu")


@pytest.fixture
def without_cann(real):
    if real:
        pytest.skip("this machine has CANN")
    return dict.fromkeys(SIMULATOR)


@pytest.fixture
def taken():
    """A port that somebody uses."""
    with socket.socket() as somebody:
        somebody.bind(("", 0))
        somebody.listen()
        yield somebody.getsockname()[1]


def rank_of_two(rank, port, **env):
    """The environment of one of two ranks, each started by hand."""
    return helpers.clean({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **env})


@pytest.mark.parametrize("words", [[], ["--device=npu"]], ids=["auto", "npu"])
def test_no_cann(few, without_cann, words):
    done = helpers.start(*usual(few, *QUICK, *words), on=[], **without_cann)
    assert done.returncode != 0 and one_error(done.stderr) == f"error: {NO_CANN}"


def test_the_cpu_needs_no_cann(few, without_cann):
    without_cann.pop("PYTHONPATH")  # where the simulator keeps torchvision importable beside a CPU-only torch
    done = helpers.works(*usual(few, *QUICK, "--device=cpu"), on=[], **without_cann)
    assert helpers.setting(done.stdout, "device").startswith("cpu (")


def test_torch_and_torch_npu_that_do_not_pair(few, tmp_path):
    """As torch_npu for another torch fails: in its own import, at a symbol that is not there."""
    package = helpers.write_package(tmp_path, {
        "torch_npu/__init__.py": "import torch_npu._C\n\ndef _autoload():\n    pass\n",
        "torch_npu/_C.py": "raise ImportError('libtorch_npu.so: undefined symbol: _ZN3c1021throwNullDataPtrErrorEv')\n"})
    done = helpers.start(*usual(few, *QUICK), PYTHONPATH=helpers.python_path(package))
    assert done.returncode != 0
    line = one_error(done.stderr)
    assert line.startswith("error: torch_npu does not load (") and "undefined symbol" in line
    assert line.endswith("torch and torch_npu must have the same version and torch must be a CPU-only build; or train without an NPU: "
                         "--device cpu")


def test_the_port_is_in_use(few, taken):
    helpers.needs(2)
    done = helpers.run_program(sys.executable, ROOT / "main.py", *usual(few, *QUICK), **rank_of_two(0, taken))
    assert done.returncode == 1
    assert one_error(done.stderr) == f"error: port {taken} is in use: another run has it; set MASTER_PORT to a free one"


@pytest.fixture
def start_rank(tmp_path):
    """start_rank(rank, port, command, **env) -> Popen of one of two ranks; none outlives the test"""
    started = []

    def start(rank, port, *command, **env):
        merged = {**os.environ, "OMP_NUM_THREADS": "1", **rank_of_two(rank, port, **env)}
        started.append(subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env={k: v for k, v in merged.items() if v is not None}))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def free_port():
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        return somebody.getsockname()[1]


def test_a_rank_that_ends_early_lets_hccl_time_out(few, start_rank, free_port):
    """Ranks that run another number of steps: what one waits for never comes."""
    helpers.needs(2)
    words = [sys.executable, ROOT / "main.py", *usual(few, "--epochs=1", "--no-eval", "--batch-size=2"), "--print-freq=1"]
    limits = {"HCCL_EXEC_TIMEOUT": "3", "HCCL_ASYNC_ERROR_HANDLING": "0"}  # 0: torch_npu's watchdog does not abort the process
    start_rank(1, free_port, *words, "--max_step=1", **limits)
    long = start_rank(0, free_port, *words, "--max_step=3", **limits)
    _, err = long.communicate(timeout=300)
    assert long.returncode == 1
    assert one_error(err) == ("error: HCCL: a rank waited too long for another (EI0002): look for a rank that died in the log above; "
                              "HCCL_EXEC_TIMEOUT is the limit in seconds")


ABSENT = """
import sys, torch, torch.distributed as dist
torch.npu.set_device(1)
dist.init_process_group("cpu:gloo,npu:hccl")
dist.broadcast_object_list([None], src=0, device=torch.device("cpu"))  # whether the first rank's output folder can be used
sys.stdin.read()
"""


def test_a_rank_that_does_not_join_lets_hccl_time_out(few, start_rank, free_port):
    helpers.needs(2)
    start_rank(1, free_port, sys.executable, "-c", ABSENT)
    rank = start_rank(0, free_port, sys.executable, ROOT / "main.py", *usual(few, *QUICK), HCCL_CONNECT_TIMEOUT="3")
    _, err = rank.communicate(timeout=300)
    assert rank.returncode == 1
    assert one_error(err) == ("error: HCCL: the ranks did not find each other in time (EI0006): look for a rank that died or is late in "
                              "the log above; HCCL_CONNECT_TIMEOUT is the limit in seconds")


# ---- the scripts ----

def shown(done):
    """What a script writes to standard error by itself."""
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stderr


OPTIONS = ["--batch_size=2", "--max_step=2", "--epochs=1", "--input-size=32", "--workers=0", "--model=test_convnext"]


def test_no_cann_for_a_script(repo, few, without_cann, tmp_path):
    done = run_script(repo, "performance_1p", f"--data_path={few}", *OPTIONS, "--device=npu", on=[], HOME=str(tmp_path), **without_cann)
    assert "set_env.sh" in shown(done) and "--device=cpu" in done.stderr


def one_line(repo, done, status=2):
    """The line of main.py that a script shows again at its end; main.py has said nothing else."""
    assert done.returncode == status
    line = one_error((repo / "test/output/0/train_0.log").read_text())
    assert line in shown(done).splitlines()
    return line


def test_no_npu_is_visible(repo, few):
    done = run_script(repo, "performance_1p", f"--data_path={few}", *OPTIONS, "--device=npu", on=host(npus=0))
    assert one_line(repo, done) == ("error: --device npu: no npu device is visible: look at `npu-smi info` and at "
                                    "ASCEND_RT_VISIBLE_DEVICES, or use --device cpu")


def test_more_ranks_than_npus(repo, few):
    done = run_script(repo, "performance_8p", f"--data_path={few}", *OPTIONS, "--nproc=4", on=host(npus=2))
    assert one_line(repo, done) == ("error: 4 processes on this machine, but only 2 npu devices are visible: start fewer (--nproc), "
                                    "or look at ASCEND_RT_VISIBLE_DEVICES")


def test_bf16_on_a_910a(repo, few):
    done = run_script(repo, "performance_1p", f"--data_path={few}", *OPTIONS, "--amp=bf16", on=host(npus=1, soc="910A"))
    assert one_line(repo, done) == "error: --amp bf16: npu:0 (Ascend910A) does not compute bfloat16: use --amp fp16"


def test_the_port_that_a_script_was_given_is_in_use(repo, few, taken):
    done = run_script(repo, "performance_1p", f"--data_path={few}", *OPTIONS, MASTER_PORT=str(taken))
    assert f"port {taken} is in use" in done.stderr and done.returncode != 0


SHORT_RANK = """
import os, sys
if os.environ.get("RANK") == "1" and sys.argv[:1] != ["-c"]:
    sys.argv += ["--max_step", "1"]
"""


def test_a_script_says_that_a_rank_was_waited_for(repo, few, tmp_path):
    """With its watchdog, torch_npu may abort the process before main.py speaks: then the script says it."""
    package = helpers.write_package(tmp_path, {"sitecustomize.py": SHORT_RANK})
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(package)])  # the simulator's sitecustomize runs this one, too
    done = run_script(repo, "performance_8p", f"--data_path={few}", *OPTIONS, "--nproc=2", "--no-eval", "--print-freq=1",
                      PYTHONPATH=path, HCCL_EXEC_TIMEOUT="3")
    assert "EI0002" in shown(done) and ("HCCL_EXEC_TIMEOUT" in done.stderr or "a rank did not answer in time" in done.stderr)
