# shellcheck shell=bash
# Settings of the process environment, sourced by every script here. What is set already is left alone, so a site file or
# `VAR=value sbatch ...` goes first. Lines with a `#` before `export` are for sites that need them. Nothing here changes the mathematics.

# ---- threads -----------------------------------------------------------------------------------------------------------------------
# A rank's own threads are train.cpu_threads. Libraries that look here (numpy's BLAS, the tokenizer) would otherwise start a thread for
# each core, in each of 8 ranks of a node. torchrun sets the same where nothing is set.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# ---- Python ------------------------------------------------------------------------------------------------------------------------
# The Python stack of a rank that dies of a signal (docs.python.org/3/library/faulthandler.html).
export PYTHONFAULTHANDLER="${PYTHONFAULTHANDLER:-1}"
# Lines come out when they are written, not when a buffer is full: what was said last is what matters after a crash.
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
# Compute nodes often reach no network: Hugging Face libraries then wait for time-outs (huggingface.co/docs/huggingface_hub).
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# ---- compiled kernels --------------------------------------------------------------------------------------------------------------
# Triton's default is ~/.triton/cache: on a home that all nodes share, each of a thousand ranks would look up and write some ten small
# files a kernel there. On the node's own disk its ranks share one folder. Jobs after the first on a node compile nothing.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/megatronish-triton-$(id -u)}"

# ---- limits ------------------------------------------------------------------------------------------------------------------------
# Rank 0 keeps a connection open to every rank; the usual soft limit of 1,024 files ends that at a thousand. srun passes limits on.
ulimit -S -n "$(ulimit -H -n)"
# Core files of a thousand ranks fill a shared disk.
ulimit -S -c 0

# ---- NCCL (docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html) -----------------------------------------------------------
# Says why a call failed, and nothing otherwise. INFO is for looking into a problem: it prints pages a rank.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Which network carries set-up and TCP traffic, where the first one found is the wrong one. Prefixes; `=name` is exact, `^name` excludes.
# export NCCL_SOCKET_IFNAME="=eth0"
# The same for gloo, which ranks on CPU use.
# export GLOO_SOCKET_IFNAME=eth0
# Which InfiniBand adapters: those for training, not the one of storage.
# export NCCL_IB_HCA="=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7"
# On AWS (github.com/aws/aws-ofi-nccl): the fabric provider.
# export FI_PROVIDER=efa
# TORCH_NCCL_ASYNC_ERROR_HANDLING stays at its default, 3: an error of NCCL ends the process
# (docs.pytorch.org/docs/stable/torch_nccl_environment_variables.html).
# One hardware queue: kernels start in the order in which they were launched, so communication is under way before the product that
# hides it. Measure both before you keep it; it can also take concurrency away.
# export CUDA_DEVICE_MAX_CONNECTIONS=1

# ---- allocator (docs.pytorch.org/docs/stable/notes/cuda.html) --------------------------------------------------------------------
# Segments that grow: sequence lengths and microbatches of different sizes leave fewer holes. Older versions of torch read the name
# with CUDA in it.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"
