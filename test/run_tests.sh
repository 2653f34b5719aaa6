#!/usr/bin/env bash
# Every check and test, each in the environment it needs, which is made if it is not there.
#
#   bash test/run_tests.sh                          ruff, unit tests, tests on simulated NPUs
#   bash test/run_tests.sh --npu real               the NPU tests on this machine's own NPUs, with its own torch_npu
#   bash test/run_tests.sh -k schedule -x           other words go to pytest
#   bash test/run_tests.sh test/unit/test_model.py  paths as well: then only these, without ruff
#
# The status is 0 if everything passed. Skipped NPU tests are a failure where CI=true.

set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup_env.sh"

npu=sim words=() unit=() npu_tests=()
while (($#)); do
    case $1 in
        --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' -- "$0"; exit 0 ;;
        --npu) npu=${2:-}; (($# < 2)) || shift ;;
        --npu=*) npu=${1#*=} ;;
        -[kmnopWc]) words+=("$1" "${2:-}"); (($# < 2)) || shift ;;
        -*) words+=("$1") ;;
        *) # FILE or FILE::TEST
            path=$(readlink -f -- "${1%%::*}") || path=''
            [[ -e $path ]] || fail "there is no $1"
            path+=${1#"${1%%::*}"}
            if [[ $path == "$setup_root"/test/npu* ]]; then npu_tests+=("$path"); else unit+=("$path"); fi
            ;;
    esac
    shift
done
[[ $npu == sim || $npu == real ]] || fail "--npu=$npu: sim or real"
chosen=$((${#unit[@]} + ${#npu_tests[@]}))
if ((chosen == 0)); then unit=(test/unit) npu_tests=(test/npu); fi

cd -- "$setup_root"
failed=() ran=0
step() { # NAME COMMAND...
    local status=0
    printf '\n=== %s\n' "$1"
    "${@:2}" || status=$?
    if ((status == 5)); then return; fi # pytest: -k left no test here
    ran=$((ran + 1))
    ((status == 0)) || failed+=("$1")
}

setup_env --test
info "Python: $PYTHON"
if ((chosen == 0)); then
    step ruff "$PYTHON" -m ruff check .
    ! command -v shellcheck >/dev/null || step shellcheck shellcheck -x -P test test/*.sh .ci/run
    ran=0
fi
if ((${#unit[@]})); then
    parallel=() # of all tests; those of a file stay in one process, since they share what is dear to make
    if ((chosen == 0 && ${#words[@]} == 0)); then parallel=(-n auto --maxprocesses 4 --dist loadfile); fi
    step "unit tests" "$PYTHON" -m pytest -q "${parallel[@]}" "${unit[@]}" "${words[@]}"
fi
if ((${#npu_tests[@]} == 0)); then
    :
elif [[ $npu == real ]]; then
    step "NPU tests" "$PYTHON" -m pytest -q "${npu_tests[@]}" --npu real "${words[@]}"
elif setup_npu_env; then
    PYTHON=$NPU_PYTHON PATH=$(dirname -- "$NPU_PYTHON"):$PATH step "NPU tests" test/npu_sim/run -n 8 "$NPU_PYTHON" -m pytest -q "${npu_tests[@]}" "${words[@]}"
else
    echo "NPU tests skipped: $NPU_REASON"
    [[ ${CI:-} != true ]] || failed+=("NPU tests (skipped)")
fi

((ran)) || failed+=("no test ran")
if ((${#failed[@]})); then
    printf -v list '%s, ' "${failed[@]}"
    fail "not passed: ${list%, }"
fi
info "everything passed"
