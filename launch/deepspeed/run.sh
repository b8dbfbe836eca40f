#!/bin/bash
# Train with DeepSpeed's launcher on the hosts of a hostfile, over ssh:
#
#   launch/deepspeed/run.sh HOSTFILE configs/llama3_8b.yaml [key=value ...]
#
# DEEPSPEED_ARGS: more options of `deepspeed`, such as "--master_port 29501 --launcher pdsh".
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: launch/deepspeed/run.sh HOSTFILE CONFIG [key=value ...]" >&2; exit 2; }
hostfile=$1
shift
cd "$(dirname "$0")/../.."
# shellcheck source=launch/env.sh
source launch/env.sh

# deepspeed itself goes on with this host alone where there is no hostfile.
[ -s "$hostfile" ] || { echo "error: hostfile $hostfile is not there, or empty" >&2; exit 2; }
awk '
    /^[[:space:]]*(#|$)/ { next }
    NF != 2 || $2 !~ /^slots=[1-9][0-9]*$/ { print "error: " FILENAME ":" FNR ": \"" $0 "\" is not HOST slots=N, with N >= 1"; bad = 1; next }
    $1 in line { print "error: " FILENAME ":" FNR ": host " $1 " is on line " line[$1] " already: one line a host"; bad = 1; next }
    { line[$1] = FNR; hosts++; sub("slots=", "", $2); slots += $2 }
    END { if (!bad && !hosts) { print "error: " FILENAME " names no host"; bad = 1 }
          if (!bad) print "deepspeed: " slots " ranks on " hosts " hosts"; exit bad * 2 }' "$hostfile" >&2

read -r -a options <<< "${DEEPSPEED_ARGS:-}"
exec deepspeed --hostfile "$hostfile" "${options[@]}" --module megatronish train "$@"
