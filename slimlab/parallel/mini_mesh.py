"""A mesh of make-believe processors in numpy: the objects of Mesh-TensorFlow, small enough to read.

Chapter 09 runs it. A graph lists operations on tensors whose dims have names; nothing in it knows
of processors. Lowering takes graph, mesh and layout, and writes down for each operation what each
processor does with its parts and which collective follows; running carries that out.

Mesh-TensorFlow lowers to a TensorFlow graph, which a session runs on real processors, and appends
gradients to the graph by itself. Shazeer et al. 2018 (arXiv:1811.02084), sections 3 to 5.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from slimlab.config import require
from slimlab.parallel.layout import Layout, local_shape, local_slices
from slimlab.parallel.layout_checks import check_matches
from slimlab.parallel.mesh import AXES, MeshShape


class Dimension(NamedTuple):
    """A dim of tensors: its name, by which rules find it, and its size."""

    name: str
    size: int


class NamedTensor:
    """What an operation will give, once the graph is run: its dims are known, its numbers not.

    kind    "import", "variable", "einsum", "map" or "assign"
    dims    of the result
    inputs  tensors
    value   the name of an import, the first value of a variable, the function of a map
    """

    def __init__(self, kind: str, dims: Sequence[Dimension], inputs: Sequence = (), value=None):
        self.kind, self.dims, self.inputs, self.value = kind, tuple(dims), tuple(inputs), value
        self.names = tuple(dim.name for dim in self.dims)
        self.shape = tuple(dim.size for dim in self.dims)


class Graph:
    """Operations in order; each method appends one and returns its tensor.

    Raises InputError for a name that a tensor has twice, that has two sizes, or that the result of
    an operation has and none of its inputs.
    """

    def __init__(self):
        self.tensors: list[NamedTensor] = []

    def import_array(self, name: str, dims: Sequence[Dimension]) -> NamedTensor:
        """Hand in an array, by `name`, in each run; `dims` are its dims."""
        return self._append("import", dims, value=name)

    def variable(self, dims: Sequence[Dimension], value: np.ndarray) -> NamedTensor:
        """Keep numbers from run to run, each processor its part; `dims`, and the first `value`."""
        return self._append("variable", dims, value=value)

    def einsum(self, inputs: Sequence[NamedTensor], dims: Sequence[Dimension]) -> NamedTensor:
        """Multiply the `inputs`, summing over what `dims` has not; of one input, a plain sum."""
        return self._append("einsum", dims, inputs)

    def map(self, function: Callable, *inputs: NamedTensor) -> NamedTensor:
        """Apply a `function` such as np.add to `inputs`; the first has all dims of the others."""
        return self._append("map", inputs[0].dims, inputs, function)

    def assign(self, variable: NamedTensor, value: NamedTensor) -> NamedTensor:
        """Replace a `variable`'s numbers by a `value` of the same dims."""
        return self._append("assign", variable.dims, (variable, value))

    def _append(self, kind, dims, inputs=(), value=None) -> NamedTensor:
        one = NamedTensor(kind, dims, inputs, value)
        everywhere = {dim for tensor in [one, *self.tensors] for dim in tensor.dims}
        given = {dim for tensor in inputs for dim in tensor.dims}
        same = kind in ("map", "assign")  # they neither sum nor multiply: nothing may be missing
        require(
            len(dict(everywhere)) == len(everywhere)
            and len({*one.names}) == len(one.names)
            and (not inputs or given >= {*one.dims} and not (same and given - {*one.dims})),
            f"{kind}: each name once, with one size, from {sorted(given)}",
            f"{one.dims}",
            "rename one of the dims, or choose inputs that have it",
        )
        self.tensors.append(one)
        return one


