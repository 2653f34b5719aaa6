"""One epoch of training and an exact evaluation, on small modules, against plain torch; on one process and several."""
import contextlib
import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import engine
from precision import Precision
from samplers import EvalSampler
from transforms import FixedShapeMixup
from utils import WARMUP_STEPS

CPU = torch.device("cpu")
CLASSES, RANKS = 3, 3


def net(classes=CLASSES, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, classes))


def images_of(count, classes=CLASSES, seed=1):
    """-> images (count, 3, 2, 2), targets (count,)"""
    torch.manual_seed(seed)
    return torch.randn(count, 3, 2, 2), torch.arange(count) % classes


def batches_of(count, size, seed=1):
    images, targets = images_of(count * size, seed=seed)
    names = [f"{i}.png" for i in range(count * size)]
    return [(images[i:i + size].clone(), targets[i:i + size], names[i:i + size]) for i in range(0, count * size, size)]


def cross_entropy(images, outputs, targets):
    return F.cross_entropy(outputs.float(), targets)


def train(model, batches, lr=0.1, amp="off", optimizer=None, criterion=cross_entropy, epoch=0, quiet=True, **kwargs):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return engine.train_one_epoch(model, criterion, batches, optimizer, CPU, epoch, Precision(CPU, amp), quiet=quiet, **kwargs)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_hand(model, groups, lr=0.1, max_norm=None):
    """Plain torch: one update for each group of batches, whose gradient is the mean of theirs. -> the losses"""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), []
    for group in groups:
        optimizer.zero_grad()
        for images, targets, _ in group:
            loss = F.cross_entropy(model(images), targets)
            (loss / len(group)).backward()
            losses.append(loss.item())
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return losses


# ---- what the processes of the tests on several ranks do ----

def evaluate_on(rank, ranks, count, classes=CLASSES, wrap=False):
    """An evaluation shared by `ranks` processes, of a set of `count` images in batches of 2."""
    data = TensorDataset(*images_of(count, classes))
    loader = DataLoader(data, batch_size=2, sampler=EvalSampler(data, ranks, rank))
    model = DistributedDataParallel(net(classes)) if wrap else net(classes)
    return engine.evaluate(loader, model, CPU, shared=True, ranks=ranks, quiet=True)


def evaluate_all_on(rank, ranks, count):
    """Each rank has every image."""
    return engine.evaluate(DataLoader(TensorDataset(*images_of(count)), batch_size=2), net(), CPU, quiet=True)


def normed(rank):
    """A net whose batch norm has seen other images on each rank."""
    model = net()
    model.insert(2, nn.BatchNorm1d(8))
    model.train()((1 + 3 * rank) * images_of(16)[0])
    return model


def evaluate_normed_on(rank, ranks, count, shared):
    data = TensorDataset(*images_of(count))
    loader = DataLoader(data, batch_size=2, sampler=EvalSampler(data, ranks, rank) if shared else None)
    return engine.evaluate(loader, normed(rank), CPU, shared=shared, ranks=ranks, quiet=True)


def train_on(rank, ranks, accum_steps=1):
    """6 batches of 4 for one rank, or their halves for each of two. -> statistics, weights, number of gradient exchanges"""
    batches = [(images[rank::ranks], targets[rank::ranks], names) for images, targets, names in batches_of(6, 4)]
    model, exchanges = DistributedDataParallel(net()), []

    def hook(state, bucket):
        exchanges.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(ranks), async_op=True).get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    stats = train(model, batches, ranks=ranks, accum_steps=accum_steps, max_norm=1.0)
    return stats, weights(model), len(exchanges)


def meet_nan_on(rank, ranks):
    """Only the last rank has a bad image, in its second batch."""
    batches = batches_of(4, 2, seed=rank)
    if rank == ranks - 1:
        batches[1][0][0] = math.nan
    try:
        train(net(), batches)
    except engine.NonFiniteLoss as error:
        return error.step, error.names, str(error)
    return None


