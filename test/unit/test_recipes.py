"""Recipes: what they say against the paper and the published logs; mistakes; what a run saves of its own; the known run nearest to it."""
import csv
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT, build_optim, run
from torch import nn

import main
import optim
import options
import recipes
import training
import utils

DATA = ("--data-path", "/data")
# Twins' paper: drop path by size; published Acc@1; and the highest rate of the published log
PAPER = {"svt_small_300": ("alt_gvt_small", 0.2, 81.7, 2e-3), "svt_base_300": ("alt_gvt_base", 0.3, 83.2, 1e-3),
         "svt_large_300": ("alt_gvt_large", 0.5, 83.7, 1e-3), "pcpvt_small_300": ("pcpvt_small_v0", 0.2, 81.2, 1.25e-3),
         "pcpvt_base_300": ("pcpvt_base_v0", 0.3, 82.7, 1e-3), "pcpvt_large_300": ("pcpvt_large_v0", 0.5, 83.1, 1e-3)}
# what the demo's script had itself, before it was a recipe
DEMO = ["--epochs=8", "--batch-size=32", "--input-size=64", "--lr=8e-3", "--warmup-epochs=1", "--sched-lag=0", "--drop-path=0.1",
        "--crop-scale", "0.7", "1", "--hflip=0", "--aa=none", "--color-jitter=0", "--mixup=0", "--cutmix=0", "--reprob=0",
        "--num_workers=1"]
# what the scripts have
SCRIPT = ["--model", "alt_gvt_small", "--batch-size", "128", "--epochs", "100", "--drop-path", "0.3", "--dist-eval"]


def read(*words):
    return options.parse([*DATA, *map(str, words)])


