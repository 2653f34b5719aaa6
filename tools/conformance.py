"""Is this checkout what was published? Checked against the facts in published/, a line each; status 0 if all of them hold.

    python tools conformance                                    # a minute or two on two cores, and 1.5 GB for temporary files
    python tools conformance parameters schedule                # only these checks
    python tools conformance --weights alt_gvt_small.pth alt_gvt_base.pth --data-path /data/imagenet     # their Acc@1, too

parameters   of the six models
groups       how many of them weight decay leaves out and takes: timm's rule, which is upstream's
operations   multiply-adds at 224 pixels in 10^9, all products of layers (without attention's two products / with them); biases, norms
             and activations do not count
outputs      equal to those of timm's models with the same weights, in float64
schedule     the rate of every epoch of the six published runs
steps        of an epoch, 8 ranks with batches of 128 on ImageNet, with and without repeated augmentation
transform    an image that is evaluated is torchvision's Resize, CenterCrop, ToTensor and Normalize of it, in every pixel
training     the rows that upstream's own code wrote: the same trainings, again, through main.py
accuracy     (with --weights and --data-path) Acc@1 on ImageNet, by main.py's own evaluation, within 0.1 %
"""
import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import devices  # before torch: it decides what torch may load

# isort: split
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as tv

import assembly
import checkpoint
import loaders
import networks
import optim
import options
import precision
import transforms
from tools import _published as published
from tools import _upstream as upstream

IMAGENET = {"train": 1_281_167, "val": 50_000}


@dataclass
class Row:
    """One fact: in words, as it was published, as it is here, and whether it holds."""
    what: str
    published: str
    found: str
    ok: bool

    def __str__(self):
        return f"{self.what:<40} {self.published:>24}  {self.found:>40}  {'yes' if self.ok else 'NO'}"


HEADER = f"{'what':<40} {'published':>24}  {'found':>40}  ok"


@cache
def build(model, **ours):
    """A network without memory: what is asked of it are shapes."""
    with torch.device("meta"):
        return networks.create(model, 1000, 224, **ours)[0].eval()


def parameters(model, facts):
    found = sum(parameter.numel() for parameter in build(model).parameters())
    return Row(f"{model}, parameters", f"{facts['parameters']:,.0f}", f"{found:,}", found == facts["parameters"])


def groups(model, facts):
    found = {bool(group["weight_decay"]): sum(p.numel() for p in group["params"]) for group in optim.decay_groups(build(model), 0.05)}
    found = [found[False], found[True]]
    expected = [facts["not_decayed"], facts["decayed"]]
    return Row(f"{model}, not decayed + decayed", "{:,.0f} + {:,.0f}".format(*expected), "{:,} + {:,}".format(*found), found == expected)


def operations(model, facts):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build(model, fused_attn=False)(torch.empty(1, 3, 224, 224, device="meta"))
    counts = {operator: count / 2e9 for operator, count in counter.get_flop_counts()["Global"].items()}  # it counts 2 a multiply-add
    attention = counts.get(torch.ops.aten.bmm, 0.0)  # batches of products are attention's alone
    found, expected = [sum(counts.values()) - attention, sum(counts.values())], [facts["gmac"], facts["gmac_with_attention"]]
    return Row(f"{model}, G multiply-adds", "{} / {}".format(*expected), "{:.3f} / {:.3f}".format(*found),
               [round(value, 1) for value in found] == expected)


