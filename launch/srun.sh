#!/usr/bin/env bash
# srun for a command that saves a checkpoint at SIGTERM. srun itself kills its tasks at that signal;
# here each task gets it.
# shellcheck source=launch/slurm.sh
. "$(dirname "${BASH_SOURCE[0]}")/slurm.sh"
# shellcheck disable=SC2016 # expanded when the signal comes
run_with 'scancel --signal=TERM "$(slurm_job)"' srun --kill-on-bad-exit=1 "$@"
