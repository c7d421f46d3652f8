#!/usr/bin/env bash
# box.sh start|stop|status|node I|fail I|cut I|heal I: a real Slurm cluster inside one machine, for the tests. Needs root
# and Debian's slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2; no systemd, nothing in /etc but
# names of its nodes in /etc/hosts, which stop removes.
#   BOX   state folder (default /tmp/slurmbox)      NODES  number of slurmd (default 3)
#   ACCT  dbd | none (default dbd)                  CPUS/MEM per pretended node, GPUS pretended GPUs per node
#   NET   ns: every node in a network namespace of its own, which can be cut off | lo
# SLURM_CONF=$BOX/etc/slurm.conf is what its clients need.
set -u
BOX=${BOX:-/tmp/slurmbox}; NODES=${NODES:-3}; ACCT=${ACCT:-dbd}
CPUS=${CPUS:-8}; MEM=${MEM:-6000}; GPUS=${GPUS:-8}
ME=$(id -un)
export SLURM_CONF=$BOX/etc/slurm.conf
say() { printf '%6.2fs %s\n' "$(echo "$(date +%s.%N) - $T0" | bc -l 2>/dev/null || python3 -c "import time;print(time.time()-$T0)")" "$*"; }
T0=$(date +%s.%N)

wait_for() { # wait_for SECONDS cmd...
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ $SECONDS -ge $end ] && { echo "timed out: $*" >&2; return 1; }; sleep 0.1; done; }

spawn() { # spawn NAME cmd...   runs in foreground mode (-D/-F) as our child, pid kept in $BOX/run/NAME.pid
  local n=$1; shift
  setsid "$@" >"$BOX/log/$n.out" 2>&1 </dev/null & echo $! >"$BOX/run/$n.pid"; }

NET=${NET:-lo}          # lo: all nodes on 127.0.0.1x | ns: every node in a network namespace of its own (10.99.0.x), can be cut off
if [ "$NET" = ns ]; then CTLD=10.99.0.254; addr() { echo "10.99.0.$1"; }; else CTLD=127.0.0.1; addr() { echo "127.0.0.1$1"; }; fi
start_node() { # own UTS namespace (gethostname() says nodeI) and own PID namespace (killing the pid kills the whole node)
  local pre=""; [ "$NET" = ns ] && pre="nsenter --net=/run/netns/sb$1"   # not "ip netns exec": it mounts /sys anew and slurmd then finds no cgroup
  spawn "node$1" $pre unshare --uts --pid --fork --mount-proc --kill-child=KILL sh -c "hostname node$1; slurmd -D -N node$1; exit"; }
net_up() {
  [ "$NET" = ns ] || return 0; local i
  ip link add sbbr type bridge && ip addr add 10.99.0.254/24 dev sbbr && ip link set sbbr up || return 1
  for i in $(seq "$NODES"); do
    ip netns add "sb$i"; ip link add "sbv$i" type veth peer name eth0 netns "sb$i"; ip link set "sbv$i" master sbbr up
    ip -n "sb$i" link set lo up; ip -n "sb$i" addr add "10.99.0.$i/24" dev eth0; ip -n "sb$i" link set eth0 up; done; }
net_down() { local n; ip link show sbbr >/dev/null 2>&1 || return 0; for n in $(ip netns list | awk '/^sb[0-9]/{print $1}'); do ip netns del "$n"; done; ip link del sbbr; }

