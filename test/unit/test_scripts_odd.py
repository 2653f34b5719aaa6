"""The run scripts where names, environments and logs are odd: links, line breaks, a Python that talks, bytes that are no text."""
import os
import shlex
import socket
import subprocess
import sys

import pytest
from conftest import ROOT
from test_scripts import (  # noqa: F401  fixtures
    BASH,
    FINETUNE_1P,
    FULL_8P,
    PERF_1P,
    TORCHRUN,
    call,
    python_path,
    quick_launcher,
    repo,
    results,
    run,
    write_program,
)

ODD_MAIN = r'''
import os, sys
out = sys.stdout.buffer
out.write(b"a class named \xe9\xff\0 in Latin-1\n")
for epoch in range(2):
    out.write(b"Epoch: [%d]  [0/1]  eta: 0:00:00  \xff lr: 1e-06  loss: 1.5 (1.5)  time: 0.1  fps:%d  \xe9\n" % (epoch, 100 + 2 * epoch))
out.write(b"* Acc@1 50.000 Acc@5 90.000 loss 1.2 \xff\nMax accuracy: 62.50% \xff\n")
out.flush()
folder = sys.argv[sys.argv.index("--output_dir") + 1]
os.makedirs(folder, exist_ok=True)
open(folder + "/log.txt", "ab").write(b'{"epoch": 0, "classes": "\xff\xfe", "torn": ')
'''


def test_a_script_called_through_a_link(repo, run, tmp_path):  # noqa: F811
    """In a folder of its own, by a name of its own, and that a link to a link; the setup too."""
    (tmp_path / "bin dir").mkdir()
    for name in (FULL_8P, "setup_env.sh"):
        target = repo / "test" / name
        for step in range(2):
            link = tmp_path / "bin dir" / f"my {step} {name}"
            link.symlink_to(target)
            target = link
    data = f"--data_path={tmp_path / 'da ta'}"
    run(tmp_path / "bin dir" / f"my 1 {FULL_8P}", data, "--nproc=1", check=0)
    assert call(repo)["argv"][-2:] == ["--device", "auto"]
    run(repo / "test" / FULL_8P, data, "--nproc=1", "--resume=auto", check=0)  # the same script's run
    shown = run(tmp_path / "bin dir" / f"my 1 {FULL_8P}", "--help", check=0).stdout
    assert f"bash test/{FULL_8P}" in shown
    (repo / "requirements.txt").write_text("")
    assert run(tmp_path / "bin dir" / "my 1 setup_env.sh", check=0).stdout == f"{sys.executable}\n"
    (tmp_path / "versions").symlink_to(ROOT / "test/versions.sh")
    assert "bash test/versions.sh TORCH" in run(tmp_path / "versions", "--help", check=0).stdout


@pytest.mark.parametrize("says", ["print('hello'); import atexit; atexit.register(print, 'bye')", "print('/bin/sh\\nall is well', end='')"])
def test_what_python_prints_at_its_start_is_not_its_path(repo, run, tmp_path, says):  # noqa: F811
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(says)
    (repo / "requirements.txt").write_text("")
    done = run(repo / "test/setup_env.sh", check=0, PYTHONPATH=tmp_path / "site")
    assert (done.stdout, done.stderr) == (f"{sys.executable}\n", "")
    (repo / "requirements.txt").write_text("package-that-nobody-has\n")
    done = run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", check=1, PYTHONPATH=tmp_path / "site")
    assert done.stderr.startswith("[Error] Python lacks package-that-nobody-has: ") and done.stderr.count("\n") == 1


def test_a_python_that_fails_has_not_only_other_versions(repo, run, tmp_path):  # noqa: F811
    """Status 1 of a Python that broke is no answer: the next one is taken."""
    (repo / "requirements.txt").write_text("")
    write_program(tmp_path / "broken/python", "echo /nowhere/python; exit 1")
    write_program(tmp_path / "broken/python3", f'exec "{sys.executable}" "$@"')
    assert run(repo / "test/setup_env.sh", check=0, path=tmp_path / "broken").stdout == f"{sys.executable}\n"


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_log_that_is_no_utf8(repo, run, tmp_path, locale):  # noqa: F811
    (repo / "main.py").write_text(ODD_MAIN)
    data = f"--data_path={tmp_path / 'da ta'}"
    done = run(repo / "test" / PERF_1P, data, LC_ALL=locale, PYTHONUTF8=1, check=0)
    log = results(repo / "test/output/0/Twins-GVT-Small_bs128_1p_perf.log")
    found = [log[key].strip() for key in ("ActualFPS", "MeanFPS", "TrainAccuracy", "LastAccuracy", "ActualLoss")]
    assert found == ["102.00", "101.00", "62.50", "50.00", "1.5"]
    assert done.stderr == ""


def test_odd_names_reach_main_as_they_are(repo, run, tmp_path):  # noqa: F811
    """A line break inside and at the end, a quote, a dollar, a glob, a dash in front."""
    odd = "-a\nb'c\"$(touch hacked)`touch hacked`;*\n"
    (tmp_path / odd).mkdir()
    (tmp_path / odd / "weights\n").write_text("w")
    run(repo / "test" / FINETUNE_1P, f"--data_path={odd}", f"--finetune_pth={odd}/weights\n", f"--output_dir={odd}/out\n",
        f"--teacher-path={odd}/weights\n", "--model=../../x/y", cwd=tmp_path, check=0)  # fmt: skip
    argv = call(repo, checkpoints=tmp_path / odd / "out\n")["argv"]
    real = f"{tmp_path}/{odd}"
    assert argv[argv.index("--data-path") + 1] == real
    assert argv[argv.index("--finetune") + 1] == f"{real}/weights\n"
    assert argv[-1] == f"--teacher-path={real}/weights\n"
    assert (repo / "test/output/0/.._.._x_y_bs128_1p_acc.log").is_file(), "a model's name is no path"
    assert not list(tmp_path.rglob("hacked"))
    done = run(repo / "test" / PERF_1P, "--data_path=no\nwhere\x1b[31m", check=1)
    assert len(done.stdout.splitlines()) == 2 and "no?where?[31m" in done.stdout


