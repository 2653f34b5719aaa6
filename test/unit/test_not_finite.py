"""What becomes of a training one of whose batches has a loss that is not finite: it stops, leaves the update out, or goes back."""
import contextlib
import io
import math

import pytest
import torch
from test_exact import RECIPE, assert_same, left

import loaders
import main

PLAIN = ["--mixup=0", "--cutmix=0", "--epochs=1", "--no-eval"]
UPDATES = 6


@pytest.fixture
def train(tiny_folder, tmp_path, monkeypatch):
    """train(folder, *words, bad=(3,)) -> status, output and errors of a run whose batches `bad` of epoch 0 hold an image of nan"""
    getitem = loaders.DrawnImages.__getitem__

    def start(folder, *words, bad=(3,), plain=PLAIN):
        def spoiled(images, draw, read=None):
            image, *rest = getitem(images, draw, read)
            order = [index for batch in batches.of(bad) for _, index, _ in batch[:1]]
            return (torch.full_like(image, math.nan) if draw[1] in order else image, *rest)

        build, out, err = loaders.build_loader, io.StringIO(), io.StringIO()

        def keep(dataset, is_train, *words, **more):
            nonlocal batches
            loader = build(dataset, is_train, *words, **more)
            batches = loader.batch_sampler if is_train else batches
            return loader
        batches = None
        with monkeypatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patched.setattr(loaders, "build_loader", keep)
            patched.setattr(loaders.DrawnImages, "__getitem__", spoiled)
            status = main.run([*RECIPE, *plain, "--data-path", str(tiny_folder), "--output_dir", str(tmp_path / folder), *words])
        return status, out.getvalue(), err.getvalue()
    return start


@pytest.mark.parametrize("words", [["--on-nan=skip", "--opt=lamb"], ["--on-nan=skip"], ["--on-nan=skip", "--clip-grad=0"],
                                   ["--on-nan=skip", "--amp=fp16"]], ids=" ".join)
def test_an_update_that_is_left_out_changes_nothing(train, tmp_path, words):
    """Neither weights nor moments; and the run goes on."""
    for steps in (3, 4, 5):
        status, out, err = train(str(steps), *words, f"--max_step={steps}")
        assert status == 0, err
        assert ("updates from iterations 3: left out, 1 of 10" in out) == (steps > 3)
    before, after, later = (left(tmp_path / str(steps))[0] for steps in (3, 4, 5))
    for part in ("model", "optimizer"):
        assert_same(after[part], before[part], part)
    assert (before["progress"]["skipped"], after["progress"]["skipped"]) == (0, 1)
    if "--amp=fp16" not in words:  # its first scale overflows for longer than this runs
        assert not torch.equal(later["model"]["stem.0.weight"], after["model"]["stem.0.weight"])
    assert math.isfinite(later["progress"]["loss"]) and later["progress"]["losses"] == 4


def test_going_back_to_the_update_before_is_leaving_one_out(train, tmp_path):
    status, out, err = train("back", "--on-nan=rollback", "--ckpt-steps=1", "--print-freq=1")
    assert status == train("out", "--on-nan=skip")[0] == 0, err
    assert "warning: the loss is not finite in epoch 0, iteration 3 (rate " in out and "1 of 10 that may be" in out
    assert_same(left(tmp_path / "back")[0]["model"], left(tmp_path / "out")[0]["model"])
    assert_same(left(tmp_path / "back")[1], left(tmp_path / "out")[1])


@pytest.mark.parametrize("words", [["--sched=plateau", "--patience-epochs=0", "--warmup-epochs=0", "--epochs=4"], ["--num_workers=2"]],
                         ids=["plateau", "workers"])
def test_going_back_to_the_beginning_of_an_epoch_is_leaving_out_its_first(train, tmp_path, words):
    """The rates of the epoch are set from what is remembered, once; and workers that have read ahead begin again."""
    plain = ["--mixup=0", "--cutmix=0"]
    for folder, how in (("back", "rollback"), ("out", "skip")):
        status, _, err = train(folder, f"--on-nan={how}", "--print-freq=1", *words, bad=(0,), plain=plain)
        assert status == 0, err
    (back, rows), (out, others) = left(tmp_path / "back"), left(tmp_path / "out")
    for part in ("model", "optimizer", "schedule", "progress"):  # the average counts the update that is skipped, as one that overflows
        assert_same(back[part], out[part], part)
    for key in ("train_lr", "train_loss", "test_loss"):
        assert [row[key] for row in rows] == [row[key] for row in others]


def test_going_back_takes_the_last_save_and_goes_on_after_the_update(train, tmp_path):
    """As a run that was cut at the save and told that it had done the updates to the bad one."""
    status, out, err = train("back", "--on-nan=rollback", "--ckpt-steps=2", "--print-freq=100", bad=(3,))
    assert status == 0, err
    train("by hand", "--max_step=2")
    saved = torch.load(tmp_path / "by hand" / "checkpoint.pth", weights_only=True)
    saved["progress"]["updates"] = 4
    torch.save(saved, tmp_path / "by hand" / "checkpoint.pth")
    assert train("by hand", "--resume=auto")[0] == 0
    assert_same(left(tmp_path / "back")[0]["model"], left(tmp_path / "by hand")[0]["model"])


def test_two_in_one_window_are_two(train):
    """--print-freq 100: the second is met once the first is behind."""
    status, out, err = train("two", "--on-nan=rollback", "--nan-limit=2", "--print-freq=100", bad=(1, 3))
    assert status == 0, err
    assert [line.split("; ")[1] for line in out.splitlines() if "back to the weights" in line] == [
        f"{n} of 2 that may be (--nan-limit)" for n in (1, 2)]


def test_batch_norms_see_what_is_skipped(train):
    status, _, err = train("norms", "--on-nan=skip", "--model=test_resnet")
    assert (status, err) == (2, "error: --on-nan skip: the batch norms of test_resnet have taken in what an update leaves out: --on-nan "
                                "rollback\n")


@pytest.mark.parametrize("how", ["skip", "rollback"])
def test_too_many_end_the_run(train, how):
    status, _, err = train("many", f"--on-nan={how}", "--nan-limit=1", "--print-freq=1", bad=(1, 4))
    assert status == 3 and "error: the loss is not finite in epoch 0, iteration 4 (rate " in err


def test_a_stop_says_where_it_began_and_keeps_the_weights(train, tmp_path, tiny_folder):
    status, out, err = train("stop", "--ckpt-steps=1", "--print-freq=100")
    assert status == 3
    assert ("error: the loss is not finite in epoch 0, iteration 3 (rate 1e-06, gradient norm nan, first in stem.0): lower --lr, or look "
            "at the images of that batch: ") in err
    assert err.count(str(tiny_folder)) == 4
