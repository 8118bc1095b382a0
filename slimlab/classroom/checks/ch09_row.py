"""Grader of exercise 9.3 of chapter 09: a row-parallel layer whose bias is cut too.

The oracle is one process with the whole matrix and the whole bias. The gradient of y is drawn, so
that a fault in one column, row or rank shows in a number of its own.

Megatron-LM and DTensor keep the whole bias on every rank; ZeRO and FSDP cut it for storage alone.
"""

import torch

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import (
    drawn,
    expect_calls,
    expect_parts,
    own_leaves,
    part_of,
    ranks_text,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect

CUT = {"x": -1, "rows": 0, "bias": 0}
EVEN = [(2, 12, (3,)), (4, 12, (2, 3)), (3, 12, (5,)), (1, 12, (3,))]
UNEVEN = [(4, 6, (3,)), (3, 8, (2, 2)), (5, 7, ()), (3, 2, (4,))]
LOOKS = {
    "y": "how often each number of the bias is in the sum, and in which column",
    "x": "what reaches this rank's features: the gradient of the whole of y",
    "rows": "what reaches this rank's rows: the gradient of the whole of y",
    "bias": "which columns of y this slice is in, and over which dims its gradient is summed",
}

row = Exercise(
    "9.3",
    "A row layer whose bias is cut too",
    requires=("row_layer", "row_layer_slices"),
    stars=2,
    hints=(
        "The all_reduce adds up w summands. Into which summand may rank r put its slice, and at "
        "which columns?",
        "The gradient of every summand is that of y, whole, on every rank: so the slice's gradient "
        "needs nothing from others.",
        "F.pad(bias, (left, right)) puts zeros beside it, and gradients flow through it.",
        "row_layer_slices: here the sum's columns are already this rank's. Where is the bias added "
        "then?",
        "The transpose of a reduce_scatter is an all_gather: x and rows need the gradient of all "
        "columns. Both join along dim 0, columns are the last dim: movedim(-1, 0), contiguous().",
    ),
)


def case_of(world_size: int, num_outputs: int, batch: tuple) -> tuple[dict, torch.Tensor]:
    """Draw x, rows and bias, and the gradient of y.

    world_size   decides how many rows of A there are, no multiple of it
    num_outputs  O
    batch        the dims of x before the last
    """
    seed, num_inputs = 100 * world_size + num_outputs, 3 * world_size + 1
    shapes = {"x": (*batch, num_inputs), "rows": (num_inputs, num_outputs), "bias": (num_outputs,)}
    wholes = {name: drawn(seed + k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    return wholes, drawn(seed + 3, *batch, num_outputs)


def check_layer(student, name: str, dim: int | None, cases, show=("y", "x", "rows", "bias")):
    """Run a student's layer there and back, compare with one process; return ledgers and texts.

    name   of the function
    dim    the dim of y that is cut, or None
    cases  of (world_size, num_outputs, batch)
    show   what is compared
    """
    function, found = function_of(student, name), []
    for world_size, num_outputs, batch in cases:
        wholes, grad = case_of(world_size, num_outputs, batch)
        what = f"{name}, {ranks_text(world_size)}, {num_outputs} outputs, x {(*batch, 'I')}"
        what = what.replace("'", "")
        results = run(
            lambda comm: one_rank(function, comm, wholes, grad, dim, what),  # noqa: B023
            world_size,
            what,
        )
        whole = {one: tensor.clone().requires_grad_() for one, tensor in wholes.items()}
        y = whole["x"] @ whole["rows"] + whole["bias"]
        y.backward(grad)
        true = {"y": y.detach(), **{one: tensor.grad for one, tensor in whole.items()}}
        for one in show:
            label = f"{what}: y" if one == "y" else f"{what}: gradient of {one}"
            cut = dim if one == "y" else CUT[one]
            expect_parts([result[one] for result in results], true[one], cut, label, LOOKS[one])
        found.append((results.ledgers, what, grad))
    return found


def one_rank(function, comm, wholes: dict, grad, dim: int | None, what: str) -> dict:
    """Run a layer on one rank; return y and the gradients of its arguments.

    function, comm  the layer, and the communicator
    wholes, grad    of case_of
    dim             the dim of y that is cut, or None
    what            what runs, for the message
    """
    where = f"{what}: rank {comm.rank}"
    leaves = own_leaves(wholes, CUT, comm.rank, comm.world_size)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    y = function(comm, *leaves.values())
    own = part_of(grad, dim, comm.rank, comm.world_size)
    asked = f"a tensor of shape {tuple(own.shape)}"
    same = isinstance(y, torch.Tensor) and y.shape == own.shape
    expect(same, f"{where} returned {form_of(y)}", asked, "the return line")
    look = "where autograd lost it: a call of comm passes no gradients on"
    connected = y.requires_grad or y.numel() == 0
    expect(connected, f"{where} returned a y that has no way back", "a y with a gradient", look)
    shown = y.detach().clone()
    if y.requires_grad:
        y.backward(own)
    for name, leaf in leaves.items():
        if not torch.equal(leaf.detach(), before[name]):
            look = "what works in place: +=, add_, an index on the left"
            raise CheckFailed(f"{where} changed its {name}", "it as it was", look)
    return {"y": shown, **{name: leaf.grad for name, leaf in leaves.items()}}


@row.property("row_layer: the output", points=1)
def _(student, numbers):
    check_layer(student, "row_layer", None, EVEN, show=("y",))


@row.property("row_layer: the gradients of input, rows and bias", points=2)
def _(student, numbers):
    check_layer(student, "row_layer", None, EVEN)


@row.property("row_layer: outputs that the ranks do not divide", points=1)
def _(student, numbers):
    check_layer(student, "row_layer", None, UNEVEN)


@row.property("row_layer: one all_reduce, and nothing backward", points=2)
def _(student, numbers):
    for ledgers, what, grad in check_layer(student, "row_layer", None, [*EVEN[:2], UNEVEN[1]]):
        for ledger in ledgers:
            look = "what the sum brings along, and what every rank knows by itself"
            expect_calls(ledger, [("all_reduce", grad.numel() * 8)], what, look)


@row.property("row_layer_slices: the output", points=1)
def _(student, numbers):
    check_layer(student, "row_layer_slices", -1, EVEN, show=("y",))


@row.property("row_layer_slices: the gradients of input, rows and bias", points=2)
def _(student, numbers):
    check_layer(student, "row_layer_slices", -1, EVEN)


@row.property("row_layer_slices: outputs that the ranks do not divide", points=1)
def _(student, numbers):
    check_layer(student, "row_layer_slices", -1, UNEVEN)


@row.property("row_layer_slices: one reduce_scatter, backward one all_gather of a slice", points=2)
def _(student, numbers):
    for ledgers, what, grad in check_layer(student, "row_layer_slices", -1, [*EVEN[:2], UNEVEN[1]]):
        for rank, ledger in enumerate(ledgers):
            own = part_of(grad, -1, rank, len(ledgers)).numel() * 8
            look = "what each rank needs forward, and what x and rows need backward"
            calls = [("reduce_scatter", grad.numel() * 8), ("all_gather", own)]
            expect_calls(ledger, calls, what, look)
