"""Grader of exercise 5.4 of chapter 05: an update in pieces that looks healthy.

The oracle is the whole batch at once, its loss added up token by token.

Production loops are tested in the same way, against a batch that is not cut.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close

NEAR = {"atol": 1e-10, "rtol": 0.0, "reason": "float64 rounding"}
# PyTorch adds 1e-6 to the length of the gradient, other ways of clipping add nothing; what differs
# in the weights then differs in the next loss.
CLIPPED = {"atol": 1e-6, "rtol": 0.0, "reason": "float64 rounding, and what clipping adds"}
V, D = 7, 3

careless = Exercise(
    "5.4",
    "It accumulates, it clips, it learns, it is wrong",
    requires=("difference", "mended_step"),
    stars=2,
    hints=(
        "difference: make() twice, step twice, then compare parameter by parameter.",
        "Two pieces with 3 and 30 tokens: with which weight does each token enter the loss?",
        "What is clipped in the second round of the loop: the second gradient, or more than that?",
        'F.cross_entropy has reduction="sum". By what is the sum divided, and when is it known?',
        "A piece without targets: its mean is 0/0. What is its sum?",
    ),
)


def small_model(seed: int) -> nn.Module:
    """Make a model from ids (B, T) to logits (B, T, 7), in float64, from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Embedding(V, D), nn.Tanh(), nn.Linear(D, V)).double()


def maker(seed: int, kind: str = "sgd") -> Callable:
    """Return a make() for a model from `seed` with an optimizer of this kind."""
    kinds = {
        "sgd": lambda params: torch.optim.SGD(params, lr=0.5),
        "momentum": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9),
        "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    }

    def make():
        model = small_model(seed)
        return model, kinds[kind](model.parameters())

    return make


