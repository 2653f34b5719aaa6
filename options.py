"""What can a user ask for? One table of options, its checks, and the recipe that follows from them.

Every row: spellings, default, type, unit, where it came from, help. A hyphen and an underscore are the same thing in a
name. `parse(argv)` gives the checked arguments; nothing changes them afterwards.

    python options.py          # the table as Markdown
    python options.py RECIPE   # what a recipe says, NAME=VALUE
"""
import argparse
import re
import sys
from dataclasses import fields

import recipes
import utils

MODELS = ("pcpvt_small_v0", "pcpvt_base_v0", "pcpvt_large_v0", "alt_gvt_small", "alt_gvt_base", "alt_gvt_large")
# Parts of the names of timm's optimizers that have a --momentum, and of those that have no --opt-eps
MOMENTUM = ("sgd", "momentum", "nesterov", "rmsprop", "lars", "larc", "madgrad", "nvnovograd", "muon", "kron", "adafactorbv")
NO_EPSILON = ("sgd", "momentum", "nesterov", "lion", "kron", "adafactorbv")
DATA_SETS = ("CIFAR", "CIFAR10", "IMNET", "INAT", "INAT19", "DIGITS")
INAT_LEVELS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SWITCH = "switch"  # the type of an option that takes no value


def floats(text):
    return tuple(float(x) for x in text.replace(",", " ").split())


