"""Programs that go wrong: each ends at once, and the error names rank, call and line."""

import _thread
import linecache
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from comm_errors import NEVER_S, error_of, rows_of

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import (
    CommunicationError,
    DeadlockError,
    MismatchError,
    RankError,
    RanksTimeoutError,
    UnreceivedError,
    text_table,
)
from slimlab.config import InputError

ROOT = Path(__file__).resolve().parents[1]


def test_waiting_for_a_message_that_nobody_sends_is_a_deadlock():
    def program(comm):
        if comm.rank == 0:
            value = comm.recv(1)
            return value

    error = error_of(program, 2, DeadlockError)
    rows = rows_of(error)
    assert rows[0][0] == "waits in recv(src=1, tag=0)"
    assert rows[0][1].endswith("of program: value = comm.recv(1)")
    assert rows[1] == ["has finished", ""]
    line = int(rows[0][1].split()[1])
    assert linecache.getline(__file__, line).strip() == "value = comm.recv(1)"


def test_two_ranks_that_receive_before_they_send_are_a_deadlock():
    def program(comm):
        other = 1 - comm.rank
        got = comm.recv(other)
        comm.send(torch.ones(2), other)
        return got

    error = error_of(program, 2, DeadlockError)
    assert [row[0] for row in rows_of(error).values()] == [
        "waits in recv(src=1, tag=0)", "waits in recv(src=0, tag=0)",
    ]  # fmt: skip


def test_a_deadlock_by_wrong_tags_names_the_message_that_lies_there():
    def program(comm):
        other = 1 - comm.rank
        comm.send(torch.ones(2, 3), other, tag=comm.rank)
        return comm.recv(other, tag=comm.rank)

    text = str(error_of(program, 2, DeadlockError))
    assert "rank 0: no message with tag 0 from rank 1 is under way" in text
    assert "rank 0: but one of shape (2, 3) with tag 1 from rank 1 lies there" in text


def test_a_rank_that_finishes_early_leaves_the_others_in_a_deadlock():
    def program(comm):
        if comm.rank != 2:
            comm.all_reduce(torch.ones(3))

    error = error_of(program, 4, DeadlockError)
    rows = rows_of(error)
    assert rows[2][0] == "has finished"
    assert rows[3][0] == "waits in all_reduce(float32 (3,), op=sum)"
    assert "all_reduce: every rank must call it; missing: rank 2" in str(error)


def test_a_collective_against_a_message_is_a_deadlock():
    def program(comm):
        return comm.recv(1) if comm.rank == 0 else comm.barrier()

    rows = rows_of(error_of(program, 2, DeadlockError))
    assert [rows[0][0], rows[1][0]] == ["waits in recv(src=1, tag=0)", "waits in barrier()"]


def test_a_circle_of_three_is_found_among_others_that_work():
    def program(comm):
        if comm.rank == 3:
            return "done"
        return comm.recv((comm.rank + 1) % 3)

    rows = rows_of(error_of(program, 4, DeadlockError))
    assert rows[3][0] == "has finished"
    assert [rows[r][0][-14:] for r in range(3)] == [f"(src={s}, tag=0)" for s in (1, 2, 0)]


def test_the_error_of_a_deadlock_is_the_same_every_time():
    def program(comm):
        if comm.rank:
            comm.recv(0, tag=comm.rank)
        else:
            comm.send(torch.ones(1), 1, tag=9)
            comm.barrier()

    texts = {str(error_of(program, 4, DeadlockError)) for _ in range(20)}
    assert len(texts) == 1


def test_different_collectives_are_named_per_rank():
    def program(comm):
        if comm.rank == 1:
            comm.barrier()
        else:
            comm.all_reduce(torch.ones(2))

    error = error_of(program, 3, MismatchError)
    assert "different collectives" in str(error)
    rows = rows_of(error)
    assert rows[1][0].endswith("barrier()")
    assert rows[1][1].endswith("comm.barrier()")
    assert rows[2][0].endswith("all_reduce(float32 (2,), op=sum)")


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ((torch.ones(2), "sum"), (torch.ones(3), "sum"), "float32 (3,), op=sum"),
        ((torch.ones(2), "sum"), (torch.ones(2, 1), "sum"), "float32 (2, 1), op=sum"),
        ((torch.ones(2), "sum"), (torch.ones(2).double(), "sum"), "float64 (2,), op=sum"),
        ((torch.ones(2), "sum"), (torch.ones(2), "max"), "float32 (2,), op=max"),
        (
            (torch.ones(2), "sum"),
            (torch.ones(2, device="meta"), "sum"),
            "float32 (2,) on meta, op=sum",
        ),
    ],
)
def test_an_all_reduce_with_other_shapes_dtypes_or_operations_is_named_per_rank(
    first, second, named
):
    def program(comm):
        tensor, op = second if comm.rank == 1 else first
        return comm.all_reduce(tensor, op=op)

    error = error_of(program, 3, MismatchError)
    rows = rows_of(error)
    assert named in rows[1][0]
    assert "float32 (2,), op=sum" in rows[0][0]
    assert "float32 (2,), op=sum" in rows[2][0]


