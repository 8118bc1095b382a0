"""Schedules: the learning rate of every step, first up, then down.

Chapter 05 explains them. AdamW's second mean rests on few gradients at first, so its early steps
point in unreliable directions: the warm-up keeps them short. Late steps mostly follow the noise
of the batches: the decay shortens them again.

Goyal et al. 2017 (arXiv:1706.02677, warm-up); Loshchilov and Hutter 2017 (arXiv:1608.03983,
cosine). LLaMA's is warmup_cosine with a final fraction of a tenth (arXiv:2302.13971, section 2.3).

A schedule here is a function of the step alone, so resuming needs no saved schedule. Production
often counts tokens instead of steps, and holds the rate until shortly before the end, so that the
end need not be known at the start.
"""

import math

import torch

from slimlab.config import check_choice, check_number, check_size, require
from slimlab.train.optimizer_checks import LEAST


def warmup_cosine(
    step: int, *, peak_lr: float, warmup_steps: int, num_steps: int, final_fraction: float = 0.1
) -> float:
    """Rise in a straight line, then fall along half a cosine.

    step            of the coming update, 0 for the first
    peak_lr         reached after warmup_steps updates, and used in the first one after them too
    warmup_steps    updates of the rise, 0 for none; update i of them has peak_lr (i + 1) / steps
    num_steps       updates of the whole training
    final_fraction  of peak_lr, the rate of the last update and of all beyond it
    returns         learning rate

    Raises InputError for numbers out of range, among them num_steps < warmup_steps.
    """
    _check(step, peak_lr, warmup_steps, num_steps, final_fraction)
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    cosine = (1 + math.cos(math.pi * _progress(step, warmup_steps, num_steps))) / 2
    return peak_lr * (final_fraction + (1 - final_fraction) * cosine)


def warmup_linear(
    step: int, *, peak_lr: float, warmup_steps: int, num_steps: int, final_fraction: float = 0.1
) -> float:
    """Rise in a straight line, then fall in another.

    step, peak_lr, warmup_steps, num_steps, final_fraction  as in warmup_cosine
    returns  learning rate

    Raises InputError as warmup_cosine does.
    """
    _check(step, peak_lr, warmup_steps, num_steps, final_fraction)
    if step < warmup_steps:
        return peak_lr * (step + 1) / warmup_steps
    left = 1 - _progress(step, warmup_steps, num_steps)
    return peak_lr * (final_fraction + (1 - final_fraction) * left)


def warmup_constant(
    step: int, *, peak_lr: float, warmup_steps: int, num_steps: int, final_fraction: float = 1.0
) -> float:
    """Rise in a straight line and stay.

    step, peak_lr, warmup_steps, num_steps  as in warmup_cosine
    final_fraction  not used: the rate stays at peak_lr
    returns  learning rate

    Raises InputError as warmup_cosine does.
    """
    _check(step, peak_lr, warmup_steps, num_steps, final_fraction)
    return peak_lr * min(1.0, (step + 1) / max(warmup_steps, 1))


SCHEDULES = {"cosine": warmup_cosine, "linear": warmup_linear, "constant": warmup_constant}


def learning_rate(
    name: str,
    step: int,
    *,
    peak_lr: float,
    warmup_steps: int,
    num_steps: int,
    final_fraction: float = 0.1,
) -> float:
    """Look up the schedule and its learning rate.

    name  "cosine", "linear" or "constant", each with warm-up
    step, peak_lr, warmup_steps, num_steps, final_fraction  as in warmup_cosine
    returns  learning rate

    Raises InputError for an unknown name, and as warmup_cosine does.
    """
    check_choice("name", name, tuple(SCHEDULES))
    return SCHEDULES[name](
        step,
        peak_lr=peak_lr,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        final_fraction=final_fraction,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of the optimizer the same learning rate.

    optimizer  of torch.optim or of slimlab.train.optimizer
    lr         learning rate of the coming update
    """
    for group in optimizer.param_groups:
        group["lr"] = lr


def _progress(step: int, warmup_steps: int, num_steps: int) -> float:
    """0 in the first update after the warm-up, 1 in the last update and beyond it."""
    return min(1.0, (step - warmup_steps) / max(num_steps - 1 - warmup_steps, 1))


def _check(
    step: object, peak_lr: object, warmup_steps: object, num_steps: object, final_fraction: object
) -> None:
    check_size("num_steps", num_steps)
    check_number("step", step, int, 0, math.inf)
    check_number("warmup_steps", warmup_steps, int, 0, math.inf)
    require(
        num_steps >= warmup_steps,
        "num_steps of at least warmup_steps",
        f"num_steps = {num_steps}, warmup_steps = {warmup_steps}",
        "train longer, or warm up in a twentieth of the steps",
    )
    check_number("peak_lr", peak_lr, float, LEAST, math.inf)
    check_number("final_fraction", final_fraction, float, 0, 1)
