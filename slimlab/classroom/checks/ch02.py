"""Graders of the exercises of chapter 02, multi-head attention.

2.1 budget of a key-value cache and 2.2 what each head contributes; 2.3 and 2.5, which change the
heads of a layer, stand in ch02_surgery.py, and 2.4, a program to mend, in ch02_programs.py. The
oracles are loops and layers with parts set to zero: nothing here is what a student is to write.

Production code is reviewed by people as well; here numbers alone decide.
"""

import copy
from contextlib import suppress

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import (
    expect_same_weights,
    form_of,
    function_of,
    whole_number,
)
from slimlab.classroom.checks.ch02_programs import healthy
from slimlab.classroom.checks.ch02_surgery import pooling, random_layer, removal
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.config import ModelConfig
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.masks import causal_mask
from slimlab.plan.memory import kv_cache_bytes

__all__ = ["budget", "contributions", "healthy", "pooling", "removal"]

GIB = 2**30
OTHER = " and a model with 3 layers, 1 key head and 1 byte per number"


def draw_budget(rng) -> dict:
    """Draw a model and a card for 2.1; rng is a random.Random."""
    memory_gib = rng.choice([24, 32, 40, 48, 80])
    num_heads = rng.choice([32, 40, 48, 64])
    return {
        "memory_gib": memory_gib,
        "num_params": memory_gib * rng.randint(15, 30) * 10**7,
        "num_layers": rng.choice([24, 28, 32, 36, 40]),
        "num_heads": num_heads,
        "num_kv_heads": num_heads // rng.choice([4, 8]),
        "d_head": rng.choice([64, 96, 128]),
        "seq_len": rng.choice([1500, 2500, 4000, 6000]),
        "bytes_per_element": 2,
    }


def count_sequences(given: dict) -> int:
    """Add one cache after the other to the weights of `given` until the next would not fit."""
    sizes = {name: given[name] for name in ("num_layers", "num_heads", "num_kv_heads", "d_head")}
    config = ModelConfig(vocab_size=1, seq_len=given["seq_len"], d_model=1, **sizes)
    one = kv_cache_bytes(config, given["seq_len"], 1, given["bytes_per_element"])
    taken, fitting = given["num_params"] * given["bytes_per_element"], 0
    while taken + one <= given["memory_gib"] * GIB:
        taken, fitting = taken + one, fitting + 1
    return fitting


budget = Exercise(
    "2.1",
    "How many conversations fit?",
    requires=("my_prediction", "sequences_that_fit", "longest_context"),
    stars=1,
    instance=draw_budget,
    hints=(
        "Write down the bytes of one token in one layer first. What is kept for it: one vector?",
        "num_heads is among the numbers. Does the cache depend on it?",
        "GiB is 2**30 bytes. And half a conversation is none: which way do you round?",
        "longest_context: the same memory, shared by batch_size sequences of equal length.",
    ),
)


@budget.property("the number of sequences for your model", points=2)
def _(student, numbers):
    saw = function_of(student, "sequences_that_fit")(**numbers)
    expect_equal(
        saw,
        count_sequences(numbers),
        "sequences that fit",
        "what one token keeps, the unit of the memory, and what else lies in it",
    )


