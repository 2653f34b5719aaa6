"""What did a run do? Pictures of it: loss and accuracy by epoch, and validation images with what the model says.

    python tools report output/run [--data-path FOLDER] [--device cpu]
    python tools report compare A.csv B.csv      # two files of --predictions: is one better than the other?

Reads log.txt, and for the images checkpoint_best.pth (or checkpoint.pth) with the options it was trained with. Writes
curves.png and predictions.png into the run's folder. Exit status: 0 done, 2 something is wrong with what was asked for.
"""
import argparse
from itertools import islice
from pathlib import Path

import devices  # before torch: it decides what torch may load

# isort: split
import matplotlib
import torch

import assembly
import checkpoint
import labels
import predictions
import utils
from options import DEFAULTS

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt
from matplotlib import font_manager, ft2font

OWN_FONT = "DejaVu Sans"  # matplotlib brings it
LONGEST = 24  # characters of a name in a title
MOST = 1000  # images; more rows make a picture that is too large for a PNG


def read_log(path, say=print):
    """The rows of log.txt. A line that is no row is left out, and said. Raises ValueError where there are none."""
    try:
        lines = utils.log_rows(path)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give the --output_dir of a run") from error
    rows = [row for _, row in lines if row]
    wrong = [i + 1 for i, (line, row) in enumerate(lines) if not row and line.strip()]
    if wrong and not rows:
        raise ValueError(f"cannot read {path} (line {wrong[0]} is not a run's JSON): give the --output_dir of a run")
    if not rows:
        raise ValueError(f"{path} has no epochs yet")
    if wrong:
        say(f"note: {path}: {len(wrong)} of {len(lines)} lines are no epochs and left out, the first is line {wrong[0]}")
    return rows


def number(row, key):
    """A finite number of a row, None where it has none."""
    value = row.get(key)
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def draw_curves(rows, path):
    """Training and validation loss, accuracy and learning rate, by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    marker = "." if len(rows) < 50 else ""

    def plot(axis, key, label, **style):
        points = [(row["epoch"] + 1, value) for row in rows if (value := number(row, key)) is not None]
        return axis.plot(*zip(*points), label=label, marker=marker, **style) if points else []

    plot(left, "train_loss", "training")
    plot(left, "test_loss", "validation")
    left.set(xlabel="epoch", ylabel="loss")
    rate = left.twinx()
    plot(rate, "train_lr", "learning rate", color="0.7", linestyle="--")
    rate.set_ylabel("learning rate", color="0.5")
    if left.lines:
        left.legend(loc="upper right")
    plot(right, "test_acc1", "Acc@1", color="tab:green")
    plot(right, "test_ema_acc1", "Acc@1, moving average", color="tab:olive")
    right.set(xlabel="epoch", ylabel="validation accuracy, %",
              title=f"best Acc@1 {max(number(row, 'max_acc1') or 0 for row in rows):.2f} %")
    right.grid(alpha=0.3)
    if right.lines:
        right.legend(loc="lower right")
    keep(figure, path)


def keep(figure, path):
    """Write a picture. Raises ValueError where it cannot be written."""
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error.strerror}): make its folder writable and room on its disk, or copy the run "
                         "elsewhere") from error
    finally:
        plt.close(figure)


@torch.no_grad()
def predict(net, dataset, device, count):
    """The first wrong answers and evenly spread right ones: [(image (3, H, W), true class, predicted, probability)]."""
    spread = torch.linspace(0, len(dataset) - 1, min(len(dataset), 20 * count)).long().unique().tolist()
    samples = (dataset[i] for i in spread)
    wrong, right = [], []
    while batch := list(islice(samples, 64)):
        images, targets, _ = zip(*batch)
        best, which = net(torch.stack(images).to(device)).float().softmax(1).cpu().max(1)
        for image, target, probability, guess in zip(images, targets, best.tolist(), which.tolist()):
            (right if guess == target else wrong).append((image, target, guess, probability))
    wrong = wrong[:count // 4]
    stride = max(1, len(right) // max(1, count - len(wrong)))
    return (wrong + right[::stride])[:count]


def fonts_for(text):
    """-> (families that draw `text` together: matplotlib's own and installed ones, the characters that none of them has)"""
    families, missing = [], set(text)
    installed = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name != OWN_FONT, font.name, font.fname))
    for font in installed:
        if not missing:
            break
        if font.name in families or "Last Resort" in font.name or font.style != "normal":  # the last resort draws boxes
            continue
        try:
            found = {c for c in missing if ord(c) in ft2font.FT2Font(font.fname).get_charmap()}
        except (OSError, RuntimeError):  # gone since matplotlib listed the fonts, or of a kind that it does not read
            continue
        families += [font.name] if found else []
        missing -= found
    return families or [OWN_FONT], missing


