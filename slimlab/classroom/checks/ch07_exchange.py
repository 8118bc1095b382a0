"""Grader of exercise 7.3 of chapter 07: an all_to_all in log2 w steps, by way of other ranks.

The oracle takes part r of every rank's tensor. Bruck and others (1997, IEEE Trans. Parallel
Distrib. Syst. 8) found the algorithm; it is called by the first one's name.

MPI libraries use it for short parts; NCCL sends every part straight to its rank.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import (
    expect_messages_only,
    expect_untouched,
    num_doublings,
    on_ranks,
    sends_of,
    timed,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal

WORLDS = (4, 2, 8, 3, 5, 6, 7, 1)
EXACT = {"rtol": 0.0, "reason": "numbers are only moved"}

exchange = Exercise(
    "7.3",
    "An all_to_all by way of others",
    requires=("short_all_to_all",),
    stars=3,
    hints=(
        "Call d the number of ranks that a part has to go further, round the ring: from 0, what "
        "stays, to w - 1.",
        "Let all ranks send 1 further in the first step, 2 further in the next, then 4. Which "
        "parts take part in which step? Write d in binary.",
        "In each step, gather the parts that leave into one message. What arrives takes the "
        "places of what left, since both have the same d.",
        "In the end place d holds the part that has come d ranks far. From whom is it?",
        "w = 5: in the step of 4, which d leave? Those whose bit is set, and which are below w.",
    ),
)


def drawn(world_size: int, rows: int, rest: tuple = (), dtype=torch.float64) -> list[Tensor]:
    """Make a tensor for each rank: `rows` rows of shape `rest` for each of world_size ranks.

    dtype  of the numbers, of which no two are equal
    """
    shape = (world_size * rows, *rest)
    size = torch.Size(shape).numel()
    return [(torch.arange(size) + size * r).reshape(shape).to(dtype) for r in range(world_size)]


def check_parts(results, inputs: list[Tensor], what: str) -> None:
    """Compare every rank's result with its parts of all inputs.

    results, inputs  of all ranks
    what             what was run, for the message
    """
    rows = len(inputs[0]) // len(inputs)
    for rank, result in enumerate(results):
        wanted = torch.cat([one[rank * rows : (rank + 1) * rows] for one in inputs])
        label = f"{what}: rank {rank}"
        found = isinstance(result, Tensor)
        expect(found, f"{label} returned {form_of(result)}", "a tensor", "the return line")
        look = "where each part came from, and in which order the result has them"
        expect_close(result, wanted, label, look, **EXACT)


def text_of(world_size: int, rows: int, rest: tuple = ()) -> str:
    """Say on how many ranks and with what parts a program ran.

    world_size, rows, rest  as in drawn
    """
    return f"{world_size} rank{'s' * (world_size > 1)}, parts of shape {(rows, *rest)}"


@exchange.property("every rank has its part of all ranks, in rank order", points=3)
def _(student, numbers):
    function = function_of(student, "short_all_to_all")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, 2), drawn(world_size, 2)
        check_parts(on_ranks(function, inputs, what), drawn(world_size, 2), what)


@exchange.property("any shape and type, and the argument stays as it is", points=2)
def _(student, numbers):
    function = function_of(student, "short_all_to_all")
    for world_size in (4, 1, 5):
        for rows, rest, dtype in ((1, (3,), torch.float32), (2, (2, 1), torch.int64), (
            0, (), torch.float64
        )):  # fmt: skip
            what, inputs = text_of(world_size, rows, rest), drawn(world_size, rows, rest, dtype)
            before = [one.clone() for one in inputs]
            results = on_ranks(function, inputs, what)
            check_parts(results, before, what)
            look = "the type of every tensor that you make"
            for rank, one in enumerate(results):
                expect_equal(one.dtype, dtype, f"{what}: the dtype on rank {rank}", look)
            expect_untouched(inputs, before, results, what)


@exchange.property("messages alone, at most log2 w from each rank", points=3)
def _(student, numbers):
    function = function_of(student, "short_all_to_all")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, 3), drawn(world_size, 3)
        results = on_ranks(function, inputs, what)
        expect_messages_only(results.ledgers, what)
        check_parts(results, drawn(world_size, 3), what)
        most = num_doublings(world_size)
        for rank, ledger in enumerate(results.ledgers):
            num_sent = len(sends_of(ledger))
            look = "what could travel together in one message, and part ways later"
            saw = f"{what}: rank {rank} sends {num_sent} messages"
            expect(num_sent <= most, saw, f"at most {most}", look)


@exchange.property("no message is longer than half of the tensor", points=2)
def _(student, numbers):
    function = function_of(student, "short_all_to_all")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, 3), drawn(world_size, 3)
        results = on_ranks(function, inputs, what)
        expect_messages_only(results.ledgers, what)
        check_parts(results, drawn(world_size, 3), what)
        most = world_size // 2
        for rank, ledger in enumerate(results.ledgers):
            longest = max(sends_of(ledger), default=0) / (3 * 8)
            look = "which parts have to move in which step; the others stay where they are"
            saw = f"{what}: rank {rank} sends a message of {longest:g} parts"
            expect(longest <= most, saw, f"at most {most}", look)


@exchange.property("done after log2 w messages one after the other", points=1)
def _(student, numbers):
    function = function_of(student, "short_all_to_all")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, 1), drawn(world_size, 1)
        results, last_s = timed(lambda comm: function(comm, inputs[comm.rank]), world_size, what)  # noqa: B023
        check_parts(results, drawn(world_size, 1), what)
        most = num_doublings(world_size)
        saw = f"{what}: the last rank is done after {last_s:g} message times"
        look = "who sends first and who receives first: sendrecv does both at once"
        expect(last_s <= most, saw, f"at most {most}", look)


@exchange.property("it ends where every send waits for its receiver", points=1)
def _(student, numbers):
    function = function_of(student, "short_all_to_all")
    for world_size in WORLDS:
        what, inputs = f"{text_of(world_size, 2)}, no buffer", drawn(world_size, 2)
        results = on_ranks(function, inputs, what, eager_bytes=0)
        check_parts(results, drawn(world_size, 2), what)
