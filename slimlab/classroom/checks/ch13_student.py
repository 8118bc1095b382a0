"""Grader of exercise 13.4 of chapter 13: a small student, taught within a number of operations.

A `Lesson` has a teacher, inputs and labels; it counts the multiplications that PyTorch makes while
a student is taught, and scores the student on new inputs. The notebook uses one too. Time is
counted in operations, so that every machine gives the same verdict; the bounds lie well between
what the ways of teaching reach.

Production measures seconds on the machine that pays for them.
"""

import math
from bisect import bisect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slimlab.classroom.checks.ch02_forms import count_numbers, form_of, function_of, weights_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect

NUM_INPUTS, NUM_TOKENS, TEACHER_WIDTH = 6, 8, 128
MOST_NUMBERS, MOST_MULTIPLICATIONS = 400, 40_000_000
SEEDS = (0, 1)
EDGES = (0.15, 0.2, 0.25, 0.4, 0.65, 0.9, 1.5, 2.7, 10.0, math.inf)
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "linear": 0, "addmm": 1, "baddbmm": 1, "addmv": 1}
ELEMENTWISE = {"mul", "mul_", "div", "div_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}

frugal = Exercise(
    "13.4",
    "A student on a budget",
    requires=("distil",),
    stars=3,
    hints=(
        "Replace the labels by what the teacher says of the same inputs. What is the score now?",
        "How often is the teacher asked about the same input? What could be kept?",
        "18,000 for a row of the teacher, under 1,000 for one of the student: what would you buy "
        "for 40 million?",
        "A teacher answers questions that are not in the book. Whom do you need to label them?",
        "Few steps: a large learning rate that falls to 0 at the end. How many rows in a step?",
    ),
)


class Taught(NamedTuple):
    """What became of a lesson.

    num_numbers          that the student holds
    num_multiplications  made while it was taught
    score                its divergence from the teacher on new inputs, as a share of the best
                         constant guess's
    """

    num_numbers: int
    num_multiplications: int
    score: float


class Multiplications(TorchDispatchMode):
    """Count multiplications, forward and backward, while it is entered.

    most  how many may be made before the work is ended
    """

    def __init__(self, most: int):
        super().__init__()
        self.most, self.count = most, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation of PyTorch and add what it multiplies."""
        found = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        if name in PRODUCTS:
            left, right = args[PRODUCTS[name] : PRODUCTS[name] + 2]
            inner = left.shape[-1]
            outer = right.shape[0] if name == "linear" else right.shape[-1]
            self.count += left.numel() * (1 if right.dim() == 1 else outer)
            expect(inner > 0, "a product of empty matrices", "rows to multiply", "its shapes")
        elif name in ELEMENTWISE:
            self.count += found.numel()
        elif name.startswith("_foreach_") and name.rstrip("_")[9:] in ELEMENTWISE:
            self.count += sum(one.numel() for one in args[0])
        elif name == "convolution":
            self.count += found.numel() * args[1][0].numel()
        if self.count > self.most:
            saw = f"more than {self.most / 1e6:g} million multiplications; it was ended there"
            asked = f"at most {MOST_MULTIPLICATIONS / 1e6:g} million"
            raise CheckFailed(saw, asked, "how often the teacher is asked about the same rows")
        return found


class Lesson:
    """A teacher, inputs and labels, drawn from `seed`."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)
        sizes = ((TEACHER_WIDTH, NUM_INPUTS, 1.3), (TEACHER_WIDTH, TEACHER_WIDTH, 1.3))
        self._layers = [
            (self._draw(rows, columns) * gain / math.sqrt(columns), 0.5 * self._draw(rows))
            for rows, columns, gain in (*sizes, (NUM_TOKENS, TEACHER_WIDTH, 2.5))
        ]
        self._open = True
        self.inputs = self._draw(100, NUM_INPUTS)
        chances = self._logits(self.inputs).softmax(-1)
        self.labels = torch.multinomial(chances, 1, generator=self._generator)[:, 0]

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    @torch.no_grad()
    def _logits(self, inputs: Tensor) -> Tensor:
        for weight, bias in self._layers[:-1]:
            inputs = F.linear(inputs, weight, bias).tanh()
        return F.linear(inputs, *self._layers[-1])

    def teacher(self, inputs: Tensor) -> Tensor:
        """Return the teacher's logits (B, 8) for `inputs` (B, 6)."""
        fits = isinstance(inputs, Tensor) and inputs.dim() == 2 and inputs.shape[1] == NUM_INPUTS
        expect(fits, f"the teacher was given {form_of(inputs)}", "inputs (B, 6)", "its calls")
        look = "what the student calls when it answers"
        expect(self._open, "the teacher was asked after the lesson", "a student alone", look)
        return self._logits(inputs.detach().float())

    def give(self, distil: Callable, most: int = 10 * MOST_MULTIPLICATIONS) -> Taught:
        """Let `distil` teach a student, and score it.

        distil  as in the exercise
        most    multiplications after which it is ended
        """
        self._open = True
        counter = Multiplications(most)
        with torch.enable_grad(), counter:
            student = distil(self.teacher, self.inputs.clone(), self.labels.clone())
        self._open = False
        look = "the return line: the student itself, a module"
        fits = isinstance(student, nn.Module)
        expect(fits, f"distil returned {form_of(student)}", "an nn.Module", look)
        num_numbers = count_numbers(weights_of(student))
        return Taught(num_numbers, counter.count, self._score(student))

    @torch.no_grad()
    def _score(self, student: nn.Module) -> float:
        inputs = torch.randn(4000, NUM_INPUTS, generator=torch.Generator().manual_seed(99))
        said = student.eval()(inputs)
        fits = isinstance(said, Tensor) and tuple(said.shape) == (len(inputs), NUM_TOKENS)
        what = f"the student gave {form_of(said)} for inputs of shape {tuple(inputs.shape)}"
        expect(fits, what, f"logits of shape ({len(inputs)}, 8)", "its last layer")
        finite = bool(said.isfinite().all())
        look = "the learning rate, and logarithms of 0"
        expect(finite, "logits that are nan or infinite", "finite logits", look)
        p = self._logits(inputs).softmax(-1)
        constant = p.mean(0).log().expand_as(p)
        both = (said.log_softmax(-1), constant)
        own, best_constant = (F.kl_div(q, p, reduction="batchmean").item() for q in both)
        return own / best_constant


_taught: dict[tuple, Taught] = {}


def taught(student, seed: int) -> Taught:
    """Give one lesson to the student's distil; each seed once."""
    function = function_of(student, "distil")
    if (function, seed) not in _taught:
        _taught[function, seed] = Lesson(seed).give(function, 2 * MOST_MULTIPLICATIONS)
    return _taught[function, seed]


def expect_within(student, seed: int) -> Taught:
    """Return what became of one lesson by `student`, of `seed`; fail unless small and soon done."""
    found = taught(student, seed)
    look = "weights and biases of every layer, and whatever else the student keeps"
    what = f"{found.num_numbers} numbers in the student"
    expect(found.num_numbers <= MOST_NUMBERS, what, f"at most {MOST_NUMBERS}", look)
    what = f"{found.num_multiplications / 1e6:.0f} million multiplications"
    within = found.num_multiplications <= MOST_MULTIPLICATIONS
    look = "how many rows go through the teacher, and how often; then steps times rows"
    expect(within, what, f"at most {MOST_MULTIPLICATIONS / 1e6:g} million", look)
    return found


def expect_below(student, bound: float, look: str) -> None:
    """Fail unless what `student` teaches is within the budget and scores below `bound`.

    look  where to look
    """
    for seed in SEEDS:
        score = expect_within(student, seed).score
        # Rounding differs between machines, and a lesson makes more of it: no more digits.
        place = bisect(EDGES, score)
        between = f"between {EDGES[place - 1]:g} and {EDGES[place]:g}" if place else "near 0"
        what = f"a score for teacher {seed + 1} {between}"
        expect(score < bound, what, f"below {bound:g}", look)


@frugal.property("small, and soon done", points=2, deadline_s=20.0)
def _(student, numbers):
    for seed in SEEDS:
        expect_within(student, seed)


@frugal.property("it learned from its teacher", points=3, deadline_s=20.0)
def _(student, numbers):
    look = "what the teacher says of an input that one label does not, and whether it is followed"
    expect_below(student, 0.25, look)


@frugal.property("it learned more than 100 inputs can say", points=4, deadline_s=20.0)
def _(student, numbers):
    look = "what the teacher could still be asked; then steps, rows in a step and learning rate"
    expect_below(student, 0.15, look)