def settings(*words):
    """All that is asked for, but for where it is asked."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(read(*words)).items() if name != "recipe"}


def complaint(capsys, *words):
    with pytest.raises(SystemExit) as caught:
        read(*words)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def write(folder, text):
    path = folder / "my recipe.toml"
    path.write_text(text)
    return path


def header(name):
    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    lines = text.splitlines()
    return [line[1:].strip() for line in lines[:next(i for i, line in enumerate(lines) if not line.startswith("#"))]]


def of_a_run(args, cards=1, images=1281167, classes=1000):
    batch, values = args.batch_size * args.accum_steps * cards, vars(args)
    return recipes.Run({name: values[name] for name in options.TRAINING}, batch, training.peak_rate(values, batch), images, classes,
                       bool(args.finetune or args.pretrained))


KNOWN = recipes.known(options.read_recipe, options.DEFAULTS, options.TRAINING, training.peak_rate)


# ---- the recipes ----

@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_opens_with_its_command_its_number_and_what_it_takes(name):
    lines = header(name)
    text, published = " ".join(lines), options.read_recipe(name)[1]
    command = shlex.split(next(line for line in lines if "main.py --recipe" in line))
    cards = re.search(r"--nproc_per_node=(\d+)", " ".join(command))
    args = options.parse(command[command.index("main.py") + 1:])
    assert args.recipe == name and published["cards"] == (int(cards[1]) if cards else 1)
    assert f"{published['acc1']} %" in published["said"] and f"{published['acc1']} %" in lines[0]
    assert "Source: " in text and "Takes: " in text
    assert options.notes(args) == []


@pytest.mark.parametrize("name", PAPER)
def test_the_published_runs_are_the_papers(name):
    args, published = read("--recipe", name), options.read_recipe(name)[1]
    model, drop_path, acc1, rate = PAPER[name]
    assert (args.model, args.drop_path, published["acc1"]) == (model, drop_path, acc1)
    assert (args.epochs, args.batch_size * published["cards"], args.opt, args.weight_decay, args.clip_grad) == (300, 1024, "adamw", 0.05, 5)
    assert optim.effective_lr(args.lr, 1024) == pytest.approx(rate, rel=1e-12)
    others = {key for key, value in vars(args).items() if value != options.DEFAULTS[key]}
    assert others <= {"recipe", "model", "drop_path", "batch_size", "lr", "data_path", "warmup_epochs"}  # the rest is upstream's defaults


@pytest.mark.parametrize("name", PAPER)
def test_the_rates_are_those_of_the_published_log_in_every_epoch(name):
    """The logs have 6 digits."""
    args, rates = read("--recipe", name), {}
    with open(ROOT / "published/curves.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["model"] == args.model:
                rates[int(row["epoch"])] = float(row["train_lr"])
    assert len(rates) == (296 if name == "pcpvt_large_300" else 300)
    schedule = build_optim(nn.Linear(2, 2), lr=args.lr, global_batch=1024, epochs=args.epochs, sched=args.sched, sched_lag=args.sched_lag,
                           warmup_lr=args.warmup_lr, warmup_epochs=args.warmup_epochs, min_lr=args.min_lr)[1]
    found = schedule.rates(range(300))
    assert max(abs(found[epoch] - rate) for epoch, rate in rates.items()) < 5e-9


def test_the_demos_recipe_is_what_its_script_had():
    assert settings("--recipe", "digits") == settings(*DEMO)


def test_ascends_recipe_is_what_train_full_8p_starts():
    """But for --dist-eval, which changes no number."""
    assert settings("--recipe", "svt_small_100_ascend", "--dist-eval") == settings(*SCRIPT)


# ---- what wins ----

@pytest.mark.parametrize("key", ["drop_path", "drop-path"])
def test_the_command_line_wins_over_the_recipe_and_it_over_the_defaults(tmp_path, key):
    path = write(tmp_path, f'{key} = 0.2\nlr = 1\nepochs = 7\nopt-betas = [0.8, 0.9]\nlr_noise = 0.4\nmodel_ema = true\ndr = 0.5\n'
                           'sched = "step"\n')
    args = read("--recipe", path)
    assert (args.drop_path, args.lr, args.epochs, args.opt_betas, args.lr_noise) == (0.2, 1.0, 7, (0.8, 0.9), (0.4,))
    assert type(args.lr) is float and args.model_ema is True and args.decay_rate == 0.5 and args.weight_decay == 0.05
    for words in (["--drop-path", "0.4", "--no-model-ema"], ["--drop_path=0.4", "--no_model_ema"]):
        for order in ([*words, "--recipe", path], ["--recipe", path, *words]):
            args = read(*order)
            assert (args.drop_path, args.model_ema, args.epochs) == (0.4, False, 7)


def test_a_recipe_is_found_by_its_name_in_either_spelling_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings("--recipe=svt-base-300") == settings("--recipe", "svt_base_300")
    (tmp_path / "mine").write_text("epochs = 3\n")
    assert read("--recipe=mine").epochs == 3
    assert read("--recipe", "").epochs == 300


# ---- mistakes ----

@pytest.mark.parametrize("text, message", [
    ("lrr = 1", "lrr is no option: did you mean lr?"), ("drop_pth = 0.1", "drop_pth is no option: did you mean drop_path?"),
    ("batchsize = 8", "batchsize is no option: did you mean batch_size?"),
    ("[model]\nname = 'x'", 'model is {"name": "x"}, and must be a text'), ("[extra]\nlr = 1", "extra is no option"),
    ('epochs = "3"', 'epochs is "3", and must be a whole number'), ("epochs = 3.0", "epochs is 3.0, and must be a whole number"),
    ("epochs = true", "epochs is true, and must be a whole number"), ('lr = "1e-3"', 'lr is "1e-3", and must be a number'),
    ("lr = false", "lr is false, and must be a number"), ("model = 3", "model is 3, and must be a text"),
    ("model_ema = 1", "model_ema is 1, and must be true or false"), ('model_ema = "yes"', "must be true or false"),
    ('opt_betas = "0.9 0.99"', "must be numbers, [0.9, 0.999]"), ("opt_betas = []", "must be numbers"),
    ("opt_betas = [0.9, true]", "must be numbers"), ("lr = 2024-01-01", "must be a number"),
    ('sched = "cosin"', 'sched is "cosin", and must be one of cosine, tanh'),
    ("lr = 1\n'l\\nr' = 2", "is no option"), ("drop_path = 0.1\ndrop-path = 0.1", "drop-path is said twice, in two spellings"),
    ("epochs = 0", "--epochs is 0, and must be at least 1"), ("lr = nan", "--lr is nan"), ("drop = 1.5", "--drop is 1.5"),
    (f"lr = 1{'0' * 400}", "lr is too large a number"), ("mixup = 0.8\nbatch_size = 5", "--batch-size 5 is odd"),
    ('resume = "auto"', "resume belongs to one command, not to a recipe: give it as --resume"),
    ('recipe = "digits"', "recipe belongs to one command"), ("eval = true", "eval belongs to one command"),
    ("lr = ", "Invalid value"), ("lr 3", "a recipe has lines such as lr = 5e-4"), ("lr = 1\nlr = 2", "Cannot overwrite a value"),
    ("a = " + "[" * 5000, "a recipe has lines such as"), ("\x00", "a recipe has lines such as")])
def test_a_mistake_in_a_recipe_is_one_line_with_its_file(tmp_path, capsys, text, message):
    told = complaint(capsys, "--recipe", write(tmp_path, text))
    assert message in told and ("my recipe.toml" in told or message.startswith("--"))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"lr = 1\n" + b"#" * 2**20])
def test_what_is_no_text_or_no_recipe_at_all(tmp_path, capsys, content):
    path = tmp_path / "odd.toml"
    path.write_bytes(content)
    assert "odd.toml" in complaint(capsys, "--recipe", path)


@pytest.mark.parametrize("word, message", [
    ("svt_smal_300", "no such recipe: did you mean svt_small_300?"), ("digit", "did you mean digits?"), ("nowhere/x", "no such file"),
    ("gone.toml", "there is no such file"), ("../recipes", "no such file")])
def test_a_recipe_that_is_not_there(capsys, word, message):
    assert message in complaint(capsys, "--recipe", word)


# ---- what a run leaves ----

ODD = ["--finetune=we\"ird \\ näme\t😀\x7f.pth", "--opt-betas", "0.8", "0.95", "--lr=3e-07", "--epochs=4", "--model-ema", "--no-pin-mem",
       "--class-map=x\ny.csv", "--lr-noise", "0.4", "0.9", "--weight-decay=0", "--seed=7", "--aa=none", "--mean", "0.5", "0.5", "0.5"]


@pytest.mark.parametrize("words", [[], ODD, ["--recipe", "digits"], *(["--recipe", name] for name in PAPER)])
def test_a_saved_recipe_says_the_same_again(tmp_path, words):
    text = recipes.text(vars(read(*words)), options.GROUPS, "two\nlines")
    said = options.read_recipe(str(write(tmp_path, text)))[0]
    assert text.startswith("# two\n# lines\n") and not {"data_path", "recipe", "resume"} & set(said)
    assert settings("--recipe", tmp_path / "my recipe.toml") == settings(*words)


def test_a_saved_recipe_is_whole_or_the_old_one(tmp_path, monkeypatch):
    recipes.save(tmp_path, "lr = 1\n")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(ValueError, match=r"recipe\.toml cannot be written \(No space left on device\): choose another --output_dir"):
        recipes.save(tmp_path, "lr = 2\n")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"] and (tmp_path / "recipe.toml").read_text() == "lr = 1\n"


SMALL = ("model = 'test_convnext'\nepochs = 2\nbatch-size = 8\ninput_size = 32\nnum_workers = 0\nlr = 0.05\nwarmup_epochs = 0\n"
         "sched_lag = 0\n")


def weights(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_of_a_recipe_and_of_the_recipe_that_it_leaves(tiny_folder, tmp_path, run_main, run_ranks, capsys):
    """From a file, from the options it stands for, from what the run left, and cut and resumed: the same weights, bit for bit."""
    path, where = write(tmp_path, SMALL), ("--data-path", tiny_folder, "--device=cpu")
    usual = ["--model=test_convnext", "--epochs=2", "--batch-size=8", "--input-size=32", "--num_workers=0", "--lr=0.05",
             "--warmup-epochs=0", "--sched-lag=0"]
    done = run_main("--recipe", path, *where, "--output_dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "The nearest known run is " in done.stdout
    assert main.run([*usual, *map(str, where), "--output_dir", str(tmp_path / "b")]) == 0
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert main.run(["--recipe", str(tmp_path / "a/recipe.toml"), *map(str, where), "--output_dir", str(tmp_path / "c")]) == 0
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "c"))
    assert "Global batch 8 = 8 x 1 ranks x 1 accumulated." in (tmp_path / "a/recipe.toml").read_text()
    again = ["--recipe", str(path), *map(str, where), "--output_dir", str(tmp_path / "d"), "--resume=auto"]
    capsys.readouterr()
    assert main.run([*again, "--max_step=4"]) == 0 and main.run(["--recipe", str(tmp_path / "d/recipe.toml"), *again[2:]]) == 0
    assert "this is not what" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "d").glob("recipe*")) == ["recipe.toml"]
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "d"))
    assert main.run([*again, "--epochs=3", "--max_step=1"]) == 0  # it goes on otherwise: both are there
    assert "epochs = 3\n" in (tmp_path / "d/recipe.toml").read_text() and "epochs = 2\n" in (tmp_path / "d/recipe.toml.1").read_text()
    # two ranks write one recipe, and a new run puts the earlier one's aside
    done = run_ranks(2, "--recipe", path, *where, "--max_step=1", "--no-eval", "--batch-size=4", "--lr=1",
                     "--output_dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "Global batch 8 = 4 x 2 ranks x 1 accumulated." in (tmp_path / "a/recipe.toml").read_text()
    assert done.stdout.count("The nearest known run is ") == 1 and done.stdout.count("is far from what is known to train with adamw") == 1
    assert (tmp_path / "a/recipe.toml.1").is_file() and not list((tmp_path / "a").glob(".*tmp"))


# ---- which run is it? ----

@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.name)
def test_a_known_run_is_told_by_its_name(known):
    published = options.read_recipe(known.name)[1]
    weights = ["--finetune=x.pth"] if published.get("weights") else []
    own = of_a_run(read("--recipe", known.name, *weights), published["cards"], published["images"], published["classes"])
    assert recipes.nearest(own, KNOWN) == f"This run is {known.name}: {published['said']}"
    assert recipes.doubts(own, KNOWN) == []


def test_a_run_is_told_by_what_it_does_and_not_by_how_it_was_asked():
    """4 cards that accumulate two batches are 8 cards; the original's script without a recipe is Ascend's run."""
    assert recipes.nearest(of_a_run(read("--recipe=svt_small_300", "--accum-steps=2", "--amp=bf16", "--compile"), 4), KNOWN).startswith(
        "This run is svt_small_300: ")
    assert recipes.nearest(of_a_run(read(*SCRIPT), 8), KNOWN) == (
        "This run is svt_small_100_ascend: Twins-SVT-S as the Ascend adaptation trained it, Acc@1 78.43 %")


@pytest.mark.parametrize("words, cards, said", [
    ("--recipe=svt_base_300 --epochs=100", 8,
     "svt_base_300: Twins-SVT-B as published, Acc@1 83.2 %. This one differs: epochs 100 instead of 300"),
    ("--recipe=svt_base_300 --batch-size=64", 8,
     "global batch 512 instead of 1024, highest rate 0.0005 instead of 0.001"),
    ("--recipe=svt_small_300 --opt-betas 0.9 0.99", 8, "This one differs: opt-betas 0.9 0.99 instead of nothing"),
    ("--recipe=pcpvt_large_300 --finetune x.pth", 8, "pcpvt_large_300: Twins-PCPVT-L as published, Acc@1 83.1 %. This one differs: "
     "it starts from weights"),
    ("--model=resnet18", 8, "model resnet18 instead of ")])
def test_what_differs_from_the_nearest_run(words, cards, said):
    assert said in recipes.nearest(of_a_run(read(*words.split()), cards), KNOWN)


def test_other_data_are_told():
    told = recipes.nearest(of_a_run(read("--recipe=svt_large_300"), 8, images=50000, classes=100), KNOWN)
    assert told.endswith("This one differs: 50,000 images of 100 classes instead of 1,281,167 of 1,000")


@pytest.mark.parametrize("words, cards, batch, rate", [
    ("--batch-size=256 --drop-path=0.2", 8, "the global batch, 2048, is far", ""),  # the user's of upstream
    ("--batch-size=128", 8, "", ""), ("--batch-size=128", 1, "", ""),
    ("--batch-size=2", 1, "the global batch, 2, is far", "the highest rate, 1.95313e-06, is far"),
    ("--batch-size=128 --lr=5e-3", 8, "", "the highest rate, 0.01, is far"),
    ("--batch-size=128 --lr=1e-5", 8, "", "the highest rate, 2e-05, is far"),
    ("--batch-size=4096 --opt=sgd --lr=1", 8, "", "")])  # nothing is known of it
def test_a_batch_or_rate_far_from_all_that_is_known(words, cards, batch, rate):
    found = recipes.doubts(of_a_run(read(*words.split()), cards), KNOWN)
    assert len(found) == bool(batch) + bool(rate) and batch in "".join(found) and rate in "".join(found)
    if "2048" in batch:
        assert "the largest is 1024" in found[0] and "81.1 % instead of 81.7 %" in found[0]


# ---- the scripts' view ----

def test_what_a_recipe_says_for_the_scripts():
    told = run([sys.executable, ROOT / "options.py", "digits"], None, None, 60)
    found = dict(line.split("=", 1) for line in told.stdout.splitlines())
    assert told.returncode == 0 and (found["batch_size"], found["epochs"], found["aa"]) == ("32", "8", "none")
    told = run([sys.executable, ROOT / "options.py", "digit"], None, None, 60)
    assert (told.returncode, told.stdout) == (2, "") and told.stderr.startswith("error: --recipe digit: no such recipe")
