#!/usr/bin/env bash
# Does what users do work with another torch or Python? Makes an environment, does all of it in a copy of this repository, on
# the digits and the CPU, and prints a row of README's table "Tried with". Needs a package index that has this torch.
#
#   bash test/versions.sh TORCH [PYTHON]   2.7.1, 2.13.0+cpu (a CPU-only build); PYTHON: python3.10, or a path (now: the current one)
#     --units                              the unit tests too
#     --env=FOLDER                         make the environment there and keep it, or use the one that is there
#
# Done: doctor, the scripts on one and four processes, resuming, evaluating, fine-tuning to other classes, shards, report, bench,
# conformance.
# The status is 0 if everything worked; the logs of a step that did not are shown.

set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/setup_env.sh"

torch='' base='' env='' units=''
while (($#)); do
    case $1 in
        --help | -h) sed -n '2,/^[^#]/s/^# \{0,1\}//p' -- "$0"; exit 0 ;;
        --units) units=true ;;
        --env=*) env=${1#*=} ;;
        -*) fail "unknown option $1: see --help" 2 ;;
        *) if [[ ! $torch ]]; then torch=$1; elif [[ ! $base ]]; then base=$1; else fail "unknown word $1: see --help" 2; fi ;;
    esac
    shift
done
[[ $torch =~ ^[0-9]+\.[0-9]+\.[0-9]+(\+[a-z0-9.]+)?$ ]] || fail "say which torch, as 2.7.1: see --help" 2
base=$(base_python ${base:+"$base"}) || fail "no Python of version 3.10 or newer that can make an environment"
torchvision=$(cd -- "$setup_root" && "$base" -c 'import sys, versions; print(versions.TORCHVISION.get(versions.plain(sys.argv[1]), ""))' "$torch")

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
env=$(realpath -m -- "${env:-$work/env}")
info "installing torch $torch and the requirements into $env, which takes some minutes"
make_env "$env" "$base" -q "torch==$torch" "torchvision${torchvision:+==$torchvision}" -r "$setup_root/requirements.txt" -r "$setup_root/test/requirements.txt" \
    || fail "torch $torch could not be installed (pip's last lines above say why)"

# The scripts find the environment's python first, and leave their logs in the copy.
mkdir -- "$work/repo"
(cd -- "$setup_root" && cp -r -- *.py *.toml *.md requirements.txt recipes published tools test "$work/repo/" && rm -rf -- "$work/repo/test/output")
cd -- "$work/repo"
export PATH=$env/bin:$PATH TORCH_DEVICE_BACKEND_AUTOLOAD=0
failed=()
try() { # NAME COMMAND...: at most 30 minutes, since a hang is one of the things to find
    local status=0
    timeout 1800 "${@:2}" </dev/null >"$work/$1.log" 2>&1 || status=$?
    if ((status == 0)); then info "$1: worked"; return; fi
    tail -n 15 -- "$work/$1.log" >&2
    warn "$1: status $status"
    failed+=("$1")
}
last() { [[ ! -e $work/$1.log ]] || sed -n "s/^$2.*/\1/p" "$work/$1.log" | tail -n 1; } # LOG EXPRESSION: what its group matches

small=(--device=cpu --input-size=32 --workers=1 --batch_size=16)
plain=(--model alt_gvt_small --data-path digits --device cpu --input-size 32 --batch-size 16 --num_workers 1 --lr 4e-3
    --warmup-epochs 0 --sched-lag 0 --aa none --hflip 0 --mixup 0 --cutmix 0 --reprob 0 --max_step 20 --print-freq 5)
try digits python tools data digits digits
mkdir few few/train few/val
for split in train val; do cp -r digits/$split/[0-4] few/$split/; done
try doctor python tools doctor --device cpu --data-path digits --num_workers 1 --batch-size 8
try performance bash test/train_performance_1p.sh --data_path=digits "${small[@]}" --max_step=8
try four_processes bash test/train_full_8p.sh --nproc=4 --data_path=digits "${small[@]}" --epochs=1 --max_step=4 --output_dir=ckpt4
try train python main.py "${plain[@]}" --epochs 1 --output_dir run
try resume python main.py "${plain[@]}" --epochs 2 --resume auto --output_dir run
try evaluate python main.py --eval --resume run/checkpoint.pth "${plain[@]:0:12}"
try finetune bash test/train_finetune_1p.sh --data_path=few --finetune_pth=run/checkpoint.pth "${small[@]}" --epochs=1 --max_step=8
try shards python tools data shards digits shards
try train_shards python main.py "${plain[@]}" --data-path shards --epochs 1 --output_dir shards_run
try report python tools report run --data-path digits --device cpu
try bench python tools bench --batch-size 2 --input-size 64 --steps 2
try conformance python tools conformance
if [[ $units ]]; then try units python -m pytest -q test/unit; fi

python - "$(last train '.*\[19\/20\].*loss: [0-9.]* (\([0-9.]*\))')" "$(last evaluate '\* Acc@1 \([0-9.]*\)')" \
    "$( ((${#failed[@]})) && printf '%s ' "${failed[@]}" || echo all)" "$(last units '\([0-9]* passed.*\) in')" <<'PYTHON'
import platform
import sys
from importlib.metadata import version

loss, accuracy, worked, units = sys.argv[1:]
worked = worked if worked == "all" else f"not: {worked.strip()}"
print("| torch, torchvision | Python | timm, numpy, Pillow | loss after 20 steps | Acc@1 | worked | unit tests |\n|---|---|---|---|---|---|---|")
print(f"| {version('torch')}, {version('torchvision')} | {platform.python_version()} | {version('timm')}, {version('numpy')}, "
      f"{version('Pillow')} | {loss} | {accuracy} | {worked} | {units or 'not run'} |")
PYTHON
((${#failed[@]} == 0)) || fail "with torch $torch not everything worked: ${failed[*]}"
