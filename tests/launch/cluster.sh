#!/bin/bash
# cluster.sh - a throw-away, real Slurm cluster of several nodes on one machine, for the tests.
#
#   cluster.sh BASE start [options]   make BASE, start munged, slurmctld and N slurmd
#   cluster.sh BASE stop              end everything that this BASE started
#   cluster.sh BASE exec CMD...       run CMD where the cluster is reachable
#   cluster.sh BASE node-exec NODE CMD...
#   cluster.sh BASE crash NODE        power loss: the node and all on it vanish, no FIN, no RST
#   cluster.sh BASE kill-slurmd NODE  only the daemon dies; tasks stay
#   cluster.sh BASE unplug|plug NODE  network link down / up
#   cluster.sh BASE freeze|thaw NODE  SIGSTOP / SIGCONT for everything on the node
#   cluster.sh BASE revive NODE       start the node again after crash or kill-slurmd
#   cluster.sh BASE pids NODE         process ids, as the host sees them, of everything on the node
#
# start options
#   -n N  real nodes, named node001.. (default 4)      -g G  fake GPUs on each (default 8)
#   -c C  CPUs each claims (default 64)                -f F  nodes gpu0001.. of partition "big" that are only planned on (State=CLOUD)
#   -x FILE  lines for slurm.conf; a key given here replaces the built-in line
#
# Every node is its own network, host name, process and mount namespace on a bridge inside one private network namespace. The host's
# file system plays the shared one; /dev/shm and /mnt are a node's own. BASE/bin holds sbatch, srun, squeue and so on that work from
# anywhere, and inside jobs. BASE/fault/NODE: the node is drained within five seconds, its first line is the reason.
# Needs root, slurm-wlm, munge, iproute2, util-linux; no systemd. Nothing outside BASE is written.
# shellcheck disable=SC2016 # what another shell is to expand
set -u
SELF=$(readlink -f "$0")
[ $# -ge 2 ] || { sed -n '2,/^# Needs/p' "$SELF"; exit 2; }
mkdir -p "$1" || exit 1
BASE=$(cd "$1" && pwd); CMD=$2; shift 2
ETC=$BASE/etc RUN=$BASE/run LOG=$BASE/log PORT=16817
export SLURM_CONF=$ETC/slurm.conf
# What the daemons are told must come from BASE, not from a job that this script is called in.
unset "${!SLURM_JOB@}" "${!SLURM_STEP@}" SLURM_NODELIST SLURM_NNODES 2>/dev/null
NODES=4 GPUS=8 CPUS=64 FAKE=0 EXTRA=""
# shellcheck disable=SC1091
[ -f "$ETC/settings" ] && . "$ETC/settings"

say() { echo "cluster: $*" >&2; }
die() { say "$*"; exit 1; }
alive() { # alive PID: exists and is no zombie
  [ -n "${1:-}" ] && [ -r "/proc/$1/stat" ] && [ "$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -c1)" != Z ]
}
gone() { ! alive "$1"; }
ours() { # a live daemon of this BASE, not a later process with the same number
  alive "$1" && { tr '\0' '\n' < "/proc/$1/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; } 2>/dev/null
}
wait_for() { # wait_for SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@" > /dev/null 2>&1; do [ $SECONDS -ge $end ] && return 1; sleep 0.05; done
}
node_no() { local n=${1#node}; echo $((10#$n)); }
node_ip() { echo "10.77.$(($1 / 250)).$(($1 % 250 + 2))"; }
all_nodes() { local i; for i in $(seq 1 "$NODES"); do printf 'node%03d\n' "$i"; done; }
bracket() { # bracket PREFIX WIDTH N -> prefix[001-004]
  if [ "$3" -eq 1 ]; then printf "%s%0${2}d" "$1" 1; else printf "%s[%0${2}d-%0${2}d]" "$1" 1 "$3"; fi
}
ctl_pid() { cat "$RUN/ctl.pid" 2>/dev/null; }
in_ctl() { # in the controller's namespaces, in the same directory
  if [ "$(readlink /proc/self/ns/net)" = "$(cat "$RUN/ctl.netns" 2>/dev/null)" ]; then "$@"; return; fi
  local p; p=$(ctl_pid); alive "$p" || die "no cluster runs in $BASE"
  nsenter -t "$p" -m -n -u -p -- bash -c 'cd "$1" && shift && exec "$@"' _ "$PWD" "$@"
}

write_config() {
  mkdir -p "$ETC" "$RUN" "$LOG" "$BASE/state" "$BASE/spool" "$BASE/bin" "$BASE/dev" "$BASE/fault" || exit 1
  local i c key real big; real=$(bracket node 3 "$NODES") big=$(bracket gpu 4 "$FAKE")
  echo "NODES=$NODES GPUS=$GPUS CPUS=$CPUS FAKE=$FAKE" > "$ETC/settings"
  [ -s "$ETC/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$ETC/munge.key")
  { echo "127.0.0.1 localhost"; echo "10.77.0.1 ctl"
    for i in $(seq 1 "$NODES"); do printf '%s node%03d\n' "$(node_ip "$i")" "$i"; done; } > "$ETC/hosts"
  # A GPU without a file is dropped; a link to /dev/null is character device enough.
  for i in 0 1 2 3 4 5 6 7; do ln -sfn /dev/null "$BASE/dev/gpu$i"; done
  { echo "AutoDetect=off"
    [ "$GPUS" -eq 1 ] && echo "NodeName=$real Name=gpu File=$BASE/dev/gpu0"
    [ "$GPUS" -gt 1 ] && echo "NodeName=$real Name=gpu File=$BASE/dev/gpu[0-$((GPUS - 1))]"
    [ "$FAKE" -gt 0 ] && echo "NodeName=$big Name=gpu File=$BASE/dev/gpu[0-7]"; } > "$ETC/gres.conf"
  echo "CgroupPlugin=cgroup/v1" > "$ETC/cgroup.conf" # never used, but slurmd loads one
  cat > "$ETC/health.sh" << EOF
#!/bin/bash
f=$BASE/fault/\${SLURMD_NODENAME:-none}
[ ! -f "\$f" ] || SLURM_CONF=$ETC/slurm.conf scontrol update nodename=\$SLURMD_NODENAME state=drain reason="HC: \$(head -1 "\$f")"
exit 0
EOF
  chmod 755 "$ETC/health.sh"
  { base_config
    for i in $(seq 1 "$NODES"); do
      printf 'NodeName=node%03d NodeHostname=node%03d NodeAddr=%s Port=%d Sockets=2 CoresPerSocket=%d RealMemory=1000000%s\n' \
        "$i" "$i" "$(node_ip "$i")" $((PORT + 2)) $((CPUS / 2)) "$([ "$GPUS" -eq 0 ] || echo " Gres=gpu:$GPUS")"
    done
    echo "PartitionName=main Nodes=$real Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE GraceTime=5"
    echo "PartitionName=urgent Nodes=$real MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF"
    # CLOUD nodes count as available without a slurmd; the resume program refuses, so they are only ever planned on.
    [ "$FAKE" -eq 0 ] || cat << EOF
PrivateData=cloud
SuspendProgram=/bin/true
ResumeProgram=/bin/false
SuspendTime=INFINITE
ResumeTimeout=30
ResumeRate=0
NodeName=$big NodeAddr=127.0.0.1 Port=$((PORT - 1)) Sockets=2 CoresPerSocket=56 ThreadsPerCore=2 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=big Nodes=$big MaxTime=7-00:00:00 PriorityTier=10
EOF
  } > "$ETC/slurm.conf"
  if [ -n "$EXTRA" ]; then
    while IFS= read -r key; do sed -i "/^$key=/Id" "$ETC/slurm.conf"; done < <(sed -n 's/^\([A-Za-z]*\)=.*/\1/p' "$EXTRA")
    cat "$EXTRA" >> "$ETC/slurm.conf"
  fi
  for c in sbatch srun salloc scontrol squeue sinfo scancel; do
    cat > "$BASE/bin/$c" << EOF
#!/bin/bash
export SLURM_CONF=$ETC/slurm.conf
real=\$(PATH=/usr/local/bin:/usr/bin:/bin command -v $c) || { echo "$c: not installed" >&2; exit 127; }
[ -n "\${SLURMD_NODENAME:-}" ] && exec "\$real" "\$@"
exec "$SELF" "$BASE" exec "\$real" "\$@"
EOF
    chmod 755 "$BASE/bin/$c"
  done
}

base_config() { # quick to notice a loss and to schedule, where production is patient; a requeued job waits cred_expire
  cat << EOF
ClusterName=onebox
SlurmctldHost=ctl(10.77.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$RUN/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MailProg=/bin/true
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=5
BatchStartTimeout=10
TCPTimeout=2
KillWait=5
UnkillableStepTimeout=180
MinJobAge=3600
JobRequeue=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,bf_continue,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,nohold_on_prolog_fail
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PriorityType=priority/basic
HealthCheckProgram=$ETC/health.sh
HealthCheckInterval=5
HealthCheckNodeState=ANY
AccountingStorageType=accounting_storage/none
TreeWidth=64
EOF
}

# ---- inside the namespaces -----------------------------------------------------------------------------------------------------------
reap_forever() { while :; do sleep 1000 & wait $!; done; }

ctl_init() { # process 1 of the controller's namespace
  mount --make-rprivate / && mount -t proc proc /proc && mount --bind "$ETC/hosts" /etc/hosts || exit 1
  mount -t sysfs sysfs /sys 2> /dev/null
  hostname ctl
  ip link set lo up
  ip link add br0 type bridge forward_delay 0 stp_state 0 && ip addr add 10.77.0.1/16 dev br0 && ip link set br0 up || exit 1
  readlink /proc/self/ns/net > "$RUN/ctl.netns"
  rm -f "$RUN/munge.sock"
  munged --force --key-file="$ETC/munge.key" --socket="$RUN/munge.sock" --pid-file="$RUN/munged.pid" \
    --log-file="$LOG/munged.log" --seed-file="$RUN/munge.seed" --num-threads=4 || exit 1
  slurmctld || exit 1
  touch "$RUN/ctl.ready"
  reap_forever
}

node_init() { # process 1 of a node's namespace
  mount --make-rprivate / && mount -t proc proc /proc || exit 1
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mkdir -p "$BASE/local/$1" "$BASE/spool/$1" && mount --bind "$BASE/local/$1" /mnt
  hostname "$1"
  ip link set lo up
  wait_for 20 ip link show eth0 || exit 1
  ip addr add "$(node_ip "$(node_no "$1")")/16" dev eth0 && ip link set eth0 up
  slurmd -N "$1"
  reap_forever
}

node_up() { # inside the controller's namespaces: start a node and plug it in
  local n=$1 u p i; i=$(node_no "$1")
  ip link del "v$i" 2> /dev/null
  setsid unshare --mount --net --uts --ipc --pid --fork --kill-child bash "$SELF" "$BASE" _node_init "$n" \
    < /dev/null > "$LOG/node.$n.log" 2>&1 &
  u=$!
  wait_for 10 pgrep -P "$u" || { say "$n did not start"; return 1; }
  p=$(pgrep -P "$u" | head -1)
  echo "$p" > "$RUN/$n.nspid"
  # Its network namespace is there when it differs from ours.
  wait_for 10 bash -c "[ \$(readlink /proc/$p/ns/net) != \$(readlink /proc/self/ns/net) ]"
  ip link add "v$i" type veth peer name eth0 netns "$p" && ip link set "v$i" master br0 up
}

node_pids() {
  local p ns; ns=$(in_ctl readlink "/proc/$(cat "$RUN/$1.nspid")/ns/pid" 2> /dev/null)
  [ -n "$ns" ] || return 0
  for p in /proc/[0-9]*; do [ "$(readlink "$p/ns/pid" 2> /dev/null)" = "$ns" ] && echo "${p#/proc/}"; done
}

nodes_ready() { [ "$(in_ctl sinfo -h -N -p main -t idle,alloc,mix -o %N | sort -u | wc -l)" -ge "$NODES" ]; }
signal_node() { local p; for p in $(node_pids "$2"); do kill "-$1" "$p"; done; }

case $CMD in
start)
  while getopts n:g:c:f:x: o; do case $o in
    n) NODES=$OPTARG ;; g) GPUS=$OPTARG ;; c) CPUS=$OPTARG ;; f) FAKE=$OPTARG ;; x) EXTRA=$OPTARG ;; *) exit 2 ;; esac; done
  [ "$(id -u)" = 0 ] || die "needs root"
  for t in munged slurmctld slurmd ip nsenter; do command -v $t > /dev/null || die "$t is not installed"; done
  alive "$(ctl_pid)" && die "already runs in $BASE"
  rm -rf "$BASE/state" "$BASE/spool" "$RUN" "$BASE/fault" "$LOG"
  write_config
  setsid unshare --mount --net --uts --ipc --pid --fork --kill-child bash "$SELF" "$BASE" _ctl_init < /dev/null > "$LOG/ctl.log" 2>&1 &
  u=$!; echo "$u" > "$RUN/unshare.pid"
  wait_for 60 test -e "$RUN/ctl.ready" -o ! -d "/proc/$u"
  [ -e "$RUN/ctl.ready" ] || die "the controller failed: $(tail -n 3 "$LOG/ctl.log")"
  pgrep -P "$u" | head -1 > "$RUN/ctl.pid"
  # shellcheck disable=SC2046
  in_ctl bash "$SELF" "$BASE" _nodes_up $(all_nodes)
  wait_for $((60 + NODES)) nodes_ready || { in_ctl sinfo -R; die "not all nodes came up"; } ;;
