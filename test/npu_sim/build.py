"""How do the stand-in CANN libraries come to be? Built once for the installed torch_npu, kept in a cache.

    python build.py  # prints the folder; its lib64/ is for LD_LIBRARY_PATH, the folder itself is ASCEND_HOME_PATH

torch_npu's shared objects name the CANN functions they need at link time. A name that cann.c does not define becomes
a function that fails and says its own name. Needs gcc and nm (binutils), on Linux x86_64.
"""

import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARY = "ascendcl"  # holds everything; the others only lead to it, so that there is one set of counters
ALIASES = ["hccl", "hcomm", "opapi", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel"]
CANN_VERSION = "9.1.0"
CANN_NAME = re.compile(r"(acl|Hccl|Msprof|rt[A-Z])\w+")


def undefined_symbols(folder):
    objects = [*glob.glob(f"{folder}/lib/*.so"), *glob.glob(f"{folder}/_C*.so")]
    nm = subprocess.run(["nm", "-D", "--undefined-only", *objects], capture_output=True, text=True, check=True)
    return {words[-1].split("@")[0] for words in map(str.split, nm.stdout.splitlines()) if len(words) > 1}


def compile_libraries(npu, out):
    """Compile cann.c and the failing stubs into `out`/lib64."""
    with open(f"{HERE}/cann.c") as f:
        source = f.read()
    defined = set(re.findall(r"\b((?:acl|Hccl|Msprof)\w+)\(", source)) | set(re.findall(r"HARMLESS\((\w+)\)", source))
    names = sorted(n for n in undefined_symbols(npu) - defined if CANN_NAME.fullmatch(n))
    lib = os.path.join(out, "lib64")
    os.makedirs(lib)
    with open(f"{out}/stubs.c", "w") as f:
        f.write(f'#include "{HERE}/cann.c"\n')
        f.writelines(f'int {n}(void) {{ return npu_sim_unimplemented("{n}"); }}\n' for n in names)
    gcc = ["gcc", "-shared", "-fPIC", "-w", "-O2", f'-DCANN_VERSION="{CANN_VERSION}"']
    subprocess.check_call([*gcc, "-o", f"{lib}/lib{LIBRARY}.so", f"{out}/stubs.c", "-lrt", "-lpthread"])
    needs_it = ["-Wl,--no-as-needed", f"-L{lib}", f"-l{LIBRARY}", "-Wl,-rpath,$ORIGIN"]
    for name in ALIASES:
        subprocess.check_call([*gcc, "-o", f"{lib}/lib{name}.so", "-x", "c", "/dev/null", *needs_it])
    for part in ("runtime", "compiler", "opp"):  # torch_npu asks whether they are there
        os.makedirs(f"{out}/{part}")
    with open(f"{out}/ascend_toolkit_install.info", "w") as f:
        f.write(f"package_name=simulated\nversion={CANN_VERSION}\n")


def build():
    """The folder of the libraries for this torch_npu and this source; made if it is not there yet."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None:
        raise SystemExit(f"test/npu_sim: no torch_npu in {sys.executable}")
    version = importlib.metadata.version("torch_npu")
    source = hashlib.sha256()
    for name in ("cann.c", "build.py"):
        with open(f"{HERE}/{name}", "rb") as f:
            source.update(f.read())
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "npu_sim", f"{version}-{source.hexdigest()[:16]}")
    if not os.path.isdir(folder):
        missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
        if missing:
            raise SystemExit(f"test/npu_sim: needs {' and '.join(missing)}")
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        # Built aside and renamed: whoever comes second, at the same time, finds the folder whole and drops its own.
        with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as aside:
            fresh = os.path.join(aside, "cann")
            os.makedirs(fresh)
            compile_libraries(spec.submodule_search_locations[0], fresh)
            try:
                os.rename(fresh, folder)
            except OSError:
                if not os.path.isdir(folder):
                    raise
    return folder


if __name__ == "__main__":
    print(build())
