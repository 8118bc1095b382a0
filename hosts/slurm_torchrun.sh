#!/bin/bash
# Runs a demo under torchrun on what Slurm gives: one torchrun per host, one rank per task.
# Everything is asked for on the command line, from the project's folder; hosts/README.md explains:
#
#   sbatch --nodes 2 --ntasks-per-node 4 --cpus-per-task 2 --time 10 hosts/slurm_torchrun.sh hello
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 --time 10 hosts/slurm_torchrun.sh ping_pong
#
# From the environment: VENV  what to activate (.venv)
#SBATCH --job-name=slimlab
#SBATCH --output=%x-%j.out
set -euo pipefail

refuse() {
    echo "slurm_torchrun.sh: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "not in a Slurm job: start it with sbatch"
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || refuse "ranks per host not said: sbatch --ntasks-per-node N"
[ -z "${SLURM_GPUS_PER_TASK:-}" ] || refuse "each rank picks its GPU: --gpus-per-node, not per task"
[ $# -ge 1 ] || refuse "no demo named: sbatch ... hosts/slurm_torchrun.sh hello"
demo=$1
shift
ranks_per_host=$SLURM_NTASKS_PER_NODE
cores=${SLURM_CPUS_PER_TASK:-1}
[ "${SLURM_GPUS_ON_NODE:-$ranks_per_host}" -ge "$ranks_per_host" ] ||
    refuse "$ranks_per_host ranks per host but $SLURM_GPUS_ON_NODE GPUs: one GPU per rank"

cd "$SLURM_SUBMIT_DIR"
venv=${VENV:-.venv}
if [ -r "$venv/bin/activate" ]; then
    . "$venv/bin/activate"
fi
export OMP_NUM_THREADS=$cores

# This script runs on the job's first host, so a port that is free here is free for the rendezvous.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT=$(python - "$SLURM_JOB_ID" <<'END'
import socket
import sys

FIRST, COUNT = 20000, 10000  # below the ports that systems give to outgoing connections
for step in range(COUNT):
    port = FIRST + (int(sys.argv[1]) + step) % COUNT
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    print(port)
    break
else:
    sys.exit(f"no free port from {FIRST} to {FIRST + COUNT - 1}")
END
)

exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$((ranks_per_host * cores))" --cpu-bind=none --kill-on-bad-exit=1 \
    torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks_per_host" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
    -m "slimlab.demos.$demo" "$@"
