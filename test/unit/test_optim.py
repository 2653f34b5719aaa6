"""Effective rate, parameter groups, optimizer, schedule, and what of them survives a checkpoint."""
import copy
import io
import math

import pytest
import timm
import torch
from conftest import build_optim
from timm.scheduler import create_scheduler_v2
from torch import nn

import gvt  # noqa: F401  registers the models
import optim
import options

CPU = torch.device("cpu")
SCHEDULES = ("cosine", "tanh", "step", "plateau", "poly", "constant", "none")
pytestmark = pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def no_weight_decay(self):
        return {"b.weight"}

    def forward(self, x):
        return self.b(self.norm(self.a(x)).tanh())


def small(seed=0):
    torch.manual_seed(seed)
    return Small()


def build(model=None, **settings):
    settings = dict(lr=5e-4, global_batch=1024, epochs=300) | settings
    return build_optim(model or small(), CPU, **settings)


def rates(optimizer, schedule, epochs, metrics=None):
    """The rate of each epoch; all groups agree."""
    found = []
    for epoch in range(epochs):
        schedule.start_epoch(epoch, metrics[epoch] if metrics else None)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        found.append(optimizer.param_groups[0]["lr"])
    return found


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 6, generator=generator)).square().mean().backward()
        optimizer.step()


# ---- rate and groups ----

@pytest.mark.parametrize("lr, batch, effective", [
    (5e-4, 1024, 1e-3), (5e-4, 512, 5e-4), (5e-4, 128, 1.25e-4), (1e-3, 64, 1.25e-4), (0.0, 64, 0.0)])
def test_effective_rate(lr, batch, effective):
    assert optim.effective_lr(lr, batch) == pytest.approx(effective, rel=1e-15)
    optimizer, _, peak = build(lr=lr, global_batch=batch, sched="none")
    assert peak == pytest.approx(effective, rel=1e-15)
    assert [group["lr"] for group in optimizer.param_groups] == [peak, peak], "scaled before the optimizer is built"


def test_groups_of_a_small_model():
    """Matrices decay; biases, norms and what no_weight_decay names do not."""
    model = small()
    optimizer, _, _ = build(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups == {0.1: {"a.weight"}, 0.0: {"a.bias", "norm.weight", "norm.bias", "b.weight", "b.bias"}}


def test_groups_of_the_model():
    optimizer, _, _ = build(timm.create_model("alt_gvt_small"))
    sizes = {g["weight_decay"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in optimizer.param_groups}
    assert sizes == {0.0: (197, 83_816), 0.05: (93, 23_976_960)}


def test_adamw_is_torchs_fused_one():
    optimizer, _, _ = build(eps=1e-7, betas=(0.8, 0.9))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["fused"], group["eps"], group["betas"]) == (True, 1e-7, (0.8, 0.9))
    assert build()[0].param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("opt, kind", [
    ("sgd", "SGD"), ("momentum", "SGD"), ("adam", "Adam"), ("nadamw", "NAdamW"), ("lamb", "Lamb"), ("lion", "Lion"),
    ("rmsprop", "RMSprop"), ("adafactor", "Adafactor"), ("adan", "Adan")])
def test_other_optimizers_learn(opt, kind):
    """Any of timm's, with the defaults that options.py passes."""
    model = small()
    optimizer, _, _ = build(model, opt=opt, lr=1e-3, eps=1e-8, sched="none")
    assert type(optimizer).__name__ == kind
    x, losses = torch.randn(16, 6), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_momentum_reaches_sgd():
    assert build(opt="sgd", momentum=0.7)[0].param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize("opt, betas", [("lamb", (0.5, 0.6)), ("lion", (0.5, 0.6)), ("AdamW", (0.5, 0.6))])
def test_betas_reach_every_optimizer_that_has_them(opt, betas):
    assert tuple(build(opt=opt, betas=betas)[0].param_groups[0]["betas"]) == betas


def test_eps_reaches_every_optimizer_that_has_one():
    assert build(opt="rmsprop", eps=1e-3)[0].param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize("opt", ["sgd", "adafactor", "rmsprop"])
def test_betas_without_effect_are_refused(opt):
    with pytest.raises(ValueError, match=rf"^--opt {opt}: it has no betas \(--opt-betas\): see .*$") as caught:
        build(opt=opt, betas=(0.9, 0.99))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_note_about_momentum_or_epsilon_is_true_of_every_optimizer():
    """What changes in the optimizer that is built, against what is said."""
    wrong = []
    for opt in timm.optim.list_optimizers():
        built = {}
        for word, value in (("", None), ("momentum", 0.8), ("opt_eps", 1e-3)):
            settings = dict(momentum=0.9, eps=1e-8) | ({word.removeprefix("opt_"): value} if word else {})
            try:
                optimizer, _, _ = build(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), opt=opt, sched="none", **settings)
            except ValueError as error:
                assert "CUDA required" in str(error) or "second derivatives" in str(error)  # not to be built here
                break
            built[word] = repr(numbers(optimizer))
        else:
            notes = options.notes(options.parse(["--data-path=x", "--opt", opt, "--momentum=0.8", "--opt-eps=1e-3"]))
            for word in ("momentum", "opt_eps"):
                said = any(note.startswith(f"--{word.replace('_', '-')} has no effect") for note in notes)
                if said != (built[word] == built[""]):
                    wrong.append((opt, word, "said to be idle" if said else "silently idle"))
    assert wrong == []


