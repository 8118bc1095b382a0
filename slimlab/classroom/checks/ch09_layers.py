"""Grader of exercise 9.5 of chapter 09: where to cut a model by layers.

The oracle tries all cuts, in fractions without rounding. Where there are too many, the bound comes
from filling device after device: a fullness that this can keep to is reached by some cut.

Pipelines weigh seconds besides bytes, as several devices work at a time there (chapter 10).
"""

import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations_with_replacement

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_equal

SMALL = (
    ([5, 2, 2, 2, 2, 5], [10, 10, 10]),
    ([9, 1, 1, 1, 1, 1, 1], [10, 10]),
    ([1, 1, 1, 1, 1, 1, 9], [10, 10]),
    ([4, 4, 4, 4], [8, 8, 8, 8]),
    ([7], [4, 8]),
    ([3, 3], [5, 4, 5]),
    ([6, 3, 5, 2, 8, 1, 4], [9, 9, 9]),
    ([2, 9, 2, 2, 9, 2, 2], [7, 11, 12]),
)
UNEQUAL = (
    ([4, 4, 4, 4, 4, 4], [8, 16]),
    ([4, 4, 4, 4, 4, 4], [16, 8]),
    ([10, 2, 2, 2, 2, 2, 6], [24, 8, 8]),
    ([5, 1, 1, 1, 1, 8, 1], [4, 40, 6]),
    ([5, 5, 5, 0, 0, 5], [100, 1, 1]),
    ([3, 8, 3, 3, 8, 3], [20, 5, 20]),
)


def fullest(layer_bytes: Sequence[int], device_bytes: Sequence[int], cut) -> Fraction:
    """Return how full the fullest device is under a cut.

    layer_bytes, device_bytes  of the layers and the devices
    cut                        how many layers each device gets
    """
    ends = [sum(cut[: k + 1]) for k in range(len(cut))]
    starts = [0, *ends[:-1]]
    held = [sum(layer_bytes[start:end]) for start, end in zip(starts, ends)]
    return max(Fraction(one, room) for one, room in zip(held, device_bytes))


def least_full(layer_bytes: Sequence[int], device_bytes: Sequence[int]) -> Fraction:
    """Try all cuts; return how full the fullest device is under the best.

    layer_bytes, device_bytes  of the layers and the devices
    """
    num, found = len(layer_bytes), []
    for ends in combinations_with_replacement(range(num + 1), len(device_bytes) - 1):
        edges = [0, *ends, num]
        cut = [b - a for a, b in zip(edges, edges[1:])]
        found.append(fullest(layer_bytes, device_bytes, cut))
    return min(found)


def reachable(layer_bytes: Sequence[int], device_bytes: Sequence[int], limit: Fraction) -> bool:
    """Say whether some cut keeps every device within `limit` of its bytes.

    layer_bytes, device_bytes  of the layers and the devices
    """
    at = 0
    for room in device_bytes:
        held = 0
        while at < len(layer_bytes) and held + layer_bytes[at] <= limit * room:
            held += layer_bytes[at]
            at += 1
    return at == len(layer_bytes)


def draw_layers(rng) -> dict:
    """Draw layers and devices for 9.5; rng is a random.Random."""
    blocks = [rng.choice([2, 3, 4]) for _ in range(rng.choice([7, 8, 9]))]
    ends = [rng.choice([5, 6, 7]), rng.choice([5, 6, 7])]
    devices = rng.choice([[16, 24, 16], [24, 16, 16], [16, 16, 24], [12, 24, 16]])
    return {"layer_gb": [ends[0], *blocks, ends[1]], "device_gb": devices}


layers = Exercise(
    "9.5",
    "Where to cut a model by layers",
    requires=("my_cut", "best_cut", "fewest_devices"),
    stars=2,
    instance=draw_layers,
    hints=(
        "As many layers for each, or the same bytes for each, is a start, not the answer: a cut "
        "falls between two layers. On which side?",
        "Suppose you knew how full the fullest may be. How do you find out, in one walk along the "
        "layers, whether it can be kept?",
        "Or: let best(i, k) be the least fullest if the first k devices hold the first i layers. "
        "What is it by way of best(j, k - 1), for all j up to i?",
        "If you search for the fullness by halving, end at one that a cut really has: bytes of a "
        "run of layers, divided by a device's.",
        "fewest_devices: is it ever better to leave room for a layer that would fit?",
    ),
)


def cut_of(found, layer_bytes: Sequence[int], device_bytes: Sequence[int], what: str) -> list[int]:
    """Return a student's cut as whole numbers; fail unless it deals out every layer once.

    found, what                the cut, and what it is, for the message
    layer_bytes, device_bytes  of the layers and the devices
    """
    look = "its last line: how many layers each device gets"
    fits = isinstance(found, list | tuple) and len(found) == len(device_bytes)
    expect(fits, f"{what}: {form_of(found)}", f"a list of {len(device_bytes)} numbers", look)
    cut = [whole_number(one, what, look) for one in found]
    dealt = min(cut) >= 0 and sum(cut) == len(layer_bytes)
    asked = f"numbers from 0 on that add up to {len(layer_bytes)} layers"
    expect(dealt, f"{what}: {cut}", asked, "which layers are given to nobody, or twice")
    return cut


