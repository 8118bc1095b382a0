"""Graders of the exercises of chapter 11, hybrid parallelism.

11.1, who talks with whom; 11.2, every tensor, each number once, stands in ch11_report.py and 11.3,
a layout for a cluster, in ch11_layout.py. The oracle of 11.1 writes down the coordinates of every
rank and looks which of them agree; the book's own mesh answers for the book's own order.

Production meshes (Megatron-LM's --use-tp-pp-dp-mapping, torch's DeviceMesh) are ordered by hand.
"""

from itertools import permutations, product

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch11_layout import layout
from slimlab.classroom.checks.ch11_report import whole_report
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_equal
from slimlab.parallel.mesh import AXES, MeshShape

__all__ = ["layout", "talks", "whole_report"]

ORDERS = (AXES, ("pipeline", "data", "tensor"), ("tensor", "data", "pipeline"))
# data, pipeline, tensor, ranks per host
MESHES = ((2, 3, 2, 4), (4, 2, 2, 8), (3, 2, 4, 4), (2, 2, 3, 4), (1, 4, 2, 4))
KEYS = ("tensor", "pipeline", "data", "same_rows", "table")
COSTS = (
    {"data": 1, "pipeline": 1, "tensor": 40},
    {"data": 9, "pipeline": 1, "tensor": 10},
    {"data": 1, "pipeline": 9, "tensor": 10},
    {"data": 8, "pipeline": 7, "tensor": 1},
    {"data": 0, "pipeline": 0, "tensor": 0},
)


def coordinates_in(order: tuple[str, ...], sizes: dict) -> list[dict]:
    """List the coordinates of all ranks, the last axis of the order fastest.

    order  the axes, the slowest first
    sizes  axis -> ranks along it
    """
    every = product(*(range(sizes[axis]) for axis in order))
    return [dict(zip(order, places)) for places in every]


def group_in(rank: int, order: tuple[str, ...], sizes: dict, axis: str) -> list[int]:
    """List the ranks whose coordinates differ from those of a rank along one axis at most.

    rank         whose group
    order, sizes  of the mesh
    axis         along which
    """
    every = coordinates_in(order, sizes)
    others = [one for one in order if one != axis]
    return [
        other
        for other, places in enumerate(every)
        if all(places[one] == every[rank][one] for one in others)
    ]


