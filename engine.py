"""What is one epoch? A training loop and an evaluation: plain objects in, a dict of floats out."""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from decode import UNREADABLE, DataError
from predictions import interval
from unreadable import over_ranks, some
from utils import MetricLogger
from watchdog import ADDING, EVALUATING, LOADING, READING, STEP


class NonFiniteLoss(ArithmeticError):
    """The loss became inf or nan at `step`, on the images `names`; or `what` did, the gradient. A rank without a bad batch: step None,
    no names. norm: of the gradient there."""

    def __init__(self, epoch, step, names, what="loss", norm=None):
        super().__init__(f"the {what} is not finite in epoch {epoch}, iteration {step}")
        self.step, self.names, self.what, self.norm = step, names, what, norm


class NonFiniteEvaluation(ArithmeticError):
    """The loss of an evaluation is inf or nan: its accuracy is of no order that anything has. All ranks raise it alike."""


class Stopped(Exception):
    """A training or an evaluation that was asked to end, and did so where it can go on."""


@dataclass
class Progress:
    """How far an epoch is: updates that are done, the sum and the number of their losses over all ranks, and those that were skipped."""
    updates: int = 0
    loss: float = 0.0
    losses: int = 0
    skipped: int = 0


def add_over_ranks(values):
    """Sums of host numbers over all ranks, in double precision."""
    totals = torch.tensor(values, dtype=torch.float64)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    return totals.tolist()


