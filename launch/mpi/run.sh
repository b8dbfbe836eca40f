#!/bin/bash
# Train with mpirun, one process a GPU:
#
#   launch/mpi/run.sh -np 64 --hostfile hosts -- configs/llama3_8b.yaml [key=value ...]
#
# Before `--`: options of mpirun. Ranks on several hosts need mpi4py, a Slurm allocation, or MASTER_ADDR and MASTER_PORT (host of
# rank 0, a free port there) to find each other: README.md.
set -euo pipefail
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -ge 2 ] || { echo "usage: launch/mpi/run.sh [options of mpirun] -- CONFIG [key=value ...]" >&2; exit 2; }
shift
cd "$(dirname "$0")/../.."
# shellcheck source=launch/env.sh
source launch/env.sh
# shellcheck source=launch/signals.sh
source launch/signals.sh

# Open MPI passes its environment on to other hosts only by name; MPICH's mpiexec passes all of it.
if mpirun --version 2>&1 | grep -q "Open MPI"; then
    for name in $(compgen -e | grep -E '^(NCCL_|TORCH_|PYTORCH_|OMP_NUM_THREADS$|PYTHON|HF_|GLOO_|CUDA_DEVICE_MAX|FI_|MASTER_)'); do
        options+=(-x "$name")
    done
    options+=(--bind-to none) # its default binds a rank and all its threads to one core
fi

# mpirun itself gives the ranks a second after TERM.
pass_on() { kill "-$1" "$runner" 2> /dev/null || true; }
# Ranks ignore USR1 until Python has come so far as to hold it back.
stay mpirun "${options[@]}" bash -c 'trap "" USR1; exec "$@"' _ "${PYTHON:-.venv/bin/python}" -m megatronish train "$@"
