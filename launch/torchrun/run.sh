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

# SIGUSR1 would end torchrun and leave its ranks behind; its own variable for this list has no effect, the option has.
read -r -a options <<< "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 ${TORCHRUN_ARGS:-}"
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" --rdzv-backend c10d \
    --rdzv-endpoint "$first_host:${RDZV_PORT:-29500}" --rdzv-id "${RDZV_ID:-megatronish-${SLURM_JOB_ID:-0}}" "${options[@]}" \
    -m megatronish train "$@"
