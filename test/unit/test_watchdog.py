"""Ranks, workers and launchers that end or stop: who says it, and do the others end?"""
import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ELASTIC, ROOT
from torch.distributed import HashStore

import complaint
import devices
import engine
import watchdog
from precision import make_precision

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
    monkeypatch.setattr(complaint.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    assert complaint.complain(devices.LostConnection("lost"), training) == 1
    assert waited == [(10, "")] and capsys.readouterr().err == "error: lost\n"


class World:
    """Ranks that poll in turn, by a clock of the test. stopped: ranks that do not"""

    def __init__(self, monkeypatch, ranks, seconds=40.0):
        self.time, self.said, self.ended, self.stopped, store = 0.0, [], [], set(), HashStore()
        monkeypatch.setattr(watchdog, "tell", self.said.append)
        monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda file: self.said.append("stacks"))
        self.ranks = [watchdog.Watch(seconds, rank, ranks, store if ranks > 1 else None, lambda status, rank=rank: self.end(rank, status),
                                     lambda: self.time) for rank in range(ranks)]
        self.poll()

    def end(self, rank, status):
        self.ended.append((rank, status, self.time))
        self.stopped.add(rank)

    def poll(self):
        for rank, watch in enumerate(self.ranks):
            if rank not in self.stopped:
                watch.poll()

    def go_on(self, seconds, work=lambda: None):
        for _ in range(int(seconds / 4)):
            self.time += 4
            work()
            self.poll()

    def begin(self, epoch=3):
        """All have done an iteration."""
        for watch in self.ranks:
            watch.epoch = epoch
            for step in (0, 1):
                watch.mark(watchdog.LOADING, step)
            watch.mark(watchdog.STEP, 1)
        self.poll()


def test_the_late_rank_says_where_it_is_with_its_stacks_and_the_others_end_after_it(monkeypatch):
    world = World(monkeypatch, 3)
    world.begin()
    for rank in (0, 1, 2):
        world.ranks[rank].mark(watchdog.LOADING, 2)
    for rank in (0, 2):
        world.ranks[rank].mark(watchdog.STEP, 2)
    world.go_on(36)
    assert world.said == [] and world.ended == []
    world.go_on(8)
    assert world.ended == [(1, 1, 44.0)]
    assert world.said == ["rank 1, the stacks of its threads:", "stacks",
                          "error: rank 1 does not get on in epoch 3, iteration 2 (loading) (--hang-timeout 40)"]
    world.go_on(40)
    assert sorted(rank for rank, *_ in world.ended) == [0, 1, 2]
    assert "error: rank 1 does not answer (stopped, or gone), last seen in epoch 3, iteration 2 (loading)" in world.said[-1]


def test_a_stopped_rank_is_named_by_the_first_that_waits(monkeypatch):
    world = World(monkeypatch, 3)
    world.begin()
    world.stopped = {0}
    world.go_on(44)
    assert world.ended == [(1, 1, 40.0)]
    here = "epoch 3, iteration 1 (forward, backward and step)"
    assert world.said == ["rank 1, the stacks of its threads:", "stacks", f"error: rank 0 does not answer (stopped, or gone), last seen in "
                          f"{here}; rank 1 waits for it in {here} (--hang-timeout 40)"]


def test_ranks_that_wait_for_each_other_are_all_named(monkeypatch):
    world = World(monkeypatch, 2)
    world.begin()
    world.go_on(44)
    assert [line for line in world.said if line.startswith("error")] == [
        "error: ranks 0, 1 do not get on in epoch 3, iteration 1 (forward, backward and step) (--hang-timeout 40)"]
    assert sorted(end[:2] for end in world.ended) == [(0, 1), (1, 1)]


def test_a_long_first_iteration_and_a_slow_save_are_only_told(monkeypatch):
    world = World(monkeypatch, 2)
    for watch in world.ranks:
        watch.mark(watchdog.LOADING, 0)
        watch.mark(watchdog.STEP, 0)
    world.go_on(100)
    assert world.ended == [] and "note: rank 0 is for 44 s in iteration 0 (forward, backward and step): this may be long" in world.said[0]
    assert len(world.said) == 2
    world.begin()
    world.said.clear()
    world.ranks[1].mark(watchdog.LOADING, 2)
    with world.ranks[0].saving():
        world.go_on(400)
    assert world.ended == [] and len(world.said) == 9  # once in 40 seconds
    assert "in epoch 3, iteration 1 (forward, backward and step), saving: this may be long" in world.said[0]
    world.go_on(100)
    assert [rank for rank, *_ in world.ended][:1] == [0]


