"""Grader of exercise 7.2 of chapter 07: a running sum over ranks, MPI's scan.

The oracle adds the tensors of the ranks one after the other. Values are whole numbers, so the order
of additions changes no bit.

MPI has it as MPI_Scan; NCCL and torch.distributed have not.
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
EXACT = {"rtol": 0.0, "reason": "sums of whole numbers are exact"}

scan = Exercise(
    "7.2",
    "A running sum over ranks",
    requires=("running_sum",),
    stars=2,
    hints=(
        "After one step, let every rank hold the sum of two ranks: its own tensor and its left "
        "neighbour's. How far left must it listen next?",
        "Draw 8 ranks and write beside each which ones it has added so far: 1, then 2, 4, 8 in "
        "a row, ending with itself.",
        "Ranks near 0 have nobody so far to their left, ranks near the end nobody to their right.",
        "In one step: send what you held before you added what arrives.",
        "`total += arrived` also changes every other name of that tensor.",
    ),
)


def drawn(world_size: int, shape: tuple, dtype=torch.float64) -> list[Tensor]:
    """Draw whole numbers of this shape and dtype for each of world_size ranks."""
    generator = torch.Generator().manual_seed(10 * world_size + len(shape))
    return [
        torch.randint(-50, 100, shape, generator=generator).to(dtype) for _ in range(world_size)
    ]


def check_sums(results, inputs: list[Tensor], what: str) -> None:
    """Compare every rank's result with the sum of the ranks up to it.

    results, inputs  of all ranks
    what             what was run, for the message
    """
    total = torch.zeros_like(inputs[0])
    for rank, (result, own) in enumerate(zip(results, inputs)):
        total = total + own
        look = "which ranks' tensors are in it: add them up by hand for this rank"
        label = f"{what}: rank {rank}"
        found = isinstance(result, Tensor)
        expect(found, f"{label} returned {form_of(result)}", "a tensor", "the return line")
        expect_close(result, total, label, look, **EXACT)


def text_of(world_size: int, shape: tuple) -> str:
    """Say on how many ranks, world_size, and with what shape a program ran."""
    return f"{world_size} rank{'s' * (world_size > 1)}, tensors of shape {shape}"


@scan.property("every rank has the sum of the ranks up to itself", points=3)
def _(student, numbers):
    function = function_of(student, "running_sum")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, (3,)), drawn(world_size, (3,))
        copies = [one.clone() for one in inputs]
        check_sums(on_ranks(function, inputs, what), copies, what)


@scan.property("any shape and type, and the argument stays as it is", points=2)
def _(student, numbers):
    function = function_of(student, "running_sum")
    for world_size in (4, 1, 5):
        for shape, dtype in (((2, 3), torch.float64), ((), torch.float32), ((0,), torch.float64), (
            (7,), torch.int64
        )):  # fmt: skip
            what, inputs = text_of(world_size, shape), drawn(world_size, shape, dtype)
            before = [one.clone() for one in inputs]
            results = on_ranks(function, inputs, what)
            check_sums(results, before, what)
            look = "the type of every tensor that you make"
            for rank, one in enumerate(results):
                expect_equal(one.dtype, dtype, f"{what}: the dtype on rank {rank}", look)
            expect_untouched(inputs, before, results, what)


@scan.property("messages alone, at most log2 w from each rank", points=2)
def _(student, numbers):
    function = function_of(student, "running_sum")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, (10,)), drawn(world_size, (10,))
        results = on_ranks(function, inputs, what)
        expect_messages_only(results.ledgers, what)
        check_sums(results, drawn(world_size, (10,)), what)
        most = num_doublings(world_size)
        for rank, ledger in enumerate(results.ledgers):
            sent = sends_of(ledger)
            look = "how many ranks the sums of two ranks hold together"
            saw = f"{what}: rank {rank} sends {len(sent)} messages"
            expect(len(sent) <= most, saw, f"at most {most}", look)
            look = "what each message holds: one tensor like the argument is enough"
            saw = f"{what}: rank {rank} sends {sum(sent)} bytes"
            expect(sum(sent) <= most * 80, saw, f"at most {most} times 80", look)


@scan.property("done after log2 w messages one after the other", points=2)
def _(student, numbers):
    function = function_of(student, "running_sum")
    for world_size in WORLDS:
        what, inputs = text_of(world_size, (4,)), drawn(world_size, (4,))
        results, last_s = timed(lambda comm: function(comm, inputs[comm.rank]), world_size, what)  # noqa: B023
        check_sums(results, drawn(world_size, (4,)), what)
        most = num_doublings(world_size)
        saw = f"{what}: the last rank is done after {last_s:g} message times"
        look = "who must wait until another has finished? Let all ranks work in every step"
        expect(last_s <= most, saw, f"at most {most}", look)


@scan.property("it ends where every send waits for its receiver", points=1)
def _(student, numbers):
    function = function_of(student, "running_sum")
    for world_size in WORLDS:
        what, inputs = f"{text_of(world_size, (4,))}, no buffer", drawn(world_size, (4,))
        results = on_ranks(function, inputs, what, eager_bytes=0)
        check_sums(results, drawn(world_size, (4,)), what)
