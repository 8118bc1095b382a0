"""Grader of exercise 5.2 of chapter 05: Lion, an optimizer that steps by signs.

The oracle is a loop over single numbers with Python's floats.

Production optimizers are compared with each other on many devices and in many precisions.
"""

import copy

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close

ROUNDING = {"atol": 1e-11, "rtol": 0.0, "reason": "float64 rounding"}

lion = Exercise(
    "5.2",
    "Lion",
    requires=("Lion",),
    stars=2,
    hints=(
        "Follow one number on paper: m = 0, g = 2, then g = -1. Where does each step point?",
        "c and m are two averages of the same things with two rates. Which of them is kept?",
        "Both theta on the right side are the old one. Does your decay see the new one?",
        "What is read from the group in every step, and what was fixed when Lion was made?",
        "The momentum belongs into self.state[param], or state_dict() will not know it.",
    ),
)


class LoopLion:
    """Lion, number by number, with Python's floats; begins at copies of `weights`."""

    def __init__(self, weights: list[Tensor]):
        self.weights = [one.flatten().tolist() for one in weights]
        self.means = [[0.0] * len(one) for one in self.weights]

    def step(self, grads: list, lr: float, betas: tuple, decay: float) -> None:
        """Update by grads, of which None leaves its tensor alone; lr, betas, decay as in Lion."""
        for weights, means, grad in zip(self.weights, self.means, grads):
            for i, g in enumerate([] if grad is None else grad.flatten().tolist()):
                c = betas[0] * means[i] + (1 - betas[0]) * g
                sign = (c > 0) - (c < 0)
                weights[i] = weights[i] - lr * (sign + decay * weights[i])
                means[i] = betas[1] * means[i] + (1 - betas[1]) * g


def some_tensors(seed: int, count: int, *shapes: tuple) -> list[list[Tensor]]:
    """Draw `count` lists of tensors of these shapes in float64, from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    return [[torch.randn(shape, **draw) for shape in shapes] for _ in range(count)]


def make_lion(student, params, **settings) -> torch.optim.Optimizer:
    """Make student.Lion; fail if it is no optimizer. params and settings are given to it."""
    made = function_of(student, "Lion")(params, **settings)
    asked, look = "a torch.optim.Optimizer", "the class that Lion is made from"
    expect(isinstance(made, torch.optim.Optimizer), f"Lion made {form_of(made)}", asked, look)
    return made


def compare_steps(student, what: str, look: str, *, betas=(0.9, 0.99), decay=0.0) -> None:
    """Compare six steps of `student` with the loops; one entry never has a gradient.

    what, look    for the message
    betas, decay  of the Lion that is made
    """
    (start,), grads = some_tensors(1, 1, (3, 2), (4,)), some_tensors(2, 6, (3, 2), (4,))
    params, oracle = [nn.Parameter(one.clone()) for one in start], LoopLion(start)
    optimizer = make_lion(student, params, lr=0.1, betas=betas, weight_decay=decay)
    for number, given in enumerate(grads, start=1):
        given[1][2] = 0.0
        for param, grad in zip(params, given):
            param.grad = grad.clone()
        optimizer.step()
        oracle.step(given, 0.1, betas, decay)
        for param, wanted, grad in zip(params, oracle.weights, given):
            where = f"{what} after step {number}"
            expect_close(param.detach().flatten(), wanted, where, look, **ROUNDING)
            place = "whether a gradient is written into"
            expect_close(param.grad, grad, "the gradient after a step", place, **ROUNDING)


@lion.property("the weights after each of six steps", points=3)
def _(student, numbers):
    look = "which of the two averages has which beta, the order of the lines, and sign"
    compare_steps(student, "weights", look)
    compare_steps(student, "weights with betas (0.5, 0.8)", look, betas=(0.5, 0.8))


@lion.property("the decay", points=1)
def _(student, numbers):
    look = "where the decay enters: not into the gradient, and with the old weight"
    compare_steps(student, "weights with a decay of 2", look, decay=2.0)


@lion.property("groups with settings of their own, and a schedule", points=2)
def _(student, numbers):
    (start,), grads = some_tensors(3, 1, (3,), (2, 2)), some_tensors(4, 4, (3,), (2, 2))
    params = [nn.Parameter(one.clone()) for one in start]
    settings = [(0.1, (0.9, 0.99), 0.3), (0.2, (0.6, 0.7), 0.0)]
    names = ("lr", "betas", "weight_decay")
    groups = [{"params": [p], **dict(zip(names, s))} for p, s in zip(params, settings)]
    optimizer, oracles = make_lion(student, groups), [LoopLion([one]) for one in start]
    for number, given in enumerate(grads):
        for k, (_, betas, decay) in enumerate(settings):
            lr = settings[k][0] / (1 + number)
            optimizer.param_groups[k]["lr"], params[k].grad = lr, given[k].clone()
            oracles[k].step([given[k]], lr, betas, decay)
        optimizer.step()
    look = "from where the step takes lr, betas and decay, and when"
    for k in range(2):
        what = f"weights of group {k + 1} after 4 steps of a schedule"
        expect_close(params[k].detach().flatten(), oracles[k].weights[0], what, look, **ROUNDING)


@lion.property("a parameter without a gradient is left alone", points=1)
def _(student, numbers):
    (start,) = some_tensors(5, 1, (3,), (2,))
    params = [nn.Parameter(one.clone()) for one in start]
    optimizer = make_lion(student, params, lr=0.1, weight_decay=0.5)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    what, look = "a weight whose .grad is None", "what happens before its gradient is read"
    expect(params[1].grad is None, "a gradient where .grad was None", "None as before", look)
    expect_close(params[1].detach(), start[1], what, look, **ROUNDING)
    moved = bool((params[0].detach() != start[0]).all())
    expect(moved, "the parameter with a gradient did not move", "a step", "which ones are skipped")


@lion.property("going on from a saved state, bit for bit", points=1)
def _(student, numbers):
    (start,), grads = some_tensors(6, 1, (3, 2)), some_tensors(7, 6, (3, 2))
    first = nn.Parameter(start[0].clone())
    optimizer = make_lion(student, [first], lr=0.1)
    for (grad,) in grads[:3]:
        first.grad = grad.clone()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    kept_names = sorted(state["state"].get(0, {}))
    look = "under which name the mean is kept, and where"
    expect("exp_avg" in kept_names, f"the state holds {kept_names or 'nothing'}", "exp_avg", look)
    second = nn.Parameter(first.detach().clone())
    resumed = make_lion(student, [second], lr=0.1)
    resumed.load_state_dict(state)
    for (grad,) in grads[3:]:
        for param, one in ((first, optimizer), (second, resumed)):
            param.grad = grad.clone()
            one.step()
    look = "what the next step reads that state_dict() does not hold"
    same = torch.equal(first.detach(), second.detach())
    expect(same, "weights that differ after going on", "the same to the last bit", look)
