"""Who has started this process: mpirun, srun, torchrun or nobody; and which mpirun there is.

Chapter 07 starts programs from outside; slimlab.comm.connect asks here how. Each launcher tells its
ranks who they are by variables of its own. Production programs leave this to their libraries, each
of which knows some launchers, and takes itself for the only rank under the others.
"""

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# A path to the mpirun that run_ranks is to use.
CHOICE_VARIABLE = "SLIMLAB_MPIRUN"
TORCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launcher:
    """Who has started this process.

    kind        "torch", "mpi" or "alone"
    name        for messages
    world_size  number of ranks it has started; None: it does not say
    family      which MPI it belongs to, "MPICH" or "Open MPI"; "": any, or none
    """

    kind: str
    name: str
    world_size: int | None
    family: str = ""


def launcher_of(environment: Mapping[str, str]) -> Launcher:
    """Find out who has started a process.

    environment  its variables
    """

    def size(name: str) -> int | None:
        return int(environment[name]) if environment.get(name, "").isdigit() else None

    # torchrun may itself have been started by srun, so its variables come first; mpirun may start
    # its helpers by srun, so Slurm's come last. A batch script sees SLURM_NTASKS and is alone.
    if all(name in environment for name in TORCH_VARIABLES):
        return Launcher("torch", "torchrun", size("WORLD_SIZE"))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return Launcher("mpi", "Open MPI's mpirun", size("OMPI_COMM_WORLD_SIZE"), "Open MPI")
    steps = size("SLURM_STEP_NUM_TASKS")
    if "PMI_SIZE" in environment:
        name = "srun" if "SLURM_STEP_NUM_TASKS" in environment else "MPICH's mpirun"
        return Launcher("mpi", f"{name} (PMI)", size("PMI_SIZE"), "MPICH")
    if steps == 1 and environment.get("PMIX_NAMESPACE", "").startswith("slurm."):
        return Launcher("alone", "srun with one task", 1)  # also all that a shell of srun starts
    if "PMIX_RANK" in environment:
        return Launcher("mpi", "srun (PMIx)" if steps else "a launcher with PMIx", steps)
    if steps is not None and steps > 1:
        return Launcher("mpi", "srun", steps)
    return Launcher("alone", "nobody", 1)


def rank_in(environment: Mapping[str, str]) -> int:
    """Return the rank that an MPI launcher has given to a process.

    environment  its variables
    """
    names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
    return next(int(environment[name]) for name in names if name in environment)


def find_mpirun() -> str | None:
    """Return the mpirun of SLIMLAB_MPIRUN, else the one beside this Python, else on the PATH."""
    chosen = os.environ.get(CHOICE_VARIABLE)
    if chosen:
        return chosen if Path(chosen).is_file() and os.access(chosen, os.X_OK) else None
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("mpirun")


def mpi_family(text: str) -> str:
    """Return which MPI a text speaks of: "Open MPI", "MPICH", or nothing.

    text  what a library or a launcher says of its version
    """
    if re.search(r"open ?mpi|open-?rte|prrte", text, re.IGNORECASE):
        return "Open MPI"
    return "MPICH" if re.search(r"mpich|hydra", text, re.IGNORECASE) else ""
