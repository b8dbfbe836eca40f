#!/bin/bash
# Train with DeepSpeed's launcher on the hosts of a hostfile, over ssh:
#
#   launch/deepspeed/run.sh HOSTFILE configs/llama3_8b.yaml [key=value ...]
#
# DEEPSPEED_ARGS: more options of `deepspeed`, such as "--master_port 29501", or
# "--launcher openmpi --launcher_args '--mca btl_tcp_if_include eth1'".
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: launch/deepspeed/run.sh HOSTFILE CONFIG [key=value ...]" >&2; exit 2; }
hostfile=$1
shift
cd "$(dirname "$0")/../.."
# shellcheck source=launch/env.sh
source launch/env.sh
# shellcheck source=launch/signals.sh
source launch/signals.sh
python=${PYTHON:-.venv/bin/python}
fail() { echo "error: $*" >&2; exit 2; }

# deepspeed itself goes on with this host alone where there is no hostfile.
[ -s "$hostfile" ] || fail "hostfile $hostfile is not there, or empty (seen from $PWD)"
awk '
    /^[[:space:]]*(#|$)/ { next }
    NF != 2 || $2 !~ /^slots=[1-9][0-9]*$/ { print "error: " FILENAME ":" FNR ": \"" $0 "\" is not HOST slots=N, with N >= 1"; bad = 1; next }
    $1 in line { print "error: " FILENAME ":" FNR ": host " $1 " is on line " line[$1] " already: one line a host"; bad = 1; next }
    { line[$1] = FNR; hosts++; sub("slots=", "", $2); slots += $2 }
    END { if (!bad && !hosts) { print "error: " FILENAME " names no host"; bad = 1 }
          if (!bad) print "deepspeed: " slots " ranks on " hosts (hosts > 1 ? " hosts" : " host"); exit bad * 2 }' "$hostfile" >&2
mapfile -t hosts < <(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile")
slots=$(awk '!/^[[:space:]]*(#|$)/ { sub("slots=", "", $2); sum += $2 } END { print sum }' "$hostfile")

deepspeed=$(command -v "$(dirname "$python")/deepspeed" deepspeed | head -n 1) ||
    fail "there is no deepspeed beside $python or on PATH: pip install -c constraints.txt -e '.[deepspeed]'"
mapfile -t options < <(xargs -r printf '%s\n' <<< "${DEEPSPEED_ARGS:-}") # as a shell splits them, quotes and all
given=" ${options[*]} "
launcher=pdsh
[[ $given =~ \ --launcher[=\ ]([a-z]+) ]] && launcher=${BASH_REMATCH[1]}

# With one host deepspeed starts the ranks right here, whatever the host is called.
if [ ${#hosts[@]} = 1 ] && [[ ! " localhost 127.0.0.1 $(hostname) $(hostname -s) " == *" ${hosts[0]} "* ]]; then
    options+=(--force_multi)
fi

# What is wrong with the config or the number of ranks for it: once, before any rank starts.
[[ $given =~ \ --(include|exclude|num_gpus|num_nodes)|\ -[ie]\  ]] || "$python" -m megatronish config check "$@" --world "$slots" >&2

# One host that ssh does not reach would leave the ranks of all others waiting for it.
if [[ $launcher != slurm && ! $given =~ \ --no_ssh && (${#hosts[@]} -gt 1 || " ${options[*]} " == *" --force_multi "*) ]]; then
    [ "$launcher" != pdsh ] || command -v pdsh > /dev/null || fail "deepspeed starts the ranks of other hosts with pdsh, which is not \
installed: install it, or set DEEPSPEED_ARGS=\"--launcher openmpi\""
    tried=()
    for host in "${hosts[@]}"; do
        { said=$(ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" true 2>&1) ||
            fail "$hostfile: host $host is not reached by \`ssh $host true\` without a password: $(tail -n 1 <<< "$said")"; } &
        tried+=($!)
    done
    reached=yes
    for process in "${tried[@]}"; do wait "$process" || reached=no; done
    [ $reached = yes ] || exit 2
fi

# Other hosts get NCCL_* and PYTHON* of this environment; the rest goes in the file that deepspeed reads such settings from, after what
# the user has there. It is gone at once but for this open descriptor.
settings=$(mktemp)
for file in "$HOME/.deepspeed_env" .deepspeed_env "${DS_ENV_FILE:-}"; do
    if [ -f "$file" ]; then cat "$file" >> "$settings"; fi
done
for name in $(compgen -e | grep -E '^(TORCH_|PYTORCH_|OMP_NUM_THREADS$|HF_|GLOO_|CUDA_DEVICE_MAX|FI_|DS_ACCELERATOR$)'); do
    echo "$name=${!name}" >> "$settings"
done
exec 9< "$settings"
rm "$settings"
export DS_ENV_FILE=/proc/self/fd/9

# With --launcher slurm deepspeed ignores --module, with mpich it starts its own helper wrongly then.
program=(--module megatronish)
case $launcher in slurm | mpich)
    program=("$(command -v "$(dirname "$python")/megatronish" megatronish | head -n 1)") ||
        fail "there is no megatronish beside $python or on PATH: pip install -c constraints.txt -e ." ;;
esac
if [ "$launcher" = slurm ]; then
    # It would try ssh all the same; and srun would choose how many tasks a node gets.
    options=(--no_ssh_check --master_addr "${hosts[0]}" --launcher_args "--nodes=${#hosts[@]} --kill-on-bad-exit=1" "${options[@]}")
fi

# deepspeed itself would end on a signal without its ranks, or kill them. By ssh ranks are found by their command line, as deepspeed finds
# them; mpirun and srun hand a signal on.
ranks="megatronish --local_rank=[0-9]+ $(sed 's/[^A-Za-z0-9_=/ -]/./g' <<< "train $*")$"
remote=
[[ ${#hosts[@]} = 1 && " ${options[*]} " != *" --force_multi "* ]] || remote=yes
pass_on() {
    local host sent=()
    if [ "$launcher" != pdsh ]; then
        pkill "-$1" -P "$runner" || true
        return 0
    fi
    for host in "${hosts[@]}"; do
        if [ -n "$remote" ]; then ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" "pkill -$1 -f '$ranks'"; else pkill "-$1" -f "$ranks"; fi &
        sent+=($!)
    done
    for host in "${sent[@]}"; do wait "$host" || true; done
}
# Ctrl-C: at once.
trap '[ "$launcher" = pdsh ] || pkill -TERM -P "$runner"; kill -TERM "$runner"; told=yes' INT
stay "$deepspeed" --hostfile "$hostfile" "${options[@]}" "${program[@]}" train "$@"
