"""One run, as a user starts it: training, evaluation, logs, checkpoints, resuming, fine-tuning, and every mistake's one line.

Most runs are main.run in this process, which saves the imports; one of each kind is the real command line or torchrun.
"""
import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import save_file
from test_keeper import hold
from test_utils import EPOCH_LINE
from torchvision import datasets, transforms

import checkpoint
import devices
import engine
import gvt  # noqa: F401  registers the models
import keeper
import loaders
import main
import training
import utils
from samplers import ShuffleSampler
from tools.data import write_shards

TWINS, SMALL = "--model=alt_gvt_small", "--model=test_convnext"
# No randomness after the weights are drawn, and the rate asked for from the first epoch on.
PLAIN = ["--aa=none", "--mixup=0", "--cutmix=0", "--smoothing=0", "--reprob=0", "--drop-path=0", "--hflip=0", "--color-jitter=0",
         "--crop-scale", "1", "1", "--sched-lag=0", "--warmup-epochs=0"]
TRAIN_IMAGES, VAL_IMAGES, CLASSES = 24, 11, 3


@pytest.fixture(scope="session")
def data(tiny_folder, tmp_path_factory):
    """The tiny images as squares: a random crop of the whole is then always the whole. Read it only."""
    folder = tmp_path_factory.mktemp("squares") / "da ta"
    for path in tiny_folder.glob("*/*/*"):
        square = folder / path.relative_to(tiny_folder).with_suffix(".png")
        square.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").resize((40, 40)).save(square)
    return folder


def usual(data):
    return ["--device=cpu", "--data-path", str(data), "--input-size=32", "--num_workers=0", "--batch-size=8", "--output_dir="]


@pytest.fixture(scope="session")
def start(data):
    """start(*words) -> status, out, err of main.run in this process, on `data` unless the words say otherwise"""
    build_loader, built = loaders.build_loader, []

    def build(*args, **kwargs):
        built.append(build_loader(*args, **kwargs))
        return built[-1]

    def run(*words):
        out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(loaders, "build_loader", build):
            try:
                status = main.run([*usual(data), *(str(word) for word in words)])
            except SystemExit as stop:  # the parser's
                status = stop.code
        signal.signal(signal.SIGTERM, handler)
        while built:  # a failed run's workers: left to the garbage collector they take 5 seconds each
            if (iterator := built.pop()._iterator) is not None and hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())
    return run


@pytest.fixture(scope="session")
def works(start):
    def run(*words):
        done = start(*words)
        assert done.status == 0, done.err
        return done
    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def epoch_lines(text):
    found = [EPOCH_LINE.fullmatch(line) for line in text.splitlines() if line.startswith("Epoch:") and "Total time" not in line]
    assert found and all(found), text
    return found


def printed_losses(text):
    return [float(line["loss"]) for line in epoch_lines(text)]


