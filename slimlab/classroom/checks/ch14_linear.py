"""Grader of exercise 14.2 of chapter 14: a layer in integers with a scale where none can be.

The oracle adds up whole numbers in int64. The student's test is tried on programs that differ from
a right one by one fault each; every fault needs something of its own to show: columns of different
size, tokens of different size, rows of zeros, numbers below 0, sums longer than 16 bits.

Production kernels (FBGEMM, oneDNN, CUTLASS) take a scale per output feature and one per token, and
refuse scales along the sum: no single factor could undo them afterwards.
"""

from functools import partial

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import expect_verdict, form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal

ROUNDING = {"atol": 1e-9, "rtol": 1e-9, "reason": "float64 rounding"}
BY_HAND = {"atol": 1e-6, "rtol": 0.005, "reason": "you may round"}
FAULTS = {
    "": "a right program",
    "floats": "a right program whose codes are floats",
    "columns": "the given program",
    "whole": "a program with one scale for the whole weight",
    "batch": "a program with one scale for all tokens",
    "features": "a program with a scale for each feature of x",
    "signed": "a program that takes the greatest number for the greatest absolute value",
    "zeros": "a program that divides by the scale of a row of zeros",
    "down": "a program that rounds towards 0",
    "wrap": "a program whose sums have 16 bits",
    "byte": "a program that divides by 128, so that a code of 128 becomes -128",
    "none": "a program that does not round at all",
    "sign": "a program that returns the sums with their signs turned round",
}
RIGHT = ("", "floats")


def draw_layer(rng) -> dict:
    """Draw a token and a weight with whole codes for 14.2; rng is a random.Random."""
    p, s = rng.choice([(1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2)])
    small = [rng.choice([-1, 1]) * rng.choice([80, 100, 120]) for _ in range(2)]
    return {
        "x": [127, rng.choice([-1, 1]) * rng.choice([90, 100, 110, 120])],
        "weight": [[127 * p, small[0]], [small[1], 127 * s]],
    }


integers = Exercise(
    "14.2",
    "A layer in integers",
    requires=("my_diagnosis", "is_right", "mended_linear"),
    stars=2,
    instance=draw_layer,
    hints=(
        "Write one output number as a sum over the features. Which scales can stand in front of "
        "the sum, and which cannot?",
        "my_diagnosis: do the two-by-two case by hand, line by line: codes, sums, scales.",
        "Why does it look right? How different are the scales of a fresh layer's columns?",
        "is_right: compute what the text asks yourself, and compare number by number. Which "
        "inputs would make two different programs agree by chance? Avoid them.",
        "is_right: tokens of different size, rows and columns of different size, rows of zeros, "
        "rows whose greatest absolute value is below 0, long sums of equal signs.",
    ),
)


def given_linear(x: Tensor, weight: Tensor, fault: str = "columns") -> Tensor:
    """Do what the program of the exercise does, with its fault, another one or none.

    x, weight  as there
    fault      one of FAULTS
    """
    if fault == "none":
        return x @ weight.T
    highest = 128 if fault == "byte" else 127
    x_scale = _scale(x, fault, {"batch": None, "features": 0}) / highest
    weight_scale = _scale(weight, fault, {"columns": 0, "whole": None}) / highest
    x_codes, codes = (
        one.trunc() if fault == "down" else one.round()
        for one in (x / x_scale, weight / weight_scale)
    )
    if fault == "byte":
        x_codes, codes = (torch.where(one > 127, one - 256, one) for one in (x_codes, codes))
    sums = x_codes @ codes.T
    if fault not in ("floats", "zeros"):
        sums = (x_codes.long() @ codes.long().T).to(x.dtype)
    if fault == "wrap":
        sums = (sums + 2**15) % 2**16 - 2**15
    if fault == "sign":
        sums = -sums
    if fault == "features":
        x_scale = x_scale.mean()
    if fault not in ("columns", "whole"):
        weight_scale = weight_scale.T
    return sums * x_scale * weight_scale


def _scale(rows: Tensor, fault: str, dims: dict) -> Tensor:
    """Return the greatest absolute value of every row, or what a fault makes of it."""
    sizes = rows if fault == "signed" else rows.abs()
    dim = dims.get(fault, 1)
    sizes = sizes.amax() if dim is None else sizes.amax(dim=dim, keepdim=True)
    return sizes if fault == "zeros" else sizes.abs().clamp(min=1e-30)


