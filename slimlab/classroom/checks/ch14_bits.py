"""Grader of exercise 14.4 of chapter 14: three bits for each number of a layer, spent well.

The score is the error of outputs on inputs that the answer never saw, beside that of rounding to
the nearest. The grader computes with what was handed back and with nothing else, and counts it.
The bounds lie between what one idea reaches and the next: 0.87 and 0.75 for a better range alone,
0.44 for compensation alone, 0.38 for a range of least error before it and 0.34 for the best range
of each row after it, means over three layers.

Published methods are compared in the same way, by the perplexity of a model at equal bits.
"""

from functools import cache as remembered

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect

SEEDS = (11, 12, 13)
HIGHEST = 7
NEARLY_ONE = 1.02  # another type of the scale rounds a little otherwise
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

few_bits = Exercise(
    "14.4",
    "Three bits, spent well",
    requires=("quantize_layer",),
    stars=3,
    hints=(
        "One number far out sets the step of its whole row. Try ranges that are shorter, part by "
        "part, and keep for each row the one with the least error. The error of what?",
        "The rows of a layer do not know of each other: with H the sum of x x^T, a row's share of "
        "the squared error is d H d for its difference d.",
        "Chapter 14 moves each column's error into the columns to come. It takes the scales of a "
        "row from its whole range; does it have to?",
        "The best range for rounding to the nearest is not the best one with compensation. What "
        "would it cost to try all of them?",
        "Corners: a scale of 0, in float16 too; a diagonal of H with a 0 in it; an H without an "
        "inverse. A little added to the diagonal helps.",
    ),
)


class Layer:
    """A weight (O, I) with a few numbers far out, inputs to look at and others to be judged by.

    seed        of the draw
    num_inputs  to look at
    """

    def __init__(self, seed: int, num_inputs: int = 384):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(48, 128, generator=generator)
        tails = torch.randn(4, 48, 128, generator=generator).square().mean(dim=0).sqrt()
        mix = torch.randn(24, 128, generator=generator)
        self.weight = 0.02 * weight / (tails + 0.05)
        draws = []
        for count in (num_inputs, 384):
            few = torch.randn(count, 24, generator=generator)
            draws.append(few @ mix + torch.randn(count, 128, generator=generator))
        self.inputs, self.others = draws

    def nearest_error(self) -> float:
        """Measure the error of rounding to the nearest, each row over its range, 0 included."""
        low, high = (one.clamp(*ends) for one, ends in zip(self._ends(), ((None, 0), (0, None))))
        scale = ((high - low) / HIGHEST).clamp(min=1e-6).half().float()
        zero = (-low / scale).round()
        codes = (self.weight / scale + zero).round().clamp(0, HIGHEST)
        return self.error(scale * (codes - zero))

    def _ends(self) -> tuple[Tensor, Tensor]:
        return self.weight.amin(dim=1, keepdim=True), self.weight.amax(dim=1, keepdim=True)

    def error(self, weight: Tensor) -> float:
        """Measure what `weight` in this one's place does to the outputs, as a part of them."""
        moved = self.others.double() @ (self.weight.double() - weight.double()).T
        return float(moved.norm() / (self.others.double() @ self.weight.double().T).norm())