def test_master_addr_and_a_port_that_is_none(repo, run, tmp_path):  # noqa: F811
    """A script's processes are on one machine: an address that nothing answers at keeps it from nothing."""
    data = f"--data_path={tmp_path / 'da ta'}"
    done = run(repo / "test" / PERF_1P, data, MASTER_ADDR="192.0.2.1", MASTER_PORT=free_port(), check=0, **TORCHRUN)
    assert done.stderr.splitlines()[0].startswith("[Warning] MASTER_ADDR=192.0.2.1 has no effect")
    for port in ("abc", "0", "65536", "-1"):
        done = run(repo / "test" / PERF_1P, data, MASTER_PORT=port, check=1)
        assert done.stderr == f"[Error] MASTER_PORT={port} is no port: a number from 1 to 65535, or unset it, and a free one is taken\n"


@pytest.mark.parametrize("output", [">&-", ">&- 2>&-", "2>&-", "| head -n 1", ">/dev/full"])
def test_an_output_that_nobody_takes_ends_no_training(repo, run, tmp_path, output):  # noqa: F811
    """Closed, a reader that ends, a full disk: the run goes on, its log and its results are whole, its status is its own."""
    run(repo / "test" / PERF_1P, f"--data_path={tmp_path / 'da ta'}", check=0)  # moved aside by the next: one more line that is said
    script = f"{shlex.quote(str(repo / 'test' / PERF_1P))} --data_path={shlex.quote(str(tmp_path / 'da ta'))}"
    for status in (0, 3):
        (tmp_path / "call.sh").write_text(f"bash {script} --sleep=0.2 --status={status} {output}\nexit ${{PIPESTATUS[0]}}\n")
        done = run(tmp_path / "call.sh")
        assert done.returncode == status, done.stderr
        assert "Epoch: [1]" in (repo / "test/output/0/train_0.log").read_text()
        log = results(repo / "test/output/0/Twins-GVT-Small_bs128_1p_perf.log")
        assert log["ActualFPS"].strip() == ("" if status else "201.50") and log["ActualLoss"].strip() != ""


def test_a_working_directory_with_modules_of_pythons_names(repo, run, tmp_path):  # noqa: F811
    """Neither the search for a Python nor torchrun takes them for Python's own or the requirements'; main.py's own are main.py's."""
    (tmp_path / "mine").mkdir()
    for name in ("random", "email", "csv", "zipfile", "subprocess", "packaging", "torch", "argparse", "datasets", "utils"):
        (tmp_path / "mine" / f"{name}.py").write_text(f"raise SystemExit('taken: {name}')\n")
    data = f"--data_path={tmp_path / 'da ta'}"
    (repo / "main.py").write_text((repo / "main.py").read_text() + "import beside\n")
    (repo / "beside.py").touch()
    for variables in ({}, TORCHRUN):
        done = run(repo / "test" / PERF_1P, data, cwd=tmp_path / "mine", **variables)
        assert (done.returncode, "taken" in done.stdout + done.stderr) == (0, False), done.stdout + done.stderr


def test_sh_and_shells_with_options_of_their_own(repo, run, tmp_path, python_path, quick_launcher):  # noqa: F811
    data = f"--data_path={tmp_path / 'da ta'}"
    env = os.environ | {"PATH": f"{python_path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(quick_launcher)}
    for shell, variables in ((["sh"], {}), ([BASH, "--posix"], {"POSIXLY_CORRECT": "1"}), ([BASH, "-C"], {})):
        done = subprocess.run([*shell, repo / "test" / PERF_1P, data], env=env | variables, capture_output=True, text=True)
        assert done.returncode == 0 and "Final Performance images/sec : 201.50\n" in done.stdout, done.stderr


def test_a_disk_that_takes_no_log(repo, run, tmp_path):  # noqa: F811
    """A folder where the log should be is said before the training; results that do not fit are said after it."""
    data = f"--data_path={tmp_path / 'da ta'}"
    (repo / "test/output/0/train_0.log").mkdir(parents=True)
    done = run(repo / "test" / PERF_1P, data, "--resume=auto", check=1)
    assert done.stderr == f"[Error] cannot write to {repo}/test/output/0/train_0.log: make the folder writable, or move it away\n"
    (tmp_path / "call.sh").write_text(f"ulimit -f 0\nexec bash {shlex.quote(str(repo / 'test' / PERF_1P))} {shlex.quote(data)} "
                                      f"--status=2 --output_dir={shlex.quote(str(tmp_path / 'out'))}\n")
    (repo / "test/output/0/train_0.log").rmdir()
    done = run(tmp_path / "call.sh")
    assert done.returncode != 0 and f"the results cannot be written to {repo}/test/output/0: is the disk full?" in done.stderr


def free_port():
    with socket.socket() as server:
        server.bind(("", 0))
        return server.getsockname()[1]
