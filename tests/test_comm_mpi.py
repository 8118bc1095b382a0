"""What is special to ranks over MPI: one launch per MPI runs all cases of mpi_cases.

Importing those starts MPI, which only ranks may do: here they are known by their names.
"""

import re
from pathlib import Path

import pytest
import torch
from comm_runtimes import started_by, why_not

from slimlab.comm.launch import run_ranks

RUNTIMES = ("mpich", "openmpi")
NAMES = re.findall(r"@case\ndef (\w+)", Path(__file__).with_name("mpi_cases.py").read_text())


def program(comm):
    from mpi_cases import run_mpi_cases

    return run_mpi_cases(comm)


def sums_of_halves(comm):
    sums = []
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        x = torch.tensor([large if comm.rank == 0 else 1.0], dtype=dtype)
        started = comm.all_reduce(x, async_op=True).wait()
        results = [comm.all_reduce(x), comm.reduce(x, 1), started, comm.reduce_scatter(x.expand(3))]
        sums.append([(one.dtype == dtype, one.item()) for one in results if one is not None])
    return sums


def run(program, world_size, runtime):
    reason = why_not(runtime)
    if reason is not None:
        pytest.skip(reason)
    with started_by(runtime) as backend:
        return run_ranks(program, world_size, backend=backend, timeout_s=60)


@pytest.fixture(scope="module", params=RUNTIMES)
def failures(request):
    """Of every case, how it failed on either rank."""
    first, second = run(program, 2, request.param)
    return {name: first[name] + second[name] for name in first}


@pytest.mark.parametrize("name", [name.replace("_", " ") for name in NAMES])
def test_over_mpi(failures, name):
    assert failures[name] == "", failures[name]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_halves_are_added_as_float32_and_rounded_once(runtime):
    # In 16 bits 256 + 1 (2048 + 1) is 256 (2048): rounded after each addition, the sum stays there.
    for rank, (brains, floats) in enumerate(run(sums_of_halves, 3, runtime)):
        number = 4 if rank == 1 else 3
        assert brains == [(True, 258.0)] * number
        assert floats == [(True, 2050.0)] * number
