"""What exercises 1.1 to 1.3 of chapter 01 must do: attention by hand, a window, an abstention.

Exercises 1.4 and 1.5 stand in ch01_programs.py. The oracles here use Python's own numbers, loops
and whole-number arithmetic, so that no answer is compared with itself. A production grader would
draw many more cases at random; these are chosen, so that a message can say where to look.
"""

import math
import random

import torch

from slimlab.classroom.checks.ch01_programs import healthy, merging
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import (
    CheckFailed,
    expect,
    expect_close,
    expect_equal,
    expect_raises,
)

__all__ = ["abstain", "by_hand", "healthy", "merging", "window"]

THREE_DECIMALS = {"atol": 0.0011, "rtol": 0.0, "reason": "three decimals"}
# Weights of three decimals, times values up to 9, may be off by 3 * 9 * 0.0005.
OUTPUT = {"atol": 0.015, "rtol": 0.0, "reason": "weights of three decimals"}
FLOAT64 = {"atol": 1e-12, "rtol": 1e-10, "reason": "float64 rounding"}


def draw_words(rng: random.Random) -> dict:
    """Draw four words whose third asks: small numbers, no weight too near 0 or 1.

    rng  the student's own source of numbers
    """
    while True:
        query = [rng.choice([-1, 1, 2]) for _ in range(4)]
        keys = [[rng.randint(-2, 2) for _ in range(4)] for _ in range(4)]
        values = [[rng.randint(0, 9), rng.randint(0, 9)] for _ in range(4)]
        dots = [sum(q * k for q, k in zip(query, key)) for key in keys]
        seen = sorted(dots[:3])
        distinct = seen[0] < seen[1] < seen[2] and len({tuple(value) for value in values}) == 4
        # The hidden key must matter, or forgetting the mask would not show.
        if distinct and seen[2] - seen[0] <= 5 and abs(seen[2]) <= 6 and 1 <= dots[3] <= 6:
            shift = [rng.randint(1, 5) for _ in range(4)]
            return {"query": query, "keys": keys, "values": values, "shift": shift}


def expected_words(numbers: dict) -> dict:
    """Work out the third word's attention from a student's `numbers`, in plain Python."""
    query, keys, values = numbers["query"], numbers["keys"][:3], numbers["values"][:3]
    scores = [sum(q * k for q, k in zip(query, key)) / 2 for key in keys]
    total = sum(math.exp(score) for score in scores)
    weights = [math.exp(score) / total for score in scores]
    output = [sum(w * value[c] for w, value in zip(weights, values)) for c in range(2)]
    best = values[scores.index(max(scores))]
    return {"scores": scores, "weights": [*weights, 0.0], "output": output, "best": best}


def expect_untold(saw: object, wanted: list, what: str, look: str, bound: dict) -> None:
    """Fail unless `saw` is within `bound` of `wanted`, without telling the number to copy.

    what  what is compared, for the message
    look  where to look, for the message
    """
    form = f"the exercise's text: it asks for a list of {len(wanted)} numbers there"
    try:
        expect_close(saw, wanted, what, look, form=form, **bound)
    except CheckFailed as failure:
        told = failure.look == form
        expected = failure.expected if told else f"another number there, to {bound['atol']}"
        raise CheckFailed(failure.saw, expected, failure.look) from None


def where_weights_go_wrong(weights: object) -> str:
    """Return where to look for the fault in `weights`, of whatever type: digits, sum or mask."""
    try:
        found = [float(one) for one in weights]
    except (TypeError, ValueError):
        found = []
    if any(one % 1 for one in found) and all(abs(one - round(one, 2)) < 1e-7 for one in found):
        return "how many decimals you keep, on the way and at the end"
    if abs(sum(found) - 1.0) > 0.01:
        return "the sum of your weights"
    return "which exponentials belong into the sum, and which weight is exactly 0"


def same_numbers(one: object, other: object) -> bool:
    """Return whether `one` and `other`, of whatever type, are lists of the same numbers."""
    try:
        return [float(x) for x in one] == [float(x) for x in other]
    except (TypeError, ValueError):
        return False


by_hand = Exercise(
    "1.1",
    "Attention by hand",
    requires=("scores", "weights", "output", "output_shifted", "output_loud"),
    stars=1,
    hints=(
        "A query has four numbers. By what do you divide its dot products?",
        "The fourth word is in the third word's future. Which sum must it stay out of?",
        "Adding one vector to all keys adds one number to all scores of a query: equation (6).",
        "Look at section 2, 'Between a mean and a look-up': where do loud scores lead?",
    ),
    instance=draw_words,
)


