"""From one layout to another: the collective that each change of a tensor takes.

Chapter 09 has the table. Along one axis of the mesh a tensor is whole on every rank, or cut along
one of its dims, or a partial sum, of which every rank has a summand:

    from \\ to      whole        cut
    whole          nothing      nothing: each rank keeps its part
    cut            all_gather   all_to_all, if along another dim
    partial sum    all_reduce   reduce_scatter

slimlab.parallel.tensor_collectives has them with their gradients.

Production: DTensor calls the three Replicate, Shard and Partial, and redistribute does this; GSPMD
finds by itself where a change is needed.
"""

from collections.abc import Sequence

from slimlab.config import require
from slimlab.parallel.layout import Sharding
from slimlab.parallel.mesh import AXES


def change_collectives(
    before: Sharding, after: Sharding, *, partial: Sequence[str] = ()
) -> tuple[tuple[str, str], ...]:
    """Name the collectives that bring a tensor from one sharding to another.

    before   how it lies
    after    how it is to lie; its dims may have other names, such as position for sequence
    partial  axes along which it is a partial sum before; afterwards along none
    returns  (name of the collective, axis) for each axis along which something is sent, in the
             order of AXES

    Raises InputError for shardings of different numbers of dims, and for a partial sum along an
    axis that also cuts the tensor.
    """
    require(
        len(before.dims) == len(after.dims),
        f"two shardings of one tensor, with the {len(before.dims)} dims {before.dims}",
        f"{after.dims}",
        "give shardings with as many dims, in the same order",
    )
    found = [(_collective(axis, before, after, axis in partial), axis) for axis in AXES]
    return tuple((name, axis) for name, axis in found if name)


def _collective(axis: str, before: Sharding, after: Sharding, partial: bool) -> str | None:
    here, there = before.dim_along(axis), after.dim_along(axis)
    if partial:
        require(
            here is None,
            f"a tensor that is a partial sum along {axis!r} and cut along other axes",
            f"one whose dim {here} is cut along {axis!r} too",
            "an axis either cuts a tensor, or has summands of it",
        )
        return "all_reduce" if there is None else "reduce_scatter"
    if here is None or here == there:
        return None
    return "all_gather" if there is None else "all_to_all"
