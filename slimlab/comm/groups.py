"""Groups of ranks, and what their members must agree in.

Chapter 07 splits a world, chapter 11 makes a mesh of groups. Production libraries keep a table of
process groups by name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimlab.comm.report import MismatchError


@dataclass(frozen=True)
class Group:
    """Ranks that talk among themselves.

    context  tells groups of the same ranks apart
    ranks    of the world, in the order of their rank in the group
    """

    context: int
    ranks: tuple[int, ...]


def groups_of(
    wishes: Sequence[tuple[int | None, int]],
    ranks: Sequence[int],
    new_group: Callable[[tuple[int, ...]], Group],
) -> list[Group | None]:
    """Divide ranks into groups by color, ordered by key.

    wishes     color and key of every rank
    ranks      their ranks in the world
    new_group  makes a group of its ranks of the world; called in the order of the colors
    returns    the group of every rank, None for those without color
    """
    groups = {}
    for color in sorted({color for color, _ in wishes if color is not None}):
        members = [rank for rank, wish in enumerate(wishes) if wish[0] == color]
        members.sort(key=lambda rank: (wishes[rank][1], rank))
        groups[color] = new_group(tuple(ranks[rank] for rank in members))
    return [groups.get(color) for color, _ in wishes]


def check_exchange(sizes: Sequence[tuple[list[int], list[int]]]) -> None:
    """Check that what every rank sends is what the others are to receive.

    sizes  of every rank, rows for each rank and rows from each rank

    Raises MismatchError for the first pair that does not fit.
    """
    for src, (send_sizes, _) in enumerate(sizes):
        for dst, (_, recv_sizes) in enumerate(sizes):
            if send_sizes[dst] != recv_sizes[src]:
                raise MismatchError(
                    f"all_to_all: rank {src} sends {send_sizes[dst]} rows to rank {dst}, which "
                    f"expects {recv_sizes[src]} (its recv_sizes[{src}])\n"
                    "change: let recv_sizes of each rank be what the others have for it in their "
                    "send_sizes"
                )
