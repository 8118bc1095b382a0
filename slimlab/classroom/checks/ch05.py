"""Graders of the exercises of chapter 05, training.

5.1, what other optimizers keep; 5.2, Lion, stands in ch05_lion.py, 5.3, a loss and its gradient, in
ch05_loss.py, 5.4, a step to mend, in ch05_step.py and 5.5, a run to resume, in ch05_resume.py. The
oracle cuts tensors really into blocks and adds one layer after the other.

Production code is reviewed by people as well; here numbers alone decide.
"""

import math
from dataclasses import replace
from functools import cache

import torch

from slimlab.classroom.checks.ch02_forms import function_of, whole_number
from slimlab.classroom.checks.ch05_lion import lion
from slimlab.classroom.checks.ch05_loss import smoothed
from slimlab.classroom.checks.ch05_resume import forgetful
from slimlab.classroom.checks.ch05_step import careless
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect_equal
from slimlab.config import ModelConfig
from slimlab.plan.params import param_shapes

__all__ = ["careless", "forgetful", "kept", "lion", "smoothed"]

GIB = 2**30


def draw_sizes(rng) -> dict:
    """Draw a matrix, a card and a model for 5.1; rng is a random.Random."""
    return {
        "num_rows": rng.choice([300, 500, 700, 900]),
        "num_columns": rng.choice([30, 50, 70, 90]) + 1,
        "block_size": rng.choice([1000, 2000]),
        "memory_gib": rng.choice([12, 16, 20, 24]),
        "vocab_size": rng.choice([32_000, 50_000, 100_000]),
        "d_model": rng.choice([2048, 2560, 3072]),
        "num_heads": 32,
    }


@cache
def one_8bit(shape: tuple, block_size: int) -> int:
    """Cut a tensor of this shape into blocks of block_size and add up what both means take."""
    mean = torch.empty(shape, dtype=torch.uint8, device="meta").flatten()
    if mean.numel() < 4096:
        mean, scales = mean.float(), []
    else:
        scales = mean.split(block_size)
    return 2 * (mean.numel() * mean.element_size() + 4 * len(scales))


def count_8bit(shapes: list[tuple], block_size: int) -> int:
    """Add up one_8bit of all shapes, in blocks of block_size."""
    return sum(one_8bit(shape, block_size) for shape in shapes)


@cache
def one_adafactor(shape: tuple) -> int:
    """Add up the bytes of the sums that are left of a tensor of this shape."""
    squares = torch.empty(shape, device="meta")
    sums = [squares.sum(1), squares.sum(0)] if squares.dim() == 2 else [squares]
    return sum(one.numel() * one.element_size() for one in sums)


def count_layers(config: ModelConfig, memory_gib: int, kept_bytes) -> int:
    """Add layers to `config` until the next would not fit into memory_gib with kept_bytes."""
    fitting = 0
    while True:
        shapes = list(param_shapes(replace(config, num_layers=fitting + 1)).values())
        state = sum(8 * math.prod(shape) for shape in shapes)
        if state + kept_bytes(shapes) > memory_gib * GIB:
            return fitting
        fitting += 1


kept = Exercise(
    "5.1",
    "What other optimizers keep",
    requires=("my_prediction", "adam_8bit_bytes", "adafactor_bytes", "layers_that_fit"),
    stars=1,
    instance=draw_sizes,
    hints=(
        "How many blocks has a tensor of 10 numbers, in blocks of 4? Each of the two means has "
        "that many scales.",
        "Which tensors of a model have fewer than 4096 numbers? And what if it has just 4096?",
        "Adafactor: a matrix of 3 x 5 leaves 3 + 5 sums, a vector of 7 leaves 7 numbers.",
        "layers_that_fit: the table of tokens is there whatever the number of layers. Begin with "
        "one layer and see what the next one adds.",
    ),
)


@kept.property("8-bit Adam of your matrix", points=2)
def _(student, numbers):
    shape, block = (numbers["num_rows"], numbers["num_columns"]), numbers["block_size"]
    saw = function_of(student, "adam_8bit_bytes")([shape], block)
    look = "two means; one byte per number; a scale for the last, shorter block too"
    expect_equal(saw, count_8bit([shape], block), f"bytes of a matrix {shape}", look)


@kept.property("8-bit Adam of several tensors, small ones among them", points=2)
def _(student, numbers):
    function = function_of(student, "adam_8bit_bytes")
    cases = (
        ([(64, 64)], 256, "a matrix of just 4096 numbers", "what 'fewer than 4096' says of 4096"),
        ([(4095,)], 256, "a vector of 4095 numbers", "tensors with fewer than 4096 numbers"),
        ([(100, 50), (70,), (88, 50)], 2048, "three tensors", "no block holds numbers of two"),
        ([(128, 64)], 2048, "a matrix of whole blocks", "how many blocks 8192 numbers make"),
    )
    for shapes, block, what, look in cases:
        saw = function(shapes, block)
        expect_equal(saw, count_8bit(shapes, block), f"bytes of {what} {shapes}", look)


@kept.property("Adafactor of matrices and vectors", points=2)
def _(student, numbers):
    function = function_of(student, "adafactor_bytes")
    cases = (
        ([(30, 50)], "what is left of a matrix: sums of rows, and of columns"),
        ([(70,)], "a vector keeps one number for each entry"),
        ([(30, 50), (70,), (1, 9)], "several tensors, also a matrix with a single row"),
    )
    for shapes, look in cases:
        wanted = sum(map(one_adafactor, shapes))
        expect_equal(function(shapes), wanted, f"bytes of {shapes}", look)


@kept.property("the layers that fit into your card, and not one more", points=3)
def _(student, numbers):
    fit = function_of(student, "layers_that_fit")
    sizes = {name: numbers[name] for name in ("vocab_size", "d_model", "num_heads")}
    config, memory_gib = ModelConfig(seq_len=64, num_layers=3, **sizes), numbers["memory_gib"]
    block = numbers["block_size"]
    keepers = {
        "no optimizer's state": lambda shapes: 0,
        "8-bit Adam": lambda shapes: count_8bit(shapes, block),
        "Adafactor": lambda shapes: sum(map(one_adafactor, shapes)),
    }
    look = "weights and gradients, 4 bytes each; GiB; what does not grow with the layers"
    for name, keeper in keepers.items():
        saw = whole_number(fit(config, memory_gib, keeper), "what layers_that_fit returned", look)
        wanted = count_layers(config, memory_gib, keeper)
        expect_equal(saw, wanted, f"layers that fit with {name}", look)
    small = ModelConfig(100, 8, 16, 1, 2)
    shapes = list(param_shapes(replace(small, num_layers=5)).values())
    rest = GIB - sum(8 * math.prod(shape) for shape in shapes)
    saw = fit(small, 1, lambda _: rest)
    expect_equal(saw, 5, "layers that fill the card to the last byte", "the comparison")
    saw = fit(small, 1, lambda _: GIB)
    expect_equal(saw, 0, "layers where not even one fits", "what is returned then")


@kept.property("your prediction by hand was right", points=1)
def _(student, numbers):
    shape = (numbers["num_rows"], numbers["num_columns"])
    look = "your pencil calculation for numbers('5.1'); correct it once you know why"
    saw = function_of(student, "my_prediction")()
    expect_equal(saw, count_8bit([shape], numbers["block_size"]), "my_prediction()", look)
