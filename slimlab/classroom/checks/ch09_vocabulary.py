"""Grader of exercise 9.4 of chapter 09: label smoothing and accuracy over a cut vocabulary.

The oracle is torch's cross_entropy of the whole logits, and argmax. Targets are drawn so that every
rank owns some of them, at the first and the last of its tokens too.

Megatron-LM's vocab_parallel_cross_entropy takes a label_smoothing too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import (
    ROUNDING,
    WORLDS,
    drawn,
    expect_parts,
    part_of,
    payload_of,
    ranks_text,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal

VOCAB_SIZE, NUM_POSITIONS, FEW_NUMBERS = 24, 30, 8
SMALL = {"atol": 1e-10, "rtol": 1e-9, "reason": "float64 rounding"}

vocabulary = Exercise(
    "9.4",
    "Label smoothing over a cut vocabulary",
    requires=("smoothed_loss", "num_right"),
    stars=3,
    hints=(
        "The last two terms of the loss are added up over tokens, and over ranks. Need the ranks "
        "tell each other both?",
        "Write the loss as log sum e^z minus sum over v of q_v z_v. What is q_v, and which q_v z_v "
        "has a rank by itself?",
        "The logarithm of the sum goes by parts: logsumexp of the parts' logsumexp, which never "
        "takes e to the power of a large number.",
        "The gradient is softmax minus q, at positions that count: each rank has its part.",
        "num_right: each rank's best score and its token. Of ranks with equal scores, who has the "
        "smaller ids? -100 is no token, so it never is the guess.",
    ),
)


def case_of(seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Draw logits (NUM_POSITIONS, VOCAB_SIZE) of this scale, and targets of which some are -100.

    seed, scale  of the draw
    """
    logits = drawn(seed, NUM_POSITIONS, VOCAB_SIZE) * scale
    generator = torch.Generator().manual_seed(seed + 1)
    targets = torch.randperm(NUM_POSITIONS, generator=generator) % VOCAB_SIZE
    return logits, targets


def check_loss(student, logits, targets, smoothings, note: str, grad: bool, looks: tuple) -> list:
    """Run the student's smoothed_loss, compare with one process; return ledgers with texts.

    logits, targets  the whole logits
    smoothings       the values that are tried
    note             what is special here, for the message
    grad             compare the gradients too, not the loss alone
    looks            where to look if the loss, and if the gradient is wrong
    """
    function, found = function_of(student, "smoothed_loss"), []
    for world_size in WORLDS:
        for smoothing in smoothings:
            what = f"smoothed_loss, {ranks_text(world_size)}, smoothing {smoothing}{note}"
            results = run(
                lambda comm: one_rank(function, comm, logits, targets, smoothing, grad),  # noqa: B023
                world_size,
                what,
            )
            whole = logits.clone().requires_grad_()
            loss = F.cross_entropy(whole, targets, label_smoothing=smoothing, reduction="sum")
            for rank, (own, _) in enumerate(results):
                label = f"{what}: loss on rank {rank}"
                expect_close(own, loss, label, looks[0], **ROUNDING)
            if grad:
                (3 * loss).backward()  # a gradient of the loss that is not 1
                grads = [own for _, own in results]
                label = f"{what}: gradient of logits"
                expect_parts(grads, whole.grad, 1, label, looks[1], SMALL)
            found.append((results.ledgers, what))
    return found


def one_rank(function, comm, logits, targets, smoothing: float, grad: bool) -> tuple:
    """Return loss and gradient of this rank's logits.

    function, comm             what is run
    logits, targets, smoothing  of the whole
    grad                       go back too
    """
    own = part_of(logits, 1, comm.rank, comm.world_size).requires_grad_()
    before, ids = own.detach().clone(), targets.clone()
    loss = function(comm, own, ids, smoothing)
    found = isinstance(loss, Tensor) and loss.dim() == 0
    look = "the return line of smoothed_loss"
    expect(found, f"smoothed_loss returned {form_of(loss)}", "a tensor of shape ()", look)
    if grad:
        look = "where autograd lost it: a call of comm passes no gradients on"
        expect(loss.requires_grad, "a loss that has no way back", "a loss with a gradient", look)
        (3 * loss).backward()
    if not (torch.equal(own.detach(), before) and torch.equal(ids, targets)):
        look = "what works in place: sub_, masked_fill_, an index on the left"
        raise CheckFailed("smoothed_loss changed its arguments", "them as they were", look)
    return loss.detach(), own.grad


LOSS_LOOK = "each of the three terms, and which of a rank's tokens is the target"
GRAD_LOOK = "softmax minus the share that is wanted of each token, times what comes from above"


