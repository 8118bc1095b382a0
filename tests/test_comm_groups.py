"""Groups and collectives of ranks in threads that go wrong: what is said, in ranks of the world."""

import pytest
import torch
from comm_errors import error_of, rows_of

from slimlab.comm import threads
from slimlab.comm.launch import run_ranks
from slimlab.comm.report import DeadlockError, MismatchError, RankError, UnreceivedError
from slimlab.config import InputError


def test_a_deadlock_in_a_group_names_ranks_of_the_world():
    def program(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank != 3:
            group.barrier()

    error = error_of(program, 5, DeadlockError)
    rows = rows_of(error)
    assert rows[1][0] == "waits in barrier() in group (1, 3)"
    assert [rows[rank][0] for rank in (0, 2, 3, 4)] == ["has finished"] * 4
    assert "barrier: every rank of group (1, 3) must call it; missing: rank 3" in str(error)


def test_a_receive_in_a_group_that_nobody_answers_names_ranks_of_the_world():
    def program(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank == 3:
            comm.send(torch.ones(2), 1, tag=6)  # in the world: does not reach the group
        if comm.rank == 1:
            group.recv(1, tag=6)

    error = error_of(program, 4, DeadlockError)
    assert rows_of(error)[1][0] == "waits in recv(src=1, tag=6) in group (1, 3)"
    assert "rank 1: no message with tag 6 from rank 3 in group (1, 3) is under way" in str(error)
    assert "rank 1: but one of shape (2,) with tag 6 from rank 3 lies there" in str(error)


def test_a_message_of_a_group_is_not_taken_for_one_of_the_world():
    def program(comm):
        group = comm.split(0)
        group.isend(torch.ones(2), 1 - comm.rank).wait()
        comm.recv(1 - comm.rank)

    text = str(error_of(program, 2, DeadlockError))
    assert "rank 0: no message with tag 0 from rank 1 is under way" in text
    assert "rank 0: but one of shape (2,) with tag 0 from rank 1 in group (0, 1) lies there" in text


def test_a_mismatch_in_a_group_names_ranks_of_the_world_and_the_odd_one():
    def program(comm):
        group = comm.split(comm.rank // 3)
        group.all_reduce(torch.ones(2 if comm.rank == 4 else 3))

    error = error_of(program, 6, MismatchError)
    rows = rows_of(error)
    assert list(rows) == [3, 4, 5]
    assert rows[4][0] == "all_reduce(float32 (2,), op=sum) in group (3, 4, 5)"
    assert "the odd one: rank 4\n" in str(error)


def test_a_group_of_many_is_named_shortly():
    def program(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank == 1:
            group.recv(1)

    rows = rows_of(error_of(program, 30, DeadlockError))
    assert rows[1][0] == "waits in recv(src=1, tag=0) in group (1, 3, 5, 7, ..., 29)"


def test_a_message_left_in_a_group_names_ranks_of_the_world():
    def program(comm):
        group = comm.split(comm.rank % 2)
        if comm.rank == 3:
            group.send(torch.ones(2), 0, tag=4)

    text = str(error_of(program, 4, UnreceivedError))
    assert "rank 3 to rank 1: one of shape (2,) with tag 4 in group (1, 3)\n" in text


def test_a_rank_that_does_not_split_with_the_others_is_named():
    def program(comm):
        if comm.rank != 1:
            comm.split(0)

    text = str(error_of(program, 3, DeadlockError))
    assert "split: every rank must call it; missing: rank 1" in text


def test_groups_that_wait_for_each_other_in_a_circle_are_a_deadlock():
    def program(comm):
        row, column = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
        first, second = (row, column) if comm.rank in (0, 3) else (column, row)
        first.barrier()
        second.barrier()

    texts = {str(error_of(program, 4, DeadlockError)) for _ in range(10)}
    assert len(texts) == 1
    text = texts.pop()
    for group, missing in (("(0, 1)", 1), ("(1, 3)", 3), ("(0, 2)", 0), ("(2, 3)", 2)):
        assert f"barrier: every rank of group {group} must call it; missing: rank {missing}" in text


UNEQUAL = {
    "root of broadcast": (
        lambda comm, odd: comm.broadcast(torch.ones(2), src=2 if odd else 0), "src=2",
    ),
    "root of reduce": (lambda comm, odd: comm.reduce(torch.ones(2), 1 if odd else 0), "dst=1"),
    "root of scatter": (
        lambda comm, odd: comm.scatter(torch.ones(3), src=1 if odd else 0), "src=1",
    ),
    "root of gather": (lambda comm, odd: comm.gather(torch.ones(2), 1 if odd else 0), "dst=1"),
    "dtype": (
        lambda comm, odd: comm.all_gather(torch.ones(2, dtype=torch.half if odd else None)),
        "float16 (2,)",
    ),
    "rows": (lambda comm, odd: comm.all_gather(torch.ones(4 if odd else 2)), "float32 (4,)"),
    "sizes": (
        lambda comm, odd: comm.all_gather(torch.ones(1), sizes=[1, 1, 2] if odd else [1, 1, 1]),
        "sizes=[1, 1, 2]",
    ),
    "sizes of parts": (
        lambda comm, odd: comm.reduce_scatter(torch.ones(3), sizes=[1, 0, 2] if odd else None),
        "sizes=[1, 0, 2]",
    ),
    "columns": (
        lambda comm, odd: comm.all_to_all(torch.ones(3, 2 if odd else 1)), "float32 (3, 2)",
    ),
    "async": (
        lambda comm, odd: odd and comm.all_reduce(torch.ones(1), async_op=True).wait()
        or comm.all_reduce(torch.ones(1)),
        "async",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNEQUAL)
def test_whatever_differs_between_ranks_is_named_with_the_odd_rank(what):
    call, named = UNEQUAL[what]

    def program(comm):
        return call(comm, comm.rank == 1)

    error = error_of(program, 3, MismatchError)
    rows = rows_of(error)
    assert named in rows[1][0]
    assert not any(named in rows[rank][0] for rank in (0, 2))
    assert " of <lambda>: " in rows[1][1]
    assert "the odd one: rank 1\n" in str(error)


def test_scatter_into_another_shape_is_an_error_on_that_rank():
    def program(comm):
        whole = torch.ones(6) if comm.rank == 0 else None
        comm.scatter(whole, out=torch.ones(3) if comm.rank == 1 else None)

    error = error_of(program, 3, RankError)
    assert error.rank == 1
    assert isinstance(error.__cause__, InputError)
    assert "scatter: out, contiguous, float32 (2,)" in str(error)


def test_all_to_all_with_sizes_that_do_not_fit_names_the_pair_on_every_rank():
    reached = []

    def program(comm):
        table = [[1, 2, 0], [1, 1, 1], [0, 0, 3]]
        recv_sizes = [row[comm.rank] for row in table]
        if comm.rank == 2:
            recv_sizes[1] = 5
        try:
            comm.all_to_all(torch.ones(3), send_sizes=table[comm.rank], recv_sizes=recv_sizes)
        except Exception:
            reached.append(comm.rank)

    text = str(error_of(program, 3, MismatchError))
    assert "rank 1 sends 1 rows to rank 2, which expects 5 (its recv_sizes[1])" in text
    assert reached == []


def test_what_fails_while_ranks_meet_fails_on_every_rank(monkeypatch):
    def fails(tensors, op):
        raise MemoryError("no room for the sum")

    monkeypatch.setattr(threads, "reduce_in_rank_order", fails)
    error = error_of(lambda comm: comm.all_reduce(torch.ones(2)), 3, RankError)
    assert error.rank == 0
    assert "MemoryError: no room for the sum" in str(error)

    def program(comm):
        try:
            comm.all_reduce(torch.ones(2))
        except MemoryError:
            comm.barrier()
            return comm.rank

    assert run_ranks(program, 3) == [0, 1, 2]


def test_the_largest_world_sends_around_a_ring():
    def program(comm):
        n = comm.world_size
        token = torch.tensor([comm.rank])
        for _ in range(8):
            token = comm.sendrecv(token, (comm.rank + 1) % n, (comm.rank - 1) % n)
        comm.barrier()
        return token.item()

    assert run_ranks(program, 256) == [(rank - 8) % 256 for rank in range(256)]
