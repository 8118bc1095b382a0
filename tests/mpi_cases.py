"""What is special to ranks over MPI, as cases that run in one launched world of two ranks."""

import os
import traceback
import warnings
from contextlib import contextmanager

import pytest
import torch
from mpi4py import MPI

from slimlab.comm import mpi_transport
from slimlab.comm.mpi import MPICommunicator
from slimlab.comm.mpi_buffers import GPU_VARIABLE, Staging, reachable
from slimlab.comm.report import (
    CommunicationError,
    MismatchError,
    UnreceivedError,
    UnwaitedError,
)
from slimlab.config import InputError

CASES = {}
LARGE = 300_001  # elements of 4 bytes: more than any MPI keeps in a buffer of its own


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


def run_mpi_cases(comm) -> dict[str, str]:
    """Run every case on every rank; of each how it failed, an empty text if it did not."""
    found = {}
    for name, function in CASES.items():
        try:
            function(comm)
            found[name] = ""
        except BaseException:  # pytest's own failures are no Exception
            found[name] = traceback.format_exc()
    return found


@contextmanager
def another(check=True, sleeps=None):
    """A communicator of all ranks of its own, which the case closes itself if it is to fail."""
    comm = MPICommunicator(MPI.COMM_WORLD.Dup(), check=check)
    if sleeps is not None:
        comm._transport.sleeps = sleeps
    yield comm
    comm.close()


def ways():
    return [(check, sleeps) for check in (True, False) for sleeps in (True, False)]


@contextmanager
def handed_to_mpi(monkeypatch):
    """Collect the addresses that MPI is handed."""
    addresses = []
    for name in ("block", "start"):
        plain = getattr(mpi_transport.Transport, name)

        def noted(self, comm, what, *args, plain=plain):
            for arg in args:
                buffer = arg[0] if isinstance(arg, list) else arg
                if isinstance(buffer, MPI.buffer):
                    addresses.append(buffer.address)
            return plain(self, comm, what, *args)

        monkeypatch.setattr(mpi_transport.Transport, name, noted)
    yield addresses
    monkeypatch.undo()


def both_ways(comm, x, out=None):
    """Rank 0 sends to rank 1, which receives."""
    if comm.rank == 0:
        comm.send(x, 1)
    if comm.rank == 1:
        return comm.recv(0, out=out)
    return None


@case
def tensors_are_handed_over_without_a_copy(comm):
    with pytest.MonkeyPatch.context() as patch, handed_to_mpi(patch) as addresses:
        x, out = torch.ones(LARGE), torch.empty(LARGE)
        both_ways(comm, x, out)
        assert (x if comm.rank == 0 else out).data_ptr() in addresses
        for call in (
            lambda: comm.all_reduce(x, out=x),
            lambda: comm.all_reduce(x, out=out),
            lambda: comm.broadcast(x, out=x),
            lambda: comm.all_gather(
                x[: LARGE // 2 + comm.rank], out=out, sizes=[LARGE // 2 + r for r in (0, 1)]
            ),
        ):
            addresses.clear()
            result = call()
            assert result.data_ptr() in addresses
        addresses.clear()
        halves = x[1:].view(2, -1)
        comm.all_to_all(halves)
        comm.reduce_scatter(halves)
        assert addresses.count(halves.data_ptr()) == 2


@case
def storages_can_still_be_resized_afterwards(comm):
    x = torch.ones(LARGE)
    tensors = [x, comm.all_reduce(x), comm.all_gather(x), comm.broadcast(x), comm.scatter(x[:2])]
    small = torch.ones(3)
    tensors += [small, comm.sendrecv(small, 1 - comm.rank, 1 - comm.rank)]
    tensors += [comm.sendrecv(x, 1 - comm.rank, 1 - comm.rank)]
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
        assert tensor.untyped_storage().nbytes() == 0


@case
def a_dtype_that_mpi_cannot_combine_is_refused_but_moved(comm):
    x = torch.ones(4).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="a dtype that MPI can combine"):
        comm.all_reduce(x)
    assert comm.all_gather(x).float().tolist() == [1.0] * 8


