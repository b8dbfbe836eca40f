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
# shellcheck source=launch/signals.sh
source launch/signals.sh
read -r -a options <<< "${TORCHRUN_ARGS:-}"

port=${RDZV_PORT:-$((${SLURM_JOB_ID:-0} > 0 ? 20000 + ${SLURM_JOB_ID:-0} % 20000 : 29500))}
# One of its own for each run: agents of another run at the same place do not count.
id=${RDZV_ID:-megatronish-${SLURM_JOB_ID:-$(cksum <<< "$*" | cut -d " " -f 1)}}
echo "torchrun: $nodes x $processes ranks meet at $first_host:$port as $id (RDZV_PORT and RDZV_ID set others)" >&2

# torchrun itself would give the ranks 30 s after TERM, and end without them on USR1. Before there are any, it ends.
had_ranks=
pass_on() {
    if pkill "-$1" -P "$runner"; then had_ranks=yes; elif [ -z "$had_ranks" ]; then kill -TERM "$runner" 2> /dev/null || true; fi
}
stay "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-backend c10d \
    --rdzv-endpoint "$first_host:$port" --rdzv-id "$id" "${options[@]}" -m megatronish train "$@"
