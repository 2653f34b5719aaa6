"""Which versions go together, and does what README says about them hold? Resolved by pip itself, over an index made here.

The index holds empty wheels with the names, versions and requirements of the real ones, so that nothing is fetched: what pip
decides depends on those alone. The versions that an environment really has are looked at where the tests run.
"""
import importlib.metadata
import json
import os
import re
import subprocess
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pip
import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import complaint
import devices
import versions

# As the released wheels state it (Linux x86_64): torchvision: what it requires of torch; torch_npu: the same
TORCHVISION = {
    "0.22.0": "torch==2.7.0", "0.22.1": "torch==2.7.1", "0.23.0": "torch==2.8.0", "0.24.0": "torch==2.9.0", "0.24.1": "torch==2.9.1",
    "0.25.0": "torch==2.10.0", "0.26.0": "torch==2.11.0", "0.27.0": "torch==2.12.0", "0.27.1": "torch==2.12.1", "0.28.0": "torch==2.13.0",
    "0.29.0": "torch==2.14.0", "0.29.1": "torch>=2.14.0", "0.29.2": "torch>=2.14.0"}
TORCH_NPU = {
    "2.7.1.post8": "torch==2.7.1+cpu", "2.7.1.post11": "torch==2.7.1+cpu", "2.9.0.post6": "torch==2.9.0+cpu",
    "2.9.0.post9": "torch==2.9.0+cpu", "2.10.0.post4": "torch==2.10.0+cpu", "2.10.0.post7": "torch==2.10.0+cpu",
    "2.11.0": "torch==2.11.0+cpu", "2.11.0.post3": "torch==2.11.0+cpu", "2.12.0": "torch==2.12.0", "2.12.0.post3": "torch==2.12.0",
    "2.13.0": "torch==2.13.0.*", "2.14.0": "torch==2.14.0.*"}
TORCH = ["2.7.0", "2.7.1", "2.8.0", "2.9.0", "2.9.1", "2.10.0", "2.11.0", "2.12.0", "2.12.1", "2.13.0", "2.14.0", "2.14.1", "2.15.0"]
OTHERS = {"timm": ("1.0.31", ["torch", "torchvision", "pyyaml", "huggingface-hub", "safetensors"]), "numpy": ("2.4.0", []),
          "pillow": ("13.0.0", []), "einops": ("0.8.2", []), "safetensors": ("0.8.0", []),
          "tqdm": ("4.70.0", []), "matplotlib": ("3.11.0", ["numpy", "packaging"]), "scikit-learn": ("1.9.0", ["numpy"]),
          "packaging": ("26.0", []), "pyyaml": ("6.0.3", []), "huggingface-hub": ("1.0.0", [])}
READMES = ["README.md", "README.zh-CN.md"]


def ascend_rows(name):
    """-> [(torch, torchvision, torch_npu, CANN)] of the table under "On Ascend" """
    rows, canns = [], []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["torch", "torchvision"]:
            canns = [re.search(r"CANN ([\d.]+)", cell)[1] for cell in cells[2:]]
        elif canns and re.fullmatch(r"2\.\d+\.\d+", cells[0]):
            rows += [(*cells[:2], torch_npu, cann) for torch_npu, cann in zip(cells[2:], canns) if torch_npu]
        elif canns and not line:
            return rows
    return rows


ROWS = ascend_rows(READMES[0])


def metadata(folder, name, version, requires, tail=".dist-info/METADATA"):
    return (f"{name.replace('-', '_')}-{version}{tail}",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {r}\n" for r in requires))


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """A folder of empty wheels for pip's --find-links."""
    folder = tmp_path_factory.mktemp("index")
    wheels = [("torch", version + local, []) for version in TORCH for local in ("", "+cpu")]
    wheels += [("torchvision", version + local, [requirement, "numpy", "pillow>=5.3"]) for version, requirement in TORCHVISION.items()
               for local in ("", "+cpu")]
    wheels += [("torch_npu", version, [requirement]) for version, requirement in TORCH_NPU.items()]
    wheels += [(name, version, requires) for name, (version, requires) in OTHERS.items()]
    for name, version, requires in wheels:
        file, text = metadata(folder, name, version, requires)
        info = file.partition("/")[0]
        with zipfile.ZipFile(folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(file, text)
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def environment(tmp_path, index):
    """environment(name=version, ...) makes one with these packages; -> resolve(*words), what pip would install there: {name: version}"""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    [site] = (tmp_path / "env").glob("lib/python*/site-packages")
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "pip").symlink_to(Path(pip.__file__).parent)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}

    def resolve(*words):
        report = tmp_path / "report.json"
        done = subprocess.run([python, "-m", "pip", "--isolated", "install", "--dry-run", "--no-index",
                               "--find-links", index, "--report", report, "--quiet", *words], capture_output=True, text=True, cwd=ROOT,
                              env={**clean, "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": str(tmp_path / "pip")}, timeout=300)
        assert done.returncode == 0, done.stderr
        return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in json.loads(report.read_text())["install"]}

    def make(**packages):
        for name, version in packages.items():
            requires = {"torchvision": TORCHVISION, "torch_npu": TORCH_NPU}.get(name, {}).get(version.partition("+")[0])
            file, text = metadata(site, name, version, [requires] if requires else [])
            (site / file).parent.mkdir()
            (site / file).write_text(text)
        return resolve
    make.python = python
    return make


