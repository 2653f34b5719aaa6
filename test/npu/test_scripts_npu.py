"""Do the run scripts, unchanged and with their default device, train on one NPU and on eight, and leave the right logs?"""

import json

import pytest

pytest.register_assert_rewrite("helpers")

# isort: split

import helpers
from helpers import host, run_script, trains, usual

pytest_plugins = ["helpers"]
TINY = ["--batch_size=2", "--max_step=2", "--epochs=1", "--input-size=32", "--workers=0"]
KEYS = ["Network", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS", "TrainingTime", "TrainAccuracy", "ActualLoss",
        "E2ETrainingTime", "MeanFPS", "LastAccuracy"]


def check_logs(repo, done, case, ranks, accuracy=True):
    """The files, keys and values that other people's tools read. -> the folder of the run"""
    assert done.returncode == 0, done.stdout + done.stderr
    name, folder = f"Twins-GVT-Small_bs2_{ranks}p_{case}", repo / "test/output/0"
    log = dict(line.split(" = ") for line in (folder / f"{name}.log").read_text().splitlines() if not line.endswith("= "))
    written = [line.split(" =")[0] for line in (folder / f"{name}.log").read_text().splitlines()]
    assert written == KEYS
    assert (log["RankSize"], log["BatchSize"], log["CaseName"]) == (str(ranks), "2", name)
    fps = float(log["ActualFPS"])
    assert fps > 0 and float(log["TrainingTime"]) == pytest.approx(2 * ranks * 1000 / fps, rel=0.01)
    assert ("TrainAccuracy" in log) == accuracy and 0 < float(log["ActualLoss"]) < 20
    row = json.loads((folder / "ckpt/log.txt").read_text().splitlines()[-1])
    assert (row["world_size"], row["steps"]) == (ranks, 2) and f"{row['fps']:.2f}" == log["ActualFPS"]
    for kind in ("loss.txt", "fps.log"):
        assert all(float(value) > 0 for value in (folder / f"train_{name}_{kind}").read_text().split())
    text = (folder / "train_0.log").read_text()
    assert helpers.setting(text, "device").startswith("npu:0 (") and f"world size {ranks}" in text
    for line in ("------------------ Final result ------------------", f"Final Performance images/sec : {log['ActualFPS']}"):
        assert line in done.stdout.splitlines()
    return folder


def check_counts(path, ranks, real):
    if real:
        return
    found = helpers.counted_by(path)
    assert [counts["rank"] for counts in found] == list(range(ranks))
    for counts in found:
        assert counts["unimplemented"] == {} and counts["refused_float64"] == 0
        assert bool(counts["collectives"]["calls"]) == (ranks > 1)


def counted(folder, real):
    """The host of a run, which leaves counts where there are any."""
    return host() if real else host(counts=folder / "counts.json")


def test_performance_on_one_npu(repo, data, tmp_path, real):
    done = run_script(repo, "performance_1p", f"--data_path={data}", *TINY, on=counted(tmp_path, real))
    check_logs(repo, done, "perf", 1)
    check_counts(tmp_path / "counts.json", 1, real)


def test_fine_tuning_on_one_npu_from_a_cpus_checkpoint_of_other_classes(repo, data, few, tmp_path):
    source = tmp_path / "source"
    words = [word for word in usual(data, "--device=cpu", "--epochs=1", "--max_step=1", "--no-eval") if word != helpers.SMALL]
    trains(*words, "--output_dir", source)
    done = run_script(repo, "finetune_1p", f"--data_path={few}", f"--finetune_pth={source / 'checkpoint.pth'}", *TINY)
    check_logs(repo, done, "acc", 1)
    (source / "checkpoint.pth").unlink()
    assert "its head has 10 classes and the data 3, so the head starts anew" in done.stdout


@pytest.mark.parametrize("name, case, words, accuracy", [("performance_8p", "perf", ["--no-eval"], False), ("full_8p", "acc", [], True)])
def test_eight_npus(repo, data, tmp_path, real, name, case, words, accuracy):
    helpers.needs(8)
    done = run_script(repo, name, f"--data_path={data}", *TINY, *words, on=counted(tmp_path, real))
    check_logs(repo, done, case, 8, accuracy)
    check_counts(tmp_path / "counts.json", 8, real)


def test_a_card_by_its_number_names_the_folder(repo, few):
    helpers.needs(4)
    done = run_script(repo, "performance_1p", f"--data_path={few}", "--device_id=3", "--model=test_convnext", "--no-eval", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (repo / "test/output/3/train_3.log").is_file()
    assert helpers.setting(done.stdout, "device").startswith("npu:0 (")  # the only one it sees
