#!/usr/bin/env bash
# Faults, on real runs of a small model on the CPU: does each end as promised? The status is 0 if it does.
#
#   bash test/faults/run.sh rank         SIGKILL of a rank: the others end, and torchrun names it
#   bash test/faults/run.sh worker       SIGKILL of a loader worker: all end with a line that names it
#   bash test/faults/run.sh torchrun     SIGKILL of torchrun: its ranks and workers end, saved
#   bash test/faults/run.sh stop         SIGSTOP of a rank: --hang-timeout names it, and the run ends
#   bash test/faults/run.sh folder [N]   two runs in one folder, N times (3): one trains, one ends with one line, nothing is damaged
#   bash test/faults/run.sh kills [N]    N runs (6) that are killed at random and go on, of three one inside a save and one with two
#                                        ranks: equal, bit for bit, to one that nobody killed?
#   bash test/faults/run.sh epochs [N]   one run of N epochs (300) with workers: memory and open files after the tenth, and their slopes

set -euo pipefail
source "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../setup_env.sh"
cd -- "$setup_root"

declare -A tests=(
    [rank]=test_the_others_end_where_a_rank_is_killed_and_torchrun_names_it
    [worker]=test_a_killed_worker_ends_all_with_a_line_that_names_it
    [torchrun]=test_ranks_and_workers_end_saved_where_torchrun_is_killed
    [stop]=test_a_stopped_rank_ends_the_run_with_a_line_that_names_it
)
name=${1:-}
case $name in
    rank | worker | torchrun | stop) words=(-m pytest -q "test/unit/test_watchdog.py::${tests[$name]}") ;;
    folder | kills | epochs) words=(test/faults/faults.py "$@") ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' -- "$0"; [[ $name == --help || $name == -h ]] && exit 0; exit 2 ;;
esac
setup_env --test
exec "$PYTHON" "${words[@]}"