def test_a_rank_that_raises_ends_the_others_and_is_named():
    class BoomError(Exception):
        pass

    def explode():
        raise BoomError("out of powder")

    def program(comm):
        if comm.rank == 2:
            explode()
        comm.barrier()

    error = error_of(program, 4, RankError)
    assert error.rank == 2
    assert isinstance(error.__cause__, BoomError)
    assert str(error).startswith("rank 2 raised BoomError: out of powder\nat line ")
    assert str(error).endswith('of explode: raise BoomError("out of powder")')
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_the_lowest_rank_is_named_where_all_raise():
    def program(comm):
        return undefined_name  # noqa: F821

    assert {error_of(program, 4, RankError).rank for _ in range(10)} == {0}


def test_leaving_by_sys_exit_is_an_error_too():
    def program(comm):
        if comm.rank == 1:
            raise SystemExit(3)
        comm.barrier()

    assert isinstance(error_of(program, 2, RankError).__cause__, SystemExit)


def test_a_program_cannot_swallow_the_end_of_the_run():
    reached = []

    def program(comm):
        if comm.rank == 1:
            raise ValueError("first")
        try:
            comm.barrier()
        except Exception:  # what students write
            reached.append(comm.rank)
        comm.barrier()

    assert error_of(program, 3, RankError).rank == 1
    assert reached == []


def test_what_a_rank_cleans_up_is_cleaned_up_when_another_fails():
    closed = []

    def program(comm):
        if comm.rank == 1:
            raise ValueError
        try:
            comm.barrier()
        finally:
            closed.append(comm.rank)

    error_of(program, 2, RankError)
    assert closed == [0]


def test_a_message_that_nobody_received_is_an_error():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(2, 3), 1, tag=4)

    error = error_of(program, 2, UnreceivedError)
    assert "rank 0 to rank 1: one of shape (2, 3) with tag 4" in str(error)


def test_thousands_of_messages_that_nobody_received_are_told_in_one_line():
    def program(comm):
        for _ in range(5000):
            comm.send(torch.ones(2, 3), 1 - comm.rank)

    lines = str(error_of(program, 2, UnreceivedError)).splitlines()
    assert "rank 1 to rank 0: 5,000 messages, the first of shape (2, 3), with tag 0" in lines
    assert len(lines) < 6


def test_an_error_whose_own_message_fails_ends_the_run_as_well():
    class Unspeakable(BaseException):
        def __str__(self):
            raise ValueError("no words")

    def program(comm):
        if comm.rank == 1:
            raise Unspeakable
        comm.barrier()

    error = error_of(program, 2, RankError)
    assert "rank 1 raised Unspeakable, whose message fails with ValueError" in str(error)
    assert isinstance(error.__cause__, Unspeakable)


def test_a_communicator_is_of_no_use_after_its_run():
    comm = run_ranks(lambda comm: comm, 2)[0]
    for call in (comm.barrier, lambda: comm.send(torch.ones(1), 1), lambda: comm.recv(1)):
        with pytest.raises(CommunicationError, match="the run is over"):
            call()


SWALLOW = """
from slimlab.comm.launch import run_ranks

rounds = [0, 0]

def program(comm):
    while True:
        rounds[comm.rank] += 1
        try:
            comm.recv(1 - comm.rank)
        except:
            pass

try:
    run_ranks(program, 2)
except RuntimeError as error:
    print(type(error).__name__, *rounds)
"""


def test_a_rank_that_catches_everything_for_ever_stops_using_the_processor():
    # In a process of its own, since the threads of such ranks never end.
    done = subprocess.run([sys.executable, "-c", SWALLOW], cwd=ROOT, capture_output=True, text=True)
    name, *rounds = done.stdout.split()
    assert name == "DeadlockError", done.stderr
    # Each of the hundred stops starts one more round, and so does the interrupt of the thread.
    assert 100 <= max(map(int, rounds)) <= 110


def test_an_endless_loop_is_ended_and_its_line_named():
    def program(comm):
        while comm.rank == 1:
            pass
        comm.barrier()

    error = error_of(program, 3, RanksTimeoutError, timeout_s=0.3)
    assert isinstance(error, TimeoutError)
    rows = rows_of(error)
    assert rows[0][0] == "waits in barrier()"
    assert rows[1][0] == "computes"
    assert " of program: " in rows[1][1]
    assert rows[2][0] == "waits for its turn"
    assert "Rank 1 was ended" in str(error)
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ")]


