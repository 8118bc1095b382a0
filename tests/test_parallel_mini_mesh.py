"""The mesh in numpy: under every layout the numbers of one process, and the collectives implied."""

import numpy as np
import pytest

from slimlab.config import InputError
from slimlab.parallel.layout import Layout
from slimlab.parallel.mesh import MeshShape
from slimlab.parallel.mini_mesh import Dimension, Graph, Lowering

BATCH, INPUT, HIDDEN, OUTPUT = (
    Dimension("batch", 6), Dimension("input", 5), Dimension("hidden", 4), Dimension("output", 3),
)  # fmt: skip
LAYOUTS = {
    "nothing cut": ((), (2, 1, 2)),
    "data parallel": ((("batch", "data"),), (3, 1, 1)),
    "model parallel": ((("hidden", "tensor"),), (1, 1, 4)),
    "both": ((("batch", "data"), ("hidden", "tensor")), (2, 1, 2)),
    "both along other axes": ((("batch", "tensor"), ("hidden", "pipeline")), (1, 2, 3)),
    "three axes": ((("batch", "data"), ("output", "pipeline"), ("hidden", "tensor")), (2, 3, 2)),
}


def scaled_difference(weight, grad):
    return weight - 0.1 * grad


def mask_negative(grad, hidden):
    return grad * (hidden > 0)


def first_values():
    draw = np.random.default_rng(0)
    return [draw.normal(size=size) for size in ((5, 4), (4,), (4, 3))]


def mlp_graph():
    """A layer, a bias, relu, a layer; the gradients of half the squared error, and the updates."""
    graph, (w1, b1, w2) = Graph(), first_values()
    x = graph.import_array("x", (BATCH, INPUT))
    y = graph.import_array("y", (BATCH, OUTPUT))
    # Dims in other orders than numpy's user would have them: names decide.
    w1 = graph.variable((HIDDEN, INPUT), w1.T)
    b1, w2 = graph.variable((HIDDEN,), b1), graph.variable((HIDDEN, OUTPUT), w2)
    before = graph.map(np.add, graph.einsum((x, w1), (BATCH, HIDDEN)), b1)
    hidden = graph.map(lambda a: np.maximum(a, 0), before)
    error = graph.map(np.subtract, graph.einsum((hidden, w2), (OUTPUT, BATCH)), y)
    loss = graph.einsum((error, error), ())
    grad = graph.einsum((error, w2), (BATCH, HIDDEN))
    grad = graph.map(mask_negative, grad, before)
    grads = [
        graph.einsum((grad, x), (HIDDEN, INPUT)),
        graph.einsum((grad,), (HIDDEN,)),
        graph.einsum((hidden, error), (HIDDEN, OUTPUT)),
    ]
    for variable, one in zip((w1, b1, w2), grads):
        graph.assign(variable, graph.map(scaled_difference, variable, one))
    return graph, loss, (w1, b1, w2)


def arrays_of(step):
    draw = np.random.default_rng(step + 1)
    return {"x": draw.normal(size=(6, 5)), "y": draw.normal(size=(6, 3))}