# fmt: off
OPTIONS = {
    "Run": [
        # name                     default          type   unit / choices       from     what it does
        ("--recipe",               "",              str,   "name|file",         "ours",  "take options from a recipe, recipes/NAME.toml or a file of yours; what stands on the command line wins"),
        ("--model",                "alt_gvt_small", str,   None,                "deit",  "model: one of ours, or any of timm's"),
        ("--batch-size",           64,              int,   "images a card",     "deit",  "batch of one card and one accumulation step"),
        ("--epochs",               300,             int,   "epochs",            "deit",  "length of the schedule and of the training"),
        ("--max_step",             0,               int,   "iterations",        "ascend", "end this run normally after so many iterations; an epoch cut so is not done; 0: no limit"),
        ("--output_dir",           None,            str,   "folder",            "deit",  "where checkpoints and log.txt go; nothing said: a folder with the model's name; '': nothing is saved"),
        ("--device",               "auto",          str,   "npu|cuda|gpu|cpu|auto", "deit", "auto: npu, else cuda, else cpu; npu:3 picks a card"),
        ("--seed",                 0,               int,   None,                "deit",  "seed of weights, augmentation, noise and the order of images (upstream's order is always seed 0's)"),
        ("--keep",                 0,               int,   "epochs",            "ours",  "keep the checkpoints of the last so many epochs beside the last and the best: checkpoint_0012.pth is of epoch 12"),
        ("--milestones",           0,               int,   "epochs",            "ours",  "keep one every so many epochs for ever: checkpoint_0009_milestone.pth is of epoch 9, the tenth"),
        ("--resume",               "",              str,   "file|auto",         "deit",  "go on from a checkpoint, also an https:// address; auto: the newest good one in --output_dir; while there is none, from the beginning"),
        ("--ckpt-steps",           0,               int,   "updates",           "ours",  "save in the middle of an epoch, too, every so many updates; 0: not by number"),
        ("--ckpt-minutes",         10.0,            float, "minutes",           "ours",  "save in the middle of an epoch, too, every so many minutes; 0: not by time"),
        ("--verify-resume",        False,           SWITCH, None,               "ours",  "train 4 updates whole, and again interrupted after 2, and compare all that they leave, bit for bit"),
        ("--on-nan",               "stop",          str,   ("stop", "skip", "rollback"), "ours", "a loss or gradient that is not finite: stop; leave the update out; or go back to the last save and on after it"),
        ("--nan-limit",            10,              int,   "updates",           "ours",  "so many in an epoch are skipped or rolled back, then the training stops"),
        ("--hang-timeout",         300.0,           float, "seconds",           "ours",  "a run of which a rank makes no progress for so long says which and where, and ends; 0: it waits (NCCL ends a wait of 600)"),
        ("--allow-change",         False,           SWITCH, None,               "ours",  "let a resumed run go on with other data, or another global batch"),
        ("--start_epoch",          0,               int,   "epoch",             "deit",  "first epoch, where no checkpoint says it"),
        ("--finetune",             "",              str,   "file",              "deit",  "start from these weights (a file, an https:// address) at epoch 0; another number of classes gets a new head"),
        ("--pretrained",           False,           SWITCH, None,               "timm",  "start from timm's published weights (downloads them)"),
        ("--eval",                 False,           SWITCH, None,               "deit",  "evaluate only"),
        ("--no-eval",              False,           SWITCH, None,               "ours",  "train without evaluating"),
        ("--throughout",           False,           SWITCH, None,               "twins", "measure the inference throughput only"),
        ("--predictions",          "",              str,   "file",              "ours",  "write what is said of each validation image, as CSV; in training at the last evaluation, of the better of model and average"),
        ("--dist-eval",            False,           SWITCH, None,               "deit",  "share the validation set between the ranks; the result is the same, exactly"),
        ("--val-interval",         1,               int,   "epochs",            "ours",  "evaluate every so many epochs, and after the last"),
        ("--print-freq",           10,              int,   "iterations",        "ours",  "a log line, and a look at the loss, every so many iterations"),
        ("--world_size",           1,               int,   "processes",         "deit",  "set by torchrun"),
        ("--dist_url",             "env://",        str,   None,                "deit",  "set by torchrun"),
    ],
    "Model": [
        ("--input-size",           224,             int,   "pixels",            "deit",  "side of the square input"),
        ("--dist-bn",              None,            str,   ("broadcast", "reduce", ""), "timm", "statistics of batch norms after each epoch: the first rank's on all, or their mean; nothing said or '': each has its own, the first one's are tested and saved"),
        ("--drop",                 0.0,             float, "probability",       "deit",  "dropout"),
        ("--drop-path",            0.1,             float, "probability",       "deit",  "drop path of the last block, rising from 0 at the first"),
        ("--attn",                 "fused",         str,   ("fused", "explicit"), "ours", "fused attention kernels, or the explicit formula"),
        ("--window-padding",       "zeros",         str,   ("zeros", "mask"),   "ours",  "padded windows: zeros as in the published models, or hidden from the real tokens"),
        ("--window-size",          None,            int,   "tokens",            "ours",  "SVT: side of the windows; 12 at 384 pixels, 5 at 160 need no padding, and no weight depends on it; the default is the weights' own (7)"),
        ("--freeze",               "",              str,   "stem|STAGES|backbone|modules", "ours", "train the rest only: freeze the stem, the first so many stages, all but the head, or modules by name (a,b)"),
        ("--head-init-scale",      None,            float, "factor",            "timm",  "multiply the weights of a head that starts anew"),
        ("--grad-checkpointing",   False,           SWITCH, None,               "timm",  "recompute the blocks in the backward pass: less memory, more time"),
        ("--compile",              False,           SWITCH, None,               "timm",  "torch.compile the model: minutes before the first step, on a CPU ten and more"),
        ("--model-ema",            False,           SWITCH, None,               "deit",  "keep an exponential moving average of the weights, evaluate it too; the better of the two decides the best"),
        ("--model-ema-decay",      0.9999,          float, None,                "timm",  "its decay an update n, reached from below as 1 - n ** -3/4"),
    ],
    "Precision": [
        ("--amp",                  "auto",          str,   ("auto", "bf16", "fp16", "apex", "off"), "ours", "auto: bf16 where native, else fp16, else fp32 (cpu: fp32)"),
        ("--fp32",                 False,           SWITCH, None,               "ascend", "NPU: no HF32 in convolutions or products"),
        ("--hf32",                 False,           SWITCH, None,               "ascend", "NPU: HF32 in convolutions and products"),
    ],
    "Optimizer and schedule": [
        ("--opt",                  "adamw",         str,   None,                "deit",  "any of timm's optimizers, or npufusedadamw"),
        ("--opt-eps",              1e-8,            float, None,                "deit",  "epsilon"),
        ("--opt-betas",            None,            floats, None,               "deit",  "betas, for example --opt-betas 0.9 0.999"),
        ("--clip-grad",            5.0,             float, "norm",              "twins", "largest norm of the gradient; 0: off"),
        ("--momentum",             0.9,             float, None,                "deit",  "momentum, for the optimizers that have one"),
        ("--weight-decay",         0.05,            float, None,                "deit",  "weight decay"),
        ("--layer-decay",          None,            float, "a layer",           "timm",  "each layer's rate is that of the one behind it times this; the head's is the whole rate"),
        ("--accum-steps",          1,               int,   "iterations",        "ours",  "iterations whose gradients make one update"),
        ("--lr",                   5e-4,            float, "per 512 images",    "deit",  "learning rate; used is lr * global batch / 512"),
        ("--unscale-lr",           False,           SWITCH, None,               "deit",  "use --lr as it is, whatever the global batch"),
        ("--sched",                "cosine",        str,   ("cosine", "tanh", "step", "plateau", "poly", "constant", "none"), "deit", "schedule; tanh is upstream's, from -6 to 4; poly, constant and none are timm's of today"),
        ("--sched-lag",            1,               int,   "epochs",            "ours",  "epoch e runs at the schedule's step e - lag, as in the published logs; 0 removes it"),
        ("--warmup-lr",            1e-6,            float, None,                "deit",  "rate at the start of the warm-up"),
        ("--warmup-epochs",        5,               int,   "epochs",            "deit",  "length of the warm-up"),
        ("--min-lr",               1e-5,            float, None,                "deit",  "floor of the schedule"),
        ("--cooldown-epochs",      10,              int,   "epochs",            "deit",  "epochs at the floor after the schedule; the loop ends at --epochs, as upstream's"),
        ("--decay-epochs",         30.0,            float, "epochs",            "deit",  "step: interval"),
        ("--decay-rate --dr",      0.1,             float, None,                "deit",  "step, plateau: factor; poly: power"),
        ("--patience-epochs",      10,              int,   "epochs",            "deit",  "plateau: patience, in epochs without a better accuracy (upstream's loop passes none, and ends there)"),
        ("--lr-noise",             None,            floats, "of the epochs",    "deit",  "noise on the rate between these fractions of the schedule; never in epoch 0, as upstream's"),
        ("--lr-noise-pct",         0.67,            float, None,                "deit",  "its limit"),
        ("--lr-noise-std",         1.0,             float, None,                "deit",  "its standard deviation (upstream's timm took 1 whatever was said)"),
    ],
    "Data": [
        ("--data-path",            "",              str,   "folder",            "deit",  "the data set"),
        ("--data-set",             "IMNET",         str,   DATA_SETS,           "deit",  "IMNET: class folders, or tar shards, in train/ and val/; CIFAR is CIFAR-100"),
        ("--class-map",            "",              str,   "file",              "timm",  "which output is which class: .txt (one name a line, in order), .csv (name,number), .json"),
        ("--max-bad-fraction",     0.0,             float, "of the training set", "ours", "go on without images that cannot be read, up to so many: in training another of the class takes their place, in validation they count as wrong"),
        ("--class-balanced",       False,           SWITCH, None,               "ours",  "draw all classes equally often, however many images they have"),
        ("--inat-category",        "name",          str,   INAT_LEVELS,         "deit",  "the level of iNaturalist's classes"),
        ("--use-mcloader",         False,           SWITCH, None,               "twins", "gone: see the note it prints"),
        ("--num_workers",          10,              int,   "processes a card",  "deit",  "loader processes"),
        ("--pin-mem",              True,            SWITCH, None,               "deit",  "pinned host memory"),
    ],
    "Augmentation": [
        ("--color-jitter",         0.4,             float, None,                "deit",  "colour jitter, where --aa is off"),
        ("--aa",                   "rand-m9-mstd0.5-inc1", str, None,           "deit",  "auto-augment policy; none: off"),
        ("--three-augment --ThreeAugment", False,   SWITCH, None,               "deit",  "DeiT III's 3-Augment: grey, solarized or blurred, then colour jitter; in place of --aa"),
        ("--src",                  False,           SWITCH, None,               "deit",  "--three-augment: DeiT III's simple random crop, the whole image shifted by up to 4 pixels"),
        ("--mean",                 None,            floats, "red green blue, 0..1", "timm", "mean of the pixels; the default is the weights' own, and Twins' without weights"),
        ("--std",                  None,            floats, "red green blue, 0..1", "timm", "their standard deviation; as --mean"),
        ("--interpolation",        None,            str,   ("bilinear", "bicubic"), "timm", "of evaluated images, and of the random crop where --train-interpolation says nothing; as --mean"),
        ("--crop-pct --eval-crop-ratio", None,            float, "of the side",       "timm",  "the middle of an image that is evaluated; as --mean (Twins': 0.875)"),
        ("--train-interpolation",  None,            str,   ("random", "bilinear", "bicubic"), "deit", "of the random crop; the default is the weights' own (Twins': bicubic)"),
        ("--bce-loss",             False,           SWITCH, None,               "timm",  "binary cross entropy of each class, in place of cross entropy"),
        ("--bce-target-thresh",    None,            float, "probability",       "timm",  "of it: what mixing and smoothing leave above this is 1, the rest 0"),
        ("--bce-sum",              False,           SWITCH, None,               "timm",  "of it: sum over the classes, not their mean"),
        ("--smoothing",            0.1,             float, "probability",       "deit",  "label smoothing"),
        ("--repeated-aug",         False,           SWITCH, None,               "deit",  "three augmented copies of a third of the images an epoch"),
        ("--reprob",               0.25,            float, "probability",       "deit",  "random erasing"),
        ("--remode",               "pixel",         str,   ("const", "rand", "pixel"), "deit", "what it fills in"),
        ("--recount",              1,               int,   "boxes",             "deit",  "how many boxes at most"),
        ("--resplit",              False,           SWITCH, None,               "deit",  "no erasing in the first split: Twins has no augmentation splits"),
        ("--hflip",                0.5,             float, "probability",       "timm",  "horizontal flip"),
        ("--crop-scale",           (0.08, 1.0),     floats, "of the area",      "timm",  "range of the random crop's area"),
        ("--mixup",                0.8,             float, "alpha",             "deit",  "mixup; 0: off"),
        ("--cutmix",               1.0,             float, "alpha",             "deit",  "cutmix; 0: off"),
        ("--cutmix-minmax",        None,            floats, "of the side",      "deit",  "cutmix with boxes between these ratios, instead of alpha"),
        ("--mixup-prob",           1.0,             float, "probability",       "deit",  "of mixing a batch at all"),
        ("--mixup-switch-prob",    0.5,             float, "probability",       "deit",  "of cutmix where both are on"),
        ("--mixup-mode",           "batch",         str,   ("batch", "pair", "elem"), "deit", "one draw a batch, a pair or an image"),
    ],
    "Distillation": [
        ("--distillation-type",    "none",          str,   ("none", "soft", "hard"), "deit", "learn from a teacher's logits or decisions"),
        ("--teacher-model",        "",              str,   None,                "deit",  "the teacher: any model of ours or timm's"),
        ("--teacher-path",         "",              str,   "file",              "deit",  "its weights; empty: timm's published ones"),
        ("--distillation-alpha",   0.5,             float, "0..1",              "deit",  "the teacher's share of the loss"),
        ("--distillation-tau",     1.0,             float, None,                "deit",  "temperature of soft distillation"),
    ],
}
# fmt: on
# What a number may be. Above the largest ones nothing fits a machine, or a library waits, overflows or fails in words of its own.
MANY = 10**9
LIMITS = dict(
    batch_size=(1, 10**6), epochs=(1, 10**5), max_step=(0, MANY), input_size=(32, 2**14), num_workers=(0, 1024), accum_steps=(1, 10**6),
    val_interval=(1, MANY), keep=(0, MANY), milestones=(0, MANY), ckpt_steps=(0, MANY), ckpt_minutes=(0, 1e6), print_freq=(1, MANY),
    hang_timeout=(0, 1e6),
    start_epoch=(0, MANY), sched_lag=(0, MANY), warmup_epochs=(0, MANY),
    cooldown_epochs=(0, MANY), patience_epochs=(0, MANY), recount=(1, 1000), seed=(0, 2**32 - 1), lr=(0, 1e30), warmup_lr=(0, 1e30),
    min_lr=(0, 1e30), weight_decay=(0, 1e4), clip_grad=(0, 1e30), opt_eps=(0, 1e6), mixup=(0, 1e6), cutmix=(0, 1e6), color_jitter=(0, 1e6),
    window_size=(1, 2**14), head_init_scale=(0, 1e6), layer_decay=(1e-6, 1), distillation_tau=(1e-6, 1e6), decay_epochs=(1e-6, MANY), decay_rate=(1e-6, 1e3), lr_noise_pct=(0.01, 1), lr_noise_std=(0, 100))