def test_a_rank_that_cannot_be_ended_is_said_to_go_on(monkeypatch):
    monkeypatch.setattr("slimlab.comm.thread_ranks.GRACE_S", 0.1)
    release = threading.Event()

    def program(comm):
        if comm.rank == 0:
            release.wait(20)  # in C: no exception gets in

    error = error_of(program, 2, RanksTimeoutError, timeout_s=0.2)
    assert "Rank 0 goes on in the background, since a thread cannot be killed" in str(error)
    release.set()


def test_a_rank_that_went_on_is_stopped_at_its_next_call(monkeypatch):
    monkeypatch.setattr("slimlab.comm.thread_ranks.GRACE_S", 0.1)
    release, ended = threading.Event(), threading.Event()

    def program(comm):
        try:
            release.wait(20)
            comm.send(torch.ones(1), 1)
        finally:
            ended.set()

    error_of(program, 2, RanksTimeoutError, timeout_s=0.2)
    release.set()
    assert ended.wait(20)


def test_an_interrupt_from_the_keyboard_ends_the_run():
    too_late = []

    def program(comm):
        if comm.rank == 1:
            time.sleep(0.1)  # until the caller waits: this does not end a wait, as a signal would
            _thread.interrupt_main()
            end = time.monotonic() + 20
            while time.monotonic() < end:
                pass
            too_late.append(comm.rank)
        comm.barrier()

    with pytest.raises(KeyboardInterrupt):
        run_ranks(program, 2, timeout_s=NEVER_S)
    assert too_late == []
    deadline = time.monotonic() + 20
    while [t for t in threading.enumerate() if t.name.startswith("rank ")]:
        assert time.monotonic() < deadline
    assert run_ranks(lambda comm: comm.rank, 2) == [0, 1]


def test_the_callers_random_state_survives_a_failure():
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def program(comm):
        torch.rand(5)
        raise ValueError

    error_of(program, 2, RankError)
    assert torch.equal(torch.get_rng_state(), before)


FLAT = torch.ones(4)

