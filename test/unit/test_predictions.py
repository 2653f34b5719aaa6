"""What is said of each image: the accuracy's interval, the file of --predictions, and the test of two of them, against scipy."""
import contextlib
import csv
import io
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, run, small_transform
from scipy.stats import binomtest
from test_exact import train

import checkpoint
import engine
import main
import networks
import predictions
from datasets import build_dataset

CPU = torch.device("cpu")


# ---- how sure is an accuracy? ----

@pytest.mark.parametrize("right, count", [(0, 1), (1, 1), (0, 11), (11, 11), (3, 11), (357, 359), (39215, 50000)])
def test_the_interval_is_wilsons(right, count):
    expected = binomtest(right, count).proportion_ci(0.95, "wilson")
    assert predictions.interval(right, count) == pytest.approx((100 * expected.low, 100 * expected.high), rel=1e-12, abs=1e-12)


def test_the_interval_of_a_closed_form():
    """Half right: the middle, and z / 2 / sqrt(n + z ** 2) around it."""
    z, n = 1.959963984540054, 400
    half = 50 * z / (n + z * z) ** 0.5
    assert predictions.interval(200, n) == pytest.approx((50 - half, 50 + half), rel=1e-12)


def test_each_evaluation_says_its_interval_in_a_line_of_its_own(capsys):
    images, targets = torch.eye(4)[[0, 0, 1, 2, 3, 3, 0]], torch.tensor([0, 1, 1, 2, 3, 0, 2])
    engine.evaluate([(images[:4], targets[:4]), (images[4:], targets[4:])], torch.nn.Identity(), CPU)
    expected = binomtest(4, 7).proportion_ci(0.95, "wilson")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("* Acc@1 57.143 Acc@5 100.000 loss ")
    assert lines[-1] == f"Acc@1 lies from {100 * expected.low:.3f} to {100 * expected.high:.3f} with 95 % confidence, of 7 images"


# ---- the file ----

@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """-> a run's folder, what it printed, and the predictions of its last evaluation"""
    folder = tmp_path_factory.mktemp("trained")
    said = train(folder, "--data-path", tiny_folder, "--predictions", folder / "last.csv")
    return folder, said, folder / "last.csv"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def expected_rows(file, key, data):
    """Of those weights, in plain torch."""
    saved = checkpoint.read(file)
    images, classes = build_dataset(False, data, transform=small_transform())
    net, _ = networks.create("test_convnext", 3, 32)
    net.load_state_dict(saved[key])
    with torch.no_grad():
        probabilities = net.eval()(torch.stack([image for image, *_ in images])).softmax(1)
    found = []
    for i, row in enumerate(probabilities):
        order = row.argsort(descending=True).tolist()
        found.append((str(images.names[i]).removeprefix(f"{data}/"), classes[images.targets[i]], [classes[j] for j in order],
                      [row[j].item() for j in order]))
    return found


def assert_are(rows, expected):
    assert [(row["path"], row["label"]) for row in rows] == [(path, label) for path, label, *_ in expected]
    for row, (_, _, order, probabilities) in zip(rows, expected):
        assert [row[f"top{i}"] for i in range(1, 6)] == [*order, "", ""]
        assert [float(row[f"probability{i}"]) for i in range(1, 4)] == pytest.approx(probabilities, rel=1e-4)
        assert row["probability4"] == row["probability5"] == ""


