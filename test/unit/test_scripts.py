"""The run scripts of test/: what they accept, start and leave behind.

Most tests run them in a copy of the repository whose main.py is a stand-in; those at the end train for real on CPU.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")
TRAIN_SCRIPTS = [f"train_{name}.sh" for name in ("performance_1p", "performance_8p", "full_8p", "finetune_1p", "demo_1p")]
PERF_1P, PERF_8P, FULL_8P, FINETUNE_1P, DEMO_1P = TRAIN_SCRIPTS
CONVENTION = '[Error] para "{}" must be confing'

# Two epochs of what main.py prints and writes; keys of log.txt that end in "fps" or "loss" must not be taken for ours.
STAND_IN = '''
import argparse, json, os, pathlib, signal, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path)
parser.add_argument("--status", type=int, default=0)
parser.add_argument("--sleep", type=float, default=0)
parser.add_argument("--saves", action="store_true")
parser.add_argument("--no-json", action="store_true")
parser.add_argument("--no-eval", action="store_true")
args, _ = parser.parse_known_args()
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def stop(*_):
    time.sleep(1)  # what a save takes; whoever was told as well has ended
    print("Stopped in epoch 1 after 1 of 2 iterations: checkpoint.pth goes on there, with --resume auto", flush=True)
    os._exit(75)
if args.saves:
    signal.signal(signal.SIGTERM, stop)
if rank == 0:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "call.json").write_text(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "world": world}))
    (args.output_dir / "checkpoint.pth").write_text("weights")
    for epoch in range(2):
        print(f"Epoch: [{epoch}]  [0/1]  eta: 0:00:00  lr: 0.000001  loss: {2.5 - epoch} (2.6)  time: 0.1  fps:{100 + epoch}"
              "  data: 0.01  max mem: 7")
        print(f"Epoch: [{epoch}] Total time: 0:00:00 (0.1 s / it)  fps:{300 + epoch}")
        if args.status:
            continue
        if not args.no_eval:
            print(f"* Acc@1 {60 - epoch}.000 Acc@5 90.000 loss 1.200")
            print(f"Max accuracy: 60.00%")
        row = {"train_lr": 1e-6, "train_loss": 2.25 - epoch, "test_loss": 1.2, "test_acc1": 60.0 - epoch, "test_acc5": 90.0,
               "epoch": epoch, "n_parameters": 24, "test_fps": 7.0, "fps": 200.5 + epoch, "best_max_acc1": 1.0,
               "max_acc1": 61.5, "global_batch": 64 * world, "world_size": world}
        if args.no_eval:
            row |= {"test_acc1": None, "max_acc1": 0.0}
        if not args.no_json:
            with open(args.output_dir / "log.txt", "a") as log:
                log.write(json.dumps(row) + "\\n")
time.sleep(args.sleep)
if args.status < 0:
    os.kill(os.getpid(), -args.status)
if args.status:
    print("error: the loss is not finite: wolf.png" if rank == 0 else f"error (rank {rank}): it too", file=sys.stderr)
    sys.exit(args.status)
'''

# As much of torchrun as those tests need that are about something else: it starts in no time.
QUICK_LAUNCHER = """
import os, subprocess, sys
ranks = int(sys.argv[sys.argv.index("--nproc_per_node") + 1])
command = [sys.executable, *sys.argv[next(i for i, word in enumerate(sys.argv) if word.endswith("main.py")):]]
processes = [subprocess.Popen(command, env=os.environ | {"RANK": str(i), "WORLD_SIZE": str(ranks)}) for i in range(ranks)]
sys.exit(max(process.wait() for process in processes))
"""
TORCHRUN = {"PYTHONPATH": ""}  # for run(): the real one


@pytest.fixture(scope="session")
def python_path(tmp_path_factory):
    """A folder for PATH whose python and python3 are the one that runs the tests."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("python", "python3"):
        write_program(folder / name, f'exec "{sys.executable}" "$@"')
    return folder


@pytest.fixture
def repo(tmp_path):
    """The scripts beside a stand-in main.py, in a folder whose name has a space."""
    copy = copy_scripts(tmp_path / "re po")
    (copy / "main.py").write_text(STAND_IN)
    (copy / "requirements.txt").write_text("torch>=2.7  # the launcher\n")
    (tmp_path / "da ta" / "train").mkdir(parents=True)
    return copy


@pytest.fixture(scope="session")
def quick_launcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    (folder / "torch/distributed").mkdir(parents=True)
    (folder / "torch/__init__.py").touch()
    (folder / "torch/distributed/__init__.py").touch()
    (folder / "torch/distributed/run.py").write_text(QUICK_LAUNCHER)
    return folder


@pytest.fixture
def run(python_path, quick_launcher, tmp_path):
    """Runs a script in a clean environment, with a quick launcher instead of torchrun unless **TORCHRUN says otherwise."""
    (tmp_path / "home").mkdir(exist_ok=True)

    def run(script, *options, cwd=None, check=None, popen=False, path=python_path, session=False, **variables):
        dropped = ("MASTER_", "ASCEND", "CUDA_", "OMP_", "HCCL", "TORCH", "PYTHON", "TASK_QUEUE", "PIP_", "CI", "etp_")
        env = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        env |= {"HOME": str(tmp_path / "home"), "PATH": f"{path}{os.pathsep}{env['PATH']}"}
        env["PYTHONPATH"] = str(quick_launcher)
        env |= {key: str(value) for key, value in variables.items()}
        command = [BASH, str(script), *map(str, options)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
                 "errors": "backslashreplace"}
        if popen:  # where the tests run in the background SIGINT is ignored, and a shell cannot change that again
            return subprocess.Popen(command, cwd=cwd, env=env, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                                    start_new_session=session, **pipes)
        done = subprocess.run(command, check=False, cwd=cwd, env=env, timeout=300, **pipes)
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return run


def copy_scripts(folder):
    (folder / "test").mkdir(parents=True)
    for path in [*(REPO / "test").glob("*.sh"), *(REPO / "test").glob("*.txt")]:
        shutil.copy(path, folder / "test")
    return folder


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def call(repo, card=0, checkpoints=None):
    """How main.py was started: argv, env, world."""
    return json.loads(((checkpoints or repo / f"test/output/{card}/ckpt") / "call.json").read_text())


def results(path):
    """A ${CaseName}.log as ordered pairs."""
    return dict(line.split(" =", 1) for line in path.read_text().splitlines())


# What is refused before anything starts


