"""How does a training go? Its epochs, what is saved and when, and what is said of it when it begins."""
import contextlib
import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import distribute_bn

import assembly
import checkpoint
import devices
import engine
import loaders
import losses
import manifest
import networks
import optim
import options
import pauses
import recipes
import samplers
import transforms
import unreadable
import utils
from complaint import circumstances
from precision import is_flat


class Epochs:
    """Called with an epoch, it trains what is left of it: engine.train_one_epoch with all that stays the same, and --on-nan.

    run: the State. output: a Keeper, which takes the images that cannot be read, or None. mark: as engine's
    """

    def __init__(self, args, ranks, run, parts, output, mark, say):
        self.args, self.ranks, self.run, self.mark, self.say = args, ranks, run, mark, say
        self.loader, self.accum_steps, self.classes = parts.train_loader, parts.accum_steps, len(parts.classes)
        self.iterations, self.frozen = len(self.loader), parts.frozen
        teacher = assembly.build_teacher(args, parts.numbering, ranks.device, parts.preprocessing, say)
        base = losses.BinaryCriterion(args.smoothing, args.bce_target_thresh, args.bce_sum) if args.bce_loss else losses.Criterion(
            args.smoothing)
        self.criterion = losses.DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
        self.model = self.wrap(run.net)
        self.mixup = transforms.FixedShapeMixup(
            args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
            label_smoothing=args.smoothing, num_classes=self.classes) if options.mixes(args) else None
        if parts.saved and ranks.world_size > 2:  # two numbers have one sum, in any order
            self.order_buckets()
        self.unread = unreadable.Unreadable(len(self.loader.dataset), args.max_bad_fraction, run.unreadable,
                                            output.record if output else lambda rows: None, say)

    def wrap(self, net):
        """The model that is called: compiled, and of several ranks."""
        if self.args.compile:
            self.say("note: the first step compiles the model, which takes minutes (on a CPU ten and more); nothing is printed meanwhile")
            net = torch.compile(net)
        if self.ranks.world_size == 1:
            return net
        return devices.parallel(net, self.ranks.device, is_flat(self.run.optimizer), share_buffers=self.args.dist_bn == "reduce")

    def share_statistics(self):
        """--dist-bn: of batch norms over all ranks. Where nothing is said each has its own, and the first one's are tested and saved."""
        if self.args.dist_bn and self.ranks.world_size > 1:
            distribute_bn(self.run.net, self.ranks.world_size, reduce=self.args.dist_bn == "reduce")

    def order_buckets(self):
        """DistributedDataParallel orders its buckets of gradients anew after the first backward pass, and a sum over ranks then has
        another last bit. A run that goes on had that pass before it was saved: here is one that trains nothing."""
        net, args = self.run.net, self.args
        kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
        images = torch.zeros(args.batch_size, 3, args.input_size, args.input_size, device=self.ranks.device)
        engine.set_training(net, self.frozen)
        with self.run.precision.autocast():
            outputs = self.model(images)
        sum(output.float().sum() for output in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
        net.zero_grad()
        for name, buffer in net.named_buffers():
            buffer.copy_(kept[name])

    def reseed(self, epoch, step):
        """What is drawn for a part of an update (mixing, drop path, dropout) follows from the seed and its place, not from the past."""
        update, part = divmod(step, self.accum_steps)
        place = part * self.ranks.world_size + self.ranks.rank
        devices.seed_everything(samplers.seed_of(samplers.PART, self.args.seed, epoch, update, place))

    def __call__(self, epoch, max_steps, after_update):
        """max_steps, after_update, and what is returned: as engine.train_one_epoch's"""
        args, run = self.args, self.run
        while True:
            loaders.set_epoch(self.loader, epoch, run.progress.updates * self.accum_steps)
            run.start_epoch(epoch)
            left_out = run.progress.skipped + 1  # with one that is not finite: of several in a window each is met in its turn
            try:
                return engine.train_one_epoch(
                    self.model, self.criterion, self.loader, run.optimizer, self.ranks.device, epoch, run.precision, args.clip_grad,
                    run.average, self.mixup, accum_steps=self.accum_steps, print_freq=args.print_freq,
                    max_steps=math.ceil(max_steps / self.accum_steps) * self.accum_steps, ranks=self.ranks.world_size,
                    quiet=not self.ranks.is_main, memory=partial(devices.max_memory, self.ranks.device), batch_size=args.batch_size,
                    progress=run.progress,
                    reseed=partial(self.reseed, epoch), after_update=after_update,
                    most_skips=args.nan_limit if args.on_nan == "skip" else 0, unreadable=partial(self.unread, epoch), mark=self.mark,
                    frozen=self.frozen, at_the_end=self.share_statistics)
            except engine.NonFiniteLoss as error:
                met = named(error, epoch, loaders.images_of(self.loader), self.ranks, self.where)
            met.rate, met.scale = engine.highest_rate(run.optimizer), run.precision.state_dict().get("scale")
            if args.on_nan != "rollback" or left_out > args.nan_limit:
                raise met
            run.roll_back(met.step // self.accum_steps + 1, left_out)
            self.say(f"warning: {met}{circumstances(met)}: back to the weights of the last save, and on after that update; "
                     f"{left_out} of {args.nan_limit} that may be (--nan-limit)")

    def where(self, step):
        """Which module a loss or gradient that is not finite began in: the batch once more, with the same draws."""
        with contextlib.suppress(Exception):  # of a device that is out of memory: what is to be told is what was met before
            images, targets, *_ = loaders.batch_again(self.loader, step)
            self.reseed(self.loader.batch_sampler.epoch, step)
            images = images.to(self.ranks.device)
            images = self.mixup(images, targets.to(self.ranks.device))[0] if self.mixup else images
            with self.run.precision.autocast():
                return engine.first_not_finite(self.run.net, images)
        return ""


def named(error, epoch, dataset, ranks, where=lambda step: ""):
    """The NonFiniteLoss of all ranks: where it began, with the files of the images. Every rank must call this.

    where(step) -> the module that it began in, asked on the ranks whose batch it was.
    """
    module = "" if error.step is None else where(error.step)
    own = error.step, error.what, [utils.shown(dataset.name(name)) for name in error.names], error.norm, module
    found = [own] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(found, own)
    # later ones only caught it from the weights, and gradients that are not finite from the rank whose loss is not
    step, what, *_ = min((one for one in found if one[0] is not None), key=lambda one: (one[0], one[1] != "loss"))
    of = [one for one in found if one[:2] == (step, what)]
    found = engine.NonFiniteLoss(epoch, step, [name for _, _, names, *_ in of for name in names], what, of[0][3])
    found.module = next((module for *_, module in of if module), "")
    return found


class Saves:
    """What a training saves between two updates: the State, and `beside` it what is the same in each checkpoint.

    output: the Keeper of checkpoints and log.txt, or None. pause: a pauses.Pauses, which says when. rollback: --on-nan goes back to these
    """

    def __init__(self, run, beside, output, pause, watch, rollback):
        self.run, self.beside, self.output, self.pause, self.watch, self.rollback = run, beside, output, pause, watch, rollback
        if rollback:
            run.remember()

    def __call__(self, *row):
        """row: of an epoch that ends, as Keeper.save takes it"""
        if self.output:
            with self.watch.saving():
                self.output.save(self.run.state_dict() | self.beside, *row)
        if self.rollback:
            self.run.remember()
        self.pause.saved()

    def after_update(self, settle):
        asked = self.pause()
        if asked:
            settle()
        if asked == pauses.SAVE:
            self()
        return asked == pauses.STOP

    def stop(self):
        """The last save of a run that was asked to stop. -> what goes on from it"""
        self()
        if not self.output:
            return "nothing is saved (--output_dir '')"
        with self.watch.saving():
            self.output.finish()
        return f"{self.output.folder / checkpoint.LAST} goes on there, with --resume auto"


def open_saves(args, ranks, run, parts, output, pause, watch, say):
    """-> the Saves of this training, in whose folder an earlier run's files have stepped aside"""
    made = devices.all_agree(ranks, lambda: (output or parts.saved) and describe(args, parts, say))
    moved = devices.all_agree(ranks, lambda: output and prepare_output(output, args, parts.saved_path, run.epoch + 1))
    if moved:
        say(f"An earlier run's files in {utils.shown(output.folder)} are now {', '.join(moved)}")
    say(f"Checkpoints and log.txt go to {output.folder}" if output else "warning: --output_dir is empty: nothing of this training is saved")
    beside = dict(options=used(args, parts), classes=parts.classes, named=parts.numbering.named, preprocessing=parts.preprocessing.save(),
                  global_batch=assembly.global_batch(args, ranks, parts.accum_steps), manifest=made)
    devices.all_agree(ranks, lambda: output and run.epoch + 1 < args.epochs and save_recipe(output.folder, args, ranks, parts, made))
    saves = Saves(run, beside, output, pause, watch, args.on_nan == "rollback")
    if output and parts.saved and Path(parts.saved_path).resolve() != (output.folder / checkpoint.LAST).resolve():
        output.save(run.state_dict() | beside)
    return saves


def used(args, parts):
    """The options, with what the weights brought where they say nothing."""
    return {**vars(args), "window_size": networks.window_of(parts.net)}


def describe(args, parts, say):
    """-> the manifest of this training. What this command changes of the checkpoint that it goes on from is said, and other data are a
    ValueError without --allow-change."""
    made, saved, path = manifest.describe(loaders.images_of(parts.train_loader), args.data_path), parts.saved, parts.saved_path
    if saved and (changed := manifest.changes(saved, made, used(args, parts))):
        say(f"note: this is not what {path} was trained with: {', '.join(changed)}")
    then = saved.get("manifest") if saved else None
    if other := manifest.other_data(then.get("data") if isinstance(then, dict) else None, made["data"]):
        if not args.allow_change:
            raise ValueError(f"{path} was trained on other data ({other}): give it its own, or --allow-change goes on with these")
        say(f"note: {path} was trained on other data ({other}): --allow-change goes on with these")
    return made


def prepare_output(output, args, saved_path, start_epoch):
    """-> the new names of an earlier run's files"""
    moved, log = output.prepare(saved_path, auto=args.resume == "auto" and saved_path is not None), output.folder / "log.txt"
    try:
        utils.keep_epochs_before(log, start_epoch)
    except OSError as error:
        raise ValueError(f"{log} cannot be written ({error.strerror}): choose another --output_dir") from error
    return moved


def save_recipe(folder, args, ranks, parts, made):
    """The options as they are used, as a recipe in the folder of the run. made: its manifest."""
    values = {**used(args, parts), "accum_steps": parts.accum_steps, "finetune": options.finetune_file(args)}
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    batch = assembly.global_batch(args, ranks, parts.accum_steps)
    recipes.save(folder, recipes.text(values, options.GROUPS, "\n".join([
        "The options of a run as they were used: python main.py --recipe THIS_FILE --data-path FOLDER --output_dir FOLDER does it again.",
        f"Global batch {batch} = {args.batch_size} x {ranks.world_size} ranks x {parts.accum_steps} accumulated.",
        f"{versions}, commit {made['commit']}."])))


def peak_rate(said, batch):
    """The highest learning rate of a recipe, {option: value}, at a global batch."""
    return optim.effective_lr(said["lr"], batch, said["unscale_lr"])


def which_run(args, ranks, parts, peak_lr):
    """Which known run this one is, or in what it differs from the nearest, and warnings where batch or rate are far from all."""
    known = recipes.known(options.read_recipe, options.DEFAULTS, options.TRAINING, peak_rate)
    own = recipes.Run({name: getattr(args, name) for name in options.TRAINING}, assembly.global_batch(args, ranks, parts.accum_steps),
                      peak_lr, len(parts.train_loader.dataset), len(parts.classes),
                      weights=bool(args.pretrained or options.finetune_file(args)))
    return "\n".join([recipes.nearest(own, known), *(f"warning: {doubt}" for doubt in recipes.doubts(own, known))])


def recipe(args, ranks, run, parts, peak_lr):
    """What this run does, as it is really used, and what of it is hardly meant."""
    net, start_epoch, iterations = run.net, run.epoch + 1, len(parts.train_loader)
    images = assembly.global_batch(args, ranks, parts.accum_steps)
    end = min(args.epochs, start_epoch + math.ceil(args.max_step / iterations)) if args.max_step else args.epochs
    epochs = range(start_epoch, end)
    rates = run.schedule.rates(epochs)
    highest = max(range(len(rates)), key=rates.__getitem__, default=None)
    return "\n".join([
        "Recipe",
        f"  model          {args.model}, {sum(p.numel() for p in net.parameters()):,} parameters, {net.num_classes} classes, "
        f"{args.input_size} pixels",
        f"  images         {parts.preprocessing.describe(args.train_interpolation, options.native_size(args))}",
        f"  device         {devices.describe(ranks.device)}, world size {ranks.world_size}",
        f"  precision      {run.precision.name}",
        f"  global batch   {images} = {args.batch_size} x {ranks.world_size} ranks x {parts.accum_steps} accumulated, "
        f"{iterations} iterations an epoch",
        f"  optimizer      {type(run.optimizer).__name__}, weight decay {args.weight_decay}, clip {args.clip_grad or 'off'}",
        f"  effective lr   {peak_lr:.6g} = {args.lr:g}{'' if args.unscale_lr else f' x {images} / 512'}",
        "  schedule       " + ("none" if args.sched == "none" else
                               f"{args.warmup_epochs} warm-up epochs from {args.warmup_lr:g}, then {args.sched}"
                               f"{'' if args.sched in ('constant', 'step') else f' to {args.min_lr:g}'}, lag {args.sched_lag}"),
        "  rates          " + ("none: nothing to train" if highest is None else
                               f"{rates[0]:.6g} in epoch {start_epoch}, highest {rates[highest]:.6g} in epoch {epochs[highest]}, "
                               f"{rates[-1]:.6g} in epoch {epochs[-1]}"
                               f"{', as long as the accuracy rises' if args.sched == 'plateau' else ''}"),
        f"  epochs         {args.epochs}, drop path {networks.drop_path_of(net)}",
        f"  augmentation   {'3-Augment' if args.three_augment else args.aa}, mixup {args.mixup}, "
        f"cutmix {args.cutmix}, smoothing {args.smoothing}, erasing {args.reprob}",
        *(f"warning: {doubt}" for doubt in options.doubts(args, peak_lr)),
    ])

def train(args, run, train_epoch, test, saves, say):
    """The epochs that are left: train, test, save. train_epoch: Epochs. test() -> log.txt's numbers, whether they are the best.
    Raises engine.Stopped."""
    if run.epoch + 1 >= args.epochs:
        say(f"Nothing to train: epoch {run.epoch + 1} of {args.epochs} is next (--epochs)")
    steps_left, iterations = args.max_step, train_epoch.iterations
    for epoch in range(run.epoch + 1, args.epochs):
        started, saves.watch.epoch = time.perf_counter(), epoch
        stats = train_epoch(epoch, steps_left, saves.after_update)
        steps_left -= stats["ran"] if args.max_step else 0
        cut = stats["steps"] < iterations
        try:
            if saves.pause.last():
                raise engine.Stopped
            last = epoch + 1 == args.epochs or (args.max_step and steps_left <= 0)
            if cut:
                say(f"--max_step ended epoch {epoch} after {stats['steps']} of {iterations} iterations: a --resume goes on there")
            tested = not args.no_eval and ((epoch + 1) % args.val_interval == 0 or last)
            tests, improved = test() if tested else ({}, False)
        except engine.Stopped:
            say(f"Stopped in epoch {epoch} after {stats['steps']} of {iterations} iterations: {saves.stop()}")
            raise
        if not cut:
            run.end_epoch(epoch)
        sizes = dict(world_size=train_epoch.ranks.world_size, global_batch=saves.beside["global_batch"])
        saves(row(run, epoch, stats, tests, cut, sizes, time.perf_counter() - started), improved, None if cut else epoch)
        if last:
            break


def row(run, epoch, stats, tests, cut, sizes, seconds):
    """An epoch's line of log.txt."""
    return {
        "train_lr": stats["lr"], "train_loss": stats["loss"], "test_loss": None, "test_acc1": None, "test_acc5": None,
        "epoch": epoch, "n_parameters": sum(p.numel() for p in run.net.parameters() if p.requires_grad), **tests,
        "max_acc1": max(run.best, 0.0), "fps": stats["fps"], "steps": stats["steps"], "complete": not cut,
        **sizes, "epoch_seconds": seconds}


def test(run, evaluate, say, rows=None):
    """-> log.txt's numbers of an evaluation, and whether this is the best epoch so far

    rows: a list, whose content becomes what the better one of the net and its average said of each image.
    """
    told = {"model": None, "model_ema": None} if rows is None else {"model": [], "model_ema": []}
    tests = {f"test_{key}": value for key, value in evaluate(run.net, rows=told["model"]).items() if key != "images"}
    if run.average is not None:
        averaged = evaluate(run.average.module, header="Test EMA:", rows=told["model_ema"])
        tests |= {f"test_ema_{key}": value for key, value in averaged.items() if key != "images"}
    improved = run.tested(tests["test_acc1"], tests.get("test_ema_acc1"))
    if rows is not None:
        rows[:] = told[run.better]
    whose = {"model": " (the model)", "model_ema": " (its moving average)"}[run.better] if improved and run.average is not None else ""
    say(f"Max accuracy: {run.best:.2f}%{whose}")
    return tests, improved
