"""The option table: the original's spellings and defaults, the checks, the notes."""
import argparse
import re
import subprocess
import sys

import pytest

import options

# upstream's options, as its scripts spell them, each with a value that is not its default
ORIGINAL = [
    "--batch-size=32", "--epochs=10", "--model=pcpvt_small_v0", "--input-size=192", "--drop=0.1", "--drop-path=0.2", "--opt=sgd",
    "--opt-eps=1e-7", "--clip-grad=1", "--momentum=0.8", "--weight-decay=0.1", "--sched=step", "--lr=1e-3", "--lr-noise-pct=0.5",
    "--lr-noise-std=0.5", "--warmup-lr=1e-5", "--min-lr=1e-6", "--decay-epochs=20", "--warmup-epochs=3", "--cooldown-epochs=5",
    "--patience-epochs=4", "--decay-rate=0.2", "--color-jitter=0.3", "--aa=v0", "--smoothing=0.2", "--train-interpolation=bilinear",
    "--reprob=0.1", "--remode=const", "--recount=2", "--mixup=0.2", "--cutmix=0.3", "--mixup-prob=0.9", "--mixup-switch-prob=0.4",
    "--mixup-mode=elem", "--finetune=a.pth", "--max_step=7", "--data-path=/data", "--data-set=INAT", "--inat-category=genus",
    "--output_dir=out", "--device=cpu", "--seed=5", "--resume=b.pth", "--start_epoch=2", "--num_workers=3", "--world_size=4",
    "--dist_url=tcp://host:1"]
SWITCHES = ("--repeated-aug", "--resplit", "--use-mcloader", "--eval", "--throughout", "--dist-eval", "--pin-mem")
LISTS = {"--opt-betas": (0.8, 0.9), "--lr-noise": (0.4, 0.9), "--cutmix-minmax": (0.2, 0.8)}
DEFAULTS = dict(
    batch_size=64, epochs=300, input_size=224, drop=0.0, drop_path=0.1, opt="adamw", opt_eps=1e-8, opt_betas=None, clip_grad=5.0,
    momentum=0.9, weight_decay=0.05, sched="cosine", lr=5e-4, lr_noise=None, lr_noise_pct=0.67, lr_noise_std=1.0, warmup_lr=1e-6,
    min_lr=1e-5, decay_epochs=30, warmup_epochs=5, cooldown_epochs=10, patience_epochs=10, decay_rate=0.1, color_jitter=0.4,
    aa="rand-m9-mstd0.5-inc1", smoothing=0.1, train_interpolation=None, repeated_aug=False, reprob=0.25, remode="pixel", recount=1,
    resplit=False, mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_mode="batch", finetune="",
    data_set="IMNET", use_mcloader=False, inat_category="name", output_dir=None, seed=0, resume="", start_epoch=0, eval=False,
    dist_eval=False, num_workers=10, pin_mem=True, world_size=1, dist_url="env://", throughout=False)
OURS = dict(model="alt_gvt_small", device="auto", data_path="", max_step=0, accum_steps=1, model_ema=False, grad_checkpointing=False,
            compile=False, amp="auto", sched_lag=1, val_interval=1, print_freq=10, teacher_model="", teacher_path="",
            distillation_type="none", distillation_alpha=0.5, distillation_tau=1.0, no_eval=False, fp32=False, hf32=False)
DATA = ("--data-path", "/data")


def read(*words):
    """The arguments without the checks."""
    return options.get_args_parser().parse_args(words)


def forms(name):
    return {name, "--" + name[2:].replace("-", "_"), "--" + name[2:].replace("_", "-")}


def complaint(capsys, *words):
    """What stands on stderr; the status is 2 and stdout empty."""
    with pytest.raises(SystemExit) as caught:
        options.parse(list(map(str, words)))
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


# ---- spellings and defaults ----

@pytest.mark.parametrize("word", ORIGINAL)
def test_originals_options(word):
    """With hyphens, with underscores, after '=' and after a blank: the same value under the original's name."""
    name, _, text = word.partition("=")
    place, plain = name[2:].replace("-", "_"), vars(read())
    for form in forms(name):
        a, b = vars(read(f"{form}={text}")), vars(read(form, text))
        assert a == b
        assert {key for key in a if a[key] != plain[key]} == {place}
        assert type(a[place])(text) == a[place]


