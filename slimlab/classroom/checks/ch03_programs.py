"""Grader of exercise 3.4 of chapter 03: several prompts continued at once, two of them wrongly.

The oracle continues each prompt alone, without a cache and without filler.

Servers avoid filler: they keep the caches of all texts in pages and pack what is new into one row.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_equal
from slimlab.config import ModelConfig
from slimlab.model.build import build_model
from slimlab.model.cache import KVCache
from slimlab.model.initialise import initialise

together = Exercise(
    "3.4",
    "Several prompts at once",
    requires=("wrong_prompts", "mended"),
    stars=2,
    hints=(
        "wrong_prompts: what should the model write? Ask it for each prompt alone, without filler.",
        "Why is the longest prompt always right? What is different for the others?",
        "Print the mask that the second call of the model uses. And which place does it give the "
        "first true token of a short prompt?",
        "The model takes positions (B, T) and a mask (B, 1, T, S). S grows by one with each token.",
    ),
)

PROMPTS = [[5, 2, 9, 9, 1, 7, 3], [8, 4], [6], [1, 1, 0, 10]]
NUM_NEW = 6


def small_model(seed: int, positions: str) -> nn.Module:
    """Make a float64 decoder with positions of the kind named, drawn with `seed`."""
    sizes = {"d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"vocab_size": 11, "seq_len": 24, "tie_embeddings": False}  # tied ones repeat words
    model = build_model(ModelConfig(positions=positions, **sizes))
    return initialise(model.double(), std=0.6, seed=seed).eval()


def written_alone(model: nn.Module, prompt: list[int], num_new: int) -> list[int]:
    """Continue `prompt` by num_new tokens of `model`, the whole text read again for each."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(num_new):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def as_given(model: nn.Module, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """Continue the prompts as the exercise does; model and num_new as there, faults included."""
    T = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts])
    filler = torch.tensor([[t < T - len(prompt) for t in range(T)] for prompt in prompts])
    mask = ~filler[:, None, None, :] | torch.eye(T, dtype=torch.bool)
    cache, new = KVCache(model.config, len(prompts), T + num_new, dtype=torch.float64), []
    with torch.no_grad():
        logits = model(ids, mask=mask, cache=cache)
        for _ in range(num_new):
            new.append(logits[:, -1].argmax(dim=-1, keepdim=True))
            logits = model(new[-1], cache=cache)
    return torch.cat(new, dim=1).tolist()


def honest_program(model: nn.Module, prompts: list[list[int]], num_new: int) -> list[list[int]]:
    """Continue each of the prompts alone, by num_new tokens of `model`."""
    return [written_alone(model, prompt, num_new) for prompt in prompts]


def slipping_program(
    model: nn.Module, prompts: list[list[int]], num_new: int, place: int = -1
) -> list[list[int]]:
    """Continue prompts as honest_program(model, ..., num_new); one token, at `place`, is wrong."""
    written = honest_program(model, prompts, num_new)
    longest = max(range(len(prompts)), key=lambda k: len(prompts[k]))
    written[longest][place] = (written[longest][place] + 1) % model.config.vocab_size
    return written


def true_wrong(model: nn.Module, prompts: list[list[int]], num_new: int, write) -> list[int]:
    """List which prompts `write` continues, by num_new, otherwise than the model alone."""
    found = write(model, prompts, num_new)
    return [k for k, new in enumerate(found) if new != written_alone(model, prompts[k], num_new)]


def check_wrong(student, seed: int, positions: str, write, name: str, look: str) -> None:
    """Compare student.wrong_prompts for `write` with the oracle.

    seed, positions  of the model
    name, look       what messages call `write`, and the hint
    """
    model = small_model(seed, positions)
    prompts = copy.deepcopy(PROMPTS)
    saw = function_of(student, "wrong_prompts")(model, prompts, NUM_NEW, write)
    wanted = true_wrong(model, PROMPTS, NUM_NEW, write)
    what = f"the prompts that {name} continues wrongly, {positions} positions"
    is_list = isinstance(saw, list | tuple | set)
    expect(is_list, f"{what}: {form_of(saw)}", "a list of numbers", "what wrong_prompts returns")
    expect_equal(sorted(saw), wanted, what, look)


@together.property("wrong_prompts finds what the given program gets wrong", points=2)
def _(student, numbers):
    look = "what each prompt is compared with, how much of it, and from which number you count"
    for seed, positions in ((41, "rotary"), (42, "learned")):
        check_wrong(student, seed, positions, as_given, "the given program", look)


@together.property("wrong_prompts acquits an honest program and finds a single slip", points=2)
def _(student, numbers):
    look = "whether all new tokens of all prompts are compared"
    check_wrong(student, 43, "rotary", honest_program, "an honest program", look)
    first = partial(slipping_program, place=0)
    check_wrong(student, 43, "rotary", first, "a program with one wrong first token", look)
    check_wrong(
        student, 43, "rotary", slipping_program, "a program with one wrong last token", look
    )


def check_mended(student, model: nn.Module, prompts: list, num_new: int, look: str) -> None:
    """Compare student.mended(model, prompts, num_new) with each prompt alone; look is the hint."""
    before = copy.deepcopy(prompts)
    found = function_of(student, "mended")(model, prompts, num_new)
    found = found.tolist() if isinstance(found, Tensor) else found
    expect_equal(prompts, before, "the list of prompts afterwards", "the list must not change")
    is_list = isinstance(found, list | tuple) and len(found) == len(prompts)
    asked = f"a list of {len(prompts)} lists of {num_new} new tokens"
    expect(is_list, f"mended returned {form_of(found)}", asked, "its return line")
    for number, (prompt, new) in enumerate(zip(before, found)):
        what = f"what is written after prompt {number} = {prompt}"
        expect_equal(new, written_alone(model, prompt, num_new), what, look)


@together.property("mended, for rotary positions", points=2)
def _(student, numbers):
    look = "who may attend to the filler, in the first call and in the later ones"
    for seed in (44, 45):
        check_mended(student, small_model(seed, "rotary"), copy.deepcopy(PROMPTS), NUM_NEW, look)


@together.property("mended, for learned positions", points=2)
def _(student, numbers):
    look = "at which place each token stands: filler does not count, new tokens go on counting"
    for seed in (46, 47):
        check_mended(student, small_model(seed, "learned"), copy.deepcopy(PROMPTS), NUM_NEW, look)


@together.property("one prompt, prompts of one length, a single new token", points=1)
def _(student, numbers):
    look = "batches without filler, and the last turn of your loop"
    for prompts, num_new in (([[3, 1, 4]], 5), ([[3, 1], [4, 2]], 4), ([[7], [2, 5, 5]], 1)):
        check_mended(student, small_model(48, "learned"), prompts, num_new, look)


@together.property("all prompts in one batch, every token read once", points=1)
def _(student, numbers):
    model, calls = small_model(49, "rotary"), []
    model.embedding.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    function_of(student, "mended")(model, copy.deepcopy(PROMPTS), NUM_NEW)
    look = "one call of the model for all prompts, not one for each"
    rows = sorted({ids[0] for ids in calls})
    expect_equal(rows, [len(PROMPTS)], "sequences in a call of the model", look)
    read, longest = sum(ids[1] for ids in calls), max(map(len, PROMPTS))
    look = "the cache: later calls of the model get the new tokens alone"
    asked = f"at most {longest} + {NUM_NEW}"
    expect(read <= longest + NUM_NEW, f"{read} tokens read per prompt", asked, look)