stop)
  p=$(ctl_pid) u=$(cat "$RUN/unshare.pid" 2> /dev/null)
  # SIGKILL to process 1 of the outer namespace ends every daemon, node and task in it.
  ours "$p" && kill -9 "$p" && wait_for 10 gone "$p"
  ours "$u" && kill -9 "$u"
  rm -f "$RUN"/*.pid "$RUN/ctl.ready" "$RUN"/*.nspid ;;
exec) in_ctl "$@" ;;
node-exec)
  n=$1; shift
  in_ctl nsenter -t "$(cat "$RUN/$n.nspid")" -a -- bash -c 'cd "$1" && shift && exec "$@"' _ "$PWD" "$@" ;;
pids) node_pids "$1" ;;
crash) in_ctl ip link set "v$(node_no "$1")" down; in_ctl kill -9 "$(cat "$RUN/$1.nspid")" ;;
kill-slurmd) "$SELF" "$BASE" node-exec "$1" bash -c 'kill -9 $(cat "$1")' _ "$RUN/slurmd.$1.pid" ;;
unplug) in_ctl ip link set "v$(node_no "$1")" down ;;
plug) in_ctl ip link set "v$(node_no "$1")" up ;;
freeze) signal_node STOP "$1" ;;
thaw) signal_node CONT "$1" ;;
revive)
  if in_ctl bash -c '[ -d "/proc/$1" ]' _ "$(cat "$RUN/$1.nspid")"; then "$SELF" "$BASE" node-exec "$1" slurmd -N "$1"
  else in_ctl bash "$SELF" "$BASE" _nodes_up "$1"; fi ;;
_ctl_init) ctl_init ;;
_node_init) node_init "$1" ;;
_nodes_up) for n in "$@"; do node_up "$n"; done ;;
*) die "unknown command $CMD" ;;
esac
