"""Grader of exercise 8.2 of chapter 08: gradients clipped before they are added up.

The oracle is one process with all rows. The student's test is tried on programs that differ from a
right one by one fault each; every fault needs something of its own to show: unequal shards, a rank
without rows, a third rank, a gradient that is longer or shorter than allowed, or another rank than
the first.

torch.nn.utils.clip_grad_norm_ behind DistributedDataParallel's backward is right, since gradients
are summed by then; with sharded parameters it takes the norm of a part alone.
"""

from functools import partial

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import expect_verdict, form_of, function_of
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import drawn, expect_calls
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal

ROUNDING = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}
BY_HAND = {"atol": 1e-6, "rtol": 0.005, "reason": "you may round"}
COUNTS = ((4, 4), (5, 2, 1), (3,), (0, 4), (1, 2, 3, 4))
FAULTS = {
    "": "a right program",
    "late": "a right program that divides last",
    "early": "the given program",
    "both": "a program that clips before and after the sum",
    "never": "a program that does not clip",
    "always": "a program that also lengthens short gradients",
    "plain": "a program that takes the plain mean of the ranks' means",
    "empty": "a program that divides by the rows of a rank without any",
    "pairs": "a program that adds up two neighbours",
    "last": "a program whose last rank does not clip",
    "loss": "a program whose loss is that of the rank's own rows",
    "each": "a program that clips each number by itself",
    "sign": "a program that goes uphill: its gradient is turned round",
}

clip = Exercise(
    "8.2",
    "Right loss, right length",
    requires=("my_diagnosis", "is_right", "mended_step"),
    stars=2,
    instance=lambda rng: {
        "counts": rng.choice([[1, 3], [3, 1], [1, 4], [4, 1]]),
        "gradients": [
            rng.choice([[30, 40], [40, 30], [24, 32], [32, 24]]),
            rng.choice([[-3, 4], [4, -3], [3, -4], [-4, 3]]),
        ],
        "max_norm": rng.choice([5, 10]),
    },
    hints=(
        "Whose gradient may be long without any harm? Whose must not be?",
        "my_diagnosis: clip both, then weight; against weight both, then clip.",
        "is_right: compute loss and gradient of all rows without step. A program that never clips "
        "agrees with itself on one rank.",
        "is_right: one max_norm above the gradient's length and one below; shards of different "
        "sizes, one of them empty; three ranks and more; look at all of them.",
        "mended_step: after the all_reduce every rank has the whole gradient. What is left to ask "
        "the others?",
    ),
)


def given_step(comm, weights, rows, targets, max_norm, fault="early"):
    """Do what the program of the exercise does, with its fault, another one or none.

    comm, weights, rows, targets, max_norm  as there
    fault                                   one of FAULTS
    """
    errors = rows @ weights - targets
    num_rows = len(rows) if fault == "empty" else max(len(rows), 1)
    own = rows.T @ errors / num_rows
    if fault in ("early", "both"):
        own = _clipped(own, max_norm)
    count = min(len(rows), 1) if fault == "plain" else len(rows)
    loss_and_count = torch.tensor([errors.square().sum() / 2, len(rows), count], dtype=own.dtype)
    flat = torch.cat([own * count, loss_and_count])
    if fault == "pairs" and comm.world_size > 1:
        right, left = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
        flat = flat + comm.sendrecv(flat, right, left)
    else:
        flat = comm.all_reduce(flat)
    loss = flat[-3] / flat[-2]
    if fault == "loss" and len(rows):
        loss = errors.square().mean() / 2
    if fault == "late":
        total = flat[:-3]
        return loss, _clipped(total, max_norm * flat[-1]) / flat[-1]
    gradient = flat[:-3] / flat[-1]
    is_last = 0 < comm.rank == comm.world_size - 1
    if fault == "each":
        gradient = gradient.clamp(-max_norm, max_norm)
    elif fault == "always":
        gradient = gradient * max_norm / gradient.norm()
    elif fault not in ("early", "never") and not (fault == "last" and is_last):
        gradient = _clipped(gradient, max_norm)
    return loss, -gradient if fault == "sign" else gradient


def _clipped(gradient: Tensor, max_norm) -> Tensor:
    return gradient * (max_norm / gradient.norm()).clamp(max=1.0)


