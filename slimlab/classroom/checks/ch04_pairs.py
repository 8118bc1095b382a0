"""Grader of exercise 4.3 of chapter 04: sentence pairs whose labels can be told without reading.

The oracle knows where each word stands, since no word occurs twice, and judges by b alone with
counts of its own.

Data sets of pairs are judged like this before they are published: by a model that sees one side.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Hashable

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.classroom.grading import number as rounded

EXACT = {"rtol": 1e-9, "reason": "float64 rounding"}

leaking = Exercise(
    "4.3",
    "It runs, it learns, it teaches nothing",
    requires=("best_guess", "mended_pairs"),
    stars=2,
    hints=(
        "best_guess: count, for each look, how many pairs have label 0 and how many label 1.",
        "Which sentences can be b of a neighbour, and which can be b of a stranger? Print the "
        "lengths in both cases.",
        "A headline follows nothing. And who is cut to max_words, who is not?",
        "A stranger from the same document may even be the true next sentence. Draw the document "
        "of a stranger as that of a neighbour is drawn, only never the same one.",
    ),
)

NUM_PAIRS, MAX_WORDS = 12_000, 7
LABELS = [("x", "y", 1), ("x", "z", 0), ("w", "y", 1), ("w", "y", 0), ("v", "zz", 0), ("v", "u", 1)]


def documents_of(lengths: list[int], seed: int) -> list[list[list[str]]]:
    """Make a document of a headline and n - 1 sentences for each n in `lengths`, from `seed`."""
    rng = random.Random(seed)
    found = []
    for d, num_sentences in enumerate(lengths):
        sizes = [3] + [rng.randint(4, 11) for _ in range(num_sentences - 1)]
        found.append([[f"{d}.{i}.{k}" for k in range(n)] for i, n in enumerate(sizes)])
    return found


EQUAL, UNEQUAL = [4] * 25, [2] * 12 + [10] * 12


def drawn(student, lengths: list[int], seed: int = 1) -> tuple[list, list]:
    """Return documents of these lengths and the pairs that the student draws with `seed`."""
    documents = documents_of(lengths, seed)
    rng = random.Random(seed)
    found = function_of(student, "mended_pairs")(documents, NUM_PAIRS, MAX_WORDS, rng)
    look = "what you return: a list of (a, b, label)"
    is_list = isinstance(found, list | tuple)
    asked = f"a list of {NUM_PAIRS} pairs"
    expect(is_list, f"mended_pairs returned {form_of(found)}", asked, look)
    expect_equal(len(found), NUM_PAIRS, "the number of pairs", "the loop, and what is skipped")
    for pair in found:
        fits = isinstance(pair, tuple | list) and len(pair) == 3 and int(pair[2]) in (0, 1)
        fits = fits and all(isinstance(one, list | tuple) and len(one) > 0 for one in pair[:2])
        if not fits:
            raise CheckFailed(f"a pair {pair!r:.80}", "(a, b, label), two lists and 0 or 1", look)
    return documents, found


def place_of(sentence: list[str]) -> tuple[int, int]:
    """Say in which document a sentence stands, and at which place."""
    document, place, _ = sentence[0].split(".")
    return int(document), int(place)


def judge_share(pairs: list, seen: Callable[[list, list], Hashable]) -> float:
    """Count how many of the pairs the best judge gets right who sees seen(a, b)."""
    looks = defaultdict(lambda: [0, 0])
    for a, b, label in pairs:
        looks[seen(a, b)][int(label)] += 1
    return sum(max(both) for both in looks.values()) / len(pairs)


@leaking.property("your judge: pairs that can be counted by hand", points=2)
def _(student, numbers):
    guess = function_of(student, "best_guess")
    look = "for each look, the more frequent of the two labels; then the sum over all looks"
    for what, seen in {
        "b": lambda a, b: b,
        "a": lambda a, b: a,
        "both": lambda a, b: (a, b),
        "nothing": lambda a, b: 0,
    }.items():
        wanted = judge_share(LABELS, seen)
        expect_close(
            guess(list(LABELS), seen), wanted, f"the best guess seeing {what}", look, **EXACT
        )


@leaking.property("your judge: labels that are not balanced")
def _(student, numbers):
    rng = random.Random(5)
    pairs = [(rng.randrange(3), rng.randrange(4), int(rng.random() < 0.9)) for _ in range(500)]
    look = "a judge who sees nothing still knows which label is more frequent"
    for what, seen in {"nothing": lambda a, b: None, "b": lambda a, b: b}.items():
        wanted = judge_share(pairs, seen)
        found = function_of(student, "best_guess")(pairs, seen)
        what = f"the best guess seeing {what}, 90 % neighbours"
        expect_close(found, wanted, what, look, **EXACT)


@leaking.property("half are neighbours, and neighbours follow", points=2)
def _(student, numbers):
    _, pairs = drawn(student, EQUAL)
    share = sum(int(label) for _, _, label in pairs) / len(pairs)
    deviation = 4 * 0.5 / NUM_PAIRS**0.5  # four standard deviations of a fair coin
    fair, look = abs(share - 0.5) < deviation, "how the label is drawn"
    expect(fair, f"{share:.3f} of the pairs have label 1", "a half", look)
    for a, b, label in pairs:
        (document, place), (other, after) = place_of(a), place_of(b)
        follows = document == other and after == place + 1
        if label:
            saw = f"label 1: sentence {place} of document {document}, then {after} of {other}"
            expect(follows, saw, "the next sentence of the same document", "how b is taken")


@leaking.property("strangers come from another document, any other", points=2)
def _(student, numbers):
    documents, pairs = drawn(student, EQUAL)
    met = defaultdict(set)
    for a, b, label in pairs:
        if not label:
            mine, other = place_of(a)[0], place_of(b)[0]
            saw, asked = f"label 0: a and b both of document {mine}", "two documents"
            expect(mine != other, saw, asked, "how the stranger's document is drawn")
            met[mine].add(other)
    fewest = min(len(others) for others in met.values())
    most, look = len(documents) - 1, "how the stranger's document is drawn"
    saw = f"a document whose strangers come from {fewest} of {most} others"
    expect(fewest > 0.8 * most, saw, "from all of them, in the long run", look)


@leaking.property("lengths tell nothing, and no sentence is too long", points=2)
def _(student, numbers):
    _, pairs = drawn(student, EQUAL)
    look = "which sentences are cut to max_words: a, b, and b of a stranger"
    for what, sentences in {
        "a": [a for a, _, _ in pairs],
        "b of all neighbours": [b for _, b, label in pairs if label],
        "b of all strangers": [b for _, b, label in pairs if not label],
    }.items():
        expect_equal(max(map(len, sentences)), MAX_WORDS, f"words in the longest {what}", look)
    share = judge_share(pairs, lambda a, b: len(b))
    saw = f"a judge who sees the length of b is right in {rounded(share)} of the pairs"
    expect(share < 0.53, saw, "about a half", "lengths of b with label 0 and with label 1")


@leaking.property("b alone tells nothing")
def _(student, numbers):
    for lengths, kind in ((EQUAL, "equally long"), (UNEQUAL, "unequally long")):
        _, pairs = drawn(student, lengths, seed=3)
        share = judge_share(pairs, lambda a, b: b[0])
        saw = f"a judge who sees b is right in {rounded(share)} of the pairs, {kind} documents"
        look = "which sentences are b of a neighbour and of a stranger, and how often each is"
        expect(share < 0.56, saw, "about a half (0.54 at most by luck)", look)


@leaking.property("the documents stay as they were")
def _(student, numbers):
    documents, _ = drawn(student, EQUAL)
    look = "what you change in place: slices make new lists, pop and del do not"
    for now, before in zip(documents, documents_of(EQUAL, 1)):
        lengths = [len(sentence) for sentence in now]
        expect_equal(lengths, [len(one) for one in before], "words per sentence afterwards", look)
        expect(now == before, "other words in a document afterwards", "the same as before", look)
