"""Who writes into a run's folder: one run at a time, whatever happens to it."""
import errno
import fcntl
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import keeper
import lock

ROOT = Path(keeper.__file__).parent


def hold(folder):
    """A process that locks `folder`, and ends when its stdin closes. -> Popen, once it has it"""
    program = "import lock, sys; lock.Lock(sys.argv[1]).take(); print('taken', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", program, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             text=True)
    assert other.stdout.readline() == "taken\n"
    return other


# ---- one run a folder ----

def test_a_second_run_is_told_who_has_the_folder(tmp_path):
    other = hold(tmp_path)
    with pytest.raises(ValueError) as error:
        keeper.Keeper(tmp_path).open()
    assert re.fullmatch(rf"--output_dir {re.escape(str(tmp_path))} is in use by another run \(process {other.pid} on "
                        rf"{re.escape(socket.gethostname())}, since [-\d]+ [:\d]+[+-][:\d]+\): wait for it, or choose another folder",
                        str(error.value))
    other.kill()
    other.wait()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == other.pid  # it was killed: nobody cleared up
    said = []
    with keeper.Keeper(tmp_path, said.append) as mine:
        mine.open()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert len(said) == 1 and f"was left by process {other.pid} on" in said[0]
    assert os.listdir(tmp_path) == []


def test_the_lock_is_free_when_a_run_has_ended_or_failed(tmp_path):
    for error in (None, KeyboardInterrupt, ValueError):
        try:
            with keeper.Keeper(tmp_path) as mine:
                mine.open()
                mine.open()  # it is its own
                if error:
                    raise error
        except (KeyboardInterrupt, ValueError):
            pass
    assert os.listdir(tmp_path) == []


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    mine = lock.Lock(tmp_path)
    mine.take()
    worker = context.Process(target=lambda: there.send("here") or there.recv(), daemon=True)
    worker.start()
    assert here.recv() == "here"
    mine.forget()  # as a killed process: nothing is removed
    other = lock.Lock(tmp_path)
    assert f"was left by process {os.getpid()}" in other.take()
    here.send(0)
    worker.join()
    other.release()


def test_a_lock_that_was_removed_meanwhile_is_not_held_twice(tmp_path, monkeypatch):
    """Another run has opened the file, and its owner ends before it can lock it."""
    first, second, third = (lock.Lock(tmp_path) for _ in range(3))
    first.take()
    flock = fcntl.flock

    def late(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()
        third.take()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(ValueError, match="is in use by another run"):
        second.take()
    assert third.held and not second.held
    third.release()


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_process_is_asked_for_on_this_host(tmp_path):
    other = hold(tmp_path)
    with pytest.raises(ValueError, match=rf"in use by another run \(process {other.pid} on .*: its file system knows no flock, so make "
                                         rf"sure that it has ended, and: rm {re.escape(str(tmp_path))}/\.lock"):
        lock.Lock(tmp_path).take()
    other.kill()
    other.wait()
    mine = lock.Lock(tmp_path)
    mine.take()
    assert mine.held and json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    mine.release()


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1, "since": "today"}', ""])
def test_without_flock_the_lock_of_another_host_is_said_with_the_remedy(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ValueError, match=r"(process 1 on elsewhere, since today|it does not say which)\), or was when that was killed: .*"
                                         rf"rm {re.escape(str(tmp_path))}/\.lock$"):
        lock.Lock(tmp_path).take()
    assert (tmp_path / ".lock").read_text() == content


def test_with_flock_the_lock_of_another_host_that_was_killed_does_not_block(tmp_path):
    """A job that is put on another machine after its own has died."""
    (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 1, "since": "today"}')
    mine = lock.Lock(tmp_path)
    assert "was left by process 1 on elsewhere, since today" in mine.take()
    mine.release()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=rf"--output_dir {re.escape(str(tmp_path))} cannot be written \(Is a directory\): choose another"):
        keeper.Keeper(tmp_path).open()


def test_two_that_save_at_once_leave_one_whole_file_of_one_of_them(tmp_path, monkeypatch):
    """Without a lock: the second writes all of its file while the first is in the middle of its own."""
    path, whole = tmp_path / "checkpoint.pth", torch.save

    def save(content, file):
        if content["run"] == 1:
            file.write(b"half of a checkpoint")
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 2)
                checkpoint.save(path, run=2)
            assert checkpoint.read(path) == {"run": 2}
            file.seek(0)
        whole(content, file)

    monkeypatch.setattr(torch, "save", save)
    checkpoint.save(path, run=1)
    assert checkpoint.read(path) == {"run": 1} and os.listdir(tmp_path) == ["checkpoint.pth"]


def test_what_killed_runs_left_half_written_goes(tmp_path):
    for name in (".checkpoint.pth.tmp", ".checkpoint_best.pth.host.7.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with keeper.Keeper(tmp_path) as mine:
        mine.prepare()
    assert os.listdir(tmp_path) == ["mine.tmp"]