def outputs(model, facts):
    """On 64 pixels, where windows are padded."""
    ours = deepcopy(build(model)).double().to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in ours.parameters():
        width = (3 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 1.0  # of a layer: what leaves it is as large as what enters
        torch.nn.init.uniform_(parameter, -width, width)
    with torch.device("meta"):
        theirs = timm.create_model(facts["timm"]).double().eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        difference = ((ours(images) - expected).abs().max() / expected.std()).item()
    return Row(f"{model}, outputs", f"timm's {facts['timm']}", f"largest difference {difference:.0e}", difference < 1e-12)


def schedule(model, facts, rows):
    """The options' own defaults, at the batch whose rate is the published peak. The published rates have 6 digits."""
    batch = round(facts["peak_lr"] / options.DEFAULTS["lr"] * 512)
    args = options.parse(["--data-path=.", f"--batch-size={batch}", f"--warmup-epochs={facts['warmup_epochs']:.0f}"])
    ranks = devices.Ranks(torch.device("cpu"))
    state, _ = assembly.build_state(args, ranks, torch.nn.Linear(1, 1), precision.make_precision(ranks.device), 1)
    rates = state.schedule.rates(range(args.epochs))
    differences = {row["epoch"]: abs(rates[row["epoch"]] / row["train_lr"] - 1) for row in rows if row["epoch"] < len(rates)}
    worst = max(differences, key=differences.get)
    same = sum(difference < 1e-5 for difference in differences.values())
    return Row(f"{model}, rates", f"{len(rows)} epochs", f"{same} the same" if same == len(rows) else
               f"{same} the same, in epoch {worst} {rates[worst]:.6g}", same == len(rows))


class Images:
    """A data set that nobody reads."""

    def __len__(self):
        return IMAGENET["train"]


def steps(repeated):
    found = len(loaders.build_loader(Images(), True, 128, 0, rank=0, ranks=8, repeated_aug=repeated))
    return Row("steps an epoch" + (", repeated augmentation" if repeated else ""), "1,251", f"{found:,}", found == 1251)


def transform(size):
    """Of photographs, whole and cut to odd sizes, some smaller than what is asked for."""
    theirs = tv.Compose([tv.Resize(int(size * 256 / 224), tv.InterpolationMode.BICUBIC), tv.CenterCrop(size), tv.ToTensor(),
                         tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    ours = transforms.build_transform(False, size)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    images = [photo.crop((0, 0, *corner)) for photo in photographs for corner in ((640, 427), (333, 401), (101, 83), (97, 420))]
    same = sum(torch.equal(ours(image), theirs(image)) for image in images)
    return Row(f"evaluation transform, {size} pixels", "torchvision's", f"{same} of {len(images)} images the same", same == len(images))


def epochs(run, started):
    """A row an epoch of one of upstream's own trainings."""
    found = {row["epoch"]: row for row in started[run["model"]].rows()}
    for row in run["rows"]:
        off = max(abs(found[row["epoch"]][key] - value) / (value if key == "train_lr" else 1.0) for key, value in row.items())
        yield Row(f"{run['model']}, upstream's epoch {row['epoch']}", f"losses {row['train_loss']:.5f}, {row['test_loss']:.5f}",
                  f"largest difference {off:.0e}", off < 1e-5)


def model_of(path):
    """Which of the six models a file holds the weights of. Raises ValueError."""
    state = checkpoint.model_state(checkpoint.read(path), path)
    shapes = {name: value.shape for name, value in state.items()}
    for model in published.models():
        if shapes == {name: value.shape for name, value in build(model).state_dict().items()}:
            return model
    raise ValueError(f"{path} holds none of {', '.join(published.models())} with ImageNet's 1,000 classes: give published weights")


def accuracy(path, model, facts, data_path, words):
    command = [sys.executable, upstream.MAIN, "--eval", f"--resume={path}", f"--model={model}", f"--data-path={data_path}", *words]
    print(f"evaluating {path}, which takes minutes", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=upstream.alone())
    what, expected = f"{model}, Acc@1 of {IMAGENET['val']:,} images", f"{facts['acc1']:.1f} %"
    found = re.search(r"^Accuracy of the network on the (\d+) test images: ([\d.]+)%", done.stdout, re.M)
    if done.returncode or not found:
        return Row(what, expected, (done.stdout.strip().splitlines() or [f"status {done.returncode}"])[-1], False)
    images, acc1 = int(found[1]), float(found[2])
    return Row(what, expected, f"{acc1:.3f} %" + (f" of {images:,}" if images != IMAGENET["val"] else ""),
               images == IMAGENET["val"] and abs(acc1 - facts["acc1"]) < 0.1)


def rows_of(name, check):
    """The rows of a check, which may give one or several. What fails in it is a row, too."""
    try:
        found = check()
        yield from [found] if isinstance(found, Row) else found
    except Exception as error:
        yield Row(name, "-", f"{type(error).__name__}: {error}".splitlines()[0], False)


def checks(chosen, started):
    """-> [(name, a function that gives a Row or several)], those that wait last"""
    models, curves = published.models(), published.curves()
    found = [(f"{model}, {check.__name__}", partial(check, model, facts)) for check in (parameters, groups, operations, outputs)
             if check.__name__ in chosen for model, facts in models.items()]
    if "schedule" in chosen:
        found += [(f"{model}, rates", partial(schedule, model, facts, curves[model])) for model, facts in models.items()]
    if "steps" in chosen:
        found += [("steps an epoch", partial(steps, repeated)) for repeated in (False, True)]
    if "transform" in chosen:
        found += [("evaluation transform", partial(transform, size)) for size in (224, 384)]
    return found + [(f"{run['model']}, upstream's training", partial(epochs, run, started)) for run in published.training()
                    if run["model"] in started]


CHECKS = ("parameters", "groups", "operations", "outputs", "schedule", "steps", "transform", "training")


def main(argv):
    parser = argparse.ArgumentParser("python tools conformance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"only these, of {', '.join(CHECKS)}")
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE", help="published weights, of one model or several")
    parser.add_argument("--data-path", "--data_path", metavar="FOLDER", help="ImageNet, whose val/ is evaluated")
    parser.add_argument("--device", default="auto", help="to evaluate on; the other checks are the CPU's")
    parser.add_argument("--batch-size", "--batch_size", type=int, default=128, help="to evaluate with")
    parser.add_argument("--num_workers", "--num-workers", type=int, default=10, help="to evaluate with")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.checks if name not in CHECKS]:
        raise ValueError(f"there is no check {unknown[0]}: {', '.join(CHECKS)}")
    if bool(given.weights) != bool(given.data_path):
        raise ValueError("--weights and --data-path go together: published weights, and ImageNet to evaluate them on")
    weighed = {path: model_of(path) for path in given.weights}
    chosen = given.checks or CHECKS

    print(HEADER, flush=True)
    failed, count = [], 0
    with contextlib.ExitStack() as stack:
        started = {}
        if "training" in chosen:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            started = stack.enter_context(upstream.trainings(published.training(), folder, threads()))
        todo = checks(chosen, started)
        words = [f"--device={given.device}", f"--batch-size={given.batch_size}", f"--num_workers={given.num_workers}"]
        todo += [(f"{model}, Acc@1", partial(accuracy, path, model, published.models()[model], given.data_path, words))
                 for path, model in weighed.items()]
        for row in (row for name, check in todo for row in rows_of(name, check)):
            print(row, flush=True)
            count += 1
            failed += [] if row.ok else [row.what]
    print(f"all {count} facts hold" if not failed else f"{len(failed)} of {count} facts do not hold: {'; '.join(failed)}")
    return int(bool(failed))


def threads():
    """Of each of the trainings, which run side by side."""
    return max(1, (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // len(published.training()))