@pytest.mark.parametrize("script", TRAIN_SCRIPTS)
def test_help_names_every_option_and_starts_nothing(repo, run, script):
    (repo / "requirements.txt").write_text("package-that-nobody-has\n")
    shown = run(repo / "test" / script, "--help", check=0).stdout
    options = {word.split("=")[0] for word in shown.split() if word.startswith("--")}
    assert options >= {"--data_path", "--finetune_pth", "--device", "--device_id", "--nproc", "--batch_size", "--epochs", "--max_step",
                       "--workers", "--output_dir", "--help"}  # fmt: skip
    assert "--fine_tune_path" in shown
    assert f"bash test/{script}" in shown
    assert not (repo / "test/output").exists()


@pytest.mark.parametrize("folder", [".", "test", "/"])
@pytest.mark.parametrize(("script", "options", "name"), [
    (PERF_1P, [], "data_path"),
    (PERF_8P, ["--data_path="], "data_path"),
    (FULL_8P, ["--data_path=nowhere"], "data_path"),
    (FINETUNE_1P, ["--finetune_pth=x.pth"], "data_path"),
    (FINETUNE_1P, ["--data_path={data}"], "finetune_pth"),
    (FINETUNE_1P, ["--data_path={data}", "--finetune_pth=no where.pth"], "finetune_pth"),
    (FINETUNE_1P, ["--data_path={data}", "--fine_tune_path={data}"], "finetune_pth"),
    (DEMO_1P, ["--data_path=nowhere"], "data_path"),
])  # fmt: skip
def test_wrong_path(repo, run, tmp_path, folder, script, options, name):
    options = [option.format(data=tmp_path / "da ta") for option in options]
    done = run(repo / "test" / script, *options, cwd=repo / folder, check=1)
    error, remedy = done.stdout.splitlines()
    assert error == CONVENTION.format(name)
    assert f"--{name}=" in remedy
    assert not (repo / "test/output").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--nproc=two"], "--nproc=two is not a whole number"),
    (["--nproc=0"], "must be at least 1"),
    (["--batch-size=-3"], "--batch_size=-3 is not a whole number"),
    (["--epochs"], "--epochs needs a value: --epochs=VALUE"),
    (["--epochs", "--no-eval"], "--epochs needs a value"),
    (["--device=npu:1", "--device_id=2"], "both name a card"),
    (["--device=npu:x"], "not a number"),
])  # fmt: skip
def test_bad_option_is_one_line(repo, run, tmp_path, options, words):
    done = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", *options, check=1)
    assert done.stderr.startswith("[Error] ") and words in done.stderr and done.stderr.count("\n") == 1
    assert not (repo / "test/output").exists()


def test_missing_package_is_one_line(repo, run, tmp_path):
    (repo / "requirements.txt").write_text("package-that-nobody-has>=3\n")
    done = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", check=1)
    assert done.stderr.count("\n") == 1
    assert "lacks package-that-nobody-has" in done.stderr and "test/setup_env.sh" in done.stderr


def test_output_folder_that_cannot_be_written(repo, run, tmp_path):
    (repo / "test/output").write_text("a file")
    done = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", check=1)
    assert f"cannot write to {repo / 'test/output'}" in done.stderr
    assert (repo / "test/output").read_text() == "a file"


# What is started, and what is left


def test_performance_1p_leaves_the_conventional_files(repo, run, tmp_path):
    done = run("test/" + PERF_1P, "--data_path=../da ta", cwd=repo, check=0, **TORCHRUN)

    folder, case = repo / "test/output/0", "Twins-GVT-Small_bs128_1p_perf"
    assert {path.name for path in folder.iterdir()} == {
        "train_0.log", f"{case}.log", f"train_{case}_loss.txt", f"train_{case}_fps.log", "ckpt"}  # fmt: skip
    log = (folder / f"{case}.log").read_text()
    seconds = results(folder / f"{case}.log")["E2ETrainingTime"].strip()
    assert seconds.isdigit()
    assert log == (
        f"Network = Twins-GVT-Small\nRankSize = 1\nBatchSize = 128\nDeviceType = {platform.machine()}\nCaseName = {case}\n"
        "ActualFPS = 201.50\n"  # the last epoch's
        "TrainingTime = 317.62\n"  # 64 images * 1000 / 201.5: main.py's own global batch
        f"TrainAccuracy = 61.50\nActualLoss = 1.25\nE2ETrainingTime = {seconds}\n"
        "MeanFPS = 100.50\nLastAccuracy = 59.00\n"  # what the original called ActualFPS and TrainAccuracy
    )
    assert ("[Info] FPS: 201.50 in the last epoch (ActualFPS), 100.50 the mean of this run's lines; "
            "accuracy: 61.50 the best (TrainAccuracy), "
            "59.00 the last\n") in (folder / "train_0.log").read_text()  # fmt: skip
    assert (folder / f"train_{case}_loss.txt").read_text() == "2.5\n1.5\n"
    assert (folder / f"train_{case}_fps.log").read_text() == "100\n101\n"
    assert done.stdout.endswith(
        "------------------ Final result ------------------\nFinal Performance images/sec : 201.50\n"
        f"Final Train Accuracy : 61.50\nE2E Training Duration sec : {seconds}\n"
    )
    # The full log is what the terminal showed.
    shown, full = done.stdout, (folder / "train_0.log").read_text()
    assert "Max accuracy: 60.00%" in full and full in shown and "\r" not in full

    argv = call(repo)["argv"]
    assert argv == [
        "--model", "alt_gvt_small", "--batch-size", "128", "--epochs", "1", "--max_step", "1000", "--drop-path", "0.3", "--dist-eval",
        "--data-path", f"{repo}/../da ta", "--output_dir", str(folder / "ckpt"), "--device", "auto",
    ]  # fmt: skip
    # The paths of the original's readme
    assert (repo / "test/train_0.log").samefile(folder / "train_0.log")
    assert (repo / f"test/{case}.log").samefile(folder / f"{case}.log")
    assert (repo / "output/ckpt").samefile(folder / "ckpt")


