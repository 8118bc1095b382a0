"""Graders of the exercises of chapter 14, quantization.

14.1, levels where a bell has its quantiles; 14.2, a layer in integers, stands in ch14_linear.py,
14.3, a cache of four bits, in ch14_cache.py and 14.4, three bits spent well, in ch14_bits.py. The
oracle of 14.1 has quantiles from torch, and makes numbers from codes, so that it knows the nearest
level without looking for it.

bitsandbytes ships such levels as a table, and finds the nearest by comparisons written out.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch14_bits import few_bits
from slimlab.classroom.checks.ch14_cache import cache
from slimlab.classroom.checks.ch14_linear import integers
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal

__all__ = ["bell", "cache", "few_bits", "integers"]

BY_HAND = {"atol": 1e-9, "rtol": 0.005, "reason": "you may round"}
FLOAT32 = {"atol": 1e-6, "rtol": 1e-6, "reason": "float32 rounding"}
UNEVEN = (-1.0, -0.7, -0.2, 0.0, 0.1, 0.35, 0.5, 1.0)


def draw_block(rng) -> dict:
    """Draw sizes, a code of 2 bits and four numbers for 14.1; rng is a random.Random."""
    loudest = rng.choice([4, 8, 10, 20])
    levels = [-1.0, 0.0, rng.choice([0.3, 0.4]), 1.0]
    # One number near each level but the last, on either side, none of them half-way.
    parts = [-0.7, rng.choice([-0.4, 0.1]), rng.choice([0.25, 0.5, 0.6]), rng.choice([-1, 1])]
    rng.shuffle(parts)
    return {
        "block": rng.choice([32, 64, 128]),
        "group": rng.choice([64, 128, 256]),
        "levels": levels,
        "values": [round(loudest * part, 3) for part in parts],
    }


bell = Exercise(
    "14.1",
    "Levels for a bell",
    requires=("my_prediction", "normal_levels", "encode", "decode"),
    stars=1,
    instance=draw_block,
    hints=(
        "normal_levels(2, 0.9): two levels above 0, one below. What is the greatest divided by "
        "itself, and where is the lowest?",
        "encode: half-way between two levels the code changes. The distances from a number to all "
        "levels, and argmin, are short to write.",
        "A block of zeros: what is 0 / 0? Any maximum will do there, if 0 is a level.",
        "encode_scales: maxima.split(group) stands a shorter last group.",
        "Bits: a code, its share of a block's 8 bits, and its share of a group's 32.",
    ),
)


def true_levels(num_bits: int, top: float) -> Tensor:
    """Compute the levels from torch's inverse of the normal distribution.

    num_bits, top  as in the exercise
    """
    half = 2 ** (num_bits - 1)
    below = torch.linspace(0.5, top, half, dtype=torch.float64)[1:]
    above = torch.special.ndtri(torch.linspace(0.5, top, half + 1, dtype=torch.float64))
    return torch.cat([-torch.special.ndtri(below).flip(0), above]) / above[-1]


def coded_numbers(levels: Tensor, block: int, num_blocks: int, seed: int):
    """Make numbers whose codes are known: each lies nearer to its own level than to any other.

    levels             rising, from -1 to 1
    block, num_blocks  numbers in a block, and blocks
    seed               of the draw
    returns            values (n,) float32, codes (n,) int64, maxima (num_blocks,) float32
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(len(levels), (num_blocks, block), generator=generator)
    codes[:, 0] = (len(levels) - 1) * torch.randint(2, (num_blocks,), generator=generator)
    gaps = torch.cat([torch.zeros(1), levels.diff().float(), torch.zeros(1)])
    side = torch.randint(2, codes.shape, generator=generator)
    moved = 0.4 * torch.rand(codes.shape, generator=generator) * (2 * side - 1)
    moved[:, 0] = 0.0
    parts = levels.float()[codes] + moved * gaps[codes + side]
    maxima = torch.logspace(-2, 1, num_blocks)[torch.randperm(num_blocks, generator=generator)]
    return (parts * maxima[:, None]).flatten(), codes.flatten(), maxima


