#!/bin/bash
# Runs a demo over MPI on what Slurm gives: one rank per task, as many threads as cores per task.
# Everything is asked for on the command line, from the project's folder; hosts/README.md explains:
#
#   sbatch --nodes 2 --ntasks-per-node 4 --cpus-per-task 2 --time 10 hosts/slurm_mpirun.sh hello
#   LAUNCHER=srun sbatch --nodes 2 --ntasks-per-node 4 --time 10 hosts/slurm_mpirun.sh ping_pong
#
# From the environment: VENV      what to activate (.venv)
#                       LAUNCHER  mpirun, the path of your site's mpirun, or srun (mpirun)
#SBATCH --job-name=slimlab
#SBATCH --output=%x-%j.out
set -euo pipefail

refuse() {
    echo "slurm_mpirun.sh: $1" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "not in a Slurm job: start it with sbatch"
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] || refuse "ranks per host not said: sbatch --ntasks-per-node N"
[ -z "${SLURM_GPUS_PER_TASK:-}" ] || refuse "each rank picks its GPU: --gpus-per-node, not per task"
[ $# -ge 1 ] || refuse "no demo named: sbatch ... hosts/slurm_mpirun.sh hello"
demo=$1
shift
ranks_per_host=$SLURM_NTASKS_PER_NODE
ranks=$((SLURM_JOB_NUM_NODES * ranks_per_host))
cores=${SLURM_CPUS_PER_TASK:-1}
[ "${SLURM_GPUS_ON_NODE:-$ranks_per_host}" -ge "$ranks_per_host" ] ||
    refuse "$ranks_per_host ranks per host but $SLURM_GPUS_ON_NODE GPUs: one GPU per rank"

cd "$SLURM_SUBMIT_DIR"
venv=${VENV:-.venv}
if [ -r "$venv/bin/activate" ]; then
    . "$venv/bin/activate"
fi
export OMP_NUM_THREADS=$cores
program=(python -m "slimlab.demos.$demo" "$@")

# MPICH and its relatives understand PMI-2 and one set of options, Open MPI PMIx and another.
open_mpi=$(python -c '
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print("Open MPI" in MPI.Get_library_version())')
if [ "$open_mpi" = True ]; then
    pmi=pmix
    options=(--map-by "ppr:$ranks_per_host:node:PE=$cores" --bind-to core -x PATH -x OMP_NUM_THREADS)
else
    pmi=pmi2
    options=(-ppn "$ranks_per_host" -bind-to "core:$cores")
fi

launcher=${LAUNCHER:-mpirun}
if [ "$launcher" = srun ]; then
    exec srun --mpi="$pmi" --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$ranks" \
        --ntasks-per-node="$ranks_per_host" --cpus-per-task="$cores" --cpu-bind=cores \
        --kill-on-bad-exit=1 "${program[@]}"
fi
exec "$launcher" -n "$ranks" "${options[@]}" "${program[@]}"