def evaluate(data, *words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main.run(["--device=cpu", "--model=test_convnext", "--input-size=32", "--batch-size=4", "--num_workers=0", "--eval",
                           "--data-path", str(data), *map(str, words)])
    return status, out.getvalue(), err.getvalue()


def test_a_training_writes_those_of_its_last_evaluation_of_the_better_weights(trained, tiny_folder):
    folder, said, file = trained
    saved = checkpoint.read(folder / "checkpoint.pth")
    assert_are(rows_of(file), expected_rows(folder / "checkpoint.pth", saved["better"], tiny_folder))
    assert f"{file} has what is said of 11 images\n" in said
    assert len(re.findall(r"^Acc@1 lies from ", said, re.M)) == 4  # two epochs, each of the net and of its average


def test_an_evaluation_writes_a_row_an_image_and_moves_an_older_file(trained, tiny_folder, tmp_path):
    folder, file = trained[0], tmp_path / "of all.csv"
    for i in range(2):
        status, out, err = evaluate(tiny_folder, "--resume", folder / "checkpoint.pth", "--model-ema", "--predictions", file)
        assert status == 0, err
        assert (f"{file} has what is said of 11 images" + (f"; an earlier file is now {file}.1" if i else "")) + "\n" in out
    assert_are(rows_of(file), expected_rows(folder / "checkpoint.pth", "model_ema", tiny_folder))
    assert file.read_bytes() == (tmp_path / "of all.csv.1").read_bytes() and len(list(tmp_path.iterdir())) == 2
    right = sum(row["label"] == row["top1"] for row in rows_of(file))
    assert f"* Acc@1 {100 * right / 11:.3f} " in out


def test_two_ranks_write_the_same_rows(trained, tiny_folder, tmp_path, run_ranks):
    words = ["--device=cpu", "--model=test_convnext", "--input-size=32", "--batch-size=2", "--num_workers=0", "--eval", "--data-path",
             tiny_folder, "--resume", trained[0] / "checkpoint.pth", "--model-ema", "--dist-eval", "--predictions", tmp_path / "two.csv"]
    done = run_ranks(2, *words)
    assert done.returncode == 0, done.stderr
    assert_are(rows_of(tmp_path / "two.csv"), expected_rows(trained[0] / "checkpoint.pth", "model_ema", tiny_folder))


def test_an_image_that_cannot_be_read_has_its_path_and_label_only(trained, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "data")
    bad = tmp_path / "data" / "val" / "leaves" / "09.png"
    bad.write_bytes(bad.read_bytes()[:200])
    words = ["--resume", trained[0] / "checkpoint.pth", "--predictions", tmp_path / "a.csv"]
    status, _, err = evaluate(tmp_path / "data", *words)
    assert (status, (tmp_path / "a.csv").exists()) == (2, False)
    assert err.startswith(f"error: cannot read the image {bad} (") and err.endswith(
        "): replace it or remove it, or go on without such images: --max-bad-fraction 0.001\n")
    status, out, err = evaluate(tmp_path / "data", *words, "--max-bad-fraction=0.001")
    assert status == 0, err
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 11
    [row] = [row for row in rows if not row["top1"]]
    assert list(row.values()) == ["val/leaves/09.png", "leaves", *[""] * 10]
    assert f"1 of 11 validation images cannot be read: they count as wrong, and not in the loss: {bad} (" in out
    assert f"* Acc@1 {100 * sum(row['label'] == row['top1'] for row in rows) / 11:.3f} " in out


def test_a_file_that_cannot_be_written_ends_before_the_evaluation(trained, tiny_folder, tmp_path):
    for name, why in (("none/a.csv", "No such file or directory"), ("", "Is a directory")):
        status, out, err = evaluate(tiny_folder, "--resume", trained[0] / "checkpoint.pth", "--predictions", f"{tmp_path}/{name}")
        assert (status, "Acc@1" in out) == (2, False)
        assert err == f"error: --predictions {tmp_path}/{name} cannot be written ({why}): choose another file\n"


class Named:
    numbering = (1, 0)
    targets = (0, 1, 1)

    def name(self, index):
        return ["/d/val/a,\nb.png", "/d/val/\udcff.png", '/elsewhere/"c".png'][index]


def test_odd_names_stay_one_row_each_and_labels_are_the_outputs(tmp_path):
    rows = [(2, [0], [1.0]), (0, [1, 0], [0.75, 0.25]), (1, [], [])]
    assert predictions.save(tmp_path / "a.csv", rows, Named(), ["no\n", "yes"], "/d") is None
    assert (tmp_path / "a.csv").read_text().splitlines()[1:] == [
        '"val/a,\\nb.png",yes,yes,no\\n,,,,0.75,0.25,,,', 'val/\\udcff.png,no\\n,,,,,,,,,,',
        '"/elsewhere/""c"".png",no\\n,no\\n,,,,,1,,,,']
    assert predictions.read(tmp_path / "a.csv")[1] == [True, False, True]


def test_classes_of_one_name_are_told_apart():
    assert predictions.distinct(["crane", "crane", "ship"]) == ["crane (0)", "crane (1)", "ship (2)"]


# ---- two files ----

@pytest.mark.parametrize("a, b", [(0, 0), (0, 1), (3, 9), (9, 3), (5, 5), (0, 40), (120, 180), (2400, 2600)])
def test_the_paired_test_is_the_exact_binomial(a, b):
    expected = binomtest(min(a, b), a + b).pvalue if a + b else 1.0
    assert predictions.mcnemar(a, b) == pytest.approx(expected, rel=1e-9)


def test_a_difference_too_large_for_a_float_is_none_by_chance():
    assert predictions.mcnemar(0, 5000) == 0.0


def write(path, right, labels=None):
    """A file of one row an image, whose first answer is right or not."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(predictions.COLUMNS)
        for i, good in enumerate(right):
            label = labels[i] if labels else "a"
            writer.writerow([f"val/{i}.png", label, label if good else "other", *[""] * 9])
    return path


def test_two_files_are_compared_by_the_command(tmp_path):
    both, only_a, only_b, neither = 60, 15, 4, 21
    a = write(tmp_path / "a.csv", [1] * both + [1] * only_a + [0] * only_b + [0] * neither)
    b = write(tmp_path / "b.csv", [1] * both + [0] * only_a + [1] * only_b + [0] * neither)
    done = run([sys.executable, ROOT / "tools", "report", "compare", a, b], tmp_path, None, 120)
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    for path, line, right in ((a, first, 75), (b, second, 64)):
        ci = binomtest(right, 100).proportion_ci(0.95, "wilson")
        assert line == (f"{path}: Acc@1 {right}.000 %, with 95 % confidence from {100 * ci.low:.3f} to {100 * ci.high:.3f} "
                        f"({right} of 100 images)")
    p = binomtest(4, 19).pvalue
    assert third == f"right in the first only 15, in the second only 4: McNemar's exact test, p = {p:.3g}: hardly chance"


def test_files_of_other_images_or_labels_are_refused(tmp_path):
    a = write(tmp_path / "a.csv", [1, 0, 1], ["x", "y", "z"])
    b = write(tmp_path / "b.csv", [1, 0, 1], ["x", "q", "z"])
    with pytest.raises(ValueError, match=r"not of the same images \(val/1\.png of class y where the other has val/1\.png of class q\): "):
        predictions.compare(a, b)
    c = write(tmp_path / "c.csv", [1, 0])
    with pytest.raises(ValueError) as error:
        predictions.compare(a, c)
    assert str(error.value) == f"{a} and {c} are not of the same images (3 and 2): give two files of one validation set"
    assert predictions.compare(a, a)[-1].endswith("only 0, in the second only 0: McNemar's exact test, p = 1: it may be chance")


@pytest.mark.parametrize("content, why", [
    (None, r"cannot read \S+ \(No such file or directory\): "), ("", r"is no file of --predictions \(line 1 is none of its\)"),
    ("path,label\n", r"\(line 1 is none of its\)"), (",".join(predictions.COLUMNS) + "\n", r"\(it has no images\)"),
    (",".join(predictions.COLUMNS) + "\na,b,c\n", r"\(line 2 is none of its\)"), ("\0" * 9, r"is no file|cannot read")])
def test_what_is_no_such_file_is_one_line(tmp_path, content, why):
    path = tmp_path / "a.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=why):
        predictions.compare(path, path)


def test_predictions_without_an_evaluation_are_said(tiny_folder, tmp_path):
    said = train(tmp_path / "run", "--data-path", tiny_folder, "--no-eval", "--max_step=1", "--predictions", tmp_path / "a.csv")
    assert "note: --predictions has no effect: nothing is evaluated" in said and not (tmp_path / "a.csv").exists()
    train(tmp_path / "run", "--data-path", tiny_folder, "--resume=auto", "--epochs=1")
    said = train(tmp_path / "run", "--data-path", tiny_folder, "--resume=auto", "--epochs=1", "--predictions", tmp_path / "a.csv")
    assert "note: nothing was evaluated, so --predictions writes nothing" in said and not (tmp_path / "a.csv").exists()