@case
def started_receives_get_their_own_payloads_whatever_is_waited_for_first(comm):
    lengths = [LARGE, 3, LARGE + 1, 0, 2000, LARGE + 2, 2001, LARGE + 3]
    for check, sleeps in ways():
        with another(check, sleeps) as own:
            if own.rank == 0:
                handles = [own.isend(torch.full((n,), float(n)), 1) for n in lengths]
                own.send(torch.ones(1), 1, tag=1)
                for handle in handles:
                    handle.wait()
            else:
                own.recv(0, tag=1)  # by now all headers are there
                *begun, last = [(n, own.irecv(0)) for n in lengths[:-1]]
                assert torch.equal(own.recv(0), torch.full((LARGE + 3,), LARGE + 3.0))
                for n, handle in [last, *reversed(begun)]:
                    assert torch.equal(handle.wait(), torch.full((n,), float(n)))


@case
def a_rank_that_waits_elsewhere_still_receives_what_it_has_asked_for(comm):
    x = torch.arange(float(LARGE))
    for check, sleeps in ways():
        with another(check, sleeps) as own:
            for meet in (
                own.barrier,
                lambda own=own: own.all_reduce(x),
                lambda own=own: own.all_reduce(x[:3], async_op=True).wait(),
                lambda own=own: own.split(0),
                lambda own=own: both_ways(own, x),
            ):
                handle = own.irecv(0, tag=5) if own.rank == 1 else None
                if own.rank == 0:
                    own.send(x, 1, tag=5)  # returns only when rank 1 has named its memory
                meet()
                assert handle is None or torch.equal(handle.wait(), x)


@case
def irecv_before_send_is_free_of_deadlock_for_any_size(comm):
    other = 1 - comm.rank
    for check, sleeps in ways():
        with another(check, sleeps) as own:
            for n in (0, 3, 1024, 1025, LARGE):
                for out in (None, torch.empty(n)):
                    handle = own.irecv(other, out=out)
                    own.send(torch.full((n,), float(own.rank)), other)
                    assert torch.equal(handle.wait(), torch.full((n,), float(other)))


@case
def a_message_that_does_not_fit_leaves_the_next_one_alone(comm):
    if comm.rank == 0:
        for n in (LARGE, LARGE + 1, 5, 6):
            comm.send(torch.full((n,), float(n)), 1)
    else:
        for n in (LARGE, 5):
            out = torch.zeros(n + 7)
            with pytest.raises(InputError, match=rf"from rank 0 with tag 0, float32 \({n},\)"):
                comm.recv(0, out=out)
            assert not out.any()
            assert torch.equal(comm.recv(0), torch.full((n + 1,), n + 1.0))


@case
def a_message_of_another_program_is_told_apart(comm):
    world = MPI.COMM_WORLD.Dup()
    own = MPICommunicator(world, check=False)
    if own.rank == 0:
        world.Send(bytearray(200), 1, tag=3)
    else:
        with pytest.raises(CommunicationError, match="not sent by a communicator of slimlab"):
            own.recv(0, tag=3)
    own.close()


@case
def a_skipped_call_is_found_at_the_end(comm):
    own = MPICommunicator(MPI.COMM_WORLD.Dup())
    with pytest.raises(MismatchError, match="has finished") as caught:
        own.barrier() if own.rank == 1 else own.close()
    assert "1     barrier()     line" in str(caught.value)


@case
def a_call_skipped_in_a_group_is_found_at_the_end(comm):
    own = MPICommunicator(MPI.COMM_WORLD.Dup())
    pair = own.split(0, key=-own.rank)
    with pytest.raises(MismatchError, match="has finished") as caught:
        pair.all_reduce(torch.ones(2)) if own.rank == 1 else own.close()
    assert "all_reduce(float32 (2,), op=sum) in group (1, 0)" in str(caught.value)


@case
def messages_and_handles_that_are_left_are_found_at_the_end(comm):
    own = MPICommunicator(MPI.COMM_WORLD.Dup())
    pair = own.split(0)
    if own.rank == 0:
        own.send(torch.ones(3), 1, tag=4)
        own.send(torch.ones(3), 1, tag=4)
        pair.send(torch.ones(3), 1)
    with pytest.raises(UnreceivedError) as caught:
        own.close()
    assert "rank 0 to rank 1: 2 messages with tag 4\n" in str(caught.value)
    assert "rank 0 to rank 1: one message with tag 0 in group (0, 1)\n" in str(caught.value)
    own = MPICommunicator(MPI.COMM_WORLD.Dup())
    handle = own.all_reduce(torch.ones(3), async_op=True)
    with pytest.raises(UnwaitedError, match="async_op=True"):
        own.close()
    handle.wait()


