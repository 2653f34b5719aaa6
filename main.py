"""Train, fine-tune or evaluate Twins: what is one run?

    python main.py --data-path /data/imagenet --output_dir output/run          # one card, or the CPU; nothing said: into alt_gvt_small/
    torchrun --nproc_per_node=8 main.py --data-path /data/imagenet --dist-eval --output_dir output/run
    python main.py --resume auto --output_dir output/run --data-path /data/imagenet   # starts, and starts again where it was
    python main.py --finetune alt_gvt_small.pth --data-path /data/other --epochs 10 --output_dir output/other
    python main.py --eval --resume alt_gvt_small.pth --data-path /data/imagenet

Exit status: 0 done, 2 something is wrong with what was asked for, 3 the loss was not finite, 75 stopped by a signal and saved,
1 anything else.
"""
import argparse
import contextlib
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path

if (own := os.path.dirname(os.path.realpath(__file__))) not in map(os.path.realpath, sys.path):  # python -P, PYTHONSAFEPATH
    sys.path.insert(0, own)

import options
import watchdog
from options import get_args_parser  # noqa: F401  upstream's place for it

try:
    import devices  # before torch: it decides what torch may load
except ImportError as import_error:
    sys.exit(f"error: {import_error}")

import torch
import torch.distributed as dist

import checkpoint
import datasets
import decode
import engine
import keeper
import labels
import loaders
import losses
import manifest
import networks
import optim
import pauses
import predictions
import samplers
import transforms
import unreadable
import utils
from precision import is_flat, make_precision
from state import MovingAverage, State


def build_model(args, num_classes, say=lambda *_: None):
    ours = dict(fused_attn=args.attn == "fused", mask_padding=args.window_padding == "mask") if networks.is_ours(args.model) else {}
    net, notes = networks.create(
        args.model, num_classes, args.input_size, pretrained=args.pretrained, drop=args.drop, drop_path=args.drop_path,
        grad_checkpointing=args.grad_checkpointing, distilled=args.distillation_type != "none", **ours)
    for note in notes:
        say(f"note: {note}")
    return net


class Reordered(torch.nn.Module):
    """A network whose outputs are picked: `outputs` says which are the student's classes, in its order."""

    def __init__(self, net, outputs):
        super().__init__()
        self.net = net
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)

    def forward(self, images):
        return self.net(images).index_select(1, self.outputs)


def build_teacher(args, student, device, preprocessing, say):
    """The teacher, with outputs in the order of the student's, a labels.Numbering; it is shown the student's images as its own
    weights want them. None without a distillation."""
    if args.distillation_type == "none":
        return None
    name, path, state = args.teacher_model, args.teacher_path, None
    config, content = networks.configuration(name, "--teacher-model"), checkpoint.read(path) if path else None
    if path:
        state = checkpoint.model_state(content, path)
        weights = labels.of_file(path, content, checkpoint.outputs(state, networks.heads(config)[0]))
    else:
        weights = labels.Weights(f"--teacher-model {name}", config.get("num_classes"), config.get("label_names"))
    classes = student.names
    numbering = labels.decide(classes, weights, use="teacher", stated=bool(args.class_map), named=student.named)
    for note in numbering.notes:
        say(f"note: {note}")
    size = networks.trained_size(config, content)
    teacher, _ = networks.create(name, len(numbering.names), size, pretrained=not path, option="--teacher-model")
    if path:
        checkpoint.load_weights(teacher, state, path)
    outputs = numbering.of(classes)
    if len(numbering.names) != len(classes):
        outputs = [numbering.index[labels.normal(name)] for name in classes]
    own = networks.preprocessing(name, size, content, not path, path)
    say(f"The teacher sees {size} pixels, {own}")
    teacher = losses.Teacher(teacher, size, own, preprocessing)
    return (teacher if outputs is None else Reordered(teacher, outputs)).to(device).eval()


def preprocessing_of(args, content, path=None):
    """How images are prepared for this run's weights. content: of --finetune or --resume, None without."""
    own = networks.preprocessing(args.model, args.input_size, content, args.pretrained, path=path or "the checkpoint")
    return own.override(args.mean, args.std, args.crop_pct, args.interpolation)


