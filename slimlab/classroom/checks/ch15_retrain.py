"""Grader of exercise 15.2 of chapter 15: a retraining in which pruned weights come back.

The oracle trains the weights that stay in a shorter vector of their own, from the moment of pruning
on. The student's test is tried on programs that differ from a right one by one fault each; every
fault needs something of its own to show: momentum, clipping, a number of steps, or the weights
that gradient_of sees.

Production keeps masks in the optimizer's wrapper, or applies them after each step.
"""

from functools import partial

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import expect_verdict, form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal

ROUNDING = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}
EXACTLY = {"rtol": 0.0, "reason": "what is gone is gone"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
RIGHT = ("steps", "", "after")
FAULTS = {
    "": "a right program, which prunes the velocity too",
    "after": "a right program, which prunes after every step",
    "steps": "a right program, which keeps steps in place of velocities",
    "given": "the given program",
    "given, pruned at the end": "the given program that also prunes what it returns",
    "clip": "a program that clips before it hides the gradient of what is pruned",
    "forget": "a program that begins anew with a velocity of 0",
    "late": "a program that prunes one step later",
    "early": "a program that prunes from the first step on",
    "turned": "a program that keeps what should go",
    "never": "a program that does not prune",
    "empty": "a program that does not prune if no step comes after",
    "larger": "a program that makes what stays larger, for what is gone",
    "average": "a program whose velocity is an average",
}

retrained = Exercise(
    "15.2",
    "Three quarters are gone, says the report",
    requires=("my_diagnosis", "is_right", "mended_retrain"),
    stars=2,
    instance=lambda rng: {
        "velocity": rng.choice([-2.0, -0.5, 0.5, 1.5, 2.0]),
        "lr": rng.choice([0.1, 0.2, 0.05]),
        "momentum": rng.choice([0.5, 0.8, 0.9, 0.95]),
    },
    hints=(
        "Print the weights that retrain returns, not the mask.",
        "Follow a pruned weight for one step: its gradient is 0. What is its velocity?",
        "is_right: a model of the weights that stay, in a tensor of their own, needs no mask.",
        "is_right: keep what gradient_of is given. Try a max_norm that clips and one that does "
        "not, no step before and no step after.",
        "mended_retrain: two tensors live from step to step. Which of them were pruned?",
    ),
)


def given_retrain(
    weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm, fault="given"
):
    """Do what the program of the exercise does, with its fault, another one or none.

    weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm  as there
    fault                                                                      one of FAULTS
    """
    kept = ~mask if fault == "turned" else torch.ones_like(mask) if fault == "never" else mask
    first = {"late": num_before + 1, "early": 0}.get(fault, num_before)
    weights, velocity = weights.clone(), torch.zeros_like(weights)
    comes_back = fault.startswith("given")
    for step in range(num_before + num_after):
        if step == first:
            weights = weights * kept * (2.0 if fault == "larger" else 1.0)
            velocity = velocity * (0.0 if fault == "forget" else 1.0 if comes_back else kept)
        gradient = gradient_of(weights)
        if step >= first and fault != "clip":
            gradient = gradient * kept
        gradient = gradient * (max_norm / gradient.norm()).clamp(max=1.0)
        if step >= first and fault == "clip":
            gradient = gradient * kept
        gradient = gradient * (1 - momentum if fault == "average" else 1.0)
        velocity = momentum * velocity + (lr * gradient if fault == "steps" else gradient)
        weights = weights - (velocity if fault == "steps" else lr * velocity)
        if fault == "after" and step >= first:
            weights = weights * kept
    return weights if fault in ("given", "empty") else weights * kept


def shorter_retrain(weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm):
    """Train a vector of all weights, then one of those that stay.

    weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm  as in the exercise
    """
    shape, number = mask.shape, torch.arange(mask.numel())
    values, velocity = weights.flatten().tolist(), [0.0] * mask.numel()
    for step in range(num_before + num_after + 1):
        if step == num_before:
            left = [k for k, one in enumerate(number.tolist()) if mask.flatten()[one]]
            values, velocity = [values[k] for k in left], [velocity[k] for k in left]
            number = number[left]
        whole = torch.zeros(mask.numel(), dtype=weights.dtype)
        whole[number] = torch.tensor(values, dtype=weights.dtype)
        if step == num_before + num_after:
            return whole.view(shape)
        gradient = gradient_of(whole.view(shape)).flatten()[number]
        factor = min(1.0, max_norm / float(gradient.square().sum().sqrt()))
        for k, one in enumerate(gradient.tolist()):
            velocity[k] = momentum * velocity[k] + factor * one
            values[k] -= lr * velocity[k]


def problem(seed: int, *shape: int):
    """Draw weights of this shape, a mask and a gradient_of that ties all together, from `seed`."""
    size = torch.Size(shape).numel()
    rows = drawn(seed, 2 * size, size)
    targets = 3 * drawn(seed + 1, 2 * size)
    mask = drawn(seed + 2, *shape) > 0.2
    mask.view(-1)[0], mask.view(-1)[-1] = True, False

    def gradient_of(weights: Tensor) -> Tensor:
        return (rows.T @ (rows @ weights.flatten() - targets) / len(rows)).view(shape)

    return drawn(seed + 3, *shape), mask, gradient_of


def judge(student, faults, look: str) -> None:
    """Compare the student's verdicts on programs with the truth.

    faults  of the programs, of FAULTS
    look    where to look, for the message
    """
    function = function_of(student, "is_right")
    for fault in faults:
        what = f"is_right of {FAULTS[fault]}"
        program = partial(given_retrain, fault=fault)
        expect_verdict(function, program, fault in RIGHT, what, look)


@retrained.property("your test finds the fault, and no fault in right programs", points=2)
def _(student, numbers):
    judge(student, ("given",), "the weights that come back, outside the mask")
    judge(student, RIGHT, "how much rounding may do, and what the others start from")


@retrained.property("your test looks at every step, not at the end alone", points=2)
def _(student, numbers):
    looks = {
        "given, pruned at the end": "which weights gradient_of is given on the way",
        "forget": "the velocity of the weights that stay",
        "clip": "a max_norm that clips: whose gradient has that length?",
        "after": "a right program, which must pass",
    }
    for fault, look in looks.items():
        judge(student, (fault,), look)


@retrained.property("your test finds other faults", points=2)
def _(student, numbers):
    looks = {
        "late": "the step at which pruning happens",
        "early": "the steps before",
        "turned": "which weights are 0",
        "never": "whether any weight is 0",
        "larger": "the weights that stay, right after pruning",
        "average": "the weights that stay, with momentum",
        "empty": "no step after pruning",
        "": "a right program, which must pass",
    }
    for fault, look in looks.items():
        judge(student, (fault,), look)


@retrained.property("your prediction by hand was right", points=2)
def _(student, numbers):
    saw = function_of(student, "my_diagnosis")()
    places = {"first": 1, "second": 2, "rest": 2000}
    fine = isinstance(saw, dict) and set(places) <= set(saw)
    asked = f"a dictionary with {', '.join(places)}"
    expect(fine, f"my_diagnosis(): {form_of(saw)}", asked, "the return line")
    weight, velocity, passed = 0.0, numbers["velocity"], []
    for _ in range(places["rest"]):
        velocity *= numbers["momentum"]
        weight -= numbers["lr"] * velocity
        passed.append(weight)
    look = "one step at a time, with a gradient of 0: first the velocity, then the weight"
    for name, place in places.items():
        expect_close(saw[name], passed[place - 1], f"my_diagnosis()[{name!r}]", look, **BY_HAND)


def check_mended(student, seed: int, shape: tuple, settings: tuple, look: str) -> None:
    """Compare the student's mended_retrain with the weights that stay trained alone.

    seed, shape  of the problem
    settings     num_before, num_after, lr, momentum and max_norm
    look         where to look if weights that stay differ
    """
    weights, mask, gradient_of = problem(seed, *shape)
    given, given_mask, seen = weights.clone(), mask.clone(), []

    def watched(now: Tensor) -> Tensor:
        seen.append(now.detach().clone())
        return gradient_of(now)

    what = "mended_retrain({} steps, {}, lr {:g}, momentum {:g}, max_norm {:g})".format(*settings)
    saw = function_of(student, "mended_retrain")(given, given_mask, watched, *settings)
    fits = isinstance(saw, Tensor)
    expect(fits, f"{what}: {form_of(saw)}", "the weights, a tensor", "the return line")
    expect_equal(tuple(saw.shape), shape, f"{what}: shape", "the return line")
    calls, asked = len(seen), sum(settings[:2])
    place = "the loop: one call a step"
    expect_equal(calls, asked, f"{what}: calls of gradient_of", place)
    for late in seen[settings[0] :]:
        place = "the weights outside the mask, whenever gradient_of is called"
        expect_close(
            late[~mask], torch.zeros(int((~mask).sum())), f"{what}: pruned", place, **EXACTLY
        )
    place = "the weights outside the mask that are returned"
    expect_close(saw[~mask], torch.zeros(int((~mask).sum())), f"{what}: pruned", place, **EXACTLY)
    true = shorter_retrain(weights, mask, gradient_of, *settings)
    expect_close(saw, true, what, look, **ROUNDING)
    if not (torch.equal(given, weights) and torch.equal(given_mask, mask)):
        raise CheckFailed(f"{what} changed its arguments", "them as they were", "lines in place")


@retrained.property("the mended program, without clipping", points=2)
def _(student, numbers):
    look = "the velocity of the weights that stay"
    for momentum in (0.0, 0.9):
        check_mended(student, 20, (8,), (6, 7, 0.05, momentum, 1e9), look)


@retrained.property("the mended program, with clipping", points=2)
def _(student, numbers):
    look = "whose gradient is clipped, and when the others' is hidden"
    for max_norm in (0.3, 1.0):
        check_mended(student, 30, (8,), (6, 7, 0.05, 0.8, max_norm), look)


@retrained.property("no step before, no step after, weights of any shape", points=2)
def _(student, numbers):
    look = "when pruning happens if no step comes before it, or after"
    for settings in ((0, 4, 0.05, 0.9, 2.0), (5, 0, 0.05, 0.9, 2.0), (3, 1, 0.05, 0.9, 2.0)):
        check_mended(student, 40, (2, 4), settings, look)
