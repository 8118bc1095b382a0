"""Grader of exercise 13.3 of chapter 13: a divergence between forward and reverse.

The oracle adds up the divergence with Python's decimal numbers of 50 digits and takes difference
quotients of it, with autograd switched off while the student's code runs.

Production lets autograd find the gradient, in the bits that the logits have.
"""

import decimal
import math
from decimal import Decimal

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close

ROUNDING = {"atol": 1e-9, "rtol": 1e-9, "reason": "float64 rounding"}
STEP = Decimal("1e-18")
CASES = ((0.5, 1.0), (0.1, 1.0), (0.9, 2.0), (0.3, 4.0))

between = Exercise(
    "13.3",
    "Between forward and reverse",
    requires=("between", "largest_loss"),
    stars=3,
    hints=(
        "Write D as a function of p, q and m as if they were free. Its derivative by m: when is "
        "it the same for every token, and what does m add up to?",
        "With m out of the way: the derivative of (1 - beta) KL(q || m) by q, then the softmax: "
        "q times what stands there minus its mean under q, divided by T.",
        "log m: torch.logaddexp of two logarithms. 0 times minus infinity is nan; torch.where.",
        "T^2 and one division by T: what is left before the gradient?",
        "largest_loss: where p > 0 there q = 0. What is m there, and what is log(p / m)?",
    ),
)


def decimal_softmax(logits: list[float], temperature: float) -> list[Decimal]:
    """Return probabilities of `logits` at a `temperature`, in 50 digits; minus infinity has 0."""
    most = max(logits)
    weights = [
        Decimal(0) if one == -math.inf else ((one - most) / Decimal(temperature)).exp()
        for one in logits
    ]
    return [one / sum(weights) for one in weights]


def decimal_loss(student: list, teacher: list, beta: float, temperature: float) -> Decimal:
    """Add up T^2 D of one row.

    student, teacher   lists of logits
    beta, temperature  as in the exercise
    """
    p, q = decimal_softmax(teacher, temperature), decimal_softmax(student, temperature)
    share = Decimal(beta)
    total = Decimal(0)
    for a, b in zip(p, q):
        m = share * a + (1 - share) * b
        total += share * a * (a / m).ln() if a else 0
        total += (1 - share) * b * (b / m).ln() if b else 0
    return Decimal(temperature) ** 2 * total


def right_between(student: Tensor, teacher: Tensor, beta: float, temperature: float):
    """Return the mean loss and its gradient (N, V), by difference quotients.

    student, teacher, beta, temperature  as in the exercise
    """
    total, gradient = Decimal(0), torch.zeros_like(student)
    with decimal.localcontext() as context:
        context.prec = 50
        for n in range(len(student)):
            z = [Decimal(one) for one in student[n].tolist()]
            t = [one if one == -math.inf else Decimal(one) for one in teacher[n].tolist()]
            total += decimal_loss(z, t, beta, temperature)
            for v in range(len(z)):
                moved = [list(z), list(z)]
                moved[0][v] += STEP
                moved[1][v] -= STEP
                up, down = (decimal_loss(one, t, beta, temperature) for one in moved)
                gradient[n, v] = float((up - down) / (2 * STEP))
    return float(total / len(student)), gradient / len(student)


def compare(student, z: Tensor, t: Tensor, beta: float, temperature: float, what: str, look: str):
    """Compare the student's loss and gradient with the oracle's.

    z, t, beta, temperature  the arguments of between
    what                     for the message
    look                     where to look if the gradient is off
    """
    given = z.clone(), t.clone()
    with torch.no_grad():
        saw = function_of(student, "between")(*given, beta, temperature)
    what = f"between{what}, beta = {beta:g}, T = {temperature:g}"
    fits = isinstance(saw, tuple | list) and len(saw) == 2
    expect(fits, f"{what}: {form_of(saw)}", "a loss and its gradient", "the return line")
    loss, gradient = right_between(z, t, beta, temperature)
    place = "both divergences, what stands in m, and the mean over rows"
    expect_close(saw[0], loss, f"{what}: loss", place, form="the shape of the loss", **ROUNDING)
    expect_close(saw[1], gradient, f"{what}: gradient", look, **ROUNDING)
    if not (torch.equal(given[0], z) and torch.equal(given[1], t)):
        raise CheckFailed(f"{what} changed its arguments", "them as they were", "lines in place")


@between.property("loss and gradient at temperature 1", points=3)
def _(student, numbers):
    look = "both places of q, and what a softmax does to a gradient"
    for beta in (0.5, 0.2):
        compare(student, 2 * drawn(1, 3, 4), 2 * drawn(2, 3, 4), beta, 1.0, "", look)


@between.property("loss and gradient at other temperatures", points=2)
def _(student, numbers):
    look = "T^2 before the loss, and what each logit is divided by"
    for beta, temperature in CASES:
        compare(student, 2 * drawn(3, 2, 5), 2 * drawn(4, 2, 5), beta, temperature, "", look)


@between.property("tokens that the teacher excludes", points=2)
def _(student, numbers):
    z, t = 2 * drawn(5, 2, 4), 2 * drawn(6, 2, 4)
    t[0, 1] = t[0, 3] = t[1, 0] = -math.inf
    look = "0 times minus infinity, and whether a token that only the student knows still counts"
    compare(student, z, t, 0.3, 2.0, " with logits of -inf", look)


@between.property("large logits", points=2)
def _(student, numbers):
    z = torch.tensor([[1000.0, 0.0, -500.0], [3.0, 2.0, 1000.0], [900.0, 1000.0, 0.0]]).double()
    t = torch.tensor([[0.0, 1000.0, 2.0], [3.0, 2.0, 1000.0], [1000.0, 999.0, -math.inf]]).double()
    look = "exponents that are too large or too small for a float, and their logarithms"
    compare(student, z, t, 0.4, 1.0, " of logits of 1000", look)


@between.property("a student that agrees hears nothing", points=1)
def _(student, numbers):
    z = 3 * drawn(7, 3, 4)
    look = "the gradient where q = p, and the same after any number is added to all logits of a row"
    compare(student, z, z + torch.tensor([[1.0], [-5.0], [100.0]]), 0.7, 2.0, " where q = p", look)


@between.property("the largest loss there is", points=2)
def _(student, numbers):
    for beta, temperature in (*CASES, (0.99, 3.0)):
        saw = function_of(student, "largest_loss")(beta, temperature)
        far = torch.tensor([[200.0 * temperature, 0.0]]).double()
        wanted, _ = right_between(far, far.flip(1), beta, temperature)
        what = f"largest_loss({beta:g}, {temperature:g})"
        look = "p and q that exclude each other: what is m where p is, what where q is?"
        expect_close(saw, wanted, what, look, **ROUNDING)
