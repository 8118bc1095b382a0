"""The layout: rules from names of tensor dims to mesh axes, and what each rank then holds.

Chapter 09 explains it, slimlab.parallel.tensor applies it. A rule ("heads", "tensor") cuts every
tensor that has a dim of that name into as many equal parts as the axis has ranks; what no rule
names is whole on every rank. A layout decides who holds and who sends what, never what comes out.
It cuts tensors and places no layers: slimlab.parallel.placement has the table that does.

Production: Mesh-TensorFlow's LayoutRules; PartitionSpec of GSPMD and jax.sharding, with Flax's
rules for "logical axes"; DTensor, which names numbers of dims (Shard(0)), module by module.
Shazeer et al. 2018 (arXiv:1811.02084), section 3; Xu et al. 2021 (arXiv:2105.04663).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from slimlab.config import InputError, require
from slimlab.parallel.layout_checks import check_axes, check_matches, check_rules, check_sizes
from slimlab.parallel.layout_names import (
    ACTIVATIONS,
    SIZE_NAMES,
    dimensions_of,
    sizes_of,
)
from slimlab.parallel.mesh import AXES, MeshShape

__all__ = [
    "SEQUENCE_PARALLEL",
    "TENSOR_PARALLEL",
    "Layout",
    "Sharding",
    "activation_shardings",
    "dimensions_of",
    "dtensor_placements",
    "local_shape",
    "local_slices",
    "product_collectives",
    "shardings",
]


@dataclass(frozen=True)
class Sharding:
    """How one tensor lies on the mesh.

    dims  names of its dims
    axes  for each dim the mesh axis along which it is cut, or None: whole
    """

    dims: tuple[str, ...]
    axes: tuple[str | None, ...]

    def dim_along(self, axis: str) -> int | None:
        """Return the number of the dim that is cut along a mesh axis; None: the axis has replicas.

        axis  "data", "pipeline" or "tensor"
        """
        return self.axes.index(axis) if axis in self.axes else None


@dataclass(frozen=True)
class Layout:
    """Rules that say along which mesh axis each dim is cut.

    rules  pairs (name of a tensor dim, name of a mesh axis). Dims of parameters are vocabulary,
           position, segment, model, heads, kv_heads, feed_forward; of activations batch, sequence
           and position too (slimlab.parallel.layout_names)

    Raises InputError for other things than pairs of names, an unknown axis, a dim in two rules.
    """

    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        check_rules(self.rules)
        object.__setattr__(self, "rules", tuple((dim, axis) for dim, axis in self.rules))

    def axis_of(self, dim: str) -> str | None:
        """Return the mesh axis along which a dim is cut, or None.

        dim  name of a tensor dim
        """
        return dict(self.rules).get(dim)

    def sharding_of(self, dims: Sequence[str]) -> Sharding:
        """Apply the rules to a tensor.

        dims  names of its dims

        Raises InputError if two of them lie along one mesh axis.
        """
        axes = tuple(self.axis_of(dim) for dim in dims)
        check_axes("a tensor", dims, axes)
        return Sharding(tuple(dims), axes)

    def with_rules(self, *rules: tuple[str, str]) -> "Layout":
        """Return a layout with more rules.

        rules  pairs as in Layout
        """
        return Layout((*self.rules, *rules))


TENSOR_PARALLEL = Layout(
    (
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("feed_forward", "tensor"),
        ("vocabulary", "tensor"),
    )
)
SEQUENCE_PARALLEL = TENSOR_PARALLEL.with_rules(("sequence", "tensor"))


def shardings(model: nn.Module, layout: Layout, mesh_shape: MeshShape) -> dict[str, Sharding]:
    """Apply the rules to every parameter of a model.

    model       one of the book's, also on the device meta
    layout      the rules
    mesh_shape  sizes of the axes
    returns     name of the parameter -> Sharding, in the order of named_parameters(); a tied table
                once. The same on every rank

    Raises InputError if a rule matches neither a parameter nor an activation, two dims of a tensor
    lie along one axis, or an axis does not divide a dim (heads count whole).
    """
    dims = dimensions_of(model)
    used = {dim for names in dims.values() for dim in names}
    check_matches(layout.rules, used.union(*ACTIVATIONS.values()))
    sizes = {dim: size for dim, size in sizes_of(model).items() if dim in used}
    check_sizes(sizes, _cut(layout, sizes), mesh_shape, SIZE_NAMES)
    return _shardings(layout, dims)


def activation_shardings(
    model: nn.Module, layout: Layout, mesh_shape: MeshShape, *, batch_size: int, seq_len: int
) -> dict[str, Sharding]:
    """Apply the rules to what flows between the layers of a model.

    model       one of the book's
    layout      the rules
    mesh_shape  sizes of the axes
    batch_size  B, sequences of all ranks together
    seq_len     T, tokens of a sequence
    returns     "stream" (between sub-layers), "queries", "keys", "hidden" (inside the feed-forward
                layer) and "logits" -> Sharding

    Raises InputError as shardings does.
    """
    shardings(model, layout, mesh_shape)
    sizes = sizes_of(model)
    sizes |= {"batch": batch_size, "sequence": seq_len, "position": seq_len}
    sizes = {dim: sizes[dim] for names in ACTIVATIONS.values() for dim in names}
    names = SIZE_NAMES | {"batch": "batch_size", "sequence": "seq_len"}
    check_sizes(sizes, _cut(layout, sizes), mesh_shape, names)
    return _shardings(layout, ACTIVATIONS)


def _cut(layout: Layout, sizes: Mapping[str, int]) -> dict[str, str]:
    return {dim: axis for dim, axis in layout.rules if dim in sizes}


def _shardings(layout: Layout, dims: Mapping[str, tuple[str, ...]]) -> dict[str, Sharding]:
    found = {}
    for name, names in dims.items():
        axes = tuple(layout.axis_of(dim) for dim in names)
        check_axes(name, names, axes)
        found[name] = Sharding(names, axes)
    return found


def local_shape(shape: Sequence[int], sharding: Sharding, mesh_shape: MeshShape) -> tuple[int, ...]:
    """Return the shape of the part that one rank holds, the same on every rank.

    shape       of the whole tensor
    sharding    how it lies
    mesh_shape  sizes of the axes

    Raises InputError if the tensor has other dims, or an axis does not divide one.
    """
    return tuple(part for _, part in _parts(shape, sharding, mesh_shape))


def local_slices(
    shape: Sequence[int], sharding: Sharding, mesh_shape: MeshShape, coordinates: Sequence[int]
) -> tuple[slice, ...]:
    """Return which part of a tensor the rank with these coordinates holds: whole[slices].

    shape        of the whole tensor
    sharding     how it lies
    mesh_shape   sizes of the axes
    coordinates  of the rank, in the order of AXES

    Raises InputError as local_shape does, and for coordinates outside the mesh.
    """
    mesh_shape.position_of(coordinates)
    parts = _parts(shape, sharding, mesh_shape)
    places = [0 if axis is None else coordinates[AXES.index(axis)] for axis, _ in parts]
    return tuple(slice(at * part, (at + 1) * part) for at, (_, part) in zip(places, parts))


def _parts(
    shape: Sequence[int], sharding: Sharding, mesh_shape: MeshShape
) -> list[tuple[str | None, int]]:
    require(
        len(shape) == len(sharding.dims),
        f"a tensor with the dims {sharding.dims}",
        f"the shape {tuple(shape)}",
        "give the shape of the whole tensor that the sharding belongs to",
    )
    check_sizes(
        dict(zip(sharding.dims, shape)),
        {dim: axis for dim, axis in zip(sharding.dims, sharding.axes) if axis},
        mesh_shape,
    )
    sizes = [1 if axis is None else getattr(mesh_shape, axis) for axis in sharding.axes]
    return [(axis, n // size) for axis, n, size in zip(sharding.axes, shape, sizes)]


def dtensor_placements(sharding: Sharding) -> tuple:
    """Say the same to torch's DTensor, on a DeviceMesh with mesh_dim_names=AXES.

    sharding  how a tensor lies
    returns   one placement per axis of the mesh: Shard(number of the dim) or Replicate()
    """
    from torch.distributed.tensor import Replicate, Shard  # takes a second, most never need it

    dims = [sharding.dim_along(axis) for axis in AXES]
    return tuple(Replicate() if dim is None else Shard(dim) for dim in dims)


def product_collectives(
    left: Sequence[str], right: Sequence[str], result: Sequence[str], layout: Layout
) -> tuple[tuple[str, str], ...]:
    """Name the collectives that make a product of two laid-out tensors whole.

    A rank multiplies its parts. Where a dim over which the product sums is cut, its result is a
    partial sum, and an all_reduce along that dim's axis adds the others'. One name has one axis, so
    both factors are always cut alike, and nothing else is to be sent.

    left     names of the dims of one factor
    right    of the other factor
    result   of the product; sums run over the dims that are missing here. The gradient of left is
             the product of result and right with the dims of left, that of right likewise
    layout   the rules
    returns  ("all_reduce", axis) for each axis, in the order of AXES

    Raises InputError if two dims of a tensor lie along one axis, or result has a dim of its own.
    """
    for dims in (left, right, result):
        layout.sharding_of(dims)
    strange = [dim for dim in result if dim not in (*left, *right)]
    if strange:
        raise InputError(
            f"a result whose dims {tuple(left)} or {tuple(right)} has",
            f"{tuple(result)}, with {strange[0]!r}",
            "a product makes no new dims; leave it out",
        )
    summed = {layout.axis_of(dim) for dim in (*left, *right) if dim not in result}
    return tuple(("all_reduce", axis) for axis in AXES if axis in summed)