@pytest.mark.parametrize(("script", "case", "epochs", "max_step", "ranks"), [
    (PERF_8P, "bs4_8p_perf", "1", "1000", 8),
    (FULL_8P, "bs4_8p_acc", "100", None, 8),
    (FINETUNE_1P, "bs4_1p_acc", "10", None, 1),
])  # fmt: skip
def test_defaults_of_the_other_scripts(repo, run, tmp_path, script, case, epochs, max_step, ranks):
    weights = tmp_path / "my weights.pth"
    weights.touch()
    finetune = ["--fine_tune_path", "my weights.pth"] if script == FINETUNE_1P else []
    run(repo / "test" / script, "--batch_size=4", "--data_path=da ta", *finetune, cwd=tmp_path, check=0, **TORCHRUN)
    started = call(repo)
    argv = started["argv"]
    assert argv[argv.index("--epochs") + 1] == epochs
    assert (argv[argv.index("--max_step") + 1] if "--max_step" in argv else None) == max_step
    assert (argv[argv.index("--finetune") + 1] if finetune else None) == (str(weights) if finetune else None)
    log = results(repo / f"test/output/0/Twins-GVT-Small_{case}.log")
    assert started["world"] == ranks == int(log["RankSize"])
    assert log["CaseName"].strip() == f"Twins-GVT-Small_{case}"
    assert log["TrainingTime"].strip() == f"{64 * ranks * 1000 / 201.5:.2f}"
    assert started["env"]["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // ranks))


def test_every_other_word_reaches_main_in_order(repo, run, tmp_path):
    words = ["--lr=1e-3", "--opt-betas", "0.9", "0.99", "--no-eval", "--teacher-path", "a b.pth", "--data-set=CIFAR"]
    run(repo / "test" / FULL_8P, *words, "--data-path", "da ta", "--nproc=1", "--epochs", 3, "--max-step=7", "--num_workers=0",
        "--device=cpu", "--output-dir=out put", cwd=tmp_path, check=0)  # fmt: skip
    argv = call(repo, checkpoints=tmp_path / "out put")["argv"]
    assert argv[argv.index("--dist-eval") + 1 :] == [
        "--data-path", str(tmp_path / "da ta"), "--output_dir", str(tmp_path / "out put"),
        "--device", "cpu", "--num_workers", "0", *words,
    ]  # fmt: skip
    assert (repo / "output/ckpt").samefile(tmp_path / "out put")
    assert results(repo / "test/output/0/Twins-GVT-Small_bs128_1p_acc.log")["ActualFPS"] == " 201.50"


@pytest.fixture
def with_recipes(repo):
    """The stand-in repository with what reads recipes."""
    for name in ("options.py", "recipes.py", "utils.py"):
        shutil.copy(REPO / name, repo)
    shutil.copytree(REPO / "recipes", repo / "recipes")
    return repo


def test_what_is_typed_wins_over_a_recipe_and_it_over_the_script(with_recipes, run, tmp_path):
    """And the names of what is left behind follow."""
    repo, own = with_recipes, tmp_path / "my own.toml"
    own.write_text('model = "pcpvt_base_v0"\nbatch-size = 16\nepochs = 7\ndrop_path = 0.2\n')
    done = run(repo / "test" / PERF_1P, "--data_path=da ta", "--recipe=my own.toml", "--batch-size=4", cwd=tmp_path, check=0)
    argv = call(repo)["argv"]
    assert argv[:argv.index("--data-path")] == ["--recipe", "my own.toml", "--batch-size", "4", "--max_step", "1000", "--dist-eval"]
    assert (repo / "test/output/0/Twins-PCPVT-Base_bs4_1p_perf.log").is_file()
    log = (repo / "test/output/0/train_0.log").read_text()
    assert "[Info] recipe my own.toml; what was typed wins over it: --batch_size=4; what it leaves to this script: --max_step=1000 " \
        "--dist-eval\n" in log and log in done.stdout
    run(repo / "test" / FULL_8P, "--data_path=da ta", "--nproc=1", "--recipe", "svt-large-300", cwd=tmp_path, check=0)
    argv = call(repo)["argv"]
    assert argv[:argv.index("--data-path")] == ["--recipe", "svt-large-300", "--dist-eval"]
    assert (repo / "test/output/0/Twins-GVT-Large_bs128_1p_acc.log").is_file()


def test_a_recipe_of_the_run_before_is_found_where_it_went(with_recipes, run, tmp_path):
    repo = with_recipes
    (repo / "test/output/0/ckpt").mkdir(parents=True)
    (repo / "test/output/0/ckpt/recipe.toml").write_text("epochs = 7\n")
    run(repo / "test" / PERF_1P, "--data_path=da ta", f"--recipe={repo}/test/output/0/ckpt/recipe.toml", cwd=tmp_path, check=0)
    assert call(repo)["argv"][1] == f"{repo}/test/output/0.1/ckpt/recipe.toml"


@pytest.mark.parametrize(("text", "words"), [
    ("epoch = 7\n", "epoch is no option: did you mean epochs?"), ("output_dir = 'x'\n", "says output_dir, which a script takes")])
def test_a_wrong_recipe_is_one_line(with_recipes, run, tmp_path, text, words):
    (tmp_path / "my.toml").write_text(text)
    done = run(with_recipes / "test" / PERF_1P, "--data_path=da ta", "--recipe=my.toml", cwd=tmp_path, check=2)
    assert done.stderr.startswith("[Error] ") and words in done.stderr and done.stderr.count("\n") == 1
    assert not (with_recipes / "test/output").exists()


def test_the_model_names_the_network(repo, run, tmp_path):
    run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", "--model=pcpvt_base_v0", check=0)
    log = results(repo / "test/output/0/Twins-PCPVT-Base_bs128_1p_perf.log")
    assert log["Network"] == " Twins-PCPVT-Base"
    assert call(repo)["argv"][1] == "pcpvt_base_v0"


@pytest.mark.parametrize(("options", "variables", "card", "visible"), [
    (["--device_id=3"], {}, 3, "3"),
    (["--device_id=8", "--nproc=2"], {}, 8, "8,9"),
    (["--device=npu:5"], {"ASCEND_HOME_PATH": "/cann"}, 5, None),
    (["--device_id=1"], {"CUDA_VISIBLE_DEVICES": "6", "ASCEND_RT_VISIBLE_DEVICES": "6"}, 1, "6"),
])  # fmt: skip
def test_cards(repo, run, tmp_path, options, variables, card, visible):
    done = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", *options, check=0, **variables)
    env = call(repo, card)["env"]
    assert env.get("CUDA_VISIBLE_DEVICES") == env.get("ASCEND_RT_VISIBLE_DEVICES") == visible
    assert (repo / f"test/output/{card}/train_{card}.log").is_file()
    assert ("is set and stays" in done.stderr) == bool("CUDA_VISIBLE_DEVICES" in variables)


def test_values_come_from_the_readable_log_where_log_txt_has_none(repo, run, tmp_path):
    run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", "--no-json", "--batch_size=8", check=0)
    log = results(repo / "test/output/0/Twins-GVT-Small_bs8_1p_perf.log")
    assert log["ActualFPS"] == " 301.00" and log["TrainingTime"] == f" {8 * 1000 / 301:.2f}"
    assert log["TrainAccuracy"] == " 60.00" and log["ActualLoss"] == " 1.5"


def test_nothing_is_taken_from_an_earlier_log_txt_or_from_no_evaluation(repo, run, tmp_path):
    data, out = f"--data_path={tmp_path / 'da ta'}", f"--output_dir={tmp_path / 'out'}"
    run(repo / "test" / PERF_1P, data, out, check=0)
    run(repo / "test" / PERF_1P, data, out, "--no-json", "--no-eval", check=0)
    log = results(repo / "test/output/0/Twins-GVT-Small_bs128_1p_perf.log")
    assert log["ActualFPS"] == " 301.00" and log["TrainAccuracy"].strip() == ""
    run(repo / "test" / PERF_1P, data, "--no-eval", check=0)
    log = results(repo / "test/output/0/Twins-GVT-Small_bs128_1p_perf.log")
    assert log["ActualFPS"] == " 201.50" and log["TrainAccuracy"].strip() == ""


# Earlier runs


@pytest.mark.parametrize("resume", [["--resume=auto"], ["--resume", "auto"]])
def test_a_fine_tuning_goes_on_from_its_own_checkpoint_and_starts_from_the_file_where_there_is_none(repo, run, tmp_path, resume):
    (tmp_path / "w.pth").write_text("weights")
    options = [f"--data_path={tmp_path / 'da ta'}", f"--finetune_pth={tmp_path / 'w.pth'}", *resume]
    run(repo / "test" / FINETUNE_1P, *options, check=0)  # nothing to go on from
    argv = call(repo)["argv"]
    assert argv[argv.index("--finetune") + 1] == str(tmp_path / "w.pth") and not any("resume" in word for word in argv)
    run(repo / "test" / FINETUNE_1P, *options, check=0)  # the first one left a checkpoint
    argv = call(repo)["argv"]
    assert "--finetune" not in argv and "".join(resume).replace("=", "") in "".join(argv).replace("=", "")


def test_earlier_run_is_moved_aside_and_can_be_started_from(repo, run, tmp_path):
    run(repo / "test" / FULL_8P, f"--data_path={tmp_path / 'da ta'}", "--nproc=1", check=0)
    first = repo / "test/output/0"
    (first / "ckpt/checkpoint.pth").write_text("the first run's")
    (repo / "test/output/0.1").mkdir()
    options = ["--data_path=../da ta", "--finetune_pth=output/ckpt/checkpoint.pth", "--other", "test/output/0/ckpt/checkpoint.pth",
               "--teacher-path=test/output/0/ckpt/checkpoint.pth"]  # fmt: skip
    done = run("test/" + FINETUNE_1P, *options, cwd=repo, check=0)
    moved = repo / "test/output/0.2"
    assert f"the earlier run is now in {moved}" in done.stdout
    assert (moved / "Twins-GVT-Small_bs128_1p_acc.log").is_file() and (moved / "train_0.log").is_file()
    checkpoint = moved / "ckpt/checkpoint.pth"
    assert checkpoint.read_text() == "the first run's"
    assert call(repo)["argv"][-5:] == ["--finetune", str(checkpoint), "--other", str(checkpoint), f"--teacher-path={checkpoint}"]
    assert (first / "ckpt/checkpoint.pth").read_text() == "weights"

    options = ["--data_path=../da ta", "--finetune_pth=output/ckpt/checkpoint.pth", "--device_id=1"]  # the link points elsewhere now
    run("test/" + FINETUNE_1P, *options, cwd=repo, check=0)
    assert call(repo, 1)["argv"][-1] == str(first / "ckpt/checkpoint.pth")


def test_the_mean_fps_of_a_resumed_run_is_its_own(repo, run, tmp_path):
    """The log goes on, and with it the curve of the loss; what was slow before the resume says nothing of this run."""
    words = [repo / "test" / FULL_8P, f"--data_path={tmp_path / 'da ta'}", "--nproc=1"]
    run(*words, check=0)
    folder = repo / "test/output/0"
    log = folder / "train_0.log"
    log.write_text(log.read_text().replace("  fps:10", "  fps:5"))  # 50 and 51 images a second
    done = run(*words, "--resume=auto", check=0)
    assert "[Info] FPS: 201.50 in the last epoch (ActualFPS), 100.50 the mean of this run's lines; accuracy: 61.50 the best" in done.stdout
    assert results(folder / "Twins-GVT-Small_bs128_1p_acc.log")["MeanFPS"] == " 100.50"
    assert (folder / "train_Twins-GVT-Small_bs128_1p_acc_fps.log").read_text() == "100\n101\n"
    assert (folder / "train_Twins-GVT-Small_bs128_1p_acc_loss.txt").read_text() == "2.5\n1.5\n" * 2


def test_resume_auto_goes_on_in_the_folder(repo, run, tmp_path):
    data = f"--data_path={tmp_path / 'da ta'}"
    run(repo / "test" / FULL_8P, data, "--nproc=1", "--status=3", check=3)
    run(repo / "test" / FULL_8P, data, "--nproc=1", "--resume", "auto", check=0)
    run(repo / "test" / FULL_8P, data, "--nproc=1", "--resume=auto", "--no-json", check=0)  # as if nothing were left to train
    assert [path.name for path in (repo / "test/output").glob("0*")] == ["0"]
    assert (repo / "test/output/0/train_0.log").read_text().count("[Info] command: train_full_8p.sh") == 3
    log = results(repo / "test/output/0/Twins-GVT-Small_bs128_1p_acc.log")
    assert log["ActualFPS"] == " 201.50"

    done = run(repo / "test" / PERF_1P, data, "--resume=auto", check=1)
    assert "holds a run of train_full_8p.sh" in done.stderr and "--resume=" in done.stderr
    assert (repo / "test/output/0/train_0.log").read_text().count("[Info] command:") == 3


def test_links_replace_no_file(repo, run, tmp_path):
    (repo / "output/ckpt").mkdir(parents=True)
    (repo / "output/ckpt/mine.pth").touch()
    (repo / "test/train_0.log").write_text("mine")
    run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", check=0)
    assert (repo / "output/ckpt/mine.pth").is_file() and not (repo / "output/ckpt").is_symlink()
    assert (repo / "test/train_0.log").read_text() == "mine"
    run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", f"--output_dir={repo}/output/ckpt", check=0)
    assert (repo / "output/ckpt/checkpoint.pth").is_file()


# Failures


@pytest.mark.parametrize(("status", "ends"), [(2, 2), (3, 3), (77, 77), (-9, 137)])
def test_failed_run(repo, run, tmp_path, status, ends):
    done = run(repo / "test" / FULL_8P, f"--data_path={tmp_path / 'da ta'}", "--nproc=2", f"--status={status}", check=ends, **TORCHRUN)
    log = results(repo / "test/output/0/Twins-GVT-Small_bs128_2p_acc.log")
    assert list(log)[5:] == ["ActualFPS", "TrainingTime", "TrainAccuracy", "ActualLoss", "E2ETrainingTime", "MeanFPS", "LastAccuracy"]
    assert [log[key].strip() for key in ("ActualFPS", "TrainingTime", "TrainAccuracy", "ActualLoss")] == ["", "", "", "1.5"]
    assert "Final Performance images/sec : \nFinal Train Accuracy : \n" in done.stdout
    said = done.stderr.splitlines()
    assert said[0] == f"[Error] training ended with status {ends}; the end of {repo}/test/output/0/train_0.log:"
    if status > 0:
        assert "error: the loss is not finite: wolf.png" in said[1:]
        assert all(line.startswith("error") for line in said[1:])
    else:
        assert said[-1].startswith("[Error] a process was killed")
        assert not any("torch/distributed" in line for line in said)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_training_and_leaves_the_logs(repo, run, tmp_path, number, status):
    process = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", "--nproc=2", "--sleep=100", popen=True, **TORCHRUN)
    wait_for(lambda: "fps:301" in text(repo / "test/output/0/train_0.log"), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    assert "stopped by a signal" in err and "Final Train Accuracy : \n" in out
    assert results(repo / "test/output/0/Twins-GVT-Small_bs128_2p_perf.log")["ActualFPS"].strip() == ""
    left = subprocess.run(["pgrep", "-f", f"{repo}/main.py"], check=False, capture_output=True, text=True).stdout
    assert left == ""


def test_a_signal_to_the_whole_group_leaves_the_log_until_the_run_is_saved(repo, run, tmp_path):
    """As `timeout` and schedulers send it: the program that writes the log gets it, too."""
    words = f"--data_path={tmp_path / 'da ta'}", "--sleep=100", "--saves"
    process = run(repo / "test" / PERF_1P, *words, popen=True, session=True, **TORCHRUN)
    wait_for(lambda: "fps:301" in text(repo / "test/output/0/train_0.log"), process)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "was stopped by a signal and saved" in err and "Stopped in epoch 1" in out
    assert "Stopped in epoch 1 after 1 of 2 iterations" in text(repo / "test/output/0/train_0.log")


def test_a_run_that_was_stopped_and_saved_says_how_to_go_on(repo, run, tmp_path):
    done = run(repo / "test" / FULL_8P, f"--data_path={tmp_path / 'da ta'}", "--nproc=2", "--status=75", check=75, **TORCHRUN)
    assert "[Error] training was stopped by a signal and saved: the same command with --resume auto goes on; its log: " in done.stderr


LOST = "error: the connection to the other ranks was lost: one of them has ended, and said why, or was killed"
ORPHAN = "while os.getppid() == parent: time.sleep(0.1)"
ENDS = {  # how two ranks end: (of rank 0, of rank 1)
    "killed": (f"print('{LOST}'); time.sleep(100)", "os.kill(os.getpid(), signal.SIGKILL)"),
    "crash": (f"print('{LOST}'); time.sleep(100)", "raise RuntimeError('shapes differ')"),
    "mistake": (f"print('{LOST}'); time.sleep(100)", "print('error (rank 1): wolf.png is no image'); sys.exit(2)"),
    "elsewhere": (f"print('{LOST}'); sys.exit(1)", "time.sleep(100)"),
    "launcher": (ORPHAN, "os.kill(parent, signal.SIGKILL); print('error: torchrun has ended')"),
    "launcher, saved": (
        ORPHAN, "os.kill(parent, signal.SIGKILL); print('error: torchrun has ended\\nStopped in epoch 0; x goes on there')"),
}


@pytest.mark.parametrize(("how", "status", "shown"), [
    ("killed", 137, r"rank 1 \(process \d+\) was ended by signal 9 \(SIGKILL\)"), ("crash", 1, "RuntimeError: shapes differ"),
    ("mistake", 2, r"error \(rank 1\): wolf.png is no image"), ("elsewhere", 1, LOST), ("launcher", 137, "error: torchrun has ended"),
    ("launcher, saved", 75, "error: torchrun has ended")])  # fmt: skip
def test_what_went_wrong_first_is_shown(repo, run, tmp_path, how, status, shown):
    """Not the other ranks' lost connection."""
    first, second = ENDS[how]
    (repo / "main.py").write_text("import os, signal, sys, time\nparent = os.getppid()\nsys.stdout.reconfigure(line_buffering=True)\n"
                                  f"if os.environ['RANK'] == '0':\n    {first}\nelse:\n    {second}\n")
    done = run(repo / "test" / FULL_8P, f"--data_path={tmp_path / 'da ta'}", "--nproc=2", check=status, **TORCHRUN)
    assert re.search(shown, done.stderr) and (how == "elsewhere" or "connection" not in done.stderr)
    assert ("for want of memory" in done.stderr) == (how == "killed")


def test_two_runs_share_a_machine_but_not_a_folder(repo, run, tmp_path):
    data = f"--data_path={tmp_path / 'da ta'}"
    first = run(repo / "test" / PERF_1P, data, "--sleep=100", popen=True, **TORCHRUN)
    try:
        wait_for(lambda: "fps:301" in text(repo / "test/output/0/train_0.log"), first)
        if shutil.which("flock"):
            done = run(repo / "test" / PERF_1P, data, check=1)
            assert "another run is using" in done.stderr and "--device_id" in done.stderr
            assert not (repo / "test/output/0.1").exists()
        run(repo / "test" / PERF_1P, data, "--device_id=1", check=0)
    finally:
        first.terminate()
        first.communicate(timeout=60)


def test_master_port_is_honoured_and_its_absence_advised(repo, run, tmp_path):
    data = f"--data_path={tmp_path / 'da ta'}"
    with socket.socket() as busy:
        busy.bind(("", 0))
        port = busy.getsockname()[1]
        busy.listen()
        done = run(repo / "test" / PERF_1P, data, MASTER_PORT=port, check=1, **TORCHRUN)
        assert done.stderr.splitlines()[-1] == f"[Error] port {port} is in use: unset MASTER_PORT, and a free one is taken"
    run(repo / "test" / PERF_1P, data, MASTER_PORT=port, check=0, **TORCHRUN)
    assert call(repo)["env"]["MASTER_PORT"] == str(port)


def text(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


# env_npu.sh

NPU_DEFAULTS = {
    "TASK_QUEUE_ENABLE": "1", "CPU_AFFINITY_CONF": "1", "COMBINED_ENABLE": "1", "HCCL_CONNECT_TIMEOUT": "1800",
    "ASCEND_SLOG_PRINT_TO_STDOUT": "0", "ASCEND_GLOBAL_LOG_LEVEL": "3", "ASCEND_GLOBAL_EVENT_ENABLE": "0",
}  # fmt: skip
no_real_cann = pytest.mark.skipif(Path("/usr/local/Ascend").exists(), reason="this machine has CANN")


@pytest.fixture
def fake_cann(tmp_path):
    """A CANN in the home folder; its set_env.sh uses an unset variable and has a command that fails, as real ones do."""
    file = tmp_path / "home/Ascend/ascend-toolkit/set_env.sh"
    file.parent.mkdir(parents=True)
    file.write_text('false\nexport ASCEND_HOME_PATH="$HOME/Ascend/ascend-toolkit"\nexport LD_LIBRARY_PATH=cann:$NOT_SET\n')
    return file.parent


def sourced(run, tmp_path, *words, package=False, **variables):
    """What env_npu.sh adds to the environment, its standard error and status."""
    if package:
        (tmp_path / "packages/torch_npu").mkdir(parents=True)
        (tmp_path / "packages/torch_npu/__init__.py").touch()
        variables["PYTHONPATH"] = tmp_path / "packages"
    program = tmp_path / "program.sh"
    program.write_text(
        f'set -euo pipefail\nenv -0 >"$1/before"\nfolder=$1; shift\nsource "{REPO}/test/env_npu.sh" "$@"\nenv -0 >"$folder/after"\n'
        '[[ $- == *e* && $- == *u* ]]\n'
    )  # fmt: skip
    done = run(program, tmp_path, *words, **variables)
    if done.returncode:
        return {}, done.stderr, done.returncode
    before, after = ({*(tmp_path / name).read_text().split("\0")} for name in ("before", "after"))
    changed = dict(line.split("=", 1) for line in after - before if not line.startswith("_="))
    return changed, done.stdout + done.stderr, 0


@no_real_cann
@pytest.mark.parametrize("words", [["npu"], ["npu:3", "acc"], ["npu", "perf"]])
def test_env_npu_sources_cann_and_sets_the_defaults(run, tmp_path, fake_cann, words):
    changed, said, status = sourced(run, tmp_path, *words)
    cann = {"ASCEND_HOME_PATH": str(fake_cann), "LD_LIBRARY_PATH": "cann:"}
    queue = {"TASK_QUEUE_ENABLE": "2"} if "perf" in words else {}
    assert (changed, said, status) == (NPU_DEFAULTS | cann | queue, "", 0)


def test_env_npu_keeps_what_is_set(run, tmp_path, fake_cann):
    changed, said, status = sourced(
        run, tmp_path, "npu", "perf", ASCEND_HOME_PATH="/cann", TASK_QUEUE_ENABLE=0, HCCL_CONNECT_TIMEOUT=60)  # fmt: skip
    expected = {key: value for key, value in NPU_DEFAULTS.items() if key not in ("TASK_QUEUE_ENABLE", "HCCL_CONNECT_TIMEOUT")}
    assert (changed, said, status) == (expected, "", 0)


@no_real_cann
def test_env_npu_without_cann(run, tmp_path):
    changed, said, status = sourced(run, tmp_path, "npu")
    assert status == 1 and said.startswith("[Error] no CANN for --device=npu") and said.count("\n") == 1
    # auto goes on with another device, and keeps torch from importing a torch_npu that cannot load
    changed, said, status = sourced(run, tmp_path, "auto", package=True)
    assert (changed, said, status) == ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "", 0)


@pytest.mark.parametrize("device", ["cpu", "cuda", "gpu", "cuda:1"])
def test_env_npu_does_nothing_for_other_devices(run, tmp_path, fake_cann, device):
    assert sourced(run, tmp_path, device, package=True) == ({}, "", 0)


@no_real_cann
def test_env_npu_auto_needs_a_sign_of_an_npu(run, tmp_path, fake_cann):
    if not list(Path("/dev").glob("davinci[0-9]*")) and not has_torch_npu():
        assert sourced(run, tmp_path, "auto") == ({}, "", 0)
    changed, said, status = sourced(run, tmp_path, "auto", package=True)
    assert changed["ASCEND_HOME_PATH"] == str(fake_cann) and (said, status) == ("", 0)


def has_torch_npu():
    return importlib.util.find_spec("torch_npu") is not None


@no_real_cann
def test_scripts_and_the_npu_environment(repo, run, tmp_path):
    data = f"--data_path={tmp_path / 'da ta'}"
    done = run(repo / "test" / PERF_1P, data, "--device=npu", check=1)
    assert "[Error] no CANN" in done.stderr and not (repo / "test/output/0").exists()
    run(repo / "test" / PERF_1P, data, "--device=npu", etp_running_flag="true", check=0)
    assert not NPU_DEFAULTS.keys() & call(repo)["env"].keys()
    run(repo / "test" / PERF_1P, data, "--device=npu", ASCEND_HOME_PATH="/cann", check=0)
    assert call(repo)["env"]["TASK_QUEUE_ENABLE"] == "2"
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in call(repo)["env"]
    run(repo / "test" / PERF_1P, data, "--device=cpu", check=0)
    assert call(repo)["env"]["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


# setup_env.sh


@pytest.fixture
def wheels(tmp_path):
    """pip's only source: a package called scarce, versions 1.0 and 2.0."""
    for version in ("1.0", "2.0"):
        info = f"scarce-{version}.dist-info"
        path = tmp_path / "wheels" / f"scarce-{version}-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("scarce.py", "")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: scarce\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": str(tmp_path / "wheels").replace(" ", "%20"), "PIP_CONFIG_FILE": os.devnull}


def version_in(env):
    code = "from importlib.metadata import version; print(version('scarce'))"
    return subprocess.run([env / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("requirements", ["", "# nothing\npytest>=1  # any\n", "absent; sys_platform == 'plan9'\n"])
def test_setup_uses_a_python_that_has_the_requirements(repo, run, requirements):
    (repo / "requirements.txt").write_text(requirements)
    done = run(repo / "test/setup_env.sh", check=0)
    assert (done.stdout, done.stderr) == (f"{sys.executable}\n", "")
    assert not (repo / ".venv").exists()


def test_setup_makes_finishes_and_reuses_an_environment(repo, run, wheels):
    (repo / "requirements.txt").write_text("scarce>=1\n")
    (repo / "test/requirements.txt").write_text("")
    (repo / "test/constraints.txt").write_text("scarce==1.0\n")
    env, setup = repo / ".venv", repo / "test/setup_env.sh"

    done = run(setup, check=0, **wheels)
    assert done.stdout == f"{env}/bin/python\n" and "lacks scarce: installing into" in done.stderr
    assert version_in(env) == "2.0"  # no pins for users

    done = run(setup, "--test", check=0, **wheels)  # it has all: used as it is, without the pins
    assert done.stderr == "" and version_in(env) == "2.0"

    (env / "half-made").touch()  # as an interrupted set-up leaves it
    (env / "bin/pip").unlink()
    done = run(setup, "--test", check=0, **wheels)
    assert version_in(env) == "1.0" and not (env / "half-made").exists()

    (repo / "requirements.txt").write_text("scarce>=2\n")  # newer requirements: the same environment is brought up to date
    run(setup, check=0, **wheels)
    assert version_in(env) == "2.0"


def test_setup_falls_back_to_no_pins(repo, run, wheels):
    (repo / "requirements.txt").write_text("scarce\n")
    (repo / "test/requirements.txt").write_text("")
    (repo / "test/constraints.txt").write_text("scarce==3.0\n")
    done = run(repo / "test/setup_env.sh", "--test", check=0, **wheels)
    assert "installing without pins" in done.stderr and version_in(repo / ".venv") == "2.0"


def test_setup_failures_are_told(repo, run, tmp_path, wheels):
    (repo / "requirements.txt").write_text("scarce>=9\n")
    done = run(repo / "test/setup_env.sh", check=1, **wheels)
    assert done.stderr.splitlines()[-1].startswith("[Error] the requirements could not be installed into")
    assert (repo / ".venv/half-made").exists()

    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 14))):
        write_program(tmp_path / "old" / name, "exit 1")
    shutil.rmtree(repo / ".venv")
    done = run(repo / "test/setup_env.sh", check=1, path=tmp_path / "old")
    assert done.stderr.startswith("[Error] no Python of version 3.10 or newer")
    assert not (repo / ".venv").exists()


def test_version_outside_the_range_is_a_warning_for_training(repo, run, tmp_path):
    (repo / "requirements.txt").write_text("pytest<1\n")
    done = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", check=0)
    assert done.stderr.startswith("[Warning] outside the tested range: pytest ")


def test_npu_environment_says_why_not(repo, run, tmp_path, python_path):
    write_program(tmp_path / "mac/uname", 'case $1 in -s) echo Darwin;; -m) echo arm64;; esac')
    path = f"{tmp_path / 'mac'}{os.pathsep}{python_path}"
    done = run(repo / "test/setup_env.sh", "--npu", check=1, path=path)
    assert done.stderr == "[Error] NPUs are simulated on Linux x86_64 only\n"


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="simulated NPUs need Linux x86_64")
@pytest.mark.parametrize(("cuda", "vision", "said"), [
    ("'13.0'", "", "needs a CPU-only build of torch 2.13.0: a CUDA build aborts next to torch_npu"),
    (None, "raise RuntimeError('operator torchvision::nms does not exist')",
     "has a torchvision that does not load beside its torch: remove that folder, and run this again"), (None, "", None),
    (None, "from torchvision import extension\nimport torch\nassert torch.defined", None)])  # fmt: skip
