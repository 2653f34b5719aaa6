"""The rates of a run beside upstream's loop, which asks timm 0.3.2 after each epoch; and what the recipe block says of them."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import build_optim
from torch import nn

import optim
import options

pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
PEAK, FLOOR, FIRST = 1e-3, 1e-5, 1e-6


def build(**settings):
    settings = dict(lr=5e-4, global_batch=1024, epochs=30) | settings
    return build_optim(nn.Linear(4, 3), **settings)


def run(optimizer, schedule, epochs, first=0):
    found = []
    for epoch in range(first, epochs):
        schedule.start_epoch(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def noise(step, seed, start, end, limit=0.67):
    """timm 0.3.2's: normal draws of the seed and the step, until one is within the limit."""
    if not start <= step < end:
        return 0.0
    generator = torch.Generator().manual_seed(seed + step)
    while abs(draw := torch.randn(1, generator=generator).item()) >= limit:
        pass
    return draw


def upstream(sched, epochs, warmup, seed=0, start=0, end=0, decay_epochs=7):
    """The rate of each epoch of upstream's loop: the scheduler's first one, then after epoch e that of its step e."""
    shape = {"cosine": lambda t: FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * t / epochs)) / 2,
             "tanh": lambda t: FLOOR + (PEAK - FLOOR) * (1 - math.tanh(-6 + 10 * t / epochs)) / 2,
             "step": lambda t: PEAK * 0.1 ** (t // decay_epochs)}[sched]
    top = shape(warmup) if sched == "tanh" else PEAK

    def step(t):
        rate = FIRST + t * (top - FIRST) / warmup if t < warmup else shape(t)
        return rate * (1 + noise(t, seed, start, end))

    return [FIRST if warmup else PEAK] + [step(t) for t in range(epochs - 1)]


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step"])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("fractions", [None, (0.0, 0.9), (0.4, 1.0)])
def test_rates_are_upstreams(sched, warmup, fractions):
    """All 30 epochs, with noise from the first step on as well: epoch 0 has none."""
    found = run(*build(sched=sched, warmup_epochs=warmup, lr_noise=fractions, seed=3, decay_epochs=7)[:2], 30)
    start, end = (30 * f for f in fractions or (0, 0))
    assert found == pytest.approx(upstream(sched, 30, warmup, 3, start, end), rel=1e-12)
    assert found[0] == (FIRST if warmup else pytest.approx(PEAK))


def test_tanh_is_not_todays_curve():
    """Its middle is at 0.6 of the schedule upstream; timm's of today has it at 0.7."""
    found = run(*build(sched="tanh", epochs=100, sched_lag=0)[:2], 100)
    assert found[60] == pytest.approx((PEAK + FLOOR) / 2)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "poly", "constant", "none", "plateau"])
@pytest.mark.parametrize("first, lag", [(0, 1), (7, 1), (0, 0), (7, 12)])
def test_rates_are_told_before_the_run_and_nothing_moves(sched, first, lag):
    optimizer, schedule, _ = build(sched=sched, lr_noise=(0.2, 0.8), sched_lag=lag)
    before = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    told = schedule.rates(range(first, 30))
    assert (optimizer.state_dict(), schedule.state_dict()) == before
    assert told == run(optimizer, schedule, 30, first)
    assert schedule.rates(range(30, 30)) == []


def doubts(words, peak=None):
    args = options.parse(["--data-path=x", *words.split()])
    return options.doubts(args, optim.effective_lr(args.lr, args.batch_size * args.accum_steps) if peak is None else peak)


@pytest.mark.parametrize("words, said", [
    ("--batch-size 8", "the effective rate 7.8125e-06 is below the floor --min-lr 1e-05, so that the rate rises to the end"),
    ("--batch-size 8 --sched tanh", "below the floor"), ("--batch-size 8 --sched poly --decay-rate 1", "below the floor"),
    ("--batch-size 8 --sched plateau", "below the floor --min-lr 1e-05, so that it is never reduced"),
    ("--epochs 5", "--epochs 5 ends before the warm-up of 5 does (lag 1): the rate never comes to 6.25e-05"),
    ("--epochs 6", "--epochs 6 ends before the warm-up of 5 does"),
    ("--epochs 1 --sched constant", "--epochs 1 ends before"),
    ("--epochs 10 --sched-lag 7", "(lag 7)"),
    ("--warmup-lr 1e-3", "the warm-up falls, from --warmup-lr 0.001 to the effective rate 6.25e-05"),
])
def test_what_is_hardly_meant_is_said_once(words, said):
    found = doubts(words)
    assert len(found) == 1 and said in found[0] and "--" in found[0]


