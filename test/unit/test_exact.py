"""A training that was interrupted anywhere and went on equals one that never was: weights, moments, averages and rows, bit for bit."""
import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ELASTIC, ROOT

import main
import pauses
from state import MovingAverage, State
from tools.data import write_shards

# The whole recipe is random: augmentation, mixing, drop path, dropout
RECIPE = ["--device=cpu", "--model=test_convnext", "--input-size=32", "--batch-size=4", "--epochs=2", "--drop=0.1", "--lr=0.05",
          "--print-freq=3", "--model-ema", "--num_workers=0"]
PLATEAU = ["--sched=plateau", "--patience-epochs=0", "--warmup-epochs=0", "--epochs=3", "--lr-noise", "0.3", "1"]
OF_THE_CLOCK = ("fps", "epoch_seconds", "world_size", "steps")


@pytest.fixture(scope="session")
def shards_folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "shards"
    write_shards(tiny_folder, folder, 9)
    return folder


def train(folder, *words, status=0):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        found = main.run([*RECIPE, "--output_dir", str(folder), *map(str, words)])
    sys.stderr.write(err.getvalue())
    assert found == status, err.getvalue()
    return out.getvalue()


def left(folder):
    """What a run leaves: its checkpoint without the options, and its rows without the times."""
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    kept = {key: saved[key] for key in ("model", "optimizer", "schedule", "scaler", "model_ema", "model_ema_updates", "epoch", "progress",
                                        "best_accuracy", "last_accuracy", "better")}
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return kept, [{key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in rows]


def assert_same(a, b, where="", **tolerance):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}", **tolerance)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}/{i}", **tolerance)
    elif isinstance(a, (torch.Tensor, float)):
        torch.testing.assert_close(a, b, msg=lambda text: f"{where}: {text}", **{"rtol": 0, "atol": 0, **tolerance})
    else:
        assert a == b, where


@pytest.mark.parametrize("cuts, first, then", [
    ((4,), ["--num_workers=0"], ["--num_workers=2"]),
    ((1, 1, 8), ["--amp=bf16"], ["--amp=bf16"]),
    ((2, 7), ["--accum-steps=2", "--num_workers=2"], ["--accum-steps=2", "--num_workers=0"]),
    ((3,), ["--repeated-aug", "--num_workers=1"], ["--repeated-aug", "--num_workers=3"]),
    ((5,), ["--amp=fp16", "--opt=lamb"], ["--amp=fp16", "--opt=lamb"]),
    ((8,), PLATEAU, PLATEAU),
], ids=["workers", "bf16", "accumulation", "repeated", "fp16", "plateau"])
def test_an_epoch_that_is_cut_goes_on_bit_for_bit(tiny_folder, tmp_path, cuts, first, then):
    data = ["--data-path", tiny_folder]
    train(tmp_path / "whole", *data, *first)
    for cut in cuts:
        train(tmp_path / "cut", *data, *first, "--resume=auto", f"--max_step={cut}")
    train(tmp_path / "cut", *data, *then, "--resume=auto")
    assert_same(left(tmp_path / "cut"), left(tmp_path / "whole"))


def test_shards_go_on_bit_for_bit(shards_folder, tmp_path):
    data = ["--data-path", shards_folder, "--num_workers=2"]
    train(tmp_path / "whole", *data)
    train(tmp_path / "cut", *data, "--max_step=8")
    train(tmp_path / "cut", *data[:2], "--resume=auto", "--num_workers=0")
    assert_same(left(tmp_path / "cut"), left(tmp_path / "whole"))


def ask_after(monkeypatch, updates):
    """As if a signal came during that update."""
    asked, call = [], pauses.Pauses.__call__

    def counting(pause):
        asked.append(1)
        if len(asked) == updates:
            pause.receive(signal.SIGTERM, None)
        return call(pause)
    monkeypatch.setattr(pauses.Pauses, "__call__", counting)


@pytest.mark.parametrize("updates", [1, 5, 6, 11])
def test_a_signal_ends_with_75_and_the_run_goes_on_bit_for_bit(tiny_folder, tmp_path, monkeypatch, updates):
    """Also one at the end of an epoch, before its evaluation."""
    data = ["--data-path", tiny_folder]
    train(tmp_path / "whole", *data)
    with monkeypatch.context() as patched:
        ask_after(patched, updates)
        out = train(tmp_path / "cut", *data, status=75)
    epoch, done = divmod(updates, 6) if updates != 6 else (0, 6)
    assert f"Stopped in epoch {epoch} after {done} of 6 iterations: {tmp_path / 'cut'}/checkpoint.pth goes on there" in out
    train(tmp_path / "cut", *data, "--resume=auto")
    assert_same(left(tmp_path / "cut"), left(tmp_path / "whole"))


