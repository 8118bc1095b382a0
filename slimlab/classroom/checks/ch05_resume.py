"""Grader of exercise 5.5 of chapter 05: a run that is resumed and is another run.

The oracle is a trainer that forgets what it is told to forget, and the last bit.

Production tests of checkpoints compare losses to a tolerance and after a few steps; a run on one
processor, as here, can be compared exactly.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_equal

PARTS = ("model", "optimizer", "step", "batches", "dropout")

forgetful = Exercise(
    "5.5",
    "What did it forget?",
    requires=("same_future", "Mended"),
    stars=3,
    hints=(
        "List everything that update() reads. Which of it is in state()?",
        "Two sources of random numbers are at work. One is named in the program, the other not.",
        "Take a state, make one update, and look at the state again. What is a state_dict made of?",
        "same_future: the first trainer must have finished before the second draws anything.",
        "A loss is computed before the update. What could differ although all losses are equal?",
        "optimizer.load_state_dict keeps tensors that it is given. Whose are they then?",
    ),
)


class Recorder:
    """The trainer of the exercise, which saves what it is told to save.

    kept    the parts that go into the state, of PARTS
    shared  the state holds the trainer's own tensors, not copies
    half    the weights are saved in 16 bits
    """

    def __init__(self, kept: tuple = PARTS, shared: bool = False, half: bool = False):
        torch.manual_seed(3)
        self.kept, self.shared, self.half = kept, shared, half
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.batches, self.step = torch.Generator().manual_seed(3), 0

    def update(self) -> float:
        """Make one step and return its loss."""
        x = torch.randn(8, 4, generator=self.batches)
        self.optimizer.param_groups[0]["lr"] = 0.02 / (1 + self.step / 10)
        loss = (self.model(x)[:, 0] - x.sum(1)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def state(self) -> dict:
        """Return what is kept."""
        whole = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "batches": self.batches.get_state(),
            "dropout": torch.get_rng_state(),
        }
        if self.half:
            whole["model"] = {name: one.half() for name, one in whole["model"].items()}
        state = {name: whole[name] for name in self.kept}
        return state if self.shared else copy.deepcopy(state)

    def load(self, state: dict) -> None:
        """Take a state back."""
        state = copy.deepcopy(state)
        if "model" in state:
            self.model.load_state_dict(state["model"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step = state.get("step", self.step)
        if "batches" in state:
            self.batches.set_state(state["batches"])
        if "dropout" in state:
            torch.set_rng_state(state["dropout"])


def verdict(student, make: Callable, num_before: int, num_after: int) -> bool:
    """Call the student's same_future; fail unless it gives a truth value.

    make, num_before, num_after  its arguments
    """
    saw = function_of(student, "same_future")(make, num_before, num_after)
    saw = saw.item() if isinstance(saw, Tensor) and saw.numel() == 1 else saw
    look = "the return line of same_future"
    expect(isinstance(saw, bool), f"same_future returned {form_of(saw)}", "True or False", look)
    return saw


@forgetful.property("the evidence acquits a trainer that forgets nothing", points=1)
def _(student, numbers):
    look = "whose random numbers are drawn when, and how often make() is called"
    for num_before, num_after in ((0, 3), (5, 4), (7, 1)):
        saw = verdict(student, Recorder, num_before, num_after)
        what = f"same_future of a whole state, {num_before} updates before and {num_after} after"
        expect_equal(saw, True, what, look)


@forgetful.property("the evidence convicts a trainer that forgets one thing", points=2)
def _(student, numbers):
    for name in PARTS:
        rest = tuple(part for part in PARTS if part != name)
        saw = verdict(student, lambda rest=rest: Recorder(rest), 5, 4)
        what = f"same_future of a trainer that forgets its {name}"
        expect_equal(saw, False, what, "what is compared, and when each trainer runs")


@forgetful.property("the evidence sees faults that hide", points=2)
def _(student, numbers):
    saw = verdict(student, lambda: Recorder(half=True), 5, 2)
    what = "same_future of a trainer that saves its weights in 16 bits"
    expect_equal(saw, False, what, "how nearly equal counts as equal")
    rest = tuple(part for part in PARTS if part != "optimizer")
    saw = verdict(student, lambda: Recorder(rest), 5, 1)
    what = "same_future where only the weights after the last update differ"
    expect_equal(saw, False, what, "whether the parameters at the end are compared")
    saw = verdict(student, lambda: Recorder(shared=True), 5, 3)
    what = "same_future of a trainer whose state changes as it goes on"
    look = "whether the first trainer has gone on when the second loads"
    expect_equal(saw, False, what, look)


def mended(student):
    """Make the student's Mended; fail unless it begins as the given trainer does."""
    trainer = function_of(student, "Mended")()
    for name in ("update", "state", "load", "model", "optimizer"):
        look = "Mended is a Trainer: what it takes over from it"
        expect(hasattr(trainer, name), f"Mended() without {name}", name, look)
    return trainer


