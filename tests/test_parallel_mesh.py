"""The mesh: coordinates, groups along its axes, placement by host, sizes that do not fit."""

import itertools

import comm_runtimes
import pytest
import torch

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError
from slimlab.parallel.mesh import AXES, Mesh, MeshShape, nearest_shape, ranks_by_host

SHAPES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 3), (2, 1, 2), (2, 3, 1), (2, 2, 2)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_every_position_has_coordinates_of_its_own_and_tensor_counts_fastest(sizes):
    shape = MeshShape(*sizes)
    found = [shape.coordinates_at(position) for position in range(shape.world_size)]
    assert found == list(itertools.product(*map(range, sizes)))
    assert [shape.position_of(one) for one in found] == list(range(shape.world_size))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("sizes", SHAPES)
def test_the_groups_along_an_axis_are_the_lines_of_the_grid(sizes, axis):
    shape, place = MeshShape(*sizes), AXES.index(axis)
    grid = torch.arange(shape.world_size).view(sizes)
    lines = grid.movedim(place, -1).reshape(-1, sizes[place]).tolist()
    for position in range(shape.world_size):
        (line,) = [line for line in lines if position in line]
        assert shape.positions_along(axis, position) == tuple(line)


def groups_of(comm, sizes, hosts=None):
    mesh = Mesh(comm, MeshShape(*sizes), hosts=hosts)
    found = {}
    for axis in AXES:
        group = mesh.group(axis)
        ranks = group.all_gather(torch.tensor([comm.rank])).tolist()
        found[axis] = (group.rank, tuple(ranks))
    return mesh.coordinates, found, mesh.rank_at(*mesh.coordinates), mesh.coordinates_of(comm.rank)


@pytest.mark.parametrize("runtime", ["threads", "gloo", "mpich"])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 1, 2)])
def test_ranks_meet_along_each_axis_also_along_one_of_size_one(runtime, sizes):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(groups_of, 2, backend=backend, args=(sizes,))
    check_groups(results, sizes, (0, 1))


@pytest.mark.parametrize("sizes", SHAPES)
def test_ranks_on_threads_meet_along_each_axis(sizes):
    world_size = MeshShape(*sizes).world_size
    check_groups(run_ranks(groups_of, world_size, args=(sizes,)), sizes, range(world_size))


@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_where_ranks_were_dealt_out_to_hosts_in_turn_tensor_groups_stay_on_one(sizes):
    hosts = ("b", "a", "b", "a")
    assert ranks_by_host(hosts) == (0, 2, 1, 3)
    results = run_ranks(groups_of, 4, args=(sizes, hosts))
    check_groups(results, sizes, (0, 2, 1, 3))
    if sizes[2] == 2:
        assert all(found["tensor"][1] in ((0, 2), (1, 3)) for _, found, *_ in results)


def check_groups(results, sizes, ranks):
    shape = MeshShape(*sizes)
    for rank, (coordinates, found, same_rank, same_coordinates) in enumerate(results):
        position = list(ranks).index(rank)
        assert coordinates == same_coordinates == shape.coordinates_at(position)
        assert same_rank == rank
        for place, axis in enumerate(AXES):
            group = [ranks[one] for one in shape.positions_along(axis, position)]
            assert found[axis] == (coordinates[place], tuple(group))


def test_groups_that_cross_hosts_are_counted():
    def program(comm):
        mesh = Mesh(comm, MeshShape(data=2, tensor=2), hosts=[0, 0, 0, 1])
        return [mesh.groups_across_hosts(axis) for axis in AXES]

    # Tensor groups 0 1 and 2 3; data groups 0 2 and 1 3; each stage is alone.
    assert run_ranks(program, 4) == [[1, 0, 1]] * 4


def test_ranks_that_ask_for_their_hosts_send_8_bytes_and_find_one():
    def program(comm):
        mesh = Mesh(comm, MeshShape(data=3))
        return len(set(mesh.hosts)), mesh.ranks

    results = run_ranks(program, 3)
    assert results == [(1, (0, 1, 2))] * 3
    for ledger in results.ledgers:
        assert (ledger.num_calls(), ledger.total_bytes()) == (1, 8)


@pytest.mark.parametrize(
    ("asked", "world_size", "near"),
    [
        ((2, 1, 3), 4, (2, 1, 2)),
        ((2, 2, 2), 4, (1, 2, 2)),
        ((3, 1, 2), 8, (4, 1, 2)),
        ((1, 1, 1), 7, (7, 1, 1)),
        ((8, 1, 1), 6, (6, 1, 1)),
        ((2, 2, 1), 4, (2, 2, 1)),
    ],
)
def test_the_nearest_mesh_changes_least_and_rather_data_than_tensor(asked, world_size, near):
    assert nearest_shape(MeshShape(*asked), world_size) == MeshShape(*near)


def test_a_mesh_that_does_not_use_up_the_ranks_is_refused_with_the_nearest_that_does():
    def program(comm):
        with pytest.raises(InputError) as caught:
            Mesh(comm, MeshShape(data=3, tensor=2))
        return str(caught.value)

    results = run_ranks(program, 4)
    assert len(set(results)) == 1
    for part in ("world_size = 4", "3 x 1 x 2 = 6", "data=2, pipeline=1, tensor=2", "6 ranks"):
        assert part in results[0]
    assert all(not ledger.entries for ledger in results.ledgers)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: MeshShape(data=0), "data = 0"),
        (lambda: MeshShape(tensor=True), "tensor = True"),
        (lambda: MeshShape(2).coordinates_at(2), "from 0 to 1"),
        (lambda: MeshShape(2).position_of((0, 1, 0)), r"\(0, 1, 0\)"),
        (lambda: MeshShape(2).positions_along("model", 0), "data, pipeline, tensor"),
        (lambda: nearest_shape(MeshShape(), 0), "world_size = 0"),
    ],
)
def test_what_a_mesh_does_not_have_is_named(wrong, named):
    with pytest.raises(InputError, match=named):
        wrong()


def test_ranks_axes_and_hosts_that_are_not_there_are_named():
    def program(comm):
        mesh = Mesh(comm, MeshShape(data=2))
        for wrong in (
            lambda: mesh.group("model"),
            lambda: mesh.coordinates_of(2),
            lambda: mesh.rank_at(tensor=1),
            lambda: mesh.groups_across_hosts("rows"),
            lambda: Mesh(comm, MeshShape(data=2), hosts=["a"]),
        ):
            with pytest.raises(InputError):
                wrong()

    run_ranks(program, 2)
