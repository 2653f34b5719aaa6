#!/usr/bin/env bash
# Sourced by train_*.sh: reads the options, runs main.py under torchrun, leaves the logs that Ascend's tools read.
#
# A script sets its defaults (kind, nproc, epochs, ...), calls parse_options "$@", checks its paths, and calls train.
# Nothing here changes the working directory: relative paths, also in options for main.py, are the caller's.

set -euo pipefail +o posix +o noclobber
trap '' PIPE # a reader of the output that ends (| head) ends no training, whose log goes on
for output in 1 2; do # a closed one: the next file that is opened would take its place
    [[ -e /dev/fd/$output ]] || eval "exec $output>/dev/null"
done

test_dir=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
repo=$(dirname -- "$test_dir")
source "$test_dir/setup_env.sh"
PYTHON='' # find_python's, not an inherited one
script=$(basename -- "$(readlink -f -- "$0")") # the script's own name where it was called through a link

# The defaults of every script; batch_size is that of one card.
kind=acc model=alt_gvt_small nproc=1 batch_size=128 epochs=1 max_step='' workers=''
data_path='' finetune_pth='' device=auto device_id='' output_dir='' resume=''
recipe='' typed=' ' # the recipe's name or file; which of all these the user has said
extra=() # the user's options for main.py