def run(trainer, num_steps: int) -> list:
    """Make num_steps updates of `trainer` and return their losses."""
    return [trainer.update() for _ in range(num_steps)]


def weights(trainer) -> list:
    """Return copies of the parameters of `trainer`."""
    return [param.detach().clone() for param in trainer.model.parameters()]


def expect_same(one: tuple, other: tuple, what: str, look: str) -> None:
    """Fail unless two futures, `one` and `other`, (losses, weights) each, are equal.

    what, look  for the message
    """
    pairs = list(zip(one[0], other[0]))
    apart = [number for number, (a, b) in enumerate(pairs, start=1) if a != b]
    same = all(torch.equal(a, b) for a, b in zip(one[1], other[1]))
    seen = "the same losses" + ("" if same else ", but other weights")
    if apart:
        a, b = pairs[apart[0] - 1]
        near = "a loss less than 1 % off"
        seen = near if abs(a - b) < 0.01 * abs(b) else f"a loss of {a:.3g} instead of {b:.3g}"
        seen += f" in update {apart[0]} of {len(pairs)}"
    expect(same and not apart, f"{what}: {seen}", "the same to the last bit", look)


def future_of(trainer, num_steps: int) -> tuple:
    """Return losses and final weights of the next num_steps updates of `trainer`."""
    losses = run(trainer, num_steps)
    return losses, weights(trainer)


@forgetful.property("a mended run is resumed at once, to the last bit", points=2)
def _(student, numbers):
    for num_before in (0, 1, 6):
        first = mended(student)
        run(first, num_before)
        state = first.state()
        undisturbed = future_of(first, 5)
        second = mended(student)
        run(second, 3)
        second.load(state)
        look = "what update reads: weights, means, step, and two sources of random numbers"
        what = f"a trainer that had moved on, loading the state of step {num_before}"
        expect_same(future_of(second, 5), undisturbed, what, look)


@forgetful.property("taking a state changes nothing, and a state does not change", points=2)
def _(student, numbers):
    quiet = mended(student)
    undisturbed = future_of(quiet, 6)
    first = mended(student)
    losses = run(first, 3)
    state = first.state()
    before = copy.deepcopy(state)
    losses += run(first, 3)
    look = "whether state() draws random numbers or changes the trainer"
    expect_same((losses, weights(first)), undisturbed, "a run whose state was taken", look)
    for _ in range(2):  # a second trainer must not change it either
        look = "whose memory the tensors of the state are, after state() and after load()"
        same = same_content(state, before)
        expect(same, "a state that changed while a trainer went on", "the same state", look)
        second = mended(student)
        second.load(state)
        run(second, 2)


@forgetful.property("the state holds plain things only", points=1)
def _(student, numbers):
    trainer = mended(student)
    run(trainer, 2)
    foreign = sorted({type(one).__name__ for one in leaves(trainer.state())} - PLAIN)
    look = "what could not be written into a file: objects instead of their states"
    expect(not foreign, f"a state with {', '.join(foreign)}", "tensors, numbers and text", look)


PLAIN = {"Tensor", "Parameter", "int", "float", "bool", "str", "NoneType", "bytes"}


def leaves(value: object) -> list:
    """List what stands at the ends of nested dictionaries, lists and tuples in `value`."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for one in pair for leaf in leaves(one)]
    if isinstance(value, list | tuple):
        return [leaf for one in value for leaf in leaves(one)]
    return [value]


def same_content(one: object, other: object) -> bool:
    """Return whether two states, `one` and `other`, hold the same numbers and text."""
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)
        for a, b in pairs
        if isinstance(a, Tensor) or type(a).__name__ in PLAIN
    )
