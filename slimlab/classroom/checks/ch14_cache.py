"""Grader of exercise 14.3 of chapter 14: keys and values of a writing model in four bits.

The oracle is attention in float64, with keys and values as they came, and with keys rounded per
channel of a group and values per token, from the least to the greatest number: its error is what
four bits cost, and an answer may cost twice as much. What is held is counted in the whole process.

Production caches (vLLM, TensorRT-LLM) keep 8 bits of floats or integers, and a scale per head.
"""

import gc
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close

ROUNDING = {"atol": 1e-4, "rtol": 1e-4, "reason": "float32 rounding"}
NUM_HEADS, D_HEAD, GROUP = 2, 16, 8
SLACK_BYTES = 256
ROOM = 2.0
NUM_QUERIES = 6
FOUR_BITS = "more is not the fault of four bits"

cache = Exercise(
    "14.3",
    "A cache of four bits",
    requires=("SmallCache",),
    stars=2,
    hints=(
        "A channel of the keys is loud in every token. If a token's key shared one scale, what "
        "would become of its quiet channels?",
        "A scale of a channel needs many tokens at once. So keys wait, in float32, until a group "
        "of them is there. A value could be quantized when it comes.",
        "quantize works along rows: the last dimension shares a scale. What must be last for "
        "keys, (H, g, E) or (H, E, g)?",
        "A channel from 10 to 12 and a symmetric map: which codes are ever used?",
        "key.clone(): the caller's buffer will hold the next token. And a slice of a long tensor "
        "keeps all of it alive.",
    ),
)


@dataclass(frozen=True)
class Tokens:
    """Keys and values (T, H, E), and some queries (n, H, E), all float32."""

    keys: Tensor
    values: Tensor
    queries: Tensor

    def exact(self, count: int, keys: Tensor | None = None, values: Tensor | None = None) -> Tensor:
        """Attend to the first `count` tokens in float64, with keys and values as given or own."""
        keys, values = (
            (self.keys if keys is None else keys),
            (self.values if values is None else values),
        )
        scores = torch.einsum("nhe,the->nht", self.queries.double(), keys[:count].double())
        weights = torch.softmax(scores / D_HEAD**0.5, dim=-1)
        return torch.einsum("nht,the->nhe", weights, values[:count].double())

    def price(self, count: int, group: int) -> float:
        """Measure the error that four bits cost, keys per channel of a group, values per token.

        count  attend to so many tokens
        group  tokens in a group; those after the last full one stay as they are
        """
        full = count - count % group
        keys, values = self.keys.double().clone(), self.values.double().clone()
        for start in range(0, full, group):
            keys[start : start + group] = in_four_bits(keys[start : start + group], 0)
        values[:full] = in_four_bits(values[:full], -1)
        return part_of(self.exact(count, keys, values), self.exact(count))


def in_four_bits(numbers: Tensor, dim: int) -> Tensor:
    """Round to 16 levels from the least to the greatest number along dim, numbers not empty."""
    if len(numbers) == 0:
        return numbers
    low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    step = (high - low).clamp(min=1e-12) / 15
    return low + step * ((numbers - low) / step).round()


def part_of(saw: Tensor, exact: Tensor) -> float:
    """Measure |saw - exact| / |exact|."""
    return float((saw - exact).norm() / exact.norm())