def build_data(args, ranks, preprocessing=transforms.TWINS, accum_steps=1):
    """-> training loader (None for an evaluation), validation loader (None for --no-eval), class names"""
    transform = partial(datasets.build_transform, input_size=args.input_size, native_size=options.native_size(args),
                        preprocessing=preprocessing)
    train_transform = transform(
        is_train=True, color_jitter=args.color_jitter, auto_augment=args.aa, interpolation=args.train_interpolation,
        reprob=args.reprob, remode=args.remode, recount=args.recount, hflip=args.hflip, crop_scale=args.crop_scale)
    train, val, classes = datasets.build_datasets(
        args.data_path, args.data_set, train_transform, transform(is_train=False), args.inat_category,
        with_train=not (args.eval or args.throughout), class_map=read_class_map(args),
        with_val=args.eval or args.throughout or not args.no_eval)
    loader = partial(loaders.build_loader, batch_size=args.batch_size, workers=args.num_workers,
                     seed=args.seed, pin_memory=args.pin_mem and devices.pins_memory(ranks.device),
                     start_method=devices.worker_start_method(ranks.device), goes_on=args.max_bad_fraction > 0)
    train_loader = train and loader(train, True, rank=ranks.rank, ranks=ranks.world_size, repeated_aug=args.repeated_aug,
                                    accum_steps=accum_steps)
    shared = dict(rank=ranks.rank, ranks=ranks.world_size) if args.dist_eval else {}
    return train_loader, val and loader(val, False, **shared), classes


def read_class_map(args):
    return labels.read_class_map(args.class_map) if args.class_map else None


def read_weights(args, say):
    """What --finetune or --resume name: (content, path); (None, None) for neither, and for a training before its first checkpoint."""
    path = options.finetune_file(args) or options.resume_file(args)
    if path != "auto":
        return (checkpoint.read(path), path) if path else (None, None)
    try:
        return checkpoint.find_newest(options.output_folder(args), lambda text: say(f"note: {text}"))[::-1]
    except checkpoint.NoCheckpoint as error:
        if args.eval or args.throughout:
            raise
        say(f"{error}: the training starts from the beginning")
        return None, None


def number_classes(args, dataset_list, classes, content, path):
    """Decide which output of the network each class is, and tell the data sets. -> labels.Numbering"""
    weights, config = None, networks.configuration(args.model)
    if path:
        state = checkpoint.model_state(content, path, ema=wants_average(args))
        weights = labels.of_file(path, content, checkpoint.outputs(state, networks.heads(config)[0]))
    elif args.pretrained:
        weights = labels.Weights(f"--pretrained {args.model}", config.get("num_classes"), config.get("label_names"))
    use = ("evaluate" if args.eval else "measure" if args.throughout else
           "resume" if path and options.resume_file(args) else "finetune" if weights else "train")
    named = all(getattr(dataset, "named", True) for dataset in dataset_list)
    found = labels.decide(classes, weights, read_class_map(args), use, named=named)
    for dataset in dataset_list:
        dataset.numbering = found.of(dataset.classes)
    return found


def load_weights(args, net, content, path, numbering, say):
    """Put the weights of --finetune or --resume into `net`. -> the checkpoint to go on from and its path, or None, None

    Only --resume goes on; --finetune takes weights, and gives other classes a new head.
    """
    if options.finetune_file(args):
        heads = networks.heads(networks.configuration(args.model))
        state, _ = checkpoint.adapt_head(net, checkpoint.model_state(content, path), heads, anew=numbering.fresh)
        checkpoint.load_weights(net, state, path)
        say(f"Fine-tuning from {path}" + (", its moving average" if checkpoint.decided(content) == "model_ema" else ""))
        return None, None
    if args.pretrained and numbering.fresh and networks.configuration(args.model).get("num_classes") == net.num_classes:
        net.reset_classifier(net.num_classes)
    if not path:
        return None, None
    checkpoint.load_weights(net, checkpoint.model_state(content, path, ema=wants_average(args)), path)
    if args.eval or args.throughout:
        if checkpoint.decided(content) == "model_ema" and not args.model_ema:
            say(f"{path}: its moving average is taken, whose accuracy decided")
        return None, None
    if not isinstance(content, dict) or not {"optimizer", "epoch"} <= set(content):
        say(f"{path} holds weights only: the training starts at epoch {args.start_epoch}")
        return None, None
    done = content.get("progress")
    say(f"Resuming from {path}, after epoch {content['epoch']}" + (
        f" and {done['updates']} updates of the next" if isinstance(done, dict) and done.get("updates") else ""))
    return content, path


