#!/usr/bin/env bash
# Speed of Twins-SVT-S on one card: 1000 steps of one epoch.
#   bash test/train_performance_1p.sh --data_path=/data/imagenet

[ "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called as sh FILE
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

kind=perf nproc=1 epochs=1 max_step=1000
parse_options "$@"
require_data_path
train