def test_who_waits_for_a_rank_that_still_evaluates_waits(monkeypatch):
    """One with fewer batches, too, which is then not behind."""
    world, steps = World(monkeypatch, 2), iter(range(1, 1000))
    world.begin()
    for watch in world.ranks:
        watch.mark(watchdog.EVALUATING, 0)
    world.ranks[0].mark(watchdog.EVALUATING, 1)
    world.ranks[0].mark(watchdog.ADDING, 0)
    world.go_on(400, lambda: world.ranks[1].mark(watchdog.EVALUATING, next(steps)))
    assert world.said == [] and world.ended == []
    world.go_on(44)
    assert world.ended[0][0] == 1 and "rank 1 does not get on in epoch 3, iteration 100 (evaluating)" in world.said[-1]


def test_time_in_which_all_were_stopped_does_not_count(monkeypatch):
    world = World(monkeypatch, 2)
    world.begin()
    for _ in range(4):
        world.time += 10000
        world.poll()
    assert world.said == [] and world.ended == []


def test_one_rank_alone_and_one_that_lost_the_store_speak_of_themselves(monkeypatch):
    world = World(monkeypatch, 1)
    world.begin()
    world.go_on(44)
    assert world.said[-1] == "error: rank 0 does not get on in epoch 3, iteration 1 (forward, backward and step) (--hang-timeout 40)"

    class Lost:
        def set(self, *_):
            raise dist.DistNetworkError("Broken pipe")
    world = World(monkeypatch, 2)
    world.begin()
    world.ranks[0].store, world.stopped = Lost(), {1}
    world.go_on(44)
    assert "error: rank 0 does not get on" in world.said[-1]


def test_what_an_epoch_tells_of_its_phases():
    marks, model = [], torch.nn.Linear(2, 2)
    batches = [(torch.ones(2, 2), torch.zeros(2, dtype=torch.long))] * 3
    mark = lambda *place: marks.append(place)  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.train_one_epoch(model, lambda images, outputs, targets: outputs.sum(), batches, optimizer, torch.device("cpu"), 0,
                           make_precision(torch.device("cpu"), "off"), print_freq=2, quiet=True, mark=mark)
    loading, step, reading = watchdog.LOADING, watchdog.STEP, watchdog.READING
    assert marks == [(loading, 0), (step, 0), (reading, 0), (loading, 1), (step, 1), (loading, 2), (step, 2), (reading, 2), (loading, 3)]
    marks.clear()
    engine.evaluate(batches, model, torch.device("cpu"), quiet=True, mark=mark)
    assert marks == [(watchdog.EVALUATING, i) for i in range(4)] + [(watchdog.ADDING, 2)]


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
        return re.findall(r"error(?: \(rank \d\))?: .*", self.said())


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


def test_a_stopped_rank_ends_the_run_with_a_line_that_names_it(launched):
    run = launched("--hang-timeout=5")
    os.kill(run.ranks[1], signal.SIGSTOP)
    assert run.process.wait(timeout=120) == 1
    wait_for(lambda: not run.left(), seconds=30)
    error, = run.errors()
    assert re.match(r"error: rank 1 does not answer .*, last seen in epoch \d+, iteration \d+ .*; rank 0 waits for it in epoch ", error)
    assert "rank 0, the stacks of its threads:" in run.said() and re.search(r'File ".*engine.py", line \d+ in ', run.said())


def test_each_fault_has_its_command():
    script = ROOT / "test" / "faults" / "run.sh"
    tests = dict(re.findall(r"\[(\w+)\]=(test_\w+)", script.read_text()))
    assert list(tests) == ["rank", "worker", "torchrun", "stop"] and all(callable(globals().get(name)) for name in tests.values())
    done = subprocess.run(["bash", script, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and all(f"run.sh {name} " in done.stdout for name in (*tests, "folder", "kills"))
