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
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal, plain

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


def variant(*, masked_late=False, ahead=0, shrunk=1.0, first=1.0) -> Callable:
    """Make a program with chosen faults.

    masked_late  the mask is multiplied into the weights
    ahead        how many future tokens the mask lets through
    shrunk       factor on the output
    first        factor on the output of the first token alone
    """

    def attend(x, w_q, w_k, w_v):
        query, key, value = x @ w_q, x @ w_k, x @ w_v
        scores = query @ key.mT / math.sqrt(w_q.shape[1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1 + ahead)
        if not masked_late:
            scores = scores.masked_fill(future, -torch.inf)
        weights = scores.softmax(dim=-1)
        weights = weights.masked_fill(future, 0.0) if masked_late else weights
        factors = torch.full((x.shape[1], 1), shrunk, dtype=x.dtype)
        factors[0] *= first
        return factors * (weights @ value)

    return attend


NO_MASK = variant(ahead=99)


def probed(found: object, name: str) -> float:
    """Return what a probe found; rounding becomes a plain 0, so that messages are the same.

    found  what the student's probe returned: a number, or a tensor or array with one element
    name   the probe's name
    """
    number = plain(found, name, "what the probe returns")
    while isinstance(number, tuple) and len(number) == 1:
        number = number[0]
    if type(number) not in (int, float):
        kind = type(found).__name__
        saw = f"{name} returned a {kind}" + ("" if isinstance(number, tuple) else f": {number}")
        raise CheckFailed(saw, "one number, how large it is", "what the probe returns")
    return 0.0 if abs(number) < 1e-9 else float(number)


@healthy.property("leak is 0 for a causal program and not for a leaking one", points=2)
def _(student, numbers):
    look = "which token you change, and at which positions you compare"
    for name, attend in {"right": reference, "only too short": variant(shrunk=0.5)}.items():
        saw = probed(student.leak(attend, *sample(2, 5, 6, 4)), "leak")
        expect(saw == 0, f"leak {saw:.2g} for a program that is {name}", "0", look)
    leaking = {
        "has no mask": NO_MASK,
        "masks late": variant(masked_late=True),
        "lets each token see the next one": variant(ahead=1),
    }
    for name, attend in leaking.items():
        saw = probed(student.leak(attend, *sample(2, 5, 6, 4)), "leak")
        expect(saw > 1e-3, f"leak {saw:.2g} for a program that {name}", "more than 0.001", look)
    # one earlier output: it rises with w_v and falls with -w_v, or the other way round
    x, w_q, w_k, w_v = sample(1, 2, 6, 1)
    for sign in (1, -1):
        saw = probed(student.leak(NO_MASK, x.clone(), w_q, w_k, sign * w_v), "leak")
        what = f"leak {saw:.2g} for two tokens, d_head = 1 and no mask"
        expect(saw > 1e-3, what, "more than 0.001", "changes downwards, which count like upwards")


@healthy.property("distance_from_one is 0 for a weighted mean and not for less", points=2)
def _(student, numbers):
    look = "values that are all exactly 1; the largest distance at any position"
    for name, attend in {"is right": reference, "has no mask": NO_MASK}.items():
        saw = probed(student.distance_from_one(attend, *sample(2, 5, 6, 4)), "distance_from_one")
        expect(saw == 0, f"distance {saw:.2g} for a program that {name}", "0", look)
    saw = student.distance_from_one(variant(masked_late=True), *sample(2, 5, 6, 4))
    saw = probed(saw, "distance_from_one")
    expect(saw > 1e-2, f"distance {saw:.2g} for a program that masks late", "over 0.01", look)
    half = {
        "halves its output": variant(shrunk=0.5),
        "adds half to its output": variant(shrunk=1.5),
        "halves its first output": variant(first=0.5),
    }
    for name, attend in half.items():
        saw = probed(student.distance_from_one(attend, *sample(2, 5, 6, 4)), "distance_from_one")
        what = f"distance {saw:.2g} for a program that {name}"
        expect(abs(saw - 0.5) < 1e-6, what, "0.5", "too much and too little; the farthest of all")


@healthy.property("the mended program equals the library's", points=2)
def _(student, numbers):
    for sizes in [(2, 5, 6, 4), (3, 4, 8, 2), (1, 7, 3, 3)]:
        arguments = sample(*sizes)
        saw = student.mended_attention(*arguments)
        look = "the order of features in the keys, the divisor, and when and where the mask acts"
        what, form = f"the output for B, T, d_model, d_head = {sizes}", "what is returned"
        expect_close(saw, reference(*arguments), what, look, form=form, **FLOAT64)


@healthy.property("a loud token in the future changes nothing", points=1)
def _(student, numbers):
    arguments = sample(2, 5, 6, 4, size=40.0)
    saw = student.mended_attention(*arguments)
    look = "the number that hides a score, exponentials that overflow, a sum that may be 0"
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
    form = "what merge returns: output (..., T, d_v), log-sum-exp (..., T), in this order"
    pair = isinstance(saw, tuple | list) and len(saw) == 2
    expect(pair, f"merge returned one {type(saw).__name__}", "two tensors", form)
    for name, one, other in zip(("output", "log-sum-exp"), saw, wanted):
        expect_close(one, other, f"the {name} of {what}", look, form=form, **FLOAT64)


def fresh(*tensors: Tensor) -> list[Tensor]:
    """Copy `tensors`: a merge that works in place is right too, the exercise says nothing."""
    return [one.clone() for one in tensors]


@merging.property("two parts give the whole", points=2)
def _(student, numbers):
    for end in (4, 8):
        (a, b), whole = pieces(end)
        look = "each part's share: its sum of exponentials against the sum of both"
        merged = student.merge(*fresh(*a, *b))
        expect_merged(merged, whole, f"keys 0-{end - 1} and the rest", look)
    for name, shape in {"heads, (B, H, T)": (2, 1, 3), "neither B nor H, (T,)": (6,)}.items():
        x = [one.reshape(*shape, 5) if one.dim() > 2 else one.reshape(shape) for one in (*a, *b)]
        wanted = whole[0].reshape(*shape, 5), whole[1].reshape(shape)
        look = "the dims: lse has one dim less than output, at the end, however many there are"
        expect_merged(student.merge(*fresh(*x)), wanted, f"queries with {name}", look)


@merging.property("scores of 1000 and more", points=2)
def _(student, numbers):
    (a, b), whole = pieces(4, loud=3000.0)
    look = "exponentials of a log-sum-exp itself, instead of a difference"
    expect_merged(student.merge(*fresh(*a, *b)), whole, "two loud parts", look)


@merging.property("three parts, in any order and any brackets", points=1)
def _(student, numbers):
    (a, b, c), whole = pieces(2, 5)
    look = "the log-sum-exp that is handed on to the next merge"
    left = student.merge(*student.merge(*fresh(*a, *b)), *fresh(*c))
    right = student.merge(*fresh(*c), *student.merge(*fresh(*b, *a)))
    expect_merged(left, whole, "(a b) c", look)
    expect_merged(right, whole, "c (b a)", look)


@merging.property("a part without keys changes nothing, and two of them stay empty", points=2)
def _(student, numbers):
    _, whole = pieces(4)
    nothing = (torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf))
    look = "minus infinity minus minus infinity"
    for one, other, wanted, what in (
        (whole, nothing, whole, "all keys and no keys"),
        (nothing, whole, whole, "no keys and all keys"),
        (nothing, nothing, nothing, "no keys and no keys"),
    ):
        expect_merged(student.merge(*fresh(*one, *other)), wanted, what, look)
    # As under a causal mask: only the first query sees no key of this part.
    some, twice = fresh(*whole), fresh(*whole)
    some[0][:, 0], some[1][:, 0] = 0.0, -torch.inf
    twice[1][:, 1:] += math.log(2.0)
    look = "every query by itself: one may see no key of a part while others see some"
    merged = student.merge(*fresh(*some, *whole))
    expect_merged(merged, twice, "a part that is empty for one query", look)


@merging.property("prediction: the bytes that one part sends to the other", points=1)
def _(student, numbers):
    for B, H, T, d_v, size in [(2, 3, 5, 7, 4), (1, 32, 2048, 128, 2)]:
        wanted = B * H * T * (d_v + 1) * size
        what = f"merge_bytes({B}, {H}, {T}, {d_v}, {size})"
        look = "everything that merge takes from one part; no key and no value is among it"
        expect_equal(student.merge_bytes(B, H, T, d_v, size), wanted, what, look)