def test_short_decay_rate():
    assert read("--dr", "0.3").decay_rate == 0.3


@pytest.mark.parametrize("name", SWITCHES)
def test_originals_switches(name):
    for form in forms(name):
        assert getattr(read(form), name[2:].replace("-", "_")) is True


@pytest.mark.parametrize("name", ["repeated_aug", "pin_mem"])
def test_switches_with_a_no(name):
    """The last one wins, as upstream's."""
    for no in forms(f"--no-{name.replace('_', '-')}"):
        assert getattr(read(no), name) is False
        assert getattr(read(f"--{name}", no), name) is False
        assert getattr(read(no, f"--{name}"), name) is True


@pytest.mark.parametrize("name", LISTS)
def test_options_with_two_numbers(name):
    for form in forms(name):
        assert tuple(getattr(read(form, *map(str, LISTS[name])), name[2:].replace("-", "_"))) == LISTS[name]


def test_defaults_are_upstreams():
    found = vars(read())
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS
    assert {key: found[key] for key in OURS} == OURS


@pytest.mark.parametrize("name, choices", [
    ("--data-set", ("CIFAR", "IMNET", "INAT", "INAT19")), ("--amp", ("auto", "bf16", "fp16", "apex", "off")),
    ("--inat-category", ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")),
    ("--distillation-type", ("none", "soft", "hard")), ("--mixup-mode", ("batch", "pair", "elem")),
    ("--sched", ("cosine", "tanh", "step", "plateau", "poly"))])
def test_choices(capsys, name, choices):
    for choice in choices:
        assert getattr(read(name, choice), name[2:].replace("-", "_")) == choice
    assert "invalid choice: 'other'" in complaint(capsys, *DATA, name, "other")


@pytest.mark.parametrize("words, folder", [
    ([], "alt_gvt_small"), (["--model=vit_base_patch16_224.augreg_in1k"], "vit_base_patch16_224.augreg_in1k"),
    (["--model=timm/resnet18"], "timm_resnet18"), (["--model=../../x"], "_.._x"), (["--output_dir=out/put"], "out/put"),
    (["--output_dir="], "")])
def test_the_folder_of_a_training(words, folder):
    assert options.output_folder(read(*words)) == folder


def test_the_parser_can_be_a_parent():
    """As upstream's, it has no --help of its own."""
    parser = argparse.ArgumentParser(parents=[options.get_args_parser()])
    parser.add_argument("--more", type=int)
    args = parser.parse_args(["--batch-size", "8", "--more", "3"])
    assert (args.batch_size, args.more, args.epochs) == (8, 3, 300)


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        options.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for rows in options.OPTIONS.values():
        for names, default, *_ in rows:
            shown = re.search(rf"(?ms)^  {names.replace(' ', ', ')}(?: |$).*?default:\s(.*?)\]", text)
            assert shown and " ".join(shown[1].split()) == str(default), names


def test_the_readme_table_has_every_option():
    table = subprocess.run([sys.executable, options.__file__], capture_output=True, text=True, check=True).stdout
    rows = [line for line in table.splitlines() if line.startswith("| `--")]
    assert len(rows) == sum(map(len, options.OPTIONS.values()))
    assert all(row.count("|") == 6 for row in rows)


# ---- checks ----

def test_the_defaults_and_a_data_set_pass():
    assert options.parse(list(DATA)).data_path == "/data"


@pytest.mark.parametrize("words, message", [
    ("--batch-size 0", "--batch-size is 0, and must be at least 1"),
    ("--batch-size -2", "--batch-size is -2, and must be at least 1"),
    ("--epochs 0", "--epochs is 0, and must be at least 1"),
    ("--max_step -1", "--max-step is -1, and must be at least 0"),
    ("--input-size 31", "--input-size is 31, and must be at least 32"),
    ("--num_workers -1", "--num-workers is -1, and must be at least 0"),
    ("--accum-steps 0", "--accum-steps is 0, and must be at least 1"),
    ("--val-interval 0", "--val-interval is 0, and must be at least 1"),
    ("--print-freq 0", "--print-freq is 0, and must be at least 1"),
    ("--start_epoch -1", "--start-epoch is -1, and must be at least 0"),
    ("--sched-lag -1", "--sched-lag is -1, and must be at least 0"),
    ("--warmup-epochs -1", "--warmup-epochs is -1, and must be at least 0"),
    ("--recount 0", "--recount is 0, and must be at least 1"),
    ("--lr -0.1", "--lr is -0.1, and must be at least 0"),
    ("--lr nan", "--lr is nan, and must be at least 0"),
    ("--lr inf", "--lr is inf"),
    ("--weight-decay -1", "--weight-decay is -1.0, and must be at least 0"),
    ("--clip-grad -1", "--clip-grad is -1.0, and must be at least 0"),
    ("--mixup -1", "--mixup is -1.0, and must be at least 0"),
    ("--cutmix -1", "--cutmix is -1.0, and must be at least 0"),
    ("--drop 1.5", "--drop is 1.5, and must be between 0 and 1"),
    ("--drop-path -0.1", "--drop-path is -0.1, and must be between 0 and 1"),
    ("--drop-path 1", "--drop-path is 1.0, and must be at least 0 and less than 1"),
    ("--smoothing 1", "--smoothing is 1.0, and must be at least 0 and less than 1"),
    ("--smoothing nan", "--smoothing is nan, and must be at least 0 and less than 1"),
    ("--opt sgd --momentum 5", "--momentum is 5.0, and must be at least 0 and less than 1"),
    ("--opt sgd --momentum -0.1", "--momentum is -0.1, and must be"),
    ("--model-ema --model-ema-decay 2", "--model-ema-decay is 2.0, and must be at least 0 and less than 1"),
    ("--model-ema --model-ema-decay 1", "--model-ema-decay is 1.0, and must be at least 0 and less than 1"),
    ("--warmup-lr -1", "--warmup-lr is -1.0, and must be at least 0"),
    ("--min-lr -1", "--min-lr is -1.0, and must be at least 0"),
    ("--min-lr nan", "--min-lr is nan, and must be at least 0"),
    ("--sched step --decay-rate 0", "--decay-rate is 0.0, and must be at least 1e-06"),
    ("--cooldown-epochs -1", "--cooldown-epochs is -1, and must be at least 0"),
    ("--sched plateau --patience-epochs -1", "--patience-epochs is -1, and must be at least 0"),
    ("--opt-eps -1", "--opt-eps is -1.0, and must be at least 0"),
    ("--lr-noise 0.1 0.5 0.9", "--lr-noise takes one or two fractions of the schedule"),
    ("--lr-noise 40 80", "--lr-noise takes one or two fractions of the schedule"),
    ("--lr-noise -0.1 0.5", "--lr-noise takes one or two fractions of the schedule"),
    ("--lr-noise nan", "--lr-noise takes one or two fractions of the schedule"),
    ("--reprob 2", "--reprob is 2.0, and must be between 0 and 1"),
    ("--mixup-prob 2", "--mixup-prob is 2.0"),
    ("--mixup-switch-prob nan", "--mixup-switch-prob is nan"),
    ("--hflip 2", "--hflip is 2.0"),
    ("--distillation-type soft --teacher-model x --distillation-alpha 2", "--distillation-alpha is 2.0"),
    ("--distillation-type soft --teacher-model x --distillation-tau 0", "--distillation-tau is 0.0"),
    ("--cutmix-minmax 0.2", "--cutmix-minmax takes two numbers"),
    ("--cutmix-minmax 0.2 0.4 0.8", "--cutmix-minmax takes two numbers"),
    ("--cutmix-minmax 0.8 0.2", "--cutmix-minmax"),
    ("--sched step --decay-epochs 0", "--decay-epochs is 0.0"),
    ("--crop-scale 0.2", "--crop-scale takes two numbers"),
    ("--crop-scale 0 0", "--crop-scale takes two numbers between 0 and 1, the smaller first"),
    ("--crop-scale 0.8 0.2", "--crop-scale takes two numbers"),
    ("--crop-scale 0.5 1.5", "--crop-scale takes two numbers"),
    ("--cutmix-minmax 0 0", "--cutmix-minmax takes two numbers"),
    ("--batch-size 5", "--batch-size 5 is odd"),
    ("--batch-size 5 --mixup 0", "--batch-size 5 is odd"),
    ("--batch-size 5 --mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8", "--batch-size 5 is odd"),
    ("--finetune yes", "--finetune yes needs the weights as --resume FILE"),
    ("--finetune a.pth --resume b.pth", "--finetune starts a new training and --resume goes on with one"),
    ("--resume auto --output_dir=", "--resume auto looks in --output_dir"),
    ("--eval", "--eval needs weights"),
    ("--eval --finetune a.pth", "--eval evaluates weights as they are: give them as --resume FILE, not --finetune"),
    ("--eval --finetune yes --resume a.pth", "--eval evaluates weights as they are: give them as --resume FILE, not --finetune"),
    ("--eval --no-eval --resume a.pth", "--eval and --no-eval exclude each other"),
    ("--pretrained --resume a.pth", "all bring weights"),
    ("--pretrained --finetune a.pth", "all bring weights"),
    ("--distillation-type hard", "--distillation-type needs a teacher"),
    ("--teacher-model regnety_160", "a teacher has no effect without --distillation-type"),
    ("--teacher-path a.pth", "a teacher has no effect without --distillation-type"),
    ("--fp32 --hf32", "--fp32 and --hf32 exclude each other"),
    ("--sched plateau --no-eval", "--sched plateau"),
    ("--seed 99999999999999999999", "--seed is 99999999999999999999, and must be at most 4294967295"),
    ("--seed -1", "--seed is -1, and must be at least 0"),
    ("--color-jitter -1", "--color-jitter is -1.0, and must be at least 0"),
    ("--color-jitter nan", "--color-jitter is nan"),
    ("--input-size 99999999", "--input-size is 99999999, and must be at most 16384"),
    ("--epochs 99999999999999999999", "--epochs is 99999999999999999999, and must be at most 100000"),
    ("--num_workers 100000", "--num-workers is 100000, and must be at most 1024"),
    ("--recount 1000000000", "--recount is 1000000000, and must be at most 1000"),
    ("--lr 1e300", "--lr is 1e+300, and must be at most 1e+30"),
    ("--lr-noise 0.8 0.4", "--lr-noise takes one or two fractions of the schedule, the smaller first"),
    ("--lr-noise 0.4 0.4", "--lr-noise takes one or two fractions"),
    ("--lr-noise-pct 0", "--lr-noise-pct is 0.0, and must be at least 0.01"),
    ("--lr-noise-pct 2", "--lr-noise-pct is 2.0, and must be at most 1"),
    ("--lr-noise-std nan", "--lr-noise-std is nan"),
    ("--lr-noise-std 90", "--lr-noise-std is 90.0, and must be at most 100 times --lr-noise-pct, 0.67"),
    ("--opt-betas 0.9 1", "--opt-betas is 0.9 1.0, and each must be at least 0 and less than 1"),
    ("--opt-betas nan 0.9", "--opt-betas is nan 0.9"),
    ("--sched step --decay-rate 2", "--decay-rate is 2.0, and must be at most 1 for --sched step"),
    ("--sched plateau --decay-rate 1", "--decay-rate is 1.0, and must be less than 1 for --sched plateau"),
    ("--cutmix-minmax 0.5 0.5", "--cutmix-minmax 0.5 0.5 leaves no box between them at 224 pixels"),
    ("--input-size 32 --cutmix-minmax 0.5 0.52", "--cutmix-minmax 0.5 0.52 leaves no box between them at 32 pixels"),
    ("--aa rand-n100000", "--aa rand-n100000: n, w and d are how many operations, at most 100"),
    ("--aa augmix-a0", "--aa augmix-a0: n, w and d"),
    ("--crop-pct 1e-300", "--crop-pct is 1e-300, and must be between 0.01 and 1"),
    ("--no-such-option", "unrecognized arguments: --no-such-option"),
    ("--batch 8", "unrecognized arguments: --batch 8"),
    ("--batch-size many", "argument --batch-size"),
    ("--batch-size", "argument --batch-size"),
    ("stray", "unrecognized arguments: stray"),
])
def test_mistakes_are_one_line_and_status_2(capsys, words, message):
    assert message in complaint(capsys, *DATA, *words.split())


def test_no_data_set(capsys):
    assert "no data set: --data-path FOLDER" in complaint(capsys)


@pytest.mark.parametrize("words", [
    "--batch-size 5 --mixup 0 --cutmix 0", "--batch-size 5 --eval --resume a.pth", "--batch-size 5 --throughout", "--clip-grad 0",
    "--lr 0", "--resume auto --output_dir out", "--eval --pretrained", "--eval --resume a.pth", "--finetune yes --resume a.pth",
    "--mixup 0 --cutmix 1", "--opt sgd --momentum 0", "--model-ema --model-ema-decay 0", "--warmup-lr 0 --min-lr 0", "--lr-noise 0.4",
    "--lr-noise 0 1", "--crop-scale 1 1", "--crop-scale 0 0.5", "--opt-eps 0", "--sched poly --decay-rate 2", "--cooldown-epochs 0",
    "--mixup 0 --cutmix 0 --smoothing 0", "--distillation-type hard --teacher-model regnety_160", "--opt-betas 0.98 0.92 0.99 --opt adan",
    "--seed 0", "--seed 4294967295", "--color-jitter 0", "--cutmix-minmax 0.5 0.51", "--aa augmix-m5-w4-d2-a0.5", "--decay-rate 2",
    "--aa none", "--warmup-epochs 0", "--sched none", "--max_step 10 --no-eval"])
def test_what_is_no_mistake(words):
    options.parse([*DATA, *words.split()])


# ---- what follows ----

@pytest.mark.parametrize("words, finetune, resume", [
    ("", "", ""),
    ("--finetune a.pth", "a.pth", ""),
    ("--resume a.pth", "", "a.pth"),
    ("--finetune yes --resume a.pth", "a.pth", ""),
    ("--finetune True --resume a.pth", "a.pth", ""),
    ("--resume auto --output_dir out", "", "auto"),
])
def test_finetune_and_resume(words, finetune, resume):
    """`--finetune yes --resume FILE` is the original's way to say `--finetune FILE`."""
    args = options.parse([*DATA, *words.split()])
    assert (options.finetune_file(args), options.resume_file(args)) == (finetune, resume)


@pytest.mark.parametrize("words, soft", [
    ("", True), ("--mixup 0", True), ("--cutmix 0", True), ("--mixup 0 --cutmix 0", False),
    ("--mixup 0 --cutmix 0 --cutmix-minmax 0.2 0.8", True)])
def test_which_batches_are_mixed(words, soft):
    assert options.mixes(read(*words.split())) is soft


# ---- notes ----

IDLE = {
    "--use-mcloader": "use_mcloader", "--resplit": "resplit", "--world_size 8": "world_size", "--dist_url tcp://x:1": "dist_url",
    "--momentum 0.8": "momentum", "--decay-rate 0.2": "decay_rate", "--decay-epochs 10": "decay_epochs",
    "--patience-epochs 3": "patience_epochs", "--cooldown-epochs 3": "cooldown_epochs", "--lr-noise-pct 0.5": "lr_noise_pct",
    "--lr-noise-std 0.5": "lr_noise_std", "--color-jitter 0.3": "color_jitter", "--model-ema-decay 0.9": "model_ema_decay",
    "--distillation-tau 2": "distillation_tau", "--distillation-alpha 0.3": "distillation_alpha", "--inat-category genus": "inat_category",
    "--reprob 0 --remode const": "remode", "--reprob 0 --recount 3": "recount",
    "--mixup 0 --cutmix 0 --mixup-prob 0.5": "mixup_prob", "--mixup 0 --cutmix 0 --mixup-mode pair": "mixup_mode",
    "--mixup 0 --cutmix 0 --mixup-switch-prob 0.2": "mixup_switch_prob", "--opt sgd --opt-eps 1e-3": "opt_eps",
    "--opt momentum --opt-eps 1e-3": "opt_eps", "--opt lion --opt-eps 1e-3": "opt_eps", "--opt lion --momentum 0.1": "momentum",
    "--opt lamb --momentum 0.1": "momentum", "--model vit_tiny_patch16_224 --attn explicit": "attn",
    "--model vit_tiny_patch16_224 --window-padding mask": "window_padding",
    "--model pcpvt_large_v0 --window-padding mask": "window_padding",
    "--device cpu --fp32": "fp32", "--device cpu --hf32": "hf32", "--sched none --warmup-epochs 3": "warmup_epochs",
    "--sched none --warmup-lr 1e-5": "warmup_lr", "--sched none --min-lr 1e-6": "min_lr", "--sched none --sched-lag 0": "sched_lag",
    "--sched none --lr-noise 0.4 0.9": "lr_noise", "--data-set CIFAR --input-size 32 --crop-scale 0.2 1": "crop_scale",
    "--data-set CIFAR10 --input-size 32 --train-interpolation bilinear": "train_interpolation",
    "--data-set CIFAR --input-size 32 --crop-pct 1": "crop_pct", "--no-eval --crop-pct 1": "crop_pct",
    "--data-set CIFAR --input-size 32 --interpolation bilinear": "interpolation",
    "--keep 3 --output_dir=": "keep", "--milestones 3 --output_dir=": "milestones",
    "--resume a.pth --start_epoch 2": "start_epoch", "--resume auto --output_dir out --start_epoch 2": "start_epoch"}


@pytest.mark.parametrize("words", IDLE)
def test_an_option_without_effect_says_so_once(words):
    notes = options.notes(options.parse([*DATA, *words.split()]))
    assert len(notes) == 1
    assert re.match(f"--{IDLE[words].replace('_', '-')} has no effect: .+", notes[0])


def test_the_gone_loader_says_what_to_use():
    note, = options.notes(options.parse([*DATA, "--use-mcloader"]))
    assert "webdataset" in note and "tools data shards" in note


@pytest.mark.parametrize("words", [
    "", "--opt sgd --momentum 0.8", "--sched step --decay-rate 0.2 --decay-epochs 10",
    "--sched plateau --patience-epochs 3 --decay-rate 0.5",
    "--sched poly --decay-rate 0.5", "--lr-noise 0.4 0.9 --lr-noise-pct 0.5 --lr-noise-std 0.5", "--aa none --color-jitter 0.3",
    "--remode const --recount 3", "--mixup-prob 0.5 --mixup-mode elem --mixup-switch-prob 0.1", "--model-ema --model-ema-decay 0.9",
    "--distillation-type soft --teacher-model x --distillation-tau 2 --distillation-alpha 0.3", "--data-set INAT --inat-category genus",
    "--world_size 1 --dist_url env:// --momentum 0.9", "--opt-eps 1e-3", "--opt AdamW --opt-eps 1e-3",
    "--opt rmsprop --opt-eps 1e-3 --momentum 0.8",
    "--opt lamb --opt-eps 1e-3 --opt-betas 0.8 0.9", "--attn explicit --window-padding mask", "--model pcpvt_small_v0 --attn explicit",
    "--model vit_tiny_patch16_224", "--fp32", "--hf32", "--device npu:1 --hf32", "--device cuda --fp32", "--device cpu",
    "--warmup-epochs 3 --warmup-lr 1e-5 --min-lr 1e-6", "--sched constant --warmup-epochs 3 --warmup-lr 1e-5", "--sched none",
    "--data-set CIFAR --crop-scale 0.2 1 --train-interpolation bilinear",
    "--input-size 32 --crop-scale 0.2 1 --train-interpolation bilinear",
    "--data-set CIFAR --input-size 32", "--start_epoch 2", "--finetune a.pth", "--resume a.pth"])
def test_what_has_an_effect_is_not_noted(words):
    assert options.notes(options.parse([*DATA, *words.split()])) == []
