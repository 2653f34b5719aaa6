"""Which versions go together? torch, torchvision, torch_npu and CANN, read without importing any of them.

    python versions.py    # pip's constraints that keep the torch that is here: pip install -r requirements.txt -c FILE
"""
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path

CPU_INDEX = "<PyTorch's CPU index>"  # its URL stands in PyTorch's own install instructions
# torch: the torchvision that was built for it (torchvision's own requirement; from 0.29.1 on it takes later ones, too)
TORCHVISION = {"2.7.0": "0.22.0", "2.7.1": "0.22.1", "2.8.0": "0.23.0", "2.9.0": "0.24.0", "2.9.1": "0.24.1", "2.10.0": "0.25.0",
               "2.11.0": "0.26.0", "2.12.0": "0.27.0", "2.12.1": "0.27.1", "2.13.0": "0.28.0", "2.14.0": "0.29.0", "2.14.1": "0.29.1",
               "2.15.0": "0.29.2"}
# CANN that torch_npu's releases were published for (its version table): torch's version, {from .postN on: CANN}
CANN = {"2.7.1": {0: "8.3", 2: "8.5", 4: "9.0", 8: "9.1", 11: "9.2"}, "2.8.0": {0: "8.3", 2: "8.5", 4: "9.0"},
        "2.9.0": {0: "8.5", 2: "9.0", 6: "9.1", 9: "9.2"}, "2.10.0": {0: "9.0", 4: "9.1", 7: "9.2"}, "2.11.0": {0: "9.1", 3: "9.2"},
        "2.12.0": {0: "9.1", 3: "9.2"}, "2.13.0": {0: "9.2"}, "2.14.0": {0: "9.2"}}
# A torch for CUDA beside torch_npu, as tried: from 2.13 on the import aborts, 2.7.1 trains (on simulated NPUs)
ABORTS_BESIDE_CUDA, TRAINS_BESIDE_CUDA = (2, 13), ("2.7.1",)


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version):
    return tuple(int(n) for n in re.match(r"(?:\d+(?:\.\d+)*)?", version)[0].split(".") if n)


def plain(version):
    """2.7.1 of 2.7.1+cpu and 2.7.1.post8"""
    return ".".join(map(str, (*release(version), 0, 0)[:3]))


def cuda_build():
    """The CUDA version of the installed torch, or None: read in its files."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    found = re.search(r"^cuda\b[^=]*= *'([^']+)'", file.read_text(), re.M) if file and file.is_file() else None
    return found and found[1]


def cann_for(torch_npu):
    """The CANN that this release of torch_npu was published for, or None where that is not known."""
    post = int((re.findall(r"\.post(\d+)", torch_npu) or [0])[0])
    return next((cann for first, cann in reversed(CANN.get(plain(torch_npu), {}).items()) if first <= post), None)


def torch_of_npu(version):
    """The torch to take on an NPU host that has this torch or torch_npu: the same, or the nearest one that has a torch_npu."""
    wanted = release(plain(version))
    return plain(version) if plain(version) in CANN else max(
        CANN, key=lambda known: (release(known)[:2] == wanted[:2], release(known) <= wanted, release(known)))


def install(torch, cpu_only, with_torch=False):
    """pip's command for the torchvision that goes with this torch (with_torch: and for this torch), from the same index."""
    pair = TORCHVISION.get(plain(torch))
    words = [f"torch=={plain(torch)}"] if with_torch or not pair else []  # pip then finds torchvision by what it requires
    words.append(f"torchvision=={pair}" if pair else "torchvision")
    return f"pip install {' '.join(words)}" + (f" --index-url {CPU_INDEX}" if cpu_only else "")


def misfit(torchvision_requires, torch):
    """What the installed torchvision demands of torch, where the installed torch is none of that; else None."""
    from packaging.requirements import Requirement
    for requirement in map(Requirement, torchvision_requires or ()):
        if requirement.name == "torch" and not requirement.specifier.contains(plain(torch), prereleases=True):
            return str(requirement.specifier)
    return None


def explain_import(error):
    """What to do about a failed `import torch` or `import torchvision`, in one line."""
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    if "libhccl" in text or "libascendcl" in text or "libge_" in text or "libgraph" in text:
        return ("torch_npu finds no CANN: source /usr/local/Ascend/ascend-toolkit/set_env.sh (CANN 8.5 and later: "
                "/usr/local/Ascend/cann/set_env.sh), or train without an NPU: --device cpu")
    if "torch_npu" in text:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        return (f"torch_npu does not load ({reason}): torch and torch_npu must have the same version and torch must be "
                "a CPU-only build; or train without an NPU: --device cpu")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "torch" in sys.modules and "torchvision" in text:
        torch, found = sys.modules["torch"].__version__, installed("torchvision")
        return (f"torchvision {found or ''} does not load beside torch {torch} ({reason}): it must be torch's own, in version and kind: "
                f"{install(torch, not cuda_build())}" + (" --force-reinstall --no-deps" if found else ""))
    return f"torch does not load ({reason}): pip install -r requirements.txt"


def constraints():
    """The lines that keep the torch of this environment, and with it torchvision's version and kind; none without a torch."""
    torch = installed("torch")
    if not torch:
        return []
    pair, local = TORCHVISION.get(plain(torch)), "".join(torch.partition("+")[1:])
    return [f"torch=={torch}", *([f"torchvision=={pair}{local}"] if pair and not installed("torchvision") else [])]


if __name__ == "__main__":
    print(*constraints(), sep="\n")