def test_both_readmes_say_the_same_of_ascend():
    assert ascend_rows(READMES[1]) == ROWS and {row[2] for row in ROWS} == set(TORCH_NPU)


@pytest.mark.parametrize(("torch", "torchvision", "torch_npu", "cann"), ROWS, ids=[row[2] for row in ROWS])
def test_requirements_keep_torch_beside_each_pair(environment, torch, torchvision, torch_npu, cann):
    """README's steps: after torch with torchvision, torch_npu and the requirements bring no other."""
    resolve = environment(torch=f"{torch}+cpu", torchvision=f"{torchvision}+cpu")
    found = resolve(f"torch_npu=={torch_npu}", "-r", "requirements.txt")
    assert found["torch_npu"] == torch_npu and found["timm"] == "1.0.31" and not {"torch", "torchvision"} & set(found)
    assert versions.cann_for(torch_npu) == cann


def test_without_torchvision_the_newest_replaces_torch(environment, tmp_path):
    """Why README installs both together; and the constraints that setup_env.sh takes from versions.py keep torch all the same."""
    resolve = environment(torch="2.7.1+cpu")
    assert resolve("-r", "requirements.txt")["torch"].startswith("2.15.0")
    lines = subprocess.run([environment.python, ROOT / "versions.py"], capture_output=True, text=True, check=True).stdout
    assert lines == "torch==2.7.1+cpu\ntorchvision==0.22.1+cpu\n"
    (tmp_path / "kept.txt").write_text(lines)
    later = resolve("-r", "requirements.txt", "-c", str(tmp_path / "kept.txt"))
    assert "torch" not in later and later["torchvision"] == "0.22.1+cpu"


@pytest.mark.parametrize("torch", TORCH)
def test_the_torchvision_of_the_table_was_built_for_this_torch(torch):
    requirement = Requirement(TORCHVISION[versions.TORCHVISION[torch]])
    assert requirement.specifier.contains(torch)
    assert versions.misfit([str(requirement)], f"{torch}+cpu") is None
    assert versions.misfit(["torch==2.0.1", "numpy"], torch) == "==2.0.1"


@pytest.mark.parametrize("torch", ["2.7.1", "2.15.0"])
def test_the_command_that_errors_name(environment, torch):
    """It leaves the torch that is there."""
    command, _, index = versions.install(torch, cpu_only=True).partition(" --index-url ")
    words = command.split()
    assert words[:2] == ["pip", "install"] and index == versions.CPU_INDEX
    found = environment(torch=f"{torch}+cpu")(*words[2:])
    assert "torch" not in found and found["torchvision"].partition("+")[0] == versions.TORCHVISION[torch]
    assert versions.install(torch, cpu_only=False, with_torch=True).split()[2] == f"torch=={torch}"


def test_a_torch_that_is_not_in_the_table():
    """Nothing is derived: pip finds the torchvision that allows this torch."""
    assert versions.install("2.99.1+cu140", cpu_only=False) == "pip install torch==2.99.1 torchvision"


def test_what_is_installed_here():
    torch, torchvision = versions.installed("torch"), versions.installed("torchvision")
    assert versions.misfit(importlib.metadata.requires("torchvision"), torch) is None
    pair = versions.TORCHVISION[versions.plain(torch)]
    assert torchvision.partition("+")[0].rpartition(".")[0] == pair.rpartition(".")[0]


@pytest.mark.parametrize(("version", "torch"), [("2.7.1.post8", "2.7.1"), ("2.14.1", "2.14.0"), ("2.15.0", "2.14.0"),
                                                ("2.12.1+cpu", "2.12.0"), ("0", "2.14.0"), ("2.6.0", "2.14.0")])
