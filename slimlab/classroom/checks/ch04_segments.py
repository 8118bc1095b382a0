"""Grader of exercise 4.5 of chapter 04: the best segmentation, and the sum over all of them.

The oracle lists all segmentations of short texts and adds exact fractions. Long texts are checked
by what must hold for them: joining, the sum, and a vocabulary for which the answer is known.

SentencePiece does both with a trie of pieces, and learns the probabilities as well.
"""

import math
import random
from collections.abc import Iterator
from fractions import Fraction

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal, expect_raises

segments = Exercise(
    "4.5",
    "The best of all segmentations",
    requires=("best_segmentation", "text_log_prob"),
    stars=3,
    hints=(
        "What is the best segmentation of the first 0 characters? Of the first 1? Of the first n, "
        "if you know those of all shorter beginnings?",
        "The last piece of a segmentation of text[:end] is text[start:end]. Try every start, and "
        "remember for each end which start was best.",
        "The pieces come out from the end: follow the remembered starts, then reverse.",
        "text_log_prob: the same walk with a sum of probabilities in place of the greatest one. "
        "log(e^a + e^b) = m + log(e^(a-m) + e^(b-m)) with m = max(a, b).",
    ),
)

# out of 64; "ab" and "abc" tempt the greedy, "aab" those who want few pieces
WEIGHTS = {
    "a": 8,
    "b": 4,
    "c": 4,
    "d": 2,
    "ab": 16,
    "abc": 6,
    "bcd": 12,
    "cd": 3,
    "dd": 1,
    "aab": 1,
}
PROBABILITIES = {piece: Fraction(weight, 64) for piece, weight in WEIGHTS.items()}
LOG_PROBS = {piece: math.log(weight / 64) for piece, weight in WEIGHTS.items()}
TEXTS = ("abcd", "aab", "abcdd", "aabcd", "dcba", "ddd", "abababcd", "a", "bcdabc", "abccdbcd")


def all_ways(text: str) -> Iterator[list[str]]:
    """List every segmentation of `text` into pieces of WEIGHTS."""
    if not text:
        yield []
    for end in range(1, len(text) + 1):
        if text[:end] in WEIGHTS:
            for rest in all_ways(text[end:]):
                yield [text[:end], *rest]


def probability(pieces: list[str]) -> Fraction:
    """Multiply the probabilities of `pieces`."""
    return math.prod((PROBABILITIES[piece] for piece in pieces), start=Fraction(1))


def pieces_of(student, text: str, log_probs: dict) -> list[str]:
    """Return the student's pieces of `text` by log_probs; fail if they are no segmentation."""
    shown = f"{text[:20]!r}{' and so on' if text[20:] else ''}"
    try:
        found = function_of(student, "best_segmentation")(text, dict(log_probs))
    except (ValueError, RecursionError) as error:
        saw, look = f"{type(error).__name__} for {shown}", "the empty text, and how deep calls nest"
        raise CheckFailed(saw, "pieces that join to the text", look) from None
    look = "what is returned: the pieces, in the order of the text"
    fits = isinstance(found, list | tuple) and all(isinstance(one, str) for one in found)
    saw = f"best_segmentation of {shown} returned {form_of(found)}"
    expect(fits, saw, "a list of strings", look)
    unknown = [piece for piece in found if piece not in log_probs]
    expect(not unknown, f"{unknown[:1]} among the pieces", "pieces of log_probs", look)
    same = "".join(found) == text
    saw = (
        f"pieces of {shown} that join to {''.join(found)[:20]!r}, {len(''.join(found))} characters"
    )
    expect(same, saw, "the text itself", look)
    return list(found)


def log_prob_of(student, text: str, log_probs: dict) -> float:
    """Return the text_log_prob of `text` under log_probs by `student`; fail unless a number."""
    found = function_of(student, "text_log_prob")(text, dict(log_probs))
    if isinstance(found, bool) or not isinstance(found, int | float):
        asked = "a number: the logarithm of a probability"
        raise CheckFailed(f"text_log_prob returned {form_of(found)}", asked, "its return line")
    return float(found)


