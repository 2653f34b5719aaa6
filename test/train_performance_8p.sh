#!/usr/bin/env bash
# Speed of Twins-SVT-S on eight cards: 1000 steps of one epoch.
#   bash test/train_performance_8p.sh --data_path=/data/imagenet

[ "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called as sh FILE
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

kind=perf nproc=8 epochs=1 max_step=1000
parse_options "$@"
require_data_path
train