def test_npu_environment_refuses_what_does_not_load(repo, run, tmp_path, cuda, vision, said):
    packages = tmp_path / "packages"
    for name, version in (("torch", "2.13.0+cpu"), ("torch_npu", "2.13.0"), ("torchvision", "0.28.0+cpu")):
        (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
        (packages / f"{name}-{version}.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (packages / "torch.py").write_text(
        f"class version: cuda = {cuda}\n\n\ndefined = []\n\n\nclass library:\n    class Library:\n"
        "        def __init__(self, name, kind): pass\n        def define(self, schema): defined.append(schema)\n"
    )
    (packages / "torchvision").mkdir()
    (packages / "torchvision/__init__.py").write_text(vision)
    (packages / "torchvision/extension.py").write_text("def _has_ops(): return False\n")  # as PyPI's without CUDA
    shutil.copytree(REPO / "test/npu_sim/sitecustomize", repo / "test/npu_sim/sitecustomize")
    write_program(repo / ".venv-npu/bin/python", f'exec "{sys.executable}" "$@"')
    (repo / "test/requirements.txt").write_text("")
    done = run(repo / "test/setup_env.sh", "--npu", check=int(bool(said)), PYTHONPATH=packages, PIP_NO_INDEX=1)
    if said is None:
        assert done.stdout == f"{repo}/.venv-npu/bin/python\n" and not done.stderr
        return
    assert done.stderr.splitlines()[-1] == f"[Error] {repo}/.venv-npu {said}"


# run_tests.sh and .ci/run


@pytest.fixture
def tested(repo, tmp_path, python_path):
    """A repository whose unit tests are two lines, on a platform that cannot simulate NPUs."""
    (repo / "test/unit").mkdir()
    (repo / "test/npu").mkdir()
    (repo / "test/unit/test_small.py").write_text("def test_one():\n    pass\n\n\ndef test_two():\n    pass\n")
    (repo / "test/npu/test_npu.py").write_text("def test_npu():\n    pass\n")
    (repo / ".ci").mkdir()
    shutil.copy(REPO / ".ci/run", repo / ".ci")
    (repo / "main.py").write_text("")
    write_program(tmp_path / "mac/uname", 'case $1 in -s) echo Darwin;; -m) echo arm64;; esac')
    write_program(tmp_path / "mac/shellcheck", 'echo "shellcheck $*"')
    return {"path": f"{tmp_path / 'mac'}{os.pathsep}{python_path}"}


def test_run_tests_skips_npu_tests_with_the_reason_and_fails_in_ci(repo, run, tested):
    done = run(repo / "test/run_tests.sh", check=0, **tested)
    assert "2 passed" in done.stdout and "NPU tests skipped: NPUs are simulated on Linux x86_64 only" in done.stdout
    assert "shellcheck -x -P test test/common.sh" in done.stdout
    done = run(repo / ".ci/run", check=1, **tested)
    assert "2 passed" in done.stdout and "not passed: NPU tests (skipped)" in done.stderr


def test_run_tests_passes_words_on_and_counts_failures(repo, run, tested):
    done = run(repo / "test/run_tests.sh", "-k", "one", check=0, **tested)
    assert "1 passed, 1 deselected" in done.stdout
    done = run(repo / "test/run_tests.sh", "test_small.py::test_two", cwd=repo / "test/unit", check=0, **tested)
    assert "1 passed" in done.stdout and "ruff" not in done.stdout and "NPU" not in done.stdout
    done = run(repo / "test/run_tests.sh", "-k", "neither", check=1, **tested)
    assert "no test ran" in done.stderr
    done = run(repo / "test/run_tests.sh", "nowhere.py", check=1, **tested)
    assert done.stderr == "[Error] there is no nowhere.py\n"

    (repo / "test/unit/test_small.py").write_text("import os\n\n\ndef test_one():\n    assert not 1\n")
    done = run(repo / "test/run_tests.sh", check=1, **tested)
    assert "not passed: ruff, unit tests" in done.stderr and "F401" in done.stdout


def test_run_tests_on_real_npus(repo, run, tested):
    (repo / "test/npu/conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--npu')\n")
    (repo / "test/npu/test_npu.py").write_text("def test_npu(pytestconfig):\n    assert pytestconfig.getoption('--npu') == 'real'\n")
    done = run(repo / "test/run_tests.sh", "--npu", "real", check=0, **tested)
    assert "2 passed" in done.stdout and "1 passed" in done.stdout
    done = run(repo / "test/run_tests.sh", "--npu=virtual", check=1, **tested)
    assert "sim or real" in done.stderr


# For real, on CPU


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The repository's own code, so that its test/output stays as it is, and two image folders of 2 and 3 classes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("real")
    repo = copy_scripts(root / "repo")
    for path in [*REPO.glob("*.py"), REPO / "requirements.txt"]:
        shutil.copy(path, repo)
    for name in ("published", "recipes", "tools"):
        shutil.copytree(REPO / name, repo / name, ignore=shutil.ignore_patterns("__pycache__"))
    for classes in (2, 3):
        for split, images in (("train", 10), ("val", 2)):
            for number in range(classes * images):
                path = root / f"{classes} classes" / split / f"class{number % classes}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 32), (100 * (number % classes), 5 * number, 50)).save(path)
    return repo


REAL = TORCHRUN | {"OMP_NUM_THREADS": 1}  # two threads that wait for each other are slow on a busy machine
TINY = ["--device=cpu", "--input-size=32", "--batch_size=2", "--workers=0"]


def check_real_log(repo, case, ranks, accuracy=True):
    folder = repo / "test/output/0"
    log = {key: value.strip() for key, value in results(folder / f"Twins-GVT-Small_bs2_{ranks}p_{case}.log").items()}
    assert log["RankSize"] == str(ranks)
    fps, time_ms = float(log["ActualFPS"]), float(log["TrainingTime"])
    assert fps > 0 and time_ms == pytest.approx(2 * ranks * 1000 / fps, rel=0.01)
    assert (0 <= float(log["TrainAccuracy"]) <= 100) if accuracy else log["TrainAccuracy"] == ""
    assert 0 < float(log["ActualLoss"]) < 20 and int(log["E2ETrainingTime"]) > 0
    row = json.loads((folder / "ckpt/log.txt").read_text().splitlines()[-1])
    assert row["world_size"] == ranks and f"{row['fps']:.2f}" == log["ActualFPS"]
    losses = (folder / f"train_Twins-GVT-Small_bs2_{ranks}p_{case}_loss.txt").read_text().split()
    speeds = (folder / f"train_Twins-GVT-Small_bs2_{ranks}p_{case}_fps.log").read_text().split()
    assert len(losses) == len(speeds) > 0 and all(float(value) > 0 for value in losses + speeds)
    return folder


def test_one_card_trains_and_fine_tunes_on_other_classes(real, run):
    data = real.parent
    run("test/" + PERF_1P, "--data_path=../2 classes", "--max_step=2", *TINY, cwd=real, check=0, **REAL)
    folder = check_real_log(real, "perf", 1)
    assert (folder / "ckpt/checkpoint.pth").is_file()
    done = run(FINETUNE_1P, "--data_path=../../3 classes", "--finetune_pth=../output/ckpt/checkpoint.pth", "--epochs=2",
               "--max_step=2", *TINY, cwd=real / "test", check=0, **REAL)  # fmt: skip
    check_real_log(real, "acc", 1)
    assert "Fine-tuning from" in done.stdout and "3 classes" in done.stdout
    done = run("test/" + FINETUNE_1P, f"--data_path={data}/3 classes", f"--finetune_pth={real}/main.py", *TINY, cwd=real,
               check=2, **REAL)  # fmt: skip
    assert "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("script", "kind", "options"), [
    (PERF_8P, "perf", ["--max_step=2", "--no-eval"]),
    (FULL_8P, "acc", ["--epochs=1"]),
])  # fmt: skip
def test_eight_ranks(real, run, script, kind, options):
    run("test/" + script, "--data_path=../3 classes", *options, *TINY, cwd=real, check=0, **REAL)
    check_real_log(real, kind, 8, accuracy="--no-eval" not in options)


def test_demo(real, run):
    done = run("test/" + DEMO_1P, "--epochs=1", "--max_step=2", "--no-eval", *TINY, cwd=real, check=0, **REAL)
    folder = check_real_log(real, "acc", 1, accuracy=False)
    assert len(list((real / "test/output/digits").glob("*/*/*.png"))) == 1797
    for name in ("curves.png", "predictions.png"):
        assert (folder / "ckpt" / name).stat().st_size > 0
        assert f"{folder}/ckpt/{name}" in done.stdout
