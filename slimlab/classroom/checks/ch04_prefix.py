"""Grader of exercise 4.4 of chapter 04: a prefix read from both sides, the rest predicted.

The oracles are loops over two places, and a real decoder whose tokens are changed one by one.

Production passes the prefix's length to the attention kernel instead of a mask.
"""

import itertools

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_equal
from slimlab.config import ModelConfig
from slimlab.model.build import build_model
from slimlab.model.initialise import initialise
from slimlab.train.objectives import IGNORE

prefix = Exercise(
    "4.4",
    "A prefix that is read from both sides",
    requires=("prefix_mask", "prefix_targets", "peeks"),
    stars=2,
    hints=(
        "Two reasons for which a query may see a key: the key is in the prefix, or it is not later "
        "than the query.",
        "The target of place t is token t + 1. Which t belong to a token t + 1 behind the prefix?",
        "The last place of the prefix is the first that predicts; the last place of the text "
        "predicts nothing.",
        "peeks: place t needs token t + 1. Which diagonal of the mask says whether it sees it?",
    ),
)

CASES = (([3, 0, 1, 6, 2], 6), ([2], 4), ([5, 5], 5), ([0, 0, 1], 3))


def may_see(query: int, key: int, prefix_len: int) -> bool:
    """Say whether `query` may attend to `key` where the first prefix_len tokens are the prefix."""
    return key < prefix_len or key <= query


def true_mask(prefix_lens: list[int], T: int) -> Tensor:
    """Make the mask for each length in prefix_lens, one pair of the T places at a time."""
    rows = [
        [[may_see(query, key, length) for key in range(T)] for query in range(T)]
        for length in prefix_lens
    ]
    return torch.tensor(rows)[:, None]


def true_targets(ids: Tensor, prefix_lens: list[int]) -> list[list[int]]:
    """Make the targets of `ids` with these prefix_lens, one place at a time."""
    T = ids.shape[1]
    return [
        [row[t + 1] if t + 1 < T and t + 1 >= length else IGNORE for t in range(T)]
        for row, length in zip(ids.tolist(), prefix_lens)
    ]


def mask_of(student, prefix_lens: list[int], T: int) -> Tensor:
    """Return the student's mask for these prefix_lens and T; fail if it has another form."""
    found = function_of(student, "prefix_mask")(torch.tensor(prefix_lens), T)
    shape = (len(prefix_lens), 1, T, T)
    fits = isinstance(found, Tensor) and tuple(found.shape) == shape
    look = "the dim of the heads, and the order: queries are rows, keys are columns"
    expect(fits, f"prefix_mask returned {form_of(found)}", f"a tensor of shape {shape}", look)
    expect_equal(found.dtype, torch.bool, "the dtype of the mask", "comparisons give booleans")
    return found


def targets_of(student, ids: Tensor, prefix_lens: list[int]) -> Tensor:
    """Return the student's targets for these ids and prefix_lens; fail on another form."""
    found = function_of(student, "prefix_targets")(ids.clone(), torch.tensor(prefix_lens))
    fits = isinstance(found, Tensor) and found.shape == ids.shape
    asked = f"a tensor of shape {tuple(ids.shape)}"
    expect(fits, f"prefix_targets returned {form_of(found)}", asked, "one target for each place")
    return found


def small_model() -> nn.Module:
    """Make a float64 decoder whose logits depend on everything that it may see."""
    config = ModelConfig(13, 8, 16, 2, 2, positions="learned")
    return initialise(build_model(config).double(), std=0.5, seed=0).eval()


@prefix.property("the prefix is seen by all, the rest from the left only", points=2)
def _(student, numbers):
    look = "who is a query (row) and who a key (column), and the two reasons for seeing"
    for prefix_lens, T in CASES:
        found = mask_of(student, prefix_lens, T)
        for row, query, key in itertools.product(range(len(prefix_lens)), range(T), range(T)):
            wanted = may_see(query, key, prefix_lens[row])
            what = f"prefix of {prefix_lens[row]}, T = {T}: whether place {query} sees token {key}"
            expect_equal(bool(found[row, 0, query, key]), wanted, what, look)