@pytest.mark.parametrize("opt", ["nonsense", "", "npufusedadamw"])
def test_unknown_optimizer_is_one_line(opt):
    with pytest.raises(ValueError, match=f"--opt {opt}") as caught:
        build(opt=opt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("betas", [(0.9,), (2.0, 0.9), (0.9, 0.99, 0.999)])
def test_wrong_betas_are_one_line(betas):
    with pytest.raises(ValueError, match="beta") as caught:
        build(betas=betas)
    assert "\n" not in str(caught.value)


# ---- schedule ----

def published(step, peak, warmup=5, epochs=300):
    if step < warmup:
        return 1e-6 + step * (peak - 1e-6) / warmup
    return 1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * step / epochs)) / 2


@pytest.mark.parametrize("batch, warmup", [(1024, 5), (64, 5), (4096, 20), (512, 0)])
@pytest.mark.parametrize("lag", [1, 0])
def test_the_published_schedule(batch, warmup, lag):
    """Epoch e of 300 runs at S(max(e - 1, 0)), as the published logs do; without the lag at S(e)."""
    optimizer, schedule, peak = build(global_batch=batch, warmup_epochs=warmup, sched_lag=lag)
    expected = [published(max(epoch - lag, 0), 5e-4 * batch / 512, warmup) for epoch in range(300)]
    assert rates(optimizer, schedule, 300) == pytest.approx(expected, rel=1e-12)
    if lag and warmup:
        assert expected[0] == expected[1] == 1e-6


def test_the_lag_is_the_default():
    assert rates(*build()[:2], 3) == rates(*build(sched_lag=1)[:2], 3) != rates(*build(sched_lag=0)[:2], 3)


@pytest.mark.parametrize("sched", [s for s in SCHEDULES if s != "plateau"])
def test_schedules_are_functions_of_the_epoch(sched):
    """A run that starts at epoch 7 has the rates that an uninterrupted one has there."""
    straight = rates(*build(sched=sched, epochs=40)[:2], 40)
    optimizer, schedule, _ = build(sched=sched, epochs=40)
    schedule.start_epoch(7)
    assert optimizer.param_groups[0]["lr"] == straight[7]
    assert schedule.state_dict() == {}


