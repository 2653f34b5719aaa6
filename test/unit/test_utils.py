"""What people read: log lines, the fps in them, the progress bar, the JSON log. The clock is the test's."""
import errno
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from utils import WARMUP_STEPS, MetricLogger, append_json, keep_epochs_before

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
EPOCH_LINE = re.compile(
    rf"Epoch: \[(?P<epoch>\d+)\]  \[(?P<step> *\d+)/(?P<total>\d+)\]  eta: (?P<eta>\d+:\d\d:\d\d)  lr: (?P<lr>{NUMBER})  "
    rf"loss: (?P<loss>{NUMBER}) \((?P<average>{NUMBER})\)  time: (?P<time>{NUMBER})  fps:(?P<fps>{NUMBER})  "
    rf"data: (?P<data>{NUMBER})  max mem: (?P<memory>\d+)"
    rf"(?:  grad norm: (?P<grad>{NUMBER}|inf|nan)  update norm: (?P<update>{NUMBER}))?")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def loop(total, print_freq=10, images=8, seconds=lambda step: 1.0, data=lambda step: 0.0, losses=lambda step: 1.0, header="Epoch: [3]",
         batches=None, limit=None, loaded=None, **kwargs):
    """A training loop whose step takes seconds(step) and whose batch takes data(step). loaded: collects them. -> the logger"""
    clock = Clock()

    def load():
        for step in range(batches or total):
            clock.now += data(step)
            if loaded is not None:
                loaded.append(step)
            yield f"batch {step}"

    log, window = MetricLogger(header, total, images, print_freq, clock=clock, **kwargs), []
    for step, batch in log.follow(load(), limit):
        assert batch == f"batch {step}"
        clock.now += seconds(step)
        window.append(losses(step))
        if log.window_ends(step):
            log.line(step, lr=1e-6, memory=512.4, loss=(sum(window), len(window)))
            window.clear()
    return log


def lines(capsys):
    printed = capsys.readouterr().out.splitlines()
    found = [EPOCH_LINE.fullmatch(line) for line in printed]
    assert all(found), printed
    return found


def test_a_line_is_exactly_the_conventional_one(capsys):
    loop(total=101, print_freq=50, losses=lambda step: 2.0 if step < 51 else 1.0)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch: [3]  [  0/101]  eta: 0:01:40  lr: 1e-06  loss: 2.0000 (2.0000)  time: 1.0000  fps:8.00  data: 0.0000  max mem: 512",
        "Epoch: [3]  [  4/101]  eta: 0:01:36  lr: 1e-06  loss: 2.0000 (2.0000)  time: 1.0000  fps:8.00  data: 0.0000  max mem: 512",
        "Epoch: [3]  [ 50/101]  eta: 0:00:50  lr: 1e-06  loss: 2.0000 (2.0000)  time: 1.0000  fps:8.00  data: 0.0000  max mem: 512",
        "Epoch: [3]  [100/101]  eta: 0:00:00  lr: 1e-06  loss: 1.0000 (1.5050)  time: 1.0000  fps:8.00  data: 0.0000  max mem: 512"]


def test_a_window_ends_at_the_first_step_after_the_warm_up_every_print_freq_and_at_the_last(capsys):
    loop(total=27, print_freq=10)
    assert [int(line["step"]) for line in lines(capsys)] == [0, WARMUP_STEPS - 1, 10, 20, 26]


def test_the_fps_of_a_line_is_that_of_its_window(capsys):
    loop(total=21, images=48, seconds=lambda step: 12.0 if step == 0 else 2.0 if step <= 10 else 0.5)
    assert [float(line["fps"]) for line in lines(capsys)] == [48 / 12, 48 / 2, 48 / 2, 48 / 0.5]


def test_data_time_is_the_wait_for_a_batch_and_part_of_the_step(capsys):
    loop(total=4, seconds=lambda step: 1.0, data=lambda step: 3.0 if step == 0 else 0.25)
    assert [(float(line["data"]), float(line["time"])) for line in lines(capsys)] == [(3.0, 4.0), (0.25, 1.25)]


