"""Of what is a run made? Data, classes, weights, network, optimizer: what the options ask for, and what a checkpoint brings."""
from dataclasses import dataclass
from functools import partial

import torch

import checkpoint
import datasets
import devices
import engine
import labels
import loaders
import losses
import networks
import optim
import options
import transforms
from precision import Precision, is_flat, make_precision
from state import MovingAverage, State


@dataclass(frozen=True)
class Parts:
    """What an evaluation needs, and a training before it has an optimizer.

    preprocessing: of the images. numbering: a labels.Numbering. accum_steps: batches that make one update of a rank.
    saved, saved_path: the checkpoint that a training goes on from, or None, None. frozen: modules that are not trained.
    """
    net: torch.nn.Module
    precision: Precision
    train_loader: object
    val_loader: object
    preprocessing: transforms.Preprocessing
    numbering: labels.Numbering
    accum_steps: int
    saved: dict | None
    saved_path: object
    frozen: tuple = ()

    @property
    def classes(self):
        return self.numbering.names


def build(args, ranks, say):
    """-> the Parts of a run. Weights are read first: they say how images are prepared, and which output is which class."""
    content, path = read_weights(args, say)
    preprocessing = preprocessing_of(args, content, path)
    if preprocessing != transforms.TWINS:
        say(f"note: images are not prepared as Twins' are, but with {preprocessing}")
    if args.teacher_model:
        networks.configuration(args.teacher_model, "--teacher-model")  # a wrong name ends before the data are read
    going_on = content if not (args.eval or args.throughout) and options.resume_file(args) and isinstance(content, dict) else None
    accum_steps = accumulation(args, ranks, going_on, say)
    train_loader, val_loader, classes = build_data(args, ranks, preprocessing, accum_steps)
    data = [loaders.images_of(loader) for loader in (train_loader, val_loader) if loader]
    for note in (note for images in data for note in getattr(images, "notes", ())):
        say(note)
    numbering = number_classes(args, data, classes, content, path)
    for note in numbering.notes:
        say(f"note: {note}")
    net = build_model(args, len(numbering.names), say, content)
    saved, saved_path, fresh_head = load_weights(args, net, content, path, numbering, say)
    frozen = () if args.eval or args.throughout else prepare(args, ranks, net, fresh_head, say)
    net.to(ranks.device)
    precision = make_precision(ranks.device, args.amp, skip=args.on_nan == "skip")
    return Parts(net, precision, train_loader, val_loader, preprocessing, numbering, accum_steps, saved, saved_path, frozen)


