"""The mesh: ranks in a grid with axes data, pipeline and tensor, and a group along each axis.

Chapter 08 uses the axis data, chapters 09 and 10 the others, chapter 11 all three at once. Tensor
parallelism talks in every layer, so its ranks stand next to each other, on one host where they fit;
pipeline stages come next, and replicas, which talk once per step, stand farthest apart.

Production: torch's DeviceMesh, Megatron-LM's parallel_state. They have more axes (context, expert)
and trust that the launcher numbers the ranks host by host; here the hosts are asked.
"""

import hashlib
import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slimlab.comm.base import Communicator
from slimlab.config import check_choice, check_size, require

AXES = ("data", "pipeline", "tensor")  # the outermost first: tensor coordinates change fastest


@dataclass(frozen=True)
class MeshShape:
    """How many ranks each axis has; positions count through the grid, tensor fastest.

    data      replicas that see different data
    pipeline  stages that hold different layers
    tensor    ranks that share every layer

    Raises InputError if a size is not a whole number of at least 1.
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            check_size(axis, getattr(self, axis))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes in the order of AXES."""
        return self.data, self.pipeline, self.tensor

    @property
    def world_size(self) -> int:
        """The ranks that such a mesh needs."""
        return math.prod(self.sizes)

    def coordinates_at(self, position: int) -> tuple[int, int, int]:
        """Return the coordinates of a position, in the order of AXES.

        position  from 0 to world_size - 1

        Raises InputError for another position.
        """
        whole = isinstance(position, int) and not isinstance(position, bool)
        require(
            whole and 0 <= position < self.world_size,
            f"a position from 0 to {self.world_size - 1}, for {self}",
            f"{position!r}",
            "count the positions from 0",
        )
        replica, rest = divmod(position, self.pipeline * self.tensor)
        return (replica, *divmod(rest, self.tensor))

    def position_of(self, coordinates: Sequence[int]) -> int:
        """Return the position that has these coordinates; undoes coordinates_at.

        coordinates  in the order of AXES

        Raises InputError for coordinates that are outside.
        """
        fits = len(coordinates) == len(AXES) and all(
            isinstance(at, int) and 0 <= at < size for at, size in zip(coordinates, self.sizes)
        )
        require(
            fits,
            f"coordinates (data, pipeline, tensor), each from 0 and below {self.sizes}",
            f"{tuple(coordinates)}",
            "give three whole numbers, the sizes less 1 at most",
        )
        replica, stage, part = coordinates
        return (replica * self.pipeline + stage) * self.tensor + part

    def positions_along(self, axis: str, position: int) -> tuple[int, ...]:
        """Return the positions that differ from one at most along an axis: its group.

        axis      "data", "pipeline" or "tensor"
        position  of any member

        Raises InputError for another axis or position.
        """
        check_choice("axis", axis, AXES)
        here, place = self.coordinates_at(position), AXES.index(axis)
        return tuple(
            self.position_of((*here[:place], at, *here[place + 1 :]))
            for at in range(self.sizes[place])
        )


def check_mesh(shape: MeshShape, world_size: int) -> None:
    """Refuse a mesh that does not use up the ranks, and name the one nearest to it that does.

    shape       what was asked for
    world_size  number of ranks

    Raises InputError.
    """
    product = " x ".join(str(size) for size in shape.sizes)
    near = nearest_shape(shape, world_size)
    require(
        shape.world_size == world_size,
        f"data x pipeline x tensor = world_size = {world_size}",
        f"{product} = {shape.world_size}",
        f"give data={near.data}, pipeline={near.pipeline}, tensor={near.tensor}, or start "
        f"{shape.world_size} ranks",
    )