def test_eta_is_the_time_of_the_window_for_the_steps_that_remain(capsys):
    loop(total=3661, print_freq=3000, seconds=lambda step: 5.0 if step == 0 else 1.0)
    assert [line["eta"] for line in lines(capsys)] == ["5:05:00", "1:00:56", "0:11:00", "0:00:00"]


def test_the_loss_in_parentheses_is_the_mean_over_the_epoch_not_over_the_windows(capsys):
    log = loop(total=12, losses=float)  # windows of 1, 4, 6 and 1 steps
    assert [(float(line["loss"]), float(line["average"])) for line in lines(capsys)] == [(0, 0), (2.5, 2), (7.5, 5), (11, 5.5)]
    assert log.average("loss") == sum(range(12)) / 12


def test_the_fps_of_an_epoch_is_its_images_by_its_seconds_without_the_warm_up():
    slow = loop(total=40, images=32, seconds=lambda step: 100.0 if step < WARMUP_STEPS else 1.0 + step % 2, quiet=True)
    assert slow.fps() == pytest.approx(32 * 35 / sum(1.0 + step % 2 for step in range(WARMUP_STEPS, 40)))


@pytest.mark.parametrize("total, print_freq", [(6, 10), (8, 10), (12, 10), (12, 1), (30, 20), (30, 5)])
def test_no_epoch_that_is_longer_than_the_warm_up_counts_its_slow_steps(total, print_freq):
    log = loop(total, print_freq, images=4, seconds=lambda step: 100.0 if step < WARMUP_STEPS else 0.5, quiet=True)
    assert log.fps() == pytest.approx(4 / 0.5)


def test_an_epoch_of_one_step_has_a_fps():
    assert loop(total=1, images=6, seconds=lambda step: 2.0, quiet=True).fps() == pytest.approx(3.0)


@pytest.mark.parametrize("batches, limit, steps", [(9, 4, 4), (9, 9, 9), (3, 4, 3)])
def test_a_limited_loop_ends_after_so_many_batches_and_asks_for_no_more(batches, limit, steps):
    loaded = []
    log = loop(total=4, batches=batches, limit=limit, loaded=loaded, quiet=True)
    assert log.last_step == steps - 1 and loaded == list(range(steps))


@pytest.mark.parametrize("total, batches", [(4, 9), (9, 4), (1, 1)])
def test_a_loop_without_a_limit_follows_every_batch_whatever_its_total(total, batches):
    assert loop(total=total, batches=batches, quiet=True).last_step == batches - 1


def test_a_loop_longer_than_its_total_has_no_negative_eta(capsys):
    loop(total=4, batches=7, print_freq=1)
    assert [line["eta"] for line in lines(capsys)] == ["0:00:03", "0:00:02", "0:00:01", *["0:00:00"] * 4]


def test_a_quiet_logger_prints_nothing_and_still_counts(capsys):
    log = loop(total=12, quiet=True, losses=lambda step: 2.5)
    log.summary()
    assert capsys.readouterr().out == "" and log.average("loss") == 2.5


def test_the_closing_line_names_the_total_time_and_the_fps(capsys):
    log = loop(total=16, print_freq=5, images=10, seconds=lambda step: 2.0)
    capsys.readouterr()
    log.summary()
    assert capsys.readouterr().out == "Epoch: [3] Total time: 0:00:32 (2.0000 s / it)  fps:5.00\n"


def test_an_evaluation_has_no_rate_no_loss_and_no_memory_in_its_lines(capsys):
    clock = Clock()
    log = MetricLogger("Test:", 1, 8, clock=clock)
    for step, _ in log.follow(["batch"]):
        clock.now += 2
        log.line(step)
    assert capsys.readouterr().out == "Test:  [0/1]  eta: 0:00:00  time: 2.0000  fps:4.00  data: 0.0000\n"