def drawn_batch(counts, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw weights, rows and targets, sum(counts) rows; others for each seed."""
    num_rows = sum(counts)
    # Ranks without much in common: later rows are longer.
    rows = drawn(seed, num_rows, 4) * torch.linspace(0.5, 3.0, num_rows).double()[:, None]
    return drawn(seed + 1, 4), rows, 2 * drawn(seed + 2, num_rows)


def serial_step(weights: Tensor, rows: Tensor, targets: Tensor, max_norm: float):
    """Return mean loss and clipped gradient of all rows.

    weights, rows, targets, max_norm  as in the exercise
    """
    errors = rows @ weights - targets
    gradient = rows.T @ errors / len(rows)
    return errors.square().mean() / 2, _clipped(gradient, torch.tensor(max_norm).double())


@clip.property("your test finds the fault, and no fault in a right program", points=2)
def _(student, numbers):
    look = "what step returns on three ranks, beside one process: loss and gradient both"
    judge(student, ("early",), look)
    judge(student, ("", "late"), "how much rounding may do, also where ranks have no rows")


@clip.property("your test finds gradients that are not clipped as they should be", points=2)
def _(student, numbers):
    look = "loss and gradient computed without step, with max_norm above and below its length"
    judge(student, ("never", "always", "each", "both", ""), look)


@clip.property("your test looks at all ranks, shards and numbers, and at the loss", points=2)
def _(student, numbers):
    looks = {
        "plain": "shards of different sizes",
        "empty": "a rank without rows, and how nan is compared",
        "pairs": "more ranks than two",
        "last": "what every rank returns",
        "loss": "the loss on every rank",
        "sign": "the gradient number by number, not its length alone",
        "": "a right program, which must pass",
    }
    for fault, look in looks.items():
        judge(student, (fault,), look)


def judge(student, faults, look: str) -> None:
    """Compare the student's verdicts on programs with the truth.

    faults  of the programs, of FAULTS
    look    where to look, for the message
    """
    function = function_of(student, "is_right")
    for fault in faults:
        what = f"is_right of {FAULTS[fault]}"
        program = partial(given_step, fault=fault)
        expect_verdict(function, program, fault in ("", "late"), what, look)


@clip.property("your prediction by hand was right", points=2)
def _(student, numbers):
    saw = function_of(student, "my_diagnosis")()
    keys = ("found", "true", "where")
    fine = isinstance(saw, dict) and set(keys) <= set(saw)
    look = "the return line"
    expect(fine, f"my_diagnosis(): {form_of(saw)}", f"a dictionary with {', '.join(keys)}", look)
    counts, max_norm = numbers["counts"], torch.tensor(float(numbers["max_norm"])).double()
    own = [torch.tensor(one).double() for one in numbers["gradients"]]
    found = sum(n * _clipped(one, max_norm) for n, one in zip(counts, own)) / sum(counts)
    true = _clipped(sum(n * one for n, one in zip(counts, own)) / sum(counts), max_norm)
    look = "what each rank brings to the sum, and with which weight"
    expect_close(saw["found"], found, "my_diagnosis()['found']", look, **BY_HAND)
    look = "whose length is compared with max_norm"
    expect_close(saw["true"], true, "my_diagnosis()['true']", look, **BY_HAND)
    look = "the lines one by one: what is right for every shard, and what is not?"
    expect_equal(saw["where"], 3, "my_diagnosis()['where']", look)


def mended(student, counts, max_norm: float, seed: int):
    """Run the student's mended_step; compare loss and gradient with one process.

    counts    rows of each rank
    max_norm  as in the exercise
    seed      of the batch
    returns   the ledgers of the ranks, and what was run
    """
    function = function_of(student, "mended_step")
    weights, rows, targets = drawn_batch(counts, seed)
    parts = list(zip(rows.split(counts), targets.split(counts)))
    what = f"mended_step, rows {list(counts)}, max_norm {max_norm:g}"

    def program(comm):
        own = [one.clone() for one in (weights, *parts[comm.rank])]
        result = function(comm, *own, max_norm)
        pairs = zip(own, (weights, *parts[comm.rank]), ("weights", "rows", "targets"))
        return result, [name for now, before, name in pairs if not torch.equal(now, before)]

    results = run(program, len(counts), what)
    loss, gradient = serial_step(weights, rows, targets, max_norm)
    for rank, (one, changed) in enumerate(results):
        label = f"{what}: rank {rank}"
        fits = isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], Tensor)
        look = "the return line: loss and gradient, as step has it"
        expect(fits, f"{label} returned {form_of(one)}", "a loss and a gradient", look)
        look = "the loss of step: it was right"
        expect_close(one[0], loss, f"{label}: loss", look, **ROUNDING)
        look = "which gradient's length decides, and by what the sums are divided"
        expect_close(one[1], gradient, f"{label}: gradient", look, **ROUNDING)
        if changed:
            look = "what works in place: -=, mul_, an index on the left"
            raise CheckFailed(f"{label} changed its {changed[0]}", "it as it was", look)
    return results.ledgers, what


@clip.property("the mended step, where nothing is too long", points=1)
def _(student, numbers):
    for counts in COUNTS:
        mended(student, counts, 1e3, 10)


@clip.property("the mended step, where the gradient is too long", points=2)
def _(student, numbers):
    for counts in COUNTS:
        for max_norm in (0.25, 1.5):
            mended(student, counts, max_norm, 20)


@clip.property("the mended step, where only one rank's gradient is too long", points=1)
def _(student, numbers):
    for counts in ((4, 2), (5, 2, 1), (6, 1)):
        weights, rows, targets = drawn_batch(counts, 30)
        parts = zip(rows.split(counts), targets.split(counts))
        longest = max(serial_step(weights, *part, 1e9)[1].norm().item() for part in parts)
        whole = serial_step(weights, rows, targets, 1e9)[1].norm().item()
        mended(student, counts, (longest + whole) / 2, 30)


@clip.property("the mended step makes one all_reduce, no longer than before", points=2)
def _(student, numbers):
    for counts in ((4, 4), (5, 2, 1), (1, 2, 3, 4)):
        ledgers, what = mended(student, counts, 0.5, 40)
        for ledger in ledgers:
            look = "what every rank knows after the first sum"
            expect_calls(ledger, [("all_reduce", (4 + 2) * 8)], what, look)


@clip.property("a gradient of 0 stays 0", points=1)
def _(student, numbers):
    function = function_of(student, "mended_step")
    weights, rows, _ = (one.round() for one in drawn_batch((2, 3), 50))  # sums are exact
    parts = list(zip(rows.split((2, 3)), (rows @ weights).split((2, 3))))
    what = "mended_step with weights that fit exactly"
    results = run(lambda comm: function(comm, weights.clone(), *parts[comm.rank], 1.0), 2, what)
    for rank, one in enumerate(results):
        look = "what is divided by a length of 0"
        gradient = one[1] if isinstance(one, tuple) else one
        near = {"atol": 1e-12, "rtol": 0.0, "reason": "float64 rounding"}
        expect_close(gradient, torch.zeros(4), f"{what}: rank {rank}: gradient", look, **near)