@prefix.property("every token behind the prefix is asked for, once", points=2)
def _(student, numbers):
    torch.manual_seed(0)
    for prefix_lens, T in CASES:
        ids = torch.randint(20, (len(prefix_lens), T))
        found, look = targets_of(student, ids, prefix_lens), "the shift by one, and both ends"
        for row, wanted in enumerate(true_targets(ids, prefix_lens)):
            what = f"targets of {ids[row].tolist()} with a prefix of {prefix_lens[row]}"
            expect_equal(found[row].tolist(), wanted, what, look)


@prefix.property("under your mask a real model uses both sides of the prefix, and cannot cheat")
def _(student, numbers):
    model, prefix_lens, T = small_model(), [4, 2], 7
    torch.manual_seed(1)
    ids, mask = torch.randint(13, (2, T)), mask_of(student, prefix_lens, T)
    with torch.no_grad():
        before = model(ids, mask=mask, causal=False)
        for key in range(T):
            changed = ids.clone()
            changed[:, key] = (changed[:, key] + 1) % 13
            moved = (model(changed, mask=mask, causal=False) - before).abs().amax(dim=2) > 1e-9
            for row, length in enumerate(prefix_lens):
                wanted = [may_see(query, key, length) for query in range(T)]
                what = f"places that token {key} reaches, prefix of {length}"
                expect_equal(moved[row].tolist(), wanted, what, "row and column of the mask")


@prefix.property("your count is 0 for what is right", points=1)
def _(student, numbers):
    torch.manual_seed(2)
    for prefix_lens, T in CASES:
        ids = torch.randint(20, (len(prefix_lens), T))
        mask, targets = true_mask(prefix_lens, T), torch.tensor(true_targets(ids, prefix_lens))
        found = whole_number(function_of(student, "peeks")(mask, targets), "peeks", "its result")
        look = "place t needs token t + 1, not token t, and targets that are IGNORE do not count"
        expect_equal(found, 0, f"peeks with the prefix lengths {prefix_lens}", look)


@prefix.property("your count for masks and targets that are wrong", points=3)
def _(student, numbers):
    torch.manual_seed(3)
    prefix_lens, T = [3, 0, 5], 6
    ids = torch.randint(1, 20, (3, T))
    everything = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORE)], dim=1)
    one_too_many = torch.tensor(true_targets(ids, [2, 0, 4]))
    open_mask = torch.ones(3, 1, T, T, dtype=torch.bool)
    mask = true_mask(prefix_lens, T)
    for what, (seen, targets) in {
        "targets in the prefix": (mask, everything),
        "one target too many": (mask, one_too_many),
        "an encoder's mask": (open_mask, torch.tensor(true_targets(ids, prefix_lens))),
        "a mask that shows the next token alone": (open_mask.triu(1).tril(1), everything),
        "a mask that hides the next token alone": (
            open_mask.tril() | open_mask.triu(2),
            everything,
        ),
    }.items():
        wanted = sum(
            bool(seen[row, 0, t, t + 1]) and int(targets[row, t]) != IGNORE
            for row in range(3)
            for t in range(T - 1)
        )
        found = whole_number(function_of(student, "peeks")(seen, targets), "peeks", "its result")
        look = "which entry of the mask says that place t sees token t + 1, and all rows"
        expect_equal(found, wanted, f"peeks with {what}", look)


@prefix.property("ids stay as they were")
def _(student, numbers):
    ids = torch.arange(12).view(2, 6)
    function_of(student, "prefix_targets")(ids, torch.tensor([2, 4]))
    look = "what you change in place: a slice of a tensor is the tensor itself"
    expect_equal(ids, torch.arange(12).view(2, 6), "ids afterwards", look)
