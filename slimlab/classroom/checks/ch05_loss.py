"""Grader of exercise 5.3 of chapter 05: label smoothing and the z-loss, with a gradient by hand.

The oracles are a loss written as loops over Python's floats, and its difference quotients.

Production losses are fused kernels that write the gradient over the logits.
"""

import math

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal

smoothed = Exercise(
    "5.3",
    "A loss with two additions, and its gradient by hand",
    requires=("loss_and_gradient",),
    stars=2,
    hints=(
        "ln p_k = z_k - ln Z. Write the loss with z and ln Z alone: q sums to 1.",
        "The derivative of ln Z with respect to z_k is p_k. The rest is the chain rule.",
        "The target gets 1 - s and its share s/V as well.",
        "By which number is the sum of the gradients divided? What is in the rows of -100?",
        "exp(1000) is infinite; torch.logsumexp(logits, 1) is not.",
    ),
)


def loop_loss(rows: list, targets: list, smoothing: float, z_weight: float) -> float:
    """Return the mean loss of rows of logits, added up number by number.

    targets, smoothing, z_weight  as in the exercise
    """
    total, count = 0.0, 0
    for z, target in zip(rows, targets):
        if target == -100:
            continue
        most = max(z)
        log_z = most + math.log(math.fsum(math.exp(one - most) for one in z))
        wanted = [smoothing / len(z)] * len(z)
        wanted[target] += 1 - smoothing
        total += math.fsum(q * (log_z - one) for q, one in zip(wanted, z)) + z_weight * log_z**2
        count += 1
    return total / count


def quotients(logits: Tensor, targets: Tensor, smoothing: float, z_weight: float) -> Tensor:
    """Return the loop's difference quotients at `logits`, (N, V).

    targets, smoothing, z_weight  as in loop_loss
    """
    rows, step = logits.tolist(), 1e-4
    found = torch.zeros_like(logits)
    for i, row in enumerate(rows):
        for k, value in enumerate(row):
            sides = []
            for moved in (value + step, value - step):
                row[k] = moved
                sides.append(loop_loss(rows, targets.tolist(), smoothing, z_weight))
            row[k] = value
            found[i, k] = (sides[0] - sides[1]) / (2 * step)
    return found


def loss_and_gradient_of(
    student, logits: Tensor, targets: Tensor, smoothing: float, z_weight: float
) -> tuple:
    """Call the student's function without autograd; return loss and gradient, as it gave them.

    logits, targets, smoothing, z_weight  what it is called with; it must leave them as they are
    """
    function = function_of(student, "loss_and_gradient")
    with torch.inference_mode():
        given = logits.clone(), targets.clone()
        saw = function(*given, smoothing, z_weight)
        asked, look = "a loss and a gradient", "the return line"
        is_pair = isinstance(saw, tuple | list) and len(saw) == 2
        expect(is_pair, f"loss_and_gradient returned {form_of(saw)}", asked, look)
        look = "whether the function writes into what it was given"
        for name, before, after in zip(("logits", "targets"), (logits, targets), given):
            expect_close(after, before, f"the {name} afterwards", look, rtol=0.0)
    return saw


def drawn(seed: int, num_tokens: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Draw logits (num_tokens, vocab_size) and a target for each, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64)
    return logits, torch.randint(vocab_size, (num_tokens,), generator=generator)


def compare(student, case: tuple, smoothing: float, z_weight: float, look: str) -> None:
    """Compare what `student` returns for a case (logits, targets) with the loops.

    smoothing, z_weight  as in the exercise
    look                 where to look
    """
    logits, targets = case
    loss, gradient = loss_and_gradient_of(student, logits, targets, smoothing, z_weight)
    with_these = f"with smoothing {smoothing} and z_weight {z_weight}"
    wanted = loop_loss(logits.tolist(), targets.tolist(), smoothing, z_weight)
    near = {"rtol": 1e-9, "reason": "float64 rounding"}
    expect_close(loss, wanted, f"the loss {with_these}", look, **near)
    wanted = quotients(logits, targets, smoothing, z_weight)
    near = {"atol": 2e-7, "rtol": 0.0, "reason": "the error of difference quotients"}
    expect_close(gradient, wanted, f"the gradient {with_these}", look, **near)


@smoothed.property("the plain cross-entropy", points=2)
def _(student, numbers):
    look = "p - y, and the number of tokens that it is divided by"
    compare(student, drawn(1, 4, 5), 0.0, 0.0, look)


@smoothed.property("label smoothing", points=2)
def _(student, numbers):
    look = "the distribution that is asked for: what the target gets, what the others get"
    compare(student, drawn(2, 3, 4), 0.4, 0.0, look)


@smoothed.property("the z-loss, alone and with smoothing", points=2)
def _(student, numbers):
    look = "the derivative of c (ln Z)^2 with respect to one logit"
    compare(student, drawn(3, 3, 6), 0.0, 0.3, look)
    compare(student, drawn(4, 2, 5), 0.2, 0.1, look)


@smoothed.property("targets that do not count", points=2)
def _(student, numbers):
    logits, targets = drawn(5, 5, 4)
    targets[torch.tensor([0, 3])] = -100
    look = "the divisor, and the rows of targets that are -100"
    compare(student, (logits, targets), 0.1, 0.2, look)


@smoothed.property("logits of 1000, and the forms of what is returned", points=1)
def _(student, numbers):
    logits, targets = drawn(6, 3, 4)
    logits = 250 * logits / logits.abs().max() * torch.tensor([4.0, -4.0, 2.0])[:, None]
    loss, gradient = loss_and_gradient_of(student, logits, targets, 0.1, 1e-4)
    look = "exp of large numbers, and the logarithm of what has become 0"
    wanted = loop_loss(logits.tolist(), targets.tolist(), 0.1, 1e-4)
    near = {"rtol": 1e-9, "reason": "float64 rounding"}
    expect_close(loss, wanted, "the loss of logits up to 1000", look, **near)
    wanted = quotients(logits, targets, 0.1, 1e-4)
    near = {"atol": 1e-6, "rtol": 0.0, "reason": "the error of difference quotients"}
    expect_close(gradient, wanted, "the gradient of logits up to 1000", look, **near)
    shapes = [tuple(one.shape) if isinstance(one, Tensor) else None for one in (loss, gradient)]
    expect_equal(shapes, [(), (3, 4)], "the shapes", "what is returned: two tensors")