BAD_CALLS = {
    "dst too large": (lambda comm: comm.send(torch.ones(1), 2), "dst = 2 on rank 0 of 2"),
    "dst negative": (lambda comm: comm.send(torch.ones(1), -1), "(comm.rank + 1)"),
    "dst no whole number": (lambda comm: comm.send(torch.ones(1), 1.0), "dst = 1.0"),
    "dst oneself": (lambda comm: comm.send(torch.ones(1), 0), "another rank than oneself"),
    "src oneself": (lambda comm: comm.recv(0), "another rank than oneself"),
    "src too large": (lambda comm: comm.recv(7), "src = 7"),
    "negative tag": (lambda comm: comm.recv(1, tag=-1), "tag = -1"),
    "tag a text": (lambda comm: comm.send(torch.ones(1), 1, tag="a"), "tag = 'a'"),
    "payload a number": (lambda comm: comm.send(1.5, 1), "given: a float"),
    "payload a list": (lambda comm: comm.all_reduce([1.0]), "given: a list"),
    "payload sparse": (lambda comm: comm.all_reduce(torch.eye(2).to_sparse()), "torch.sparse_coo"),
    "unknown op": (lambda comm: comm.all_reduce(torch.ones(1), op="avg"), "sum, mean, max, min"),
    "mean of whole numbers": (lambda comm: comm.all_reduce(torch.tensor(1), op="mean"), "int64"),
    "sum of booleans": (lambda comm: comm.all_reduce(torch.tensor(True)), "bool"),
    "max of complex": (
        lambda comm: comm.all_reduce(torch.ones(1, dtype=torch.cfloat), op="max"), "complex64",
    ),
    "root too large": (lambda comm: comm.broadcast(torch.ones(1), 2), "src = 2 on rank 0 of 2"),
    "root negative": (lambda comm: comm.reduce(torch.ones(1), -1), "dst = -1"),
    "root a truth value": (lambda comm: comm.gather(torch.ones(1), True), "dst = True"),
    "color a fraction": (lambda comm: comm.split(comm.rank / 2), "color = 0.0"),
    "key None": (lambda comm: comm.split(0, None), "key = None"),
    "no dim to join along": (lambda comm: comm.all_gather(torch.tensor(1)), "tensor.reshape(1)"),
    "rows that do not divide": (lambda comm: comm.reduce_scatter(torch.ones(3)), "3 rows"),
    "too few sizes": (lambda comm: comm.reduce_scatter(torch.ones(3), sizes=[3]), "sizes of 2"),
    "a negative size": (lambda comm: comm.scatter(torch.ones(1), sizes=[2, -1]), "[2, -1]"),
    "sizes of more than there is": (
        lambda comm: comm.scatter(torch.ones(5), sizes=[3, 3]), "[3, 3], together 6",
    ),
    "another size than one's own": (
        lambda comm: comm.all_gather(torch.ones(5), sizes=[4, 5]), "a part of sizes[0] = 4 rows",
    ),
    "sizes of one direction": (
        lambda comm: comm.all_to_all(torch.ones(4), send_sizes=[3, 1]), "recv_sizes = None",
    ),
    "scatter without a tensor": (lambda comm: comm.scatter(None), "given: a NoneType"),
    "out of another shape": (
        lambda comm: comm.all_gather(torch.ones(2), out=torch.ones(3)), "given: float32 (3,)",
    ),
    "out of another dtype": (
        lambda comm: comm.all_reduce(torch.ones(2), out=torch.ones(2).int()), "given: int32 (2,)",
    ),
    "out not contiguous": (
        lambda comm: comm.all_reduce(torch.ones(2, 3), out=torch.ones(3, 2).T), "not contiguous",
    ),
    "out not contiguous for recv": (
        lambda comm: comm.recv(1, out=torch.ones(3, 2).T), "strides (1, 2)",
    ),
    "sendrecv into what is sent": (
        lambda comm: comm.sendrecv(FLAT, 1, 1, out=FLAT), "one apart from it",
    ),
    "all_to_all into its argument": (
        lambda comm: comm.all_to_all(FLAT, out=FLAT), "an out that overlaps",
    ),
    "all_gather into a buffer that holds the part": (
        lambda comm: comm.all_gather(FLAT[:2], out=FLAT), "an out that overlaps",
    ),
    "all_reduce into the same memory one further": (
        lambda comm: comm.all_reduce(FLAT[:3], out=FLAT[1:]), "an out that overlaps",
    ),
    "broadcast into its own transpose": (
        lambda comm: comm.broadcast(FLAT.view(2, 2).T, out=FLAT.view(2, 2)), "an out that overlaps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_CALLS)
def test_a_bad_argument_is_an_input_error_on_its_rank(fault):
    call, message = BAD_CALLS[fault]
    error = error_of(call, 2, RankError)
    assert isinstance(error.__cause__, InputError)
    assert message in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"program": 3}, "program = 3"),
        ({"world_size": 0}, "world_size"),
        ({"world_size": 2.0}, "world_size"),
        ({"world_size": 10_000}, "at most 256"),
        ({"timeout_s": 0}, "timeout_s = 0"),
        ({"timeout_s": None}, "is ended, so it needs a limit"),
        ({"timeout_s": float("inf")}, "timeout_s = inf"),
        ({"timeout_s": 1e12}, "timeout_s = 1000000000000.0"),
        ({"timeout_s": float("nan")}, "timeout_s = nan"),
        ({"program": lambda: None}, r"\(\) for a communicator and 0 args"),
        ({"program": lambda comm, x: None}, "missing a required argument: 'x'"),
        ({"args": (1, 2)}, r"\(comm\) for a communicator and 2 args"),
        ({"program": (lambda comm: (yield))}, "holds yield or await"),
        ({"args": 5}, r"args=\(x,\)"),
    ],
)
def test_bad_arguments_of_run_ranks_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        run_ranks(**{"program": lambda comm: None, "world_size": 2, **arguments})


def define(name, source, filename="<a cell>"):
    """Define a function as a notebook cell or a module called `name` would."""
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {"__name__": name}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["program"]


CELL = """\
import sys

def program(comm):
    comm.barrier()
    return comm.recv(1 - comm.rank)  # nobody sends
"""


@pytest.mark.parametrize("module", ["__main__", "slimlab.demos.ring"])
def test_the_line_is_found_in_a_notebook_cell_and_in_a_demo(module):
    rows = rows_of(error_of(define(module, CELL), 2, DeadlockError))
    expected = "line 5 of program: return comm.recv(1 - comm.rank)  # nobody sends"
    assert rows[0][1] == rows[1][1] == expected


def test_the_readers_line_goes_before_the_librarys():
    library = define(
        "slimlab.parallel.ring", "def program(comm):\n    return comm.recv(1)\n", "<library>"
    )

    def program(comm):
        if comm.rank == 0:
            library(comm)

    rows = rows_of(error_of(program, 2, DeadlockError))
    assert rows[0][1].endswith("of program: library(comm)")


def test_a_line_without_source_keeps_its_number_and_function():
    program = define("__main__", CELL)
    linecache.cache.pop("<a cell>")
    rows = rows_of(error_of(program, 2, DeadlockError))
    assert rows[0][1] == "line 5 of program"


def test_a_table_is_aligned():
    assert text_table(("a", "long name"), [(1, "x"), (22, "")]) == "a   long name\n1   x\n22"
