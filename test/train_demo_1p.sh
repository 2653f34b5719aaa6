#!/usr/bin/env bash
# The whole way on a fresh machine: an environment, a small set of real images (scikit-learn's digits), training, pictures.
#   bash test/train_demo_1p.sh

[ "${BASH_VERSION:-}" ] || exec bash -- "$0" "$@" # called as sh FILE
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/common.sh"

kind=acc nproc=1 recipe=digits
parse_options "$@"
[[ ! $data_path ]] || require_data_path
setup_env
if [[ ! $data_path ]]; then
    data_path=$test_dir/output/digits
    [[ -d $data_path ]] || "$PYTHON" "$repo/tools" data digits "$data_path"
fi
train
"$PYTHON" "$repo/tools" report "$output_dir" --data-path "$data_path" --device "$device" >/dev/null
say "Loss and accuracy by epoch: $output_dir/curves.png" "Validation images with true and predicted class: $output_dir/predictions.png"