def be_a_rank(rank, folder):
    """Everything that the tests below ask of several processes, on 3 of them and then on 2."""
    torch.set_num_threads(1)
    for ranks in (3, 2):
        if rank >= ranks:
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/{ranks}.store", rank=rank, world_size=ranks)
        found = {
            "ragged": evaluate_on(rank, ranks, 11), "in DDP": evaluate_on(rank, ranks, 11, wrap=True),
            "tiny": evaluate_on(rank, ranks, 2), "many classes": evaluate_on(rank, ranks, 13, classes=9), "nan": meet_nan_on(rank, ranks),
            "all": evaluate_all_on(rank, ranks, 11), "normed": [evaluate_normed_on(rank, ranks, 11, shared) for shared in (True, False)],
            "train": train_on(rank, ranks) if ranks == 2 else None, "accumulate": train_on(rank, ranks, 4) if ranks == 2 else None}
        torch.save(found, f"{folder}/{ranks}.{rank}")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """several[ranks][rank]: what each found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "timm.utils"])  # imported once, for all
    torch.multiprocessing.start_processes(be_a_rank, (str(folder),), nprocs=RANKS, start_method="forkserver")
    return {ranks: [torch.load(folder / f"{ranks}.{rank}") for rank in range(ranks)] for ranks in (2, 3)}


# ---- training ----

def test_training_lowers_the_loss():
    model, batches = net(), batches_of(4, 6)
    losses = [train(model, batches, epoch=epoch)["loss"] for epoch in range(40)]
    assert losses[0] == pytest.approx(math.log(CLASSES), rel=0.2) and losses[-1] < 0.1


@pytest.mark.parametrize("max_norm", [0, 0.5])
def test_an_epoch_does_what_plain_torch_does(max_norm):
    ours, theirs, batches = net(), net(), batches_of(7, 4)
    stats = train(ours, batches, max_norm=max_norm, print_freq=3)
    losses = by_hand(theirs, [[batch] for batch in batches], max_norm=max_norm)
    torch.testing.assert_close(weights(ours), weights(theirs))
    assert stats["loss"] == pytest.approx(sum(losses) / 7, rel=1e-6)
    assert stats["lr"] == 0.1 and stats["steps"] == 7 and stats["fps"] > 0


def test_two_accumulated_batches_are_one_of_twice_the_size():
    ours, theirs, halves = net(), net(), batches_of(6, 4)
    whole = [(torch.cat((a[0], b[0])), torch.cat((a[1], b[1])), a[2] + b[2]) for a, b in zip(halves[::2], halves[1::2])]
    train(ours, halves, accum_steps=2, max_norm=0.5)
    train(theirs, whole, max_norm=0.5)
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_the_batches_left_over_by_accumulation_make_an_update_of_their_mean():
    ours, theirs, batches = net(), net(), batches_of(5, 4)
    train(ours, batches, accum_steps=3)
    by_hand(theirs, [batches[:3], batches[3:]])
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_max_steps_ends_the_epoch_early_and_completes_the_update():
    ours, theirs, batches = net(), net(), batches_of(9, 4)
    stats = train(ours, batches, max_steps=5, accum_steps=2)
    by_hand(theirs, [batches[:2], batches[2:4], batches[4:5]])
    assert stats["steps"] == 5
    torch.testing.assert_close(weights(ours), weights(theirs))


def test_training_turns_dropout_on_and_evaluation_off():
    model, modes = net(), []
    model.append(nn.Dropout(0.5))
    model[-1].register_forward_hook(lambda module, *_: modes.append(module.training))
    batches = batches_of(1, 3)
    engine.evaluate(batches, model, CPU, quiet=True)
    train(model, batches)
    engine.evaluate(batches, model, CPU, quiet=True)
    assert modes == [False, True, False]


@pytest.mark.parametrize("accum_steps, updates", [(1, 6), (2, 3), (4, 2)])
def test_the_moving_average_follows_each_update_in_closed_form(accum_steps, updates):
    model = net()
    start, seen = weights(model), []

    class Recorder(ModelEmaV3):
        def update(self, model, step=None):
            seen.append(weights(model))
            super().update(model, step)

    average = Recorder(model, decay=0.8)
    train(model, batches_of(6, 4), model_ema=average, accum_steps=accum_steps)
    expected = start
    for value in seen:
        expected = 0.8 * expected + 0.2 * value
    assert len(seen) == updates
    torch.testing.assert_close(weights(average.module), expected)


COMBINATIONS = [
    "", "--smoothing 0", "--mixup 0 --cutmix 1", "--mixup 0.8 --cutmix 0", "--mixup 0 --cutmix 0", "--mixup 0 --cutmix 0 --smoothing 0",
    "--mixup 0 --cutmix 1 --smoothing 0", "--cutmix-minmax 0.2 0.8", "--mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8",
    "--mixup-mode elem", "--mixup-mode elem --cutmix 0", "--mixup-mode elem --cutmix-minmax 0.3 0.6", "--mixup-mode pair",
    "--mixup-mode pair --mixup 0", "--mixup-prob 0", "--mixup-switch-prob 0", "--mixup-switch-prob 1"]


@pytest.mark.parametrize("words", COMBINATIONS)
def test_every_mixture_trains_with_the_loss_of_its_targets(words):
    import losses
    import options
    args = options.parse(["--data-path", "data", *words.split()])
    mixed, shown = [], []
    mixup = FixedShapeMixup(args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
                                     label_smoothing=args.smoothing, num_classes=CLASSES)

    def mix(images, targets):
        mixed.append(mixup(images, targets))
        return mixed[-1]

    model = net()
    model.register_forward_hook(lambda module, inputs, output: shown.append((inputs[0].clone(), output.detach().clone())))
    before, batch = weights(model), batches_of(1, 4)[0]
    images, targets, _ = batch
    original = images.clone()
    stats = train(model, [batch], criterion=losses.DistillationLoss(losses.Criterion(args.smoothing)),
                  mixup_fn=mix if options.mixes(args) else None)
    (seen, logits), = shown
    if mixed:
        seen_images, probabilities = mixed[0]
        assert torch.equal(seen, seen_images) and probabilities.shape == (4, CLASSES)
        torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    else:
        assert torch.equal(seen, original)
        probabilities = F.one_hot(targets, CLASSES) * (1 - args.smoothing) + args.smoothing / CLASSES
    expected = -(probabilities * logits.log_softmax(1)).sum(1).mean().item()
    assert bool(mixed) == (words not in ("--mixup 0 --cutmix 0", "--mixup 0 --cutmix 0 --smoothing 0"))
    assert stats["loss"] == pytest.approx(expected, rel=1e-5) and not torch.equal(weights(model), before)


# ---- the host does not wait for the device ----

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "allclose"}
READS_BELOW = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class Syncs(TorchFunctionMode):
    """Notes the steps in which the host reads a tensor."""

    def __init__(self):
        super().__init__()
        self.step, self.steps = -1, set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            self.steps.add(self.step)
        return func(*args, **(kwargs or {}))

    def follow(self, batches):
        loader = Follower(batches)
        loader.syncs = self
        return loader


class Follower(list):
    def __iter__(self):
        for self.syncs.step, batch in enumerate(super().__iter__()):
            yield batch


class Dispatched(TorchDispatchMode):
    """The same, where the reading happens below Python."""

    def __init__(self, syncs):
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS_BELOW:
            self.syncs.steps.add(self.syncs.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_host_reads_the_device_only_where_a_window_ends(amp):
    import losses
    syncs, model = Syncs(), net()
    mixup = FixedShapeMixup(0.8, 1.0, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with syncs, Dispatched(syncs):
        train(model, syncs.follow(batches_of(26, 4)), amp=amp, optimizer=optimizer, mixup_fn=mixup, max_norm=5.0, accum_steps=2,
              model_ema=ModelEmaV3(model), print_freq=10, criterion=losses.DistillationLoss(losses.Criterion(0.1)))
    assert syncs.steps == {0, WARMUP_STEPS - 1, 10, 20, 25}


@pytest.mark.parametrize("read", [torch.Tensor.item, float, bool, torch.Tensor.tolist, torch.Tensor.numpy, torch.nonzero])
def test_a_criterion_that_reads_its_loss_would_be_noticed(read):
    def criterion(images, outputs, targets):
        loss = cross_entropy(images, outputs, targets)
        read(loss.detach())
        return loss

    syncs = Syncs()
    with syncs, Dispatched(syncs):
        train(net(), syncs.follow(batches_of(4, 2)), criterion=criterion)
    assert syncs.steps == {0, 1, 2, 3}


def test_an_evaluation_reads_the_device_only_where_a_window_ends():
    syncs = Syncs()
    with syncs, Dispatched(syncs):
        engine.evaluate(syncs.follow(batches_of(12, 2)), net(), CPU, print_freq=5, quiet=True)
    assert syncs.steps == {0, WARMUP_STEPS - 1, 5, 10, 11}


# ---- a loss that is not finite ----

@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_first_bad_batch_of_the_window(bad):
    batches = batches_of(12, 2)
    batches[6][0][0, 0, 0, 0] = bad
    batches[8][0][0, 0, 0, 0] = bad
    with pytest.raises(engine.NonFiniteLoss, match=r"^the loss is not finite in epoch 7, iteration 6$") as error:
        train(net(), batches, epoch=7)
    assert error.value.step == 6 and error.value.names == ["12.png", "13.png"]


@pytest.mark.parametrize("step", [0, 1, 4, 5, 10, 11, 19, 20, 21, 22])
def test_a_loss_that_is_not_finite_is_found_in_every_window_at_its_own_iteration(step):
    batches = batches_of(23, 2)
    batches[step][0][1] = math.nan
    with pytest.raises(engine.NonFiniteLoss) as error:
        train(net(), batches)
    assert error.value.step == step and error.value.names == [f"{2 * step}.png", f"{2 * step + 1}.png"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_stop_together_where_one_has_a_bad_batch_and_that_one_names_it(several, ranks):
    *others, (step, names, message) = [found["nan"] for found in several[ranks]]
    assert (step, names, message) == (1, ["2.png", "3.png"], "the loss is not finite in epoch 0, iteration 1")
    assert [(step, names) for step, names, _ in others] == [(None, ())] * (ranks - 1)


# ---- several ranks ----

@pytest.mark.parametrize("job, accum_steps", [("train", 1), ("accumulate", 4)])
def test_two_ranks_equal_one_with_the_same_global_batch(several, job, accum_steps):
    alone = net()
    expected = train(alone, batches_of(6, 4), accum_steps=accum_steps, max_norm=1.0)
    for stats, trained, _ in (found[job] for found in several[2]):
        torch.testing.assert_close(trained, weights(alone))
        assert stats["loss"] == pytest.approx(expected["loss"], rel=1e-6) and stats["steps"] == 6


def test_ranks_exchange_gradients_once_an_update(several):
    (_, _, each), (_, _, accumulated) = several[2][0]["train"], several[2][0]["accumulate"]
    assert (each, accumulated) == (6, 2)  # 6 iterations; of 4 and 2 in one update each


# ---- evaluation ----

def oracle(count, classes=CLASSES, model=None):
    images, targets = images_of(count, classes)
    with torch.no_grad():
        logits = (model or net(classes)).eval()(images)
    order = logits.argsort(dim=1, descending=True)
    return {"loss": F.cross_entropy(logits, targets).item(), "images": count,
            "acc1": 100 * sum(int(row[0] == target) for row, target in zip(order, targets)) / count,
            "acc5": 100 * sum(int(target in row[:5]) for row, target in zip(order, targets)) / count}


@pytest.mark.parametrize("count, classes", [(11, 3), (13, 9), (1, 3)])
def test_an_evaluation_equals_plain_torch_over_all_images(count, classes):
    images, targets = images_of(count, classes)
    loader = DataLoader(TensorDataset(images, targets), batch_size=4)
    assert engine.evaluate(loader, net(classes), CPU, quiet=True) == pytest.approx(oracle(count, classes), rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("job, count, classes", [("ragged", 11, 3), ("in DDP", 11, 3), ("tiny", 2, 3), ("many classes", 13, 9)])
def test_a_shared_evaluation_counts_every_image_once(several, ranks, job, count, classes):
    for found in several[ranks]:
        assert found[job] == pytest.approx(oracle(count, classes), rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_evaluation_of_which_each_rank_has_all_counts_every_image_once_too(several, ranks):
    for found in several[ranks]:
        assert found["all"] == pytest.approx(oracle(11), rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_evaluate_with_the_first_ones_batch_statistics(several, ranks):
    """Those are what a checkpoint holds."""
    expected = oracle(11, model=normed(0))
    assert abs(expected["loss"] - oracle(11, model=normed(1))["loss"]) > 1e-3
    for found in several[ranks]:
        for stats in found["normed"]:
            assert stats == pytest.approx(expected, rel=1e-6)


def test_with_fewer_than_five_classes_the_top_five_are_all():
    assert oracle(11)["acc1"] < 100
    assert engine.evaluate(batches_of(2, 4), net(), CPU, quiet=True)["acc5"] == 100


def test_an_evaluation_in_bf16_still_adds_its_loss_in_full_precision():
    images, targets = images_of(400)
    autocast = Precision(CPU, "bf16").autocast
    with autocast(), torch.no_grad():
        logits = net()(images).float()
    stats = engine.evaluate([(images, targets)], net(), CPU, autocast, quiet=True)
    assert stats["loss"] == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-6)
    assert stats["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())


def test_an_evaluation_prints_the_line_that_parsers_look_for(capsys):
    stats = engine.evaluate(batches_of(3, 4), net(), CPU)
    line = capsys.readouterr().out.splitlines()[-2]
    assert re.fullmatch(r"\* Acc@1 \d+\.\d{3} Acc@5 100\.000 loss \d+\.\d{3}", line)
    assert line == f"* Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f} loss {stats['loss']:.3f}"


# ---- throughput ----

def test_throughput_counts_the_images_after_the_warm_up_between_two_waits():
    events, now = [], [0.0]
    model = nn.Identity()

    def forward(*_):
        events.append("forward")
        now[0] += 100.0 if len(events) < 3 else 0.25

    model.register_forward_hook(forward)

    def clock():
        events.append("clock")
        return now[0]

    rate = engine.throughput([(torch.zeros(6, 3, 2, 2), None)], model, CPU, contextlib.nullcontext, lambda: events.append("wait"), clock,
                             warmup=2, steps=5)
    assert events == ["forward"] * 2 + ["wait", "clock"] + ["forward"] * 5 + ["wait", "clock"]
    assert rate == pytest.approx(6 / 0.25)
