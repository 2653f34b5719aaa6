"""python tools: which tools there are, from any folder and however Python was started, and how they end."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ELASTIC, ROOT

NAMES = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if not path.name.startswith("_"))


@pytest.fixture
def foreign(tmp_path):
    """A working directory with modules of our names, and a link to tools/ in it."""
    folder = tmp_path / "for eign"
    folder.mkdir()
    for name in {path.stem for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"))} - {"__init__", "__main__"}:
        (folder / f"{name}.py").write_text(f"raise SystemExit('taken: {name}')\n")
    (folder / "tools").mkdir()
    (folder / "tools" / "__init__.py").write_text("raise SystemExit('taken: tools')\n")
    (folder / "link").symlink_to(ROOT / "tools")
    return folder


def python(*words, cwd, **variables):
    env = {key: value for key, value in os.environ.items() if key not in (*ELASTIC, "PYTHONPATH")} | variables
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_the_list_has_every_tool_with_the_first_line_of_its_docstring(tool, words):
    status, out, said = tool(*words)
    lines = [line.split(None, 1) for line in out.splitlines()[2:]]
    assert (status, said) == (0, "") and [name for name, _ in lines] == NAMES
    for name, line in lines:
        assert (ROOT / "tools" / f"{name}.py").read_text().startswith(f'"""{line}\n'), name
    assert all(len(line) <= 140 for line in out.splitlines())


@pytest.mark.parametrize("name, hint", [("docter", "did you mean doctor?"), ("report.py", "did you mean report?"),
                                        ("x", f"there are {', '.join(NAMES)}"), ("__init__", "there are ")])
def test_a_tool_that_does_not_exist_is_one_line_with_the_nearest(tool, name, hint):
    status, out, said = tool(name, "--help")
    assert (status, out) == (2, "") and said.startswith(f"error: there is no tool {name}: {hint}") and said.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_tool_has_help_and_refuses_what_it_does_not_know(tool, name):
    status, out, said = tool(name, "--help")
    assert (status, said) == (0, "") and out.startswith(f"usage: python tools {name} ")
    status, out, said = tool(name, "--no-such-option")
    assert (status, out) == (2, "") and f"python tools {name}: error: " in said


@pytest.mark.parametrize("start", [["link"], ["-P", "link"], [ROOT / "tools"], ["-OO", ROOT / "tools"]], ids=["link", "safe", "path", "OO"])
def test_from_a_folder_with_modules_of_our_names(foreign, start):
    """Also where PYTHONPATH names that folder."""
    if "-P" in start and sys.version_info < (3, 11):
        start = start[1:]
    for variables in ({}, {"PYTHONPATH": str(foreign)}):
        done = python(*start, "doctor", "--images=0", cwd=foreign, **variables)
        said = "usage: python tools doctor", "python tools doctor: error: --images is 0, and must be at least 1\n"
        assert done.returncode == 2 and done.stderr.startswith(said[0]) and done.stderr.endswith(said[1]), done.stderr


def test_doctors_child_processes_from_a_folder_with_modules_of_our_names(foreign):
    done = python(foreign / "link", "doctor", "--device=nothing", cwd=foreign, PYTHONPATH=str(foreign))
    assert "fail  device: --device nothing: say npu, cuda, " in done.stdout and not done.stderr, done.stdout


def test_a_tool_with_all_of_the_training_from_a_folder_with_modules_of_our_names(foreign):
    done = python(foreign / "link", "data", "index", "nowhere", cwd=foreign, PYTHONPATH=str(foreign))
    assert (done.returncode, done.stderr) == (2, "error: nowhere has neither train/ nor val/ with tar shards\n"), done.stdout


@pytest.mark.parametrize("words, variables", [(["-P"], {}), ([], {"PYTHONSAFEPATH": "1"})])
def test_main_without_its_folder_on_pythons_path(foreign, words, variables):
    """python -P and PYTHONSAFEPATH=1 leave it out; an older Python knows neither."""
    if "-P" in words and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no -P")
    done = python(*words, ROOT / "main.py", "--device=nothing", "--data-path=nowhere", "--output_dir=", cwd=foreign, **variables)
    assert done.returncode == 2 and done.stderr.startswith("error: --device nothing: say npu, cuda, "), done.stderr


def test_a_tool_is_a_file(tool, monkeypatch, tmp_path):
    (tmp_path / "new.py").write_text('"""How does it end?\n\nMore.\n"""\n')
    (tmp_path / "_part.py").write_text("")
    monkeypatch.setattr("tools.__main__.HERE", tmp_path)
    assert tool()[1].endswith("\n\n  new  How does it end?\n")


@pytest.mark.parametrize("code, status, line", [
    ("raise ValueError('a\\nb')", 2, "error: a\\nb"), ("open('/no/where')", 2, "error: [Errno 2] No such file or directory: '/no/where'"),
    ("import sys; sys.exit(7)", 7, None), ("raise KeyboardInterrupt", 130, None), ("return 1", 1, None), ("return None", 0, None),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, None), ("raise TypeError('x')", 1, "TypeError: x"),
    ("import no_such_package", 1, "error: No module named 'no_such_package': pip install -r requirements.txt"),
    ("import os, devices\n    if os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] == '0':\n        return 5\n    raise devices.NeedsRestart",
     5, None),
    ("from options import no_such_name", 1, None), ("import devices; raise RuntimeError('CUDA out of memory')", 1,
                                                    "error: the device is out of memory: use a smaller --batch-size (and "
                                                    "--accum-steps), or --grad-checkpointing")])
def test_how_a_tool_ends(tmp_path, code, status, line):
    """A copy of tools/ with one more file in it, which is a tool by that."""
    (tmp_path / "tools").mkdir()
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    for name in ("__init__.py", "__main__.py"):
        (tmp_path / "tools" / name).write_text((ROOT / "tools" / name).read_text())
    (tmp_path / "tools" / "new.py").write_text(f'"""How does it end?"""\n\n\ndef main(argv):\n    {code}\n')
    done = python("tools", "new", cwd=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert done.returncode == status, done.stderr
    assert (done.stderr.splitlines() or [None])[-1] == line or code.startswith("from options")
    assert ("Traceback" in done.stderr) == ("TypeError" in code or code.startswith("from options"))


def test_no_test_file_is_missing_from_the_table_of_what_proves_what():
    listed = re.findall(r"^\| `(\S+)` \| \S.* \| \S.* \|$", (ROOT / "test" / "README.md").read_text(), re.M)
    tests = {str(path.relative_to(ROOT / "test")) for path in ROOT.glob("test/*/test_*.py")}
    assert len(listed) == len(set(listed)) and tests <= set(listed) and all((ROOT / "test" / name).is_file() for name in listed)
