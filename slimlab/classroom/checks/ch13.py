"""Graders of the exercises of chapter 13, distillation.

13.1, several teachers, stands here; 13.2, a loss that does not do what it was meant to do, in
ch13_loss.py, 13.3, a divergence between forward and reverse, in ch13_between.py and 13.4, a student
on a budget, in ch13_student.py. The oracle of 13.1 holds the logits of all teachers at once and
takes both means as their definitions have them; what a student loses is compared with two students
drawn at random, so that a number that depends on the student cannot pass.

Production averages logits more often than probabilities, since that is one sum.
"""

import math

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.checks.ch13_between import between
from slimlab.classroom.checks.ch13_loss import listens
from slimlab.classroom.checks.ch13_student import frugal
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close

__all__ = ["between", "frugal", "listens", "several"]

ROUNDING = {"atol": 1e-9, "rtol": 1e-9, "reason": "float64 rounding"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
MEANS = ("probabilities", "logits")
SHARES = ([0.5, 0.5], [0.2, 0.5, 0.3], [1.0], [0.1, 0.2, 0.3, 0.4])

several = Exercise(
    "13.1",
    "Several teachers",
    requires=("my_prediction", "mixed_target", "excess"),
    stars=2,
    instance=lambda rng: {
        "odds": rng.choice([[81, 1], [256, 1], [256, 16], [625, 16], [1296, 16], [16, 256]]),
        "temperature": 2,
    },
    hints=(
        "At temperature 2 a logit is half as large. What becomes of odds of 81?",
        "Which mean is a sum of probabilities, which a product of powers?",
        "One tensor is kept from teacher to teacher. torch.logaddexp adds up what stands there as "
        "logarithms, also of 0.",
        "A product of powers does not add up to 1. When is it normalised: for each teacher, or "
        "at the end?",
        "excess: write out the KL, and collect what has q in it. For the second: what stands "
        "before log g, if g is written with its normalising sum?",
    ),
)


def same_memory(logits: list[Tensor]):
    """Give `logits` one after the other in one tensor, as the exercise says; nan at the end."""
    memory = torch.empty_like(logits[0])
    for one in logits:
        memory.copy_(one)
        yield memory
    memory.fill_(math.nan)


def normalised(logits: Tensor, temperature: float) -> Tensor:
    """Return the probabilities of `logits` (..., V) at a `temperature`; no exponent is above 0."""
    scaled = logits / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def true_target(logits: list[Tensor], shares: list, temperature: float, mean: str) -> Tensor:
    """Return the probabilities of the mean (N, V).

    logits                     of all teachers
    shares, temperature, mean  as in the exercise
    """
    if mean == "probabilities":
        return sum(share * normalised(one, temperature) for share, one in zip(shares, logits))
    return normalised(sum(share * one for share, one in zip(shares, logits)), temperature)


def call(student, name: str, logits: list[Tensor], *given) -> Tensor:
    """Call mixed_target or excess with teachers in one memory; return its tensor.

    student  whose function
    name     of the function
    logits   of the teachers
    given    shares, temperature and mean
    """
    shares, *rest = given
    saw = function_of(student, name)(same_memory(logits), list(shares), *rest)
    if not isinstance(saw, Tensor):
        shape = "(N, V)" if name == "mixed_target" else "(N,)"
        raise CheckFailed(f"{name} returned {form_of(saw)}", f"a tensor {shape}", "the return line")
    return saw


def teachers(seed: int, num_teachers: int, scale: float = 2.0) -> list[Tensor]:
    """Draw logits (5, 6) of `num_teachers` from `seed`, `scale` wide."""
    return [scale * drawn(seed + 10 * k, 5, 6) for k in range(num_teachers)]


def check_target(student, mean: str, look: str) -> None:
    """Compare the mixed_target of `student` by one mean with the oracle; `look` says where."""
    for k, shares in enumerate(SHARES):
        for temperature in (1.0, 3.0):
            logits = teachers(k, len(shares))
            what = f'mixed_target of {len(shares)} teachers, "{mean}", T = {temperature:g}'
            saw = call(student, "mixed_target", logits, shares, temperature, mean)
            wanted = true_target(logits, shares, temperature, mean).log()
            sums = saw.exp().sum(-1)
            expect_close(sums, torch.ones(5), f"{what}: probabilities add up to", look, **ROUNDING)
            expect_close(saw, wanted, what, look, **ROUNDING)


@several.property("the mean of probabilities", points=2)
def _(student, numbers):
    look = "what is kept when the next teacher comes, by what T divides, and what is averaged"
    check_target(student, "probabilities", look)


@several.property("the mean of logits", points=2)
def _(student, numbers):
    look = "what is kept when the next teacher comes, by what T divides, and when it is normalised"
    check_target(student, "logits", look)


@several.property("large logits, and tokens that a teacher excludes", points=2)
def _(student, numbers):
    for mean in MEANS:
        first, second = (one.clamp(-1000, 1000) for one in teachers(7, 2, 600.0))
        first[0, 1] = second[0, 2] = second[1, 3] = -math.inf
        saw = call(student, "mixed_target", [first, second], [0.4, 0.6], 1.0, mean)
        look = "probabilities of 0 and their logarithms; exponents of large numbers"
        what = f'mixed_target of logits near 1000 and of -inf, "{mean}"'
        if mean == "logits":
            wanted = (0.4 * first + 0.6 * second).log_softmax(-1)
        else:
            both = [one.log_softmax(-1) for one in (first, second)]
            wanted = torch.logaddexp(both[0] + math.log(0.4), both[1] + math.log(0.6))
        expect_close(saw, wanted, what, look, **ROUNDING)


def check_excess(student, mean: str) -> None:
    """Compare the excess of `student` by one mean with what two students drawn at random lose."""
    looks = {
        "probabilities": "entropies: of which distribution is the first, and of which the others?",
        "logits": "the sum by which a product of powers is divided, and its sign",
    }
    for k, shares in enumerate(SHARES):
        for temperature in (1.0, 2.5):
            logits = teachers(20 + k, len(shares))
            what = f'excess of {len(shares)} teachers, "{mean}", T = {temperature:g}'
            saw = call(student, "excess", logits, shares, temperature, mean)
            mixed = true_target(logits, shares, temperature, mean)
            for seed in (90, 91):
                q = drawn(seed, 5, 6).softmax(-1)
                each = [_loss(normalised(one, temperature), q, mean) for one in logits]
                wanted = sum(share * one for share, one in zip(shares, each))
                wanted = wanted - _loss(mixed, q, mean)
                expect_close(saw, wanted, what, looks[mean], **ROUNDING)


def _loss(p: Tensor, q: Tensor, mean: str) -> Tensor:
    first, second = (p, q) if mean == "probabilities" else (q, p)
    return (first * (first / second).log()).sum(-1)


@several.property("what the disagreement costs, forward", points=2)
def _(student, numbers):
    check_excess(student, "probabilities")


@several.property("what the disagreement costs, reverse", points=2)
def _(student, numbers):
    check_excess(student, "logits")


@several.property("what the disagreement costs, with large logits", points=1)
def _(student, numbers):
    sure = torch.eye(4).double()[[0, 1, 2]] * 1000.0
    for mean in MEANS:
        other = sure.roll(1, dims=1)
        saw = call(student, "excess", [sure, other], [0.25, 0.75], 1.0, mean)
        # two that are sure of different tokens: an entropy of whom to believe, or
        # e^-250 and e^-750 beside each other
        wanted = -0.25 * math.log(0.25) - 0.75 * math.log(0.75) if mean == MEANS[0] else 250.0
        look = "0 times an infinite logarithm, and exponents that are too small for a float"
        what = f'excess of logits of 1000, "{mean}"'
        expect_close(saw, [wanted] * 3, what, look, **ROUNDING)


@several.property("your prediction by hand was right", points=1)
def _(student, numbers):
    saw = function_of(student, "my_prediction")()
    fine = isinstance(saw, dict) and set(MEANS) <= set(saw)
    asked = f"a dictionary with {', '.join(MEANS)}"
    expect(fine, f"my_prediction(): {form_of(saw)}", asked, "the return line")
    logits = [torch.tensor([[math.log(one), 0.0]]).double() for one in numbers["odds"]]
    look = "your pencil calculation for numbers('13.1'); correct it once you know why"
    for mean in MEANS:
        wanted = true_target(logits, [0.5, 0.5], numbers["temperature"], mean)[0, 0]
        expect_close(saw[mean], wanted, f"my_prediction()[{mean!r}]", look, **BY_HAND)