@by_hand.property("the three scores that count", points=1)
def _(student, numbers):
    wanted = expected_words(numbers)["scores"]
    look = "the dot products, and the root of how many components"
    expect_untold(student.scores, wanted, "the scores", look, THREE_DECIMALS)


@by_hand.property("the four weights", points=2)
def _(student, numbers):
    wanted = expected_words(numbers)["weights"]
    look = where_weights_go_wrong(student.weights)
    expect_untold(student.weights, wanted, "the weights", look, THREE_DECIMALS)


@by_hand.property("the output", points=1)
def _(student, numbers):
    wanted = expected_words(numbers)["output"]
    look = "the weighted mean of the values; keep five decimals until the end"
    expect_untold(student.output, wanted, "the output", look, OUTPUT)


@by_hand.property("prediction: the same vector added to every key", points=1)
def _(student, numbers):
    wanted = expected_words(numbers)["output"]
    look = "what one number added to all scores does to a softmax"
    if same_numbers(student.output_shifted, student.output):
        look = "`output`, which it equals, as it should: that is not right yet"
    expect_untold(student.output_shifted, wanted, "the output after the shift", look, OUTPUT)


@by_hand.property("prediction: the query multiplied by 1000", points=1)
def _(student, numbers):
    wanted = expected_words(numbers)["best"]
    look = "the largest of the scores that count, and the value beside it"
    expect_untold(student.output_loud, wanted, "the loud output", look, THREE_DECIMALS)


window = Exercise(
    "1.2",
    "A causal mask that forgets",
    requires=("window_mask", "window_pairs"),
    stars=2,
    hints=(
        "The last query stands at the last key. At which position stands query 0?",
        "Query at position p, key at position s: which values of p - s are allowed?",
        "For the pairs: every query sees `width` keys, except the first few, which see fewer.",
    ),
)


def window_rows(T: int, S: int, width: int) -> list[list[bool]]:
    """Spell out the mask of `T` queries and `S` keys with a window of `width`, pair by pair."""
    places = range(S - T, S)
    return [
        [s in range(max(0, place - width + 1), place + 1) for s in range(S)] for place in places
    ]


@window.property("a boolean mask of shape (T, S)", points=1)
def _(student, numbers):
    mask = student.window_mask(3, 5, 2)
    expect(isinstance(mask, torch.Tensor), type(mask).__name__, "a tensor", "what is returned")
    expect_equal(tuple(mask.shape), (3, 5), "the shape", "queries are rows, keys are columns")
    expect_equal(mask.dtype, torch.bool, "the dtype", "what a comparison returns")


@window.property("as many keys as queries", points=2)
def _(student, numbers):
    for T, width in [(6, 3), (5, 1), (4, 9)]:
        mask = student.window_mask(T, T, width)
        # From the last row: there, a window that is too wide and none at all look different.
        for t, wanted in reversed(list(enumerate(window_rows(T, T, width)))):
            look = "the first and the last key that this query may see, itself included"
            expect_equal(mask[t], wanted, f"row {t} of window_mask({T}, {T}, {width})", look)


@window.property("more keys than queries", points=2)
def _(student, numbers):
    for T, S, width in [(3, 7, 4), (1, 6, 2), (2, 5, 8)]:
        mask = student.window_mask(T, S, width)
        for t, wanted in enumerate(window_rows(T, S, width)):
            look = "the position of the first query: the last query stands at the last key"
            expect_equal(mask[t], wanted, f"row {t} of window_mask({T}, {S}, {width})", look)


@window.property("a window of 0, and fewer keys than queries, are refused", points=1)
def _(student, numbers):
    for T, S, width in [(3, 3, 0), (3, 3, -1), (4, 3, 2)]:
        what, look = f"window_mask({T}, {S}, {width})", "`raise ValueError(...)` for both cases"
        expect_raises(lambda: student.window_mask(T, S, width), ValueError, what, look)  # noqa: B023


@window.property("prediction: how many pairs", points=2, deadline_s=5.0)
def _(student, numbers):
    for T, width in [(6, 3), (5, 1), (4, 9), (7, 7)]:
        wanted = sum(sum(row) for row in window_rows(T, T, width))
        look = "how many keys a late query sees, and how many the first ones"
        expect_equal(student.window_pairs(T, width), wanted, f"window_pairs({T}, {width})", look)
    wanted = sum(range(1, 4097)) + (100_000 - 4096) * 4096
    look = "a formula: a mask of 10 billion entries does not fit"
    saw = student.window_pairs(100_000, 4096)
    expect_equal(saw, wanted, "window_pairs(100000, 4096)", look)