@bell.property("normal_levels", points=3)
def _(student, numbers):
    function = function_of(student, "normal_levels")
    for num_bits, top in ((4, 0.9677083), (2, 0.9), (3, 0.99), (5, 0.95)):
        what, wanted = f"normal_levels({num_bits}, {top})", true_levels(num_bits, top)
        saw, form = function(num_bits, top), "the return line: all levels, 0 and 1 among them"
        is_tensor = isinstance(saw, Tensor) and saw.shape == wanted.shape
        expect(is_tensor, f"{what}: {form_of(saw)}", f"a tensor of shape ({2**num_bits},)", form)
        in_order = bool((saw.diff() > 0).all())
        expect(in_order, f"{what}: levels that do not rise", "rising ones", "the order")
        look = "how many levels each side has, where its quantiles end, and what all are divided by"
        near = {"atol": 1e-9, "rtol": 0.0, "reason": "float64 rounding"}
        expect_close(saw, wanted, what, look, **near)


def check_encode(student, levels: Tensor, block: int, num_blocks: int, look: str) -> None:
    """Compare the student's codes and maxima with those that the numbers were made from.

    levels, block, num_blocks  as in coded_numbers
    look                       where to look if a code differs
    """
    values, codes, maxima = coded_numbers(levels, block, num_blocks, block + num_blocks)
    given = values.clone(), levels.clone()
    what = f"encode of {num_blocks} blocks of {block}, {len(levels)} levels"
    result = function_of(student, "encode")(*given, block)
    is_pair = isinstance(result, tuple | list) and len(result) == 2
    expect(is_pair, f"{what} returned {form_of(result)}", "codes and maxima", "the return line")
    same = torch.equal(given[0], values) and torch.equal(given[1], levels)
    expect(same, f"{what} changed an argument", "it as it was", "what works in place: /=, div_")
    place = "which numbers share a maximum, and whether their signs count"
    expect_close(result[1], maxima, f"{what}: maxima", place, **FLOAT32)
    expect_equal(result[1].dtype, torch.float32, f"{what}: dtype of the maxima", "the return line")
    expect_close(result[0], codes, f"{what}: codes", look, rtol=0.0, reason="whole numbers")
    expect_equal(result[0].dtype, torch.uint8, f"{what}: dtype of the codes", "the return line")


@bell.property("encode: the nearest level, block by block", points=3)
def _(student, numbers):
    look = "which level is the nearest, where levels are not evenly spaced"
    check_encode(student, torch.tensor(UNEVEN, dtype=torch.float64), 16, 1, look)
    for block, num_blocks in ((64, 5), (8, 30), (1, 7)):
        check_encode(student, true_levels(4, 0.9677083), block, num_blocks, look)


@bell.property("decode: what the codes stand for; zeros stay zeros", points=2)
def _(student, numbers):
    levels = true_levels(3, 0.96)
    _, codes, maxima = coded_numbers(levels, 16, 6, 1)
    wanted = levels[codes] * maxima.double().repeat_interleave(16)
    given = codes.to(torch.uint8), maxima.clone()
    saw = function_of(student, "decode")(*given, levels.clone())
    look = "which maximum belongs to which number"
    expect_close(saw, wanted, "decode of 6 blocks of 16", look, **FLOAT32)
    values, _, _ = coded_numbers(levels, 8, 3, 2)
    values[8:16] = 0.0
    codes, maxima = function_of(student, "encode")(values.clone(), levels.clone(), 8)
    saw = function_of(student, "decode")(codes, maxima, levels.clone())
    look = "0 / 0"
    expect_close(maxima[1], 0.0, "the maximum of a block of zeros", look, **FLOAT32)
    expect_close(saw[8:16], torch.zeros(8), "a block of zeros, encoded and decoded", look, rtol=0.0)