print_help() {
    local size=$batch_size length=$epochs
    [[ ! $recipe ]] || size="the recipe's" length="the recipe's"
    sed -n -e '2,/^[^#]/s/^# \{0,1\}//p' -- "$0"
    cat <<TEXT

  --data_path=FOLDER      the images: train/CLASS/*, val/CLASS/*
  --finetune_pth=FILE     weights to start from (--fine_tune_path is the same)
  --recipe=NAME|FILE      a recipe: recipes/NAME.toml, or a file of yours (now: ${recipe:-none}). What you type wins over it, it over "now"
  --device=DEVICE         npu, cuda, gpu, cpu, npu:3, cuda:1, or auto: npu, then cuda, then cpu (now: $device)
  --device_id=N           first card, and the name of the log folder (now: 0)
  --nproc=N               number of cards; on CPU, of processes (now: $nproc)
  --batch_size=N          images a card and step (now: $size)
  --epochs=N              (now: $length)
  --max_step=N            end after N steps (now: ${max_step:-no limit})
  --workers=N             loader processes a card (now: as main.py has it)
  --output_dir=FOLDER     checkpoints (now: test/output/DEVICE_ID/ckpt)
  --help                  this text
Everything else goes to main.py as it is, for example --lr=1e-3, --seed 1, --resume auto, --no-eval.
Logs: test/output/DEVICE_ID/. An earlier run's folder is moved aside, unless --resume auto goes on in it.
TEXT
}

parse_options() {
    local word name value
    command_line="$script$( (($# == 0)) || printf ' %q' "$@")"
    while (($#)); do
        word=$1 name=${1%%=*} value=''
        shift
        name=${name#--} name=${name//-/_} # --batch-size is --batch_size
        case $word in
            --help | -h) print_help; exit 0 ;;
            --*) ;;
            *) name='' ;; # the value of an option for main.py
        esac
        case $name in
            data_path | finetune_pth | fine_tune_path | device | device_id | nproc | batch_size | epochs | max_step \
                | workers | num_workers | output_dir | model | recipe) typed+="$name " ;;
            *)
                extra+=("$word")
                if [[ $name == resume ]]; then
                    if [[ $word == *=* ]]; then resume=${word#*=}; else resume=${1:-}; fi
                fi
                continue
                ;;
        esac
        if [[ $word == *=* ]]; then
            value=${word#*=}
        elif (($#)) && [[ $1 != --* ]]; then
            value=$1
            shift
        fi
        case $name in # an empty path is told by the path's own check
            data_path | finetune_pth | fine_tune_path) ;;
            *) [[ $value ]] || fail "$word needs a value: $word=VALUE" ;;
        esac
        case $name in
            fine_tune_path) finetune_pth=$value ;;
            num_workers) workers=$value ;;
            *) printf -v "$name" %s "$value" ;;
        esac
    done

    local number='^(0|[1-9][0-9]{0,8})$'
    for name in nproc batch_size epochs max_step workers device_id; do
        [[ -z ${!name} || ${!name} =~ $number ]] || fail "--$name=${!name} is not a whole number"
    done
    ((nproc > 0 && batch_size > 0)) || fail "--nproc and --batch_size must be at least 1"
    if [[ $device == *:* ]]; then # npu:3 names its card itself
        [[ -z $device_id ]] || fail "--device=$device and --device_id=$device_id both name a card: give one of them"
        [[ ${device##*:} =~ $number ]] || fail "--device=$device: the card after the colon is not a number"
        card=${device##*:}
    else
        card=${device_id:-0}
    fi
    if [[ $output_dir ]]; then make_absolute output_dir; fi
    if [[ -L $output_dir ]]; then real_path "$output_dir"; output_dir=$REAL; fi # our own link output/ckpt
}

# What the user has typed wins over the recipe, and the recipe over what the script has. Sets `settings`, options for main.py, and
# `precedence`, a line that says it.
read_recipe() {
    local option name found='' own='' mine=''
    settings=() precedence=''
    if [[ $recipe ]]; then
        found=$("$PYTHON" "$repo/options.py" "$recipe" 2>&1) || fail "$(LC_ALL=C sed 's/^error: //' <<<"$found" | tail -n 1)" 2
        settings=(--recipe "$recipe")
        for name in data_path output_dir device; do
            ! of_recipe "$name" || fail "the recipe $recipe says $name, which a script takes from its command line: --$name=${name^^}" 2
        done
    fi
    for option in model batch-size epochs max_step; do
        name=${option//-/_}
        if [[ $typed == *" $name "* ]]; then
            mine+=" --$name=${!name}"
        elif of_recipe "$name"; then
            printf -v "$name" %s "$(LC_ALL=C sed -n "s/^$name=//p" <<<"$found")"
            continue
        elif [[ ${!name} ]]; then
            own+=" --$name=${!name}"
        else
            continue
        fi
        settings+=("--$option" "${!name}")
    done
    of_recipe drop_path || settings+=(--drop-path 0.3) own+=" --drop-path=0.3"
    of_recipe dist_eval || settings+=(--dist-eval) own+=" --dist-eval"
    [[ ! $recipe ]] || precedence="recipe $recipe; what was typed wins over it:${mine:- nothing}; what it leaves to this script:${own:- nothing}"
}

of_recipe() { [[ $'\n'$found == *$'\n'"$1="* ]]; }

name_case() {
    local size=${model#*_}
    size=${size#gvt_} size=${size%_v0}
    case $model in
        alt_gvt_*) network=Twins-GVT-${size^} ;;
        pcpvt_*) network=Twins-PCPVT-${size^} ;;
        *) network=${model//[^[:alnum:]._-]/_} ;; # it names files: timm/NAME, hf-hub:OWNER/NAME
    esac
    case_name=${network}_bs${batch_size}_${nproc}p_$kind
}

make_absolute() { if [[ ${!1} != /* ]]; then printf -v "$1" %s "$PWD/${!1}"; fi; } # NAME of a variable

real_path() { # PATH: sets REAL, a newline at its end included
    REAL=$(readlink -f -- "$1" && echo .)
    REAL=${REAL%$'\n.'}
}

# The words are a convention that other people's tools look for on standard output, spelling included.
path_error() { # NAME REMEDY
    printf '[Error] para "%s" must be confing\n%s\n' "$1" "${2//[[:cntrl:]]/?}"
    exit 1
}

require_data_path() {
    [[ $data_path ]] || path_error data_path "No data set was named: add --data_path=FOLDER with the images (train/ and val/)."
    [[ -d $data_path ]] || path_error data_path "There is no folder $data_path: give --data_path=FOLDER with the images (train/ and val/)."
    make_absolute data_path
}

require_finetune_pth() {
    [[ $finetune_pth ]] || path_error finetune_pth "No weights were named: add --finetune_pth=FILE."
    [[ -f $finetune_pth ]] || path_error finetune_pth "There is no file $finetune_pth: give --finetune_pth=FILE with the weights to start from."
    make_absolute finetune_pth
}

use_python() { # a missing package ends here, a version outside the tested range is only said
    local found=0
    find_python "$repo/requirements.txt" || found=$?
    ((found < 2)) || fail "$PROBLEM: \"bash test/setup_env.sh\" makes ./.venv with all that is needed, or: pip install -r requirements.txt"
    ((found < 1)) || warn "$PROBLEM; going on with $PYTHON"
}

choose_cards() {
    [[ $device_id ]] || return 0
    local cards variable
    cards=$(seq -s , "$device_id" $((device_id + nproc - 1)))
    for variable in ASCEND_RT_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES; do
        if [[ ${!variable:-$cards} != "$cards" ]]; then
            warn "$variable=${!variable} is set and stays: --device_id=$device_id only names the log folder"
        else
            export "$variable=$cards"
        fi
    done
}

prepare_device() {
    if [[ ${etp_running_flag:-} != true ]]; then # a platform that sets its own environment says true
        source "$test_dir/env_npu.sh" "$device" "$kind" || exit 1
    fi
    case $device in # torch would import an installed torch_npu, which fails or changes what runs on CPU
        cpu* | cuda* | gpu*) export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0} ;;
    esac
    # torchrun sets 1 thread a process, which leaves cores of a CPU run idle.
    local cores
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
    export PYTHONUNBUFFERED=1 # the log is a pipe: lines come when they are printed
}

# Sets run_dir and train_log. Nothing older is deleted: an earlier run's folder gets the first free number,
# test/output/0 -> test/output/0.1. With --resume auto it stays, and the run goes on in it.
open_run_dir() {
    run_dir=$test_dir/output/$card
    train_log=$run_dir/train_$card.log
    local earlier n=1 aside='' # where an earlier run goes
    if ! mkdir -p -- "$test_dir/output" 2>/dev/null || [[ ! -w $test_dir/output ]]; then
        fail "cannot write to $test_dir/output: make it writable"
    fi
    if command -v flock >/dev/null; then # held until the last process of the run ends
        exec {lock}>"$test_dir/output/.$card.lock"
        flock -n "$lock" || fail "another run is using $run_dir: wait for it, or give this one another --device_id"
    fi
    if [[ $resume == auto && -e $run_dir ]]; then
        earlier=$(LC_ALL=C sed -n -e 's/^\[Info\] command: \([^ ]*\).*/\1/p' -- "$train_log" 2>/dev/null | tail -n 1) || true
        [[ $output_dir || ! $earlier || $earlier == "$script" ]] \
            || fail "$run_dir holds a run of $earlier, not of this script: name the file, --resume=FOLDER/ckpt/checkpoint.pth"
    elif [[ -e $run_dir ]]; then
        while [[ -e $run_dir.$n ]]; do ((n += 1)); done
        aside=$run_dir.$n
    fi
    settle_paths
    if [[ $aside ]]; then
        mv -- "$run_dir" "$aside" || fail "cannot move the earlier run $run_dir aside: make test/output writable"
        info "the earlier run is now in $aside"
    fi
    output_dir=${output_dir:-$run_dir/ckpt}
    mkdir -p -- "$run_dir" 2>/dev/null && { : >>"$train_log"; } 2>/dev/null \
        || fail "cannot write to $train_log: make the folder writable, or move it away"
}

