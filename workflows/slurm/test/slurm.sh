#!/usr/bin/env bash
# A whole SLURM on this machine, on loopback, for tests:  slurm.sh start DIR | slurm.sh stop DIR
# Needs root and Debian's packages slurm-wlm and munge. Then: export SLURM_CONF=DIR/slurm.conf
set -euo pipefail
action=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)

stop() {
    for daemon in slurmd slurmctld munged; do
        if [ -f "$dir/$daemon.pid" ]; then
            kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true
            rm -f "$dir/$daemon.pid"
        fi
    done
}

start() {
    chmod 755 "$dir"
    mkdir -p "$dir/state" "$dir/spool"
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    (umask 077 && head -c 1024 /dev/urandom > "$dir/munge.key")
    cat > "$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$dir/slurm.conf
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" \
        --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
    slurmctld
    slurmd
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then return; fi
        sleep 0.2
    done
    sinfo >&2 || true
    tail -5 "$dir"/*.log >&2
    stop
    return 1
}

"$action"