def ragged_batch(seed: int, lengths: list[int], T: int = 6) -> tuple[Tensor, Tensor]:
    """Draw ids and targets (B, T) from `seed`; of each row the first `lengths` count."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), T)
    inputs, targets = (torch.randint(V, shape, generator=generator) for _ in range(2))
    hidden = torch.arange(T) >= torch.tensor(lengths)[:, None]
    return inputs, targets.masked_fill(hidden, -100)


def given_step(model, optimizer, batch, micro_batch_size, clip_norm):
    """Make an update as the program of the exercise does, faults included; returns the loss.

    model, optimizer, batch, micro_batch_size, clip_norm  as in the exercise
    """
    pieces = list(zip(*(tensor.split(micro_batch_size) for tensor in batch)))
    optimizer.zero_grad()
    total = 0.0
    for inputs, targets in pieces:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / len(pieces)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        total += loss.item()
    optimizer.step()
    return total


def whole_step(model, optimizer, batch, clip_norm) -> float:
    """Make the update that the whole batch asks for, token by token; returns the loss.

    model, optimizer, batch, clip_norm  as in the exercise
    """
    inputs, targets = batch
    log_probs = model(inputs).log_softmax(-1)
    chosen = [
        -log_probs[b, t, targets[b, t]]
        for b in range(targets.shape[0])
        for t in range(targets.shape[1])
        if targets[b, t] != -100
    ]
    loss = sum(chosen) / len(chosen)
    optimizer.zero_grad()
    loss.backward()
    length = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    for param in model.parameters():
        param.grad *= min(1.0, clip_norm / (length.item() + 1e-6))
    optimizer.step()
    return loss.item()


def scripted(sign: float) -> Callable:
    """Return a step that is right but for one number of the last parameter, off by 0.25.

    sign  whether the pieces end above or below the whole
    """

    def step(model, optimizer, batch, micro_batch_size, clip_norm):
        if micro_batch_size < len(batch[0]):
            with torch.no_grad():
                list(model.parameters())[-1][2] += 0.25 * sign
                list(model.parameters())[0][1, 1] -= 0.125 * sign
        return 0.0

    return step


def differ(student, step: Callable, make: Callable, batch, size: int, clip_norm: float) -> float:
    """Call the student's difference; fail unless it gives a number.

    step, make, batch, size, clip_norm  its arguments
    """
    saw = function_of(student, "difference")(step, make, batch, size, clip_norm)
    is_number = isinstance(saw, Tensor) and saw.numel() == 1 or hasattr(saw, "__float__")
    look = "the return line of difference"
    expect(is_number, f"difference returned {form_of(saw)}", "a number", look)
    return float(saw)


@careless.property("difference finds what is wrong with the given step", points=2)
def _(student, numbers):
    make, batch = maker(1), ragged_batch(2, [1, 6, 2, 5, 6])
    after = []
    for size in (2, 5):
        model, optimizer = make()
        given_step(model, optimizer, batch, size, 0.1)
        after.append(model)
    pairs = zip(after[0].parameters(), after[1].parameters())
    wanted = max((one - other).abs().max().item() for one, other in pairs)
    saw = differ(student, given_step, make, batch, 2, 0.1)
    look = "two fresh models, one step each; every parameter; the greatest absolute value"
    expect_close(saw, wanted, "difference of careless_step", look, **NEAR)


@careless.property("difference tells other steps apart", points=2)
def _(student, numbers):
    batch = ragged_batch(3, [4, 4, 4])
    look = "the sign of a difference, and whether every parameter is compared"
    for sign in (1.0, -1.0):
        saw = differ(student, scripted(sign), maker(2), batch, 1, 1.0)
        expect_close(saw, 0.25, "difference where one weight is off by 0.25", look, **NEAR)
    look = "a batch whose pieces have equally many tokens, without clipping"
    saw = differ(student, given_step, maker(2), batch, 1, 1e9)
    expect_close(saw, 0.0, "difference where the given step is right", look, **NEAR)


def check_mended(student, kind: str, size: int, lengths: list[int], clip_norm: float, look: str):
    """Compare two updates of `student` with the whole batch, and what mended_step returns.

    kind, size, clip_norm  optimizer, micro_batch_size and limit
    lengths                tokens of each sequence that count
    look                   where to look
    """
    model, optimizer = maker(4, kind)()
    other, reference = maker(4, kind)()
    sizes = []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    for seed in (5, 6):
        batch = ragged_batch(seed, lengths)
        given = copy.deepcopy(batch)
        step = function_of(student, "mended_step")
        loss = step(model, optimizer, given, size, clip_norm)
        wanted = whole_step(other, reference, batch, clip_norm)
        for name, one, right in zip(("0.weight", "2.weight", "2.bias"), *map(list, (
            model.parameters(), other.parameters()
        ))):  # fmt: skip
            what = f"{name} after update {seed - 4}, tokens {lengths} in pieces of {size}"
            expect_close(one, right, what, look, **(CLIPPED if clip_norm < 1 else NEAR))
        what = f"the loss that mended_step returned, tokens {lengths} in pieces of {size}"
        place = "what is added up for the return line, and what it is divided by"
        expect_close(loss, wanted, what, place, **(CLIPPED if clip_norm < 1 else NEAR))
    most = max(sizes)
    place = "what is given to the model in one call"
    expect(most <= size, f"{most} sequences in the model at a time", f"at most {size}", place)


@careless.property("unequal tokens, without clipping", points=2)
def _(student, numbers):
    look = "the weight with which each token enters, whatever piece it is in"
    for size in (2, 1, 4):
        check_mended(student, "sgd", size, [1, 6, 2, 5, 6], 1e9, look)


@careless.property("clipping, with several optimizers", points=2)
def _(student, numbers):
    look = "when the gradient is clipped: which one has the length of the whole batch's?"
    for kind in ("sgd", "momentum", "adamw"):
        check_mended(student, kind, 2, [1, 6, 2, 5, 6], 0.02, look)


@careless.property("a piece without a single target", points=1)
def _(student, numbers):
    look = "0/0 in a piece whose targets are all -100, and what the others are divided by"
    check_mended(student, "sgd", 2, [3, 2, 0, 0, 5], 0.3, look)