start() {
  rm -rf "$BOX"; mkdir -p "$BOX"/{etc,log,run,state,db}; chmod 755 "$BOX" "$BOX"/*
  # 1. names: node1..N -> 127.0.0.11.. ; jobs use them as MASTER_ADDR
  for i in $(seq "$NODES"); do
    sed "/[[:space:]]node$i\$/d" /etc/hosts >"$BOX/run/hosts"; cat "$BOX/run/hosts" >/etc/hosts; echo "$(addr "$i") node$i" >>/etc/hosts; done
  net_up || return 1
  # 2. munge, own key and socket
  dd if=/dev/urandom of="$BOX/etc/munge.key" bs=128 count=1 2>/dev/null; chmod 400 "$BOX/etc/munge.key"
  spawn munged munged -F --force --key-file="$BOX/etc/munge.key" --socket="$BOX/run/munge.sock" \
     --pid-file="$BOX/run/munged.own.pid" --log-file="$BOX/log/munged.log" --seed-file="$BOX/state/munge.seed" --num-threads=4
  wait_for 10 munge -n -S "$BOX/run/munge.sock" || return 1
  say "munged up"
  # 3. config
  cat >"$SLURM_CONF" <<C
ClusterName=lab
SlurmctldHost=localhost($CTLD)
SlurmUser=$ME
SlurmdUser=$ME
SlurmctldPort=26817
AuthType=auth/munge
AuthInfo=socket=$BOX/run/munge.sock,cred_expire=${CRED_EXPIRE:-5}
CredType=cred/munge
StateSaveLocation=$BOX/state/ctld
SlurmdSpoolDir=$BOX/state/%n
SlurmctldPidFile=$BOX/run/slurmctld.own.pid
SlurmdPidFile=$BOX/run/%n.own.pid
SlurmctldLogFile=$BOX/log/slurmctld.log
SlurmdLogFile=$BOX/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroups, no affinity, no MPI plugin
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
# declare more CPUs than the machine has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# scheduling: quick
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
# send --signal (submitit: USR2) on preemption; the default would be SIGCONT+SIGTERM, which submitit bypasses
SlurmctldParameters=${PREEMPT_SIG:-preempt_send_user_signal}
# preemption by partition priority
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# requeue and failure
JobRequeue=1
KillWait=${KILLWAIT:-2}
SlurmdTimeout=${SLURMD_TIMEOUT:-5}
SlurmctldTimeout=10
MessageTimeout=5
InactiveLimit=0
CompleteWait=0
MinJobAge=3600
# never hand out a job id twice: submitit keys its result files by job id
FirstJobId=$(( $(date +%s) % 60000000 ))
ReturnToService=2
MailProg=/bin/true
$( [ "$ACCT" = dbd ] && printf 'AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort=26819\nAccountingStoragePass=%s/run/munge.sock\n' "$BOX" || echo AccountingStorageType=accounting_storage/none )
$(for i in $(seq "$NODES"); do echo "NodeName=node$i NodeHostname=node$i NodeAddr=$(addr $i) Port=$((27000+i)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"; done)
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-10}
PartitionName=urgent Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
C
  mkdir -p "$BOX/dev"; for g in $(seq 0 $((GPUS-1))); do [ -e "$BOX/dev/gpu$g" ] || mknod "$BOX/dev/gpu$g" c 1 3; done
  echo "NodeName=node[1-$NODES] Name=gpu File=$BOX/dev/gpu[0-$((GPUS-1))]" >"$BOX/etc/gres.conf"
  : >"$BOX/etc/cgroup.conf"
  mkdir -p "$BOX/state/ctld"
  # 4. accounting: mariadb + slurmdbd
  if [ "$ACCT" = dbd ]; then
    mariadb-install-db --no-defaults --user="$ME" --datadir="$BOX/db" --auth-root-authentication-method=normal --skip-test-db >"$BOX/log/dbinst.out" 2>&1 || return 1
    say "mariadb data folder made"
    spawn mariadbd mariadbd --no-defaults --user="$ME" --datadir="$BOX/db" --socket="$BOX/run/db.sock" --pid-file="$BOX/run/db.own.pid" \
      --bind-address=127.0.0.1 --port=26306 --innodb-buffer-pool-size=64M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 --performance-schema=0
    wait_for 30 mariadb-admin --no-defaults --socket="$BOX/run/db.sock" -uroot ping || return 1
    mariadb --no-defaults --socket="$BOX/run/db.sock" -uroot -e "create database slurm_acct; create user slurm@'127.0.0.1' identified by 'slurm'; create user slurm@localhost identified by 'slurm'; grant all on slurm_acct.* to slurm@'127.0.0.1'; grant all on slurm_acct.* to slurm@localhost;" || return 1
    say "mariadbd up"
    (umask 077; cat >"$BOX/etc/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$BOX/run/munge.sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=26819
SlurmUser=$ME
PidFile=$BOX/run/slurmdbd.own.pid
LogFile=$BOX/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=26306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
C
)
    spawn slurmdbd slurmdbd -D
    wait_for 30 sacctmgr -n -i add cluster lab || return 1
    say "slurmdbd up"
  fi
  # 5. controller and nodes
  spawn slurmctld slurmctld -D
  wait_for 30 sh -c 'scontrol ping | grep -q "is UP"' || return 1
  say "slurmctld up"
  for i in $(seq "$NODES"); do start_node "$i"; done
  wait_for 30 sh -c "[ \"\$(sinfo -h -N -p train -t idle -o %N | sort -u | wc -l)\" = $NODES ]" || { sinfo -N -l; return 1; }
  say "$NODES nodes idle"
  printf 'export SLURM_CONF=%s\n' "$SLURM_CONF" >"$BOX/env.sh"
}
gone() { case "$(awk '{print $3}' "/proc/$1/stat" 2>/dev/null)" in ''|Z) return 0;; *) return 1;; esac; }   # pid 1 here reaps late: a zombie is gone
stop() {
  local n p
  for n in $(ls "$BOX/run" 2>/dev/null | grep '^node[0-9]*\.pid$'); do kill -9 "$(cat "$BOX/run/$n")" 2>/dev/null; rm -f "$BOX/run/$n"; done
  for n in slurmctld slurmdbd mariadbd munged; do
    [ -f "$BOX/run/$n.pid" ] || continue; p=$(cat "$BOX/run/$n.pid"); kill "$p" 2>/dev/null
    for _ in $(seq 100); do gone "$p" && break; sleep 0.05; done
    gone "$p" || kill -9 "$p"; rm -f "$BOX/run/$n.pid"; done
  sed "/[[:space:]]node[0-9]*\$/d" /etc/hosts >"$BOX/run/hosts" && cat "$BOX/run/hosts" >/etc/hosts
  net_down; say "stopped"
}
case ${1:-} in start) start;; stop) stop;; node) start_node "$2";;   # boot one node again
 fail) kill -9 "$(cat "$BOX/run/node$2.pid")";;   # power off one node: slurmd, slurmstepd and tasks die at once
 fail_slurmd) kill -9 "$(pgrep -f "^slurmd -D -N node$2\$")";; 
 cut) ip link set "sbv$2" down;;   # NET=ns: cut node I off the network; heal: back
 heal) ip link set "sbv$2" up;;
 status) for f in "$BOX"/run/*.pid; do p=$(cat $f); [ -d /proc/$p ] && echo "$(basename $f .pid) pid=$p rss=$(awk '/VmRSS/{print int($2/1024)"MiB"}' /proc/$p/status)"; done | grep -v own; sinfo -N -l;;
 *) echo "usage: $0 start|stop|status|node I|fail I"; exit 2;; esac
