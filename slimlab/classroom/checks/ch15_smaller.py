"""Grader of exercise 15.3 of chapter 15: neurons of a feed-forward layer removed for good.

The new layer is run by the formula, so nothing can be masked: it has fewer neurons or it fails.
Scores are taken on inputs that the student's code has not seen. Bounds lie between what removal by
norm, by activity and by least squares reach on these layers; in the last ones some neurons can be
spared altogether, and nothing is left but rounding.

Production scores neurons by the loss on text, and trains again afterwards.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close

NUM_INPUTS, NUM_NEURONS = 12, 40
NAMES = ("up", "up_bias", "down", "down_bias")
SILENT, CONSTANT, TWINS = 4, 4, 6

smaller = Exercise(
    "15.3",
    "Fewer neurons, the same layer",
    requires=("smaller_layer",),
    stars=3,
    hints=(
        "What a neuron adds is its column of D times what it says. Its norms say how loud it "
        "could be; the inputs say how loud it is.",
        "A neuron that always says 3 adds the same to every y. Where else could that stand?",
        "Once it is chosen who stays: which D' and b' give y as nearly as possible? That is least "
        "squares, with a column of ones.",
        "Twins: each of them costs nothing if it goes, as long as the other stays. So remove one "
        "neuron, look again, remove the next.",
        "A neuron that never speaks, or twice the same one, leave G without an inverse. What can "
        "be added to its diagonal, and how little of it?",
    ),
)


class Layer:
    """A layer and the inputs that it reads, drawn from `seed`.

    silent, constant, twins  how many neurons are hardly ever at work, always with the same number,
                             or say what another one says, louder
    """

    def __init__(self, seed: int, silent: int = 0, constant: int = 0, twins: int = 0):
        self._generator = torch.Generator().manual_seed(seed)
        draw = self._draw
        self._mix = draw(6, NUM_INPUTS) / 6**0.5
        up = draw(NUM_NEURONS, NUM_INPUTS) / NUM_INPUTS**0.5
        up_bias = 0.5 * draw(NUM_NEURONS)
        down, down_bias = draw(NUM_INPUTS, NUM_NEURONS) / NUM_NEURONS**0.5, 0.1 * draw(NUM_INPUTS)
        for k in range(twins):
            up[20 + k], up_bias[20 + k] = (1 + k) / 2 * up[k], (1 + k) / 2 * up_bias[k]
        for k in range(30, 30 + silent):
            up[k], up_bias[k], down[:, k] = 0.3 * up[k], -9.0, 12 * down[:, k]
        for k in range(35, 35 + constant):
            up[k], up_bias[k], down[:, k] = 0.0, 3.0, 2 * down[:, k]
        self.weights = up, up_bias, down, down_bias

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def inputs(self, count: int) -> Tensor:
        """Draw (count, 12) inputs whose features depend on each other."""
        return self._draw(count, 6) @ self._mix + 0.3 * self._draw(count, NUM_INPUTS)


def layer_outputs(weights, x: Tensor) -> Tensor:
    """Run a layer on x by the formula of the exercise; weights are its four tensors."""
    up, up_bias, down, down_bias = weights
    return (x @ up.T + up_bias).clamp(min=0) @ down.T + down_bias


def made_smaller(student, layer: Layer, count: int, num_kept: int) -> tuple:
    """Return the student's four tensors; fail unless they have num_kept neurons.

    layer  what is made smaller
    count  how many inputs are given
    """
    given = tuple(one.clone() for one in layer.weights)
    inputs = layer.inputs(count)
    sample = inputs.clone()
    saw = function_of(student, "smaller_layer")(*given, sample, num_kept)
    what = f"smaller_layer with {count} inputs, {num_kept} of {NUM_NEURONS} neurons"
    fits = isinstance(saw, tuple | list) and len(saw) == 4
    fits = fits and all(isinstance(one, Tensor) for one in saw)
    expect(fits, f"{what}: {form_of(saw)}", "four tensors", "the return line")
    shapes = ((num_kept, NUM_INPUTS), (num_kept,), (NUM_INPUTS, num_kept), (NUM_INPUTS,))
    for one, name, shape in zip(saw, NAMES, shapes):
        look = "which dim of each tensor counts neurons; zeros are still neurons"
        right = tuple(one.shape) == shape
        expect(right, f"{what}: {name} of shape {tuple(one.shape)}", f"shape {shape}", look)
        finite = bool(one.isfinite().all())
        look = "what is divided by 0, and the inverse of a matrix that has none"
        expect(finite, f"{what}: {name} with nan or infinity", "finite numbers", look)
    for now, before, name in zip((*given, sample), (*layer.weights, inputs), (*NAMES, "inputs")):
        if not torch.equal(now, before):
            raise CheckFailed(f"{what} changed {name}", "it as it was", "lines in place")
    return tuple(one.detach().double() for one in saw)


def expect_score(student, bound: float, num_kept: int, look: str, count: int = 400, **kinds):
    """Fail unless the layers of `student` have a score of at most `bound` on new inputs.

    num_kept  neurons that stay
    look      where to look
    count     how many inputs are given
    kinds     of neurons, see Layer
    """
    for seed in (0, 1, 2):
        layer = Layer(seed, **kinds)
        found = made_smaller(student, layer, count, num_kept)
        x = layer.inputs(1000)
        y = layer_outputs(layer.weights, x)
        error = (layer_outputs(found, x) - y).square().sum() / (y - y.mean(0)).square().sum()
        score = error.item()
        what = f"a score of {score:.2g} with {num_kept} of {NUM_NEURONS} neurons"
        expect(score <= bound, what, f"at most {bound:g}", look)


@smaller.property("four tensors with fewer neurons", points=2)
def _(student, numbers):
    for num_kept in (20, 1):
        made_smaller(student, Layer(5), 200, num_kept)


@smaller.property("no neuron goes: the same layer", points=1)
def _(student, numbers):
    layer = Layer(6)
    found = made_smaller(student, layer, 300, NUM_NEURONS)
    x = layer.inputs(50)
    near = {"atol": 1e-5, "rtol": 1e-5, "reason": "float64 rounding, and what a diagonal adds"}
    look = "what changes although nothing is missing"
    wanted = layer_outputs(layer.weights, x)
    expect_close(layer_outputs(found, x), wanted, "y with all neurons", look, **near)


@smaller.property("half of the neurons", points=3)
def _(student, numbers):
    look = "what the neurons that stay can do about those that go"
    expect_score(student, 0.10, 20, look)


@smaller.property("large neurons that are hardly ever at work", points=1)
def _(student, numbers):
    look = "how loud a neuron is on these inputs, not how large its weights are"
    expect_score(student, 0.07, 20, look, silent=SILENT)


@smaller.property("neurons that always say the same", points=1)
def _(student, numbers):
    look = "where a constant can stand instead, and what varies"
    expect_score(student, 0.05, 20, look, constant=CONSTANT)


@smaller.property("twins", points=2)
def _(student, numbers):
    look = "two neurons that are both loud, and of which one is enough"
    expect_score(student, 0.024, 20, look, twins=TWINS)


@smaller.property("nothing is lost where neurons can be spared", points=2)
def _(student, numbers):
    num_kept = NUM_NEURONS - SILENT - CONSTANT - TWINS
    look = "how much is added to a diagonal, which neurons are needed, and the new bias"
    kinds = {"silent": SILENT, "constant": CONSTANT, "twins": TWINS}
    expect_score(student, 1e-10, num_kept, look, **kinds)


@smaller.property("fewer inputs than neurons", points=1)
def _(student, numbers):
    look = "least squares with more unknowns than equations"
    expect_score(student, 0.5, 20, look, count=30)