def rebuilt(student, layer: Layer, what: str) -> Tensor:
    """Call the student's quantize_layer; check form and budget; return the weight that it means.

    student  what the student's cells define
    layer    weight and inputs that are given
    what     which layer it is, for the message
    """
    given = layer.weight.clone(), layer.inputs.clone()
    result = function_of(student, "quantize_layer")(*given)
    look = "what works in place: clamp_, +=, an index on the left"
    same = torch.equal(given[0], layer.weight) and torch.equal(given[1], layer.inputs)
    expect(same, f"{what}: an argument was changed", "it as it was", look)
    look = "the return line"
    fits = isinstance(result, tuple | list) and len(result) == 3
    expect(fits, f"{what}: {form_of(result)} came back", "codes, scale and zero", look)
    codes, scale, zero = result
    num_rows, width = layer.weight.shape
    is_whole = type(codes) is Tensor and codes.dtype in WHOLE
    saw = f"{form_of(codes)}, {getattr(codes, 'dtype', 'no dtype')}"
    expect(is_whole, f"{what}: codes: {saw}", "a tensor of a whole-number type", look)
    asked = f"a tensor of shape {(num_rows, width)}"
    expect(codes.shape == (num_rows, width), f"{what}: codes: {form_of(codes)}", asked, look)
    low, high = int(codes.min()), int(codes.max())
    look = "clamp, and the type of the codes: uint8 has no numbers below 0"
    expect(0 <= low <= high <= HIGHEST, f"{what}: codes from {low} to {high}", "0 to 7", look)
    num_bits = 3 * num_rows * width
    for name, one in (("scale", scale), ("zero", zero)):
        if one is None and name == "zero":
            continue
        num_bits += checked_bits(one, (num_rows, width), f"{what}: {name}")
    budget = 3 * num_rows * width + 32 * num_rows
    saw = f"{what}: {num_bits / (num_rows * width):.4g} bits for each number"
    look = "how many scales and zeros there are, and the bits of their types"
    expect(num_bits <= budget, saw, f"at most {budget / (num_rows * width):.4g}", look)
    group = width // scale.shape[1]
    steps = scale.float().repeat_interleave(group, dim=1)
    middle = torch.tensor(HIGHEST / 2)
    if zero is not None:
        middle = zero.float().repeat_interleave(width // zero.shape[1], dim=1)
    return steps * (codes.float() - middle)


def checked_bits(one: object, shape: tuple, what: str) -> int:
    """Check the form of scales or zeros, and count the bits of what is handed back.

    one    scales or zeros
    shape  of the weight
    what   what it is, for the message
    """
    look = "the return line: a row of scales and zeros for each row of the weight"
    fits = type(one) is Tensor and one.dim() == 2 and one.shape[0] == shape[0]
    fits = fits and one.shape[1] > 0 and shape[1] % one.shape[1] == 0 and not one.is_complex()
    asked = f"a tensor of real numbers, of shape ({shape[0]}, G), where G divides {shape[1]}"
    expect(fits, f"{what}: {form_of(one)}", asked, look)
    finite = bool(torch.isfinite(one.float()).all())
    expect(finite, f"{what}: nan or infinity", "finite numbers", "what is divided by what")
    return 8 * one.numel() * one.element_size()


@remembered
def layers() -> list[tuple[Layer, float]]:
    """Draw the layers, each with the error of rounding to the nearest."""
    made = [Layer(seed) for seed in SEEDS]
    return [(one, one.nearest_error()) for one in made]


_SCORES: dict[int, float] = {}


def check_score(student, most: float, look: str) -> None:
    """Fail if the mean error beside that of the nearest is above `most`.

    student  what the student's cells define
    most     the bound
    look     where to look, for the message
    """
    function = function_of(student, "quantize_layer")
    if id(function) not in _SCORES:
        parts = []
        for number, (layer, nearest) in enumerate(layers(), start=1):
            weight = rebuilt(student, layer, f"layer {number}")
            parts.append(layer.error(weight) / nearest)
        _SCORES[id(function)] = sum(parts) / len(parts)
    score = _SCORES[id(function)]
    saw = f"an error of {score:.2f} of that of the nearest"
    expect(score <= most, saw, f"at most {most:g}", look)


@few_bits.property("in the budget, and near the weight", points=2)
def _(student, numbers):
    look = "scale * (codes - zero) beside the weight: how far is each number from its own step?"
    check_score(student, 1.3, look)


@few_bits.property("no worse than the nearest", points=2)
def _(student, numbers):
    look = "how many steps a row has for its whole range, and what a zero that moves saves"
    check_score(student, NEARLY_ONE, look)


@few_bits.property("at most 0.93 of its error: a better range", points=2)
def _(student, numbers):
    check_score(student, 0.93, "the step of a row in which one number lies far out")


@few_bits.property("at most 0.55: columns make up for each other", points=3)
def _(student, numbers):
    check_score(student, 0.55, "what the inputs know: which errors would cancel in the output?")


@few_bits.property("at most 0.415: both together", points=2)
def _(student, numbers):
    check_score(student, 0.415, "the range that compensation starts from")


@few_bits.property("at most 0.365: each row's range chosen by what comes out", points=2)
def _(student, numbers):
    look = "by what a row's range is chosen: by which error, before or after compensation?"
    check_score(student, 0.365, look)


@few_bits.property("rows of zeros, equal rows, silent columns, few inputs", points=2)
def _(student, numbers):
    layer = Layer(21)
    layer.weight[3] = 0.0
    layer.weight[5] = 0.03
    layer.weight[6] = -0.03
    layer.inputs[:, 40], layer.others[:, 40] = 0.0, 0.0
    check_corner(student, layer, "a layer with a row of zeros and equal rows, and a silent column")
    layer = Layer(22, num_inputs=50)
    check_corner(student, layer, "a layer of 128 columns with 50 inputs")


def check_corner(student, layer: Layer, what: str) -> None:
    """Fail unless the answer for a layer is finite and no worse than the nearest.

    student  what the student's cells define
    layer    weight and inputs
    what     which layer it is, for the message
    """
    part = layer.error(rebuilt(student, layer, what)) / layer.nearest_error()
    look = "scales of 0, and an inverse where there is none"
    saw = f"{what}: an error of {part:.2f} of that of the nearest"
    expect(part <= NEARLY_ONE, saw, f"at most {NEARLY_ONE:g}", look)
