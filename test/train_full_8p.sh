#!/usr/bin/env bash
# Accuracy of Twins-SVT-S on eight cards: 100 epochs.
#   bash test/train_full_8p.sh --data_path=/data/imagenet

[ "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called as sh FILE
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

kind=acc nproc=8 epochs=100
parse_options "$@"
require_data_path
train
