# Sourced by the script of `run_study.py --emit=xpk`, in the project's root.

# shellcheck disable=SC2034 # the script ends with it
failed=0
passed_over=" "

# `follows NAME WORKLOAD...`: whether none of the workloads before it was passed over.
follows() {
    local before
    for before in "${@:2}"; do
        if [[ "$passed_over" == *" $before "* ]]; then
            echo "$1 is skipped: $before was"
            passed_over+="$1 "
            return 1
        fi
    done
}

# `starts NAME LIMIT RUN [STEP]`: whether the triggered rate of the run it starts from is not above
# the limit.
starts() {
    local status=0
    python -c "if True:
        import pathlib, sys
        from sa_jax.study.runner import last_triggered_rate
        rate = last_triggered_rate(pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:]))
        sys.exit(3 * (rate is not None and rate > float(sys.argv[1])))" "${@:2}" || status=$?
    if [ "$status" -eq 0 ]; then return; fi
    if [ "$status" -eq 3 ]; then
        echo "$1 is skipped: its start is triggered above $2"
    else
        failed=1
    fi
    passed_over+="$1 "
    return 1
}

# `submit NAME TYPE SLICES COMMAND`; a workload that is there already is not submitted again.
submit() {
    xpk workload create --cluster "$CLUSTER" --docker-image "$IMAGE" --workload "$1" \
        --tpu-type "$2" --num-slices "$3" --command "$4" \
        --max-restarts 100 --restart-on-exit-codes 75 ||
        echo "$1 was not submitted" >&2
}

# `await NAME`
await() {
    [[ "$passed_over" == *" $1 "* ]] ||
        xpk workload list --cluster "$CLUSTER" --wait-for-job-completion "$1" || failed=1
}
