"""What is published of the six models? The files of published/, whose README says where each number comes from."""
import csv
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "published"


def table(name):
    with open(FOLDER / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def models():
    """-> {model: {"timm": its name there, and numbers: "parameters", "decayed", "acc1", ... as models.csv's first line has them}}"""
    return {row.pop("model"): {key: value if key == "timm" else float(value) for key, value in row.items()} for row in table("models.csv")}


def curves():
    """-> {model: [{"epoch": ..., "train_lr": ..., "train_loss", "test_loss", "test_acc1", "test_acc5"}]}, an epoch a row, in their order"""
    found = {}
    for row in table("curves.csv"):
        found.setdefault(row.pop("model"), []).append({key: int(value) if key == "epoch" else float(value) for key, value in row.items()})
    return found


def training():
    """-> [{"model", "input_size", "batch_size", "epochs", "rows": [{"epoch", "train_lr", "train_loss", "test_loss", "test_acc1",
    "test_acc5"}]}]: what upstream's own code wrote"""
    return json.loads((FOLDER / "training.json").read_text("utf-8"))
