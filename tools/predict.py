"""What does a model say of these images? Classes and probabilities, as lines, CSV, JSON or a picture; where its attention lies.

    python tools predict output/run/checkpoint_best.pth photographs/ 'more/*.jpg' --grid grid.png --csv said.csv
    python tools predict twins_svt_small cat.jpg --attention maps.png          # timm's published weights
    python tools predict alt_gvt_small.pth cat.jpg --model alt_gvt_small       # of files that do not say what they are of

Images are files, folders with all that is below them, and patterns; of any size and kind that a training reads. They are prepared as the
weights want them. The picture of --attention has, for the last LSA and GSA of each stage, how much each place is attended to: for LSA
within its window, for GSA among the summaries of the whole image; bright is most.
Exit status: 0 done, 1 some image cannot be read, 2 something is wrong with what was asked for.
"""
import argparse
import csv
import glob
import io
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unittest import mock

import devices  # before torch: it decides what torch may load

# isort: split
import torch
from einops import rearrange
from timm.data import ImageNetInfo, infer_imagenet_subset

import assembly
import checkpoint
import decode
import gvt
import labels
import networks
import options
import precision
import transforms
import utils

MOST = 200  # images of a picture
COLUMNS = 8


@dataclass
class Classifier:
    """A network with what its weights say of themselves. transform: PIL image -> (3, H, W). names: of its outputs."""
    net: torch.nn.Module
    names: list
    transform: object
    preprocessing: transforms.Preprocessing


def load(source, model="", input_size=0, class_map="", device="cpu", say=print):
    """-> the Classifier of a checkpoint, or of timm's published weights of a model. Raises ValueError"""
    content = path = None
    said = {}
    if os.path.isfile(source) or source.startswith("https://"):
        path, content = source, checkpoint.read(source)
        if isinstance(content, dict) and isinstance(content.get("options"), dict):
            said = content["options"]
        if not (model or said.get("model")):
            raise ValueError(f"{utils.shown(source)} does not say which model it is of: --model alt_gvt_small, or another")
    elif os.path.lexists(source) or "/" in source or Path(source).suffix in (".pth", ".pt", ".safetensors", ".bin"):
        raise ValueError(f"{utils.shown(source)} is no file: give a checkpoint, or the name of a model that timm has published")
    elif model:
        raise ValueError(f"--model {model} belongs to a file, and {source} is none")
    args = argparse.Namespace(**{**options.DEFAULTS, **said, "pretrained": path is None, "drop": 0.0, "drop_path": 0.0, "finetune": "",
                                 "resume": path or "", "distillation_type": "none", "grad_checkpointing": False})
    args.model = model or said.get("model") or source
    config = networks.configuration(args.model, "--model" if path else "the model")
    args.input_size = input_size or said.get("input_size") or networks.own_size(config)
    prepared = networks.preprocessing(args.model, args.input_size, content, args.pretrained, path)
    if path:
        state = checkpoint.model_state(content, path)
        weights = labels.of_file(path, content, checkpoint.outputs(state, networks.heads(config)[0]))
    else:
        state, weights = None, labels.Weights(source, config.get("num_classes"), config.get("label_names"))
    if not weights.outputs:
        raise ValueError(f"{utils.shown(source)} has no head of {args.model}'s: it says nothing of an image")
    names = names_of(weights, class_map, say)
    net = assembly.build_model(args, len(names), lambda text: None)
    if path:
        checkpoint.load_weights(net, state, path)
    transform = transforms.build_transform(False, args.input_size, preprocessing=prepared, native_size=options.native_size(args))
    return Classifier(net.to(device).eval(), names, transform, prepared)


def names_of(weights, class_map, say):
    """A name for each output: of --class-map, of the weights, ImageNet's where the number of classes is its, else numbers."""
    if class_map:
        by_name = labels.read_class_map(class_map)
        if sorted(by_name.values()) != list(range(weights.outputs)):
            raise ValueError(f"--class-map {class_map} does not name each of the {weights.outputs} outputs of {weights.source} once")
        return sorted(by_name, key=by_name.get)
    if weights.names:
        return weights.names
    subset = infer_imagenet_subset({"num_classes": weights.outputs})
    if subset:
        say(f"note: {weights.source} names no classes: its {weights.outputs} are taken for ImageNet's")
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(weights.outputs)]
    say(f"note: {weights.source} names no classes: they are numbers here (--class-map FILE names them)")
    return [f"class {i}" for i in range(weights.outputs)]