def check_scales(student, maxima: Tensor, group: int, look: str) -> None:
    """Encode and decode maxima as the student does; compare form, and error with half a step.

    maxima, group  what is encoded
    look           where to look if a maximum comes back wrong
    """
    what, count = f"encode_scales of {len(maxima)} maxima in groups of {group}", len(maxima)
    given = maxima.clone()
    result = function_of(student, "encode_scales")(given, group)
    is_triple = isinstance(result, tuple | list) and len(result) == 3
    form = "the return line"
    expect(is_triple, f"{what} returned {form_of(result)}", "codes, scales and a mean", form)
    expect(torch.equal(given, maxima), f"{what} changed the maxima", "them as they were", "-=")
    codes, scales, mean = result
    num_groups = -(-count // group)
    for name, one, dtype, size in (
        ("codes", codes, torch.int8, count),
        ("scales", scales, torch.float32, num_groups),
    ):
        fits = isinstance(one, Tensor) and one.dtype == dtype and one.shape == (size,)
        saw = f"{form_of(one)}, {one.dtype}" if isinstance(one, Tensor) else form_of(one)
        expect(fits, f"{what}: {name}: {saw}", f"({size},), {dtype}", form)
    place = "whose mean is taken off"
    expect_close(mean, maxima.double().mean(), f"{what}: mean", place, form=form, **FLOAT32)
    meant = decoded(codes, scales, float(mean), group)
    for number, part in enumerate(maxima.split(group)):
        half_step = float((part.double() - maxima.double().mean()).abs().max()) / 254
        own = meant[number * group : number * group + len(part)]
        label = f"{what}: what group {number} means"
        near = {"atol": 1.001 * half_step + 3e-7, "rtol": 0.0, "reason": "half a step"}
        expect_close(own, part, label, look, **near)
    # Codes that are not the student's own: what is decoded must come from the arguments.
    scales, mean = 1.5 * scales + 0.01, 0.5
    saw = function_of(student, "decode_scales")(codes.flip(0), scales.clone(), mean, group)
    wanted = decoded(codes.flip(0), scales, mean, group)
    place = "which scale belongs to which code, and what was taken off"
    expect_close(saw, wanted, f"decode_scales, groups of {group}", place, **FLOAT32)


def decoded(codes: Tensor, scales: Tensor, mean: float, group: int) -> Tensor:
    """Compute what codes, scales and mean mean, in float64.

    codes, scales, mean, group  as in the exercise
    """
    own = torch.arange(len(codes)) // group
    return codes.double() * scales.double()[own] + mean


@bell.property("encode_scales, decode_scales: within half a step", points=2)
def _(student, numbers):
    generator = torch.Generator().manual_seed(3)
    look = "what is rounded: to the nearest, after the mean is taken off, by a scale of each group"
    for count, group in ((512, 256), (60, 20), (12, 1)):
        maxima = 2.5 + 0.4 * torch.randn(count, generator=generator)
        maxima *= torch.linspace(0.9, 1.1, count)
        check_scales(student, maxima, group, look)


@bell.property("encode_scales: a short last group, and maxima that are all alike", points=1)
def _(student, numbers):
    generator = torch.Generator().manual_seed(4)
    look = "the last group, which has a scale of its own"
    check_scales(student, 1 + torch.rand(70, generator=generator), 32, look)
    check_scales(student, torch.full((6,), 0.75), 4, "differences that are all 0")


@bell.property("your prediction by hand was right", points=2)
def _(student, numbers):
    saw = function_of(student, "my_prediction")()
    keys = ("bits", "plain_bits", "values")
    fine = isinstance(saw, dict) and set(keys) <= set(saw)
    look = "the return line"
    expect(fine, f"my_prediction(): {form_of(saw)}", f"a dictionary with {', '.join(keys)}", look)
    block, group = numbers["block"], numbers["group"]
    look = "what a block has besides its codes, shared by all of its numbers"
    what = "my_prediction()['plain_bits']"
    near = {"atol": 6e-5, "rtol": 0.0, "reason": "four digits after the point"}
    expect_close(saw["plain_bits"], 4 + 32 / block, what, look, **near)
    look = "how many numbers share the scale of a group of maxima"
    wanted = 4 + 8 / block + 32 / (block * group)
    expect_close(saw["bits"], wanted, "my_prediction()['bits']", look, **near)
    values, levels = (torch.tensor(numbers[one]).double() for one in ("values", "levels"))
    levels = levels * values.abs().max()
    wanted = levels[(values[:, None] - levels).abs().argmin(dim=1)]
    look = "the levels times the greatest absolute value of the block, and the nearest of them"
    expect_close(saw["values"], wanted, "my_prediction()['values']", look, **BY_HAND)
