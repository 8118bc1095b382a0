"""Start MPI in this process, if its library belongs to the launcher; end it.

Chapter 07 tells what happens otherwise: with the launcher of another MPI every rank is rank 0 of a
world of one, computes everything alone, and nobody says a word. Such a world is refused here.

mpi4py starts MPI when it is imported; here it is told to wait, so that the library can be asked who
it is before.
"""

import ctypes
import os
import re
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from slimlab.comm.base import Communicator
from slimlab.comm.launchers import Launcher, launcher_of, mpi_family
from slimlab.config import InputError, require

# Set by run_ranks for its ranks: the library of the mpirun that it has found.
LIBRARY_VARIABLE = "SLIMLAB_LIBMPI"
INSTALL = "python -m pip install mpi4py mpich"


def connect_mpi(world_size: int, *, check: bool) -> Communicator:
    """Start MPI and make the communicator of all ranks.

    world_size  number of ranks that there must be
    check       compare the ranks' calls before each collective

    Communicates: every rank must call it.
    Raises InputError as start_mpi does.
    """
    start_mpi(world_size)
    from slimlab.comm.mpi import world_communicator

    return world_communicator(check=check)


def start_mpi(world_size: int | None) -> ModuleType:
    """Start MPI in this process, unless it runs already, and return mpi4py's module.

    world_size  number of ranks that there must be; None: as many as the launcher says

    Communicates: every rank must call it.
    Raises InputError if MPI is missing, or is another than the launcher's.
    """
    MPI = load_mpi()
    launcher = launcher_of(os.environ)
    library = MPI.Get_library_version().partition("\0")[0]
    if not MPI.Is_initialized():
        _check_before(launcher, library)
        if launcher.family == "MPICH":
            # mpirun in a shell that srun has started. MPICH ends a process that hears of both.
            os.environ.pop("PMIX_NAMESPACE", None)
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    expected = launcher.world_size if world_size is None else world_size
    size = MPI.COMM_WORLD.size
    require(
        expected is None or size == expected,
        f"a world of {expected} ranks, as {launcher.name} has started",
        f"MPI, which is {_short(library)}, sees {size}",
        _change(library),
    )
    _forget_shared_memory(MPI)
    return MPI


def load_mpi() -> ModuleType:
    """Import mpi4py's MPI without starting it, and return it.

    Raises InputError if mpi4py or a library of MPI is missing.
    """
    if os.environ.get(LIBRARY_VARIABLE):
        # With its names in reach of all, mpi4py takes this library and looks for no other.
        ctypes.CDLL(os.environ[LIBRARY_VARIABLE], ctypes.RTLD_GLOBAL)
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise InputError(
            "mpi4py, and a library of MPI that it can load", str(error).partition("\n")[0], INSTALL
        ) from error
    return MPI


def _forget_shared_memory(MPI: ModuleType) -> None:
    """Take away the name of the memory that MPICH's ranks share, so that it goes with the last one.

    A rank that is killed would leave it, 2 MB each time; containers have 64 MB of such memory.
    """
    MPI.COMM_WORLD.Barrier()  # until then a rank may still need the name
    with suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for path in set(re.findall(r"(/dev/shm/mpich_shm_\w+)$", maps, re.MULTILINE)):
            with suppress(FileNotFoundError):
                os.unlink(path)


def end_mpi() -> None:
    """End MPI in this process, if it runs."""
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()


def _check_before(launcher: Launcher, library: str) -> None:
    """Refuse what would make MPI end the process when it starts."""
    ours = mpi_family(library)
    foreign = launcher.family == "Open MPI" and ours == "MPICH"
    # An MPICH that knows PMIx says so among its options.
    foreign = foreign or ("PMIx" in launcher.name and ours == "MPICH" and "pmix" not in library)
    require(
        not foreign,
        f"a library of MPI that {launcher.name} can start",
        f"mpi4py loads {_short(library)}",
        _change(library),
    )


def _change(library: str) -> str:
    if mpi_family(library) == "MPICH":
        return (
            "start the program with MPICH's mpirun, which lies beside python where pip has put it, "
            "or with srun --mpi=pmi2; or install mpi4py for the MPI of this launcher"
        )
    return (
        "start the program with the mpirun of the MPI that mpi4py loads, or with srun --mpi=pmix; "
        "or install mpi4py for the MPI of this launcher"
    )


def _short(library: str) -> str:
    return " ".join(library.partition("\n")[0].split())[:60]
