#!/bin/bash
# Is this node fit to train? One line, `HOST ok` or `HOST bad: REASON; REASON`, and exit code 0. Needs no root.
# EXPECT_GPUS: how many it must have (not looked at where it is 0). NODE_CHECK: a command of the site's own; bad if it fails.
set -u
bad=()

if [ "${EXPECT_GPUS:-0}" -gt 0 ] && command -v nvidia-smi > /dev/null; then
    # A GPU that has fallen off the bus makes nvidia-smi hang, or list fewer.
    if ! listed=$(timeout 30 nvidia-smi --query-gpu=ecc.errors.uncorrected.volatile.total --format=csv,noheader); then
        bad+=("nvidia-smi does not answer")
    else
        [ "$(wc -l <<< "$listed")" -eq "$EXPECT_GPUS" ] || bad+=("$(wc -l <<< "$listed") GPUs, not $EXPECT_GPUS")
        ! grep -q '[1-9]' <<< "$listed" || bad+=("uncorrected memory errors since the driver was loaded")
    fi
elif [ "${EXPECT_GPUS:-0}" -gt 0 ]; then
    bad+=("no nvidia-smi")
fi
# Ranks of a node talk through shared memory.
[ "$(df --output=avail -k /dev/shm | tail -n 1)" -ge $((${MIN_SHM_MIB:-64} * 1024)) ] || bad+=("less than ${MIN_SHM_MIB:-64} MiB in /dev/shm")
probe=$(mktemp 2> /dev/null) && rm -f "$probe" || bad+=("cannot write to ${TMPDIR:-/tmp}")
[ -r launch/env.sh ] || bad+=("does not see $PWD")
if [ -n "${NODE_CHECK:-}" ] && ! said=$(timeout 120 bash -c "$NODE_CHECK" 2>&1); then
    bad+=("NODE_CHECK failed${said:+: $(tail -n 1 <<< "$said")}")
fi

host=${SLURMD_NODENAME:-$(hostname)}
if [ ${#bad[@]} -eq 0 ]; then
    echo "$host ok"
else
    reasons=$(printf '%s; ' "${bad[@]}")
    echo "$host bad: ${reasons%; }"
fi