def option(names):
    """The name under which the value of a row's spellings stands in the arguments: --max_step is max_step."""
    return names.split()[0][2:].replace("-", "_")


DEFAULTS = {option(names): default for rows in OPTIONS.values() for names, default, *_ in rows}
GROUPS = {title: [option(names) for names, *_ in rows] for title, rows in OPTIONS.items()}
# For recipes: the option that a spelling means, and the type and choices of each
SPELLINGS = {name[2:].replace("-", "_"): option(names) for rows in OPTIONS.values() for names, *_ in rows for name in names.split()}
KINDS = {option(names): ({SWITCH: bool, floats: tuple}.get(kind, kind), unit if isinstance(unit, tuple) else None)
         for rows in OPTIONS.values() for names, _, kind, unit, *_ in rows}
# What changes how a training goes, and not only how it is computed or what it is called; batch and rate are told apart from these
TRAINING = ["model", "epochs", "max_step", "class_balanced", *(
    name for title in ("Model", "Optimizer and schedule", "Augmentation", "Distillation") for name in GROUPS[title]
    if name not in ("attn", "grad_checkpointing", "compile", "accum_steps", "lr", "unscale_lr", "cooldown_epochs", "resplit", "teacher_path"))]


class Parser(argparse.ArgumentParser):
    """One line for one mistake."""

    def error(self, message):
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"error: {message} (python main.py --help lists the options)\n")