@vocabulary.property("smoothed_loss: the loss without smoothing", points=1)
def _(student, numbers):
    look = ("whose token the target is, and in which column of its part", GRAD_LOOK)
    check_loss(student, *case_of(1), (0.0,), "", False, look)


@vocabulary.property("smoothed_loss: the smoothed loss", points=2)
def _(student, numbers):
    look = ("how many tokens share the smoothing: V, not V / w", GRAD_LOOK)
    check_loss(student, *case_of(2), (0.1, 0.0, 1.0), "", False, look)


@vocabulary.property("smoothed_loss: the gradient", points=2)
def _(student, numbers):
    check_loss(student, *case_of(3), (0.1, 0.0, 1.0), "", True, (LOSS_LOOK, GRAD_LOOK))


@vocabulary.property("smoothed_loss: scores of thousands", points=1)
def _(student, numbers):
    logits, targets = case_of(4, scale=3000.0)
    logits[::3] -= 10000.0
    looks = ("e to the power of a large number: subtract the maximum, or logsumexp", GRAD_LOOK)
    check_loss(student, logits, targets, (0.1,), ", scores of thousands", True, looks)


@vocabulary.property("smoothed_loss: positions that do not count", points=1)
def _(student, numbers):
    logits, targets = case_of(5)
    targets[::4] = -100
    look = "targets of -100: no loss and no gradient there, smoothing included"
    check_loss(student, logits, targets, (0.1, 0.0), ", some targets -100", True, (look, look))


@vocabulary.property("smoothed_loss: two numbers per position, backward nothing", points=2)
def _(student, numbers):
    looks = (LOSS_LOOK, GRAD_LOOK)
    for ledgers, what in check_loss(student, *case_of(6), (0.1,), "", True, looks):
        look = "what the ranks tell each other: what of it could be added up before?"
        check_budget(ledgers, what, look)


def check_budget(ledgers, what: str, look: str) -> None:
    """Fail if a rank handed more than two numbers per position to its calls.

    ledgers     of all ranks
    what, look  what ran, and where to look, for the message
    """
    for ledger in ledgers:
        much = payload_of(ledger) / 8 / NUM_POSITIONS
        calls = ", ".join(entry.call for entry in ledger.entries[:6])
        saw = f"{what}: {much:.3g} numbers per position and rank, in {calls}"
        few = FEW_NUMBERS / NUM_POSITIONS
        expect(much <= 2 + few, saw, "at most 2", look)


def check_count(student, logits: Tensor, targets: Tensor, note: str, look: str) -> list:
    """Run the student's num_right, compare with one process; return ledgers with texts.

    logits, targets  of the whole
    note             what is special here, for the message
    look             where to look, for the message
    """
    function, found = function_of(student, "num_right"), []
    wanted = int((logits.argmax(1) == targets).sum())
    for world_size in WORLDS:
        what = f"num_right, {ranks_text(world_size)}{note}"
        results = run(
            lambda comm: function(
                comm, part_of(logits, 1, comm.rank, comm.world_size), targets.clone()
            ),
            world_size,
            what,
        )
        for rank, one in enumerate(results):
            label = f"{what}: rank {rank}"
            saw = whole_number(one, label, "the return line: int(...)")
            expect_equal(saw, wanted, label, look)
        found.append((results.ledgers, what))
    return found


def guessed(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw logits and targets of which every `step`-th position is guessed wrong.

    seed, step  of the draw
    """
    logits, _ = case_of(seed)
    targets = logits.argmax(1)
    targets[::step] = (targets[::step] + 7) % VOCAB_SIZE
    return logits, targets


@vocabulary.property("num_right: the count", points=2)
def _(student, numbers):
    look = "whose best token is the best of all: compare scores, then ids of the whole vocabulary"
    for seed, step in ((7, 3), (8, 2)):
        check_count(student, *guessed(seed, step), "", look)


@vocabulary.property("num_right: equal scores, and positions that do not count", points=1)
def _(student, numbers):
    logits, targets = guessed(9, 3)
    targets[::4] = -100
    check_count(student, logits, targets, ", some targets -100", "-100 is no token")
    logits = (logits / 2).round()
    targets = logits.argmax(1)
    targets[1::2] = VOCAB_SIZE - 1 - logits.flip(1).argmax(1)[1::2]  # the last of the best
    look = "equal scores: which of the ranks has the smallest id among them?"
    check_count(student, logits, targets, ", equal scores", look)


@vocabulary.property("num_right: two numbers per position", points=1)
def _(student, numbers):
    look = "what each rank has to say of its own tokens"
    for ledgers, what in check_count(student, *guessed(10, 2), "", look):
        check_budget(ledgers, what, look)