def test_a_killed_run_goes_on_from_its_last_update_bit_for_bit(tiny_folder, tmp_path):
    data = ["--data-path", tiny_folder, "--num_workers=1"]
    train(tmp_path / "whole", *data)
    words = ["--output_dir", tmp_path / "killed", "--ckpt-steps=1", "--print-freq=1"]
    command = [sys.executable, "-u", ROOT / "main.py", *RECIPE, *data, *words]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True,
                               env={**{key: value for key, value in os.environ.items() if key not in ELASTIC}, "OMP_NUM_THREADS": "1"})
    next(line for line in process.stdout if line.startswith("Epoch: [1]  [2"))
    process.kill()
    process.communicate()
    saved = torch.load(tmp_path / "killed" / "checkpoint.pth", weights_only=True)
    assert (saved["epoch"], saved["progress"]["updates"] >= 1) == (0, True)
    train(tmp_path / "killed", *data, "--resume=auto")
    assert_same(left(tmp_path / "killed"), left(tmp_path / "whole"))


def test_two_ranks_go_on_bit_for_bit_and_one_or_four_within_rounding(tiny_folder, tmp_path, run_ranks):
    """4 ranks, 2 that accumulate 2 batches and one that accumulates 4 compute the same parts of each update."""
    words = [*RECIPE, "--data-path", tiny_folder, "--batch-size=2", "--dist-eval", "--output_dir"]

    def ranks(count, folder, *more):
        done = run_ranks(count, *words, tmp_path / folder, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout
    ranks(2, "whole", "--accum-steps=2")
    ranks(2, "cut", "--accum-steps=2", "--max_step=4")
    ranks(2, "cut", "--accum-steps=2", "--resume=auto")
    assert_same(left(tmp_path / "cut"), left(tmp_path / "whole"))

    train(tmp_path / "elastic", "--data-path", tiny_folder, "--batch-size=2", "--accum-steps=4", "--max_step=4")
    said = ranks(2, "elastic", "--resume=auto")
    assert "note: --accum-steps 2 on 2 ranks keeps the checkpoint's global batch of 8" in said
    (a, rows), (b, whole) = left(tmp_path / "elastic"), left(tmp_path / "whole")
    assert_same(a["model"], b["model"], rtol=1e-4, atol=1e-5)
    assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in whole], rel=1e-5)


def test_three_ranks_go_on_bit_for_bit(tiny_folder, tmp_path, run_ranks):
    """Three numbers have another sum in another order, and DistributedDataParallel orders its buckets anew after a first pass: a model
    of two buckets, with batch norms."""
    words = [*RECIPE, "--data-path", tiny_folder, "--batch-size=2", "--model=test_resnet", "--drop-path=0", "--epochs=1", "--no-eval",
             "--output_dir"]
    for folder, *more in (("whole",), ("cut", "--max_step=2"), ("cut", "--resume=auto")):
        done = run_ranks(3, *words, tmp_path / folder, *more)
        assert done.returncode == 0, done.stderr
    assert_same(left(tmp_path / "cut"), left(tmp_path / "whole"))


def test_another_global_batch_is_refused_unless_it_is_meant(tiny_folder, tmp_path):
    data = ["--data-path", tiny_folder, "--no-eval"]
    train(tmp_path, *data, "--max_step=1")
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main.run([*RECIPE, *map(str, data), "--output_dir", str(tmp_path), "--resume=auto", "--batch-size=6"]) == 2
    assert "updates are of 4 images, and batches of 6 on 1 ranks cannot make that" in err.getvalue() and "--allow-change" in err.getvalue()
    said = train(tmp_path, *data, "--resume=auto", "--batch-size=6", "--allow-change", "--epochs=1")
    assert "global batch   6 = 6 x 1 ranks x 1 accumulated" in said


def test_a_user_can_have_it_proved(tiny_folder, tmp_path, monkeypatch):
    """--verify-resume; where something does not come back, it is named, and the status is 1."""
    words = ["--data-path", tiny_folder, "--verify-resume", "--accum-steps=2"]
    out = train(tmp_path, *words)
    assert out.endswith("--verify-resume: 4 updates that were interrupted after 2 leave what 4 others do, bit for bit\n")
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(MovingAverage, "load_state_dict", lambda *_: None)
    monkeypatch.setattr(State, "load_average", lambda *_: [])
    with contextlib.redirect_stderr(io.StringIO()) as err:
        train(tmp_path, *words, status=1)
    assert "error: --verify-resume: it/model_ema/" in err.getvalue() and "nothing interrupted" not in err.getvalue()
