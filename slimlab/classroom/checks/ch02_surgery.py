"""Graders of exercises 2.3 and 2.5 of chapter 02: layers whose heads are pooled or removed.

The oracles average one row at a time, and set contributions to zero where a student removes them.

Production tools that convert checkpoints (for grouped queries) or prune them go on training
afterwards; these exercises end where the weights are right.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import (
    FLOAT64,
    count_numbers,
    expect_module,
    expect_same_weights,
    function_of,
    weights_of,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal, expect_raises
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.masks import causal_mask


def random_layer(
    seed: int, *sizes: int, bias: bool = False, **others: int | str
) -> MultiHeadAttention:
    """Make a float64 layer of `sizes` and `others`, drawn with `seed`, with or without `bias`."""
    torch.manual_seed(seed)
    return MultiHeadAttention(*sizes, bias=bias, **others).double()


def check_type(weights: list[Tensor]) -> None:
    """Fail if one of `weights` is not float64, as those of the layer that they are made from."""
    types = {str(one.dtype) for one in weights} or {"torch.float64"}
    look = "the dtype of the old layer's weights"
    expect_equal(sorted(types), ["torch.float64"], "the dtype of the new numbers", look)


pooling = Exercise(
    "2.3",
    "A grouped checkpoint by averaging",
    requires=("group_heads",),
    stars=2,
    hints=(
        "k_proj.weight is (H*E, D): cut its rows into heads before you average.",
        "Which query heads will share key head 0? Those are the heads to average.",
        "What else has a row for each feature of a key: is there a bias?",
        "The new layer must own its numbers: copy, under torch.no_grad().",
    ),
)


def pooled(weight: Tensor, d_head: int, copies: int) -> Tensor:
    """Average `copies` heads of d_head rows each, a row at a time; weight (heads*E, ...)."""
    num_rows = weight.shape[0] // copies
    result = torch.zeros(num_rows, *weight.shape[1:], dtype=weight.dtype)
    for row in range(num_rows):
        group, feature = divmod(row, d_head)
        for member in range(copies):
            result[row] += weight[(group * copies + member) * d_head + feature] / copies
    return result


def grouped_layer(student, layer: MultiHeadAttention, num_kv_heads: int) -> nn.Module:
    """Return student.group_heads(layer, num_kv_heads); fail if it is not such a layer."""
    made = function_of(student, "group_heads")(layer, num_kv_heads)
    call = f"group_heads(layer, {num_kv_heads})"
    held = expect_module(made, call, "a new MultiHeadAttention").state_dict()
    for name in layer.state_dict():
        look = "its biases" if name.endswith("bias") else "the names of the four projections"
        there = ", ".join(held) or "nothing"
        asked = f"a new MultiHeadAttention, which has {name} as the old one does"
        expect(name in held, f"no {name} in the new layer, which holds {there}", asked, look)
    return made


def check_pooling(student, layer: MultiHeadAttention, num_kv_heads: int, look: str) -> nn.Module:
    """Compare student.group_heads(layer, num_kv_heads) with the oracle; `look` is the hint."""
    copies = layer.k_proj.out_features // layer.d_head // num_kv_heads
    before = copy.deepcopy(layer.state_dict())
    made = grouped_layer(student, layer, num_kv_heads)
    held = made.state_dict()
    for name, parameter in before.items():
        shared = name.startswith(("k_proj", "v_proj"))
        wanted = pooled(parameter, layer.d_head, copies) if shared else parameter
        place = look if shared else "what stays as it is"
        expect_close(held[name], wanted, name, place, rtol=1e-6, atol=1e-9, reason="rounding")
    return made


@pooling.property("keys and values are averaged in groups, the rest is kept", points=3)
def _(student, numbers):
    check_pooling(student, random_layer(5, 12, 6, d_head=4), 2, "which heads are averaged")


@pooling.property("heads that were tied already: the output does not change", points=2)
def _(student, numbers):
    layer = random_layer(6, 10, 4, d_head=3)
    with torch.no_grad():
        for projection in (layer.k_proj, layer.v_proj):
            projection.weight[3:6] = projection.weight[0:3]
            projection.weight[9:12] = projection.weight[6:9]
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x, mask=causal_mask(5))
        made = grouped_layer(student, layer, 2)
        rows, look = made.state_dict()["k_proj.weight"].shape[0], "2 heads of 3 features"
        expect_equal(rows, 6, "rows of the new k_proj.weight", look)
        check_type(weights_of(made))
        saw = made(x, mask=causal_mask(5))
    look = "mean or sum, and which heads share a key head"
    form = "what the forward of the new layer returns"
    bound = {"atol": 1e-6, "rtol": 0.0, "reason": "rounding"}
    expect_close(saw, wanted, "the output", look, form=form, **bound)


@pooling.property("biases are averaged too", points=1)
def _(student, numbers):
    check_pooling(student, random_layer(7, 12, 6, d_head=4, bias=True), 3, "the biases of the keys")


@pooling.property("a checkpoint that is grouped already", points=1)
def _(student, numbers):
    look = "how many key heads the old layer has: not num_heads"
    check_pooling(student, random_layer(8, 12, 8, 4, d_head=2), 2, look)


@pooling.property("the old layer stays as it is, and impossible groups are refused", points=2)
def _(student, numbers):
    layer = random_layer(9, 12, 6, d_head=4)
    before = copy.deepcopy(layer.state_dict())
    made = grouped_layer(student, layer, 2)
    expect_same_weights(layer, before, "the old layer's {}", "what you write to")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    what = "the old layer's {} after 1 was added to the new one's"
    expect_same_weights(layer, before, what, "copies: do the two layers share memory?")
    grouped, look = random_layer(10, 12, 8, 2, d_head=2), "sizes that do not divide"
    for old, what in ((layer, "6 key heads in 4 groups"), (grouped, "4 key heads from 2")):
        expect_raises(partial(made_kind, student, old, 4), ValueError, what, look)


def made_kind(student, layer: MultiHeadAttention, num_kv_heads: int) -> str:
    """Name the class of student.group_heads(layer, num_kv_heads), a word for a message."""
    return type(student.group_heads(layer, num_kv_heads)).__name__


removal = Exercise(
    "2.5",
    "Take heads out exactly",
    requires=("remove_heads",),
    stars=3,
    hints=(
        "Which rows of q_proj.weight and which columns of out_proj.weight belong to head i?",
        "With as many key heads as query heads, keep the same rows of k_proj and v_proj.",
        "Grouped: a key head can go only when all query heads that use it have gone.",
        "The groups may become unequal, which MultiHeadAttention refuses. Write a small module of "
        "your own that knows for each remaining query head which key head it uses.",
    ),
)


def without(
    layer: MultiHeadAttention, removed: list[int], x: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the output of `layer` for x under `mask` with the heads in `removed` set to zero."""
    silent = copy.deepcopy(layer)
    columns = [k for k in range(silent.out_proj.in_features) if k // silent.d_head in removed]
    with torch.no_grad():
        silent.out_proj.weight[:, columns] = 0.0
        return silent(x, mask=mask)


def smallest_size(layer: MultiHeadAttention, removed: list[int]) -> int:
    """Count the numbers that `layer` still needs without the heads in `removed`."""
    d_head, d_model = layer.d_head, layer.out_proj.out_features
    num_heads = layer.out_proj.in_features // d_head
    group = num_heads // (layer.k_proj.out_features // d_head)
    kept = [head for head in range(num_heads) if head not in removed]
    kept_kv = {head // group for head in kept}
    bias = layer.out_proj.bias is not None
    per_row = d_model + (1 if bias else 0)
    rows = (len(kept) + 2 * len(kept_kv)) * d_head * per_row
    return rows + len(kept) * d_head * d_model + (d_model if bias else 0)


def check_removal(student, layer: MultiHeadAttention, removed: list[int], look: str) -> None:
    """Compare student.remove_heads(layer, removed) with the oracle; `look` is the hint."""
    x = torch.randn(2, 5, layer.q_proj.in_features, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    wanted = [without(layer, removed, x, mask) for mask in (None, causal_mask(5))]
    made = function_of(student, "remove_heads")(layer, list(removed))
    asked = "a smaller module, called as module(x, mask=mask)"
    weights = weights_of(expect_module(made, f"remove_heads(layer, {removed})", asked))
    held = count_numbers(weights)  # before forward: what it may keep to look at is no weight
    expect_same_weights(layer, before, "the old layer's {}", "copies of its parts")
    check_type(weights)
    what, form = f"the output without heads {sorted(set(removed))}", "what forward returns"
    with torch.no_grad():
        free, masked = made(x, mask=None), made(x, mask=causal_mask(5))
    expect_close(free, wanted[0], what, look, form=form, **FLOAT64)
    what = f"{what} under a causal mask"
    expect_close(masked, wanted[1], what, "the mask", form=form, **FLOAT64)
    smallest, look = smallest_size(layer, removed), "which rows and columns nobody uses any more"
    if held < smallest:
        look = "where the numbers are kept: parameters, buffers and attributes of a module count"
    expect_equal(held, smallest, "numbers in the new layer", look)


@removal.property("one head of a plain layer", points=2)
def _(student, numbers):
    look = "rows of q_proj, k_proj, v_proj; columns of out_proj; the scale"
    check_removal(student, random_layer(11, 12, 3), [1], look)


@removal.property("several heads, named in any order, d_head not d_model / num_heads", points=2)
def _(student, numbers):
    layer = random_layer(12, 10, 5, d_head=3)
    check_removal(student, layer, [4, 0, 4], "the order of the heads that stay")
    check_removal(student, layer, [], "the empty list")


@removal.property("biases: those of removed heads go, that of the output stays", points=2)
def _(student, numbers):
    layer = random_layer(14, 12, 4, bias=True)
    check_removal(student, layer, [0, 2], "the four biases")


@removal.property("grouped queries: a whole group goes, and its key head with it", points=2)
def _(student, numbers):
    layer = random_layer(15, 12, 6, 3, d_head=4)
    check_removal(student, layer, [2, 3], "the key head that nobody uses")


@removal.property("grouped queries: groups become unequal", points=3)
def _(student, numbers):
    layer = random_layer(16, 12, 6, 2, d_head=4)
    look = "which key head each remaining query head uses"
    check_removal(student, layer, [2, 4, 1], look)
    check_removal(student, random_layer(17, 12, 6, 1, d_head=2), [3], look)
    layer, look = random_layer(18, 10, 6, 3, d_head=3, bias=True), "biases of shared key heads"
    check_removal(student, layer, [0, 1, 4], look)