@pytest.mark.parametrize("words", [
    "", "--epochs 7", "--epochs 6 --sched-lag 0", "--epochs 1 --warmup-epochs 0", "--epochs 1 --sched none", "--batch-size 8 --sched step",
    "--batch-size 8 --sched none", "--batch-size 8 --min-lr 0", "--accum-steps 100", "--accum-steps 4 --max_step 4",
    "--lr 0 --min-lr 0 --warmup-lr 0"])
def test_what_is_meant_is_not_doubted(words):
    assert doubts(words) == []


COSINE, BARE = upstream("cosine", 30, 5), [FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * t / 30)) / 2 for t in range(30)]


@pytest.mark.parametrize("words, first, line", [
    ([], 0, f"1e-06 in epoch 0, highest {COSINE[6]:.6g} in epoch 6, {COSINE[29]:.6g} in epoch 29"),
    (["--warmup-epochs=0", "--sched-lag=0"], 0, f"0.001 in epoch 0, highest 0.001 in epoch 0, {BARE[29]:.6g} in epoch 29"),
    ([], 20, f"{COSINE[20]:.6g} in epoch 20, highest {COSINE[20]:.6g} in epoch 20, {COSINE[29]:.6g} in epoch 29"),
    (["--max_step=150"], 0, "1e-06 in epoch 0, highest 1e-06 in epoch 0, 1e-06 in epoch 1"),
    (["--sched=none"], 0, "0.001 in epoch 0, highest 0.001 in epoch 0, 0.001 in epoch 29"),
    (["--sched=plateau"], 0, "highest 0.001 in epoch 6, 0.001 in epoch 29, as long as the accuracy rises"),
    ([], 30, "none: nothing to train"),
])
def test_the_recipe_says_the_first_the_highest_and_the_last_rate(words, first, line):
    import training
    from devices import Ranks
    from precision import Precision
    from state import State
    from transforms import Preprocessing
    args = options.parse(["--data-path=x", "--epochs=30", "--batch-size=1024", *words])
    net = nn.Linear(4, 3)
    net.num_classes = 3
    optimizer, schedule, peak = build(
        sched=args.sched, sched_lag=args.sched_lag, warmup_epochs=args.warmup_epochs, lr=args.lr, epochs=args.epochs)
    ranks = Ranks(torch.device("cpu"))
    run = State(net, optimizer, schedule, Precision(ranks.device), epoch=first - 1)
    block = training.recipe(args, ranks, run, SimpleNamespace(train_loader=range(100), preprocessing=Preprocessing(), accum_steps=1), peak)
    told, = (text for text in block.splitlines() if text.startswith("  rates "))
    assert line in told
    assert "warning: " not in block


def test_a_floor_above_the_rate_is_warned_of_in_the_log(run_main, tiny_folder):
    """The rate that the epoch's lines show is the one that was told."""
    done = run_main("--data-path", tiny_folder, "--device=cpu", "--input-size=32", "--batch-size=8", "--num_workers=0", "--epochs=3",
                    "--warmup-epochs=1", "--model=pcpvt_small_v0", "--no-eval", "--accum-steps=3", "--lr=1e-5")
    assert done.returncode == 0, done.stderr
    block = done.stdout[done.stdout.index("Recipe"):done.stdout.index("Epoch:")]
    assert "warning: the effective rate 4.6875e-07 is below the floor --min-lr 1e-05" in block
    last = FLOOR + (4.6875e-7 - FLOOR) * (1 + math.cos(math.pi / 3)) / 2
    assert f"{last:.6g} in epoch 2" in block
    assert f"Epoch: [2]  [2/3]  eta: 0:00:00  lr: {last:.6g}  " in done.stdout