def train_one_epoch(model, criterion, data_loader, optimizer, device, epoch, loss_scaler, max_norm=0, model_ema=None,
                    mixup_fn=None, *, accum_steps=1, max_steps=0, print_freq=10, ranks=1, quiet=False, memory=None,
                    batch_size=None, progress=None, reseed=None, after_update=None, most_skips=0,
                    unreadable=None, mark=lambda phase, step: None, frozen=(),
                    at_the_end=lambda: None):
    """What is left of one pass over data_loader, or its next max_steps iterations. -> {lr, loss, fps, steps of the pass, ran: of them now}

    criterion(images, outputs, targets) -> scalar. loss_scaler: a Precision. model_ema: has update(model).
    accum_steps: iterations whose mean gradient makes one update. ranks: processes that train together.
    memory: a function that says the memory in MB. batch_size: of the loader, where it does not say so.
    progress: what is done of the pass, for which data_loader has no batches any more; it is kept up to date.
    mark(phase, step): told what begins, in watchdog's words.
    reseed(step): called before anything is drawn at random for an iteration.
    after_update(settle): called after each; where it is true, the pass ends there. `progress` has all losses only after settle(), which
    all ranks call together.
    unreadable(met): called where a window has met images that cannot be read, by all ranks together, with this rank's own.
    at_the_end: called after the last update of a whole pass, before the moving average and after_update see it.
    frozen: modules that are computed as in an evaluation. The rate that is told is the highest of the optimizer's groups.
    most_skips: updates that may be left out, since their loss or gradient was not finite (Precision did); more raise NonFiniteLoss.

    The host never waits for the device inside a step. It does at the end of a window of print_freq steps, to read the
    losses; there all ranks learn together whether one was not finite, and raise NonFiniteLoss.
    """
    set_training(model, frozen)
    progress = Progress() if progress is None else progress
    first = progress.updates * accum_steps
    total = min(len(data_loader), first + max_steps if max_steps else len(data_loader))
    images_a_step = (batch_size or getattr(data_loader, "batch_size", None) or 1) * ranks
    log = MetricLogger(f"Epoch: [{epoch}]", total, images_a_step, print_freq, quiet)
    window = []  # of (step, loss on the device, names, norm of the gradient on the device or None)
    met = []  # of images that cannot be read
    measured = []  # norms of an update's gradient and of what it moved, on the device

    def read_window():
        """-> sum and number of the window's losses over all ranks, and the norms `measured` last"""
        mark(READING, log.last_step)
        losses, gradients = [loss for _, loss, *_ in window], [norm for *_, norm in window if norm is not None]
        # the host waits for the device here
        numbers = iter(torch.stack([x.float() for x in (*losses, *gradients, *measured)]).tolist())
        losses = [next(numbers) for _ in window]
        norms = [None if norm is None else next(numbers) for *_, norm in window]
        bad = [not math.isfinite(loss) or not (norm is None or loss_scaler.overflows or math.isfinite(norm))
               for loss, norm in zip(losses, norms)]
        finite = [loss for loss in losses if math.isfinite(loss)]
        total_loss, count, unread, *flags = add_over_ranks([sum(finite), len(finite), len(met), *bad])
        if unread:
            unreadable(met)
            met.clear()
        updates = {step // accum_steps for (step, *_), flag in zip(window, flags) if flag}
        progress.skipped += len(updates)
        if updates and progress.skipped > most_skips:
            step, names, what, norm = None, (), "loss", None
            if True in bad:
                (step, _, names, _), loss, norm = next(found for found, flag in zip(zip(window, losses, norms), bad) if flag)
                what = "gradient" if math.isfinite(loss) else "loss"
            raise NonFiniteLoss(epoch, step, names, what, norm)
        if updates and not quiet:
            which = ", ".join(str(update * accum_steps) for update in sorted(updates))
            print(f"warning: epoch {epoch}: the loss or the gradient is not finite in the updates from iterations {which}: left out, "
                  f"{progress.skipped} of {most_skips} that may be (--nan-limit)", flush=True)
        window.clear()
        progress.loss, progress.losses = progress.loss + total_loss, progress.losses + int(count)
        return total_loss, count, list(numbers)

    def settle():
        """Bring `progress` up to this step."""
        if window:
            log.add(loss=read_window()[:2])

    mark(LOADING, first)
    optimizer.zero_grad()
    for step, (images, targets, *names) in log.follow(data_loader, total, first, loss=(progress.loss, progress.losses)):
        mark(STEP, step)
        if reseed is not None:
            reseed(step)
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        if mixup_fn is not None:
            images, targets = mixup_fn(images, targets)

        cycle = min(accum_steps, total - step // accum_steps * accum_steps)  # the last one may be shorter
        update = (step + 1) % accum_steps == 0 or step == total - 1
        with contextlib.nullcontext() if update or not hasattr(model, "no_sync") else model.no_sync():
            with loss_scaler.autocast():
                loss = criterion(images, model(images), targets)
            measure = update and any(map(log.window_ends, range(step, min(step + accum_steps, total))))
            norm, moved = loss_scaler(loss / cycle if cycle > 1 else loss, optimizer, max_norm, need_update=update, measure=measure)
        if update:
            optimizer.zero_grad()
            if step + 1 == len(data_loader):
                at_the_end()
            if model_ema is not None:
                model_ema.update(getattr(model, "module", model))

        met += names[1] if len(names) > 1 else []
        names = names[0] if names else ()
        # a worker's tensor holds a file open for as long as it lives: keep its numbers
        window.append((step, loss.detach(), names.tolist() if isinstance(names, torch.Tensor) else names, norm))
        if measure:
            measured[:] = norm, moved
        if log.window_ends(step):
            total_loss, count, norms = read_window()
            log.line(step, highest_rate(optimizer), memory and memory(), norms, loss=(total_loss, count))
        if update:
            progress.updates = math.ceil((step + 1) / accum_steps)
            if after_update is not None and after_update(settle):
                break
        mark(LOADING, step + 1)
    log.summary()
    return {"lr": highest_rate(optimizer), "loss": progress.loss / max(1, progress.losses), "fps": log.fps(),
            "steps": log.last_step + 1, "ran": log.last_step + 1 - first}


def set_training(model, frozen=()):
    """Train mode, but for the `frozen` modules: no dropout and no drop path in them, and batch norms keep their statistics."""
    model.train()
    for module in frozen:
        module.eval()


def highest_rate(optimizer):
    """Of all groups: with layer decay, of the layers nearest to the head."""
    return max(group["lr"] for group in optimizer.param_groups)


@torch.no_grad()
def first_not_finite(model, images):
    """The name of the first module of `model` whose output for `images` is not finite, or of the first weight that is not; '' for none."""
    broken = next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), "")
    if broken:
        return broken
    found = []

    def look(name, output):
        if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
            found.append(name)

    hooks = [module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
             for name, module in model.named_modules() if not any(module.children())]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


