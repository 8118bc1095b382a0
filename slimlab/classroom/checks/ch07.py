"""Graders of the exercises of chapter 07, communication.

7.1, which all_reduce for which length; 7.2, a running sum, stands in ch07_scan.py, 7.3, an
all_to_all by way of others, in ch07_exchange.py, 7.4, a farm that hangs, in ch07_farm.py and 7.5, a
mean that is none, in ch07_mean.py. The oracle of 7.1 knows no formula: it runs both algorithms on a
network whose clock is computed, and lays lines through what the clock shows.

Production libraries take such numbers from measurements on the machine that they run on.
"""

from functools import cache

import torch

from slimlab.classroom.checks.ch02_forms import function_of
from slimlab.classroom.checks.ch07_exchange import exchange
from slimlab.classroom.checks.ch07_farm import farm
from slimlab.classroom.checks.ch07_mean import tree
from slimlab.classroom.checks.ch07_scan import scan
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect_close, expect_equal
from slimlab.comm.collectives import binomial_broadcast, binomial_reduce, ring_all_reduce
from slimlab.comm.launch import run_ranks
from slimlab.comm.links import Network
from slimlab.comm.network import dialled

__all__ = ["exchange", "farm", "lengths", "scan", "tree"]

FLOAT64 = {"atol": 1e-9, "rtol": 0.0, "reason": "float64 rounding"}
NEAR = {"rtol": 1e-9, "reason": "float64 rounding"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
LINKS = ((20e-6, 1e-9), (1e-6, 4e-10), (3e-3, 8e-8))


def draw_link(rng) -> dict:
    """Draw ranks and a link for 7.1; rng is a random.Random."""
    return {
        "world_size": rng.choice([6, 9, 10, 12, 16]),
        "latency_us": rng.choice([5, 15, 25, 40]),
        "gbytes_per_s": rng.choice([1, 2, 5, 10]),
    }


def by_tree(comm, tensor):
    """Reduce `tensor` to rank 0 and broadcast it, over trees; `comm` as everywhere."""
    total = binomial_reduce(comm, tensor, 0)
    return binomial_broadcast(comm, tensor if total is None else total, 0)


@cache
def line_of(program, world_size: int, alpha_s: float, beta_s: float) -> tuple[float, float]:
    """Run an all_reduce of w and of 2 w bytes; return the seconds of 0 bytes, and per byte.

    program          a function of a communicator and a tensor
    world_size       w
    alpha_s, beta_s  seconds per message and per byte
    """
    network = Network(0.0, 1 / beta_s, overhead_s=alpha_s)
    clocks = []
    for n_bytes in (world_size, 2 * world_size):
        tensor = torch.zeros(n_bytes, dtype=torch.uint8)
        timed = run_ranks(dialled(lambda comm: program(comm, tensor), network), world_size)  # noqa: B023
        clocks.append(max(one.clock_s for one in timed))
    return 2 * clocks[0] - clocks[1], (clocks[1] - clocks[0]) / world_size


def equal_at(world_size: int, alpha_s: float, beta_s: float) -> float:
    """Return the bytes at which the lines of tree and ring meet.

    world_size, alpha_s, beta_s  as in line_of
    """
    link = world_size, alpha_s, beta_s
    (tree_s, tree_slope), (ring_s, ring_slope) = (
        line_of(by_tree, *link),
        line_of(ring_all_reduce, *link),
    )
    return max(0.0, (ring_s - tree_s) / (tree_slope - ring_slope))


lengths = Exercise(
    "7.1",
    "Which all_reduce for which length?",
    requires=("my_prediction", "tree_s", "equal_bytes", "smallest_bucket"),
    stars=1,
    instance=draw_link,
    hints=(
        "How many steps has a tree of 8 ranks, one of 9, one of 16? And the tensor goes up and "
        "down again.",
        "Write both times as a + b n. At which n are they equal?",
        "Four ranks or more: the ring has more steps. Two or three: what does the formula give?",
        "smallest_bucket: which part of the ring's time is latency, whatever the length? It may "
        "be 1 - share of the whole.",
        "1 GB/s is 1e9 bytes per second: beta is 1e-9 seconds per byte.",
    ),
)


@lengths.property("the time of a tree there and back", points=2)
def _(student, numbers):
    function = function_of(student, "tree_s")
    for world_size in (8, 4, 2, 5, 9, 12):
        for alpha_s, beta_s in LINKS:
            start_s, slope = line_of(by_tree, world_size, alpha_s, beta_s)
            look = "the number of steps, up and down, and what each of them carries"
            if world_size & (world_size - 1):
                look = "the number of steps where the ranks are no power of two"
            for n_bytes in (0, 100_000):
                what = f"tree_s({world_size}, {n_bytes}, {alpha_s:g}, {beta_s:g})"
                saw = function(world_size, n_bytes, alpha_s, beta_s)
                expect_close(saw, start_s + slope * n_bytes, what, look, **NEAR)


@lengths.property("the length at which tree and ring take equally long", points=2)
def _(student, numbers):
    function = function_of(student, "equal_bytes")
    for world_size in (8, 4, 12, 5):
        for alpha_s, beta_s in LINKS:
            what = f"equal_bytes({world_size}, {alpha_s:g}, {beta_s:g})"
            wanted = equal_at(world_size, alpha_s, beta_s)
            look = "both times as a + b n: steps of the ring, and the part that each one carries"
            saw = function(world_size, alpha_s, beta_s)
            expect_close(saw, wanted, what, look, rtol=1e-6, reason="float64 rounding")


@lengths.property("two and three ranks, where the ring is never slower", points=1)
def _(student, numbers):
    function = function_of(student, "equal_bytes")
    for world_size in (2, 3):
        saw = function(world_size, 20e-6, 1e-9)
        look = "how many steps tree and ring have on so few ranks"
        expect_close(saw, 0.0, f"equal_bytes({world_size}, 2e-05, 1e-09)", look, **FLOAT64)


@lengths.property("the bucket that is worth its messages", points=2)
def _(student, numbers):
    function = function_of(student, "smallest_bucket")
    for world_size, share in ((8, 0.9), (2, 0.5), (5, 0.75), (12, 0.99)):
        for alpha_s, beta_s in LINKS:
            start_s, slope = line_of(ring_all_reduce, world_size, alpha_s, beta_s)
            what = f"smallest_bucket({world_size}, {share}, {alpha_s:g}, {beta_s:g})"
            look = "all messages of the ring: what they take together, and what their bytes take"
            saw = function(world_size, share, alpha_s, beta_s)
            wanted = share * start_s / ((1 - share) * slope)
            expect_close(saw, wanted, what, look, rtol=1e-6, reason="float64 rounding")


@lengths.property("your prediction by hand was right", points=1)
def _(student, numbers):
    alpha_s, beta_s = numbers["latency_us"] * 1e-6, 1e-9 / numbers["gbytes_per_s"]
    wanted = equal_at(numbers["world_size"], alpha_s, beta_s)
    saw = function_of(student, "my_prediction")()
    look = "your pencil calculation for numbers('7.1'); correct it once you know why"
    expect_close(saw, wanted, "my_prediction() in bytes", look, **BY_HAND)
    expect_equal(saw > 0, True, "my_prediction() above 0", look)
