"""Graders of the exercises of chapter 04, pre-training.

4.1 compares perplexities of two tokenizers and 4.2 hides runs of tokens; 4.3, a builder of pairs
to mend, stands in ch04_pairs.py, 4.4, prefix language models, in ch04_prefix.py, and 4.5, the
unigram tokenizer, in ch04_segments.py. The oracles work with exact fractions, one token at a time,
or list everything there is.

Production evaluates on fixed texts with published tools, because such sums are easily got wrong.
"""

import math
from collections.abc import Sequence

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch04_pairs import leaking
from slimlab.classroom.checks.ch04_prefix import prefix
from slimlab.classroom.checks.ch04_segments import segments
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal, expect_raises

__all__ = ["compared", "leaking", "prefix", "segments", "spans"]

NINE = {"rtol": 1e-9, "reason": "float64 rounding"}


def draw_models(rng) -> dict:
    """Draw two models for 4.1, whose answer is a power of two; rng is a random.Random."""
    exponent, part, whole = rng.choice([(4, 3, 2), (6, 3, 2), (6, 4, 3), (6, 2, 3), (8, 3, 4)])
    thousands = rng.randint(2, 9) * 1000
    counts = {"num_tokens_a": part * thousands, "num_tokens_b": whole * thousands}
    return {"perplexity_a": 2**exponent, **counts}


def needed(perplexity_a: float, num_tokens_a: int, num_tokens_b: int) -> float:
    """Say which perplexity in num_tokens_b tokens equals perplexity_a in num_tokens_a."""
    bits = num_tokens_a * math.log2(perplexity_a)
    return 2 ** (bits / num_tokens_b)


compared = Exercise(
    "4.1",
    "Which perplexity is better?",
    requires=("my_prediction", "needed_perplexity", "perplexity_per_word", "pooled_perplexity"),
    stars=1,
    instance=draw_models,
    hints=(
        "The logarithm of a perplexity is a mean loss. Which sum of losses belongs to it?",
        "Two models give a text the same probability if their sums are equal, whatever they are "
        "divided by.",
        "Powers of two: 64 is 6 bits per token. How many bits have all tokens of A? Share them "
        "among the tokens of B.",
        "Several texts: add their sums, then divide once. And never multiply probabilities.",
    ),
)


@compared.property("the perplexity that B needs, for your numbers and others", points=2)
def _(student, numbers):
    others = ((20.0, 700, 1000), (20.0, 1000, 700), (3.5, 12, 12), (50.0, 9_000_000, 6_000_000))
    for case in (tuple(numbers[name] for name in numbers), *others):
        found = function_of(student, "needed_perplexity")(*case)
        what = f"needed_perplexity{case}"
        look = "the sum of all losses, equal for both, what it is divided by, and too small numbers"
        expect_close(found, needed(*case), what, look, **NINE)


@compared.property("the perplexity per word", points=2)
def _(student, numbers):
    for perplexity, num_tokens, num_words in ((16.0, 300, 200), (9.0, 50, 50), (2.0, 5e6, 2e6)):
        case = (perplexity, int(num_tokens), int(num_words))
        found = function_of(student, "perplexity_per_word")(*case)
        look = "a word has the losses of all its tokens: they add, so perplexities multiply"
        wanted = perplexity ** (num_tokens / num_words)
        expect_close(found, wanted, f"perplexity_per_word{case}", look, **NINE)


@compared.property("several texts of unequal lengths together", points=2)
def _(student, numbers):
    look = "what is averaged (losses, not perplexities), and by how many tokens each text counts"
    for perplexities, counts in (([10.0, 1000.0], [300, 100]), ([8.0], [7]), ([2.0, 5.0], [4, 4])):
        exact = sum(math.log2(p) * n for p, n in zip(perplexities, counts)) / sum(counts)
        found = function_of(student, "pooled_perplexity")(perplexities, counts)
        expect_close(found, 2**exact, f"the pooled {perplexities} of {counts} tokens", look, **NINE)


@compared.property("long texts, and a text without tokens", points=2)
def _(student, numbers):
    pooled = function_of(student, "pooled_perplexity")
    found = pooled([16.0, 64.0, 7.0], [3_000_000, 1_000_000, 0])
    look = "probabilities of whole texts are too small for a number: stay with logarithms"
    expect_close(found, 2**4.5, "the pooled perplexity of 4 million tokens", look, **NINE)


@compared.property("your prediction by hand was right", points=1)
def _(student, numbers):
    look = "your pencil calculation for numbers('4.1'); correct it once you know why"
    found = function_of(student, "my_prediction")()
    expect_close(found, needed(**numbers), "my_prediction()", look, rtol=1e-6, reason="rounding")


spans = Exercise(
    "4.2",
    "Hide runs of tokens",
    requires=("hide_spans", "put_back"),
    stars=2,
    hints=(
        "Sort a copy of the spans first; then one walk from left to right makes both lists.",
        "Remember where the last span ended: the tokens from there to the next start are inputs.",
        "A span that starts before the last one's end overlaps it. Touching is not overlapping.",
        "put_back: first read the targets into a dictionary from sentinels to hidden tokens.",
    ),
)

