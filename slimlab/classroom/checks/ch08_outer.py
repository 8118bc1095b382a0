"""Grader of exercise 8.5 of chapter 08: the outer step of ranks that talk rarely.

The oracle of the step is one process with the weights of all ranks. That of the largest learning
rate runs the iteration from two starts, which gives its matrix, and finds by halving where a root
leaves the unit circle; it knows no formula.

Douillard et al. 2023 (arXiv:2311.08105), DiLoCo: 500 steps of AdamW alone, then one outer step with
lr = 0.7 and momentum = 0.9.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import drawn, expect_calls, ranks_text
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close

WORLDS = (2, 3, 4, 1, 5)
ROUNDING = {"atol": 1e-12, "rtol": 1e-12, "reason": "float64 rounding"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}


def draw_rounds(rng) -> dict:
    """Draw two rounds of two ranks with one weight; rng is a random.Random."""
    return {
        "start": rng.choice([10, 20, 30]),
        "moves": [[rng.randint(1, 4), rng.randint(5, 9)], [rng.randint(1, 4), rng.randint(5, 9)]],
        "num_tokens": rng.choice([[100, 300], [300, 100]]),
        "lr": rng.choice([0.5, 0.8]),
        "momentum": rng.choice([0.5, 0.8]),
    }


outer = Exercise(
    "8.5",
    "Talk rarely",
    requires=("predicted_starts", "outer_step", "largest_outer_lr"),
    stars=2,
    instance=draw_rounds,
    hints=(
        "A gradient points uphill, and an update goes against it. Which sign has the change that "
        "stands for it?",
        "A rank with n_i tokens counts n_i times. The sum of all n_i may travel with the changes.",
        "Nesterov: the velocity is renewed first, and then the step is not the velocity but what "
        "it would be one step later, with the same gradient: g + momentum * v.",
        "largest_outer_lr without momentum: write x after a round in terms of x before. When does "
        "it not shrink?",
        "With momentum, x and lr * v after a round are a 2 by 2 matrix times both before it. The "
        "first root to leave the unit circle does so at -1: determinant of (matrix + 1) is 0.",
    ),
)


def serial_rounds(rounds: list, start: Tensor, lr: float, momentum: float) -> list[Tensor]:
    """Make outer steps in one process; return the weights after each.

    rounds        of each, per rank: how far it moved, and its tokens
    start         the weights before the first
    lr, momentum  as in the exercise
    """
    velocity, found = torch.zeros_like(start), []
    for moves in rounds:
        total = sum(count for _, count in moves)
        gradient = sum(-move * count for move, count in moves) / total
        velocity = momentum * velocity + gradient
        start = start - lr * (gradient + momentum * velocity)
        found.append(start)
    return found


def drawn_rounds(world_size: int, n: int, num_rounds: int, counts) -> list:
    """Draw rounds: of each rank, how far it moves, (n,), and its tokens.

    world_size, n, num_rounds  how many ranks, weights and rounds
    counts                     tokens, dealt to the ranks in turn and round again
    """
    return [
        [
            (drawn(100 * number + rank, n), counts[(rank + number) % len(counts)])
            for rank in range(world_size)
        ]
        for number in range(num_rounds)
    ]


def check_steps(student, world_size: int, rounds: list, lr: float, momentum: float, look: str):
    """Run the student's outer steps and compare with one process; return ledgers and a text.

    world_size         number of ranks
    rounds             of drawn_rounds
    lr, momentum       as in the exercise
    look               where to look, for the message
    """
    function = function_of(student, "outer_step")
    first = drawn(7, len(rounds[0][0][0]))
    tokens = [count for _, count in rounds[0]]
    what = f"{ranks_text(world_size)}, tokens {tokens}, lr {lr:g}, momentum {momentum:g}"

    def program(comm):
        start, state, found = first.clone(), {}, []
        for moves in rounds:
            move, num_tokens = moves[comm.rank]
            weights = start + move
            given = start.clone(), weights.clone()
            new = function(comm, *given, num_tokens, state, lr, momentum)
            where = f"{what}: rank {comm.rank}"
            asked = f"a tensor of shape {tuple(start.shape)}"
            fits = isinstance(new, Tensor) and new.shape == start.shape
            expect(fits, f"{where} returned {form_of(new)}", asked, "the return line")
            for name, one, before in zip(("start", "weights"), given, (start, weights)):
                if not torch.equal(one, before):
                    look = "what works in place: -=, mul_, out="
                    raise CheckFailed(f"{where} changed its {name}", "it as it was", look)
            start = new.detach().clone()
            found.append(start)
        return found

    results = run(program, world_size, what)
    for number, wanted in enumerate(serial_rounds(rounds, first, lr, momentum)):
        for rank, found in enumerate(results):
            label = f"{what}: rank {rank} after round {number + 1}"
            expect_close(found[number], wanted, label, look, **ROUNDING)
            label = f"{what}: rank {rank} beside rank 0 after round {number + 1}"
            same = {"rtol": 0.0, "reason": "the same bits on all ranks"}
            expect_close(found[number], results[0][number], label, "what is sent", **same)
    return results.ledgers, what


@outer.property("one round without momentum, equally many tokens", points=1)
def _(student, numbers):
    for world_size in WORLDS:
        for lr in (1.0, 0.7):
            rounds = drawn_rounds(world_size, 5, 1, (8,))
            look = "the sign of the change; lr = 1 must give the mean of all weights"
            check_steps(student, world_size, rounds, lr, 0.0, look)


@outer.property("ranks with different numbers of tokens, also none", points=2)
def _(student, numbers):
    for world_size in WORLDS[:3]:
        for counts in ((3, 1, 4), (0, 6, 2)):
            rounds = drawn_rounds(world_size, 4, 2, counts)
            look = "with which weight each rank's change enters"
            check_steps(student, world_size, rounds, 0.5, 0.0, look)


@outer.property("momentum, over several rounds", points=2)
def _(student, numbers):
    for world_size in WORLDS:
        for lr, momentum in ((0.7, 0.9), (1.0, 0.5)):
            rounds = drawn_rounds(world_size, 5, 4, (5, 2, 9))
            look = "both formulas, in their order, and what is kept from round to round"
            check_steps(student, world_size, rounds, lr, momentum, look)


@outer.property("one all_reduce a round, of n + 1 numbers", points=2)
def _(student, numbers):
    for world_size in (2, 3, 4):
        rounds = drawn_rounds(world_size, 6, 3, (5, 2, 9))
        look = "the steps, before calls are saved"
        ledgers, what = check_steps(student, world_size, rounds, 0.7, 0.9, look)
        for ledger in ledgers:
            look = "what can travel together, and what every rank knows by itself"
            expect_calls(ledger, [("all_reduce", 7 * 8)] * 3, f"{what}, three rounds", look)


def largest_stable(rho: float, momentum: float) -> float:
    """Find the largest lr with which rounds come to rest, by halving.

    rho, momentum  as in the exercise
    """
    low, high = 0.0, 50.0 / (1 - rho)
    for _ in range(60):
        lr = (low + high) / 2
        columns = []
        for x, velocity in ((1.0, 0.0), (0.0, 1.0)):
            gradient = (1 - rho) * x
            velocity = momentum * velocity + gradient
            columns.append([x - lr * (gradient + momentum * velocity), velocity])
        roots = torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T)
        low, high = (lr, high) if roots.abs().max().item() < 1 else (low, lr)
    return low


def check_largest(student, cases, look: str) -> None:
    """Compare the student's largest lr with the oracle's.

    cases  of rho and momentum
    look   where to look, for the message
    """
    function = function_of(student, "largest_outer_lr")
    for rho, momentum in cases:
        what = f"largest_outer_lr({rho:g}, {momentum:g})"
        wanted = largest_stable(rho, momentum)
        saw = function(rho, momentum)
        expect_close(saw, wanted, what, look, rtol=1e-4, reason="it may be found by trying")


@outer.property("the largest outer learning rate, without momentum", points=1)
def _(student, numbers):
    look = "x after a round: x - lr (1 - rho) x"
    check_largest(student, ((0.5, 0.0), (0.0, 0.0), (0.9, 0.0), (-0.5, 0.0)), look)


@outer.property("the largest outer learning rate, with momentum", points=2)
def _(student, numbers):
    look = "the two roots of a round, of x and velocity: which leaves the unit circle first?"
    check_largest(student, ((0.5, 0.9), (0.0, 0.9), (0.9, 0.5), (-0.5, 0.1)), look)


@outer.property("your prediction by hand was right", points=1)
def _(student, numbers):
    rounds = [
        [(torch.tensor(float(m)).double(), n) for m, n in zip(moves, numbers["num_tokens"])]
        for moves in numbers["moves"]
    ]
    start = torch.tensor(float(numbers["start"])).double()
    wanted = serial_rounds(rounds, start, numbers["lr"], numbers["momentum"])
    saw = function_of(student, "predicted_starts")()
    look = "your pencil calculation for numbers('8.5'); correct it once you know why"
    expect_close(saw, torch.stack(wanted), "predicted_starts()", look, **BY_HAND)