def build_model(args, num_classes, say=lambda *_: None, content=None):
    """content: of --finetune or --resume, as read: it says how large its windows were."""
    ours = dict(fused_attn=args.attn == "fused", mask_padding=args.window_padding == "mask") if networks.is_ours(args.model) else {}
    if networks.has_windows(args.model):
        theirs = networks.trained_window(content)
        if theirs and not args.window_size:
            say(f"Windows are {theirs} x {theirs} tokens, as the weights' were (--window-size)")
        ours |= networks.window(args.window_size or theirs)
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
        reprob=args.reprob, remode=args.remode, recount=args.recount, hflip=args.hflip, crop_scale=args.crop_scale,
        three_augment=args.three_augment, simple_crop=args.src)
    train, val, classes = datasets.build_datasets(
        args.data_path, args.data_set, train_transform, transform(is_train=False), args.inat_category,
        with_train=not (args.eval or args.throughout), class_map=read_class_map(args),
        with_val=args.eval or args.throughout or not args.no_eval)
    loader = partial(loaders.build_loader, batch_size=args.batch_size, workers=args.num_workers,
                     seed=args.seed, pin_memory=args.pin_mem and devices.pins_memory(ranks.device),
                     start_method=devices.worker_start_method(ranks.device), goes_on=args.max_bad_fraction > 0)
    train_loader = train and loader(train, True, rank=ranks.rank, ranks=ranks.world_size, repeated_aug=args.repeated_aug,
                                    accum_steps=accum_steps, balanced=args.class_balanced)
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

    Only --resume goes on; --finetune takes weights, and gives other classes a new head. Third: whether the head starts anew; None where
    a run goes on.
    """
    if options.finetune_file(args):
        heads = networks.heads(networks.configuration(args.model))
        theirs = checkpoint.model_state(content, path, note=lambda text: say(f"note: {text}"))
        state, _ = checkpoint.adapt_head(net, theirs, heads, anew=numbering.fresh)
        state = networks.adapt_positions(net, state, say)
        checkpoint.load_weights(net, state, path)
        say(f"Fine-tuning from {path}" + (", its moving average" if checkpoint.decided(content) == "model_ema" else ""))
        return None, None, any(state.get(f"{head}.weight") is not theirs.get(f"{head}.weight") for head in heads)
    same = args.pretrained and networks.configuration(args.model).get("num_classes") == net.num_classes
    if same and numbering.fresh:
        net.reset_classifier(net.num_classes)
    if not path:
        return None, None, numbering.fresh or not same
    checkpoint.load_weights(net, checkpoint.model_state(content, path, ema=wants_average(args)), path)
    if args.eval or args.throughout:
        if checkpoint.decided(content) == "model_ema" and not args.model_ema:
            say(f"{path}: its moving average is taken, whose accuracy decided")
        return None, None, None
    if not isinstance(content, dict) or not {"optimizer", "epoch"} <= set(content):
        say(f"{path} holds weights only: the training starts at epoch {args.start_epoch}")
        return None, None, None
    done = content.get("progress")
    say(f"Resuming from {path}, after epoch {content['epoch']}" + (
        f" and {done['updates']} updates of the next" if isinstance(done, dict) and done.get("updates") else ""))
    return content, path, None


def prepare(args, ranks, net, fresh_head, say):
    """What is done to a network before it is trained: its fresh head scaled, a part of it frozen. -> the frozen modules"""
    if args.dist_bn is not None and not networks.has_statistics(net):
        raise ValueError(f"--dist-bn has no effect: {args.model} has no batch norm: leave it away")
    if args.dist_bn and ranks.world_size == 1:
        say("note: --dist-bn has no effect: there is one process")
    heads = networks.heads(networks.configuration(args.model))
    if args.head_init_scale is not None and fresh_head is False:
        raise ValueError("--head-init-scale has no effect: the weights bring the head of these classes: leave it away")
    if args.head_init_scale is not None and fresh_head:
        networks.scale_heads(net, heads, args.head_init_scale)
    if not args.freeze:
        return ()
    frozen, count = networks.freeze(net, args.freeze, heads)
    say(f"Frozen: {count:,} of {sum(p.numel() for p in net.parameters()):,} parameters (--freeze {args.freeze})")
    return tuple(frozen)


def wants_average(args):
    """Which weights of a file with two: the average where it is asked for, the trained ones to go on from, else None, the better."""
    if args.eval and args.model_ema:
        return True
    return False if options.resume_file(args) and not (args.eval or args.throughout) else None


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


def build_state(args, ranks, net, precision, accum_steps):
    """-> the State of a training before its first epoch, the peak learning rate"""
    optimizer, schedule, peak_lr = optim.build(
        net, ranks.device, options.select(args, optim.Settings), options.select(args, optim.Course), lr=args.lr,
        unscale_lr=args.unscale_lr, global_batch=global_batch(args, ranks, accum_steps), epochs=args.epochs, precision=precision.name,
        seed=args.seed)
    net, optimizer = precision.initialize(net, optimizer)
    average = MovingAverage(net, args.model_ema_decay) if args.model_ema else None
    return State(net, optimizer, schedule, precision, average, args.start_epoch - 1), peak_lr


def restore(args, ranks, parts, say):
    """-> the State to go on from, of the checkpoint of `parts` or, where there is none, the first one; the peak learning rate"""
    run, peak_lr = build_state(args, ranks, parts.net, parts.precision, parts.accum_steps)
    if saved := parts.saved:
        for note in run.load_state_dict(saved, parts.saved_path):
            say(f"note: {note}")
        before, images = saved.get("global_batch"), global_batch(args, ranks, parts.accum_steps)
        if type(before) is int and before != images:  # --allow-change: some images again rather than never
            run.progress.updates = run.progress.updates * before // images
        if args.sched == "plateau":
            say(f"plateau goes on at {engine.highest_rate(run.optimizer):g}")
    if args.on_nan == "rollback" and is_flat(run.optimizer):
        raise ValueError("--on-nan rollback: the flat optimizer of an NPU takes no state once it has stepped: --on-nan skip, or adamw "
                         "on a 910B")
    if args.on_nan == "skip" and networks.has_statistics(parts.net):
        raise ValueError(f"--on-nan skip: the batch norms of {args.model} have taken in what an update leaves out: --on-nan rollback")
    return run, peak_lr