def wants_average(args):
    """Which weights of a file with two: the average where it is asked for, the trained ones to go on from, else None, the better."""
    if args.eval and args.model_ema:
        return True
    return False if options.resume_file(args) and not (args.eval or args.throughout) else None


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


def open_output(args, ranks, say):
    """The Keeper of the folder that this run saves into, with its folder locked, for a `with`. None in it where nothing is saved:
    of an evaluation, without --output_dir, and on all ranks but the first."""
    folder = options.output_folder(args)
    saves = folder and ranks.is_main and not (args.eval or args.throughout)
    output = keeper.Keeper(folder, say, args.keep, args.milestones) if saves else None
    all_agree(ranks, lambda: output and output.open())
    return output or contextlib.nullcontext()


def describe(args, dataset, saved, path, say):
    """-> the manifest of this training. saved: the checkpoint at `path` that it goes on from, or None: what this command changes of it
    is said, and other data are a ValueError without --allow-change."""
    made = manifest.describe(dataset, args.data_path)
    if saved and (changed := manifest.changes(saved, made, vars(args))):
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


def all_agree(ranks, action):
    """action() on the first rank. A mistake that only it can meet ends all ranks alike, not the others by a lost connection."""
    result, problem = None, [""]
    if ranks.is_main:
        try:
            result = action()
        except ValueError as error:
            problem = [str(error)]
    if ranks.world_size > 1:
        dist.broadcast_object_list(problem, src=0, device=torch.device("cpu"))
    if problem[0]:
        raise ValueError(problem[0])
    return result


def build_state(args, ranks, net, precision, accum_steps):
    """-> the State of a training before its first epoch, the peak learning rate"""
    optimizer, schedule, peak_lr = optim.build(
        net, ranks.device, options.select(args, optim.Settings), options.select(args, optim.Course), lr=args.lr,
        global_batch=global_batch(args, ranks, accum_steps), epochs=args.epochs, precision=precision.name, seed=args.seed)
    net, optimizer = precision.initialize(net, optimizer)
    average = MovingAverage(net, args.model_ema_decay) if args.model_ema else None
    return State(net, optimizer, schedule, precision, average, args.start_epoch - 1), peak_lr


def global_batch(args, ranks, accum_steps):
    """Images of one update."""
    return args.batch_size * ranks.world_size * accum_steps


def accumulation(args, ranks, saved, say):
    """Batches that make one update of a rank: --accum-steps, or what keeps a resumed run's global batch on other ranks.

    saved: the checkpoint to go on from, or None. Raises ValueError where its global batch cannot be kept.
    """
    before, now = (saved or {}).get("global_batch"), global_batch(args, ranks, args.accum_steps)
    if type(before) is not int or before < 1 or before == now or args.allow_change:
        return args.accum_steps
    steps, rest = divmod(before, args.batch_size * ranks.world_size)
    if rest:
        raise ValueError(f"the checkpoint's updates are of {before} images, and batches of {args.batch_size} on {ranks.world_size} "
                         f"ranks cannot make that: choose a --batch-size that can, or go on with {now} images, at another learning rate: "
                         "--allow-change")
    say(f"note: --accum-steps {steps} on {ranks.world_size} ranks keeps the checkpoint's global batch of {before} (--allow-change: {now})")
    return steps


