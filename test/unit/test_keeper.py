"""Who writes into a run's folder, and when: one run at a time, beside the training, whatever the disk does."""
import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import keeper
import lock
import utils

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
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 2)
                checkpoint.save(path, run=2)
            assert checkpoint.read(path) == {"run": 2}
        whole(content, file)

    monkeypatch.setattr(torch, "save", save)
    checkpoint.save(path, run=1)
    assert checkpoint.read(path) == {"run": 1} and os.listdir(tmp_path) == ["checkpoint.pth"]


def test_what_killed_runs_left_half_written_goes(tmp_path):
    for name in (".checkpoint.pth.tmp", ".checkpoint_best.pth.host.7.tmp", ".log.txt.host.7.tmp", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    with keeper.Keeper(tmp_path) as mine:
        mine.prepare()
    assert os.listdir(tmp_path) == ["mine.tmp"]


# ---- what is written, and when ----

def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture
def held(monkeypatch):
    """held.set() lets the thread write; until then each file waits. -> (the event, names of files in the order of their beginning)"""
    go, names, whole = threading.Event(), [], checkpoint.write

    def write(path, content):
        names.append((path.name, content["epoch"]))
        assert go.wait(60)
        whole(path, content)

    monkeypatch.setattr(checkpoint, "write", write)
    return SimpleNamespace(go=go, names=names)


def test_the_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, held):
    weight = torch.ones(4)
    with keeper.Keeper(tmp_path) as mine:
        mine.open()
        mine.save({"epoch": 0, "model": {"weight": weight, "views": [weight[:2]]}}, {"epoch": 0})
        weight += 1  # it returned before anything was written
        assert not (tmp_path / "checkpoint.pth").exists()
        held.go.set()
    saved = load(tmp_path / "checkpoint.pth")
    assert saved["model"]["weight"].tolist() == [1] * 4 and saved["model"]["views"][0].tolist() == [1, 1]
    assert json.loads((tmp_path / "log.txt").read_text()) == {"epoch": 0}


def test_of_those_that_wait_the_newest_is_written_with_every_row_and_the_best(tmp_path, held):
    with keeper.Keeper(tmp_path) as mine:
        mine.open()
        for epoch in range(5):
            mine.save({"epoch": epoch}, {"epoch": epoch}, improved=epoch == 2)
            while epoch == 0 and not held.names:
                pass  # the first one is being written
        held.go.set()
    assert held.names == [("checkpoint.pth", 0), ("checkpoint_best.pth", 2), ("checkpoint.pth", 4)]
    assert [load(tmp_path / name)["epoch"] for name in ("checkpoint.pth", "checkpoint_best.pth")] == [4, 2]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [dict(keep=9), dict(milestones=1)])
def test_an_epoch_that_is_to_stay_is_never_dropped(tmp_path, options, monkeypatch):
    whole = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: threading.Event().wait(0.01) or whole(*args))  # slower than the training
    with keeper.Keeper(tmp_path, **options) as mine:
        mine.open()
        for epoch in range(6):
            mine.save({"epoch": epoch}, done=epoch)
    assert len([path for path in checkpoint.checkpoints(tmp_path) if checkpoint.epoch_named(path) is not None]) == 6


def test_a_fork_and_an_error_wait_for_the_thread(tmp_path, held):
    for name in ("fork", "error"):
        held.go.clear()
        with contextlib.suppress(KeyError), keeper.Keeper(tmp_path / name) as mine:
            mine.open(make=True)
            mine.save({"epoch": 1})
            while not held.names:
                pass
            held.names.clear()
            threading.Timer(0.2, held.go.set).start()
            if name == "fork":
                if (child := os.fork()) == 0:
                    os._exit(not (tmp_path / name / "checkpoint.pth").exists())
                assert os.waitpid(child, 0)[1] == 0
            else:
                raise KeyError
        assert load(tmp_path / name / "checkpoint.pth")["epoch"] == 1


def test_an_oldest_epoch_goes_only_when_a_newer_one_is_whole(tmp_path, monkeypatch):
    with keeper.Keeper(tmp_path, lambda text: None, keep=1) as mine:
        mine.open()
        mine.save({"epoch": 0}, done=0)
        mine.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
            mine.save({"epoch": 1}, done=1)
            mine.wait()
        assert load(tmp_path / "checkpoint_0000.pth")["epoch"] == 0 and not (tmp_path / "checkpoint_0001.pth").exists()
    assert not (tmp_path / "checkpoint_0000.pth").exists() and load(tmp_path / "checkpoint_0001.pth")["epoch"] == 1