def test_the_torch_that_an_npu_host_takes(version, torch):
    assert versions.torch_of_npu(version) == torch


def caused(message, cause):
    error = RuntimeError(message)
    error.__cause__ = cause
    return error


AUTOLOAD = "Failed to load the backend extension: torch_npu. You can disable extension auto-loading with TORCH_DEVICE_BACKEND_AUTOLOAD=0."


@pytest.mark.parametrize("error, remedy", [
    (caused(AUTOLOAD, ImportError("libhccl.so: cannot open shared object file")), "torch_npu finds no CANN: source "),
    (ImportError("libascendcl.so: cannot open shared object file"), "torch_npu finds no CANN: source "),
    (caused(AUTOLOAD, ImportError("undefined symbol: _ZN3c10")),
     "torch_npu does not load (undefined symbol: _ZN3c10): torch and torch_npu must have the same version"),
    (ModuleNotFoundError("No module named 'torch'"), "torch does not load (No module named 'torch'): pip install -r requirements.txt")])
def test_a_failed_import_is_said_with_its_remedy(error, remedy):
    assert versions.explain_import(error).startswith(remedy)


@pytest.mark.parametrize(("code", "text"), [
    ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
    ("raise AttributeError(\"partially initialized module 'torchvision' has no attribute 'extension'\")", "partially initialized module"),
    ("import torchvision._C", "No module named 'torchvision._C'")])
def test_torchvision_of_another_build_is_one_line(run_main, tmp_path, code, text):
    """As PyPI's fails beside a CPU-only torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(code)
    done = run_main("--data-path", tmp_path, env={"PYTHONPATH": str(tmp_path)})
    [line] = done.stderr.splitlines()
    torch = importlib.metadata.version("torch")
    assert done.returncode != 0 and line.startswith("error: torchvision ") and text in line
    assert f"does not load beside torch {torch}" in line
    assert f"torchvision=={versions.TORCHVISION[versions.plain(torch)]}" in line and line.endswith("--force-reinstall --no-deps")


@pytest.mark.parametrize("sign", [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234", "recvValue failed on SocketImpl",
    "[/gloo/transport/tcp/pair.cc:547] Read error: Connection reset by peer", "failed to recv, got 0 bytes", "writing: Broken pipe"])
def test_a_lost_connection_is_one_line_and_not_the_first(monkeypatch, capsys, sign):
    """Whoever lost the others waits for the one that knows why; alone, or from a file's reader, the words mean something else."""
    waited = []
    monkeypatch.setattr(complaint.time, "sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        try:
            raise devices.explain(RuntimeError(sign)) from None  # as init_distributed_mode does
        except RuntimeError as error:
            assert complaint.complain(error, training=False) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: the connection to the other ranks was lost") and second.startswith("error (rank 1): the connection")
    assert len(waited) == 2
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not isinstance(devices.explain(RuntimeError(sign)), devices.LostConnection)
    assert not isinstance(devices.explain(ValueError(sign)), devices.LostConnection)


def test_gloo_ends_after_its_group(monkeypatch):
    """torch 2.7 ends a group with the interpreter locked, which a thread of gloo's may want; gloo's own object lets go of it."""
    ended = []

    class Gloo:
        def __del__(self):
            ended.append("gloo")

    def destroy():
        groups.clear()
        ended.append("group")
    groups = [Gloo()]
    world = SimpleNamespace(_get_backend=lambda device: groups[0])
    monkeypatch.setattr(devices, "dist", SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, group=SimpleNamespace(WORLD=world), destroy_process_group=destroy))
    devices.leave_the_others()
    assert ended == ["group", "gloo"]


@pytest.mark.parametrize(("words", "text"), [([], "say which torch, as 2.7.1"), (["newest"], "say which torch, as 2.7.1"),
                                             (["2.7.1", "--unit"], "unknown option --unit")])
def test_versions_sh_says_what_it_needs(words, text):
    done = subprocess.run(["bash", ROOT / "test" / "versions.sh", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and text in done.stderr and "installing" not in done.stdout


def test_what_readme_says_was_tried_pairs():
    for name in READMES:
        rows = re.findall(r"^\| (2\.\d+\.\d+), (0\.\d+\.\d+) \|", (ROOT / name).read_text(encoding="utf-8"), re.M)
        assert rows and all(versions.TORCHVISION[torch] == torchvision for torch, torchvision in rows)