def load(path):
    return torch.load(path, weights_only=True)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def saved_files(folder):
    """Without what was asked for: a run that goes on with another rate says so before it trains."""
    return {name: content for name, content in files(folder).items() if not name.startswith("recipe.toml")}


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def images_of(data, split, size=32):
    """All images and classes, by torchvision alone."""
    whole = [transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)]  # as PLAIN trains
    central = [transforms.Resize(int(256 / 224 * size), transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    transform = transforms.Compose([*(whole if split == "train" else central), transforms.ToTensor(),
                                    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    images, targets = zip(*datasets.ImageFolder(data / split, transform))
    return torch.stack(images), torch.tensor(targets)


def oracle(model, state, data):
    """Acc@1, Acc@5 and loss of the weights over the validation images, in plain torch."""
    net = timm.create_model(model, num_classes=CLASSES).eval()
    net.load_state_dict(state)
    images, targets = images_of(data, "val")
    with torch.no_grad():
        logits = net(images)
    return 100 * (logits.argmax(1) == targets).double().mean().item(), 100.0, F.cross_entropy(logits, targets).item()


def evaluations(text):
    """-> Acc@1, Acc@5, loss of each evaluation in a log"""
    return [tuple(map(float, found)) for found in re.findall(r"^\* Acc@1 (\S+) Acc@5 (\S+) loss (\S+)$", text, re.MULTILINE)]


# ---- one run of the real command line ----

@pytest.fixture(scope="session")
def trained(data, run_main, tmp_path_factory):
    """Three epochs of Twins-SVT-S from the command line. -> out, err, folder"""
    folder = tmp_path_factory.mktemp("runs") / "out put" / "trained"
    done = run_main(*usual(data), TWINS, *PLAIN, "--epochs=3", "--lr=0.016", "--print-freq=2", "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr, folder=folder)


@pytest.fixture(scope="session")
def small(works, tmp_path_factory):
    """Two epochs of a small model. -> its folder; read it only"""
    folder = tmp_path_factory.mktemp("runs") / "small"
    works(SMALL, *PLAIN, "--epochs=2", "--lr=0.1", "--output_dir", folder)
    return folder


def test_training_lowers_the_loss(trained):
    losses = [row["train_loss"] for row in rows(trained.folder)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.75 * losses[0], losses


def test_the_recipe_is_printed_as_it_is_used(trained):
    block = trained.out[trained.out.index("Recipe"):trained.out.index("Epoch:")]
    for line in ("model          alt_gvt_small, 23,549,315 parameters, 3 classes, 32 pixels", "world size 1", "precision      fp32\n",
                 "global batch   8 = 8 x 1 ranks x 1 accumulated, 3 iterations an epoch", "weight decay 0.05, clip 5.0",
                 "effective lr   0.00025 = 0.016 x 8 / 512", "schedule       0 warm-up epochs", "drop path 0.0",
                 "epochs         3", "none, mixup 0.0, cutmix 0.0, smoothing 0.0, erasing 0.0"):
        assert line in block
    assert trained.out.count("Recipe") == 1


@pytest.mark.parametrize("model, rate", [(TWINS, 0.2), ("--model=test_vit", 0.2), (SMALL, 0.2), ("--model=ghostnet_050", 0.0)])
def test_the_recipe_tells_the_drop_path_of_the_network(works, model, rate):
    done = works(model, "--drop-path=0.2", "--max_step=1", "--no-eval", "--input-size=64", "--batch-size=2")
    assert re.search(r"epochs +300, drop path (\S+)\n", done.out)[1] == str(rate)
    assert ("--drop-path 0.2 has no effect" in done.out) == (not rate)


@pytest.mark.parametrize("environment, said", [
    (dict(LOCAL_RANK="3"), "error: "), (dict(LOCAL_RANK="3", RANK="11"), "error (rank 11): "), (dict(LOCAL_RANK="0", RANK="8"), "error: ")])
def test_who_says_a_mistake(monkeypatch, capsys, environment, said):
    """A card's number alone, as a scheduler sets it, makes no rank: nobody else would say it first."""
    waited = []
    monkeypatch.setattr(main.time, "sleep", waited.append)
    for name in ("LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main.complain(devices.DeviceError("no card"), training=False) == 1
    assert capsys.readouterr().err == f"{said}no card\n" and bool(waited) == ("rank" in said)


def test_the_log_lines_are_the_conventional_ones(trained):
    lines = epoch_lines(trained.out)
    assert [(int(line["epoch"]), int(line["step"]), int(line["total"])) for line in lines] == [
        (epoch, step, 3) for epoch in range(3) for step in (0, 2)]
    assert re.findall(r"fps:\d+\.\d+", trained.out) and not re.search(r"fps: ", trained.out)
    assert len(evaluations(trained.out)) == 3
    best = re.findall(r"^Max accuracy: (\d+\.\d\d)%$", trained.out, re.MULTILINE)
    assert [float(x) for x in best] == [round(max(acc for acc, *_ in evaluations(trained.out)[:n + 1]), 2) for n in range(3)]
    assert "\x1b" not in trained.out and "\r" not in trained.out


def test_the_json_log_has_the_originals_keys_first_and_the_printed_values(trained):
    found = rows(trained.folder)
    for epoch, (row, (acc1, acc5, loss)) in enumerate(zip(found, evaluations(trained.out))):
        assert list(row)[:7] == ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
        assert row["epoch"] == epoch and row["n_parameters"] == 23_549_315 and row["world_size"] == 1 and row["global_batch"] == 8
        assert (round(row["test_acc1"], 3), round(row["test_acc5"], 3), round(row["test_loss"], 3)) == (acc1, acc5, loss)
        assert row["train_lr"] == pytest.approx(1e-5 + (2.5e-4 - 1e-5) * (1 + math.cos(math.pi * epoch / 3)) / 2, rel=1e-9)
        last = [line for line in epoch_lines(trained.out) if int(line["epoch"]) == epoch][-1]
        assert row["train_loss"] == pytest.approx(float(last["average"]), abs=1e-4)
        assert row["train_lr"] == pytest.approx(float(last["lr"]), rel=1e-5)
        assert row["fps"] == pytest.approx(float(last["fps"]), rel=0.01)
    assert len(found) == 3 and found[-1]["max_acc1"] == max(row["test_acc1"] for row in found)


def test_a_checkpoint_holds_all_that_a_run_needs_to_go_on(trained):
    last = load(trained.folder / "checkpoint.pth")
    assert {"model", "optimizer", "schedule", "scaler", "epoch", "best_accuracy", "options", "classes"} <= last.keys()
    assert last["epoch"] == 2 and last["classes"] == ["flower", "leaves", "temple"]
    assert last["best_accuracy"] == rows(trained.folder)[-1]["max_acc1"]
    assert isinstance(last["options"], dict) and last["options"]["lr"] == 0.016 and last["options"]["model"] == "alt_gvt_small"
    assert {float(entry["step"]) for entry in last["optimizer"]["state"].values()} == {9.0}
    assert sorted(path.name for path in trained.folder.iterdir()) == ["checkpoint.pth", "checkpoint_best.pth", "log.txt", "recipe.toml"]


def test_the_last_accuracy_is_that_of_plain_torch_with_the_saved_weights(trained, data):
    row, expected = rows(trained.folder)[-1], oracle("alt_gvt_small", load(trained.folder / "checkpoint.pth")["model"], data)
    assert (row["test_acc1"], row["test_acc5"], row["test_loss"]) == pytest.approx(expected, rel=1e-4)


def test_the_best_checkpoint_is_of_the_best_epoch(trained):
    accuracies = [row["test_acc1"] for row in rows(trained.folder)]
    assert load(trained.folder / "checkpoint_best.pth")["epoch"] == accuracies.index(max(accuracies))


def test_a_terminal_shows_a_progress_bar(data):
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, b"\x18\0\x64\0\0\0\0\0")  # 24 lines of 100
    command = [sys.executable, str(ROOT / "main.py"), *usual(data), SMALL, "--epochs=1"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal closes with its last writer
        while piece := os.read(screen, 4096):
            shown += piece
    os.close(screen)
    assert process.wait() == 0
    shown = shown.decode()
    assert re.search(r"\rEpoch: \[0\]: 100%\|\S+\| 3/3 \[", shown) and re.search(r"loss=\d\.\d{4} \(\d\.\d{4}\)", shown)
    assert "* Acc@1" in shown and "eta:" not in shown


# ---- several ranks ----

def test_two_ranks_equal_one_with_the_same_global_batch(works, run_ranks, data, tmp_path):
    words = [*PLAIN, TWINS, "--opt=sgd", "--lr=0.4", "--epochs=2", "--print-freq=1", "--dist-eval", "--output_dir"]
    works(*words, tmp_path / "one", "--batch-size=12")
    done = run_ranks(2, *usual(data), *words, tmp_path / "two", "--batch-size=6")
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two")):
        for key in ("train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "global_batch", "steps"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), key
        assert two["world_size"] == 2
    assert rows(tmp_path / "two")[1]["train_loss"] < rows(tmp_path / "two")[0]["train_loss"]
    one, two = (load(tmp_path / name / "checkpoint.pth")["model"] for name in ("one", "two"))
    assert_close(two, one, rtol=1e-3, atol=1e-5)
    assert "global batch   12 = 6 x 2 ranks x 1 accumulated, 2 iterations" in done.stdout and done.stdout.count("Recipe") == 1
    assert len(epoch_lines(done.stdout)) == 4


@pytest.mark.parametrize("ranks, words", [(3, ["--dist-eval"]), (2, [])])
def test_an_evaluation_is_exact_on_several_ranks(trained, run_ranks, data, ranks, words):
    path = trained.folder / "checkpoint.pth"
    done = run_ranks(ranks, *usual(data), TWINS, "--batch-size=2", "--eval", "--resume", path, *words)
    assert done.returncode == 0, done.stderr
    (found,), expected = evaluations(done.stdout), oracle("alt_gvt_small", load(path)["model"], data)
    assert found == pytest.approx(expected, abs=6e-4)
    assert f"on the {VAL_IMAGES} test images: {found[0]:.3f}%" in done.stdout


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def be_one_of_two(rank, folder, jobs):
    """main.run(words) for each job, as one rank of two. What it prints goes to NAME.RANK.out and .err."""
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # a warning that torch gives once a process may come from any job
    for name, (port, words) in jobs.items():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        streams = [sys.stdout, sys.stderr]
        for number, stream in enumerate(streams, 1):
            stream.flush()
            file = os.open(f"{folder}/{name}.{rank}.{'out' if number == 1 else 'err'}", os.O_CREAT | os.O_WRONLY, 0o644)
            os.dup2(file, number)
            os.close(file)
        status = main.run(words)
        for stream in streams:
            stream.flush()
        assert status == 0, name


@pytest.fixture(scope="session")
def pair(data, tmp_path_factory):
    """Several runs, one after the other, in two processes that stay. -> folder(name), said(name, rank) -> (out, err)"""
    folder = tmp_path_factory.mktemp("pair")
    norm = ["--model=test_resnet", "--lr=1", *PLAIN, "--batch-size=4", "--epochs=2"]
    words = {"normed, shared": [*norm, "--dist-eval"], "normed, each": norm,
             "32 pixels": [TWINS, "--batch-size=2", "--max_step=2", "--no-eval"],
             "64 pixels": [TWINS, "--input-size=64", "--batch-size=2", "--max_step=2", "--no-eval"]}
    jobs = {name: (free_port(), [*usual(data), *given, "--output_dir", str(folder / name)]) for name, given in words.items()}
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "timm.utils"])
    torch.multiprocessing.start_processes(be_one_of_two, (str(folder), jobs), nprocs=2, start_method="forkserver")
    return SimpleNamespace(folder=lambda name: folder / name, said=lambda name, rank: tuple(
        (folder / f"{name}.{rank}.{kind}").read_text() for kind in ("out", "err")))


@pytest.mark.parametrize("name", ["normed, shared", "normed, each"])
def test_the_accuracy_of_a_model_with_batch_norm_is_that_of_the_saved_weights_on_two_ranks(pair, data, name):
    row = rows(pair.folder(name))[-1]
    expected = oracle("test_resnet", load(pair.folder(name) / "checkpoint.pth")["model"], data)
    assert (row["test_acc1"], row["test_acc5"], row["test_loss"]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["32 pixels", "64 pixels"])
def test_two_ranks_train_without_a_warning_of_torchs(pair, name):
    """Gradients have their parameters' strides, so that DDP does not copy them."""
    out, err = pair.said(name, 0)
    assert "Epoch: [0]  [1/" in out
    for text in (err, *pair.said(name, 1)):
        assert "strides" not in text and "Warning" not in text, text


def test_accumulation_averaging_and_repeated_augmentation_work_on_two_ranks(run_ranks, data, tmp_path):
    done = run_ranks(2, *usual(data), SMALL, "--aa=none", "--repeated-aug", "--accum-steps=2", "--model-ema",
                     "--model-ema-decay=0.5", "--epochs=2", "--batch-size=4", "--dist-eval", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "global batch   16 = 4 x 2 ranks x 2 accumulated, 2 iterations an epoch" in done.stdout, "whole updates"
    assert [row["steps"] for row in rows(tmp_path)] == [2, 2] and "test_ema_acc1" in rows(tmp_path)[1]
    assert {float(entry["step"]) for entry in load(tmp_path / "checkpoint.pth")["optimizer"]["state"].values()} == {2.0}


# ---- options that change a training ----

def test_two_accumulated_batches_are_one_of_twice_the_size(works, tmp_path):
    words = [SMALL, *PLAIN, "--opt=sgd", "--lr=1", "--epochs=2", "--no-eval", "--output_dir"]
    works(*words, tmp_path / "halves", "--batch-size=6", "--accum-steps=2")
    works(*words, tmp_path / "whole", "--batch-size=12")
    halves, whole = rows(tmp_path / "halves"), rows(tmp_path / "whole")
    assert [row["train_loss"] for row in halves] == pytest.approx([row["train_loss"] for row in whole], rel=1e-5)
    assert [row["train_lr"] for row in halves] == [row["train_lr"] for row in whole]
    assert_close(load(tmp_path / "halves" / "checkpoint.pth")["model"], load(tmp_path / "whole" / "checkpoint.pth")["model"])


@pytest.mark.parametrize("words", [
    "--mixup 0 --cutmix 1", "--mixup 0 --cutmix 0 --smoothing 0", "--cutmix-minmax 0.2 0.8 --mixup-mode elem", "--repeated-aug",
    "--opt sgd --momentum 0.8", "--attn explicit --window-padding mask"])
def test_twins_trains_a_step_with(works, words):
    loss, = printed_losses(works(TWINS, *words.split(), "--max_step=1", "--no-eval").out)
    assert 0 < loss < 3


def test_gradient_checkpointing_changes_no_loss(works):
    words = [TWINS, *PLAIN, "--max_step=2", "--print-freq=1", "--no-eval", "--lr=0.016"]
    assert printed_losses(works(*words, "--grad-checkpointing").out) == printed_losses(works(*words).out)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_to_nearly_the_same_loss(works, amp, tmp_path):
    words = [TWINS, *PLAIN, "--batch-size=2", "--max_step=2", "--print-freq=1", "--lr=0.016", "--no-eval"]
    mixed, full = works(*words, "--amp", amp, "--output_dir", tmp_path), works(*words)
    assert f"precision      {amp}\n" in mixed.out
    assert printed_losses(mixed.out)[0] == pytest.approx(printed_losses(full.out)[0], rel=0.02)
    assert (load(tmp_path / "checkpoint.pth")["scaler"].get("scale", 0) > 0) == (amp == "fp16")


def test_a_compiled_model_trains_and_saves_its_own_names(works, monkeypatch, tmp_path, small):
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or compile(net, backend="eager"))  # no C++ compiler's minute
    words = [SMALL, *PLAIN, "--max_step=2", "--print-freq=1", "--output_dir"]
    fast, slow = works(*words, tmp_path / "fast", "--compile"), works(*words, tmp_path / "slow")
    assert len(compiled) == 1 and printed_losses(fast.out) == pytest.approx(printed_losses(slow.out), abs=2e-4)
    assert load(tmp_path / "fast" / "checkpoint.pth")["model"].keys() == load(small / "checkpoint.pth")["model"].keys()


def test_the_strongest_augmentation_reads_every_image(works):
    works(SMALL, "--aa=rand-m10-n8-inc1", "--epochs=2", "--no-eval")  # posterizes to 0 bits, among others


def test_a_seed_decides_the_whole_run(works):
    words = [SMALL, "--epochs=2", "--print-freq=1", "--lr=0.1"]  # with every augmentation
    first, second, other = (printed_losses(works(*words, f"--seed={seed}").out) for seed in (3, 3, 4))
    assert first == second != other


def test_max_step_ends_a_run_normally_in_the_middle_of_an_epoch(works, tmp_path):
    done = works(SMALL, "--epochs=5", "--max_step=4", "--output_dir", tmp_path)
    assert [(row["epoch"], row["steps"]) for row in rows(tmp_path)] == [(0, 3), (1, 1)]
    assert len(evaluations(done.out)) == 2 and done.out.count("Max accuracy:") == 2
    assert all(row["fps"] > 0 and row["test_acc1"] is not None for row in rows(tmp_path))
    assert "Training time" in done.out
    saved = load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["progress"]["updates"]) == (0, 1) and [row["complete"] for row in rows(tmp_path)] == [True, False]
    assert "--max_step ended epoch 1 after 1 of 3 iterations: a --resume goes on there" in done.out
    again = works(SMALL, "--epochs=2", "--resume=auto", "--output_dir", tmp_path)
    assert ", after epoch 0 and 1 updates of the next\n" in again.out
    assert [(row["epoch"], row["steps"], row["complete"]) for row in rows(tmp_path)] == [(0, 3, True), (1, 3, True)]
    saved = load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["progress"]["updates"]) == (1, 0)


def test_max_step_at_the_end_of_an_epoch_leaves_it_done(works, tmp_path):
    done = works(SMALL, "--epochs=5", "--max_step=3", "--no-eval", "--output_dir", tmp_path)
    assert load(tmp_path / "checkpoint.pth")["epoch"] == 0 and rows(tmp_path)[0]["complete"] and "--max_step ended" not in done.out


def test_without_evaluation_a_run_still_leaves_statistics_and_a_checkpoint(works, tmp_path):
    done = works(SMALL, "--epochs=1", "--max_step=2", "--no-eval", "--output_dir", tmp_path)
    row, = rows(tmp_path)
    assert not evaluations(done.out) and "Max accuracy" not in done.out
    assert (row["test_acc1"], row["steps"]) == (None, 2) and row["train_loss"] > 0
    assert load(tmp_path / "checkpoint.pth")["epoch"] == -1


def test_val_interval_evaluates_every_so_many_epochs_and_after_the_last(works, tmp_path):
    works(SMALL, "--epochs=5", "--val-interval=2", "--output_dir", tmp_path)
    assert [row["test_acc1"] is not None for row in rows(tmp_path)] == [False, True, False, True, True]


def test_a_run_without_a_right_answer_still_has_a_best_checkpoint(works, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: {"loss": 9.0, "acc1": 0.0, "acc5": 0.0, "images": VAL_IMAGES})
    done = works(SMALL, "--epochs=2", "--output_dir", tmp_path)
    assert done.out.count("Max accuracy: 0.00%") == 2 and load(tmp_path / "checkpoint_best.pth")["epoch"] == 0


def test_the_moving_average_is_evaluated_saved_and_can_be_evaluated_again(works, tmp_path, data):
    works(SMALL, *PLAIN, "--lr=0.1", "--epochs=2", "--model-ema", "--model-ema-decay=0.5", "--output_dir", tmp_path)
    saved, row = load(tmp_path / "checkpoint.pth"), rows(tmp_path)[-1]
    expected = oracle("test_convnext", saved["model_ema"], data)
    assert (row["test_ema_acc1"], row["test_ema_acc5"], row["test_ema_loss"]) == pytest.approx(expected, rel=1e-4)
    assert row["test_ema_loss"] != row["test_loss"]
    assert row["max_acc1"] == max(max(r["test_acc1"], r["test_ema_acc1"]) for r in rows(tmp_path)) == saved["best_accuracy"]
    assert saved["model_ema_updates"] == 2 * row["steps"]
    assert saved["last_accuracy"] == row["test_acc1"]
    again = works(SMALL, "--eval", "--model-ema", "--resume", tmp_path / "checkpoint.pth")
    assert evaluations(again.out)[0] == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("raw, averaged, best", [([9.0, 40.0, 20.0], [10.0, 30.0, 35.0], [10, 40, 40]),
                                                 ([9.0, 20.0, 30.0], [10.0, 30.0, 35.0], [10, 30, 35])], ids=["model", "average"])
def test_the_better_of_the_model_and_its_average_decides_and_is_what_is_taken(works, monkeypatch, tmp_path, raw, averaged, best):
    """For an evaluation, and for fine-tuning; the training itself goes on from the trained weights."""
    scores = {"Test:": iter(raw), "Test EMA:": iter(averaged)}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", lambda *_, header="Test:", **__: {
            "loss": 1.0, "acc1": next(scores[header]), "acc5": 100.0, "images": VAL_IMAGES})
        done = works(SMALL, *PLAIN, "--lr=0.1", "--epochs=3", "--model-ema", "--output_dir", tmp_path)
    owner = ["its moving average" if a > r else "the model" for r, a in zip(raw, averaged)]
    improved = [new > old for old, new in zip([0, *best], best)]
    assert re.findall(r"Max accuracy: (\S+)%(.*)", done.out) == [
        (f"{score:.2f}", f" ({whose})" if better else "") for score, whose, better in zip(best, owner, improved)]
    assert [row["max_acc1"] for row in rows(tmp_path)] == best
    saved = load(tmp_path / "checkpoint_best.pth")
    key = "model" if owner[saved["epoch"]] == "the model" else "model_ema"
    assert saved["better"] == key and saved["best_accuracy"] == max(best)
    net = timm.create_model("test_convnext", num_classes=3)
    tested = {}
    monkeypatch.setattr(engine, "evaluate", lambda loader, net, **_: tested.update(net.state_dict()) or {
        "loss": 1.0, "acc1": 1.0, "acc5": 1.0, "images": VAL_IMAGES})
    done = works(SMALL, "--eval", "--resume", tmp_path / "checkpoint_best.pth")
    assert_close(tested, saved[key], rtol=0, atol=0)
    assert ("its moving average is taken" in done.out) == (key == "model_ema")
    tested.clear()
    works(SMALL, "--epochs=1", "--lr=0", "--warmup-lr=0", "--min-lr=0", "--weight-decay=0", "--finetune", tmp_path / "checkpoint_best.pth")
    assert_close({k: tested[k] for k, _ in net.named_parameters()}, {k: saved[key][k] for k, _ in net.named_parameters()}, rtol=0, atol=0)


def test_a_short_run_moves_its_average(works, tmp_path):
    """The decay of update n is timm's warm-up, 1 - n ** -3/4, until it is what was asked for; and it goes on after a resume."""
    words = [SMALL, *PLAIN, "--lr=0.1", "--no-eval", "--model-ema", "--output_dir"]
    for steps in (1, 2, 3):
        works(*words, tmp_path / str(steps), f"--max_step={steps}")
    one, two, three = (load(tmp_path / str(steps) / "checkpoint.pth") for steps in (1, 2, 3))
    assert_close(one["model_ema"], one["model"], rtol=0, atol=0)
    for before, after in ((one, two), (two, three)):
        decay = 1 - after["model_ema_updates"] ** -0.75
        mixed = {key: decay * before["model_ema"][key] + (1 - decay) * after["model"][key] for key in after["model"]}
        assert_close(after["model_ema"], mixed)
    assert [saved["model_ema_updates"] for saved in (one, two, three)] == [1, 2, 3]
    works(*words, tmp_path / "3", "--resume=auto", "--max_step=1", "--epochs=9")
    assert load(tmp_path / "3" / "checkpoint.pth")["model_ema_updates"] == 4


def test_a_resume_without_the_average_or_the_scaler_keeps_them_and_says_so(works, tmp_path):
    words = [SMALL, *PLAIN, "--no-eval", "--output_dir", tmp_path, "--resume=auto"]
    works(*words[:-1], "--epochs=1", "--model-ema", "--amp=fp16")
    before = load(tmp_path / "checkpoint.pth")
    assert before["scaler"]["_growth_tracker"] == 3
    done = works(*words, "--epochs=2", "--amp=off")
    assert "has a moving average: without --model-ema it is kept as it is, and not moved\n" in done.out
    assert f"note: {tmp_path}/checkpoint.pth has a loss scaler, and fp32 needs none: it is kept as it is\n" in done.out
    between = load(tmp_path / "checkpoint.pth")
    assert_close(between["model_ema"], before["model_ema"], rtol=0, atol=0)
    assert between["scaler"] == before["scaler"] and between["better"] == "model"
    works(*words, "--epochs=3", "--model-ema", "--amp=fp16")
    after = load(tmp_path / "checkpoint.pth")
    assert after["scaler"]["_growth_tracker"] == 6 and after["model_ema_updates"] == 6


def test_an_average_that_starts_at_a_resume_says_so(works, small, tmp_path):
    done = works(SMALL, "--epochs=3", "--no-eval", "--model-ema", "--resume", small / "checkpoint.pth", "--output_dir", tmp_path)
    assert "has no moving average: it starts here, from the model's weights" in done.out


@pytest.mark.parametrize("how", ["--eval --resume", "--resume", "--finetune"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_with_their_names(start, small, tmp_path, how, value):
    saved = load(small / "checkpoint.pth")
    saved["model"]["head.fc.weight"][1, 2] = value
    torch.save(saved, tmp_path / "bad.pth")
    done = start(SMALL, *how.split(), tmp_path / "bad.pth")
    assert (done.status, done.err) == (2, f"error: {tmp_path}/bad.pth holds weights that are not finite: head.fc.weight: its training "
                                          "had failed; take an earlier checkpoint\n")


@pytest.mark.parametrize("words", ["--eval", "--epochs=3 --lr=0 --warmup-lr=0 --min-lr=0"])
def test_an_evaluation_whose_loss_is_not_finite_ends_with_status_3(start, small, tmp_path, words, monkeypatch):
    """Weights whose logits overflow: no accuracy, and nothing is saved."""
    saved = load(small / "checkpoint.pth")
    saved["model"]["head.fc.weight"].fill_(3e38)
    saved["model"]["head.fc.bias"].fill_(3e38)
    torch.save(saved, tmp_path / "huge.pth")
    monkeypatch.setattr(engine, "train_one_epoch", lambda *_, **__: {"lr": 0.0, "loss": 0.0, "fps": 1.0, "steps": 3, "ran": 3})
    done = start(SMALL, *words.split(), "--resume", tmp_path / "huge.pth", "--output_dir", tmp_path / "out")
    assert done.status == 3 and re.fullmatch(r"error: the loss of the evaluation is not finite \((nan|inf)\), so .*\n", done.err), done.err
    assert "Accuracy" not in done.out and not (tmp_path / "out" / "log.txt").exists()


@pytest.mark.parametrize("change, said", [
    (dict(epoch="three"), "the checkpoint's epoch is 'three': no number that a run writes"), (dict(epoch=None), "epoch is 'None'"),
    (dict(epoch=1.5), "the checkpoint's epoch is"), (dict(epoch=math.nan), "epoch is 'nan'"),
    (dict(best_accuracy="high"), "best accuracy is 'high'"), (dict(last_accuracy=[1]), r"last accuracy is '\[1\]'"),
    (dict(optimizer={}), "is not one that torch writes"), (dict(optimizer=[1]), "is not one that torch writes"),
    (dict(scaler={"scale": "large"}), "loss scaler"), (dict(schedule=[1]), "schedule")], ids=str)
def test_a_checkpoint_with_a_part_of_another_kind_is_one_line(start, small, tmp_path, change, said):
    torch.save({**load(small / "checkpoint.pth"), **change}, tmp_path / "odd.pth")
    words = ["--amp=fp16"] if "scaler" in change else ["--sched=plateau"] if "schedule" in change else []
    done = start(SMALL, "--epochs=3", *words, "--resume", tmp_path / "odd.pth", "--output_dir", tmp_path / "out")
    assert done.status == 2 and re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", done.err), done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("opt", ["nadam", "lion", "lamb", "radam", "adamp"])
def test_a_resume_under_another_optimizer_is_one_line(start, small, opt):
    done = start(SMALL, "--epochs=3", f"--opt={opt}", "--resume", small / "checkpoint.pth")
    line = r"error: the checkpoint's optimizer is of another kind, AdamW, not \w+ \(--opt\).*\n"
    assert done.status == 2 and re.fullmatch(line, done.err), done.err


def test_throughout_measures_the_forward_pass(works):
    done = works(TWINS, "--throughout", "--batch-size=2")
    batch, rate = re.search(r"^batch_size (\d+) throughput (\d+\.\d+)\n\Z", done.out, re.MULTILINE).groups()
    assert int(batch) == 2 and float(rate) > 0


# ---- distillation ----

@pytest.fixture(scope="module")
def distilled(trained, works):
    """distilled(*words) -> the loss of a batch of all training images, with `trained` as student and teacher"""
    def run(*words):
        weights = trained.folder / "checkpoint.pth"
        return printed_losses(works(TWINS, *PLAIN, "--finetune", weights, "--teacher-model=alt_gvt_small", "--teacher-path", weights,
                                    f"--batch-size={TRAIN_IMAGES}", "--max_step=1", "--no-eval", *words).out)[0]
    return run


def test_soft_distillation_from_an_equal_teacher_leaves_the_students_share_of_the_loss(distilled):
    assert distilled("--distillation-type=soft", "--distillation-alpha=1", "--distillation-tau=3") == 0
    plain = distilled("--distillation-type=soft", "--distillation-alpha=0")
    assert distilled("--distillation-type=soft", "--distillation-alpha=0.25") == pytest.approx(0.75 * plain, abs=2e-4)


def test_hard_distillation_learns_the_teachers_decision(distilled, trained, data):
    net = timm.create_model("alt_gvt_small", num_classes=CLASSES).eval()
    net.load_state_dict(load(trained.folder / "checkpoint.pth")["model"])
    with torch.no_grad():
        logits = net(images_of(data, "train")[0])
    decided = F.cross_entropy(logits, logits.argmax(1)).item()
    assert distilled("--distillation-type=hard", "--distillation-alpha=1") == pytest.approx(decided, abs=2e-4)


# ---- going on ----

def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(works, small, tmp_path):
    words = [SMALL, *PLAIN, "--epochs=2", "--lr=0.1", "--output_dir", tmp_path]
    works(*words, "--max_step=3")
    assert len(rows(tmp_path)) == 1
    done = works(*words, "--resume=auto")
    assert re.search(rf"Resuming from {tmp_path}/checkpoint(_best)?.pth, after epoch 0", done.out)  # both are of epoch 0
    assert {int(line["epoch"]) for line in epoch_lines(done.out)} == {1}
    for straight, resumed in zip(rows(small), rows(tmp_path)):
        for key in ("epoch", "train_lr", "train_loss", "test_acc1", "test_loss", "max_acc1"):
            assert resumed[key] == pytest.approx(straight[key], rel=1e-5), key
    straight, resumed = load(small / "checkpoint.pth"), load(tmp_path / "checkpoint.pth")
    assert len(rows(tmp_path)) == 2 and resumed["best_accuracy"] == straight["best_accuracy"]
    assert_close(resumed["model"], straight["model"])
    for number, entry in straight["optimizer"]["state"].items():
        assert_close(resumed["optimizer"]["state"][number], entry)


def test_a_named_checkpoint_goes_on_into_another_folder(works, small, tmp_path):
    done = works(SMALL, *PLAIN, "--epochs=3", "--resume", small / "checkpoint.pth", "--output_dir", tmp_path / "new")
    row, = rows(tmp_path / "new")
    assert f"Resuming from {small}/checkpoint.pth, after epoch 1" in done.out and row["epoch"] == 2
    assert row["max_acc1"] >= load(small / "checkpoint.pth")["best_accuracy"] > 0
    assert load(tmp_path / "new" / "checkpoint_best.pth")["best_accuracy"] == row["max_acc1"]


def test_a_checkpoint_that_goes_on_in_another_runs_folder_moves_that_runs_files_aside(works, small, tmp_path):
    other, mine = tmp_path / "other", shutil.copytree(small, tmp_path / "mine")
    works(SMALL, *PLAIN, "--epochs=2", "--lr=0.1", "--seed=5", "--output_dir", other)
    before, source = files(other), files(mine)
    done = works(SMALL, *PLAIN, "--epochs=3", "--lr=0.1", "--resume", mine / "checkpoint.pth", "--output_dir", other)
    assert f"An earlier run's files in {other} are now checkpoint.pth.1, checkpoint_best.pth.1, log.txt.1" in done.out
    after = files(other)
    assert {name: after[f"{name}.1"] for name in before} == before and files(mine) == source
    assert [row["epoch"] for row in rows(other)] == [2] and load(other / "checkpoint.pth")["epoch"] == 2
    assert load(other / "checkpoint_best.pth")["best_accuracy"] == rows(other)[-1]["max_acc1"]


def test_a_run_that_was_moved_aside_goes_on_without_overwriting_the_later_one(works, small, tmp_path):
    folder = shutil.copytree(small, tmp_path / "run")
    works(SMALL, *PLAIN, "--epochs=1", "--seed=5", "--output_dir", folder)
    before = files(folder)
    works(SMALL, *PLAIN, "--epochs=3", "--lr=0.1", "--resume", folder / "checkpoint.pth.1", "--output_dir", folder)
    after = files(folder)
    assert all(after[name if name.endswith(".1") else f"{name}.2"] == content for name, content in before.items())
    assert [row["epoch"] for row in rows(folder)] == [2]


def test_a_resumed_run_uses_the_options_that_it_is_given(works, small, tmp_path):
    """Not the checkpoint's, also where no schedule sets the rate."""
    before = load(small / "checkpoint.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in before} == {0.0, 0.05}
    done = works(SMALL, *PLAIN, "--sched=none", "--lr=0.064", "--weight-decay=0.3", "--opt-betas", "0.8", "0.9", "--opt-eps=1e-3",
                 "--epochs=3", "--resume", small / "checkpoint.pth", "--output_dir", tmp_path)
    block = done.out[done.out.index("Recipe"):done.out.index("Epoch:")]
    assert "weight decay 0.3" in block and "effective lr   0.001 = 0.064 x 8 / 512" in block
    after = load(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in after] == [0.3 if group["weight_decay"] else 0.0 for group in before]
    assert {(group["lr"], tuple(group["betas"]), group["eps"]) for group in after} == {(0.001, (0.8, 0.9), 1e-3)}
    assert rows(tmp_path)[0]["train_lr"] == 0.001 and {float(line["lr"]) for line in epoch_lines(done.out)} == {0.001}


def test_a_run_that_is_resumed_with_a_rate_of_0_moves_nothing(works, small, tmp_path):
    works(SMALL, *PLAIN, "--sched=none", "--lr=0", "--epochs=3", "--resume", small / "checkpoint.pth", "--output_dir", tmp_path)
    assert_close(load(tmp_path / "checkpoint.pth")["model"], load(small / "checkpoint.pth")["model"])


@pytest.fixture
def disk(monkeypatch):
    """disk(failing, epoch) lets each write of that file fail while that epoch is saved; a save ends before the training goes on."""
    whole_save, whole_write, whole_row, broken = keeper.Keeper.save, checkpoint.replacing, utils.append_json, []

    def save(self, *args, **kwargs):
        whole_save(self, *args, **kwargs)
        self.wait()

    def full(path, epoch):
        if (path.name, epoch) in broken:
            raise OSError(28, "No space left on device")

    def write(path, content):
        full(path, content["epoch"])
        with whole_write(path) as file:
            torch.save(content, file)

    def append(path, row):
        full(path, row["epoch"])
        whole_row(path, row)

    monkeypatch.setattr(keeper.Keeper, "save", save)
    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(utils, "append_json", append)
    return lambda *what: broken.append(what)


@pytest.mark.parametrize("failing", ["log.txt", "checkpoint_best.pth", "checkpoint.pth"])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_failed_save_loses_neither_a_row_nor_the_best(start, works, monkeypatch, tmp_path, disk, failing, epoch):
    """Each epoch is better than the one before; the training goes on, and ends as if nothing had failed, or says so."""
    whole_evaluate = engine.evaluate

    def evaluate(loader, net, **kwargs):
        stats = whole_evaluate(loader, net, **kwargs)
        return stats | {"acc1": 100 * math.exp(-stats["loss"])}

    words = [SMALL, *PLAIN, "--epochs=3", "--lr=0.02", "--output_dir"]
    monkeypatch.setattr(engine, "evaluate", evaluate)
    monkeypatch.setattr(checkpoint, "copy", lambda path, other: checkpoint.write(other, checkpoint.read(path)))
    works(*words, tmp_path / "straight")
    disk(failing, epoch)
    done = start(*words, tmp_path / "run")
    why = f"{tmp_path}/run/{failing} cannot be written (No space left on device)"
    assert f"warning: {why}: the training goes on, what was saved before stays, and the next save tries again\n" in done.out or epoch == 2
    if failing == "log.txt" or epoch == 2:  # the row of that epoch is never written
        assert (done.status, done.err) == (1, f"error: {why}: the end of this training is not saved: make room, or mend the folder; "
                                              "--resume auto goes on from what is\n")
        return
    assert done.status == 0, done.err
    straight, run = rows(tmp_path / "straight"), rows(tmp_path / "run")
    for key in ("epoch", "train_loss", "test_acc1", "max_acc1"):
        assert [row[key] for row in run] == pytest.approx([row[key] for row in straight], rel=1e-5)
    for name in ("checkpoint.pth", "checkpoint_best.pth"):
        saved = load(tmp_path / "run" / name)
        assert saved["epoch"] == 2 and saved["best_accuracy"] == run[-1]["max_acc1"]
        assert_close(saved["model"], load(tmp_path / "straight" / name)["model"])


def test_the_best_file_and_the_claimed_best_agree_after_a_failed_save_of_a_better_epoch(works, monkeypatch, tmp_path, disk):
    """Also where nothing later is better: what could not be written is kept."""
    accuracies, tried = iter([20.0, 60.0, 40.0, 50.0]), checkpoint.write

    def write(path, content):
        if path.name == "checkpoint_best.pth" and content["epoch"] == 1 and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        tried(path, content)

    failed = []
    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: {"loss": 1.0, "acc1": next(accuracies), "acc5": 100.0, "images": 11})
    works(SMALL, "--epochs=4", "--output_dir", tmp_path)
    assert failed and [(row["epoch"], row["test_acc1"], row["max_acc1"]) for row in rows(tmp_path)] == [
        (0, 20, 20), (1, 60, 60), (2, 40, 60), (3, 50, 60)]
    best, last = load(tmp_path / "checkpoint_best.pth"), load(tmp_path / "checkpoint.pth")
    assert (best["epoch"], best["best_accuracy"], last["epoch"], last["best_accuracy"]) == (1, 60, 3, 60)


DISK_FILLS = """
import resource, sys
import main, keeper
save = keeper.Keeper.save
def limited(self, content, *args, **kwargs):
    self.wait()
    full = content["epoch"] in map(int, sys.argv[1].split(","))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save(self, content, *args, **kwargs)
keeper.Keeper.save = limited
sys.exit(main.run(sys.argv[2:]))
"""


@pytest.mark.parametrize("full, last, status", [("1", 3, 0), ("2,3", 1, 1)])
def test_a_disk_that_is_full_for_a_while_costs_one_line_and_ends_no_training(data, tmp_path, full, last, status):
    """The system itself refuses, in the middle of a file."""
    folder = tmp_path / "run"
    done = run([sys.executable, "-c", DISK_FILLS, full, *usual(data), SMALL, "--epochs=4", "--output_dir", folder], None,
               {"PYTHONPATH": str(ROOT)}, 600)
    why = rf"{re.escape(str(folder))}/checkpoint(_best)?\.pth cannot be written \(File too large\): "
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: /")]
    assert len(warnings) == 1 and re.fullmatch(rf"warning: {why}the training goes on, .* the next save tries again", warnings[0])
    assert done.returncode == status and [row["epoch"] for row in rows(folder)] == [0, 1, 2, 3]
    assert load(folder / "checkpoint.pth")["epoch"] == last and "Traceback" not in done.stderr
    assert bool(status) == bool(re.search(rf"^error: {why}the end of this training is not saved: .*$", done.stderr, re.M)), done.stderr
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("words, names", [
    (["--keep=2"], ["checkpoint_0003.pth", "checkpoint_0004.pth"]),
    (["--milestones=2"], ["checkpoint_0001_milestone.pth", "checkpoint_0003_milestone.pth"]),
    (["--keep=1", "--milestones=3"], ["checkpoint_0002_milestone.pth", "checkpoint_0004.pth"])])
def test_the_epochs_that_are_kept(works, tmp_path, words, names):
    words = [SMALL, "--epochs=5", "--no-eval", *words, "--output_dir", tmp_path]
    done = works(*words)
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "checkpoint.pth", "log.txt", "recipe.toml"]), done.out
    for name in names:
        assert load(tmp_path / name)["epoch"] == int(name.split("_")[1][:4])
    last = tmp_path / "checkpoint.pth"
    last.write_bytes(last.read_bytes()[:1000])
    again = works(*words, "--resume=auto", "--epochs=6")
    assert re.search(rf"note: cannot read the checkpoint {last} \(.*; {names[-1]} is the newest good one\n", again.out)
    epoch = int(names[-1].split("_")[1][:4])
    assert f"Resuming from {tmp_path}/{names[-1]}, after epoch {epoch}\n" in again.out
    assert [row["epoch"] for row in rows(tmp_path)] == list(range(6)) and (tmp_path / "checkpoint.pth.1").is_file()


def test_twins_goes_on_with_its_optimizer_and_best_accuracy(works, trained):
    done = works(TWINS, *PLAIN, "--epochs=4", "--lr=0.016", "--max_step=1", "--no-eval", "--resume", trained.folder / "checkpoint.pth")
    line, = epoch_lines(done.out)
    assert int(line["epoch"]) == 3 and float(line["loss"]) < 1.2 * rows(trained.folder)[-1]["train_loss"]
    expected = 1e-5 + (2.5e-4 - 1e-5) * (1 + math.cos(math.pi * 3 / 4)) / 2
    assert float(line["lr"]) == pytest.approx(expected, rel=1e-5)


def test_the_best_accuracy_survives_a_worse_epoch_after_a_resume(works, small, tmp_path):
    content = load(small / "checkpoint.pth") | {"best_accuracy": 99.5}
    torch.save(content, tmp_path / "checkpoint.pth")
    done = works(SMALL, *PLAIN, "--epochs=3", "--resume=auto", "--output_dir", tmp_path)
    assert "Max accuracy: 99.50%" in done.out and load(tmp_path / "checkpoint.pth")["best_accuracy"] == 99.5
    assert not (tmp_path / "checkpoint_best.pth").exists()


def test_a_damaged_newest_checkpoint_gives_way_to_the_best(works, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    last, best = folder / "checkpoint.pth", folder / "checkpoint_best.pth"
    last.write_bytes(last.read_bytes()[:1000])
    os.utime(best, (1, 1))
    after = load(best)["epoch"]
    done = works(SMALL, *PLAIN, "--epochs=3", "--resume=auto", "--output_dir", folder)
    assert f"Resuming from {best}, after epoch {after}" in done.out
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]


def test_a_finished_run_says_that_nothing_is_left(works, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    before = files(folder)
    done = works(SMALL, "--epochs=2", "--resume=auto", "--output_dir", folder)
    assert "Nothing to train: epoch 2 of 2 is next (--epochs)" in done.out and files(folder) == before


def test_a_new_run_in_a_used_folder_moves_the_old_files_aside(works, small, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    before = files(folder)
    done = works(SMALL, "--epochs=1", "--output_dir", folder)
    assert f"An earlier run's files in {folder} are now checkpoint.pth.1, checkpoint_best.pth.1, log.txt.1" in done.out
    assert all((folder / f"{name}.1").read_bytes() == content for name, content in before.items())
    assert [row["epoch"] for row in rows(folder)] == [0]


def test_one_command_starts_a_training_and_goes_on_with_it(works, tmp_path):
    words = [SMALL, *PLAIN, "--lr=0.1", "--epochs=2", "--max_step=3", "--resume=auto", "--output_dir", tmp_path / "run"]
    first, second = works(*words), works(*words)
    assert f"--resume auto: no checkpoint.pth in {tmp_path}/run: the training starts from the beginning\n" in first.out
    assert f"Resuming from {tmp_path}/run/checkpoint" in second.out and "the beginning" not in second.out
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1]


def test_a_training_that_says_no_folder_saves_into_one_with_the_models_name(data, tmp_path):
    """As upstream's. An earlier run's files there are moved aside; an evaluation and an empty name write nothing."""
    program = [sys.executable, ROOT / "main.py", *(word for word in usual(data) if "output" not in word), SMALL]
    for words in (["--epochs=1"], ["--epochs=1", "--seed=5"], ["--epochs=1", "--output_dir="], ["--throughout"],
                  ["--eval", "--resume=auto"]):
        done = run(program + words, tmp_path, None, 600)
        assert done.returncode == 0, done.stderr
        assert ("Checkpoints and log.txt go to test_convnext\n" in done.stdout) == ("--epochs=1" in words and "--output_dir=" not in words)
        assert ("warning: --output_dir is empty: nothing of this training is saved\n" in done.stdout) == ("--output_dir=" in words)
        assert os.listdir(tmp_path) == ["test_convnext"]
    assert sorted(files(tmp_path / "test_convnext")) == sorted(f"{name}{end}" for name in (
        "checkpoint.pth", "checkpoint_best.pth", "log.txt", "recipe.toml") for end in ("", ".1"))


def test_weights_alone_start_a_training_at_epoch_0_and_say_so(works, small, tmp_path):
    torch.save({"model": load(small / "checkpoint.pth")["model"]}, tmp_path / "official.pth")
    done = works(SMALL, *PLAIN, "--epochs=1", "--lr=0", "--min-lr=0", "--weight-decay=0", "--resume", tmp_path / "official.pth",
                 "--output_dir", tmp_path / "run")
    assert f"{tmp_path}/official.pth holds weights only: the training starts at epoch 0" in done.out
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0]
    assert_close(load(tmp_path / "run" / "checkpoint.pth")["model"], load(small / "checkpoint.pth")["model"])  # a rate of 0


def test_start_epoch_says_where_to_begin_without_a_checkpoint(works, tmp_path):
    works(SMALL, "--start_epoch=1", "--epochs=3", "--output_dir", tmp_path)
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2]


# ---- fine-tuning ----

@pytest.fixture(scope="session")
def two_classes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "classes"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("leaves"))
    return folder


