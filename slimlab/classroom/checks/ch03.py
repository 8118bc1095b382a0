"""Graders of the exercises of chapter 03, the Transformer.

3.1 how much a chunk mask leaks and 3.2 through how many layers a mask leaks; 3.3 and 3.5, which
rebuild parts of a model, stand in ch03_surgery.py, and 3.4, a program to mend, in ch03_programs.py.
The oracles are counting loops and searches, one pair of places at a time, and real models.

Production masks are functions of two places inside a kernel; nobody stores them as tables.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch03_programs import together
from slimlab.classroom.checks.ch03_surgery import layouts, parallel
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.config import ModelConfig
from slimlab.model.build import build_model
from slimlab.model.initialise import initialise
from slimlab.model.masks import causal_mask

__all__ = ["cheating", "depth", "layouts", "parallel", "together"]


def draw_chunks(rng) -> dict:
    """Draw a text and its chunks for 3.1, the last chunk shorter; rng is a random.Random."""
    chunk_len = rng.choice([5, 6, 7, 8])
    T = chunk_len * rng.randint(3, 6) + rng.randint(2, chunk_len - 2)
    return {"T": T, "chunk_len": chunk_len, "vocab_size": rng.choice([10, 20, 50, 100])}


def may_see(query: int, key: int, chunk_len: int) -> bool:
    """Say if `query` may see `key` in its own chunk of chunk_len tokens, or in one before."""
    return key // chunk_len <= query // chunk_len


def count_leaks(T: int, chunk_len: int) -> int:
    """Count, one by one, the pairs that leak in a text of T tokens cut by chunk_len."""
    pairs = ((query, key) for query in range(T) for key in range(query + 1, T))
    return sum(may_see(query, key, chunk_len) for query, key in pairs)


def list_blind(T: int, chunk_len: int) -> list[int]:
    """List the places, of T cut by chunk_len, whose next token is hidden or not in the text."""
    return [t for t in range(T) if t == T - 1 or not may_see(t, t + 1, chunk_len)]


cheating = Exercise(
    "3.1",
    "How much does a chunk mask leak?",
    requires=("my_prediction", "leaked_pairs", "blind_places", "cheating_loss"),
    stars=1,
    instance=draw_chunks,
    hints=(
        "Draw the mask for T = 7 and chunk_len = 3, and mark what stands right of the diagonal.",
        "A full chunk of c tokens leaks c(c - 1)/2 pairs. How many tokens has the last chunk?",
        "Which places have a next token that they may see? The last place of the text has none.",
        "cheating_loss: at a blind place the best guess gives each token the same probability. "
        "The mean is over all T places.",
    ),
)

SIZES = ((12, 4), (11, 4), (9, 4), (7, 1), (5, 8), (1, 3))


def sizes_named(T: int, chunk_len: int) -> str:
    """Name the sizes T and chunk_len in a message."""
    return f"with T = {T}, chunk_len = {chunk_len}"


@cheating.property("leaked pairs for your numbers", points=2)
def _(student, numbers):
    T, chunk_len = numbers["T"], numbers["chunk_len"]
    found = function_of(student, "leaked_pairs")(T, chunk_len)
    look = "which pairs are of the future, and how long the last chunk is"
    what = f"leaked pairs {sizes_named(T, chunk_len)}"
    expect_equal(whole_number(found, what, "the result"), count_leaks(T, chunk_len), what, look)


@cheating.property("leaked pairs for other texts: even chunks, one chunk, chunks of one", points=2)
def _(student, numbers):
    for T, chunk_len in SIZES:
        found = function_of(student, "leaked_pairs")(T, chunk_len)
        what = f"leaked pairs {sizes_named(T, chunk_len)}"
        look = "chunks that are full, chunks that are not, and chunks of a single token"
        expect_equal(whole_number(found, what, "the result"), count_leaks(T, chunk_len), what, look)


@cheating.property("the places where even the cheat must guess", points=2)
def _(student, numbers):
    look = "where a chunk ends, and what the last place of the text has to predict"
    for T, chunk_len in ((numbers["T"], numbers["chunk_len"]), *SIZES):
        found = function_of(student, "blind_places")(T, chunk_len)
        what = f"blind places {sizes_named(T, chunk_len)}"
        if isinstance(found, Sequence | set | Tensor):
            found = sorted(whole_number(one, what, "a list of places") for one in found)
        expect_equal(found, list_blind(T, chunk_len), what, look)


@cheating.property("the loss of a perfect cheat", points=2)
def _(student, numbers):
    cases = [(numbers["T"], numbers["chunk_len"], numbers["vocab_size"])]
    cases += [(T, chunk_len, 16) for T, chunk_len in SIZES]
    for T, chunk_len, vocab_size in cases:
        found = function_of(student, "cheating_loss")(T, chunk_len, vocab_size)
        wanted = len(list_blind(T, chunk_len)) / T * math.log(vocab_size)
        what = f"the loss {sizes_named(T, chunk_len)}, vocab_size = {vocab_size}"
        look = "natural logarithms, blind places, and the mean over all places"
        expect_close(found, wanted, what, look, rtol=1e-6, reason="rounding")


@cheating.property("your prediction by hand was right", points=1)
def _(student, numbers):
    look = "your pencil calculation for numbers('3.1'); correct it once you know why"
    wanted = count_leaks(numbers["T"], numbers["chunk_len"])
    expect_equal(function_of(student, "my_prediction")(), wanted, "my_prediction()", look)


depth = Exercise(
    "3.2",
    "Through how many layers does it leak?",
    requires=("leaking_places", "first_leaking_depth"),
    stars=2,
    hints=(
        "After one block, place t knows what the mask lets it see, and itself: the sum around "
        "attention keeps it, whatever the mask says.",
        "After two blocks it knows what those places knew after one. Two boolean matrices, "
        "multiplied, say who knows whom.",
        "Only one entry of each row counts: the one right of the diagonal.",
        "first_leaking_depth: knowledge can only grow, and after T blocks it grows no more.",
    ),
)


def heard_of(mask: Tensor, num_layers: int) -> list[set[int]]:
    """Collect of whom each place has heard after num_layers blocks under `mask`."""
    T = mask.shape[0]
    seen = [{t} for t in range(T)]
    for _ in range(num_layers):
        heard = [set(own) for own in seen]
        for query in range(T):
            for key in range(T):
                if bool(mask[query, key]):
                    heard[query] |= seen[key]
        seen = heard
    return seen


def true_leaks(mask: Tensor, num_layers: int) -> list[bool]:
    """Say for each place if its next token reached it, through num_layers blocks under `mask`."""
    T = mask.shape[0]
    return [t + 1 < T and t + 1 in known for t, known in enumerate(heard_of(mask, num_layers))]


def places_of(*rows: Sequence[int]) -> Tensor:
    """Make a mask from `rows`, the keys that each query may attend to."""
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    for query, keys in enumerate(rows):
        mask[query, list(keys)] = True
    return mask


def all_but_the_answer(T: int) -> Tensor:
    """Make the mask (T, T) that hides from each place its next token and nothing else."""
    return ~torch.diag(torch.ones(T - 1, dtype=torch.bool), 1)


CHAIN = places_of([0, 5], [1], [1, 2], [2, 3], [3, 4], [4, 5])  # 0 hears of 1 in block 5
NO_DIAGONAL = places_of([2], [0, 4], [0, 1], [1, 2], [3])  # nobody attends to itself
HANDED_ON = places_of([1], [2], [3], [3])  # each attends to the next alone, the last to itself


def check_places(student, mask: Tensor, num_layers: int, name: str, look: str) -> None:
    """Compare student.leaking_places(mask, num_layers) with the search; name, look are printed."""
    saw = function_of(student, "leaking_places")(mask.clone(), num_layers)
    wanted, what = true_leaks(mask, num_layers), f"leaking places of {name}, {num_layers} blocks"
    form = f"a boolean tensor of shape ({len(mask)},), one truth value for each place"
    is_right_form = isinstance(saw, Tensor) and saw.dtype == torch.bool and saw.dim() == 1
    expect(is_right_form, f"{what}: {form_of(saw)}", form, "what leaking_places returns")
    expect_equal(saw.tolist(), wanted, what, look)


@depth.property("one block: masks that leak at once, and masks that do not", points=2)
def _(student, numbers):
    look = "which pair of places makes a leak, and the last place, which has no next token"
    check_places(student, causal_mask(6), 1, "the causal mask", look)
    check_places(student, torch.ones(5, 5, dtype=torch.bool), 1, "the full mask", look)
    chunks = places_of([0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3])
    check_places(student, chunks, 1, "a chunk mask", look)
    # Nobody sees its next token; in block 2 places 3 and 4 hear of it, in block 3 places 0, 1, 2.
    far = places_of([0, 3], [0, 1], [1, 2, 4], [2, 3], [4, 6], [5], [5, 6])
    check_places(student, far, 1, "a mask that allows far places, never the next", look)


@depth.property("several blocks: what a place hears from those that it sees", points=3)
def _(student, numbers):
    look = "what the places that t attends to have heard in the blocks before"
    check_places(student, all_but_the_answer(6), 1, "all but the next token", look)
    check_places(student, all_but_the_answer(6), 2, "all but the next token", look)
    for num_layers in (2, 3, 4, 5):
        check_places(student, CHAIN, num_layers, "a chain of six places", look)


@depth.property("masks in which places do not attend to themselves", points=2)
def _(student, numbers):
    look = "the sum around attention: does a place forget itself?"
    for num_layers in (1, 2, 3, 4):
        check_places(student, NO_DIAGONAL, num_layers, "a mask with an empty diagonal", look)
    look = "the sum around attention, in each block: what does a place keep of what it has heard?"
    for num_layers in (1, 2, 3, 4):
        check_places(student, HANDED_ON, num_layers, "a mask that shows the next place", look)


@depth.property("as a real model of that depth does", points=1)
def _(student, numbers):
    masks = {"a chain of six places": CHAIN, "all but the next token": all_but_the_answer(6)}
    for (name, mask), num_layers in zip(masks.items(), (5, 2)):
        wanted = leaks_of_a_model(mask, num_layers)
        saw = function_of(student, "leaking_places")(mask.clone(), num_layers)
        what, look = f"places of {name} whose logits move", f"{num_layers} blocks of a real decoder"
        expect_equal(saw, wanted, what, look)


def leaks_of_a_model(mask: Tensor, num_layers: int) -> list[bool]:
    """Change each next token in a decoder of num_layers blocks under `mask`, and see who notices.

    Seeds 31 to 33: a leak through five blocks is small, but never zero.
    """
    T, found = len(mask), [False] * len(mask)
    sizes = {"d_model": 16, "num_layers": num_layers, "num_heads": 4, "positions": "learned"}
    for seed in (31, 32, 33):
        model = build_model(ModelConfig(vocab_size=9, seq_len=T, **sizes)).double()
        initialise(model, std=0.5, seed=seed)
        ids = torch.randint(8, (1, T))
        with torch.no_grad():
            before = model(ids, mask=mask, causal=False)
            for t in range(T - 1):
                changed = ids.clone()
                changed[0, t + 1] = 8
                after = model(changed, mask=mask, causal=False)
                found[t] = found[t] or bool((after - before)[0, t].abs().max() > 1e-12)
    return found


@depth.property("the smallest depth at which a mask leaks, and None if there is none", points=2)
def _(student, numbers):
    one_hole = places_of([], [], [3], [], [])  # query 2 sees key 3
    cases = {
        "the causal mask": (causal_mask(6), None),
        "the full mask": (torch.ones(4, 4, dtype=torch.bool), 1),
        "a causal mask with one hole": (causal_mask(5) | one_hole, 1),
        "all but the next token": (all_but_the_answer(6), 2),
        "a chain of six places": (CHAIN, 5),
        "a mask with an empty diagonal": (NO_DIAGONAL, 2),
        "one place": (torch.ones(1, 1, dtype=torch.bool), None),
    }
    for name, (mask, wanted) in cases.items():
        saw = function_of(student, "first_leaking_depth")(mask.clone())
        what, look = f"the smallest depth of {name}", "where you stop, and what you return then"
        if wanted is None and saw is not None:
            raise CheckFailed(f"{what}: {form_of(saw)}", "None", look)
        expect_equal(saw, wanted, what, look)
