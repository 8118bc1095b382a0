"""Grader of exercise 13.2 of chapter 13: a loss of a student that falls and is another one.

The oracle adds up the loss token by token, with the quotient of probabilities written out. The
student's test is tried on losses that differ from a right one by one fault each; every fault needs
something of its own to show: a temperature, a weight, a hidden target, the gradient beside the
value, or the gradient of the teacher.

Production losses are fused kernels, tested against a plain one as here.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlab.classroom.checks.ch02_forms import expect_verdict, form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close

ROUNDING = {"atol": 1e-9, "rtol": 1e-9, "reason": "float64 rounding"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
RIGHT = ("", "entropies", "weights")
FAULTS = {
    "": "a right loss",
    "entropies": "a right loss, made of two entropies",
    "weights": "a right loss that adds up tokens and divides last",
    "given": "the given loss",
    "plain T": "a loss with T in place of its square",
    "all": "a loss whose T^2 stands before both terms",
    "hard": "a loss whose true token is asked for at the temperature too",
    "one": "a loss that divides the teacher's logits alone by T",
    "swapped": "a loss that gives the teacher the text's weight",
    "reverse": "a loss with the divergence turned round",
    "elements": "a loss that divides by the number of tokens of the vocabulary, too",
    "hidden": "a loss that divides by all targets, also those of -100",
    "cross": "a loss with the cross-entropy from the teacher in place of the divergence",
    "silent": "a loss whose soft term has no gradient",
    "teacher": "a loss that trains the teacher too",
}

listens = Exercise(
    "13.2",
    "It listens, and it learns",
    requires=("my_diagnosis", "is_right", "mended_loss"),
    stars=2,
    instance=lambda rng: {
        "temperature": rng.choice([2, 4, 5, 10]),
        "soft_weight": rng.choice([0.5, 0.75, 0.8, 0.9]),
        "teacher_prob": rng.choice([0.6, 0.7, 0.75, 0.8]),
    },
    hints=(
        "Print the gradient of the soft term alone, at T = 1, 2, 4, 8.",
        "my_diagnosis: the derivative of a cross-entropy by the first logit is q - p. What does "
        "a logit that is divided by T add to it?",
        "Two losses pull in the same direction if one gradient is the other times a number. "
        "Compare the ratio of both terms.",
        "is_right: several temperatures, weights 0 and 1 and between, hidden targets. A value "
        "may be right where the gradient is not: torch.autograd.grad.",
        "is_right: give it teacher's logits that want a gradient, and see whether they get one.",
    ),
)


def given_loss(student_logits, teacher_logits, targets, temperature, soft_weight, fault="given"):
    """Compute the loss of the exercise, with its fault, another one or none.

    student_logits, teacher_logits, targets, temperature, soft_weight  as there
    fault                                                              one of FAULTS
    """
    counts = targets != -100
    z, t, T = student_logits[counts], teacher_logits[counts], temperature
    t = t if fault == "teacher" else t.detach()
    log_p = (t / T).log_softmax(-1)
    log_q = ((z.detach() if fault == "silent" else z) / (1 if fault == "one" else T)).log_softmax(
        -1
    )
    first, second = (log_q, log_p) if fault == "reverse" else (log_p, log_q)
    soft = (first.exp() * (first - second)).sum()
    if fault == "cross":
        soft = -(first.exp() * second).sum()
    elif fault == "entropies":
        soft = (first.exp() * first).sum() - (first.exp() * second).sum()
    hard = F.cross_entropy(z / (T if fault == "hard" else 1), targets[counts], reduction="sum")
    if fault == "elements":
        soft = soft / z.shape[-1]
    factor = {"given": 1.0, "all": 1.0, "plain T": T}.get(fault, T**2)
    if fault == "weights":
        return (soft * (soft_weight * T) * T + hard - hard * soft_weight) / counts.sum()
    w = 1 - soft_weight if fault == "swapped" else soft_weight
    total = w * factor * soft + (1 - w) * hard
    total = T**2 * total if fault == "all" else total
    return total / (targets.numel() if fault == "hidden" else counts.sum())


def right_loss(student_logits, teacher_logits, targets, temperature, soft_weight) -> Tensor:
    """Add up the chapter's loss token by token.

    student_logits, teacher_logits, targets, temperature, soft_weight  as in the exercise
    """
    losses = []
    rows = zip(student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), targets.flatten())
    for z, t, target in rows:
        if target == -100:
            continue
        p, q = ((one / temperature).softmax(-1) for one in (t, z))
        soft = temperature**2 * sum(a * (a / b).log() for a, b in zip(p, q))
        hard = -(z[target] - z.logsumexp(-1))
        losses.append(soft_weight * soft + (1 - soft_weight) * hard)
    return sum(losses) / len(losses)


def drawn_tokens(seed: int, num_hidden: int, scale: float = 2.0):
    """Draw logits of student and teacher (2, 4, 5) and targets (2, 4).

    seed        others for each
    num_hidden  of the targets are -100
    scale       of the logits
    """
    targets = torch.randint(5, (2, 4), generator=torch.Generator().manual_seed(seed))
    targets.view(-1)[:num_hidden] = -100
    return scale * drawn(seed, 2, 4, 5), scale * drawn(seed + 1, 2, 4, 5), targets


def judge(student, faults, look: str) -> None:
    """Compare the student's verdicts on losses with the truth.

    faults  of the losses, of FAULTS
    look    where to look, for the message
    """
    function = function_of(student, "is_right")
    for fault in faults:
        what = f"is_right of {FAULTS[fault]}"
        program = partial(given_loss, fault=fault)
        expect_verdict(function, program, fault in RIGHT, what, look)


@listens.property("your test finds the fault, and no fault in right losses", points=2)
def _(student, numbers):
    judge(student, ("given",), "the chapter's formula, factor by factor, at several temperatures")
    judge(student, RIGHT, "how much rounding may do, and the formula that you compare with")


@listens.property("your test finds wrong temperatures and weights", points=2)
def _(student, numbers):
    look = "which term is divided by T, which multiplied by T^2, and which has which weight"
    judge(student, ("plain T", "all", "hard", "one", "swapped", ""), look)


@listens.property("your test finds wrong divergences, means and gradients", points=3)
def _(student, numbers):
    looks = {
        "reverse": "which distribution stands before the logarithm",
        "elements": "by what a mean over tokens is divided",
        "hidden": "batches with targets of -100",
        "cross": "the value itself, not its gradient alone",
        "silent": "the gradient, not the value alone",
        "teacher": "whether the teacher's logits get a gradient",
        "entropies": "a right loss, which must pass",
    }
    for fault, look in looks.items():
        judge(student, (fault,), look)


@listens.property("your prediction by hand was right", points=3)
def _(student, numbers):
    saw = function_of(student, "my_diagnosis")()
    keys = ("found", "true", "weight")
    fine = isinstance(saw, dict) and set(keys) <= set(saw)
    look = "the return line"
    expect(fine, f"my_diagnosis(): {form_of(saw)}", f"a dictionary with {', '.join(keys)}", look)
    T, w, p = (numbers[name] for name in ("temperature", "soft_weight", "teacher_prob"))
    teacher = torch.tensor([[T * math.log(p / (1 - p)), 0.0]]).double()
    looks = {
        "found": "q - p of both terms, and what the division by T does to the first",
        "true": "which factor the chapter's loss has, and before which term",
    }
    for key, loss in (("found", given_loss), ("true", right_loss)):
        z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        (wanted,) = torch.autograd.grad(loss(z, teacher, torch.tensor([0]), T, w), z)
        expect_close(saw[key], wanted[0, 0], f"my_diagnosis()[{key!r}]", looks[key], **BY_HAND)
    # the right loss with this weight: the same ratio of both terms
    odds = w / (1 - w) / T**2
    look = "the ratio of both terms in the program, and in the right loss with a weight w'"
    expect_close(saw["weight"], odds / (1 + odds), "my_diagnosis()['weight']", look, **BY_HAND)


def check_mended(student, tokens, temperature: float, weight: float, what: str, look: str):
    """Compare value and gradients of the student's mended_loss with the oracle.

    tokens               logits of student and teacher, and targets
    temperature, weight  its other arguments
    what, look           for the message
    """
    z, t, targets = (one.clone() for one in tokens)
    z, t = z.requires_grad_(), t.requires_grad_()
    saw = function_of(student, "mended_loss")(z, t, targets, temperature, weight)
    what = f"mended_loss{what}, T = {temperature:g}, soft_weight = {weight:g}"
    fits = isinstance(saw, Tensor) and saw.requires_grad
    where = "the return line: a loss to call backward() on"
    expect(fits, f"{what}: {form_of(saw)}", "a tensor with a gradient", where)
    counts = targets != -100
    own = tokens[0][counts].clone().requires_grad_()
    true = right_loss(own, tokens[1][counts], targets[counts], temperature, weight)
    expect_close(saw, true, what, look, **ROUNDING)
    wanted = torch.zeros_like(z)
    wanted[counts] = torch.autograd.grad(true, own)[0]
    found = torch.autograd.grad(saw, (z, t), allow_unused=True)
    expect_close(found[0], wanted, f"{what}: gradient", look, **ROUNDING)
    if found[1] is not None:
        still = torch.zeros_like(t)
        place = "where the teacher's logits are detached"
        expect_close(found[1], still, f"{what}: the teacher's gradient", place, **ROUNDING)
    for now, before, name in zip((z, t, targets), tokens, ("student's", "teacher's", "targets")):
        if not torch.equal(now.detach().nan_to_num(), before.nan_to_num()):
            place = "what works in place"
            raise CheckFailed(f"{what} changed an argument, the {name}", "it as it was", place)


@listens.property("the mended loss, at several temperatures and weights", points=2)
def _(student, numbers):
    look = "the factor before each term, and what is divided by T"
    for temperature in (1.0, 2.0, 7.5):
        for weight in (0.0, 0.4, 1.0):
            check_mended(student, drawn_tokens(3, 0), temperature, weight, "", look)


@listens.property("the mended loss, with hidden targets", points=2)
def _(student, numbers):
    look = "what is chosen before the softmax, and by how many tokens the sums are divided"
    tokens = drawn_tokens(5, 3)
    check_mended(student, tokens, 3.0, 0.6, " with three targets of -100", look)
    for one in tokens[:2]:
        one[0, 1, 2], one[0, 0] = math.nan, math.inf
    check_mended(student, tokens, 3.0, 0.6, " with nan where the target is -100", look)


@listens.property("the mended loss, with large logits", points=1)
def _(student, numbers):
    z, t, targets = drawn_tokens(8, 1, 600.0)
    z, t = z.clamp(-1000, 1000), t.clamp(-1000, 1000)
    saw = function_of(student, "mended_loss")(z.clone(), t.clone(), targets, 1.5, 0.5)
    z, t, targets = z[targets != -100], t[targets != -100], targets[targets != -100]
    log_p, log_q = ((one / 1.5).log_softmax(-1) for one in (t, z))
    soft = 2.25 * (log_p.exp() * (log_p - log_q)).sum(-1)
    true = (0.5 * soft + 0.5 * F.cross_entropy(z, targets, reduction="none")).mean()
    look = "logarithms of probabilities that are 0 in 64 bits"
    expect_close(saw, true, "mended_loss of logits near 1000", look, **ROUNDING)
