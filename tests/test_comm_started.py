"""Calls that were started, and sends that wait: on threads, with every deadlock found at once."""

import torch
from comm_errors import error_of, rows_of

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import (
    DeadlockError,
    MismatchError,
    RankError,
    UnreceivedError,
    UnwaitedError,
)
from slimlab.config import InputError


def exchange(comm, length):
    other = 1 - comm.rank
    comm.send(torch.full((length,), float(comm.rank)), other)
    return comm.recv(other).sum().item()


def test_send_against_send_passes_up_to_the_eager_size():
    assert run_ranks(exchange, 2, args=(4,), eager_bytes=16) == [4.0, 0.0]
    assert run_ranks(exchange, 2, args=(100_000,)) == [100_000.0, 0.0]


def test_send_against_send_above_the_eager_size_is_a_deadlock_named_with_lines():
    error = error_of(exchange, 2, DeadlockError, args=(5,), eager_bytes=16)
    rows = rows_of(error)
    for rank in (0, 1):
        assert rows[rank][0] == f"waits in send(dst={1 - rank}, tag=0, float32 (5,))"
        assert rows[rank][1].endswith(
            "of exchange: comm.send(torch.full((length,), float(comm.rank)), other)"
        )
        assert f"rank {rank}: rank {1 - rank} does not receive with tag 0" in str(error)


def test_a_large_send_waits_until_its_message_was_received():
    trace = []

    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(100), 1)
            trace.append("sent")
        else:
            comm.recv(0, tag=0)
            trace.append("received")
            comm.barrier()
            return
        comm.barrier()

    run_ranks(program, 2, eager_bytes=0)
    assert trace == ["received", "sent"]


def test_only_the_message_that_was_received_lets_its_sender_go_on():
    def program(comm):
        if comm.rank == 0:
            sends = [comm.isend(torch.tensor(number), 1) for number in range(3)]
            for handle in sends:
                handle.wait()
            return None
        return [comm.recv(0).item() for _ in range(2)]

    error = error_of(program, 2, DeadlockError, eager_bytes=0)
    assert rows_of(error)[0][0] == "waits in wait(isend(dst=1, tag=0, int64 ()))"
    assert rows_of(error)[1][0] == "has finished"


def test_sendrecv_and_started_sends_pass_above_the_eager_size():
    def program(comm):
        other = 1 - comm.rank
        first = comm.sendrecv(torch.ones(9) * comm.rank, other, other)
        handle = comm.isend(torch.ones(9) * 2, other)
        second = comm.recv(other)
        handle.wait()
        return first.sum().item() + second.sum().item()

    assert run_ranks(program, 2, eager_bytes=0) == [27.0, 18.0]


def test_a_sendrecv_whose_message_is_not_received_is_named_as_a_sender():
    def program(comm):
        if comm.rank == 0:
            comm.sendrecv(torch.ones(9), 1, 1)
        else:
            comm.send(torch.ones(1), 0)

    text = str(error_of(program, 2, DeadlockError, eager_bytes=4))
    assert "rank 0: rank 1 does not receive with tag 0" in text


def test_waiting_for_a_started_receive_names_what_was_started():
    def program(comm):
        if comm.rank == 0:
            handle = comm.irecv(1, tag=3)
            comm.all_reduce(torch.ones(1))
            handle.wait()
        else:
            comm.all_reduce(torch.ones(1))

    error = error_of(program, 2, DeadlockError)
    rows = rows_of(error)
    assert rows[0][0] == "waits in wait(irecv(src=1, tag=3))"
    assert rows[0][1].endswith("of program: handle.wait()")
    assert "rank 0: no message with tag 3 from rank 1 is under way" in str(error)


def test_a_message_that_an_earlier_irecv_claims_is_said_to_be_claimed():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(2), 1)
        else:
            comm.irecv(0)
            comm.recv(0)

    text = str(error_of(program, 2, DeadlockError))
    assert (
        "rank 1: but one of shape (2,) with tag 0 from rank 0 lies there, for an irecv that was "
        "begun before" in text
    )


def test_started_all_reduces_in_other_orders_are_named_with_the_lines_that_started_them():
    def program(comm):
        if comm.rank == 1:
            handles = [comm.all_reduce(torch.ones(n), async_op=True) for n in (3, 2)]  # odd
        else:
            handles = [comm.all_reduce(torch.ones(n), async_op=True) for n in (2, 3)]
        comm.barrier()
        return [handle.wait() for handle in handles]

    error = error_of(program, 3, MismatchError)
    rows = rows_of(error)
    assert [rows[rank][0] for rank in range(3)] == [
        f"all_reduce(float32 ({n},), op=sum, async)" for n in (2, 3, 2)
    ]
    assert rows[1][1].endswith("# odd")
    assert "(2, 3)]" in rows[0][1]


def test_a_started_all_reduce_against_another_collective_names_both():
    def program(comm):
        if comm.rank == 0:
            comm.all_reduce(torch.ones(2), async_op=True)
            return comm.recv(1)  # where it waits when the others meet
        return comm.barrier()

    error = error_of(program, 3, MismatchError)
    rows = rows_of(error)
    assert rows[0][0] == "all_reduce(float32 (2,), op=sum, async)"
    assert rows[0][1].endswith("of program: comm.all_reduce(torch.ones(2), async_op=True)")
    assert rows[1][0] == "barrier()"


def test_a_call_that_was_never_waited_for_is_an_error_with_its_line():
    def program(comm):
        comm.all_reduce(torch.ones(2), async_op=True)
        if comm.rank == 1:
            comm.isend(torch.ones(3), 0, tag=7)
        else:
            comm.recv(1, tag=7)

    text = str(error_of(program, 2, UnwaitedError))
    assert "rank 0: all_reduce(float32 (2,), op=sum, async), started at line" in text
    assert "of program: comm.all_reduce(torch.ones(2), async_op=True)" in text
    assert "rank 1: isend(dst=0, tag=7, float32 (3,)), started at line" in text
    assert "change: call wait() of every handle" in text


def test_a_started_receive_that_was_never_waited_for_leaves_its_message():
    def program(comm):
        if comm.rank == 1:
            comm.send(torch.ones(3), 0)
        else:
            comm.irecv(1)

    text = str(error_of(program, 2, UnreceivedError))
    assert "rank 1 to rank 0: one of shape (3,) with tag 0" in text
    assert "rank 0: irecv(src=1, tag=0), started at line" in text


def test_a_started_collective_that_a_rank_skips_is_found_at_the_end():
    def program(comm):
        if comm.rank != 1:
            comm.all_reduce(torch.ones(2), async_op=True)

    error = error_of(program, 3, MismatchError)
    rows = rows_of(error)
    assert "unequal numbers of collectives" in str(error)
    assert rows[1] == ["has finished", ""]
    assert rows[0][0] == "all_reduce(float32 (2,), op=sum, async)"
    assert "the odd one: rank 1\n" in str(error)


def test_a_receive_into_a_buffer_of_another_shape_is_an_error_when_it_is_waited_for():
    def program(comm):
        if comm.rank == 1:
            comm.send(torch.ones(3), 0)
            return
        handle = comm.irecv(1, out=torch.ones(4))
        handle.wait()

    error = error_of(program, 2, RankError)
    assert isinstance(error.__cause__, InputError)
    assert "an out for the message from rank 1 with tag 0, float32 (3,)" in str(error)
    assert str(error).endswith("of program: handle.wait()")