class Lowering:
    """A graph as a mesh computes it under a layout.

    graph       what to compute
    mesh_shape  the processors
    layout      rules from names of dims to axes of the mesh

    steps  (tensor, shape of each processor's part, collectives that follow) of each operation
    parts  tensor -> coordinates of a processor -> its part, after a run
    sent   elements that each processor handed to collectives so far

    Raises InputError for a rule that matches nothing, two dims of a tensor along one axis, sizes
    that do not divide.
    """

    def __init__(self, graph: Graph, mesh_shape: MeshShape, layout: Layout):
        check_matches(layout.rules, [name for tensor in graph.tensors for name in tensor.names])
        self.mesh_shape, self.steps, self.sent = mesh_shape, [], 0
        self.shardings = {one: layout.sharding_of(one.names) for one in graph.tensors}
        self.processors = list(itertools.product(*map(range, mesh_shape.sizes)))
        self.parts: dict[NamedTensor, dict] = {}
        for one in graph.tensors:
            part = local_shape(one.shape, self.shardings[one], mesh_shape)
            names = [name for factor in one.inputs for name in factor.names]
            summed = {layout.axis_of(name) for name in names if name not in one.names}
            collectives = [("all_reduce", axis) for axis in AXES if axis in summed]
            self.steps.append((one, part, collectives if one.kind == "einsum" else []))
            if one.kind == "variable":
                self.parts[one] = self._cut(one, one.value)

    def run(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Carry all steps out; `arrays` has one for each import, by name."""
        for one, _, collectives in self.steps:
            if one.kind == "import":
                require(one.value in arrays, f"an array {one.value!r}", f"{[*arrays]}", "add it")
                self.parts[one] = self._cut(one, arrays[one.value])
            elif one.kind in ("einsum", "map"):
                self.parts[one] = {at: self._compute(one, at) for at in self.processors}
            for _, axis in collectives:
                self._all_reduce(self.parts[one], AXES.index(axis))
        assigned = [one.inputs for one, _, _ in self.steps if one.kind == "assign"]
        self.parts.update({variable: self.parts[value] for variable, value in assigned})

    def export(self, tensor: NamedTensor) -> np.ndarray:
        """Put the processors' parts of a `tensor` together."""
        parts = self.parts[tensor]
        whole = np.empty(tensor.shape, parts[self.processors[0]].dtype)
        for at in self.processors:
            whole[self._place(tensor, at)] = parts[at]
        return whole

    def _compute(self, one: NamedTensor, at: tuple[int, ...]) -> np.ndarray:
        parts = [self.parts[factor][at] for factor in one.inputs]
        if one.kind == "map":
            aligned = [_align(part, f.names, one.names) for part, f in zip(parts, one.inputs)]
            return one.value(*aligned)
        number = {name: n for n, name in enumerate({n for f in one.inputs for n in f.names})}
        pairs = zip(parts, ([number[name] for name in factor.names] for factor in one.inputs))
        return np.einsum(*itertools.chain(*pairs), [number[name] for name in one.names])

    def _all_reduce(self, parts: dict, place: int) -> None:
        groups = {}
        for at in self.processors:
            groups.setdefault((*at[:place], *at[place + 1 :]), []).append(at)
        self.sent += parts[self.processors[0]].size
        for group in groups.values():
            total = sum(parts[at] for at in group)
            parts.update(dict.fromkeys(group, total))

    def _cut(self, tensor: NamedTensor, whole: np.ndarray) -> dict[tuple, np.ndarray]:
        given = np.shape(whole)
        require(
            given == tensor.shape,
            f"an array {tensor.names}, {tensor.shape}",
            f"{given}",
            "let its shape be that",
        )
        return {at: np.array(whole[self._place(tensor, at)]) for at in self.processors}

    def _place(self, tensor: NamedTensor, at: tuple[int, ...]) -> tuple[slice, ...]:
        return local_slices(tensor.shape, self.shardings[tensor], self.mesh_shape, at)


def _align(part: np.ndarray, names: Sequence[str], target: Sequence[str]) -> np.ndarray:
    part = part.transpose([names.index(name) for name in target if name in names])
    return part[tuple(slice(None) if name in names else None for name in target)]
