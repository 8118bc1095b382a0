"""What is special to ranks over MPI: one launch per MPI runs all cases of mpi_cases.

Importing those starts MPI, which only ranks may do: here they are known by their names.
"""

import re
from pathlib import Path

import pytest
from comm_runtimes import started_by, why_not

from slimlab.comm.launch import run_ranks

RUNTIMES = ("mpich", "openmpi")
NAMES = re.findall(r"@case\ndef (\w+)", Path(__file__).with_name("mpi_cases.py").read_text())


def program(comm):
    from mpi_cases import run_mpi_cases

    return run_mpi_cases(comm)


@pytest.fixture(scope="module", params=RUNTIMES)
def failures(request):
    """Of every case, how it failed on either rank."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    with started_by(request.param) as backend:
        first, second = run_ranks(program, 2, backend=backend, timeout_s=60)
    return {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("name", [name.replace("_", " ") for name in NAMES])
def test_over_mpi(failures, name):
    assert failures[name] == "", failures[name]
