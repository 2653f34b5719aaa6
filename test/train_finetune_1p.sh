#!/usr/bin/env bash
# Fine-tunes Twins-SVT-S on one card: 10 epochs from the weights in a file, on any number of classes.
#   bash test/train_finetune_1p.sh --data_path=/data/other --finetune_pth=alt_gvt_small.pth

[ "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called as sh FILE
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

kind=acc nproc=1 epochs=10
parse_options "$@"
require_data_path
require_finetune_pth
train