def test_other_schedules():
    """Warm-up to the peak of 1e-3, and then each one's closed form."""
    after = {
        "step": lambda e: 1e-3 * 0.1 ** (e // 30), "constant": lambda e: 1e-3, "none": lambda e: 1e-3,
        "poly": lambda e: 1e-5 + (1e-3 - 1e-5) * (1 - e / 300) ** 0.1,
        "tanh": lambda e: 1e-5 + (1e-3 - 1e-5) / 2 * (1 - math.tanh(-6 * (1 - e / 300) + 4 * e / 300))}
    for sched, formula in after.items():
        found = rates(*build(sched=sched, sched_lag=0)[:2], 300)
        assert found[5:] == pytest.approx([formula(e) for e in range(5, 300)], rel=1e-9), sched
        warmup = [1e-3] * 5 if sched == "none" else [1e-6 + e * (1e-3 - 1e-6) / 5 for e in range(5)]
        if sched != "tanh":
            assert found[:5] == pytest.approx(warmup, rel=1e-9), sched


def test_step_interval_and_factor():
    found = rates(*build(sched="step", decay_epochs=10, decay_rate=0.5, warmup_epochs=0, sched_lag=0)[:2], 40)
    assert found == pytest.approx([1e-3 * 0.5 ** (e // 10) for e in range(40)])


def test_plateau_reduces_when_the_accuracy_stands_still():
    """After the warm-up: `patience` epochs without a better accuracy are borne, the next one divides the rate."""
    optimizer, schedule, peak = build(sched="plateau", warmup_epochs=2, patience_epochs=3, decay_rate=0.1, sched_lag=0)
    accuracies = [None, 10, 20, 30, 40, *[40] * 20]
    found = rates(optimizer, schedule, 16, accuracies)
    assert found[:3] == pytest.approx([1e-6, (peak + 1e-6) / 2, peak])
    assert found[2:8] == pytest.approx([peak] * 6)
    assert found[8:12] == pytest.approx([peak / 10] * 4)
    assert found[12:] == pytest.approx([peak / 100] * 4)


def test_plateau_stays_while_the_accuracy_rises():
    optimizer, schedule, peak = build(sched="plateau", warmup_epochs=2, patience_epochs=3)
    assert rates(optimizer, schedule, 30, [None, *range(29)])[3:] == [peak] * 27


def test_plateau_warms_up_without_accuracies():
    """Where nothing is evaluated the warm-up must still end."""
    optimizer, schedule, peak = build(sched="plateau", warmup_epochs=2, sched_lag=0)
    assert rates(optimizer, schedule, 6)[3:] == [peak] * 3


def test_plateau_goes_on_where_it_was():
    """Its best accuracy and its patience are in the checkpoint."""
    settings = dict(sched="plateau", warmup_epochs=2, patience_epochs=3, sched_lag=0)
    accuracies = [None, 10, 20, 30, 40, *[40] * 20]
    straight = rates(*build(**settings)[:2], 20, accuracies)
    for stop in range(3, 19):
        first, schedule, _ = build(**settings)
        rates(first, schedule, stop, accuracies)
        saved = through_a_file({"optimizer": optim.portable_state(first), "schedule": schedule.state_dict()})
        second, schedule, _ = build(**settings)
        optim.load_state(second, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        for epoch in range(stop, 20):
            schedule.start_epoch(epoch, accuracies[epoch])
            assert second.param_groups[0]["lr"] == straight[epoch], (stop, epoch)


def test_rate_noise_repeats_for_a_seed():
    """Noise only between its two fractions of the schedule, within its limit, and timm's for that seed."""
    settings = dict(lr_noise=(0.4, 0.9), epochs=100, sched_lag=0)
    plain = rates(*build(epochs=100, sched_lag=0)[:2], 100)
    noisy, again, other = (rates(*build(seed=seed, **settings)[:2], 100) for seed in (3, 3, 4))
    assert noisy == again != other
    changed = [e for e in range(100) if noisy[e] != plain[e]]
    assert changed == list(range(40, 90))
    assert all(abs(noisy[e] / plain[e] - 1) < 0.67 for e in changed)
    optimizer = torch.optim.SGD(small().parameters(), lr=1e-3)
    oracle, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=100, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5,
                                    noise=[0.4, 0.9], noise_pct=0.67, noise_std=1.0, noise_seed=3)
    expected = []
    for epoch in range(100):
        oracle.step(epoch)
        expected.append(optimizer.param_groups[0]["lr"])
    assert noisy == pytest.approx(expected, rel=1e-12)


# ---- state ----

def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def moments(optimizer):
    return {(i, key): value for i, entry in optimizer.state_dict()["state"].items() for key, value in entry.items()}


@pytest.mark.parametrize("opt", ["adamw", "sgd", "adam", "nadamw", "lamb", "lion", "rmsprop", "adan", "adafactor"])
def test_resumed_equals_uninterrupted(opt):
    """Three steps, a checkpoint, three more: the weights and moments of six steps, bit for bit."""
    straight = small()
    optimizer, _, _ = build(straight, opt=opt, lr=1e-2)
    train(straight, optimizer, 3, seed=1)
    saved = through_a_file({"model": straight.state_dict(), "optimizer": optim.portable_state(optimizer)})
    train(straight, optimizer, 3, seed=2)

    resumed = small(seed=9)
    resumed.load_state_dict(saved["model"])
    other, _, _ = build(resumed, opt=opt, lr=1e-2)
    optim.load_state(other, saved["optimizer"])
    train(resumed, other, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()))
    a, b = moments(optimizer), moments(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_the_state_is_a_copy_of_what_it_was():
    """What was saved does not change when training goes on, where it passed through a file; steps are tensors."""
    model = small()
    optimizer, _, _ = build(model)
    train(model, optimizer, 2, seed=1)
    state = optim.portable_state(optimizer)
    assert {float(entry["step"]) for entry in state["state"].values()} == {2.0}
    assert all(torch.is_tensor(value) for entry in state["state"].values() for value in entry.values())
    assert sorted(state["state"]) == list(range(6))


def test_an_untrained_optimizer_has_a_state_too():
    model = small()
    optimizer, _, _ = build(model)
    optim.load_state(optimizer, optim.portable_state(build()[0]))
    train(model, optimizer, 1, seed=1)


OWN = ("lr", "weight_decay", "betas", "eps", "fused", "foreach", "capturable", "differentiable")


@pytest.mark.parametrize("saver, loader", [
    (dict(fused=True), dict(foreach=True)), (dict(foreach=True), dict(fused=True)), ({}, dict(fused=True))])
def test_how_an_optimizer_computes_stays_its_own(saver, loader):
    """Moments and steps come from the checkpoint; fused, foreach and the like, and the numbers, from the running optimizer."""
    model, other = small(), small()
    numbers = dict(lr=1e-2, weight_decay=0.1, eps=1e-6, betas=(0.8, 0.95))
    first = torch.optim.AdamW([{"params": model.parameters()}], **numbers, **saver)
    train(model, first, 3, seed=1)
    other.load_state_dict(model.state_dict())
    second = torch.optim.AdamW([{"params": other.parameters()}], **numbers, **loader)
    own = copy.deepcopy({key: second.param_groups[0][key] for key in OWN})
    optim.load_state(second, through_a_file(optim.portable_state(first)))
    assert {key: second.param_groups[0][key] for key in OWN} == own
    train(model, first, 3, seed=2)
    train(other, second, 3, seed=2)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def numbers(optimizer):
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in optimizer.param_groups]


@pytest.mark.parametrize("opt, before, now", [
    ("adamw", dict(eps=1e-8), dict(lr=1e-3, weight_decay=0.3, eps=1e-3, betas=(0.8, 0.9))),
    ("lamb", dict(betas=(0.9, 0.99)), dict(lr=1e-3, weight_decay=0.3, eps=1e-3, betas=(0.8, 0.9))),
    ("adan", {}, dict(lr=1e-3, weight_decay=0.3, betas=(0.9, 0.8, 0.7))),
    ("lion", {}, dict(lr=1e-3, weight_decay=0.3, betas=(0.8, 0.9))),
    ("sgd", dict(momentum=0.9), dict(lr=1e-3, weight_decay=0.3, momentum=0.5))])
def test_a_resumed_optimizer_keeps_the_numbers_that_its_options_say(opt, before, now):
    """Also where no schedule sets the rate anew."""
    model, other = small(), small()
    first, _, _ = build(model, opt=opt, sched="none", **before)
    train(model, first, 3, seed=1)
    second, schedule, _ = build(other, opt=opt, sched="none", **now)
    own, saved = copy.deepcopy(numbers(second)), through_a_file(optim.portable_state(first))
    assert own != numbers(first)
    optim.load_state(second, saved)
    schedule.load_state_dict({})
    schedule.start_epoch(3)
    assert numbers(second) == own
    assert [group.get("step") for group in second.param_groups] == [group.get("step") for group in first.param_groups]
    assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(moments(second)[key])) for key, value in moments(first).items())


def test_the_next_update_of_a_resumed_optimizer_decays_by_its_own_weight_decay():
    """p - rate * decay * p is all that a decay adds to an update of AdamW."""
    first = small()
    saver, _, _ = build(first, lr=1e-2, weight_decay=0.05, sched="none")
    train(first, saver, 3, seed=1)
    state, after = through_a_file(optim.portable_state(saver)), []
    for decay in (0.1, 0.4):
        model = small()
        model.load_state_dict(first.state_dict())
        optimizer, _, rate = build(model, lr=5e-3, weight_decay=decay, sched="none")
        optim.load_state(optimizer, copy.deepcopy(state))
        train(model, optimizer, 1, seed=2)
        after.append(model)
    torch.testing.assert_close(after[1].a.weight, after[0].a.weight - rate * 0.3 * first.a.weight.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(after[1].b.weight, after[0].b.weight)  # exempt


def test_the_plateaus_rates_are_in_the_schedules_state():
    first, schedule, peak = build(sched="plateau", warmup_epochs=0, patience_epochs=1, decay_rate=0.1, sched_lag=0)
    rates(first, schedule, 5, [None, 40, 40, 40, 40])
    reduced = first.param_groups[0]["lr"]
    assert reduced < peak
    saved = through_a_file(schedule.state_dict())
    assert saved["rates"] == [reduced] * 2
    second, schedule, _ = build(sched="plateau", warmup_epochs=0, patience_epochs=1, decay_rate=0.1, sched_lag=0)
    schedule.load_state_dict(saved)
    assert [group["lr"] for group in second.param_groups] == [reduced] * 2


def test_another_models_state_is_refused():
    optimizer, _, _ = build()
    state = optim.portable_state(build(nn.Linear(3, 3))[0])
    with pytest.raises(ValueError, match="another model"):
        optim.load_state(optimizer, copy.deepcopy(state))


@pytest.mark.parametrize("saved, loaded", [("sgd", "adamw"), ("adamw", "sgd")])
def test_another_kind_of_optimizer_is_refused(saved, loaded):
    with pytest.raises(ValueError, match="of another kind"):
        optim.load_state(build(opt=loaded)[0], optim.portable_state(build(opt=saved)[0]))


@pytest.mark.parametrize("warmup, expected", [(0, [1e-3, 1e-3, 1e-3]), (2, [1e-6, 1e-6 + (1e-3 - 1e-6) / 2, 1e-3])])
def test_plateau_starts_at_its_peak_or_warms_up_to_it(warmup, expected):
    optimizer, schedule, peak = build(sched="plateau", warmup_epochs=warmup, sched_lag=0)
    assert peak == pytest.approx(1e-3, rel=1e-12)
    assert rates(optimizer, schedule, 3, [None] * 3) == pytest.approx(expected, rel=1e-9)