@torch.no_grad()
def evaluate(data_loader, model, device, autocast=contextlib.nullcontext, *, shared=False, print_freq=50, ranks=1,
             quiet=False, header="Test:", stopped=lambda: False, mark=lambda phase, step: None,
             rows=None):
    """Cross entropy and accuracy over every image once. -> {loss, acc1, acc5}, in percent, and the number of images

    shared: each rank has its own part of the images; else each has them all. The sums of all ranks are added. A rank
    may have no image. With fewer than 5 classes acc5 counts all of them. The model may be wrapped in DDP.
    An image of class UNREADABLE counts as wrong, and not in the loss; `unreadable` is then how many, and the line says which.
    rows: a list that takes (index, the top 5 outputs, their probabilities) of each of this rank's images, of batches (images, targets,
    indices); both empty where an image is UNREADABLE.
    mark: as train_one_epoch's. stopped(): asked at each batch; where it is true on one rank, all of them raise Stopped at the end.
    """
    mark(EVALUATING, 0)
    model = getattr(model, "module", model)  # without DDP: ranks may have different numbers of batches
    model.eval()
    distributed = dist.is_available() and dist.is_initialized()
    for buffer in model.buffers() if distributed else ():  # batch norms have seen other images on each rank
        dist.broadcast(buffer, 0)
    log = MetricLogger(header, len(data_loader), (getattr(data_loader, "batch_size", None) or 1) * ranks, print_freq, quiet)
    sums, images_seen, met = [], 0, []  # sums: of (loss, correct, correct in 5) of each batch, on the device
    told = []  # of (indices, whether they are readable, top 5 and probabilities on the device)
    for step, (images, targets, *names) in log.follow(data_loader):
        met += names[1] if len(names) > 1 else []
        readable = None if rows is None else (targets != UNREADABLE).tolist()  # on the host yet
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        with autocast():
            logits = model(images)
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        best = (top == targets[:, None]).float()
        if rows is not None:
            told.append((names[0].tolist(), readable, top, logits.softmax(1).gather(1, top)))
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=UNREADABLE)
        sums.append(torch.stack((loss, best[:, 0].sum(), best.sum())))
        images_seen += len(targets)
        if stopped():
            break
        mark(EVALUATING, step + 1)
        if log.window_ends(step):
            sums[-1].tolist()  # the host waits for the device here, so that the time shown is true
            log.line(step)
    # the host waits for the device here, once an evaluation; sums in double precision, which HCCL does not take
    totals = torch.stack(sums).cpu().double().sum(0).tolist() if sums else [0.0, 0.0, 0.0]
    mark(ADDING, log.last_step)
    loss, acc1, acc5, count, stops, unread = add_over_ranks([*totals, images_seen, bool(stopped()), len(met)])
    if stops:
        raise Stopped
    if not math.isfinite(loss):
        raise NonFiniteEvaluation(f"the loss of the evaluation is not finite ({loss}), so its accuracy means nothing: the weights have "
                                  "diverged, or their logits overflow (--amp off evaluates in fp32)")
    for indices, readable, *found in told:
        rows += [(index, *(row if good else ([], []))) for index, good, *row in zip(indices, readable, *(x.tolist() for x in found))]
    copies = dist.get_world_size() if distributed and not shared else 1
    unread, met = int(unread) // copies, over_ranks(met) if unread and shared else met
    if 0 < unread == int(count) // copies:
        raise DataError(f"none of the {unread} validation images can be read: {some(met)}")
    stats = {"loss": loss / max(count - unread * copies, 1), "acc1": 100 * acc1 / max(count, 1), "acc5": 100 * acc5 / max(count, 1),
             "images": int(count) // copies, **({"unreadable": unread} if unread else {})}
    if not quiet:
        print("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats), flush=True)
        if count:
            low, high = interval(int(acc1) // copies, stats["images"])
            print(f"Acc@1 lies from {low:.3f} to {high:.3f} with 95 % confidence, of {stats['images']:,} images", flush=True)
    if not quiet and unread:
        print(f"{unread} of {stats['images']} validation images cannot be read: they count as wrong, and not in the loss: {some(met)}",
              flush=True)
    return stats


@torch.no_grad()
def throughput(data_loader, model, device, autocast, synchronize, clock, warmup=10, steps=30):
    """Images a second of the forward pass over one batch that stays on the device."""
    model.eval()
    images = next(iter(data_loader))[0].to(device)
    with autocast():
        for step in range(warmup + steps):
            if step == warmup:
                synchronize()  # host and device start the clock together, and stop it together
                start = clock()
            model(images)
    synchronize()
    return steps * len(images) / (clock() - start)
