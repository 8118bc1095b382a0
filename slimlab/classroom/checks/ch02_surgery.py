"""Graders of exercises 2.3 and 2.5 of chapter 02: layers whose heads are pooled or removed.

The oracles average one row at a time, and set contributions to zero where a student removes them.

Production tools that convert checkpoints (for grouped queries) or prune them go on training
afterwards; these exercises end where the weights are right.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal, expect_raises
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.masks import causal_mask


def random_layer(seed: int, *sizes: int, bias: bool = False, **others: int) -> MultiHeadAttention:
    """Make a float64 layer of `sizes` and `others`, drawn with `seed`, with or without `bias`."""
    torch.manual_seed(seed)
    return MultiHeadAttention(*sizes, bias=bias, **others).double()


def check_type(made: nn.Module) -> None:
    """Fail if a number of `made` is not float64, as those of the layer that it is made from."""
    types = {str(one.dtype) for one in made.parameters()}
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


def check_pooling(student, layer: MultiHeadAttention, num_kv_heads: int, look: str) -> nn.Module:
    """Compare student.group_heads(layer, num_kv_heads) with the oracle; `look` is the hint."""
    copies = layer.k_proj.out_features // layer.d_head // num_kv_heads
    before = copy.deepcopy(layer.state_dict())
    made = student.group_heads(layer, num_kv_heads)
    for name, parameter in before.items():
        shared = name.startswith(("k_proj", "v_proj"))
        wanted = pooled(parameter, layer.d_head, copies) if shared else parameter
        place = look if shared else "what stays as it is"
        saw = made.state_dict().get(name)
        expect(saw is not None, f"no {name}", "the parameters of the old layer", "its biases")
        expect_close(saw, wanted, name, place, rtol=1e-6, atol=1e-9, reason="rounding")
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
        made = student.group_heads(layer, 2)
        rows, look = made.k_proj.weight.shape[0], "2 heads of 3 features"
        expect_equal(rows, 6, "rows of the new k_proj.weight", look)
        check_type(made)
        saw = made(x, mask=causal_mask(5))
    look = "mean or sum, and which heads share a key head"
    expect_close(saw, wanted, "the output", look, atol=1e-6, rtol=0.0)


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
    made = student.group_heads(layer, 2)
    for name, parameter in layer.state_dict().items():
        expect_close(parameter, before[name], f"the old layer's {name}", "what you write to")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    for name, parameter in layer.state_dict().items():
        what = f"the old layer's {name} after 1 was added to the new one's"
        expect_close(parameter, before[name], what, "copies: do the two layers share memory?")
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
    made = student.remove_heads(layer, list(removed))
    for name, parameter in layer.state_dict().items():
        expect_close(parameter, before[name], f"the old layer's {name}", "copies of its parts")
    check_type(made)
    what, reason = f"the output without heads {sorted(set(removed))}", "float64 rounding"
    with torch.no_grad():
        free, masked = made(x, mask=None), made(x, mask=causal_mask(5))
    expect_close(free, wanted[0], what, look, atol=1e-9, rtol=0.0, reason=reason)
    what = f"{what} under a causal mask"
    expect_close(masked, wanted[1], what, "the mask", atol=1e-9, rtol=0.0, reason=reason)
    held = [*made.parameters(), *(one for one in made.buffers() if one.is_floating_point())]
    expect_equal(
        sum(one.numel() for one in held),
        smallest_size(layer, removed),
        "numbers in the new layer",
        "which rows and columns nobody uses any more",
    )


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
