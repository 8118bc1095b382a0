"""What exercises 1.4 and 1.5 of chapter 01 must do: mend a program, merge two attentions.

The oracle of 1.4 is PyTorch's causal kernel; that of 1.5 is attention over all keys at once, in
NumPy's long way round. Students' probes are tried on programs with one known fault each. Production
code tests its kernels the same way: against a slow form, and on faults put in on purpose.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal

FLOAT64 = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}

healthy = Exercise(
    "1.4",
    "It runs, it learns, it is wrong",
    requires=("leak", "distance_from_one", "mended_attention"),
    stars=2,
    hints=(
        "For the leak: run it twice, the second time with another last token.",
        "If all values are 1, what must a weighted mean be?",
        "reshape keeps the order of the numbers in memory; transpose swaps two dims.",
        "d_head is the number of columns of w_q.",
        "Put the minus infinity where section 3.5 puts it.",
    ),
)


def sample(B: int, T: int, d_model: int, d_head: int, size: float = 1.0) -> tuple[Tensor, ...]:
    """Make an input and three projections without a random generator, in float64.

    B, T, d_model, d_head  the sizes
    size                   factor on the input
    returns                x (B, T, d_model) and w_q, w_k, w_v (d_model, d_head)
    """
    x = torch.sin(1.7 * torch.arange(B * T * d_model, dtype=torch.float64) ** 1.1)
    w = torch.cos(2.3 * torch.arange(3 * d_model * d_head, dtype=torch.float64) ** 1.2)
    return (size * x.reshape(B, T, d_model), *w.reshape(3, d_model, d_head).unbind())


def reference(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """Causal attention of x (B, T, d_model) with w_q, w_k, w_v, by PyTorch's kernel."""
    query, key, value = ((x @ w)[:, None] for w in (w_q, w_k, w_v))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)[:, 0]


