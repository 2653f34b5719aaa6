#!/usr/bin/env bash
# To be sourced: the environment of a run on Ascend NPUs. Does nothing at all for cuda and cpu.
#
#   source test/env_npu.sh [DEVICE] [KIND]      DEVICE: npu (the default), npu:3, auto, ...; KIND: perf or acc
#
# npu without CANN is an error (status 1); auto without CANN goes on, and finds another device. Values that are already
# set stay. On platforms that set their own environment (etp_running_flag=true) the run scripts do not source this file.

npu_find_cann() { # prints the set_env.sh to source: CANN 8.5 and later, then the older names
    local file
    for file in /usr/local/Ascend/{cann,ascend-toolkit,nnae}/set_env.sh "${HOME:-}"/Ascend/{cann,ascend-toolkit,nnae,*}/set_env.sh; do
        if [[ -r $file ]]; then
            printf '%s\n' "$file"
            return
        fi
    done
    return 1
}

npu_source() { # FILE: set_env.sh reads variables that may be unset, and commands in it may fail
    local options=$-
    set +eu
    # shellcheck disable=SC1090
    source "$1"
    [[ $options != *e* ]] || set -e
    [[ $options != *u* ]] || set -u
}

npu_driver() { compgen -G '/dev/davinci[0-9]*' >/dev/null; }

npu_package() { "${PYTHON:-python3}" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch_npu"))' &>/dev/null; }

npu_environment() { # DEVICE KIND
    local cann id
    case $1 in
        npu*) ;;
        auto) npu_driver || npu_package || return 0 ;;
        *) return 0 ;;
    esac

    if [[ -z ${ASCEND_HOME_PATH:-} ]]; then # else set_env.sh was sourced already
        if cann=$(npu_find_cann); then
            npu_source "$cann"
        elif [[ $1 == auto ]]; then
            npu_driver && printf '[Warning] an NPU driver is here, but no CANN: this run takes another device\n' >&2
            # Without CANN, torch's own import of torch_npu would end every process.
            export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}
            return 0
        else
            printf '[Error] no CANN for --device=%s: source its set_env.sh first (looked in /usr/local/Ascend and %s/Ascend), or use --device=cpu\n' \
                "$1" "${HOME:-}" >&2
            return 1
        fi
    fi

    local queue=1
    [[ ${2:-} != perf ]] || queue=2
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-$queue}
    export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
    export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}
    export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
    export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}

    # The log level of the devices themselves, and many open files for the loaders: where that exists and is allowed.
    if command -v msnpureport >/dev/null; then
        for id in 0 1 2 3 4 5 6 7; do msnpureport -g error -d "$id" >/dev/null 2>&1 || true; done
    fi
    ulimit -Sn 512000 2>/dev/null || ulimit -Sn "$(ulimit -Hn)" 2>/dev/null || true
}

npu_environment "${1:-npu}" "${2:-acc}"