@pytest.mark.parametrize("how", [["--finetune"], ["--finetune", "yes", "--resume"]])
def test_fine_tuning_to_other_classes_replaces_the_head_and_trains_in_train_mode(works, trained, two_classes, tmp_path, monkeypatch, how):
    modes, forward = set(), torch.nn.Dropout.forward

    def watch(module, x):
        modes.add(module.training)
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Dropout, "forward", watch)
    weights = trained.folder / "checkpoint_best.pth"
    done = works(TWINS, "--data-path", two_classes, "--drop=0.1", "--lr=0", "--min-lr=0", "--warmup-lr=0", "--max_step=1", "--no-eval",
                 "--output_dir", tmp_path, *how, weights)
    assert f"note: {weights}: its head has 3 classes and the data 2, so the head starts anew\n" in done.out
    assert f"Fine-tuning from {weights}\n" in done.out
    assert rows(tmp_path)[0]["epoch"] == 0 and modes == {True}
    saved, old = load(tmp_path / "checkpoint.pth"), load(weights)["model"]
    head = {"head.weight", "head.bias"}
    assert saved["model"]["head.weight"].shape == (2, 512) and saved["classes"] == ["flower", "temple"]
    body = saved["model"].keys() - head
    assert_close({key: saved["model"][key] for key in body}, {key: old[key] for key in body})  # a rate of 0