abstain = Exercise(
    "1.3",
    "Attention that may attend to nothing",
    requires=("attend_or_abstain",),
    stars=2,
    hints=(
        "The 1 in the denominator is exp(0): one more key, with score 0 and value 0.",
        "Subtract the largest of all scores. Is 0 among them?",
        "Could a row be lengthened by one column, and the column dropped afterwards?",
    ),
)


def abstaining(row: list[float]) -> list[float]:
    """Work out the weights of one `row` of scores, in plain Python and without overflow."""
    largest = max([*row, 0.0])
    total = math.exp(-largest) + sum(math.exp(score - largest) for score in row)
    return [math.exp(score - largest) / total for score in row]


@abstain.property("ordinary scores", points=2)
def _(student, numbers):
    rows = [[0.5, -1.0, 2.0, 0.0], [-3.0, -2.5, -4.0, -2.0], [1.0, 1.0, 1.0, 1.0]]
    saw = student.attend_or_abstain(torch.tensor(rows, dtype=torch.float64))
    wanted = [abstaining(row) for row in rows]
    look = "the 1 in the denominator; which dim is summed; no second normalisation"
    form = "what is returned: as many weights as scores, the extra key is not among them"
    expect_close(saw, wanted, "the weights", look, form=form, **FLOAT64)


@abstain.property("scores of 1000 and -1000", points=2)
def _(student, numbers):
    rows = [[1000.0, 990.0, -1000.0], [-1000.0, -1000.0, -1000.0], [1000.0, 1000.0, 1000.0]]
    saw = student.attend_or_abstain(torch.tensor(rows, dtype=torch.float64))
    wanted = [abstaining(row) for row in rows]
    look = "what is subtracted before the exponential, and that the 1 is divided by it too"
    expect_close(saw, wanted, "the weights", look, **FLOAT64)


@abstain.property("a row that is hidden altogether gets weights of 0", points=1)
def _(student, numbers):
    hidden = [[-math.inf, -math.inf, -math.inf], [0.0, -math.inf, 1.0]]
    saw = student.attend_or_abstain(torch.tensor(hidden, dtype=torch.float64))
    wanted = [[0.0, 0.0, 0.0], abstaining(hidden[1])]
    look = "the largest score of a row in which all are minus infinity"
    expect_close(saw, wanted, "the weights", look, **FLOAT64)


@abstain.property("any number of dims, and the scores stay as they were", points=1)
def _(student, numbers):
    scores = torch.linspace(-4, 4, 24, dtype=torch.float64).reshape(2, 3, 4)
    before = scores.tolist()
    saw = student.attend_or_abstain(scores)
    wanted = [[abstaining(row) for row in rows] for rows in before]
    expect_close(saw, wanted, "the weights", "the last dim holds the keys", **FLOAT64)
    expect_equal(scores.tolist(), before, "the scores afterwards", "operations that end in _ or -=")


def gradient(weights: object, scores: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the first of `weights` at `scores`, or say why there is none."""
    follows = isinstance(weights, torch.Tensor) and weights.requires_grad
    saw, wanted = "weights without a gradient", "weights that autograd can follow to the scores"
    expect(follows, saw, wanted, "detach, no_grad, NumPy, item, tolist: what leaves autograd")
    try:
        return torch.autograd.grad(weights[0], scores)[0]
    except RuntimeError as error:
        saw = f"a backward pass that fails: {str(error).split(':')[0]}"
        raise CheckFailed(
            saw, "a gradient", "operations in place on what is needed again"
        ) from None


@abstain.property("the gradient, at ordinary and at large scores", points=1)
def _(student, numbers):
    for row in ([0.3, -0.7, 1.1], [-1000.0, -1001.0, -999.0], [800.0, 801.0, -800.0]):
        scores = torch.tensor(row, dtype=torch.float64, requires_grad=True)
        saw = gradient(student.attend_or_abstain(scores), scores)
        a = abstaining(row)
        # The softmax's own rule: one more key changes the weights, not the derivative's form.
        wanted = [a[0] * ((j == 0) - a[j]) for j in range(3)]
        look = "an infinity on the way, which times 0 gives NaN backwards"
        expect_close(saw, wanted, f"the gradient at {row}", look, **FLOAT64)
