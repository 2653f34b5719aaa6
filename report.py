"""What did a run do? Pictures of it: loss and accuracy by epoch, and validation images with what the model says.

    python report.py output/run [--data-path FOLDER] [--device cpu]

Reads log.txt, and for the images checkpoint_best.pth (or checkpoint.pth) with the options it was trained with. Writes
curves.png and predictions.png into the run's folder.
"""
import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import devices  # before torch: it decides what torch may load

# isort: split
import matplotlib
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import checkpoint
import main
from options import DEFAULTS

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt


def read_log(path):
    """The rows of log.txt. Raises ValueError where there are none."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): give the --output_dir of a run") from error
    if not rows:
        raise ValueError(f"{path} has no epochs yet")
    return rows


def draw_curves(rows, path):
    """Training and validation loss, accuracy and learning rate, by epoch."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    marker = "." if len(rows) < 50 else ""

    def plot(axis, key, label, **style):
        points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
        return axis.plot(*zip(*points), label=label, marker=marker, **style) if points else []

    plot(left, "train_loss", "training")
    plot(left, "test_loss", "validation")
    left.set(xlabel="epoch", ylabel="loss")
    rate = left.twinx()
    plot(rate, "train_lr", "learning rate", color="0.7", linestyle="--")
    rate.set_ylabel("learning rate", color="0.5")
    left.legend(loc="upper right")
    plot(right, "test_acc1", "Acc@1", color="tab:green")
    plot(right, "test_ema_acc1", "Acc@1, moving average", color="tab:olive")
    right.set(xlabel="epoch", ylabel="validation accuracy, %",
              title=f"best Acc@1 {max(row.get('max_acc1') or 0 for row in rows):.2f} %")
    right.grid(alpha=0.3)
    if right.lines:
        right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
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


def draw_predictions(shown, classes, path, columns=8):
    """A grid of images; green titles are right, red ones say what the image is."""
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.7 * columns, 2.0 * rows), squeeze=False)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, target, guess, probability) in zip(axes.flat, shown):
        axis.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        right = guess == target
        title = f"{classes[guess]} {100 * probability:.0f} %" if right else f"{classes[guess]}, is {classes[target]}"
        axis.set_title(title, fontsize=9, color="tab:green" if right else "tab:red")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder, data_path=None, device="auto", count=40):
    """Draw both pictures. -> their paths"""
    folder = Path(folder)
    draw_curves(read_log(folder / "log.txt"), folder / "curves.png")
    best = next((folder / name for name in (checkpoint.BEST, checkpoint.LAST) if (folder / name).is_file()), None)
    if best is None:
        raise ValueError(f"{folder} has curves.png now, but no checkpoint for predictions.png")
    content = checkpoint.read(best)
    if "options" not in content:
        raise ValueError(f"{best} does not say with which options it was trained: predictions.png needs a checkpoint of ours")
    args = argparse.Namespace(**{**DEFAULTS, **content["options"], "eval": True, "pretrained": False, "num_workers": 0})
    args.data_path = data_path or args.data_path
    ranks = devices.Ranks(devices.choose(device))
    _, loader, classes = main.build_data(args, ranks)
    numbering = main.number_classes(args, [loader.dataset], classes, content, best)
    net = main.build_model(args, len(numbering.names))
    checkpoint.load_weights(net, checkpoint.model_state(content, best), best)
    shown = predict(net.to(ranks.device).eval(), loader.dataset, ranks.device, count)
    draw_predictions(shown, numbering.names, folder / "predictions.png")
    return [folder / "curves.png", folder / "predictions.png"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="--output_dir of a run")
    parser.add_argument("--data-path", "--data_path", help="the data set, where it has moved")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=40, help="how many images to show")
    given = parser.parse_args()
    try:
        for picture in report(given.folder, given.data_path, given.device, given.images):
            print(picture)
    except devices.NeedsRestart:
        devices.restart_without_npu()
    except ValueError as error:
        sys.exit(f"error: {error}")