# ---- when the disk fails ----

@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["open", "fsync", "replace", "write"])
def test_a_fault_of_the_disk_is_one_line_the_old_file_stays_and_the_next_save_tries_again(tmp_path, monkeypatch, error, where):
    said = []
    with keeper.Keeper(tmp_path, said.append) as mine:
        mine.open()
        mine.save({"epoch": 0}, {"epoch": 0})
        mine.wait()

        def fail(*_, **__):
            raise OSError(error, os.strerror(error))

        with monkeypatch.context() as patch:
            if where == "open":
                patch.setattr("builtins.open", fail)
            elif where == "write":
                patch.setattr(checkpoint, "replacing", lambda _: contextlib.nullcontext(SimpleNamespace(write=fail)))
            else:
                patch.setattr(os, where, fail)
            mine.save({"epoch": 1}, {"epoch": 1})
            mine.wait()
            mine.report()
            mine.report()
        assert len(said) == 1 and re.fullmatch(
            rf"warning: {re.escape(str(tmp_path))}/(checkpoint\.pth|log\.txt) cannot be written \({os.strerror(error)}\): the training "
            "goes on, what was saved before stays, and the next save tries again", said[0])
        assert load(tmp_path / "checkpoint.pth")["epoch"] == 0
        mine.save({"epoch": 2}, {"epoch": 2})
    assert len(said) == 1 and load(tmp_path / "checkpoint.pth")["epoch"] == 2
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1, 2]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth", "log.txt"]


def test_a_folder_that_vanished_is_made_again_and_locked(tmp_path):
    folder = tmp_path / "deep" / "run"
    with keeper.Keeper(folder) as mine:
        mine.open(make=True)
        shutil.rmtree(tmp_path / "deep")
        mine.save({"epoch": 1}, {"epoch": 1})
        mine.wait()
        assert load(folder / "checkpoint.pth")["epoch"] == 1
        with pytest.raises(ValueError, match="is in use by another run"):
            keeper.Keeper(folder).open()
    assert sorted(os.listdir(folder)) == ["checkpoint.pth", "log.txt"]


def test_a_folder_that_another_run_has_taken_meanwhile_is_not_written(tmp_path):
    said, folder = [], tmp_path / "run"
    with pytest.raises(keeper.SaveFailed, match=r"in use by another run .*: the end of this training is not saved"), \
            keeper.Keeper(folder, said.append) as mine:
        mine.open(make=True)
        shutil.rmtree(folder)
        folder.mkdir()
        other = lock.Lock(folder)
        other.take()
        mine.save({"epoch": 1})
        mine.wait()
        mine.report()
        assert len(said) == 1 and os.listdir(folder) == [".lock"]
    other.release()


def test_the_end_of_a_run_that_is_not_saved_is_an_error_but_hides_no_other(tmp_path):
    (tmp_path / "log.txt").mkdir()
    said = []
    with pytest.raises(keeper.SaveFailed, match=rf"^{re.escape(str(tmp_path))}/log\.txt cannot be written \(Is a directory\): the end"), \
            keeper.Keeper(tmp_path, said.append) as mine:
        mine.open()
        mine.save({"epoch": 1}, {"epoch": 1})
    assert said == [] and load(tmp_path / "checkpoint.pth")["epoch"] == 1  # without its row, but it is more than a row
    with pytest.raises(KeyError), keeper.Keeper(tmp_path, said.append) as mine:
        mine.open()
        mine.save({"epoch": 2}, {"epoch": 2})
        raise KeyError
    assert len(said) == 1 and said[0].startswith(f"warning: {tmp_path}/log.txt cannot be written (Is a directory): the end of")


def test_what_cannot_be_saved_at_all_is_a_crash_of_the_training(tmp_path):
    with pytest.raises(Exception, match="pickle"), keeper.Keeper(tmp_path) as mine:
        mine.open()
        mine.save({"epoch": lambda: 0})


def test_a_row_that_does_not_fit_leaves_no_half_of_it(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    utils.append_json(path, {"epoch": 0})
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        utils.append_json(path, {"epoch": 1})
    utils.append_json(path, {"epoch": 2})
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 2}\n'