def check_cut(function, layer_bytes: list[int], device_bytes: list[int], look: str) -> None:
    """Compare a cut's fullest device with that of all cuts.

    function                   best_cut
    layer_bytes, device_bytes  of the layers and the devices
    look                       where to look, for the message
    """
    what = f"best_cut({layer_bytes}, {device_bytes})"
    cut = cut_of(function(list(layer_bytes), list(device_bytes)), layer_bytes, device_bytes, what)
    own, least = fullest(layer_bytes, device_bytes, cut), least_full(layer_bytes, device_bytes)
    saw = f"{what} gives {cut}, whose fullest device is {float(own):.4g} full"
    expect(own == least, saw, f"{float(least):.4g}", look)


@layers.property("best_cut: devices that are alike", points=2)
def _(student, numbers):
    function, rng = function_of(student, "best_cut"), random.Random(1)
    look = "the layer beside each cut: whose fullness grows and whose shrinks if it changes sides"
    for layer_bytes, device_bytes in SMALL:
        check_cut(function, layer_bytes, [device_bytes[0]] * len(device_bytes), look)
    for _ in range(20):
        layer_bytes = [rng.randint(1, 12) for _ in range(rng.randint(3, 10))]
        check_cut(function, layer_bytes, [30] * rng.randint(1, 4), look)


@layers.property("best_cut: devices of different sizes, and layers that need nothing", points=2)
def _(student, numbers):
    function, rng = function_of(student, "best_cut"), random.Random(2)
    look = "how full a device is: bytes of its layers divided by its own bytes"
    for layer_bytes, device_bytes in UNEQUAL + SMALL:
        check_cut(function, layer_bytes, device_bytes, look)
    for _ in range(20):
        layer_bytes = [rng.randint(0, 12) for _ in range(rng.randint(3, 9))]
        device_bytes = [rng.choice([8, 11, 24, 40]) for _ in range(rng.randint(2, 4))]
        check_cut(function, layer_bytes, device_bytes, look)


@layers.property("best_cut: hundreds of layers", points=1)
def _(student, numbers):
    function, rng = function_of(student, "best_cut"), random.Random(3)
    for num_layers, num_devices in ((40, 8), (150, 12)):
        layer_bytes = [rng.randint(1, 1000) for _ in range(num_layers)]
        device_bytes = [rng.choice([8000, 16000, 24000]) for _ in range(num_devices)]
        what = f"best_cut of {num_layers} layers on {num_devices} devices"
        found = function(list(layer_bytes), list(device_bytes))
        cut = cut_of(found, layer_bytes, device_bytes, what)
        own = fullest(layer_bytes, device_bytes, cut)
        # Two fullnesses that differ, differ by more than this.
        better = own - Fraction(1, 2 * max(device_bytes) ** 2)
        saw = f"{what}: the fullest device is {float(own):.6g} full, which can be bettered"
        look = "choices that were made once and never looked at again"
        expect(not reachable(layer_bytes, device_bytes, better), saw, "the least there is", look)


@layers.property("fewest_devices", points=2)
def _(student, numbers):
    function, rng = function_of(student, "fewest_devices"), random.Random(4)
    cases = [([5, 5, 5], 9)]
    cases += [(one, room) for one, rooms in SMALL for room in (rooms[0], max(one), max(one) - 1)]
    for _ in range(30):
        layer_bytes = [rng.randint(1, 9) for _ in range(rng.randint(2, 9))]
        cases.append((layer_bytes, rng.randint(7, 20)))
    for layer_bytes, room in cases:
        wanted = 0
        if max(layer_bytes) <= room:
            wanted = next(
                num for num in range(1, 20) if reachable(layer_bytes, [room] * num, Fraction(1))
            )
        what = f"fewest_devices({layer_bytes}, {room})"
        look = "layers keep their order, a device that is exactly full runs, and a layer has to fit"
        saw = whole_number(function(list(layer_bytes), room), what, "its last line")
        expect_equal(saw, wanted, what, look)


@layers.property("your cut by hand was right", points=1)
def _(student, numbers):
    layer_gb, device_gb = numbers["layer_gb"], numbers["device_gb"]
    found = function_of(student, "my_cut")()
    cut = cut_of(found, layer_gb, device_gb, "my_cut()")
    own, least = fullest(layer_gb, device_gb, cut), least_full(layer_gb, device_gb)
    saw = f"my_cut(): {cut}, whose fullest device is {float(own):.4g} full"
    look = "your pencil calculation for numbers('9.5'): move each cut by one layer, either way"
    expect(own == least, saw, f"{float(least):.4g}", look)
