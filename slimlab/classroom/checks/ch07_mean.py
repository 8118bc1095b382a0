"""Grader of exercise 7.5 of chapter 07: a mean that all ranks agree on, and that is none.

The oracle of the weights gives one rank a 1 and all others 0, rank after rank; that of the mean
adds up in one process.

Production libraries add first and divide once; torch.distributed's ReduceOp.AVG does so on NCCL.
"""

import math

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import (
    expect_messages_only,
    expect_untouched,
    on_ranks,
    sends_of,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.comm.launch import run_ranks

WORLDS = (3, 2, 4, 5, 6, 7, 8, 1)
ROUNDING = {"atol": 1e-12, "rtol": 0.0, "reason": "float64 rounding"}

tree = Exercise(
    "7.5",
    "All ranks agree on a mean that is none",
    requires=("predicted_weights", "weights", "is_right_for", "mended_mean"),
    stars=2,
    instance=lambda rng: {"world_size": rng.choice([5, 6, 7, 9, 10, 11, 12, 13])},
    hints=(
        "Three ranks: 0 and 1 meet, then 0 and 2. Write down what rank 0 holds after each step.",
        "weights: if only rank 2 brings a 1 and all others 0, what does the result tell?",
        "All at once: let rank s bring a tensor of w numbers that is 0 but for place s.",
        "Which two means may be averaged with equal weights? When are they always such?",
        "What can be added up in any order, and divided when all have been added?",
    ),
)


def given_mean(comm, tensor):
    """Do what the program of the exercise does, fault included; comm, tensor as there."""
    mean, rank, world_size = tensor.clone(), comm.rank, comm.world_size
    distances = [2**step for step in range(math.ceil(math.log2(world_size)))]
    for distance in distances:
        if rank % (2 * distance) == distance:
            comm.send(mean, rank - distance)
        elif rank % (2 * distance) == 0 and rank + distance < world_size:
            mean = (mean + comm.recv(rank + distance)) / 2
    for distance in reversed(distances):
        if rank % (2 * distance) == 0 and rank + distance < world_size:
            comm.send(mean, rank + distance)
        elif rank % (2 * distance) == distance:
            mean = comm.recv(rank - distance)
    return mean


def right_mean(comm, tensor):
    """Return the mean over all ranks, by the runtime; comm, tensor as in given_mean."""
    return comm.all_reduce(tensor, op="mean")


def lopsided(comm, tensor):
    """Return half of a rank's own tensor and a quarter of its left neighbour's.

    comm, tensor  as in given_mean
    """
    world_size, rank = comm.world_size, comm.rank
    if world_size == 1:
        return tensor / 2
    left = comm.sendrecv(tensor, (rank + 1) % world_size, (rank - 1) % world_size)
    return tensor / 2 + left / 4


def without_last(comm, tensor):
    """Return the sum of all ranks but the last, which is forgotten, with rank 0's taken off.

    comm, tensor  as in given_mean; the tensor is changed
    """
    if comm.rank == comm.world_size - 1:
        tensor = torch.zeros_like(tensor)
    tensor.mul_(-1 if comm.rank == 0 else 1)
    return comm.all_reduce(tensor)


def weights_of(program, world_size: int) -> Tensor:
    """Find the weights of `program`, (world_size, world_size), by giving a 1 to rank after rank."""
    columns = []
    for source in range(world_size):
        results = run_ranks(
            lambda comm: program(comm, torch.tensor([float(comm.rank == source)]).double()),  # noqa: B023
            world_size,
        )
        columns.append(torch.cat(results))
    return torch.stack(columns, dim=1)


def check_weights(student, program, world_size: int, name: str, look: str) -> None:
    """Compare the student's weights of `program` with the oracle's.

    world_size  number of ranks
    name, look  what it is, and where to look, for the message
    """
    saw = function_of(student, "weights")(program, world_size)
    what = f"weights of {name} on {world_size} ranks"
    expect(isinstance(saw, Tensor), f"{what}: {form_of(saw)}", "a tensor (w, w)", "its last line")
    expect_close(saw, weights_of(program, world_size), what, look, **ROUNDING)


@tree.property("weights finds what the given program does", points=2)
def _(student, numbers):
    for world_size in (4, 3, 1, 6, 5):
        look = "what each rank brings, so that its share can be told from the others'"
        check_weights(student, given_mean, world_size, "tree_mean", look)


@tree.property("weights tells other programs apart", points=2)
def _(student, numbers):
    for world_size in (3, 5):
        check_weights(student, right_mean, world_size, "a right mean", "how weights are scaled")
        look = "row r: the result of rank r; column s: the tensor that rank s brought"
        check_weights(student, lopsided, world_size, "a program whose ranks disagree", look)
        look = "negative weights and missing ranks, and tensors that are used twice"
        check_weights(student, without_last, world_size, "a sum without the last rank", look)


@tree.property("the worlds on which it is right", points=1)
def _(student, numbers):
    function = function_of(student, "is_right_for")
    for world_size in (2, 3, 4, 6, 1, 8, 9, 10, 12, 16, 5, 7):
        brought = [torch.tensor(2.0**rank).double() for rank in range(world_size)]
        found = run_ranks(lambda comm: given_mean(comm, brought[comm.rank]), world_size)[0]  # noqa: B023
        right = bool((found - sum(brought) / world_size).abs() < 1e-9)
        look = "when two ranks that meet have always heard of equally many"
        saw = function(world_size)
        is_bool = isinstance(saw, bool)
        asked = f"is_right_for({world_size})"
        expect(is_bool, f"{asked} gave {form_of(saw)}", "True or False", "its last line")
        expect_equal(saw, right, asked, look)
    for world_size in (96, 1000, 1024, 2**20 + 2, 2**40):
        right = math.log2(world_size).is_integer()
        look = "it is meant to answer without running"
        expect_equal(function(world_size), right, f"is_right_for({world_size})", look)


@tree.property("your prediction by hand was right", points=1)
def _(student, numbers):
    wanted = weights_of(given_mean, numbers["world_size"])[0]
    look = "your pencil calculation for numbers('7.5'); correct it once you know why"
    saw = function_of(student, "predicted_weights")()
    expect_close(saw, wanted, "predicted_weights()", look, rtol=0.005, reason="you may round")


@tree.property("the mended mean: all ranks agree, to the bit", points=1)
def _(student, numbers):
    for inputs, what in drawn():
        results = mended(student, inputs, what)
        first = results[0]
        for rank, one in enumerate(results):
            look = "who computes each number, and whether the others get copies"
            label = f"{what}: rank {rank} beside rank 0"
            expect_close(one, first, label, look, rtol=0.0, reason="the same bits on all ranks")


@tree.property("the mended mean is that of one process, and leaves its argument alone", points=3)
def _(student, numbers):
    for inputs, what in drawn():
        before = [one.clone() for one in inputs]
        results = mended(student, inputs, what)
        total = sum(before[1:], before[0].clone())
        look = "with which weight each rank's tensor enters: weights(mended_mean, w) shows it"
        for rank, one in enumerate(results):
            expect_close(one, total / len(before), f"{what}: rank {rank}", look, **ROUNDING)
        expect_untouched(inputs, before, results, what)


@tree.property("no rank sends more than in the given program", points=2)
def _(student, numbers):
    for inputs, what in drawn():
        given = run_ranks(lambda comm: given_mean(comm, inputs[comm.rank]), len(inputs))  # noqa: B023
        results = on_ranks(function_of(student, "mended_mean"), inputs, what)
        expect_messages_only(results.ledgers, what)
        expect(isinstance(results[0], Tensor), form_of(results[0]), "a tensor", "the return line")
        for rank, (own, its) in enumerate(zip(results.ledgers, given.ledgers)):
            sent, allowed = sends_of(own), sends_of(its)
            look = "the tree of the given program: its messages were enough"
            for much, limit, unit in (
                (len(sent), len(allowed), "messages"),
                (sum(sent), sum(allowed), "bytes"),
            ):
                saw = f"{what}: rank {rank} sends {much} {unit}"
                expect(much <= limit, saw, f"at most {limit}", look)
        num_sent = sum(len(sends_of(ledger)) for ledger in results.ledgers)
        if num_sent < 2 * (len(inputs) - 1):
            raise CheckFailed(f"{what}: {num_sent} messages in all", "ranks that talk", look)


def mended(student, inputs: list[Tensor], what: str) -> list[Tensor]:
    """Run the student's mended_mean without buffers; fail unless it returns tensors.

    inputs, what  as in on_ranks
    """
    function, what = function_of(student, "mended_mean"), f"{what}, no buffer"
    results = on_ranks(function, inputs, what, eager_bytes=0)
    for rank, one in enumerate(results):
        saw = f"{what}: rank {rank} returned {form_of(one)}"
        expect(isinstance(one, Tensor), saw, "a tensor", "the return line of mended_mean")
    return results


def drawn() -> list[tuple[list[Tensor], str]]:
    """Draw tensors for the ranks of several worlds, with words that say which."""
    cases = []
    for world_size in WORLDS:
        for shape in ((5,), (2, 3)) if world_size in (3, 6) else ((2,),):
            generator = torch.Generator().manual_seed(world_size)
            size = (world_size, *shape)
            inputs = list(torch.randn(size, generator=generator, dtype=torch.float64).clone())
            ranks = f"{world_size} rank{'s' * (world_size > 1)}"
            cases.append((inputs, f"{ranks}, tensors of shape {shape}"))
    return cases