def numpy_run(num_steps):
    w1, b1, w2 = first_values()
    losses = []
    for step in range(num_steps):
        x, y = arrays_of(step).values()
        before = x @ w1 + b1
        hidden = np.maximum(before, 0)
        error = hidden @ w2 - y
        losses.append((error**2).sum())
        grad = error @ w2.T * (before > 0)
        w1, b1, w2 = w1 - 0.1 * x.T @ grad, b1 - 0.1 * grad.sum(0), w2 - 0.1 * hidden.T @ error
    return losses, (w1.T, b1, w2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_training_equals_numpys_under_every_layout(layout):
    rules, sizes = LAYOUTS[layout]
    graph, loss, variables = mlp_graph()
    lowering = Lowering(graph, MeshShape(*sizes), Layout(rules))
    losses, weights = numpy_run(3)
    for step in range(3):
        lowering.run(arrays_of(step))
        np.testing.assert_allclose(lowering.export(loss), losses[step], rtol=1e-12)
    for variable, weight in zip(variables, weights, strict=True):
        np.testing.assert_allclose(lowering.export(variable), weight, rtol=1e-11, atol=1e-12)


def collectives_of(rules, sizes):
    graph, _, _ = mlp_graph()
    lowering = Lowering(graph, MeshShape(*sizes), Layout(rules))
    steps = [(step[0].names, step[2]) for step in lowering.steps if step[2]]
    return lowering, steps


def test_a_cut_batch_takes_the_all_reduces_of_data_parallelism():
    lowering, steps = collectives_of((("batch", "data"),), (2, 1, 1))
    names = [("hidden", "input"), ("hidden",), ("hidden", "output")]
    assert steps == [(one, [("all_reduce", "data")]) for one in [(), *names]]
    lowering.run(arrays_of(0))
    assert lowering.sent == 1 + 4 * 5 + 4 + 4 * 3  # the loss and the gradients of the weights


def test_a_cut_hidden_dim_takes_the_one_all_reduce_of_tensor_parallelism():
    lowering, steps = collectives_of((("hidden", "tensor"),), (1, 1, 2))
    assert steps == [(("output", "batch"), [("all_reduce", "tensor")])]
    lowering.run(arrays_of(0))
    assert lowering.sent == 6 * 3


def test_steps_tell_what_each_processor_will_hold_before_anything_runs():
    graph, _, variables = mlp_graph()
    layout = Layout((("batch", "data"), ("hidden", "tensor")))
    lowering = Lowering(graph, MeshShape(data=3, tensor=2), layout)
    held = {one: part for one, part, _ in lowering.steps}
    assert [held[one] for one in variables] == [(2, 5), (2,), (2, 3)]
    assert held[graph.tensors[0]] == (2, 5)
    lowering.run(arrays_of(0))
    for one, part, _ in lowering.steps:
        if one.kind != "assign":
            assert {found.shape for found in lowering.parts[one].values()} == {part}


def test_replicas_agree_after_a_run():
    graph, _, variables = mlp_graph()
    lowering = Lowering(graph, MeshShape(2, 1, 2), Layout((("batch", "data"),)))
    lowering.run(arrays_of(0))
    for variable in variables:
        first, *others = lowering.parts[variable].values()
        assert all(np.array_equal(first, other) for other in others)


def test_two_variables_can_change_places():
    graph = Graph()
    first, second = (graph.variable((HIDDEN,), np.full(4, n)) for n in (1.0, 2.0))
    graph.assign(first, second)
    graph.assign(second, first)
    lowering = Lowering(graph, MeshShape(tensor=2), Layout((("hidden", "tensor"),)))
    lowering.run({})
    assert [lowering.export(one).tolist() for one in (first, second)] == [[2.0] * 4, [1.0] * 4]


@pytest.mark.parametrize(
    ("rules", "sizes", "named"),
    [
        ((("rows", "data"),), (2, 1, 1), "matches nothing"),
        ((("batch", "data"), ("hidden", "data")), (2, 1, 1), "both along 'data'"),
        ((("hidden", "tensor"),), (1, 1, 3), "tensor = 3, hidden = 4"),
    ],
)
def test_illegal_layouts_are_refused_when_the_graph_is_lowered(rules, sizes, named):
    graph, _, _ = mlp_graph()
    with pytest.raises(InputError, match=named):
        Lowering(graph, MeshShape(*sizes), Layout(rules))


def test_wrong_operations_and_arrays_are_refused():
    graph, _, (_, bias, w2) = mlp_graph()
    x = graph.tensors[0]
    for wrong in (
        lambda: graph.einsum((x, w2), (BATCH, Dimension("strange", 2))),
        lambda: graph.variable((Dimension("batch", 7),), np.zeros(7)),
        lambda: graph.import_array("square", (HIDDEN, HIDDEN)),
        lambda: graph.map(np.add, bias, w2),
        lambda: graph.assign(bias, w2),
        lambda: Lowering(graph, MeshShape(), Layout()).run({"x": np.zeros((6, 5))}),
        lambda: Lowering(graph, MeshShape(), Layout()).run({"x": np.zeros((5, 6))}),
    ):
        with pytest.raises(InputError):
            wrong()