def drawn_tokens(count: int, seed: int, kind: str) -> Tokens:
    """Draw tokens; other ones for each seed.

    count  how many
    kind   "even"; "keys" with loud channels, away from 0, that the queries hardly ask for; or
           "values" with loud tokens, of which the queries ask for none
    """
    size = (NUM_HEADS, D_HEAD)
    keys, values = drawn(seed, count, *size), drawn(seed + 1, count, *size)
    queries = 1.5 * drawn(seed + 2, NUM_QUERIES, *size)
    if kind == "keys":
        loud = torch.tensor([1.0, 1.0, 8.0, 1.0] * (D_HEAD // 4)).double()
        keys = loud * (keys + 3 * drawn(seed + 3, *size).sign())
        queries = queries / loud
    if kind == "values":
        values[1::2] *= 30.0
        keys = keys * (D_HEAD**0.5 / keys.norm(dim=-1, keepdim=True))
        queries = 8 * keys[2 : 2 + 8 * NUM_QUERIES : 8]  # each finds one quiet token
    return Tokens(keys.float(), values.float(), queries.float())


def budget_bytes(count: int, group: int) -> int:
    """Add up the table of the exercise, for `count` tokens in groups of `group`."""
    full, rest = divmod(count, group)
    numbers = NUM_HEADS * D_HEAD
    per_group = group * numbers + 4 * numbers + 4 * group * NUM_HEADS
    return full * per_group + rest * 8 * numbers + SLACK_BYTES


def young_bytes() -> int:
    """Count the memory of all tensors made since gc.freeze() and still alive, each storage once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def other_bytes(cache: object) -> int:
    """Count the bytes that a student's `cache` keeps outside tensors: lists, bytes, arrays."""
    total, seen, left = 0, {}, [vars(cache) if hasattr(cache, "__dict__") else cache]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = one
        if isinstance(one, bytes | bytearray | str):
            total += len(one)
        elif isinstance(one, float) or type(one).__module__ == "numpy":
            total += getattr(one, "nbytes", 8)
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one
        elif type(one).__module__ == "__main__" and hasattr(one, "__dict__"):
            left += vars(one).values()
    return total


class Filled:
    """A student's cache with tokens in it, and the bytes that it holds.

    student  what the student's cells define
    tokens   what is appended, from one buffer that is written over
    count    how many of them
    group    tokens in a group
    what     what runs, for the message
    """

    def __init__(self, student, tokens: Tokens, count: int, group: int, what: str):
        self.tokens, self.count, self.what = tokens, count, what
        key, value = torch.empty(NUM_HEADS, D_HEAD), torch.empty(NUM_HEADS, D_HEAD)
        gc.freeze()  # what is alive now is not looked at again: that is not the cache, and much
        self.cache = function_of(student, "SmallCache")(NUM_HEADS, D_HEAD, group)
        for one in range(count):
            key.copy_(tokens.keys[one])
            value.copy_(tokens.values[one])
            self.cache.append(key, value)
            look = "what works in place: mul_, /=, an index on the left"
            same = torch.equal(key, tokens.keys[one]) and torch.equal(value, tokens.values[one])
            expect(same, f"{what}: append changed key or value", "them as they were", look)
        key.fill_(100.0)
        value.fill_(100.0)
        self.held_bytes = young_bytes() + other_bytes(self.cache)
        self.most_bytes = budget_bytes(count, group)

    def attend(self) -> Tensor:
        """Return what the student's cache gives for all queries, (n, H, E) float64."""
        found = []
        for query in self.tokens.queries:
            one = self.cache.attend(query.clone())
            fits = isinstance(one, Tensor) and one.shape == (NUM_HEADS, D_HEAD)
            look = "the return line of attend"
            asked = f"a tensor of shape {(NUM_HEADS, D_HEAD)}"
            expect(fits, f"{self.what}: attend returned {form_of(one)}", asked, look)
            fits = bool(torch.isfinite(one).all())
            expect(fits, f"{self.what}: attend gave nan or infinity", "finite numbers", "a scale")
            found.append(one.detach().double())
        return torch.stack(found)

    def check_error(self, most: float, why: str, look: str) -> None:
        """Fail if the error is above `most`; `why` and `look` for the message."""
        error = part_of(self.attend(), self.tokens.exact(self.count))
        saw = f"{self.what}: |error| / |output| = {error:.2g}"
        expect(error <= most, saw, f"at most {most:.2g}, {why}", look)

    def check_bytes(self) -> None:
        """Fail if the cache holds more than the table allows, or nothing."""
        saw = f"{self.what}: {self.held_bytes} bytes held"
        look = "what stays alive besides codes and scales: floats, views of longer tensors, copies"
        expect(self.held_bytes <= self.most_bytes, saw, f"at most {self.most_bytes}", look)
        least = self.count * NUM_HEADS * D_HEAD
        look = "the cache: everything that lasts belongs into it"
        expect(self.held_bytes >= least // 2, saw, f"at least {least // 2}", look)


@cache.property("attention over all tokens so far", points=3)
def _(student, numbers):
    tokens = drawn_tokens(30, 1, "even")
    for group, count in ((8, 1), (8, 5), (8, 8), (8, 30), (4, 17), (2, 7)):
        what = f"{count} tokens, groups of {group}"
        look = "which tokens and heads are attended to, the root of E, and buffers written over"
        filled = Filled(student, tokens, count, group, what)
        filled.check_error(0.2, FOUR_BITS, look)


@cache.property("two caches in use at a time, and a query after every token", points=1)
def _(student, numbers):
    tokens, others = drawn_tokens(12, 5, "even"), drawn_tokens(12, 8, "even")
    first = Filled(student, tokens, 12, 4, "12 tokens, groups of 4")
    first.check_error(0.2, FOUR_BITS, "the output of one cache, before there are two")
    before = first.attend()
    Filled(student, others, 9, 4, "9 tokens in another cache").attend()
    look = "what the class holds and not the object"
    what = "12 tokens, once more after another cache was filled: output"
    expect_close(first.attend(), before, what, look, **ROUNDING)
    made = function_of(student, "SmallCache")(NUM_HEADS, D_HEAD, 4)
    for one in range(12):
        made.append(tokens.keys[one].clone(), tokens.values[one].clone())
        last = made.attend(tokens.queries[0].clone())
    what = "12 tokens with a query after each: output"
    look = "what attend leaves behind in the cache"
    expect_close(last, before[0], what, look, **ROUNDING)


@cache.property("keys with loud channels, in the memory of the table", points=3)
def _(student, numbers):
    for count, seed in ((64, 40), (61, 40)):
        tokens = drawn_tokens(count, seed, "keys")
        filled = Filled(student, tokens, count, GROUP, f"{count} tokens, loud channels in the keys")
        filled.check_bytes()
        most = ROOM * tokens.price(count, GROUP)
        look = "which keys share a scale, and whether its 16 levels lie where the numbers are"
        filled.check_error(most, "twice what four bits cost", look)


@cache.property("loud values, in the memory of the table", points=2)
def _(student, numbers):
    for count, seed in ((64, 40), (61, 50)):
        tokens = drawn_tokens(count, seed, "values")
        filled = Filled(student, tokens, count, GROUP, f"{count} tokens, some values loud")
        filled.check_bytes()
        most = ROOM * tokens.price(count, GROUP)
        look = "which numbers of the values share a scale"
        filled.check_error(most, "twice what four bits cost", look)


@cache.property("bytes held after every token", points=3)
def _(student, numbers):
    tokens = drawn_tokens(100, 60, "even")
    for group, count in ((8, 7), (8, 8), (8, 9), (8, 100), (16, 95), (4, 50)):
        filled = Filled(student, tokens, count, group, f"{count} tokens, groups of {group}")
        filled.check_bytes()
        look = "the output, before memory is saved"
        filled.check_error(0.2, FOUR_BITS, look)