def groups_apart(order: tuple[str, ...], sizes: dict, axis: str, ranks_per_host: int) -> int:
    """Count the groups along an axis whose ranks are on several hosts.

    order, sizes, axis  as in group_in
    ranks_per_host      of each host
    """
    count = len(coordinates_in(order, sizes))
    groups = {tuple(group_in(rank, order, sizes, axis)) for rank in range(count)}
    return sum(len({rank // ranks_per_host for rank in group}) > 1 for group in groups)


def cheapest_order(sizes: dict, costs: dict, ranks_per_host: int) -> tuple[str, ...]:
    """Try all orders; return the cheapest, the first of equals.

    sizes, costs    of the axes
    ranks_per_host  of each host
    """
    found = []
    for order in permutations(AXES):
        apart = {axis: groups_apart(order, sizes, axis, ranks_per_host) for axis in AXES}
        found.append((sum(costs[axis] * sizes[axis] * apart[axis] for axis in AXES), order))
    return min(found)[1]


def meshes() -> list[tuple[dict, int]]:
    """List the meshes that are tried: sizes, and ranks per host."""
    return [(dict(zip(AXES, sizes)), per_host) for *sizes, per_host in MESHES]


def draw_mesh(rng) -> dict:
    """Draw a mesh and a rank for 11.1; rng is a random.Random."""
    shape = MeshShape(*rng.choice([(3, 4, 2), (2, 4, 3), (4, 3, 2), (2, 3, 4), (3, 3, 2)]))
    stage = rng.choice([0, shape.pipeline - 1])
    place = (rng.randrange(1, shape.data), stage, rng.randrange(shape.tensor))
    return {"sizes": dict(zip(AXES, shape.sizes)), "rank": shape.position_of(place)}


talks = Exercise(
    "11.1",
    "Who talks with whom",
    requires=("group_of", "groups_between_hosts", "best_order", "my_prediction"),
    stars=1,
    instance=draw_mesh,
    hints=(
        "One step along an axis goes past as many ranks as all faster axes have together.",
        "Where is a rank along its axis? Divide by that step, and take what is left when you "
        "divide by the axis's size.",
        "Ranks of a group increase: if the first and the last are on one host, all are.",
        "best_order: there are six orders. Write the cost of one, then take the least.",
        "same_rows: ranks that differ along data read other rows. table: a part of the table is on "
        "two stages of every replica.",
    ),
)


def ranks_of(found: object, what: str) -> list[int]:
    """Return a list of ranks; fail unless it is a list of whole numbers.

    found, what  the list, and what it is, for the message
    """
    look = "its last line: a list of ranks"
    expect(isinstance(found, list | tuple), f"{what}: {form_of(found)}", "a list", look)
    return [whole_number(one, what, look) for one in found]


@talks.property("the ranks of a group", points=2)
def _(student, numbers):
    function = function_of(student, "group_of")
    for order in ORDERS:
        for sizes, _ in meshes()[:3]:
            for rank in range(0, len(coordinates_in(order, sizes)), 3):
                for axis in AXES:
                    what = f"group_of({rank}, {order}, {sizes}, {axis!r})"
                    saw = ranks_of(function(rank, order, dict(sizes), axis), what)
                    look = "the step from one rank of the group to the next, and where it begins"
                    expect_equal(saw, group_in(rank, order, sizes, axis), what, look)


@talks.property("the groups between hosts", points=2)
def _(student, numbers):
    function = function_of(student, "groups_between_hosts")
    for order in ORDERS:
        for sizes, per_host in meshes():
            for axis in AXES:
                what = f"groups_between_hosts({order}, {sizes}, {axis!r}, {per_host})"
                saw = whole_number(function(order, dict(sizes), axis, per_host), what, "int")
                look = "count each group once, and only if its ranks are on several hosts"
                expect_equal(saw, groups_apart(order, sizes, axis, per_host), what, look)


@talks.property("the order that costs least", points=2)
def _(student, numbers):
    function = function_of(student, "best_order")
    for costs in COSTS:
        for sizes, per_host in meshes():
            what = f"best_order({sizes}, {costs}, {per_host})"
            saw = function(dict(sizes), dict(costs), per_host)
            expect(isinstance(saw, list | tuple), f"{what}: {form_of(saw)}", "an order", "tuple")
            wanted = cheapest_order(sizes, costs, per_host)
            look = "groups that leave a host, ranks and cost of each axis; equals by alphabet"
            expect_equal(tuple(saw), wanted, what, look)


@talks.property("your prediction by hand was right", points=2)
def _(student, numbers):
    shape, rank = MeshShape(**numbers["sizes"]), numbers["rank"]
    replica, stage, part = shape.coordinates_at(rank)
    every = [shape.coordinates_at(one) for one in range(shape.world_size)]
    ends = (0, shape.pipeline - 1)
    wanted = {axis: list(shape.positions_along(axis, rank)) for axis in AXES}
    wanted["same_rows"] = [one for one, place in enumerate(every) if place[0] == replica]
    wanted["table"] = [
        one for one, place in enumerate(every) if place[1] in ends and place[2] == part
    ]
    looks = {
        "tensor": "the fastest axis: ranks that follow each other",
        "pipeline": "a step of as many ranks as the tensor group has",
        "data": "a step of a whole replica",
        "same_rows": "stages and parts of one replica see the same rows",
        "table": "both ends of every replica, at this place along tensor",
    }
    saw = function_of(student, "my_prediction")()
    form = f"a dictionary with the keys {', '.join(KEYS)}"
    fits = isinstance(saw, dict) and set(KEYS) <= set(saw)
    expect(fits, f"my_prediction(): {form_of(saw)}", form, "its last line")
    for key in KEYS:
        what = f"my_prediction()[{key!r}]"
        expect_equal(ranks_of(saw[key], what), wanted[key], what, looks[key])