def build_epoch(args, ranks, run, train_loader, accum_steps, numbering, preprocessing, output, say):
    """-> train_epoch(mark, epoch, max_steps, after_update): train_one_epoch with all that stays the same"""
    teacher = build_teacher(args, numbering, ranks.device, preprocessing, say)
    criterion = losses.DistillationLoss(losses.Criterion(args.smoothing), teacher,
                                        args.distillation_type, args.distillation_alpha, args.distillation_tau)
    if args.compile:
        say("note: the first step compiles the model, which takes minutes (on a CPU ten and more); nothing is printed meanwhile")
    model = torch.compile(run.net) if args.compile else run.net
    if ranks.world_size > 1:
        model = devices.parallel(model, ranks.device, is_flat(run.optimizer))
    mixup = transforms.FixedShapeMixup(
        args.mixup, args.cutmix, args.cutmix_minmax, args.mixup_prob, args.mixup_switch_prob, args.mixup_mode,
        label_smoothing=args.smoothing, num_classes=len(numbering.names)) if options.mixes(args) else None

    unread = unreadable.Unreadable(len(train_loader.dataset), args.max_bad_fraction, run.unreadable,
                                   output.record if output else lambda rows: None, say)

    def reseed(epoch, step):
        """What is drawn for a part of an update (mixing, drop path, dropout) follows from the seed and its place, not from the past."""
        update, part = divmod(step, accum_steps)
        devices.seed_everything(samplers.seed_of(samplers.PART, args.seed, epoch, update, part * ranks.world_size + ranks.rank))

    def train_epoch(mark, epoch, max_steps, after_update):
        while True:
            loaders.set_epoch(train_loader, epoch, run.progress.updates * accum_steps)
            run.start_epoch(epoch)
            left_out = run.progress.skipped + 1  # with one that is not finite: of several in a window each is met in its turn
            try:
                return engine.train_one_epoch(
                    model, criterion, train_loader, run.optimizer, ranks.device, epoch, run.precision, args.clip_grad, run.average, mixup,
                    accum_steps=accum_steps, max_steps=math.ceil(max_steps / accum_steps) * accum_steps, print_freq=args.print_freq,
                    ranks=ranks.world_size, quiet=not ranks.is_main, memory=partial(devices.max_memory, ranks.device),
                    batch_size=args.batch_size, progress=run.progress, reseed=partial(reseed, epoch), after_update=after_update,
                    most_skips=args.nan_limit if args.on_nan == "skip" else 0, unreadable=partial(unread, epoch), mark=mark)
            except engine.NonFiniteLoss as error:
                met = named(error, epoch, loaders.images_of(train_loader), ranks, where)
            met.rate, met.scale = run.optimizer.param_groups[0]["lr"], run.precision.state_dict().get("scale")
            if args.on_nan != "rollback" or left_out > args.nan_limit:
                raise met
            run.roll_back(met.step // accum_steps + 1, left_out)
            say(f"warning: {met}{circumstances(met)}: back to the weights of the last save, and on after that update; "
                f"{left_out} of {args.nan_limit} that may be (--nan-limit)")

    def where(step):
        """Which module a loss or gradient that is not finite began in: the batch once more, with the same draws."""
        with contextlib.suppress(Exception):  # of a device that is out of memory: what is to be told is what was met before
            images, targets, *_ = loaders.batch_again(train_loader, step)
            reseed(train_loader.batch_sampler.epoch, step)
            images = images.to(ranks.device)
            images = mixup(images, targets.to(ranks.device))[0] if mixup else images
            with run.precision.autocast():
                return engine.first_not_finite(run.net, images)
        return ""

    return train_epoch


def test_epoch(run, evaluate, val_loader, say, rows=None):
    """-> log.txt's numbers of an evaluation, and whether this is the best epoch so far

    rows: a list, whose content becomes what the better one of the net and its average said of each image.
    """
    told = {"model": None, "model_ema": None} if rows is None else {"model": [], "model_ema": []}
    tests = {f"test_{key}": value for key, value in evaluate(val_loader, run.net, rows=told["model"]).items() if key != "images"}
    if run.average is not None:
        averaged = evaluate(val_loader, run.average.module, header="Test EMA:", rows=told["model_ema"])
        tests |= {f"test_ema_{key}": value for key, value in averaged.items() if key != "images"}
    improved = run.tested(tests["test_acc1"], tests.get("test_ema_acc1"))
    if rows is not None:
        rows[:] = told[run.better]
    whose = {"model": " (the model)", "model_ema": " (its moving average)"}[run.better] if improved and run.average is not None else ""
    say(f"Max accuracy: {run.best:.2f}%{whose}")
    return tests, improved


def write_predictions(args, ranks, rows, dataset, classes, say):
    """--predictions, of this rank's rows of an evaluation. Every rank calls this."""
    rows = unreadable.over_ranks(rows) if args.dist_eval else rows
    if not rows:
        say("note: nothing was evaluated, so --predictions writes nothing")
        return
    aside = all_agree(ranks, lambda: predictions.save(args.predictions, rows, dataset, classes, args.data_path))
    say(f"{utils.shown(args.predictions)} has what is said of {len(rows):,} images" + (
        f"; an earlier file is now {utils.shown(aside)}" if aside else ""))


def recipe(args, ranks, run, peak_lr, train_loader, preprocessing, accum_steps):
    """What this run does, as it is really used, and what of it is hardly meant."""
    net, start_epoch, iterations = run.net, run.epoch + 1, len(train_loader)
    images = global_batch(args, ranks, accum_steps)
    end = min(args.epochs, start_epoch + math.ceil(args.max_step / iterations)) if args.max_step else args.epochs
    epochs = range(start_epoch, end)
    rates = run.schedule.rates(epochs)
    highest = max(range(len(rates)), key=rates.__getitem__, default=None)
    return "\n".join([
        "Recipe",
        f"  model          {args.model}, {sum(p.numel() for p in net.parameters()):,} parameters, {net.num_classes} classes, "
        f"{args.input_size} pixels",
        f"  images         {preprocessing.describe(args.train_interpolation, options.native_size(args))}",
        f"  device         {devices.describe(ranks.device)}, world size {ranks.world_size}",
        f"  precision      {run.precision.name}",
        f"  global batch   {images} = {args.batch_size} x {ranks.world_size} ranks x {accum_steps} accumulated, "
        f"{iterations} iterations an epoch",
        f"  optimizer      {type(run.optimizer).__name__}, weight decay {args.weight_decay}, clip {args.clip_grad or 'off'}",
        f"  effective lr   {peak_lr:.6g} = {args.lr:g} x {images} / 512",
        "  schedule       " + ("none" if args.sched == "none" else
                               f"{args.warmup_epochs} warm-up epochs from {args.warmup_lr:g}, then {args.sched}"
                               f"{'' if args.sched in ('constant', 'step') else f' to {args.min_lr:g}'}, lag {args.sched_lag}"),
        "  rates          " + ("none: nothing to train" if highest is None else
                               f"{rates[0]:.6g} in epoch {start_epoch}, highest {rates[highest]:.6g} in epoch {epochs[highest]}, "
                               f"{rates[-1]:.6g} in epoch {epochs[-1]}"
                               f"{', as long as the accuracy rises' if args.sched == 'plateau' else ''}"),
        f"  epochs         {args.epochs}, drop path {networks.drop_path_of(net)}",
        f"  augmentation   {args.aa}, mixup {args.mixup}, cutmix {args.cutmix}, smoothing {args.smoothing}, erasing {args.reprob}",
        *(f"warning: {doubt}" for doubt in options.doubts(args, peak_lr)),
    ])


def main(args):
    """One run. args: as options.parse gives them; nothing changes them."""
    ranks = devices.init_distributed_mode(args.device)
    say = partial(print, flush=True) if ranks.is_main else (lambda *_: None)
    watch = watchdog.Watch(args.hang_timeout, ranks.rank, ranks.world_size, devices.open_store(ranks, "watchdog"), leave)
    if args.verify_resume:
        return verify_resume(watch, args, ranks, say)
    with open_output(args, ranks, say) as output, watch:
        run_in(output, watch, args, ranks, say)


def verify_resume(watch, args, ranks, say, updates=4, cut=2):
    """Train some updates whole, and once more interrupted and gone on with, in a folder that is removed afterwards, and compare what the
    two leave. Raises NotTheSame where it differs by one bit."""
    if not (parent := options.output_folder(args)):
        raise ValueError("--verify-resume writes checkpoints: leave --output_dir '' away")
    folder = Path(parent) / ".verify-resume"

    def train(name, until, **changes):
        short = dict(no_eval=True, ckpt_minutes=0.0, output_dir=str(folder / name), max_step=until * args.accum_steps)
        given = argparse.Namespace(**{**vars(args), "verify_resume": False, **short, **changes})
        with open_output(given, ranks, say) as output, watch:
            run_in(output, watch, given, ranks, say)
        return checkpoint.read(folder / name / checkpoint.LAST) if ranks.is_main else None

    def difference(a, b):
        """The same on all ranks: the first has the checkpoints."""
        found = [a and list(checkpoint.differences(*({key: saved[key] for key in verified} for saved in (a, b))))]
        if ranks.world_size > 1:
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    verified = ("model", "optimizer", "schedule", "scaler", "epoch", "progress", *(["model_ema"] if args.model_ema else []))
    try:
        whole = train("whole", updates)
        train("cut", cut)
        found = difference(whole, train("cut", updates - cut, resume="auto", finetune="", pretrained=False))
        if not found:
            say(f"--verify-resume: {updates} updates that were interrupted after {cut} leave what {updates} others do, bit for bit")
            return
        again = difference(whole, train("again", updates))
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    raise NotTheSame(f"--verify-resume: {found[0]}, and {len(found) - 1} more differ" + (
        "; so do two runs that nothing interrupted: the kernels of this device do not compute twice the same" if again else ""))


class NotTheSame(RuntimeError):
    """A run that was interrupted and went on is another than one that was not."""


def run_in(output, watch, args, ranks, say):
    """The run of `main`. output: the Keeper of its folder, or None. watch: a watchdog.Watch, which is told what goes on"""
    device = ranks.device
    devices.set_tensor_float(device, args.fp32, args.hf32)
    devices.seed_everything(args.seed)  # the same weights everywhere
    for note in options.notes(args, device.type):
        say(f"note: {note}")

    content, path = read_weights(args, say)
    preprocessing = preprocessing_of(args, content, path)
    if preprocessing != transforms.TWINS:
        say(f"note: images are not prepared as Twins' are, but with {preprocessing}")
    if args.teacher_model:
        networks.configuration(args.teacher_model, "--teacher-model")  # a wrong name ends before the data are read
    going_on = content if not (args.eval or args.throughout) and options.resume_file(args) and isinstance(content, dict) else None
    accum_steps = accumulation(args, ranks, going_on, say)
    train_loader, val_loader, classes = build_data(args, ranks, preprocessing, accum_steps)
    for found in filter(None, (train_loader, val_loader)):
        for note in getattr(loaders.images_of(found), "notes", ()):
            say(note)
    numbering = number_classes(args, [loaders.images_of(loader) for loader in (train_loader, val_loader) if loader], classes, content, path)
    for note in numbering.notes:
        say(f"note: {note}")
    net = build_model(args, len(numbering.names), say)
    saved, saved_path = load_weights(args, net, content, path, numbering, say)
    net.to(device)
    precision = make_precision(device, args.amp, skip=args.on_nan == "skip")
    pause = pauses.Pauses(args.ckpt_steps, args.ckpt_minutes, ranks.world_size, ranks.rank)
    evaluate = partial(engine.evaluate, device=device, autocast=precision.autocast, ranks=ranks.world_size if args.dist_eval else 1,
                       shared=args.dist_eval, quiet=not ranks.is_main, stopped=pause.stopped, mark=watch.mark)
    if args.throughout:
        return measure(args, ranks, net, precision, val_loader, say)
    rows = [] if args.predictions else None
    if args.predictions:
        all_agree(ranks, lambda: predictions.check(args.predictions))
    if args.eval:
        stats = evaluate(val_loader, net, rows=rows)
        say(f"Accuracy of the network on the {stats['images']} test images: {stats['acc1']:.3f}%")
        if args.predictions:
            write_predictions(args, ranks, rows, loaders.images_of(val_loader), numbering.names, say)
        return

    run, peak_lr = restore(args, ranks, net, precision, accum_steps, saved, saved_path, say)
    train_epoch = build_epoch(args, ranks, run, train_loader, accum_steps, numbering, preprocessing, output, say)
    made = all_agree(ranks, lambda: (output or saved) and describe(args, loaders.images_of(train_loader), saved, saved_path, say))
    moved = all_agree(ranks, lambda: output and prepare_output(output, args, saved_path, run.epoch + 1))
    if moved:
        say(f"An earlier run's files in {utils.shown(output.folder)} are now {', '.join(moved)}")
    say(f"Checkpoints and log.txt go to {output.folder}" if output else "warning: --output_dir is empty: nothing of this training is saved")
    say(recipe(args, ranks, run, peak_lr, train_loader, preprocessing, accum_steps))
    beside = dict(options=vars(args), classes=numbering.names, named=numbering.named, preprocessing=preprocessing.save(),
                  global_batch=global_batch(args, ranks, accum_steps), manifest=made)
    if output and saved and Path(saved_path).resolve() != (output.folder / checkpoint.LAST).resolve():
        output.save(run.state_dict() | beside)
    if run.epoch + 1 >= args.epochs:
        say(f"Nothing to train: epoch {run.epoch + 1} of {args.epochs} is next (--epochs)")
    started = time.perf_counter()
    test = partial(test_epoch, run, evaluate, val_loader, say, rows)
    with pause.listening():
        train(args, ranks, run, partial(train_epoch, watch.mark), test, pause, watch, output, beside, len(train_loader), say)
    say(f"Training time {timedelta(seconds=int(time.perf_counter() - started))}")
    if args.predictions and val_loader:
        write_predictions(args, ranks, rows, loaders.images_of(val_loader), numbering.names, say)


def measure(args, ranks, net, precision, val_loader, say):
    """--throughout"""
    device = ranks.device
    rate = engine.throughput(val_loader, net, device, precision.autocast, partial(devices.synchronize, device), time.perf_counter)
    say(f"batch_size {min(args.batch_size, len(val_loader.dataset))} throughput {rate:.2f}")


def restore(args, ranks, net, precision, accum_steps, saved, saved_path, say):
    """-> the State to go on from, of the checkpoint `saved` or, where that is None, the first one; the peak learning rate"""
    run, peak_lr = build_state(args, ranks, net, precision, accum_steps)
    if saved:
        for note in run.load_state_dict(saved, saved_path):
            say(f"note: {note}")
        before, images = saved.get("global_batch"), global_batch(args, ranks, accum_steps)
        if type(before) is int and before != images:  # --allow-change: some images again rather than never
            run.progress.updates = run.progress.updates * before // images
        if args.sched == "plateau":
            say(f"plateau goes on at {run.optimizer.param_groups[0]['lr']:g}")
    if args.on_nan == "rollback" and is_flat(run.optimizer):
        raise ValueError("--on-nan rollback: the flat optimizer of an NPU takes no state once it has stepped: --on-nan skip, or adamw "
                         "on a 910B")
    if args.on_nan == "skip" and any(getattr(module, "running_mean", None) is not None for module in net.modules()):
        raise ValueError(f"--on-nan skip: the batch norms of {args.model} have taken in what an update leaves out: --on-nan rollback")
    return run, peak_lr


def train(args, ranks, run, train_epoch, test, pause, watch, output, beside, iterations, say):
    """The epochs that are left: train, test, save. output: the Keeper of checkpoints, in which `beside` stands too, and of log.txt, or None

    iterations: of a whole epoch. pause: a pauses.Pauses, which saves and stops between two epochs. Raises engine.Stopped.
    """
    def save():
        if output:
            with watch.saving():
                output.save(run.state_dict() | beside)
        if args.on_nan == "rollback":
            run.remember()
        pause.saved()

    def after_update(settle):
        asked = pause()
        if asked:
            settle()
        if asked == pauses.SAVE:
            save()
        return asked == pauses.STOP

    if args.on_nan == "rollback":
        run.remember()
    steps_left = args.max_step
    for epoch in range(run.epoch + 1, args.epochs):
        started, watch.epoch = time.perf_counter(), epoch
        stats = train_epoch(epoch, steps_left, after_update)
        steps_left -= stats["ran"] if args.max_step else 0
        cut = stats["steps"] < iterations
        try:
            if pause.last():
                raise engine.Stopped
            last = epoch + 1 == args.epochs or (args.max_step and steps_left <= 0)
            if cut:
                say(f"--max_step ended epoch {epoch} after {stats['steps']} of {iterations} iterations: a --resume goes on there")
            tested = not args.no_eval and ((epoch + 1) % args.val_interval == 0 or last)
            tests, improved = test() if tested else ({}, False)
        except engine.Stopped:
            save()
            if output:
                with watch.saving():
                    output.finish()
            say(f"Stopped in epoch {epoch} after {stats['steps']} of {iterations} iterations: " + (
                f"{output.folder / checkpoint.LAST} goes on there, with --resume auto" if output else "nothing is saved (--output_dir '')"))
            raise
        if not cut:
            run.end_epoch(epoch)
        if output:
            row = {
                "train_lr": stats["lr"], "train_loss": stats["loss"], "test_loss": None, "test_acc1": None, "test_acc5": None,
                "epoch": epoch, "n_parameters": sum(p.numel() for p in run.net.parameters() if p.requires_grad), **tests,
                "max_acc1": max(run.best, 0.0), "fps": stats["fps"], "steps": stats["steps"], "complete": not cut,
                "world_size": ranks.world_size, "global_batch": beside["global_batch"], "epoch_seconds": time.perf_counter() - started}
            with watch.saving():
                output.save(run.state_dict() | beside, row, improved, done=None if cut else epoch)
        if args.on_nan == "rollback":
            run.remember()
        pause.saved()
        if last:
            break


def complain(error, training):
    """Say what went wrong: one line for what a user can mend, the traceback for the rest. -> exit status

    training: another rank may not know of it, so that this one must speak.
    """
    error = devices.explain(error)
    text = str(error).strip()
    if isinstance(error, engine.NonFiniteLoss):
        status, text, training = 3, f"{text}{circumstances(error)}: lower --lr, or look at the images of that batch: " + ", ".join(
            map(utils.shown, error.names)), False
    elif isinstance(error, engine.NonFiniteEvaluation):
        status, training = 3, False
    elif isinstance(error, NotTheSame):
        status = 1
    elif isinstance(error, keeper.SaveFailed):
        status, training = 1, True  # only the first rank knows
    elif isinstance(error, decode.DataError):  # from a loader's worker it comes with that worker's traceback
        status, text = 2, re.sub(r"^decode\.\w+: ", "", text.splitlines()[-1])
        if isinstance(error, decode.UnreadableImage):
            text += ", or go on without such images: --max-bad-fraction 0.001"
        training &= not isinstance(error, unreadable.TooManyUnreadable)
    elif isinstance(error, devices.DeviceError):
        status = 1
    elif isinstance(error, ValueError) and raised_here(error):
        status, text = 2, utils.shown(text)  # a path in it may hold a newline
    else:
        traceback.print_exception(error)
        return 1
    rank = os.environ.get("RANK")  # both as they stand: they may be what is wrong. Without a rank nobody else will say it
    local_rank = os.environ.get("LOCAL_RANK", "").strip("0") if rank else ""
    if isinstance(error, devices.LostConnection) or (local_rank.isdigit() and not training):
        time.sleep(10)  # the first one knows the same, or another one more: let it say so, and torchrun, which looks every 0.1 s, end this
    print(f"error: {text}" if not local_rank else f"error (rank {rank}): {text}", file=sys.stderr, flush=True)
    return status


def circumstances(error):
    """What is known of a NonFiniteLoss beside its place, in brackets."""
    said = [f"rate {error.rate:.4g}"] if hasattr(error, "rate") else []
    said += [f"gradient norm {error.norm:.4g}"] if error.norm is not None else []
    said += [f"loss scale {error.scale:g}"] if getattr(error, "scale", None) else []
    said += [f"first in {error.module}"] if getattr(error, "module", "") else []
    return f" ({', '.join(said)})" if said else ""


def raised_here(error):
    """Whether our own code raised it: a library's ValueError is a crash, and shows its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).resolve().parent == Path(__file__).resolve().parent


def stop(*_):
    """Of SIGTERM before there is anything to save. It may go to the whole group: torch would tell of the loader workers that it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(143)


def run(argv=None):
    """main with errors turned into an exit status."""
    args = options.parse(argv)
    utils.open_output()
    signal.signal(signal.SIGTERM, stop)
    watchdog.follow_launcher(leave)
    try:
        main(args)
        status = 0
    except engine.Stopped:
        status = 75 if args.output_dir != '' and not args.verify_resume else 143  # EX_TEMPFAIL: the same command with --resume auto goes on
    except devices.NeedsRestart:
        devices.restart_without_npu()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return complain(error, training="train_one_epoch" in "".join(traceback.format_exception(error)))
    if status in (0, 75):  # all ranks come here; after an error others may wait in a collective for this one
        devices.leave_the_others()
    return status


def leave(status):
    pauses.leave(status, multiprocessing.active_children())


if __name__ == "__main__":
    try:
        found = run()
    except SystemExit as ended:  # a mistake among the options, or a signal: also one in the middle of what is said of an error
        found = ended.code
    except KeyboardInterrupt:
        found = 130
    if found:
        leave(found)
