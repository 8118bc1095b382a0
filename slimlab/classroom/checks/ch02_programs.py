"""Grader of exercise 2.4 of chapter 02: a layer that runs, learns and is wrong.

The oracle is the whole Jacobian of a layer, and the library's layer with the same weights.

Large models are searched for such leaks with a few random directions instead of all of them.
"""

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import (
    FLOAT64,
    expect_module,
    form_of,
    function_of,
)
from slimlab.classroom.checks.ch02_surgery import random_layer
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.masks import causal_mask

healthy = Exercise(
    "2.4",
    "It runs, it learns, it is wrong",
    requires=("leak", "Mended"),
    stars=2,
    hints=(
        "One fault lets a position see later ones. Which line puts heads and positions in order?",
        "leak: x.requires_grad_(), then torch.autograd.grad of one output number at a time.",
        "No leak is left, and the layer still is not the right one? Print which key head each "
        "query head meets, with keys that hold their own number.",
        "Heads 0 and 1 should share key head 0 when there are 4 query heads and 2 key heads.",
    ),
)


class LooksHealthy(nn.Module):
    """The program of exercise 2.4 as it is given, faults included.

    layer  its weights; num_heads and num_kv_heads follow from their sizes
    """

    def __init__(self, layer: MultiHeadAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (B, T, D), of the same shape."""
        layer, (B, T, D) = self.layer, x.shape
        query, key, value = (
            projection(x).view(B, T, -1, layer.d_head).transpose(1, 2)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat(1, copies, 1, 1), value.repeat(1, copies, 1, 1)
        scores = query @ key.mT / layer.d_head**0.5
        weights = torch.softmax(scores.masked_fill(~causal_mask(T), -torch.inf), dim=-1)
        return layer.out_proj((weights @ value).reshape(B, T, D))


class OneFarNumber(nn.Module):
    """A layer in which the last token reaches two earlier outputs, by -4 at the most.

    position  the one that it reaches by -4; the other is the first
    """

    def __init__(self, position: int):
        super().__init__()
        self.position = position

    def forward(self, x: Tensor) -> Tensor:
        """Return 10 x and the leak, for x (B, T, D) with more than `position` tokens."""
        strength = torch.zeros(x.shape[1:], dtype=x.dtype)  # (T, D); x is never written into
        strength[0, :2] = torch.tensor([-3.0, 2.5])
        strength[self.position, :2] = torch.tensor([-4.0, 3.5])
        return 10.0 * x + strength * x[:, -1:, -1:]


class Causal(nn.Module):
    """`layer` under a causal mask, called with x alone."""

    def __init__(self, layer: MultiHeadAttention):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x (B, T, D)."""
        return self.layer(x, mask=causal_mask(x.shape[1]))


def true_leak(layer: nn.Module, x: Tensor) -> float:
    """Return the greatest |entry| of the Jacobian of `layer` at x, from later to earlier tokens."""
    jacobian = torch.autograd.functional.jacobian(layer, x)  # (B, T, D, B, T, D)
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    per_pair = jacobian.abs().amax(dim=(0, 2, 3, 5))  # (output position, input position)
    return per_pair[later].max().item()


@healthy.property("leak finds how strongly the program sees the future", points=2)
def _(student, numbers):
    layer = LooksHealthy(random_layer(21, 12, 6, 2))
    x = torch.randn(3, 5, 12, dtype=torch.float64)  # with this seed the second leaks most
    saw = function_of(student, "leak")(layer, x.clone())
    look = "which pairs of positions and which sequences count, and the greatest absolute value"
    reason = "a difference quotient is welcome too"
    wanted, form = true_leak(layer, x), "the return line of leak"
    expect_close(saw, wanted, "the leak", look, rtol=1e-3, reason=reason, form=form)


@healthy.property("leak finds one number far away, whatever its sign", points=2)
def _(student, numbers):
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    look = "signs, sums in which two leaks cancel, every position, and later ones far away"
    for position in (3, 4):  # 4 is the last one that has a future
        saw = function_of(student, "leak")(OneFarNumber(position), x.clone())
        what = f"the leak of a layer with -3 and 2.5 at position 0, -4 and 3.5 at {position} of 6"
        expect_close(saw, 4.0, what, look, rtol=1e-3, reason="a difference quotient is welcome too")


@healthy.property("an honest layer leaks nothing, and its faulty twin does", points=1)
def _(student, numbers):
    weights = random_layer(22, 12, 6, 2, form="explicit")  # the kernel has no second derivative
    x, layer = torch.randn(2, 5, 12, dtype=torch.float64), Causal(weights)
    leak = function_of(student, "leak")
    faulty, look = leak(LooksHealthy(weights), x.clone()), "what leak returns: a number?"
    is_number = isinstance(faulty, Tensor) and faulty.numel() == 1 or hasattr(faulty, "__float__")
    expect(is_number, f"leak returned {form_of(faulty)}", "a number", look)
    look = "what leak returns for the given program"
    expect(float(faulty) > 0.01, faulty, "a leak above 0.01", look)
    look = "whether a position's own token counts"
    expect_close(leak(layer, x), 0.0, "the leak", look, atol=1e-9, rtol=0, reason="rounding")


def mended_like(student, layer: MultiHeadAttention, num_heads: int, num_kv_heads: int) -> nn.Module:
    """Make student.Mended with num_heads on num_kv_heads and the weights of `layer`."""
    kind, sizes = (
        function_of(student, "Mended"),
        (layer.out_proj.out_features, num_heads, num_kv_heads),
    )
    is_class = not isinstance(kind, nn.Module)
    expect(is_class, f"Mended is {form_of(kind)}", "a class of modules", "how you define Mended")
    made = expect_module(kind(*sizes), f"Mended{sizes}", "a module").double()
    held, wanted = made.state_dict(), layer.state_dict()
    look, there = "the names of the four projections", ", ".join(held) or "nothing"
    for name, weight in wanted.items():
        expect(name in held, f"no {name} in Mended{sizes}, which holds {there}", list(wanted), look)
        what, place = f"the shape of {name} in Mended{sizes}", "the sizes of the four projections"
        expect_equal(tuple(held[name].shape), tuple(weight.shape), what, place)
        bias = name.replace("weight", "bias")
        expect(bias not in held, f"{bias} in Mended{sizes}", "projections without bias", place)
    made.load_state_dict(wanted, strict=False)  # a mask may be among its buffers
    return made


def expect_output(made: nn.Module, x: Tensor, what: str) -> None:
    """Fail unless `made` gives a tensor of the shape of x; `what` names it."""
    with torch.no_grad():
        saw = made(x)
    fits = isinstance(saw, Tensor) and saw.shape == x.shape
    asked, look = f"a tensor of shape {tuple(x.shape)}", "the return line of its forward"
    expect(fits, f"{what} returned {form_of(saw)}", asked, look)


def check_mended(student, all_sizes: tuple[tuple[int, int, int], ...], look: str) -> None:
    """Compare student.Mended of all_sizes with the library's layer; `look` is the hint."""
    for sizes in all_sizes:
        layer = random_layer(24, *sizes)
        made = mended_like(student, layer, *sizes[1:])
        x = torch.randn(2, 5, sizes[0], dtype=torch.float64)
        with torch.no_grad():
            saw, wanted = made(x), layer(x, mask=causal_mask(5))
        form = "the return line of its forward"
        expect_close(saw, wanted, f"the output of Mended{sizes}", look, form=form, **FLOAT64)


@healthy.property("the mended layer sees no future, and is right where no key is shared", points=2)
def _(student, numbers):
    for sizes in ((12, 6, 2), (8, 4, 4)):
        made = mended_like(student, random_layer(23, *sizes), *sizes[1:])
        x = torch.randn(1, 5, sizes[0], dtype=torch.float64)
        expect_output(made, x, f"Mended{sizes}")
        look = "how heads and positions are ordered, before the scores and after the average"
        expect_close(true_leak(made, x), 0.0, f"the leak of Mended{sizes}", look, **FLOAT64)
    look = "the mask, the scale, and the order of heads and features in the last line"
    check_mended(student, ((8, 4, 4), (8, 4, 1)), look)


@healthy.property("with shared keys and the same weights it gives the right output", points=3)
def _(student, numbers):
    check_mended(student, ((12, 6, 2), (12, 6, 3)), "which query heads share a key head")
