#!/bin/bash
# Train with torchrun: the same command on every node, with the same FIRST_HOST:
#
#   launch/torchrun/run.sh NODES PROCESSES_PER_NODE FIRST_HOST configs/llama3_8b.yaml [key=value ...]
#
# TORCHRUN_ARGS: more options, such as "--max-restarts 3". In a Slurm job: srun --ntasks-per-node=1 launch/torchrun/run.sh ...
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: launch/torchrun/run.sh NODES PROCESSES_PER_NODE FIRST_HOST CONFIG [key=value ...]" >&2; exit 2; }
nodes=$1 processes=$2 first_host=$3
shift 3
cd "$(dirname "$0")/../.."
# shellcheck source=launch/env.sh
source launch/env.sh
read -r -a options <<< "${TORCHRUN_ARGS:-}"

# Signals are the ranks': they save and end, or say what they are doing. torchrun itself would give them 30 s, or end without them.
agent=
# shellcheck disable=SC2317 # called by trap
pass_on() {
    told=yes
    [ -z "$agent" ] || pkill "-$1" -P "$agent" || kill -TERM "$agent" 2> /dev/null || true # no ranks yet
}
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM INT
# Ranks ignore USR1 until Python has come so far as to hold it back.
(
    trap '' USR1
    exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-backend c10d \
        --rdzv-endpoint "$first_host:${RDZV_PORT:-29500}" --rdzv-id "${RDZV_ID:-megatronish-${SLURM_JOB_ID:-0}}" "${options[@]}" \
        -m megatronish train "$@"
) &
agent=$!
while :; do
    told=no
    wait "$agent" && code=0 || code=$?
    [ "$told" = yes ] || exit "$code"
done