@budget.property("other models, and a cache that fills the card exactly", points=2)
def _(student, numbers):
    exact = {"num_params": GIB // 2, "num_layers": 2, "num_kv_heads": 1, "d_head": 64}
    exact |= {"num_heads": 8, "seq_len": 2**16, "memory_gib": 2, "bytes_per_element": 2}
    look = "the rounding, and which of the sizes the cache depends on"
    for change in ({}, {"num_kv_heads": 8}, {"bytes_per_element": 1}, {"seq_len": 2**16 + 1}):
        given = exact | change
        changed = ", ".join(f"{name} = {value}" for name, value in change.items())
        what = f"sequences that fit with {changed or 'a card filled to the last byte'}"
        saw = function_of(student, "sequences_that_fit")(**given)
        expect_equal(saw, count_sequences(given), what, look)


@budget.property("no sequence fits beside weights that are too large", points=1)
def _(student, numbers):
    fit = function_of(student, "sequences_that_fit")
    weights = numbers["num_params"] * numbers["bytes_per_element"]
    one = (numbers["memory_gib"] * GIB - weights) // count_sequences(numbers) // 2
    for rest, what in ((one, "weights that leave a little room"), (-weights, "weights too large")):
        num_params = (numbers["memory_gib"] * GIB - rest) // numbers["bytes_per_element"]
        given = numbers | {"num_params": num_params}
        saw, wanted = fit(**given), count_sequences(given)
        expect_equal(saw, wanted, f"sequences beside {what}", "a rest below 0, or below one cache")
    expect_equal(bool(fit(**numbers)), True, "whether any fits", "the rest")


@budget.property("the longest context fits, and one token more does not", points=2)
def _(student, numbers):
    longest = function_of(student, "longest_context")
    sizes = {name: value for name, value in numbers.items() if name != "seq_len"}
    other = sizes | {"bytes_per_element": 1, "num_layers": 3, "num_kv_heads": 1}
    for batch_size, given in ((1, sizes), (3, sizes), (32, sizes), (3, other)):
        saw, what = longest(batch_size=batch_size, **given), "what longest_context returned"
        tokens = whole_number(saw, what, "the division, and the return line")
        fits = [count_sequences(given | {"seq_len": max(1, tokens + k)}) for k in (0, 1)]
        expect(
            tokens >= 1 and fits[0] >= batch_size > fits[1],
            f"{tokens} tokens for batch_size = {batch_size}" + (OTHER if given is other else ""),
            "the greatest length at which all of them fit",
            "what the rest of the memory is divided by, and the rounding",
        )
    saw = longest(batch_size=3, **sizes | {"num_params": sizes["memory_gib"] * GIB})
    expect_equal(saw, 0, "tokens beside weights too large", "a rest below 0")


@budget.property("your prediction by hand was right", points=1)
def _(student, numbers):
    look = "your pencil calculation for numbers('2.1'); correct it once you know why"
    saw = function_of(student, "my_prediction")()
    expect_equal(saw, count_sequences(numbers), "my_prediction()", look)


def only_head(layer: MultiHeadAttention, head: int, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the output for x under `mask` when `layer` is left with one `head` and no bias."""
    alone = copy.deepcopy(layer)
    others = [k for k in range(alone.out_proj.in_features) if k // alone.d_head != head]
    with torch.no_grad():
        alone.out_proj.weight[:, others] = 0.0
        if alone.out_proj.bias is not None:
            alone.out_proj.bias.zero_()
        return alone(x, mask=mask)


contributions = Exercise(
    "2.2",
    "What each head contributes",
    requires=("head_contributions",),
    stars=2,
    hints=(
        "Follow the layer's forward to the heads (B, H, T, E), before merge_heads.",
        "W_i^O is a block of out_proj.weight. nn.Linear keeps its matrix transposed: rows or "
        "columns?",
        "With fewer key heads than query heads, which key head belongs to query head i?",
        "One bias is added once, after the sum. It belongs to no head; the values' bias does.",
    ),
)


def parts_and_rest(student, layer: MultiHeadAttention, x: Tensor, mask: Tensor | None) -> tuple:
    """Return the student's contributions and rest; fail if they are not two such things.

    student, layer, x, mask  whose head_contributions is called, and with what
    """
    with torch.no_grad():
        saw = function_of(student, "head_contributions")(layer, x.clone(), mask)
    asked = "two things: contributions of shape (B, H, T, D) and rest of shape (D,)"
    is_pair = isinstance(saw, tuple | list) and len(saw) == 2
    expect(is_pair, f"head_contributions returned {form_of(saw)}", asked, "its return line")
    parts, rest = saw
    is_tensor = isinstance(parts, Tensor)
    expect(is_tensor, f"contributions: {form_of(parts)}", "a tensor (B, H, T, D)", "torch.stack")
    # A number is let through: it fails the last property alone.
    fits = isinstance(rest, int | float)
    if isinstance(rest, Tensor):
        with suppress(RuntimeError):
            fits = torch.broadcast_shapes(rest.shape, x.shape) == x.shape
    look = "what rest is where nothing is left, and its shape"
    expect(fits, f"rest: {form_of(rest)}", f"a tensor of shape ({x.shape[-1]},)", look)
    return parts, rest


def check_contributions(student, layer: MultiHeadAttention, T: int, mask, look: str) -> None:
    """Compare `student` on `layer`, T tokens and `mask` with the oracle; `look` is the hint."""
    x = torch.randn(2, T, layer.q_proj.in_features, dtype=torch.float64)
    num_heads, before = layer.out_proj.in_features // layer.d_head, copy.deepcopy(layer)
    parts, rest = parts_and_rest(student, layer, x, mask)
    what, place = "the {} of the layer afterwards", "the layer must not change: use a copy"
    expect_same_weights(layer, before.state_dict(), what, place)
    shape = (2, num_heads, T, before.out_proj.out_features)
    expect_equal(tuple(parts.shape), shape, "the shape (B, H, T, D)", "the output projection")
    near = {"atol": 1e-10, "rtol": 0.0, "reason": "float64 rounding"}
    for head in range(num_heads):
        wanted = only_head(before, head, x, mask)
        expect_close(parts[:, head], wanted, f"what head {head} contributes", look, **near)
    with torch.no_grad():
        total, output = parts.sum(1) + rest, before(x, mask=mask)
    expect_close(total, output, "the sum of all heads and the rest", "the biases", **near)


@contributions.property("each head of a plain layer", points=2)
def _(student, numbers):
    look = "the scale of the scores, and the block of out_proj.weight that belongs to one head"
    check_contributions(student, random_layer(1, 12, 3), 5, None, look)


@contributions.property("under a causal mask, and with d_head that is not d_model / num_heads")
def _(student, numbers):
    layer = random_layer(2, 10, 4, d_head=3)
    check_contributions(student, layer, 6, causal_mask(6), "the mask, and which sizes you assume")


@contributions.property("grouped queries: 6 query heads on 2 key heads", points=2)
def _(student, numbers):
    layer = random_layer(3, 12, 6, 2, d_head=4)
    check_contributions(student, layer, 5, None, "the order in which key heads are shared")


@contributions.property("biases: each where it belongs", points=2)
def _(student, numbers):
    layer = random_layer(4, 12, 3, bias=True)
    check_contributions(student, layer, 5, None, "which bias is inside a head and which is not")
    layer = random_layer(5, 10, 4, 2, d_head=3, bias=True)
    look = "biases where key heads are shared, under a causal mask"
    check_contributions(student, layer, 4, causal_mask(4), look)


@contributions.property("rest has the shape (D,), with a bias and without one")
def _(student, numbers):
    for bias in (True, False):
        look = "a bias has no tokens" if bias else "what rest is where nothing is left"
        layer = random_layer(6, 12, 3, bias=bias)
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        parts, rest = parts_and_rest(student, layer, x, None)
        with torch.no_grad():
            total, what = parts.sum(1) + rest, "the sum of all heads and the rest"
            expect_close(total, layer(x), what, "the biases", atol=1e-9, reason="rounding")
        saw = tuple(rest.shape) if isinstance(rest, Tensor) else f"a {type(rest).__name__}"
        expect_equal(saw, (12,), f"the shape of rest with bias = {bias}", look)
