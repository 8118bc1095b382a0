"""Units: the pieces of a model whose weights are gathered, and whose gradients are sent, together.

Chapter 08 uses them for ZeRO. The units of this book's models are the embedding, each block, and
the head, which is all that stands behind the last block. A parameter belongs to the first unit that
has it; a later one that has it too, as the head has the table of the tokens, needs both units.

The order of the units is that in which the forward pass reaches them. All ranks go through it
together, also those that have no data, so it must not depend on the data.

Production (fully_shard of torch) lets the program name the units, leaves what is in none of them to
the whole model, and keeps that gathered from the forward pass to the end of the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn


@dataclass(eq=False)
class Unit:
    """A piece of a model.

    name         such as "blocks.0"
    modules      those with parameters, from which the forward pass enters the unit
    params       name -> parameter, those that no earlier unit has
    needs        numbers of the units whose parameters it uses, its own first, then tied ones
    lookup_only  its own parameters are tables that are only looked up, so that its backward pass
                 reads no weight
    """

    name: str
    modules: list[nn.Module]
    params: dict[str, nn.Parameter] = field(default_factory=dict)
    needs: tuple[int, ...] = ()
    lookup_only: bool = False


def units_of(model: nn.Module) -> list[Unit]:
    """Divide a model into units: each item of a list of layers, and what stands between the lists.

    model    any; its direct parts are taken in the order in which they were made. Its own
             parameters, which are in no part, go to the last unit
    returns  units in the order of the forward pass; only such that use a parameter
    """
    names = {param: name for name, param in model.named_parameters()}
    owner: dict[nn.Parameter, int] = {}
    units: list[Unit] = []
    for name, modules in _pieces(model):
        unit, number = Unit(name, modules), len(units)
        params = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        for param in params:
            if owner.setdefault(param, number) == number:
                unit.params[names[param]] = param
        unit.needs = tuple(dict.fromkeys((number, *(owner[param] for param in params))))
        unit.lookup_only = _is_lookup(modules)
        units.append(unit)
    rest = {name: p for name, p in model.named_parameters(recurse=False) if p not in owner}
    if rest and not units:
        return [Unit(type(model).__name__, [model], rest, (0,))]
    if rest:
        units[-1].params.update(rest)
        units[-1].lookup_only = False
    return units


def _pieces(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    together: list[tuple[str, nn.Module]] = []
    is_list = isinstance(model, nn.ModuleList | nn.Sequential)
    for name, child in model.named_children():
        listed = isinstance(child, nn.ModuleList)
        if (listed or is_list) and together:
            yield _joined(together)
            together = []
        if listed:
            yield from (
                (f"{name}.{number}", [item]) for number, item in enumerate(child) if _has(item)
            )
        elif _has(child):
            together.append((name, child))
    if together:
        yield _joined(together)


def _has(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _joined(named: list[tuple[str, nn.Module]]) -> tuple[str, list[nn.Module]]:
    return "+".join(name for name, _ in named), [module for _, module in named]


def _is_lookup(modules: list[nn.Module]) -> bool:
    holders = [
        part
        for module in modules
        for part in module.modules()
        if next(part.parameters(recurse=False), None) is not None
    ]
    # With max_norm a table is changed where it is read.
    return all(isinstance(part, nn.Embedding) and part.max_norm is None for part in holders)
