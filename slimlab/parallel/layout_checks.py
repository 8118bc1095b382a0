"""What makes a layout illegal: each case with its numbers and the nearest choice that is legal.

Chapter 09 tries each of them. All are found from names and sizes, before anything is communicated
and on every rank alike.

Production: Mesh-TensorFlow refuses the same cases, but for a rule that matches nothing, which it
ignores. GSPMD and DTensor also accept sizes that do not divide: they pad, or leave ranks with less.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from slimlab.config import InputError, check_choice, require
from slimlab.parallel.mesh import AXES, MeshShape


def check_rules(rules: object) -> None:
    """Refuse what is no list of rules.

    rules  pairs (name of a tensor dim, name of a mesh axis), each dim once

    Raises InputError for other things than pairs of names, an axis that no mesh has, and a dim that
    stands in two rules.
    """
    seen = {}
    for rule in rules if isinstance(rules, Sequence) else [rules]:
        pair = isinstance(rule, Sequence) and not isinstance(rule, str) and len(rule) == 2
        if not (pair and all(isinstance(name, str) for name in rule)):
            raise InputError(
                "rules: pairs of a tensor dim and a mesh axis",
                f"{rule!r}",
                'write Layout(rules=(("heads", "tensor"), ("vocabulary", "tensor")))',
            )
        dim, axis = rule
        if any(mark in dim + axis for mark in "./:"):
            raise InputError(
                "rules: pairs of a tensor dim and a mesh axis; each cuts all tensors with the dim",
                f"({dim!r}, {axis!r}), which looks like a layer and a device",
                'write ("heads", "tensor"); which layer lives on which device is said by a '
                "slimlab.parallel.placement.Placement",
            )
        check_choice(f"the axis for {dim!r}", axis, AXES)
        if dim in seen:
            raise InputError(
                "rules: each tensor dim once",
                f"({dim!r}, {seen[dim]!r}) and ({dim!r}, {axis!r})",
                "leave one of the two rules out",
            )
        seen[dim] = axis


def check_matches(rules: Sequence[tuple[str, str]], dims: Iterable[str]) -> None:
    """Refuse a rule for a dim that nothing has: usually a name that was misspelt.

    rules  pairs (dim, axis)
    dims   the names of all dims of the model's parameters and activations

    Raises InputError that names the nearest dim and lists all.
    """
    dims = sorted(set(dims))
    for dim, axis in rules:
        near = difflib.get_close_matches(dim, dims, n=1, cutoff=0.5)
        require(
            dim in dims,
            f"rules for dims that this model has: {', '.join(dims)}",
            f"({dim!r}, {axis!r}), which matches nothing",
            f"write ({near[0]!r}, {axis!r})" if near else "leave the rule out",
        )


def check_axes(name: str, dims: Sequence[str], axes: Sequence[str | None]) -> None:
    """Refuse two dims of one tensor on one mesh axis: a rank would hold a diagonal block alone.

    name  of the tensor, for the message
    dims  names of its dims
    axes  the mesh axis of each, or None

    Raises InputError.
    """
    for place, (dim, axis) in enumerate(zip(dims, axes)):
        if axis is None or axis not in axes[:place]:
            continue
        other = dims[axes.index(axis)]
        free = next((one for one in AXES if one not in axes), None)
        instead = f"lay {dim!r} along {free!r}, or " if free else ""
        raise InputError(
            f"at most one dim of {name} {tuple(dims)} per mesh axis",
            f"{other!r} and {dim!r} both along {axis!r}",
            f"{instead}leave the rule for {dim!r} or for {other!r} out",
        )


def check_sizes(
    sizes: Mapping[str, int],
    axis_of: Mapping[str, str],
    shape: MeshShape,
    size_names: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse an axis whose size does not divide every dim that lies along it.

    sizes       dim -> size, in what may not be cut: whole heads, elements of other dims
    axis_of     dim -> mesh axis, for each dim that lies along one
    shape       sizes of the mesh
    size_names  dim -> what its size is called, for the message

    Raises InputError that names the nearest sizes of the axis that divide all dims along it, and
    the nearest sizes of the dim.
    """
    for dim, axis in axis_of.items():
        ranks, size = getattr(shape, axis), sizes[dim]
        if size % ranks == 0:
            continue
        name = size_names.get(dim, dim)
        common = math.gcd(*(sizes[other] for other in axis_of if axis_of[other] == axis))
        low = size // ranks * ranks
        raise InputError(
            f"a mesh whose axis {axis!r} divides {name}, since {dim!r} lies along it",
            f"{axis} = {ranks}, {name} = {size}, remainder {size % ranks}",
            f"give {nearest_divisors(axis, ranks, common)}; or make {name} "
            f"{f'{low} or ' if low else ''}{low + ranks}; or leave the rule for {dim!r} out",
        )


def nearest_divisors(name: str, asked: int, whole: int) -> str:
    """Write the divisors nearest to a number that does not divide, as "tensor=2 or tensor=4".

    name   of what is chosen
    asked  what was given
    whole  what must be divided
    """
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    below = [n for n in divisors if n <= asked][-1:]
    above = [n for n in divisors if n > asked][:1]
    return " or ".join(f"{name}={n}" for n in below + above)
