"""Groups of ranks, and what their members must agree in.

Chapter 07 splits a world, chapter 11 makes a mesh of groups. Production libraries keep a table of
process groups by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimlab.config import require


@dataclass(frozen=True)
class Group:
    """Ranks that talk among themselves.

    context  tells groups of the same ranks apart
    ranks    of the world, in the order of their rank in the group
    """

    context: int
    ranks: tuple[int, ...]


def groups_of(
    wishes: Sequence[tuple[int | None, int]], ranks: Sequence[int], new_context: Callable[[], int]
) -> list[Group | None]:
    """Divide ranks into groups by color, ordered by key.

    wishes       color and key of every rank
    ranks        their ranks in the world
    new_context  gives each group a number of its own
    returns      the group of every rank, None for those without color
    """
    groups = {}
    for color in sorted({color for color, _ in wishes if color is not None}):
        members = [rank for rank, wish in enumerate(wishes) if wish[0] == color]
        members.sort(key=lambda rank: (wishes[rank][1], rank))
        groups[color] = Group(new_context(), tuple(ranks[rank] for rank in members))
    return [groups.get(color) for color, _ in wishes]


def check_exchange(sizes: Sequence[tuple[list[int], list[int]]]) -> None:
    """Check that what every rank sends is what the others are to receive.

    sizes  of every rank, rows for each rank and rows from each rank

    Raises InputError for the first pair that does not fit.
    """
    for src, (send_sizes, _) in enumerate(sizes):
        for dst, (_, recv_sizes) in enumerate(sizes):
            require(
                send_sizes[dst] == recv_sizes[src],
                f"all_to_all: recv_sizes[{src}] = {send_sizes[dst]} on rank {dst}, since rank "
                f"{src} sends it so many rows",
                f"recv_sizes[{src}] = {recv_sizes[src]}",
                "recv_sizes of a rank are what the others have for it in their send_sizes",
            )
