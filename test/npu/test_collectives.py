"""Does every collective give what its definition says, on 2, 3 and 8 ranks, and end when a rank does not come?"""

import json
import os
import pathlib
import subprocess
import sys

import collectives_worker
import pytest
import torch
from programs import torchrun

HERE = pathlib.Path(__file__).parent
DEAD = """
import os, torch, torch.distributed as dist
rank = int(os.environ["RANK"])
torch.npu.set_device(rank)
dist.init_process_group("hccl")
x = torch.ones(5, device="npu")
dist.all_reduce(x)
if rank == 0:
    try:
        dist.all_reduce(x)
    except RuntimeError as e:
        print(e, flush=True)
os._exit(0)
"""
# The same below torch: a rank is a process that calls the library.
RANK = """
import ctypes, sys
lib, (case, info, rank) = ctypes.CDLL("libhccl.so"), sys.argv[1:]
lib.aclGetRecentErrMsg.restype = ctypes.c_char_p
comm, x = ctypes.c_void_p(), (ctypes.c_float * 8)(*range(8))
status = lib.HcclCommInitRootInfo(2, ctypes.create_string_buffer(info.encode(), 4108), int(rank), ctypes.byref(comm))
if status == 0:
    n = 4 if case == "sizes" and rank == "1" else 8
    dtype = 10 if case == "float64" else 4
    if case == "kinds" and rank == "1":
        status = lib.HcclBroadcast(x, ctypes.c_uint64(n), dtype, 0, comm, None)
    else:
        status = lib.HcclAllReduce(x, x, ctypes.c_uint64(n), dtype, 0, comm, None)
print(status, lib.aclGetRecentErrMsg().decode())
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{ranks: {check: outcome}}, made by one torchrun a number of ranks when first asked for."""
    done = {}

    def of(ranks):
        if ranks not in done:
            if torch.npu.device_count() < ranks:
                pytest.skip(f"{torch.npu.device_count()} devices")
            path = tmp_path_factory.mktemp("collectives") / f"{ranks}.json"
            run = torchrun(ranks, HERE / "collectives_worker.py", path)
            assert path.exists(), run.stdout[-3000:] + run.stderr[-3000:]
            done[ranks] = json.loads(path.read_text())
        return done[ranks]

    return of


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("check", collectives_worker.CHECKS)
def test_collective(check, ranks, results):
    assert results(ranks)[check] == "ok"


def ranks_in_c(case, ranks, **env):
    """Outcomes [(status, message)] of `ranks` of a communicator of two, that all do what `case` says."""
    info = f"/npu_sim-test-{os.getpid()}-{case}"
    command = [sys.executable, "-S", "-c", RANK, case, info]
    env = {**os.environ, **env}
    started = [subprocess.Popen([*command, str(r)], env=env, stdout=subprocess.PIPE, text=True) for r in ranks]
    outcomes = [p.communicate()[0].strip().partition(" ") for p in started]
    return [(int(status), message) for status, _, message in outcomes]


def test_a_rank_that_never_joins(sim):
    ((status, message),) = ranks_in_c("join", [0], HCCL_CONNECT_TIMEOUT="1")
    assert status != 0
    assert message == "EI0006: simulated HCCL: rank 0 of 2 waited 1 s in joining the communicator; not there: rank 1"
    assert not any(f"test-{os.getpid()}" in name for name in os.listdir("/dev/shm"))


@pytest.mark.parametrize("case", ["kinds", "sizes"])
def test_ranks_that_disagree(sim, case):
    for status, message in ranks_in_c(case, [0, 1]):
        assert status != 0
        assert "EI0005" in message
        assert "AllReduce of 8" in message
        assert {"kinds": "Broadcast of 8", "sizes": "AllReduce of 4"}[case] in message


def test_float64_is_refused_and_counted(sim):
    for status, message in ranks_in_c("float64", [0, 1]):
        assert status != 0
        assert message == "simulated HCCL: AllReduce does not take float64"


def test_float64_is_taken_by_the_950(sim):
    assert [status for status, _ in ranks_in_c("float64", [0, 1], NPU_SIM_SOC="Ascend950PR_9599")] == [0, 0]


def test_a_rank_that_died_is_an_error_in_torch(sim, tmp_path):
    script = tmp_path / "dead.py"
    script.write_text(DEAD)
    run = torchrun(2, script, HCCL_EXEC_TIMEOUT="1")
    assert "EI0002: simulated HCCL: rank 0 of 2 waited 1 s in AllReduce; not there: rank 1" in run.stdout, run.stderr