def find_images(words):
    """-> the paths of all images that are meant, each once, in the order of the words. Raises ValueError for one that names none."""
    found = {}
    for word in words:
        below = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not below:
            raise ValueError(f"there is no {utils.shown(word)}")
        images = []
        for path in below:
            images += sorted(walk(path)) if os.path.isdir(path) else [path]
        if not images:
            raise ValueError(f"{utils.shown(word)} has no images: their names end with one of {' '.join(sorted(decode.EXTENSIONS))}")
        found |= dict.fromkeys(images)
    return list(found)


def walk(folder):
    """All images below a folder, without what is hidden."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "@"))]
        yield from (os.path.join(where, name) for name in files
                    if not name.startswith(".") and os.path.splitext(name)[1].lower() in decode.EXTENSIONS)


def read_batches(paths, transform, size, unreadable):
    """Yield ([path], images (B, 3, H, W)). unreadable(error): told of each that cannot be read"""
    def read(path):
        try:
            return transform(decode.load_rgb(path))
        except decode.UnreadableImage as error:
            return error

    paths = iter(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(paths, size)):
            read_ones = [(path, image) for path, image in zip(chunk, pool.map(read, chunk))]
            for _, error in read_ones:
                if isinstance(error, Exception):
                    unreadable(error)
            good = [(path, image) for path, image in read_ones if not isinstance(image, Exception)]
            if good:
                names, images = zip(*good)
                yield list(names), torch.stack(images)


@torch.no_grad()
def classify(classifier, paths, device, top=5, size=64, amp="off", unreadable=print):
    """Yield (path, [(output, probability)] of the `top`, the most probable first) of each image that can be read."""
    autocast = precision.make_precision(device, amp).autocast
    for names, images in read_batches(paths, classifier.transform, size, unreadable):
        with autocast():
            logits = classifier.net(images.to(device))
        best = logits.float().softmax(1).topk(min(top, logits.shape[1]))
        for name, which, how in zip(names, best.indices.tolist(), best.values.tolist()):
            yield name, list(zip(which, how))


@torch.no_grad()
def attention_maps(net, images):
    """How much each place is attended to, in the mean over heads and queries: [(title, (B, H, W))], of the last LSA and GSA of a stage.

    LSA's sum to 1 in each window, times the number of windows; GSA's places are the patches of sr_ratio x sr_ratio tokens.
    """
    now, seen, attend = [None], {}, gvt.attention

    def enter(name):
        def hook(layer, inputs):
            now[0] = name, layer, inputs[0].shape  # (B, H, W, C)
        return hook

    def look(q, k, v, dropout_p=0.0, fused=True, mask=None):
        if now[0] is None:  # a part of what is split
            return attend(q, k, v, dropout_p, fused, mask)
        (name, layer, (_, H, W, _)), now[0] = now[0], None
        scores = (q.float() @ k.float().transpose(-2, -1)) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        received = scores.softmax(-1).mean((1, 2))  # (B or B windows, keys)
        local = isinstance(layer, gvt.LocallyGroupedAttention)
        if local:
            size = layer.window_size
            rows, cols = -(-H // size), -(-W // size)
            received = rearrange(received, "(b rows cols) (i j) -> b (rows i) (cols j)", rows=rows, cols=cols, i=size)[:, :H, :W]
        else:
            received = rearrange(received, "b (h w) -> b h w", h=H // layer.sr_ratio)
        stage = int(name.split(".")[1])
        seen[stage, not local] = f"stage {stage + 1}, {'LSA' if local else 'GSA'}", received.cpu()
        return attend(q, k, v, dropout_p, fused, mask)

    hooks = [layer.register_forward_pre_hook(enter(name)) for name, layer in net.named_modules()
             if isinstance(layer, (gvt.LocallyGroupedAttention, gvt.GlobalSubsampledAttention))]
    try:
        with mock.patch.object(gvt, "attention", look):
            net(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[key] for key in sorted(seen)]


def shown_pixels(images, prepared):
    """Normalised (B, 3, H, W) -> (B, H, W, 3) in 0..1, as the network sees them"""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepared.mean, prepared.std))
    return (images.cpu() * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def draw_attention(classifier, paths, device, path):
    """A row an image: itself, and its maps over it."""
    from tools import report
    rows = []
    for names, images in read_batches(paths, classifier.transform, 16, lambda error: None):
        maps = attention_maps(classifier.net, images.to(device))
        for i, (name, pixels) in enumerate(zip(names, shown_pixels(images, classifier.preprocessing))):
            rows.append((name, pixels, [(title, found[i].numpy()) for title, found in maps]))
    if not rows:
        return
    figure, axes = report.plt.subplots(len(rows), 1 + len(rows[0][2]), figsize=(2 * (1 + len(rows[0][2])), 2.2 * len(rows)), squeeze=False)
    titles, families = report.titles([os.path.basename(name) for name, *_ in rows], range(len(rows)))
    for (line, (_, pixels, maps)), row in zip(enumerate(rows), axes):
        for axis, (title, values) in zip(row, [(titles[line], None), *maps]):
            axis.axis("off")
            axis.set_title(title, fontsize=9, family=families, parse_math=False)
            side = (0, pixels.shape[1], pixels.shape[0], 0)
            axis.imshow(pixels if values is None else pixels.mean(2), cmap="gray", extent=side)
            if values is not None:
                axis.imshow(values, cmap="inferno", alpha=0.6, extent=side, interpolation="bilinear")
    report.keep(figure, path)


def draw_grid(classifier, said, path):
    """said: [(path, [(output, probability)])]"""
    from tools import report
    columns = min(COLUMNS, len(said))
    rows = -(-len(said) // columns)
    figure, axes = report.plt.subplots(rows, columns, figsize=(1.9 * columns, 2.2 * rows), squeeze=False)
    names, families = report.titles(classifier.names, {top[0][0] for _, top in said})
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, ((output, probability), *_)) in zip(axes.flat, said):
        pixels = shown_pixels(classifier.transform(decode.load_rgb(name))[None], classifier.preprocessing)[0]
        axis.imshow(pixels)
        axis.set_title(f"{names[output]} {100 * probability:.0f} %", fontsize=9, family=families, parse_math=False)
    report.keep(figure, path)


def write(option, path, text):
    try:
        with utils.replacing(path) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise ValueError(f"{option} {utils.shown(path)} cannot be written ({error.strerror}): choose another file") from error


def as_csv(said, names, top):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *(f"top{i + 1}" for i in range(top)), *(f"probability{i + 1}" for i in range(top))])
    for path, found in said:
        writer.writerow([utils.shown(path), *(names[output] for output, _ in found), *(f"{p:.6g}" for _, p in found)])
    return text.getvalue()


def as_json(said, names):
    rows = [{"path": path, "top": [{"class": names[output], "output": output, "probability": p} for output, p in found]}
            for path, found in said]
    return json.dumps(rows, indent=1, ensure_ascii=True) + "\n"


def parser():
    words = argparse.ArgumentParser("python tools predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("source", metavar="CHECKPOINT_OR_MODEL")
    words.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, patterns")
    words.add_argument("--model", default="", help="of a file that does not say it")
    words.add_argument("--input-size", type=int, default=0, help="pixels; the weights' own where nothing is said")
    words.add_argument("--class-map", default="", help="names of the outputs, as main.py's")
    words.add_argument("--top", type=int, default=5, help="how many classes of an image are told (5)")
    words.add_argument("--batch-size", type=int, default=64)
    words.add_argument("--device", default="auto")
    words.add_argument("--amp", default="off", choices=("auto", "bf16", "fp16", "off"))
    words.add_argument("--csv", metavar="FILE")
    words.add_argument("--json", metavar="FILE")
    words.add_argument("--grid", metavar="PNG", help=f"the images with their classes, {MOST} at most")
    words.add_argument("--attention", metavar="PNG", help=f"maps of LSA and GSA over the images, {MOST} at most")
    return words


def main(argv):
    given = parser().parse_args(argv)
    if given.top < 1 or given.batch_size < 1 or given.input_size < 0:
        raise ValueError("--top and --batch-size must be at least 1, --input-size 0 or more")
    paths = find_images(given.images)
    for option in ("grid", "attention"):
        if getattr(given, option) and len(paths) > MOST:
            raise ValueError(f"--{option} shows {MOST} images at most, and these are {len(paths)}")
    device = devices.choose(given.device)
    classifier = load(given.source, given.model, given.input_size, given.class_map, device, lambda text: print(text, file=sys.stderr))
    if given.attention and not isinstance(classifier.net, gvt.Twins):
        raise ValueError(f"--attention shows LSA and GSA, which {given.model or given.source} does not have")
    failed, said = [], []

    def unreadable(error):
        failed.append(error)
        print(f"warning: {error}", file=sys.stderr)

    for path, top in classify(classifier, paths, device, given.top, given.batch_size, given.amp, unreadable):
        said.append((path, top))
        told = ", ".join(f"{utils.shown(classifier.names[output])} {100 * p:.1f} %" for output, p in top)
        print(f"{utils.shown(path)}: {told}", flush=True)
    if given.csv:
        write("--csv", given.csv, as_csv(said, classifier.names, min(given.top, len(classifier.names))))
    if given.json:
        write("--json", given.json, as_json(said, classifier.names))
    if given.grid and said:
        draw_grid(classifier, said, given.grid)
    if given.attention and said:
        draw_attention(classifier, [path for path, _ in said], device, given.attention)
    return 1 if failed else 0