class Help(argparse.HelpFormatter):
    """Shows one spelling of each option: the hyphens or underscores of its row."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=120)

    def _format_action_invocation(self, action):
        names, hidden = list(action.option_strings), getattr(action, "hidden", ())
        shown = ", ".join(name for name in names if name not in hidden)
        return f"{shown} {self._format_args(action, '').strip()}".rstrip() if action.nargs != 0 else shown


def spellings(names):
    """(the row's own spellings, and the same with hyphens and underscores exchanged)"""
    own = names.split()
    both = {f"--{form}" for name in own for form in (name[2:].replace("-", "_"), name[2:].replace("_", "-"))}
    return own, sorted(both - set(own))


def get_args_parser(add_help=False):
    """The argparse parser of the table. As upstream's it has no --help unless asked for, so it can be a parent."""
    parser = Parser("main.py", usage="main.py --data-path FOLDER [options]", add_help=add_help, formatter_class=Help, allow_abbrev=False)
    for title, rows in OPTIONS.items():
        group = parser.add_argument_group(title)
        for names, default, kind, unit, source, text in rows:
            own, other = spellings(names)
            dest = option(names)
            choices = unit if isinstance(unit, tuple) else None
            note = f"{text} [{source}; {'' if choices or not unit else unit + '; '}default: {default}]".replace("%", "%%")
            if kind is SWITCH:
                action = group.add_argument(*own, *other, action="store_true", default=default, help=note)
                if dest not in recipes.OF_A_COMMAND:  # a recipe may have it on
                    off = dict.fromkeys([f"--no-{dest}", f"--no-{dest.replace('_', '-')}", f"--no_{dest}"])
                    group.add_argument(*off, action="store_false", dest=dest, help=argparse.SUPPRESS)
            elif kind is floats:
                action = group.add_argument(*own, *other, type=float, nargs="+", default=default, help=note,
                                            metavar="X")
            else:
                action = group.add_argument(*own, *other, type=kind, default=default, choices=choices, help=note,
                                            metavar=None if choices else kind.__name__.upper())
            action.hidden = other
    return parser


def read_recipe(word):
    """-> what a recipe says: {option: value}, and its table [published]. Raises ValueError."""
    return recipes.read(word, SPELLINGS, KINDS)


def parse(argv=None):
    """Parsed and checked arguments. A mistake ends the program with one line and status 2."""
    parser = get_args_parser(add_help=True)
    args = parser.parse_args(argv)
    try:
        if args.recipe:
            parser.set_defaults(**read_recipe(args.recipe)[0])
            args = parser.parse_args(argv)
        for name, value in vars(args).items():
            if value == []:  # argparse takes the word -- out of an option's values, whatever their number
                raise ValueError(f"--{name.replace('_', '-')} needs a value")
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def mixes(args):
    """Whether batches are mixed, and targets therefore soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def finetune_file(args):
    """The weights to fine-tune from. `--finetune yes --resume FILE` is the original's way to say `--finetune FILE`."""
    return args.resume if args.finetune.lower() in ("yes", "true", "1") else args.finetune


def resume_file(args):
    """The checkpoint to go on from: not what is fine-tuned from."""
    return "" if finetune_file(args) else args.resume


def output_folder(args):
    """Where a training saves: --output_dir, else, as upstream's, a folder with the model's name; "" for nothing."""
    return re.sub(r"[^\w.+-]", "_", args.model).lstrip(".-") if args.output_dir is None else args.output_dir


def native_size(args):
    """Whether the images already have the input's size: they are then never resized."""
    return args.data_set in ("CIFAR", "CIFAR10") and args.input_size == 32


def check(args):
    """Raises ValueError for what cannot work together, before anything is loaded."""
    for name, (least, most) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, and must be at {f'most {most}' if value > most else f'least {least}'}")
    for name in ("drop", "drop_path", "reprob", "mixup_prob", "mixup_switch_prob", "distillation_alpha", "hflip", "max_bad_fraction"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and must be between 0 and 1")
    for name in ("smoothing", "drop_path", "momentum", "model_ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, and must be at least 0 and less than 1")
    if args.lr_noise is not None and not (len(args.lr_noise) <= 2 and all(0 <= x <= 1 for x in args.lr_noise)
                                          and (len(args.lr_noise) < 2 or args.lr_noise[0] < args.lr_noise[1])):
        raise ValueError("--lr-noise takes one or two fractions of the schedule, the smaller first, for example 0.4 0.8")
    if args.lr_noise_std > 100 * args.lr_noise_pct:  # timm draws until one is within the limit
        raise ValueError(f"--lr-noise-std is {args.lr_noise_std}, and must be at most 100 times --lr-noise-pct, {args.lr_noise_pct}")
    if args.opt_betas is not None and not all(0 <= x < 1 for x in args.opt_betas):
        raise ValueError(f"--opt-betas is {' '.join(map(str, args.opt_betas))}, and each must be at least 0 and less than 1")
    if (args.sched == "step" and args.decay_rate > 1) or (args.sched == "plateau" and args.decay_rate >= 1):
        raise ValueError(f"--decay-rate is {args.decay_rate}, and must be {'at most' if args.sched == 'step' else 'less than'} 1 "
                         f"for --sched {args.sched}: it is the factor that the rate is multiplied by")
    for name in ("cutmix_minmax", "crop_scale"):
        pair = getattr(args, name)
        if pair is not None and not (len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1 and pair[1] > 0):
            raise ValueError(f"--{name.replace('_', '-')} takes two numbers between 0 and 1, the smaller first: 0.2 0.8")
    operations = re.findall(r"-([nwda])(\d+(?:\.\d+)?)", args.aa)
    if any(float(number) > 100 or (part == "a" and not float(number)) for part, number in operations):
        raise ValueError(f"--aa {args.aa}: n, w and d are how many operations, at most 100 (a: more than 0)")
    if args.cutmix_minmax is not None and int(args.input_size * args.cutmix_minmax[0]) >= int(args.input_size * args.cutmix_minmax[1]):
        raise ValueError(f"--cutmix-minmax {' '.join(map(str, args.cutmix_minmax))} leaves no box between them at {args.input_size} pixels: "
                         "0.2 0.8")
    check_training(args)
    for name in ("mean", "std"):
        value = getattr(args, name)
        if value is not None and not (len(value) == 3 and all((x > 0 or name == "mean") and 0 <= x <= 1 for x in value)):
            raise ValueError(f"--{name} takes three numbers between 0 and 1, of red, green and blue: 0.5 0.5 0.5")
    if args.crop_pct is not None and not 0.01 <= args.crop_pct <= 1:
        raise ValueError(f"--crop-pct is {args.crop_pct}, and must be between 0.01 and 1")
    if args.sched == "plateau" and args.no_eval:
        raise ValueError("--sched plateau follows the accuracy: it needs evaluations, not --no-eval")
    if mixes(args) and args.batch_size % 2 and not (args.eval or args.throughout):
        raise ValueError(f"--batch-size {args.batch_size} is odd, and mixup pairs the images of a batch: "
                         "use an even batch, or --mixup 0 --cutmix 0")
    if args.finetune.lower() in ("yes", "true", "1") and not args.resume:
        raise ValueError(f"--finetune {args.finetune} needs the weights as --resume FILE; better: --finetune FILE")
    if args.resume and args.finetune and args.finetune.lower() not in ("yes", "true", "1"):
        raise ValueError("--finetune starts a new training and --resume goes on with one: give one of them")
    if args.resume == "auto" and not output_folder(args):
        raise ValueError("--resume auto looks in --output_dir: say which folder")
    if args.eval and args.finetune:
        raise ValueError("--eval evaluates weights as they are: give them as --resume FILE, not --finetune")
    if args.eval and not (args.resume or args.pretrained):
        raise ValueError("--eval needs weights: --resume FILE, or --pretrained")
    if args.pretrained and (args.resume or args.finetune):
        raise ValueError("--pretrained, --finetune and --resume all bring weights: give one of them")
    if args.verify_resume and (args.eval or args.throughout or resume_file(args)):
        raise ValueError("--verify-resume trains from the beginning, in a folder of its own: leave --eval, --throughout and --resume away")
    if args.eval and args.no_eval:
        raise ValueError("--eval and --no-eval exclude each other")
    if args.distillation_type != "none" and not args.teacher_model:
        raise ValueError("--distillation-type needs a teacher: --teacher-model NAME [--teacher-path FILE]")
    if args.distillation_type == "none" and (args.teacher_model or args.teacher_path):
        raise ValueError("a teacher has no effect without --distillation-type soft or hard")
    if args.fp32 and args.hf32:
        raise ValueError("--fp32 and --hf32 exclude each other")
    if not args.data_path:
        raise ValueError("no data set: --data-path FOLDER")


def check_training(args):
    """Of check: the options of a training that others give their meaning."""
    if args.window_size is not None and not args.model.startswith("alt_gvt"):
        raise ValueError(f"--window-size has no effect: {args.model} is no SVT of ours, and has no windows")
    if not args.bce_loss and (args.bce_sum or args.bce_target_thresh is not None):
        raise ValueError(f"--bce-{'sum' if args.bce_sum else 'target-thresh'} has no effect without --bce-loss")
    if args.bce_target_thresh is not None and not 0 <= args.bce_target_thresh < 1:
        raise ValueError(f"--bce-target-thresh is {args.bce_target_thresh}, and must be at least 0 and less than 1")
    if args.class_balanced and args.repeated_aug:
        raise ValueError("--class-balanced and --repeated-aug each say how often an image is drawn: give one of them")
    if args.src and not args.three_augment:
        raise ValueError("--src has no effect without --three-augment: it is that augmentation's crop")
    if args.three_augment and args.aa not in (DEFAULTS["aa"], "", "none"):
        raise ValueError(f"--aa {args.aa} has no effect with --three-augment, which takes its place: leave one of them away")
    if args.src and args.train_interpolation == "random":
        raise ValueError("--src resizes all images with one interpolation: --train-interpolation bicubic")


def notes(args, device_type=None):
    """One line for each option that was given and cannot do anything in this run, which computes on device_type."""
    given = {name for name, default in DEFAULTS.items() if getattr(args, name) != default}
    found = []

    def idle(names, why):
        found.extend(f"--{name.replace('_', '-')} has no effect: {why}" for name in names if name in given)

    idle(["use_mcloader"], "the original's in-house loader is gone; put webdataset tar shards into DATA/train and "
                           "DATA/val, they are found by themselves (python tools data shards makes them)")
    idle(["resplit"], "Twins trains without augmentation splits")
    idle(["world_size", "dist_url"], "torchrun says who takes part (torchrun --nproc_per_node=8 main.py ...)")
    if not any(word in args.opt.lower() for word in MOMENTUM):
        idle(["momentum"], f"{args.opt} has no momentum of this kind (betas: --opt-betas)")
    if any(word in args.opt.lower() for word in NO_EPSILON) and not args.opt.lower().endswith("sgdp"):
        idle(["opt_eps"], f"{args.opt} has no epsilon, or one of its own")
    if args.model.partition(".")[0] not in MODELS:
        idle(["attn", "window_padding"], f"{args.model} is timm's")
    elif args.model.startswith("pcpvt"):
        idle(["window_padding"], f"{args.model} has no windows")
    if (device_type or args.device) == "cpu":
        idle(["fp32", "hf32"], "a CPU has neither HF32 nor TF32")
    if args.sched == "none":
        idle(["warmup_lr", "warmup_epochs", "min_lr", "sched_lag", "lr_noise"], "there is no schedule")
    if args.sched in ("constant", "step"):
        idle(["min_lr"], f"the {args.sched} schedule has no floor")
    if native_size(args):
        idle(["crop_scale", "train_interpolation", "interpolation", "crop_pct"], "CIFAR at 32 pixels is padded and cropped, never resized")
    elif args.no_eval:
        idle(["crop_pct"], "nothing is evaluated")
    if args.on_nan == "stop":
        idle(["nan_limit"], "--on-nan is stop")
    if args.no_eval or args.throughout:
        idle(["predictions"], "nothing is evaluated")
    if not resume_file(args):
        idle(["allow_change"], "nothing is resumed")
    if args.eval or args.throughout:
        idle(["class_balanced", "freeze", "layer_decay", "head_init_scale", "bce_loss", "three_augment", "dist_bn"], "nothing is trained")
    if not output_folder(args):
        idle(["ckpt_steps", "ckpt_minutes", "keep", "milestones"], "--output_dir is empty, so nothing is saved")
    if resume_file(args):
        idle(["start_epoch"], "a checkpoint that can be resumed says where to go on")
    if args.sched not in ("step", "plateau", "poly"):
        idle(["decay_rate"], f"the {args.sched} schedule has no decay rate")
    if args.sched != "step":
        idle(["decay_epochs"], f"the {args.sched} schedule has no decay interval")
    if args.sched != "plateau":
        idle(["patience_epochs"], f"the {args.sched} schedule has no patience")
    idle(["cooldown_epochs"], "the training ends at --epochs, before the cool-down, as upstream's does")
    if args.lr_noise is None:
        idle(["lr_noise_pct", "lr_noise_std"], "there is no --lr-noise")
    if args.src and not native_size(args):
        idle(["crop_scale"], "--src takes the whole image")
    if args.aa and args.aa != "none" and not args.three_augment:
        idle(["color_jitter"], "--aa replaces colour jitter (--aa none brings it back)")
    if args.reprob == 0:
        idle(["remode", "recount"], "--reprob is 0")
    if not mixes(args):
        idle(["mixup_prob", "mixup_switch_prob", "mixup_mode"], "mixup and cutmix are off")
    if not args.model_ema:
        idle(["model_ema_decay"], "there is no --model-ema")
    if args.distillation_type != "soft":
        idle(["distillation_tau"], "only soft distillation has a temperature")
    if args.distillation_type == "none":
        idle(["distillation_alpha"], "there is no --distillation-type")
    if args.data_set in ("CIFAR", "CIFAR10"):
        idle(["max_bad_fraction"], f"{args.data_set} is read whole at the start, and compared with its checksums")
    if args.data_set not in ("INAT", "INAT19"):
        idle(["inat_category"], f"{args.data_set} has one level of classes")
    return found


def select(args, kind):
    """A dataclass of `kind`, whose fields are called as options are, of these options."""
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def doubts(args, peak_lr):
    """One line for each number that is allowed and hardly meant. peak_lr: --lr scaled by the batch."""
    found = []
    if args.sched not in ("none", "constant", "step") and 0 < peak_lr < args.min_lr:
        found.append(f"the effective rate {peak_lr:g} is below the floor --min-lr {args.min_lr:g}, so that "
                     f"{'it is never reduced' if args.sched == 'plateau' else 'the rate rises to the end'}: a larger --lr, or --min-lr 0")
    if args.sched != "none" and args.warmup_epochs:
        if 0 < peak_lr < args.warmup_lr:
            found.append(f"the warm-up falls, from --warmup-lr {args.warmup_lr:g} to the effective rate {peak_lr:g}: a larger --lr, "
                         "or --warmup-epochs 0")
        if args.epochs - 1 - args.sched_lag < args.warmup_epochs:
            found.append(f"--epochs {args.epochs} ends before the warm-up of {args.warmup_epochs} does (lag {args.sched_lag}): the rate "
                         f"never comes to {peak_lr:g}: more --epochs, or fewer --warmup-epochs")
    return found


def print_recipe(word):
    """For the scripts: NAME=VALUE, a line for each option that a recipe says. -> exit status"""
    try:
        found, _ = read_recipe(word)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name}={utils.shown(value)}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2:
        sys.exit(print_recipe(sys.argv[1]))
    # the table as Markdown, for README
    print("| option | default | unit or choices | from | what it does |\n|---|---|---|---|---|")
    for title, rows in OPTIONS.items():
        print(f"| **{title}** | | | | |")
        for names, default, _, unit, source, text in rows:
            unit = " ".join(unit) if isinstance(unit, tuple) else (unit or "").replace("|", ", ")
            print(f"| `{names}` | `{default}` | {unit} | {source} | {text} |")
