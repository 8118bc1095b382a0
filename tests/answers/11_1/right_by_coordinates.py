from itertools import permutations

from slimlab.classroom.check import numbers


def place_of(rank, order, sizes):
    """Axis -> where a rank is."""
    place = {}
    for axis in reversed(order):
        rank, place[axis] = divmod(rank, sizes[axis])
    return place


def group_of(rank, order, sizes, axis):
    count = sizes["data"] * sizes["pipeline"] * sizes["tensor"]
    mine = place_of(rank, order, sizes) | {axis: None}
    return [one for one in range(count) if place_of(one, order, sizes) | {axis: None} == mine]


def groups_between_hosts(order, sizes, axis, ranks_per_host):
    count = 0
    for rank in range(sizes["data"] * sizes["pipeline"] * sizes["tensor"]):
        group = group_of(rank, order, sizes, axis)
        count += rank == group[0] and len({one // ranks_per_host for one in group}) > 1
    return count


def best_order(sizes, costs, ranks_per_host):
    best = None
    for order in sorted(permutations(["data", "pipeline", "tensor"])):
        cost = 0
        for axis in order:
            apart = groups_between_hosts(order, sizes, axis, ranks_per_host)
            cost += costs[axis] * sizes[axis] * apart
        if best is None or cost < best[0]:
            best = cost, order
    return list(best[1])


def my_prediction():
    given = numbers("11.1")
    sizes, order = given["sizes"], ("data", "pipeline", "tensor")
    every = [place_of(rank, order, sizes) for rank in range(len(order) ** 4)]
    every = every[: sizes["data"] * sizes["pipeline"] * sizes["tensor"]]
    mine = every[given["rank"]]
    found = {axis: group_of(given["rank"], order, sizes, axis) for axis in order}
    rows = [rank for rank, one in enumerate(every) if one["data"] == mine["data"]]
    ends = {0, sizes["pipeline"] - 1}
    table = [
        rank
        for rank, one in enumerate(every)
        if one["pipeline"] in ends and one["tensor"] == mine["tensor"] and mine["pipeline"] in ends
    ]
    return {**found, "same_rows": rows, "table": table}
