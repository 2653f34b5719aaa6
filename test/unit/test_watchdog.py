"""Ranks, workers and launchers that end or stop: who says it, and do the others end?"""
import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ELASTIC, ROOT

import devices
import main
import watchdog

RANKS = ["--device=cpu", "--model=test_convnext", "--input-size=32", "--batch-size=2", "--epochs=100000", "--print-freq=1", "--no-eval"]


def follow(monkeypatch, parents, **environment):
    """follow_launcher with such parents, one at each look. -> what it did, in order"""
    done, parents = [], iter(parents)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "kill", lambda pid, number: done.append((pid == os.getpid(), number)))
    thread = watchdog.follow_launcher(lambda status: done.append(status), parent=7, sleep=lambda seconds: done.append(f"{seconds} s"))
    if thread is not None:
        thread.join()
    return done


def test_a_rank_without_its_launcher_stops_as_at_a_signal_and_ends_at_last(monkeypatch, capfd):
    done = follow(monkeypatch, [7, 7, 1], TORCHELASTIC_RUN_ID="none", LOCAL_RANK="0")
    assert done == ["0.5 s", "0.5 s", (True, signal.SIGTERM), "20.0 s", 143]
    assert capfd.readouterr().err == ("error: torchrun (process 7) has ended before its ranks, most likely killed: they finish this update "
                                      "and stop\n")
    assert follow(monkeypatch, [1], TORCHELASTIC_RUN_ID="none", LOCAL_RANK="1")[0] == (True, signal.SIGTERM)
    assert capfd.readouterr().err == ""  # one of a machine says it


def test_a_rank_outlives_a_shell_that_started_it(monkeypatch):
    assert follow(monkeypatch, []) == []


@pytest.mark.parametrize("training", [False, True])
def test_a_lost_connection_is_said_last_also_in_training(monkeypatch, capsys, training):
    """The rank that knows why says it first, and torchrun then ends this one."""
    waited = []
    monkeypatch.setattr(main.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    assert main.complain(devices.LostConnection("lost"), training) == 1
    assert waited == [(10, "")] and capsys.readouterr().err == "error: lost\n"


class Launched:
    """torchrun with two ranks and a worker each, in their first epoch. ranks, workers: {rank's process: its worker's}"""

    def __init__(self, process, log):
        self.process, self.log = process, log
        self.ranks = children(process.pid)
        self.workers = {rank: children(rank)[0] for rank in self.ranks}

    def left(self):
        """Its processes that live."""
        return alive() & {self.process.pid, *self.ranks, *self.workers.values()}

    def said(self):
        return self.log.read_text()

    def errors(self):
        return [line for line in self.said().splitlines() if line.startswith("error")]


def table():
    """-> (pid, parent) of the processes that live"""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    return [(int(pid), int(parent)) for pid, parent, state in map(str.split, listed.splitlines()) if not state.startswith("Z")]


def alive():
    return {pid for pid, _ in table()}


def children(pid):
    return sorted(child for child, parent in table() if parent == pid)


def wait_for(condition, process=None, seconds=120):
    """Until it is so: a limit of patience, and of what is promised."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (process is None or process.poll() is None)
        time.sleep(0.1)


@pytest.fixture
def launched(tiny_folder, tmp_path):
    """launched(*words) -> Launched"""
    running = []

    def start(*words):
        log = tmp_path / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py", *RANKS,
                   "--data-path", tiny_folder, "--num_workers=1", "--output_dir", tmp_path / "run", *words]
        env = {key: value for key, value in os.environ.items() if key not in ELASTIC} | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(log, "w") as file:
            process = subprocess.Popen([*map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=env)
        wait_for(lambda: "Epoch: [0]  [2" in log.read_text(), process)
        running.append(Launched(process, log))
        return running[-1]
    yield start
    for run in running:
        for pid in run.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait()


def test_ranks_and_workers_end_saved_where_torchrun_is_killed(launched, tmp_path):
    run = launched()
    run.process.kill()
    run.process.wait()
    wait_for(lambda: not run.left(), seconds=30)
    assert len(run.errors()) == 1 and f"torchrun (process {run.process.pid}) has ended before its ranks" in run.errors()[0]
    assert "Stopped in epoch" in run.said() and (tmp_path / "run" / "checkpoint.pth").is_file()
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_others_end_where_a_rank_is_killed_and_torchrun_names_it(launched):
    run = launched()
    os.kill(run.ranks[1], signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    wait_for(lambda: not run.left(), seconds=30)
    assert f"exitcode  : -9 (pid: {run.ranks[1]})" in run.said() and "main.py\", line" not in run.said()


def test_a_killed_worker_ends_all_with_a_line_that_names_it(launched):
    run = launched()
    worker = run.workers[run.ranks[1]]
    os.kill(worker, signal.SIGKILL)
    assert run.process.wait(timeout=60) == 1
    wait_for(lambda: not run.left(), seconds=30)
    assert len(run.errors()) == 1 and f"ended a loader worker (process {worker})" in run.errors()[0]
