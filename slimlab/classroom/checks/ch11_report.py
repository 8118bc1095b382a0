"""Grader of exercise 11.2 of chapter 11: a report of every tensor, each number counted once.

The oracle has the whole tensors. What a rank has is cut from them by the mesh's coordinates; some
parts are empty, some tensors are on two stages, some of their numbers are exactly 0.

Megatron-LM marks parameters that are copies, so that norms count them on one rank alone.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import drawn, payload_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.parallel.mesh import AXES, MeshShape

ROUNDING = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}
LARGEST_LOOK = "absolute values, joined by a maximum; parts without numbers bring nothing"
PLAIN = {"up": (("tensor",), (0,)), "down": (("tensor",), (1,))}
COPIED = {"gain": ((), (0,)), "late": ((), (1,)), "up": (("tensor",), (1,))}
TIED = {"table": (("tensor",), (0, 1)), "positions": ((), (0, 1)), "up": (("tensor",), (0,))}
ALL = {
    "zeta": (("tensor", "data"), (1,)),
    "table": (("data",), (0, 1)),
    "alpha": (("data", "tensor"), (0,)),
    "gain": ((), (1,)),
    "empty": (("tensor",), (0,)),
    "zeros": ((), (0, 1)),
}
SHAPES = {"empty": (1, 2), "zeta": (3, 4), "positions": (2, 2), "gain": (5,), "late": (3,)}

whole_report = Exercise(
    "11.2",
    "Every tensor, each number once",
    requires=("report",),
    stars=2,
    hints=(
        "Squares can be added up over ranks, norms cannot. Which of the three can be joined by a "
        "sum, which by a maximum?",
        "A rank that does not have a tensor still takes part in the sum: with what?",
        "How many ranks have the same number of a tensor? Axes along which it is not cut, and "
        "stages that hold it. If each brings its share, the sum counts it once.",
        "Or only one of those ranks brings it: which coordinates have to be 0 for that?",
        "A rank needs the same row for the same name as all others: take the order of tensors.",
    ),
)


def wholes_of(tensors: dict, seed: int) -> dict[str, Tensor]:
    """Draw whole tensors with some zeros in them.

    tensors  name -> (axes, stages)
    seed     of the draw
    """
    found = {}
    for place, name in enumerate(tensors):
        whole = drawn(seed + place, *SHAPES.get(name, (6, 5)))
        found[name] = whole * (whole.abs() > 0.5) * (name != "zeros")
    return found


def parts_at(coordinates: dict, sizes: dict, tensors: dict, wholes: dict) -> dict[str, Tensor]:
    """Cut what the rank at these coordinates has.

    coordinates, sizes, tensors  as in the exercise
    wholes                       name -> whole tensor
    """
    parts = {}
    for name, (axes, stages) in tensors.items():
        if coordinates["pipeline"] in stages:
            part = wholes[name]
            for dim, axis in enumerate(axes):
                part = part.tensor_split(sizes[axis], dim)[coordinates[axis]]
            parts[name] = part.clone()
    return parts


def one_rank(function, comm, shape: MeshShape, tensors: dict, wholes: dict) -> tuple:
    """Return the report of a rank, and the names of parts that it changed.

    function, comm, shape, tensors, wholes  what runs, where, and with what
    """
    sizes = dict(zip(AXES, shape.sizes))
    coordinates = dict(zip(AXES, shape.coordinates_at(comm.rank)))
    parts = parts_at(coordinates, sizes, tensors, wholes)
    found = function(comm, sizes, coordinates, dict(tensors), parts)
    before = parts_at(coordinates, sizes, tensors, wholes)
    changed = [name for name in before if not torch.equal(parts.get(name), before[name])]
    return found, changed


def check_report(student, shape: MeshShape, tensors: dict, look: str, keys=(0, 1, 2)) -> list:
    """Run the student's report on a mesh, compare it on every rank; return what ran and ledgers.

    student, shape, tensors  whose function, on which mesh, of which tensors
    look                     where to look, for the message
    keys                     which of norm, largest and zeros are compared
    """
    function, wholes = function_of(student, "report"), wholes_of(tensors, 40)
    what = f"report on a mesh of {' x '.join(map(str, shape.sizes))}"
    results = run(
        lambda comm: one_rank(function, comm, shape, tensors, wholes), shape.world_size, what
    )
    for rank, (found, changed) in enumerate(results):
        saw = f"{what}: rank {rank} returned {form_of(found)}"
        names = ", ".join(tensors)
        fits = isinstance(found, dict) and set(found) == set(tensors)
        expect(fits, saw, f"a dictionary with the keys {names}", "names that this rank lacks")
        looks = "what works in place on a part: clone() it first"
        expect(not changed, f"{what}: rank {rank} changed {changed[:1]}", "it as it was", looks)
        for name, whole in wholes.items():
            label = f"{what}: {name} on rank {rank}"
            row = found[name]
            fits = isinstance(row, list | tuple) and len(row) == 3
            expect(fits, f"{label}: {form_of(row)}", "(norm, largest, zeros)", "the return line")
            wanted = whole.norm(), whole.abs().max(), int((whole == 0).sum())
            axes, stages = tensors[name]
            note = f"; {name} is cut along {', '.join(axes) or 'no axis'}, on stages {stages}"
            if 0 in keys:
                expect_close(row[0], wanted[0], f"{label}: norm", look + note, **ROUNDING)
            if 1 in keys:
                expect_close(row[1], wanted[1], f"{label}: largest", LARGEST_LOOK, **ROUNDING)
            if 2 in keys:
                zeros = whole_number(row[2], f"{label}: zeros", "round(...) or int(...)")
                expect_equal(zeros, wanted[2], f"{label}: zeros", look + note)
    return [(what, ledger) for ledger in results.ledgers]


@whole_report.property("tensors that are cut along tensor, on one stage each", points=2)
def _(student, numbers):
    look = "squares added up before the root is taken; a rank without a part brings nothing"
    check_report(student, MeshShape(1, 2, 2), PLAIN, look)


@whole_report.property("tensors of which several ranks have copies", points=2)
def _(student, numbers):
    look = "how many ranks bring the same number to the sum"
    check_report(student, MeshShape(1, 2, 3), COPIED, look)
    check_report(student, MeshShape(2, 2, 1), COPIED, look)


@whole_report.property("tensors that two stages hold", points=2)
def _(student, numbers):
    look = "the first and the last stage bring the same numbers"
    check_report(student, MeshShape(1, 2, 2), TIED, look)


@whole_report.property("all at once: cut along two axes, empty parts, three axes", points=2)
def _(student, numbers):
    look = "copies along the axes that do not cut it, times stages"
    check_report(student, MeshShape(2, 2, 2), ALL, look)


@whole_report.property("two all_reduces of a few numbers", points=1)
def _(student, numbers):
    look = "the numbers of all tensors go in one message"
    for what, ledger in check_report(student, MeshShape(2, 2, 1), TIED, "the numbers", (0,)):
        calls = ", ".join(entry.call for entry in ledger.entries[:5])
        alone = all(entry.call == "all_reduce" for entry in ledger.entries)
        few = len(ledger.entries) <= 2 and alone
        expect(few, f"{what}: {len(ledger.entries)} calls: {calls}", "at most 2 all_reduces", look)
        most, sent = 3 * 8 * len(TIED), payload_of(ledger)
        expect(sent <= most, f"{what}: {sent} bytes", f"at most {most} bytes", look)