def random_text(length: int, seed: int) -> str:
    """Draw a text of `length` characters a to d with `seed`."""
    rng = random.Random(seed)
    return "".join(rng.choice("abcd") for _ in range(length))


@segments.property("the best of all segmentations of short texts", points=3)
def _(student, numbers):
    for text in TEXTS:
        best = max(all_ways(text), key=probability)
        found = pieces_of(student, text, LOG_PROBS)
        saw = f"{found} for {text!r}, probability {float(probability(found)):.3g}"
        asked = f"{best}, probability {float(probability(best)):.3g}"
        look = "what is maximised (the sum over the whole text), and which starts are tried"
        expect(probability(found) == probability(best), saw, asked, look)


@segments.property("pieces of many characters")
def _(student, numbers):
    long_piece = "internationalisation"
    log_probs = {letter: -3.0 for letter in set(long_piece)} | {long_piece: -9.0, "nation": -8.0}
    found = pieces_of(student, f"a{long_piece}l", log_probs)
    look = "how far back a piece may begin: as far as the longest piece is long"
    expect_equal(found, ["a", long_piece, "l"], f"pieces of 'a{long_piece}l'", look)


@segments.property("thousands of characters", points=2, deadline_s=20)
def _(student, numbers):
    text = random_text(3000, 0)
    found = pieces_of(student, text, LOG_PROBS)
    best = [0.0]
    for end in range(1, len(text) + 1):
        starts = range(max(0, end - 3), end)
        best.append(max(best[s] + LOG_PROBS.get(text[s:end], -math.inf) for s in starts))
    what = "the sum of log_probs over 3000 characters"
    look = "what is maximised: the sum over the whole text; and logarithms, since products vanish"
    total = sum(LOG_PROBS[piece] for piece in found)
    expect_close(total, best[-1], what, look, rtol=1e-9, reason="float64 rounding")


@segments.property("the probability of a text is the sum over all segmentations", points=2)
def _(student, numbers):
    for text in TEXTS:
        wanted = math.log(sum(map(probability, all_ways(text))))
        found = log_prob_of(student, text, LOG_PROBS)
        look = "all segmentations, not the best one alone; and the logarithm of their sum"
        what = f"text_log_prob of {text!r}"
        expect_close(found, wanted, what, look, rtol=1e-9, atol=1e-12, reason="rounding")


@segments.property("a probability too small for a number", points=2, deadline_s=20)
def _(student, numbers):
    # With pieces x and xx of probabilities 1/2 and 1/2 the sums obey s(n) = (s(n-1) + s(n-2)) / 2;
    # multiplied by e^(-n) each, they are the same sums times e^(-n).
    log_probs = {"x": math.log(0.5) - 1, "xx": math.log(0.5) - 2}
    sums = [1.0, 0.5]
    while len(sums) <= 2000:
        sums.append((sums[-1] + sums[-2]) / 2)
    found = log_prob_of(student, "x" * 2000, log_probs)
    what, look = "text_log_prob of 2000 characters", "exp of a large negative number is 0"
    wanted = math.log(sums[2000]) - 2000
    expect_close(found, wanted, what, look, rtol=1e-9, reason="float64 rounding")


@segments.property("texts that have no segmentation, and the empty text")
def _(student, numbers):
    segment = function_of(student, "best_segmentation")
    look = "what is left where no piece ends"
    for text in ("e", "abe", "eab"):
        what = f"the text {text!r}, which no pieces make"
        expect_raises(lambda text=text: segment(text, dict(LOG_PROBS)), ValueError, what, look)
        found = log_prob_of(student, text, LOG_PROBS)
        expect_equal(found, -math.inf, f"text_log_prob of {text!r}", look)
    expect_equal(pieces_of(student, "", LOG_PROBS), [], "pieces of the empty text", look)
    expect_equal(log_prob_of(student, "", LOG_PROBS), 0.0, "text_log_prob of the empty text", look)
