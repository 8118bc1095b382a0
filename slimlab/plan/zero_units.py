"""The units that ZeRO cuts a model into, from its configuration: which there are, and how large.

slimlab.plan.zero predicts with them; slimlab.parallel.zero_units finds the same in a model. Chapter
08 uses both. In production the program names the units (fully_shard), or they are what comes
together to a given number of parameters.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import prod

from slimlab.config import ModelConfig, require
from slimlab.plan.params import param_shapes


def shard_size(num_elements: int, world_size: int) -> int:
    """Compute the elements of each rank's shard of a row, zeros behind the row's end included.

    num_elements  of the row
    world_size    number of ranks
    """
    return -(-num_elements // world_size)


@dataclass(frozen=True)
class ZeroUnit:
    """A piece of a model whose weights are gathered, and whose gradients are sent, together.

    name         such as "blocks.0"
    decaying     elements of its parameters that weight decay shrinks
    others       elements of its other parameters that are trained
    num_trained  its parameters that are trained, as tensors
    frozen       elements of those that are not
    needs        numbers of the units whose weights it uses, its own first, then tied ones
    lookup_only  its parameters are tables, so that its backward pass reads no weight
    """

    name: str
    decaying: int
    others: int
    num_trained: int = 0
    frozen: int = 0
    needs: tuple[int, ...] = ()
    lookup_only: bool = False

    @property
    def trained(self) -> int:
        """Elements of the parameters that are trained."""
        return self.decaying + self.others

    @property
    def rows(self) -> tuple[int, ...]:
        """Elements of the rows that stage 3 gathers: the trained ones, and the frozen ones."""
        return tuple(size for size in (self.trained, self.frozen) if size)


def zero_units(
    config: ModelConfig, *, frozen: Collection[str] = (), decay_embeddings: bool = True
) -> tuple[ZeroUnit, ...]:
    """Divide a model into units: what stands before the blocks, each block, what stands behind.

    config            all of it is read
    frozen            names of the parameters that are not trained
    decay_embeddings  weight decay shrinks tables too, as in slimlab.train.optimizer
    returns           units in the order of the forward pass, as slimlab.parallel.zero_units finds

    Raises InputError for a frozen parameter that the model does not have.
    """
    shapes = param_shapes(config)
    unknown = sorted(set(frozen) - set(shapes))
    require(
        not unknown,
        "frozen: names of parameters",
        ", ".join(unknown[:4]),
        f"{len(shapes)} names are in slimlab.plan.params.param_shapes(config)",
    )
    unit_of = dict(_unit_names(config))
    units = [ZeroUnit(name, 0, 0) for name in dict.fromkeys(unit_of.values())]
    places = {unit.name: number for number, unit in enumerate(units)}
    for name, shape in shapes.items():
        number, table = places[unit_of[name]], name.startswith("embedding.")
        decays = len(shape) >= 2 and (decay_embeddings or not table)
        kind = "frozen" if name in frozen else "decaying" if decays else "others"
        sizes = {kind: getattr(units[number], kind) + prod(shape)}
        num_trained = units[number].num_trained + (name not in frozen)
        units[number] = replace(units[number], **sizes, num_trained=num_trained)
    for number, unit in enumerate(units):
        tied = number == len(units) - 1 and config.tie_embeddings
        units[number] = replace(
            unit,
            needs=(number, 0) if tied and number else (number,),
            lookup_only=unit.name == "embedding",
        )
    return tuple(units)


def _unit_names(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Give the name of each parameter, a tied lm_head too, with the name of its unit."""
    names = list(param_shapes(config))
    if config.tie_embeddings:
        # It stands before an encoder's head for pairs of sentences, else at the end.
        pairs = (at for at, name in enumerate(names) if name.startswith("pooler"))
        names.insert(next(pairs, len(names)), "lm_head.weight")
    groups: list[tuple[list[str], list[str]]] = []  # parts and their parameters
    for name in names:
        part, *rest = name.split(".")
        listed = bool(rest) and rest[0].isdigit()
        part = f"{part}.{rest[0]}" if listed else part
        joins = groups and not listed and not groups[-1][0][-1].split(".")[-1].isdigit()
        if rest and not (groups and (groups[-1][0][-1] == part or joins)):
            groups.append(([], []))
        if rest:
            parts, params = groups[-1]
            parts += [part] if part not in parts else []
            params.append(name)
    own = [name for name in names if "." not in name]  # the model's own go to the last unit
    groups[-1][1].extend(own)
    for parts, params in groups:
        yield from ((name, "+".join(parts)) for name in params)