@case
def started_calls_that_differ_are_named_with_the_lines_that_started_them(comm):
    for late in (False, True):
        own = MPICommunicator(MPI.COMM_WORLD.Dup())
        good = own.all_reduce(torch.ones(3), async_op=True)
        if own.rank == 0:
            handle = own.all_reduce(torch.ones(4), async_op=True)  # too long
            own.all_reduce(torch.ones(4), async_op=True)
        else:
            handle = own.all_reduce(torch.ones(3), async_op=True)
        if late:
            assert torch.equal(good.wait(), torch.full((3,), 2.0))
        with pytest.raises(MismatchError, match="all_reduce.float32 .4,., op=sum, async") as caught:
            own.barrier() if own.rank == 1 else handle.wait()
        assert "# too long" in str(caught.value)
        assert "\n1     all_reduce(float32 (3,), op=sum, async)" in str(caught.value)


@case
def a_cut_message_names_the_call_and_the_rank_where_nothing_is_compared(comm):
    own = MPICommunicator(MPI.COMM_WORLD.Dup(), check=False)
    x = torch.ones(10 if own.rank == 0 else 4)
    if own.rank == 0:
        own.broadcast(x)
    else:
        with pytest.raises(CommunicationError) as caught:
            own.broadcast(x)
        assert "MPI failed on rank 1 in broadcast(float32 (4,), src=0)" in str(caught.value)
        assert "ranks that bring different numbers of elements" in str(caught.value)


@case
def a_tag_that_mpi_does_not_have_is_an_error_of_communication(comm):
    with another() as own:
        own._port.headers = MPI.COMM_NULL
        with pytest.raises(CommunicationError, match="MPI failed on rank . in send"):
            own.send(torch.ones(2), 1 - own.rank)
        own._transport.balance.clear()


@case
def memory_that_mpi_cannot_reach_is_staged_and_said_once(comm):
    with another() as own:
        own._staging = own._port.staging = Staging([])
        other = 1 - own.rank
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for n in (4, LARGE - 1):
                x, out = torch.full((n,), 1.0 + own.rank), torch.empty(n)
                assert torch.equal(own.all_reduce(x), torch.full((n,), 3.0))
                assert own.all_reduce(x, "mean", out=out) is out
                assert torch.equal(out, torch.full((n,), 1.5))
                assert torch.equal(
                    own.sendrecv(x, other, other, out=out), torch.full((n,), 1.0 + other)
                )
                assert out[0] == 1.0 + other
                assert torch.equal(own.reduce_scatter(x), torch.full((n // 2,), 3.0))
                assert own.all_gather(x)[::n].tolist() == [1.0, 2.0]
                assert own.scatter(x if own.rank == 1 else None, src=1)[0] == 2.0
        assert len(said) == 1
        assert "this MPI cannot reach cpu memory" in str(said[0].message)


@case
def the_variable_for_gpu_memory_overrides_what_mpi_says(comm):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GPU_VARIABLE, "1")
        assert reachable() == ["cpu", "cuda"]
        patch.setenv(GPU_VARIABLE, "0")
        assert reachable() == ["cpu"]
        patch.setenv(GPU_VARIABLE, "yes")
        with pytest.raises(InputError, match="SLIMLAB_MPI_GPU"):
            reachable()


@case
def the_variable_for_waiting_overrides_the_count_of_cores(comm):
    world = MPI.COMM_WORLD
    with pytest.MonkeyPatch.context() as patch:
        for value in ("0", "1"):
            patch.setenv(mpi_transport.SLEEP_VARIABLE, value)
            assert mpi_transport.sleeps_when_waiting(world) == (value == "1")
        patch.delenv(mpi_transport.SLEEP_VARIABLE)
        patch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
        assert mpi_transport.sleeps_when_waiting(world)
        patch.setattr(os, "sched_getaffinity", lambda _: {world.rank}, raising=False)
        assert not mpi_transport.sleeps_when_waiting(world)