def true_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute what the text of the exercise asks.

    x, weight  as there
    """
    codes, scales = [], []
    for rows in (x, weight):
        scale = rows.abs().amax(dim=1, keepdim=True) / 127
        scales.append(scale)
        codes.append((rows / scale.clamp(min=1e-300)).round().long())
    return (codes[0] @ codes[1].T).double() * scales[0] * scales[1].T


@integers.property("your test finds the fault, and no fault in a right program", points=2)
def _(student, numbers):
    look = "weights whose columns differ in size, as those of trained layers do"
    judge(student, ("columns",), look)
    judge(student, RIGHT, "what the text asks, and how far that is from the product of floats")


@integers.property("your test finds scales that are shared by too many", points=2)
def _(student, numbers):
    looks = {
        "whole": "weights whose rows differ in size",
        "batch": "tokens of different size, more than one of them",
        "features": "the features of x, which differ in size too",
        "": "a right program, which must pass",
    }
    for fault, look in looks.items():
        judge(student, (fault,), look)


@integers.property("your test looks at signs, zeros, rounding and long sums", points=3)
def _(student, numbers):
    looks = {
        "sign": "the numbers themselves, not their sizes alone",
        "signed": "rows whose greatest absolute value is below 0",
        "zeros": "rows of zeros, and how nan is compared",
        "down": "how far from the true result a right one may be",
        "wrap": "tokens and rows of the weight that are alike, so that sums are long",
        "byte": "the greatest number of a row, where it is above 0",
        "none": "a result that is better than eight bits allow",
        "floats": "a right program, which must pass",
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
        program = partial(given_linear, fault=fault)
        expect_verdict(function, program, fault in RIGHT, what, look)


@integers.property("your prediction by hand was right", points=2)
def _(student, numbers):
    saw = function_of(student, "my_diagnosis")()
    keys = ("found", "true", "where")
    fine = isinstance(saw, dict) and set(keys) <= set(saw)
    look = "the return line"
    expect(fine, f"my_diagnosis(): {form_of(saw)}", f"a dictionary with {', '.join(keys)}", look)
    x, weight = (torch.tensor(numbers[one]).double() for one in ("x", "weight"))
    look = "the scale of each column, and onto which output number it is put"
    wanted = given_linear(x[None], weight)[0]
    expect_close(saw["found"], wanted, "my_diagnosis()['found']", look, **BY_HAND)
    look = "the product of token and weight: which sum is that?"
    expect_close(saw["true"], weight @ x, "my_diagnosis()['true']", look, **BY_HAND)
    look = "the lines one by one: which of them does not do what the text asks?"
    expect_equal(saw["where"], 2, "my_diagnosis()['where']", look)


def check_mended(student, x: Tensor, weight: Tensor, note: str, look: str) -> None:
    """Compare the student's mended_linear with the oracle.

    x, weight   as in the exercise
    note, look  what is special here, and where to look
    """
    given = x.clone(), weight.clone()
    saw = function_of(student, "mended_linear")(*given)
    what = f"mended_linear, {len(x)} tokens, weight {tuple(weight.shape)}{note}"
    same = torch.equal(given[0], x) and torch.equal(given[1], weight)
    place = "what works in place: /=, round_, clamp_"
    expect(same, f"{what}: an argument was changed", "it as it was", place)
    is_tensor = isinstance(saw, Tensor)
    expect(is_tensor, f"{what} returned {form_of(saw)}", "a tensor", "the return line")
    error = (saw - x @ weight.T).norm() if saw.shape == (len(x), len(weight)) else None
    if error == 0 and bool(weight.any()):
        expect(False, f"{what}: the product of the floats", "one of whole numbers", look)
    expect_close(saw, true_linear(x, weight), what, look, **ROUNDING)


def uneven_layer(num_tokens: int, width: int, num_outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw tokens and a weight whose rows and columns all differ in size.

    num_tokens, width, num_outputs  the sizes
    seed                            of the draw
    """
    x = drawn(seed, num_tokens, width) * torch.logspace(-1, 1, num_tokens).double()[:, None]
    weight = drawn(seed + 1, num_outputs, width) * torch.logspace(-1, 1, width).double()
    return x, weight * torch.logspace(1, -1, num_outputs).double()[:, None]


@integers.property("the mended layer, square", points=2)
def _(student, numbers):
    look = "whose greatest absolute value a scale is, and where it comes in again"
    for num_tokens, width in ((4, 4), (3, 8), (20, 16)):
        check_mended(student, *uneven_layer(num_tokens, width, width, 10 + width), "", look)


@integers.property("the mended layer, not square", points=1)
def _(student, numbers):
    look = "the shape of the weight's scales: one for each row, then one for each output"
    for num_tokens, width, num_outputs in ((5, 6, 3), (1, 4, 9), (7, 1, 7)):
        check_mended(student, *uneven_layer(num_tokens, width, num_outputs, 20 + width), "", look)


@integers.property("the mended layer: rows of zeros, and long sums", points=2)
def _(student, numbers):
    x, weight = uneven_layer(5, 6, 6, 30)
    x[2], weight[4] = 0.0, 0.0
    check_mended(student, x, weight, ", rows of zeros", "what is divided by a scale of 0")
    x, weight = torch.ones(2, 1500).double(), torch.ones(2, 1500).double()
    weight[1] = -1.0
    weight[0, ::2] = 100.4 / 127
    look = "how many bits a sum of 1500 products needs"
    check_mended(student, x, weight, ", long sums", look)
