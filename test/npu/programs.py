"""How do the NPU tests start other programs?"""

import json
import os
import pathlib
import subprocess
import sys

RUN = pathlib.Path(__file__).parent.parent / "npu_sim" / "run"


def run_program(*command, timeout=300, **env):
    """Run a program with `env` on top of the environment (None removes); returns its completed process."""
    merged = {k: v for k, v in {**os.environ, "OMP_NUM_THREADS": "1", **env}.items() if v is not None}
    return subprocess.run(list(map(str, command)), env=merged, capture_output=True, text=True, timeout=timeout)


def run_python(code, *args, **env):
    """Run Python code in a process of its own; what it prints last is JSON, and is returned."""
    done = run_program(sys.executable, "-c", code, *args, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def torchrun(ranks, script, *args, **env):
    return run_program(
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script, *args, **env
    )