def test_a_terminal_gets_a_bar_with_loss_and_fps_instead_of_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    loop(total=21, losses=lambda step: 0.75)
    shown = capsys.readouterr().out
    assert "Epoch: [3]: 100%" in shown and "21/21" in shown and "loss=0.7500 (0.7500)" in shown and "fps=8.0" in shown
    assert "eta:" not in shown


def test_a_terminal_that_says_no_size_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback: os.terminal_size((0, 0)))
    loop(total=2)
    assert [int(line["step"]) for line in lines(capsys)] == [0, 1]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_json_log_has_a_line_an_epoch_with_keys_in_their_order(tmp_path):
    for epoch in range(3):
        append_json(tmp_path / "log.txt", {"train_lr": 0.5, "epoch": epoch, "a": None})
    assert (tmp_path / "log.txt").read_text().splitlines()[1] == '{"train_lr": 0.5, "epoch": 1, "a": null}'
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == [0, 1, 2]


def test_a_resumed_run_drops_the_rows_it_writes_again_and_a_half_written_one(tmp_path):
    log = tmp_path / "log.txt"
    for epoch in range(4):
        append_json(log, {"epoch": epoch})
    with open(log, "a") as file:
        file.write('{"epoch": 1, "train_l')
    keep_epochs_before(log, 2)
    append_json(log, {"epoch": 2, "new": True})
    assert rows(log) == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2, "new": True}]
    assert os.listdir(tmp_path) == ["log.txt"]


def test_without_a_json_log_there_is_nothing_to_drop(tmp_path):
    keep_epochs_before(tmp_path / "log.txt", 2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("output, said", [
    (">&-", ""), (">&- 2>&-", ""), ("2>&-", ""), ("<&- >&- 2>&-", ""),
    ("| head -n 1", "note: the output cannot be written any more (Broken pipe): this goes on without\n"),
    (">/dev/full", "note: the output cannot be written any more (No space left on device): this goes on without\n")])
def test_an_output_that_nobody_takes_ends_nothing(tmp_path, output, said):
    """Nor does a file that is opened later come where a closed output was: what C code prints there would be written into it."""
    (tmp_path / "run.py").write_text(
        "import os, sys, utils\nutils.open_output()\nkept = open('log.txt', 'w')\n"
        "for i in range(3000):\n    print('caf\\u00e9', i, flush=i % 2 == 0)\nprint('error', file=sys.stderr)\n"
        "os.write(1, b'from C') if kept.fileno() < 3 else None\nkept.write('whole')\n")
    script = f"'{sys.executable}' run.py {output}\nexit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (tmp_path / "log.txt").read_text() == "whole"
    assert done.returncode == 0 and done.stderr == said + ("" if "2>&-" in output else "error\n")


@pytest.mark.parametrize("output", [">&-", "| head -n 1"])
def test_a_training_whose_output_nobody_takes(tiny_folder, tmp_path, output):
    words = (f"--device cpu --data-path '{tiny_folder}' --input-size 32 --batch-size 8 --num_workers 0 --epochs 1 --max_step 1 "
             f"--output_dir '{tmp_path}/run'")
    script = f"'{sys.executable}' '{ROOT}/main.py' {words} {output}\nexit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/log.txt").read_text())["epoch"] == 0 and (tmp_path / "run/checkpoint.pth").is_file()


def test_a_log_that_cannot_be_rewritten_stays_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    for epoch in range(3):
        append_json(log, {"epoch": epoch})
    before = log.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(os, name, fail)
            keep_epochs_before(log, 1)
        assert os.listdir(tmp_path) == ["log.txt"] and log.read_bytes() == before


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_line_is_one_write_also_without_buffers(stream):
    """Several ranks write into one log: what they write at once stays together. A datagram is what one write wrote."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    program = f"import sys, utils; utils.open_output(); print('one', 2, file=sys.{stream}, flush=True); print('three', file=sys.{stream})"
    subprocess.run([sys.executable, "-u", "-c", program], cwd=ROOT, check=True, **{stream: there})
    there.close()
    assert [here.recv(100), here.recv(100)] == [b"one 2\n", b"three\n"]
    here.close()