# What this run starts from may be an earlier run's: --finetune_pth=output/ckpt/checkpoint.pth. That folder is about to
# move, and that link to point elsewhere, so files are named by where they really are (or will be).
settle_paths() {
    local i word REAL
    settle "$finetune_pth"
    finetune_pth=$REAL
    settle "$recipe"
    settings=("${settings[@]/#"$recipe"/"$REAL"}")
    for i in "${!extra[@]}"; do
        word=${extra[i]}
        case $word in
            --*=*) settle "${word#*=}"; extra[i]=${word%%=*}=$REAL ;;
            --*) ;;
            *) settle "$word"; extra[i]=$REAL ;;
        esac
    done
}

settle() { # WORD: sets REAL, to another word only for an existing file with a folder in its name
    REAL=$1
    if [[ $1 == */* && -f $1 ]]; then
        real_path "$1"
        if [[ $aside && $REAL == "$run_dir"/* ]]; then REAL=$aside${REAL#"$run_dir"}; fi
    fi
}

# Fine-tuning starts from its file, or with --resume goes on from a checkpoint of its own. A run that ended before its
# first checkpoint starts again. Adds to train's command, or takes --resume out of extra.
start_finetuning() {
    local kept=() i
    if [[ $resume && ($resume != auto || -f $output_dir/checkpoint.pth || -f $output_dir/checkpoint_best.pth) ]]; then return; fi
    for ((i = 0; i < ${#extra[@]}; i++)); do
        case ${extra[i]} in
            --resume) ((i += 1)) ;;
            --resume=*) ;;
            *) kept+=("${extra[i]}") ;;
        esac
    done
    extra=("${kept[@]}")
    command+=(--finetune "$finetune_pth")
}

link() { # TARGET NAME: the original's paths; a file or folder that is no link stays
    [[ -e $2 && ! -L $2 ]] || ln -sfn -- "$1" "$2" 2>/dev/null || true
}

train() {
    local started status=0
    started=$(date +%s)
    [[ ! ${MASTER_PORT:-} || ($MASTER_PORT =~ ^[1-9][0-9]{0,4}$ && $MASTER_PORT -lt 65536) ]] \
        || fail "MASTER_PORT=$MASTER_PORT is no port: a number from 1 to 65535, or unset it, and a free one is taken"
    [[ ${PYTHON:-} ]] || use_python
    read_recipe
    name_case
    choose_cards
    prepare_device
    open_run_dir

    # torchrun as -m starts it, but for the working directory on Python's path: a random.py there would be taken for Python's own.
    local command=("$PYTHON" -c 'import sys; sys.path[:] = filter(None, sys.path); from torch.distributed.run import main; main()' --nproc_per_node "$nproc")
    case ${MASTER_ADDR:-localhost} in
        localhost | 127.* | ::1) ;;
        *) warn "MASTER_ADDR=$MASTER_ADDR has no effect: the processes of a script are on this machine (for several machines: torchrun --nnodes=N ... main.py)" ;;
    esac
    if [[ ${MASTER_PORT:-} ]]; then
        command+=(--master_addr 127.0.0.1 --master_port "$MASTER_PORT")
    else
        command+=(--standalone) # any free port: runs can share a machine
    fi
    command+=("$repo/main.py" "${settings[@]}" --data-path "$data_path" --output_dir "$output_dir" --device "$device")
    if [[ $workers ]]; then command+=(--num_workers "$workers"); fi
    if [[ $finetune_pth ]]; then start_finetuning; fi
    command+=("${extra[@]}")

    link "output/$card/train_$card.log" "$test_dir/train_$card.log"
    link "output/$card/$case_name.log" "$test_dir/$case_name.log"
    if [[ $output_dir != "$repo/output/ckpt" ]] && mkdir -p -- "$repo/output" 2>/dev/null; then
        link "${output_dir/#"$repo/"/../}" "$repo/output/ckpt"
    fi

    json_before=$(last_json)
    log_bytes=$(wc -c 2>/dev/null <"$train_log") || log_bytes=0
    run_logged "${command[@]}" || status=$?
    write_results "$status" $(($(date +%s) - started)) || status=$((status ? status : 1))
    ((status == 0)) || show_error "$status"
    return "$status"
}

# Runs the command with its output on the terminal and in the log. Returns training's own status: torchrun makes
# every failure a 1, but says in its summary with what the processes ended.
run_logged() {
    local pid='' tee status=0 signal='' out
    trap 'signal=130; [[ ! $pid ]] || kill -TERM "$pid" 2>/dev/null' INT
    trap 'signal=143; [[ ! $pid ]] || kill -TERM "$pid" 2>/dev/null' TERM HUP USR1 # torchrun knows no USR1
    exec {out}> >(trap '' TERM HUP USR1; exec tee -ia -- "$train_log")
    tee=$!
    {
        info "command: $command_line"
        [[ ! $precedence ]] || info "$precedence"
        printf '[Info]'
        printf ' %q' "$@"
        echo
    } >&"$out"
    "$@" >&"$out" 2>&1 &
    pid=$!
    exec {out}>&-
    while true; do # a signal ends wait, not the run
        wait "$pid" && status=0 || status=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    wait "$tee" || true
    trap - INT TERM HUP USR1
    if [[ $signal ]] || ((status > 128)); then # where torchrun is killed its ranks save, too
        if logged '^Stopped in epoch .* goes on there'; then return 75; fi
        return "${signal:-$status}"
    fi
    if ((status != 1)); then return "$status"; fi
    return "$(this_run | LC_ALL=C awk '/^ *exitcode *: / { last = $3; if (last == 2 || last == 3 || last == 75) own = last }
        END { if (own) last = own; print last == "" ? 1 : last < 0 ? 128 - last : last }')"
}

this_run() { tail -c "+$((log_bytes + 1))" -- "$train_log"; }

last_json() { tail -n 1 -- "$output_dir/log.txt" 2>/dev/null || true; }

json_value() { # KEY: its value in the last line of log.txt, where that is a number
    local line
    line=$(last_json)
    if [[ $resume != auto && $line == "$json_before" ]]; then return; fi # an earlier run's
    LC_ALL=C sed -n "s/.*\"$1\": *\([-+0-9.eE]\{1,\}\)[,}].*/\1/p" <<<"$line"
}

log_value() { # EXPRESSION: what its group matches, the last time
    this_run | LC_ALL=C sed -n "s/$1/\1/p" | tail -n 1
}

number() { # FORMAT NUMBER: nothing stays nothing
    LC_ALL=C awk -v format="$1" -v number="$2" 'BEGIN { if (number != "") printf format, number }'
}

# ActualFPS is the last epoch's and TrainAccuracy the best; the original's were the mean of all lines and the last epoch's,
# which stand below. Loss is the last. By name from log.txt, else from the readable log. The log of a run that was resumed
# holds the earlier ones, too: all of them make the curve of the loss, and this one the fps.
write_results() { # STATUS SECONDS
    local fps='' mean_fps='' accuracy='' last_accuracy='' loss global_batch time='' written=true
    LC_ALL=C sed -n -e 's/^Epoch: .* loss: \([^ ]*\).*/\1/p' -- "$train_log" >"$run_dir/train_${case_name}_loss.txt" || written=
    this_run | LC_ALL=C sed -n -e 's/^Epoch: .* loss: .* fps:\([0-9.]*\).*/\1/p' >"$run_dir/train_${case_name}_fps.log" || written=
    loss=$(json_value train_loss)
    loss=$(number %.6g "${loss:-$(log_value '^Epoch: .* loss: \([^ ]*\).*')}")
    if (($1 == 0)); then
        fps=$(json_value fps)
        fps=$(number %.2f "${fps:-$(log_value '^Epoch: .* fps:\([0-9.]*\).*')}")
        mean_fps=$(LC_ALL=C awk '{ sum += $1 } END { if (NR) printf "%.2f", sum / NR }' <"$run_dir/train_${case_name}_fps.log")
        last_accuracy=$(json_value test_acc1)
        if [[ $last_accuracy ]]; then accuracy=$(json_value max_acc1); fi # else nothing was evaluated
        last_accuracy=$(number %.2f "${last_accuracy:-$(log_value '^\* Acc@1 \([0-9.]*\).*')}")
        accuracy=${accuracy:-$(log_value '^Max accuracy: \([0-9.]*\).*')}
        accuracy=$(number %.2f "${accuracy:-$last_accuracy}")
        global_batch=$(json_value global_batch)
        time=$(LC_ALL=C awk -v b="${global_batch:-$((batch_size * nproc))}" -v f="$fps" 'BEGIN { if (f > 0) printf "%.2f", b * 1000 / f }')
        info "FPS: $fps in the last epoch (ActualFPS), ${mean_fps:-none} the mean of this run's lines; accuracy: ${accuracy:-none} the best (TrainAccuracy), ${last_accuracy:-none} the last" \
            | tee -a -- "$train_log"
    fi
    cat >"$run_dir/$case_name.log" <<TEXT || written=''
Network = $network
RankSize = $nproc
BatchSize = $batch_size
DeviceType = $(uname -m)
CaseName = $case_name
ActualFPS = $fps
TrainingTime = $time
TrainAccuracy = $accuracy
ActualLoss = $loss
E2ETrainingTime = $2
MeanFPS = $mean_fps
LastAccuracy = $last_accuracy
TEXT
    say "------------------ Final result ------------------" "Final Performance images/sec : $fps" \
        "Final Train Accuracy : $accuracy" "E2E Training Duration sec : $2"
    [[ $written ]] || { warn "the results cannot be written to $run_dir: is the disk full?"; return 1; }
}

show_error() { # STATUS: what matters of the log, without torchrun's own report. First what went wrong first
    local lines='' remedy='' cause lost='the connection to the other ranks was lost' # on the ranks that nothing else happened to
    if (($1 != 130 && $1 != 143)); then
        lines=$(this_run | LC_ALL=C grep -aE '^error( \(rank [0-9]+\))?: ' | LC_ALL=C awk -v lost="$lost" '!seen[$0]++ && !index($0, lost)' | head -n 5) || true
    fi
    if (($1 == 75)); then
        [[ ! $lines ]] || say "$lines" >&2
        fail "training was stopped by a signal and saved: the same command with --resume auto goes on; its log: $train_log" 75
    fi
    if (($1 == 130 || $1 == 143)); then fail "training was stopped by a signal; its log: $train_log" "$1"; fi
    cause=$(killed_rank)
    if [[ ! $lines ]]; then
        lines=$(this_run | LC_ALL=C sed '/torch.distributed.elastic.*failed (exitcode/,$d' | LC_ALL=C grep -avE '^[IWE][0-9]{4} ') || true
        if [[ $cause || $lines == *'Traceback '* ]]; then lines=$(LC_ALL=C grep -avF -- "$lost" <<<"$lines") || true; fi
        lines=$(tail -n 15 <<<"$lines")
        remedy=$(known_remedy "$1")
    fi
    say "[Error] training ended with status $1; the end of $train_log:" "$lines" >&2
    [[ ! $cause ]] || say "[Error] $cause" >&2
    [[ ! $remedy ]] || say "[Error] $remedy" >&2
}

killed_rank() { # the first that ended, as torchrun reports it, where a signal ended it
    local rank code pid
    read -r rank code pid < <(this_run | LC_ALL=C awk '/^Root Cause/ { root = 1 } root && /^ *rank *: / { rank = $3 }
        root && /^ *exitcode *: / { code = $3; pid = $5 } END { sub(/[^0-9].*/, "", pid); print rank, code, pid }') || true
    if [[ ${code:-} == -* ]]; then echo "rank $rank (process $pid) was ended by signal ${code#-} (SIG$(kill -l "${code#-}"))"; fi
}

known_remedy() { # STATUS: for failures that main.py has no chance to explain
    if (($1 == 137)); then
        echo "a process was killed, most often for want of memory: try a smaller --batch_size or fewer --workers"
    fi
    if logged 'EADDRINUSE|[Aa]ddress already in use'; then
        echo "port ${MASTER_PORT:-} is in use: unset MASTER_PORT, and a free one is taken"
    elif logged 'Failed to load the backend extension: torch_npu'; then
        echo "torch_npu finds no CANN: source CANN's set_env.sh, or use --device=cpu"
    elif logged 'EI0006|EI0002'; then
        echo "a rank did not answer in time: look for the first error of the other ranks, or raise HCCL_CONNECT_TIMEOUT"
    fi
}

logged() { this_run | LC_ALL=C grep -aE -- "$1" >/dev/null; } # EXPRESSION. Not grep -q, which would end tail early
