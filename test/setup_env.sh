#!/usr/bin/env bash
# Finds or makes the Python environment, and prints its python. An environment that has the requirements is used as it
# is: the current python, python3, or ./.venv. Otherwise they are installed into ./.venv.
#
#   bash test/setup_env.sh           requirements.txt
#   bash test/setup_env.sh --test    test/requirements.txt too; a new .venv gets the versions of test/constraints.txt
#   bash test/setup_env.sh --npu     ./.venv-npu for the tests on simulated NPUs: torch_npu beside a CPU-only torch
#
# Sourced, it gives the functions below.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "[Error] bash 4.4 or newer is needed" >&2; exit 1; }
setup_root=$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")") # also where this was called through a link

# A message is one line, whatever stands in the paths and values it quotes.
say() { printf '%s\n' "$@" 2>/dev/null || true; } # where nobody can read it nothing ends
info() { say "[Info] ${1//[[:cntrl:]]/?}"; }
warn() { say "[Warning] ${1//[[:cntrl:]]/?}" >&2; }
fail() { # MESSAGE [STATUS]
    say "[Error] ${1//[[:cntrl:]]/?}" >&2
    exit "${2:-1}"
}

# Sets FOUND to the path of PYTHON, and LACKS to what it lacks of the requirement FILEs.
# Status 0: nothing; 1: versions outside the ranges; 2: packages are missing; anything else: no Python to use.
# Only what stands between its marks is the answer: a Python may print more when it starts or ends (sitecustomize).
check_python() { # PYTHON FILE...
    local output status=0 mark=$'\x1f'
    FOUND='' LACKS=''
    { output=$("$1" - "${@:2}" <<'PYTHON'
import os
import sys

sys.path[:] = filter(None, sys.path)  # the working directory may hold a random.py


def answer(status, problem=""):
    sys.stdout.flush()
    os.write(1, b"\x1f" + os.fsencode(sys.executable) + b"\x1f" + problem.encode() + b"\x1f")
    sys.exit(status)


if sys.version_info < (3, 10):
    answer(3, "Python %d.%d is too old, 3.10 or newer is needed" % sys.version_info[:2])
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
except ImportError:  # a new virtual environment has it inside pip only
    from pip._vendor.packaging.requirements import Requirement

missing, unfit = [], []
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            line = line.split("#")[0].strip()
            if not line or line.startswith("-"):
                continue
            wanted = Requirement(line)
            if wanted.marker and not wanted.marker.evaluate():
                continue
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                missing.append(wanted.name)
            else:
                if not wanted.specifier.contains(found, prereleases=True):
                    unfit.append(f"{wanted.name} {found} (wanted: {wanted.specifier})")
problems = []
if missing:
    problems.append("Python lacks " + ", ".join(missing))
if unfit:
    problems.append("outside the tested range: " + ", ".join(unfit))
answer(2 if missing else 1 if unfit else 0, "; ".join(problems))
PYTHON
    ); } 2>/dev/null || status=$?
    [[ $output == *$mark*$mark*$mark* ]] || return 4
    output=${output#*"$mark"}
    FOUND=${output%%"$mark"*} output=${output#*"$mark"}
    LACKS=${output%%"$mark"*}
    return "$status"
}

# Sets PYTHON to the first python that has the requirement FILEs: status 0. Status 1: the best one has versions outside
# the ranges; 2: there is none. PROBLEM says what the first one lacks.
find_python() { # FILE...
    local candidate status second='' second_lacks=''
    PYTHON='' PROBLEM=''
    for candidate in python python3 "$setup_root/.venv/bin/python"; do
        status=0
        check_python "$candidate" "$@" || status=$?
        if [[ -e $setup_root/.venv/half-made && $FOUND == "$setup_root/.venv/"* ]]; then continue; fi
        if ((status == 0)); then
            PYTHON=$FOUND PROBLEM=''
            return 0
        fi
        PROBLEM=${PROBLEM:-$LACKS}
        if ((status == 1)) && [[ ! $second ]]; then second=$FOUND second_lacks=$LACKS; fi
    done
    if [[ $second ]]; then
        PYTHON=$second PROBLEM=$second_lacks
        return 1
    fi
    PROBLEM=${PROBLEM:-there is no Python of version 3.10 or newer}
    return 2
}

# Prints the first of the named pythons that can make an environment (Debian's needs python3-venv for it).
base_python() { # PYTHON...
    local candidate
    for candidate in "$@" python python3 python3.13 python3.12 python3.11 python3.10; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' &>/dev/null; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    return 1
}

# An environment that this function began and did not finish carries the file half-made, and is begun again.
# Everything else that is there stays: packages are only added.
make_env() { # FOLDER BASE_PYTHON PIP_ARGUMENT...
    local env=$1 base=$2 clear=()
    if [[ -e $env/half-made ]]; then clear=(--clear); fi
    if [[ ! -e $env || ${clear[*]} ]] || ! "$env/bin/python" -m pip --version >/dev/null 2>&1; then
        local new=true
        [[ -e $env && ! ${clear[*]} ]] && new=''
        "$base" -m venv "${clear[@]}" "$env" >&2 || return 1
        [[ ! $new ]] || : >"$env/half-made"
    fi
    "$env/bin/python" -m pip install --disable-pip-version-check "${@:3}" >&2 || return 1
    rm -f -- "$env/half-made"
}

# Sets PYTHON to one that has the requirements.
setup_env() { # [--test]
    local files=("$setup_root/requirements.txt") base
    [[ ${1:-} != --test ]] || files+=("$setup_root/test/requirements.txt")
    if find_python "${files[@]}"; then return; fi
    {
        lock_setup
        if find_python "${files[@]}"; then return; fi # another set-up has just made it
        base=$(base_python) || fail "no Python of version 3.10 or newer that can make an environment: install one (on Debian and Ubuntu with python3-venv)"
        info "$PROBLEM: installing into $setup_root/.venv, which takes some minutes" >&2
        local arguments=() file env=$setup_root/.venv pins=()
        for file in "${files[@]}"; do arguments+=(-r "$file"); done
        if [[ ! -e $env/half-made ]] && "$env/bin/python" "$setup_root/versions.py" >"$env/kept.txt" 2>/dev/null; then
            arguments+=(-c "$env/kept.txt") # a torch that is there stays: the newest torchvision would bring another
        fi
        if [[ ${1:-} == --test && (! -e $env || -e $env/half-made) ]]; then pins=(-c "$setup_root/test/constraints.txt"); fi
        make_env "$env" "$base" "${arguments[@]}" "${pins[@]}" \
            || { [[ ${pins[*]} ]] && warn "the pinned versions cannot be had here: installing without pins" && make_env "$env" "$base" "${arguments[@]}"; } \
            || fail "the requirements could not be installed into $env (pip's last lines above say why): run this again, or install them yourself"
    } 9<"$setup_root"
    check_python "$env/bin/python" "${files[@]}" || fail "$env is not usable: $LACKS"
    PYTHON=$env/bin/python
}

lock_setup() { if command -v flock >/dev/null; then flock 9; fi; } # two set-ups at once: one waits

# Sets NPU_PYTHON to one with torch_npu beside a CPU-only torch; otherwise status 1, and NPU_REASON says why not.
setup_npu_env() {
    local env=$setup_root/.venv-npu base
    NPU_PYTHON=$env/bin/python NPU_REASON=''
    if [[ $(uname -s) != Linux || $(uname -m) != x86_64 ]]; then
        NPU_REASON="NPUs are simulated on Linux x86_64 only"
        return 1
    fi
    if npu_env_works; then return; fi
    {
        lock_setup
        if npu_env_works; then return; fi
        base=$(base_python python3.11) || { NPU_REASON="no Python of version 3.10 or newer that can make an environment"; return 1; }
        info "installing into $env, which takes some minutes" >&2
        # "+cpu" asks for a CPU-only build: from 2.13 on, a CUDA build aborts next to torch_npu.
        if ! make_env "$env" "$base" 'torch==2.13.0+cpu' torch_npu -c "$setup_root/test/constraints-npu.txt" \
            -r "$setup_root/requirements.txt" -r "$setup_root/test/requirements.txt"; then
            NPU_REASON="a CPU-only build of torch 2.13.0 beside torch_npu 2.13.0 could not be installed (pip's last lines say why)"
            return 1
        fi
    } 9<"$setup_root"
    npu_env_works
}

npu_env_works() {
    [[ ! -e $setup_root/.venv-npu/half-made ]] || return 1
    check_python "$NPU_PYTHON" "$setup_root"/test/constraints-npu.txt "$setup_root"/requirements.txt "$setup_root"/test/requirements.txt \
        || { NPU_REASON="$setup_root/.venv-npu is not usable: $LACKS"; return 1; }
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$NPU_PYTHON" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' &>/dev/null \
        || { NPU_REASON="$setup_root/.venv-npu needs a CPU-only build of torch 2.13.0: a CUDA build aborts next to torch_npu"; return 1; }
    # as in the simulator, which keeps a torchvision importable whose operators ask for CUDA, as PyPI's do
    TORCH_DEVICE_BACKEND_AUTOLOAD=0 PYTHONPATH=$setup_root/test/npu_sim/sitecustomize${PYTHONPATH:+:$PYTHONPATH} \
        "$NPU_PYTHON" -c 'import torchvision' &>/dev/null \
        || { NPU_REASON="$setup_root/.venv-npu has a torchvision that does not load beside its torch: remove that folder, and run this again"; return 1; }
    NPU_REASON=''
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    case ${1:-} in
        '' | --test) setup_env "$@"; printf '%s\n' "$PYTHON" ;;
        --npu) setup_npu_env || fail "$NPU_REASON"; printf '%s\n' "$NPU_PYTHON" ;;
        --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' -- "$0" ;;
        *) fail "unknown option $1: --test, --npu or nothing" ;;
    esac
fi