def test_fine_tuning_to_as_many_classes_keeps_the_head(works, trained):
    done = works(TWINS, *PLAIN, "--finetune", trained.folder / "checkpoint.pth", "--max_step=1", "--no-eval")
    assert f"Fine-tuning from {trained.folder}/checkpoint.pth\n" in done.out
    assert printed_losses(done.out)[0] < 1.2 * rows(trained.folder)[-1]["train_loss"]


def test_fine_tuning_to_as_many_but_other_classes_starts_a_new_head(works, small, tmp_path):
    content = load(small / "checkpoint.pth")
    for name, classes, said in (("same", content["classes"], ""), ("order", content["classes"][::-1], "another order"),
                                ("names", ["a", "b", "c"], "so the head starts anew"), ("none", None, "does not say what its 3 outputs")):
        file = tmp_path / f"{name}.pth"
        torch.save({key: value for key, value in content.items() if key != "classes"} | ({"classes": classes} if classes else {}), file)
        done = works(SMALL, "--finetune", file, "--max_step=1", "--no-eval", "--lr=0", "--min-lr=0", "--warmup-lr=0",
                     "--output_dir", tmp_path / f"run {name}")
        notes = [line for line in done.out.splitlines() if line.startswith(f"note: {file}")]
        assert len(notes) == bool(said) and said in "".join(notes), done.out
        saved = load(tmp_path / f"run {name}" / "checkpoint.pth")
        assert torch.equal(saved["model"]["head.fc.weight"], content["model"]["head.fc.weight"]) == (name != "names")
        assert saved["classes"] == (classes if name == "order" else content["classes"])