def titles(classes, used, say=print):
    """-> ({number: what to write for that class} for the numbers `used`, font families).

    Names with a character that no installed font has become numbers, which are said.
    """
    names = {i: utils.shown(labels.normal(classes[i])) for i in sorted(used)}
    names = {i: name if len(name) <= LONGEST else name[:LONGEST - 1] + "\u2026" for i, name in names.items()}
    families, missing = fonts_for("".join(names.values()))
    numbered = [i for i, name in names.items() if missing & set(name)]
    if numbered:
        say(f"note: no installed font has all characters of {len(numbered)} class names, so numbers stand for them: "
            + ", ".join(f"{i} is {names[i]}" for i in numbered[:10]) + (", ..." if len(numbered) > 10 else "")
            + "; install a font that has them (for Chinese, Japanese and Korean: Noto Sans CJK)")
    for i in numbered:
        names[i] = f"class {i}"
    return names, families


def normalisation(transform):
    """-> mean, std of a transform, each (3, 1, 1)"""
    step = next(step for step in transform.transforms if hasattr(step, "mean") and hasattr(step, "std"))
    return (torch.as_tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (step.mean, step.std))


def draw_predictions(shown, classes, path, mean, std, columns=8, say=print):
    """A grid of images; green titles are right, red ones say what the image is. mean, std: of their normalisation, (3, 1, 1)"""
    rows = -(-len(shown) // columns)
    names, families = titles(classes, {number for _, *numbers, _ in shown for number in numbers}, say)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.0 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, target, guess, probability) in zip(axes.flat, shown):
        axis.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        right = guess == target
        title = f"{names[guess]} {100 * probability:.0f} %" if right else f"{names[guess]}, is {names[target]}"
        axis.set_title(title, fontsize=9, color="tab:green" if right else "tab:red", family=families, parse_math=False)
    keep(figure, path)


def report(folder, data_path=None, device="auto", count=40, say=print):
    """Draw both pictures. -> their paths"""
    if not 1 <= count <= MOST:
        raise ValueError(f"--images is {count}, and must be from 1 to {MOST}")
    folder = Path(folder)
    draw_curves(read_log(folder / "log.txt", say), folder / "curves.png")
    best = next((folder / name for name in (checkpoint.BEST, checkpoint.LAST) if (folder / name).is_file()), None)
    if best is None:
        raise ValueError(f"{folder} has curves.png now, but no checkpoint for predictions.png")
    content = checkpoint.read(best)
    if not isinstance(content, dict) or not isinstance(content.get("options"), dict):
        raise ValueError(f"{best} does not say with which options it was trained: predictions.png needs a checkpoint of ours")
    args = argparse.Namespace(**{**DEFAULTS, **content["options"], "eval": True, "pretrained": False, "num_workers": 0,
                                 "max_bad_fraction": 0.0})
    args.data_path = data_path or args.data_path
    args.class_map = args.class_map if Path(args.class_map).is_file() else ""  # the checkpoint has the names as well
    ranks = devices.Ranks(devices.choose(device))
    _, loader, classes = assembly.build_data(args, ranks, assembly.preprocessing_of(args, content, best))
    numbering = assembly.number_classes(args, [loader.dataset], classes, content, best)
    for note in numbering.notes:
        say(f"note: {note}")
    net = assembly.build_model(args, len(numbering.names))
    checkpoint.load_weights(net, checkpoint.model_state(content, best), best)
    shown = predict(net.to(ranks.device).eval(), loader.dataset, ranks.device, count)
    draw_predictions(shown, numbering.names, folder / "predictions.png", *normalisation(loader.dataset.transform), say=say)
    return [folder / "curves.png", folder / "predictions.png"]


def main(argv):
    if argv[:1] == ["compare"] and not "".join(argv[1:2]).startswith("-"):
        if len(argv) != 3:
            raise ValueError(f"compare takes two files of --predictions, not {len(argv) - 1}")
        print(*predictions.compare(*argv[1:]), sep="\n")
        return
    parser = argparse.ArgumentParser("python tools report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="--output_dir of a run")
    parser.add_argument("--data-path", "--data_path", help="the data set, where it has moved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=40, help=f"how many images to show, 1 to {MOST}")
    given = parser.parse_args(argv)
    for picture in report(given.folder, given.data_path, given.device, given.images):
        print(picture)