SENTINELS = [100, 101, 102, 103, 104]
TEXT = [7, 8, 9, 10, 11, 12, 13, 9]
PLAIN = ([(1, 2), (5, 1)], [(2, 3)], [(1, 1), (3, 1), (6, 1)])
AWKWARD = ([(5, 1), (1, 2)], [(2, 2), (4, 1)], [(0, 3), (6, 2)], [(0, 8)], [])


def hidden(ids: Sequence[int], hide: Sequence[tuple]) -> tuple[list, list]:
    """Hide the spans in `hide` of `ids`, token by token; returns inputs and targets."""
    owner = {}
    for number, (start, length) in enumerate(sorted(hide)):
        owner |= dict.fromkeys(range(start, start + length), number)
    inputs, targets, last = [], [], None
    for place, token in enumerate(ids):
        mine = owner.get(place)
        if mine is None:
            inputs.append(token)
        else:
            if mine != last:
                inputs.append(SENTINELS[mine])
                targets.append(SENTINELS[mine])
            targets.append(token)
        last = mine
    return inputs, [*targets, SENTINELS[len(hide)]]


def hide_of(student, hide: list[tuple]) -> tuple[list, list]:
    """Return the inputs and targets that the student makes of TEXT with the spans in `hide`."""
    try:
        found = function_of(student, "hide_spans")(list(TEXT), list(hide), list(SENTINELS))
    except ValueError as error:
        look = "what counts as an overlap, and how many sentinels are needed"
        raise CheckFailed(f"ValueError for the spans {hide}: {error}", "two lists", look) from None
    fits = isinstance(found, tuple | list) and len(found) == 2
    asked = "two lists: inputs and targets"
    expect(fits, f"hide_spans returned {form_of(found)}", asked, "its return line")
    return tuple(numbers_in(one, name) for one, name in zip(found, ("inputs", "targets")))


def numbers_in(found: object, name: str) -> list[int]:
    """Return `found`, called `name` in messages, as a list of whole numbers; fail if it is none."""
    if not isinstance(found, list | tuple):
        raise CheckFailed(f"{name}: {form_of(found)}", "a list of whole numbers", "what you return")
    return [whole_number(one, f"an entry of {name}", "what you append") for one in found]


@spans.property("each run becomes one sentinel of its own in the inputs", points=2)
def _(student, numbers):
    for hide in PLAIN:
        inputs, _ = hide_of(student, hide)
        look = "one sentinel for a whole run, another one for the next, and the rest of the text"
        expect_equal(inputs, hidden(TEXT, hide)[0], f"inputs with the spans {hide}", look)


@spans.property("the targets tell what was hidden, and end with a sentinel", points=2)
def _(student, numbers):
    for hide in PLAIN:
        _, targets = hide_of(student, hide)
        look = "the order: a sentinel, then its tokens; and what stands at the very end"
        expect_equal(targets, hidden(TEXT, hide)[1], f"targets with the spans {hide}", look)


@spans.property("the way back, from pairs of ours", points=2)
def _(student, numbers):
    for hide in PLAIN:
        found = function_of(student, "put_back")(*hidden(TEXT, hide), list(SENTINELS))
        look = "where the tokens behind each sentinel of the targets belong"
        what = f"put_back of a text with the spans {hide}"
        expect_equal(numbers_in(found, "what put_back returned"), TEXT, what, look)


@spans.property("awkward spans: in any order, touching, at both ends, all, none", points=2)
def _(student, numbers):
    for hide in AWKWARD:
        what, wanted = f"inputs and targets with the spans {hide}", hidden(TEXT, hide)
        look = "the order of the text, spans that touch, and the first and the last token"
        expect_equal(hide_of(student, hide), wanted, what, look)
        found = numbers_in(
            function_of(student, "put_back")(*wanted, list(SENTINELS)), "what put_back returned"
        )
        expect_equal(found, TEXT, f"put_back of a text with the spans {hide}", look)


@spans.property("what cannot be is refused")
def _(student, numbers):
    hide, enough = function_of(student, "hide_spans"), list(SENTINELS)
    bad = {"overlapping spans": [(1, 3), (3, 2)], "a span that leaves the text": [(6, 3)]}
    bad |= {"an empty span": [(2, 0)], "a start below 0": [(-2, 1)]}
    for what, given in bad.items():
        look = "what is checked before anything is hidden"
        expect_raises(lambda given=given: hide(list(TEXT), given, enough), ValueError, what, look)
    three = [(1, 1), (3, 1), (6, 1)]
    what, look = "three spans with three sentinels", "the sentinel at the end of the targets"
    expect_raises(lambda: hide(list(TEXT), three, enough[:3]), ValueError, what, look)


@spans.property("ids and spans stay as they were")
def _(student, numbers):
    ids, given = list(TEXT), [(5, 1), (1, 2)]
    function_of(student, "hide_spans")(ids, given, list(SENTINELS))
    expect_equal(ids, TEXT, "ids afterwards", "what you change in place: make new lists")
    look = "sort() changes a list, sorted() makes a new one"
    expect_equal(given, [(5, 1), (1, 2)], "spans afterwards", look)