def nearest_shape(shape: MeshShape, world_size: int) -> MeshShape:
    """Return the mesh of this world whose sizes are nearest to those asked for.

    shape       what was asked for
    world_size  number of ranks
    returns     the shape with the least sum of |log(size / asked size)|; of equals the one that
                keeps tensor, then pipeline, as asked

    Raises InputError if world_size is not at least 1.
    """
    check_size("world_size", world_size)
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]

    def distance(one: MeshShape) -> tuple[float, float, float]:
        logs = [abs(math.log(size / asked)) for size, asked in zip(one.sizes, shape.sizes)]
        return round(sum(logs), 9), logs[2], logs[1]

    fitting = [
        MeshShape(world_size // (pipeline * tensor), pipeline, tensor)
        for tensor in divisors
        for pipeline in divisors
        if world_size % (pipeline * tensor) == 0
    ]
    return min(fitting, key=distance)


def ranks_by_host(hosts: Sequence[object]) -> tuple[int, ...]:
    """Return the ranks in an order in which those of one host stand together.

    hosts    the host of every rank
    returns  ranks, hosts in the order of their first rank: unchanged where a launcher fills one
             host after the other, gathered where it deals the ranks out in turn
    """
    first = {}
    for rank, host in enumerate(hosts):
        first.setdefault(host, rank)
    return tuple(sorted(range(len(hosts)), key=lambda rank: (first[hosts[rank]], rank)))


class Mesh:
    """One rank's place in the grid, and the groups that it belongs to.

    comm    of all ranks
    shape   sizes of the axes; their product is comm.world_size
    hosts   the host of every rank, the same list on all; None: every rank asks its own

    shape, hosts  as given, hosts as numbers if they were asked
    ranks         ranks[p] is the rank at position p
    position      of this rank
    coordinates   of this rank, in the order of AXES

    Communicates: one all_gather of 8 bytes if hosts is None, then a split per axis.
    Raises InputError, before it communicates, if the sizes do not multiply to the number of ranks
    or hosts are not one per rank.
    """

    def __init__(
        self, comm: Communicator, shape: MeshShape, *, hosts: Sequence[object] | None = None
    ):
        check_mesh(shape, comm.world_size)
        require(
            hosts is None or len(hosts) == comm.world_size,
            f"hosts: one per rank, {comm.world_size}",
            f"{hosts}",
            "leave hosts out: the ranks ask where they are",
        )
        self.comm, self.shape = comm, shape
        self.hosts = _hosts(comm) if hosts is None else tuple(hosts)
        self.ranks = ranks_by_host(self.hosts)
        self.position = self.ranks.index(comm.rank)
        self.coordinates = shape.coordinates_at(self.position)
        self._groups = {}
        for place, axis in enumerate(AXES):
            color = shape.positions_along(axis, self.position)[0]
            self._groups[axis] = comm.split(color, key=self.coordinates[place])

    def group(self, axis: str) -> Communicator:
        """Return the communicator of the ranks that differ from this one along an axis alone.

        axis     "data", "pipeline" or "tensor"
        returns  a group in which this rank's number is its coordinate; of one rank if the axis has
                 size 1

        Raises InputError for another axis.
        """
        check_choice("axis", axis, AXES)
        return self._groups[axis]

    def rank_at(self, data: int = 0, pipeline: int = 0, tensor: int = 0) -> int:
        """Return the rank that has these coordinates.

        data, pipeline, tensor  coordinates, from 0

        Raises InputError for coordinates that are outside.
        """
        return self.ranks[self.shape.position_of((data, pipeline, tensor))]

    def coordinates_of(self, rank: int) -> tuple[int, int, int]:
        """Return the coordinates of a rank, in the order of AXES; undoes rank_at.

        rank  of the communicator that the mesh was made of

        Raises InputError for a rank that is not there.
        """
        require(
            rank in self.ranks,
            f"a rank from 0 to {len(self.ranks) - 1}",
            f"{rank!r}",
            "give a rank of the communicator that the mesh was made of",
        )
        return self.shape.coordinates_at(self.ranks.index(rank))

    def groups_across_hosts(self, axis: str) -> int:
        """Count the groups along an axis whose ranks are on more than one host.

        axis     "data", "pipeline" or "tensor"
        returns  0 for tensor, unless its size does not divide the ranks of each host

        Raises InputError for another axis.
        """
        check_choice("axis", axis, AXES)
        positions = range(self.shape.world_size)
        groups = {self.shape.positions_along(axis, position) for position in positions}
        return sum(len({self.hosts[self.ranks[p]] for p in group}) > 1 for group in groups)


def _hosts(comm: Communicator) -> tuple[int, ...]:
    # Names have any length, a digest has 8 bytes, of which the sign bit stays free.
    digest = hashlib.sha256(socket.gethostname().encode()).digest()
    mine = torch.tensor([int.from_bytes(digest[:8]) >> 1], device=comm.device)
    return tuple(comm.all_gather(mine).tolist())
