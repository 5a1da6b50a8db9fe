# Sourced by the batch scripts of Slurm (slurm.sbatch here, and those of `run_study.py --emit=slurm`),
# which have `--requeue` and `--signal=B:TERM@SECONDS`, and by srun.sh.

# The job as scontrol and scancel know it; of an array, this element alone.
slurm_job() {
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# `run_with TRAP COMMAND...` runs the command; at SIGTERM, TRAP. Returns the command's exit status.
run_with() {
    local child='' status on_term=$1
    shift
    # shellcheck disable=SC2064 # it is what the caller wrote
    trap "$on_term" TERM
    "$@" &
    child=$!
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait`, not the command
        wait "$child"
        status=$?
    done
    return "$status"
}

# `run_requeued COMMAND...` passes on the SIGTERM that comes before the time limit and at a
# preemption. A command that stopped after a checkpoint (75), or that a signal ended while it
# began (130, or 143 where Python had not begun), is queued again: the job runs once more, and the
# command goes on.
run_requeued() {
    local status
    # shellcheck disable=SC2016 # expanded when the signal comes
    run_with '[ -z "$child" ] || kill -TERM "$child"' "$@"
    status=$?
    case "$status" in 75 | 130 | 143) scontrol requeue "$(slurm_job)" ;; esac
    return "$status"
}