# ---- evaluation of other people's files ----

def published(state):
    """name -> what is written"""
    return {
        "official.pth": state, "model.pth": {"model": state}, "timm.pth": {"state_dict": state},
        "original.pth": {"model": state, "epoch": 299, "args": argparse.Namespace(lr=5e-4, model="alt_gvt_small")},
        "ddp.pth": {"model": {f"module.{key}": value for key, value in state.items()}},
        "compiled.pth": {f"_orig_mod.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize("name", [*published({}), "weights.safetensors"])
def test_every_kind_of_file_evaluates_to_the_same_accuracy(works, trained, data, tmp_path, name):
    state = load(trained.folder / "checkpoint.pth")["model"]
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(published(state)[name], tmp_path / name)
    done = works(TWINS, "--eval", "--resume", tmp_path / name)
    (found,), expected = evaluations(done.out), (rows(trained.folder)[-1][key] for key in ("test_acc1", "test_acc5", "test_loss"))
    assert found == pytest.approx(tuple(expected), abs=6e-4)
    assert done.out.endswith(f"Accuracy of the network on the {VAL_IMAGES} test images: {found[0]:.3f}%\n") and "Epoch:" not in done.out
    (tmp_path / name).unlink()


def test_an_evaluation_needs_no_training_images(works, small, data, tmp_path):
    shutil.copytree(data / "val", tmp_path / "data" / "val")
    done = works(SMALL, "--data-path", tmp_path / "data", "--eval", "--resume", small / "checkpoint.pth")
    assert evaluations(done.out)[0][0] == pytest.approx(rows(small)[-1]["test_acc1"], abs=6e-4)


# ---- a loss that is not finite ----

def names_of_batch(data, epoch, batch, size, rank=0, ranks=1):
    paths = [path for path, _ in datasets.ImageFolder(data / "train").samples]
    sampler = ShuffleSampler(paths, ranks, rank, seed=0)
    sampler.set_epoch(epoch)
    return [paths[i] for i in list(sampler)[batch * size:(batch + 1) * size]]


def without_circumstances(text):
    """Of a loss that became nan at an enormous rate."""
    return re.sub(r" \(rate [\d.]+e\+28, gradient norm nan, first in [\w.]+\)", "", text)


def test_a_loss_that_is_not_finite_ends_a_run_with_status_3_and_the_files(start, small, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    before = saved_files(folder)
    done = start(SMALL, *PLAIN, "--epochs=9", "--resume=auto", "--lr=1e30", "--output_dir", folder)  # the first update ruins the weights
    assert done.status == 3 and saved_files(folder) == before
    assert without_circumstances(done.err) == ("error: the loss is not finite in epoch 2, iteration 1: lower --lr, or look at the images "
                                               f"of that batch: {', '.join(names_of_batch(data, 2, 1, 8))}\n")


def test_a_loss_that_is_not_finite_ends_all_ranks(run_ranks, small, data, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    before = saved_files(folder)
    done = run_ranks(2, *usual(data), SMALL, *PLAIN, "--epochs=9", "--resume=auto", "--lr=1e30", "--batch-size=4",
                     "--output_dir", folder)
    assert done.returncode == 1 and saved_files(folder) == before  # torchrun's own status; its summary has ours
    assert re.search(r"exitcode +: 3", done.stderr) and "NonFiniteLoss" not in done.stderr
    names = ", ".join(name for rank in range(2) for name in names_of_batch(data, 2, 1, 4, rank, ranks=2))
    assert [without_circumstances(line) for line in done.stderr.splitlines() if line.startswith("error")] == [
        f"error: the loss is not finite in epoch 2, iteration 1: lower --lr, or look at the images of that batch: {names}"]


@pytest.mark.parametrize("known, step, names", [
    ([(None, ()), (3, ["c"]), (1, ["a", "b"])], 1, ["a", "b"]), ([(0, ["a"]), (0, ["b"]), (1, ["c"])], 0, ["a", "b"]),
    ([(7, ["a"]), (None, ())], 7, ["a"])])
def test_the_earliest_bad_batch_of_all_ranks_is_the_one_that_is_named(monkeypatch, known, step, names):
    """Later ones caught it from the weights. Every rank says the same."""
    def gather(found, own):
        told.append(own)
        found[:] = [(step, "loss", [f"{name}.png" for name in names], None, "") for step, names in known]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    dataset = SimpleNamespace(name=lambda name: f"{name}.png")
    for rank, own in enumerate(known):
        told = []
        error = training.named(engine.NonFiniteLoss(4, *own), 4, dataset, devices.Ranks(torch.device("cpu"), rank, len(known)))
        assert (error.step, error.names) == (step, [f"{name}.png" for name in names]) and len(told) == 1
        assert told[0] == (own[0], "loss", [f"{name}.png" for name in own[1]], None, "")
        assert str(error) == f"the loss is not finite in epoch 4, iteration {step}"


# ---- mistakes ----

@pytest.fixture
def place(tmp_path, small):
    """A folder with an earlier run in run/; what a mistake may not change."""
    shutil.copytree(small, tmp_path / "run")
    (tmp_path / "file").write_text("not a folder")
    return tmp_path


def broken_data(kind, data, folder):
    shutil.copytree(data, folder)
    image = folder / "train" / "leaves" / "03.png"
    if kind == "empty class":
        shutil.rmtree(image.parent)
        image.parent.mkdir()
    elif kind == "other classes":
        (folder / "val" / "leaves").rename(folder / "val" / "branches")
    elif kind == "no val":
        shutil.rmtree(folder / "val")
    elif kind == "unreadable":
        image.write_bytes(image.read_bytes()[:60])
    elif kind == "no image":
        image.write_text("<html>404</html>")
    elif kind == "unreadable in val":
        (folder / "val" / "leaves" / "09.png").write_bytes(b"")
    elif kind.startswith("renamed class"):
        for split in ("train", "val"):
            (folder / split / "temple").rename(folder / split / "pagoda")
    elif kind == "fewer classes":
        shutil.rmtree(folder / "train" / "temple")
        shutil.rmtree(folder / "val" / "temple")
    return folder


MISTAKES = {  # kind: words, a regular expression of the message; DATA, RUN and FILE stand for paths
    "missing path": ("--data-path DATA/nothing", r"--data-path DATA/nothing: no such folder"),
    "empty path": ("--data-path=", r"no data set: --data-path FOLDER"),
    "no val": ("--data-path DATA", r"--data-path DATA: it has no folder val/ \(expected train/ and val/\); --no-eval trains without"),
    "empty class": ("--data-path DATA", r"--data-path DATA: .*leaves.*: every class is a folder in train/ with at least one image"),
    "other classes": ("--data-path DATA", r"--data-path DATA: train/ has 3 classes and val/ 3, and they differ: only in train "
                      r"\['leaves'\], only in val \['branches'\]: make the folders agree"),
    "wrong model": ("--model=alt_gvt_smal", r"--model alt_gvt_smal: no such model: one of pcpvt_small_v0, .*timm\.list_models\(\)"),
    "weights of another model": (
        "--model=test_vit --resume RUN/checkpoint.pth",
        r"RUN/checkpoint.pth does not fit: it is of another model \(--model\); missing keys: .* more; unexpected keys: .* more"),
    "fine-tuning from another model": (f"{TWINS} --finetune RUN/checkpoint.pth", r"RUN/checkpoint.pth does not fit: it is of another .*"),
    "fewer classes": ("--data-path DATA --resume RUN/checkpoint.pth", r"RUN/checkpoint.pth was trained on other classes: 3 and the data 2, "
                      r"only there \['temple'\], only here \[\]: use its data, its --class-map \w+, or --finetune"),
    "renamed class, evaluated": (
        "--data-path DATA --eval --resume RUN/checkpoint.pth",
        r"RUN/checkpoint.pth was trained on other classes: 3 and the data 3, only there \['temple'\], only here \['pagoda'\]: "
        r"use its data, --finetune, or --class-map \w+"),
    "renamed class, resumed": ("--data-path DATA --resume auto", r"RUN/checkpoint(_best)?.pth was trained on other classes: .*"),
    "renamed class, measured": (
        "--data-path DATA --throughout --resume RUN/checkpoint.pth", r"RUN/checkpoint.pth was trained on other classes: .*"),
    "no moving average": ("--eval --model-ema --resume RUN/checkpoint.pth",
                          r"RUN/checkpoint.pth holds no moving average: it was trained without --model-ema"),
    "evaluation of a new head": ("--eval --finetune RUN/checkpoint.pth", r"--eval evaluates weights as they are: give them as --resume .*"),
    "a model of a fixed size": (
        "--model=efficientformer_l1", r"--model efficientformer_l1 fails on an image of 32 pixels \(.*\): its own size is .* 224"),
    "betas for an optimizer without": ("--opt adafactor --opt-betas 0.9 0.99", r"--opt adafactor: it has no betas \(--opt-betas\): .*"),
    "missing checkpoint": (
        "--resume RUN/epoch9.pth", r"no checkpoint RUN/epoch9.pth: look at the path of --resume, --finetune or --teacher-path"),
    "missing weights": (
        "--finetune RUN/epoch9.pth", r"no checkpoint RUN/epoch9.pth: look at the path of --resume, --finetune or --teacher-path"),
    "no checkpoint": ("--resume FILE", r"cannot read the checkpoint FILE .*"),
    "auto without a checkpoint": ("--eval --resume auto --output_dir DATA", r"--resume auto: no checkpoint.pth in DATA"),
    "auto without a folder": ("--resume auto --output_dir=", r"--resume auto looks in --output_dir: say which folder"),
    "odd batch": ("--batch-size 7", r"--batch-size 7 is odd, and mixup pairs the images of a batch: use an even batch, or .*"),
    "large batch": ("--batch-size 26", r"the training set has 24 images, too few for one batch of 26 on each of 1 ranks: .*"),
    "no GPU": ("--device cuda", r"--device cuda: no cuda device is visible: .* or use --device cpu"),
    "no second GPU": ("--device cuda:1", r"--device cuda:1: no cuda device is visible: .* or use --device cpu"),
    "no NPU": ("--device npu", r"--device npu: no npu device is visible.* or use --device cpu"),
    "no such device": ("--device tpu", r"--device tpu: say npu, cuda, gpu, cpu or auto, or one card as npu:3 or cuda:3"),
    "unwritable folder": ("--output_dir FILE/run", r"--output_dir FILE/run cannot be written \(Not a directory\): choose another folder"),
    "missing teacher": ("--distillation-type soft --teacher-model alt_gvt_small --teacher-path RUN/t.pth", r"no checkpoint RUN/t.pth: .*"),
    "wrong teacher": ("--distillation-type soft --teacher-model resnet --teacher-path RUN/t.pth",
                      r"--teacher-model resnet: no such model: .*"),
    "no apex": ("--amp apex", r"--amp apex: .*: install Ascend's apex, or go on without it: --amp auto"),
    "wrong optimizer": ("--opt adamww", r"--opt adamww: .*\btimm\b.*"),
    "NPU's optimizer": ("--opt npufusedadamw", r"--opt npufusedadamw runs on an NPU, not on cpu: use --opt adamw"),
    "unknown option": ("--batchsize 3", r"unrecognized arguments: --batchsize 3 \(python main.py --help lists the options\)"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_line_before_training_and_changes_nothing(start, place, data, monkeypatch, kind):
    monkeypatch.setattr(devices, "available", lambda kind: 0)
    data = broken_data(kind, data, place / "data")
    before = files(place)
    words, message = MISTAKES[kind]
    for name, path in (("DATA", data), ("RUN", place / "run"), ("FILE", place / "file")):
        words, message = words.replace(name, str(path)), message.replace(name, re.escape(str(path)))
    done = start(SMALL, "--epochs=3", "--output_dir", place / "run", *words.split())
    assert done.status == 2 and "Epoch:" not in done.out, done.err
    assert re.fullmatch(rf"error: {message}( \(python main.py --help lists the options\))?\n", done.err), done.err
    assert files(place) == before


@pytest.mark.parametrize("kind, path", [("unreadable", "train/leaves/03.png"), ("no image", "train/leaves/03.png"),
                                        ("unreadable in val", "val/leaves/09.png")])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_when_it_is_met(start, place, data, kind, path, workers):
    data = broken_data(kind, data, place / "data")
    before = files(place)
    done = start(SMALL, "--data-path", data, f"--num_workers={workers}", "--resume", place / "run" / "checkpoint.pth", "--epochs=3",
                 "--allow-change")
    image = re.escape(str(data / path))
    assert done.status == 2
    assert re.fullmatch(rf"error: cannot read the image {image} \(.+\): replace it or remove it, or go on without such images: "
                        r"--max-bad-fraction 0\.001\n", done.err), done.err
    assert files(place) == before


def test_the_same_classes_in_another_order_are_evaluated_and_trained_by_name(works, place):
    """The head's rows stand in the order that the file records: its accuracy is the same, and so is the next loss."""
    content = load(place / "run" / "checkpoint.pth")
    order = [2, 0, 1]
    other = content | {"classes": [content["classes"][i] for i in order], "model": {
        key: value[order] if key.startswith("head.fc.") else value for key, value in content["model"].items()}}
    file = place / "order.pth"
    torch.save(other, file)
    results = []
    for path in (place / "run" / "checkpoint.pth", file):
        done = works(SMALL, "--eval", "--resume", path)
        assert (f"note: {file} has the data's classes in another order, ['temple', 'flower', 'leaves']: labels follow it" in done.out) == (
            path == file)
        results.append([line for line in done.out.splitlines() if line.startswith(("* Acc@1", "Accuracy of"))])
        works(SMALL, "--epochs=3", "--max_step=1", "--no-eval", "--mixup=0", "--cutmix=0", "--resume", path,
              "--output_dir", place / path.stem)
        results[-1].append(pytest.approx(rows(place / path.stem)[-1]["train_loss"], rel=1e-4))
    assert results[0] == results[1] and len(results[0]) == 3
    assert load(place / "order" / "checkpoint.pth")["classes"] == other["classes"]


@pytest.fixture(scope="session")
def shards(data, tmp_path_factory):
    """The images as shards of 4, with their index; copy it."""
    folder = tmp_path_factory.mktemp("shards") / "squares"
    write_shards(data, folder, maxcount=4)
    return folder


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:This DataLoader will create:UserWarning")
def test_shards_are_evaluated_as_their_folders_and_trained_with_repeated_augmentation(start, place, shards):
    """The same accuracy to the last digit, and as many iterations, with workers too."""
    words = [SMALL, "--eval", "--resume", place / "run" / "checkpoint.pth"]
    told = [re.search(r"^Accuracy .*", start(*words, *more).out, re.M)[0] for more in (
        [], ["--data-path", shards], ["--data-path", shards, "--num_workers=2", "--batch-size=3"])]
    assert told[0] == told[1] == told[2] and "on the 11 test images" in told[0]
    for more in ([], ["--repeated-aug", "--num_workers=2"]):
        done = start(SMALL, "--data-path", shards, "--epochs=1", "--no-eval", *more)
        assert done.status == 0 and "3 iterations an epoch" in done.out, done.err
        assert "train/: 24 images in 3 classes, from 8 (flower) to 8 (flower) a class" in done.out


@pytest.mark.parametrize("workers, words", [(0, ["--max_step=1"]), (0, ["--eval", "--resume"]), (2, ["--eval", "--resume"])])
def test_a_damaged_shard_behind_its_index_is_one_line(start, run_main, place, data, shards, workers, words):
    root = shutil.copytree(shards, place / "shards")
    split = "val" if "--eval" in words else "train"
    (root / split / "000001.tar").write_bytes(b"no tar" * 200)
    words = [SMALL, "--data-path", root, f"--num_workers={workers}", *words]
    words += [place / "run" / "checkpoint.pth"] if "--eval" in words else []
    if workers:  # as a user starts it: nothing else on stderr either
        done = run_main(*usual(data), *words)
        status, err = done.returncode, "".join(line + "\n" for line in done.stderr.splitlines() if "DataLoader will create" not in line)
    else:
        done = start(*words)
        status, err = done.status, done.err
    assert status == 2, err
    assert re.fullmatch(rf"error: cannot read the shard {re.escape(str(root))}/{split}/000001.tar \(it has 1,200 bytes, and .+\): "
                        r"write it again, .+\n", err), err


def test_a_mistake_on_the_real_command_line_is_one_line(run_main, place):
    done = run_main(*usual(place / "nothing"), SMALL, "--output_dir", place / "new")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --data-path {place}/nothing: no such folder\n"
    assert not (place / "new").exists()


def test_a_mistake_on_two_ranks_is_said_once(run_ranks, data, place):
    before = files(place)
    done = run_ranks(2, *usual(data), SMALL, "--batch-size=14", "--output_dir", place / "run")
    assert done.returncode != 0 and "Epoch:" not in done.stdout and files(place) == before
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert errors == ["error: the training set has 24 images, too few for one batch of 14 on each of 2 ranks: use a smaller --batch-size"]
    assert re.search(r"exitcode +: 2", done.stderr) and 'main.py", line' not in done.stderr


def test_a_crash_shows_its_traceback_and_has_status_1(start, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(engine, "train_one_epoch", crash)
    done = start(SMALL, "--epochs=1")
    assert done.status == 1 and "Traceback" in done.err and done.err.endswith("RuntimeError: shapes differ\n")


def test_two_ranks_end_with_one_line_where_the_first_cannot_write_the_output_folder(run_ranks, data, tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = run_ranks(2, *usual(data), SMALL, "--batch-size=2", "--output_dir", tmp_path / "file" / "run")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and errors == [f"error: --output_dir {tmp_path / 'file' / 'run'} cannot be written (Not a directory): "
                                               "choose another folder"]
    assert "Epoch:" not in done.stdout and (tmp_path / "file").read_text() == "no folder"


def test_a_second_run_in_a_folder_ends_with_one_line_on_all_ranks_and_changes_nothing(start, run_ranks, data, place):
    with hold(place / "run") as other:
        before = files(place)
        for done in (start(SMALL, "--output_dir", place / "run"), run_ranks(2, *usual(data), SMALL, "--output_dir", place / "run")):
            errors = [line for line in (getattr(done, "err", "") or done.stderr).splitlines() if line.startswith("error")]
            assert len(errors) == 1 and f"--output_dir {place}/run is in use by another run (process {other.pid} on" in errors[0]
            assert getattr(done, "status", 2) == 2 and files(place) == before
        assert re.search(r"exitcode +: 2", done.stderr) and done.returncode == 1
        assert start(SMALL, "--eval", "--resume", place / "run" / "checkpoint.pth", "--output_dir", place / "run").status == 0
        other.kill()
    assert start(SMALL, "--epochs=1", "--output_dir", place / "run").status == 0
    assert not (place / "run" / ".lock").exists()


def test_a_checkpoint_says_what_it_was_trained_with_and_other_data_are_refused(start, works, small, data, tmp_path):
    """By name; a copy elsewhere is no change."""
    run_folder, other = shutil.copytree(small, tmp_path / "run"), shutil.copytree(data, tmp_path / "data")
    made = load(run_folder / "checkpoint.pth")["manifest"]
    assert made["versions"]["torch"].startswith(".".join(torch.__version__.split(".")[:2])) and made["versions"]["timm"] == timm.__version__
    assert made["data"]["images"] == TRAIN_IMAGES
    words = [SMALL, *PLAIN, "--epochs=2", "--resume=auto", "--output_dir", run_folder, "--data-path", other]
    done = works(*words, "--lr=0.1")
    assert "is not what" not in done.out and "Nothing to train" in done.out
    done = works(*words, "--lr=0.2", "--weight-decay=0.1")
    assert f"note: this is not what {run_folder}/checkpoint.pth was trained with: --weight-decay 0.05 -> 0.1, --lr 0.1 -> 0.2\n" in done.out
    next((other / "train" / "leaves").iterdir()).unlink()
    words.append("--lr=0.1")
    before = files(run_folder)
    done = start(*words)
    assert (done.status, files(run_folder)) == (2, before) and done.err == (
        f"error: {run_folder}/checkpoint.pth was trained on other data (24 images then and 23 now): give it its own, or --allow-change "
        "goes on with these\n")
    done = works(*words, "--allow-change")
    assert "was trained on other data (24 images then and 23 now): --allow-change goes on with these\n" in done.out