def variant(*, reshaped=False, masked_late=False, unmasked=False, shrunk=1.0) -> Callable:
    """Make a program with chosen faults.

    reshaped     keys are reshaped instead of transposed
    masked_late  the mask is multiplied into the weights
    unmasked     there is no mask
    shrunk       factor on the output
    """

    def attend(x, w_q, w_k, w_v):
        query, key, value = x @ w_q, x @ w_k, x @ w_v
        keys_across = key.reshape(len(x), -1, x.shape[1]) if reshaped else key.mT
        scores = query @ keys_across / math.sqrt(w_q.shape[1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if not masked_late and not unmasked:
            scores = scores.masked_fill(future, -torch.inf)
        weights = scores.softmax(dim=-1)
        weights = weights.masked_fill(future, 0.0) if masked_late else weights
        return shrunk * (weights @ value)

    return attend


def probed(number: float) -> float:
    """Return what a probe found; rounding becomes a plain 0, so that messages are the same.

    number  what the student's probe returned, a number or a tensor with one element
    """
    number = float(number)
    return 0.0 if abs(number) < 1e-9 else number


@healthy.property("leak is 0 for a causal program and not for a leaking one", points=2)
def _(student, numbers):
    arguments = sample(2, 5, 6, 4)
    look = "which token you change, and at which positions you compare"
    for name, attend in {"right": reference, "only too short": variant(shrunk=0.5)}.items():
        saw = probed(student.leak(attend, *arguments))
        expect(saw == 0, f"leak {saw:.2g} for a program that is {name}", "0", look)
    leaking = {"has no mask": variant(unmasked=True), "masks late": variant(masked_late=True)}
    for name, attend in leaking.items():
        saw = probed(student.leak(attend, *arguments))
        expect(saw > 1e-3, f"leak {saw:.2g} for a program that {name}", "more than 0.001", look)


@healthy.property("distance_from_one is 0 for a weighted mean and not for less", points=2)
def _(student, numbers):
    arguments = sample(2, 5, 6, 4)
    look = "values that are all exactly 1; the largest distance at any position"
    mean = {"is right": reference, "has no mask": variant(unmasked=True)}
    for name, attend in mean.items():
        saw = probed(student.distance_from_one(attend, *arguments))
        expect(saw == 0, f"distance {saw:.2g} for a program that {name}", "0", look)
    less = {"masks late": variant(masked_late=True), "loses half": variant(shrunk=0.5)}
    for name, attend in less.items():
        saw = probed(student.distance_from_one(attend, *arguments))
        expect(saw > 1e-2, f"distance {saw:.2g} for a program that {name}", "over 0.01", look)


@healthy.property("the mended program equals the library's", points=2)
def _(student, numbers):
    for sizes in [(2, 5, 6, 4), (3, 4, 8, 2), (1, 7, 3, 3)]:
        arguments = sample(*sizes)
        saw = student.mended_attention(*arguments)
        look = "the order of features in the keys, the divisor, and when the mask acts"
        what = f"the output for B, T, d_model, d_head = {sizes}"
        expect_close(saw, reference(*arguments), what, look, **FLOAT64)


@healthy.property("a loud token in the future changes nothing", points=1)
def _(student, numbers):
    arguments = sample(2, 5, 6, 4, size=40.0)
    saw = student.mended_attention(*arguments)
    look = "a sum of weights that may be 0"
    what = "the output for large inputs"
    expect_close(saw, reference(*arguments), what, look, **FLOAT64)


merging = Exercise(
    "1.5",
    "Two halves of the keys",
    requires=("merge", "merge_bytes"),
    stars=3,
    hints=(
        "exp(lse) is the sum of exponentials of one part. What is that sum for both parts?",
        "Each part's output is a mean with its own denominator. Undo it, add, divide again.",
        "Only differences of the two log-sum-exps may be exponentiated.",
        "Both parts empty: -inf - (-inf) is NaN. Which number may be put in its place?",
        "For the bytes: one vector and one number for every query of every head.",
    ),
)


def part(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attend over some keys: query (..., T, E), key (..., S, E), value (..., S, Ev).

    returns  output (..., T, Ev) and log-sum-exp (..., T)
    """
    scores = torch.einsum("...te,...se->...ts", query, key) / math.sqrt(query.shape[-1])
    largest = scores.amax(-1, keepdim=True)
    powers = (scores - largest).exp()
    total = powers.sum(-1, keepdim=True)
    return powers @ value / total, (largest + total.log()).squeeze(-1)


def pieces(*ends: int, loud: float = 1.0) -> tuple[list, tuple[Tensor, Tensor]]:
    """Cut one attention's keys at `ends`; return the parts and the whole. `loud` scales scores."""
    query = torch.sin(1.3 * torch.arange(2 * 3 * 4, dtype=torch.float64) ** 1.1).reshape(2, 3, 4)
    key = torch.cos(0.9 * torch.arange(2 * 9 * 4, dtype=torch.float64) ** 1.2).reshape(2, 9, 4)
    value = torch.sin(2.1 * torch.arange(2 * 9 * 5, dtype=torch.float64) ** 1.1).reshape(2, 9, 5)
    query = loud * query
    cuts = [0, *ends, 9]
    parts = [part(query, key[:, a:b], value[:, a:b]) for a, b in zip(cuts, cuts[1:])]
    return parts, part(query, key, value)


def expect_merged(saw: tuple, wanted: tuple, what: str, look: str) -> None:
    """Fail unless both the outputs and the log-sum-exps of `saw` and `wanted` agree.

    what  what was merged, for the message
    look  where to look, for the message
    """
    expect_equal(len(saw), 2, "how many things merge returns", "output and log-sum-exp")
    for name, one, other in zip(("output", "log-sum-exp"), saw, wanted):
        expect_close(one, other, f"the {name} of {what}", look, **FLOAT64)


@merging.property("two parts give the whole", points=2)
def _(student, numbers):
    for end in (4, 8):
        (a, b), whole = pieces(end)
        look = "each part's share: its sum of exponentials against the sum of both"
        expect_merged(student.merge(*a, *b), whole, f"keys 0-{end - 1} and the rest", look)


@merging.property("scores of 1000 and more", points=2)
def _(student, numbers):
    (a, b), whole = pieces(4, loud=3000.0)
    look = "exponentials of a log-sum-exp itself, instead of a difference"
    expect_merged(student.merge(*a, *b), whole, "two loud parts", look)


@merging.property("three parts, in any order and any brackets", points=1)
def _(student, numbers):
    (a, b, c), whole = pieces(2, 5)
    look = "the log-sum-exp that is handed on to the next merge"
    left = student.merge(*student.merge(*a, *b), *c)
    right = student.merge(*c, *student.merge(*b, *a))
    expect_merged(left, whole, "(a b) c", look)
    expect_merged(right, whole, "c (b a)", look)


@merging.property("a part without keys changes nothing, and two of them stay empty", points=2)
def _(student, numbers):
    _, whole = pieces(4)
    nothing = (torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf))
    look = "minus infinity minus minus infinity"
    expect_merged(student.merge(*whole, *nothing), whole, "all keys and no keys", look)
    expect_merged(student.merge(*nothing, *whole), whole, "no keys and all keys", look)
    expect_merged(student.merge(*nothing, *nothing), nothing, "no keys and no keys", look)


@merging.property("prediction: the bytes that one part sends to the other", points=1)
def _(student, numbers):
    for B, H, T, d_v, size in [(2, 3, 5, 7, 4), (1, 32, 2048, 128, 2)]:
        wanted = B * H * T * (d_v + 1) * size
        what = f"merge_bytes({B}, {H}, {T}, {d_v}, {size})"
        look = "everything that merge takes from one part; no key and no value is among it"
        expect_equal(student.merge_bytes(B, H, T, d_v, size), wanted, what, look)
