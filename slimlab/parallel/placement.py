"""The placement: which layer lives on which device. For contrast with layouts, which cut tensors.

Chapter 09 sets the two side by side. A placement names layers and devices, every parameter is whole
on one device, and the devices work one after the other, since each needs the activations of the
one before. A layout (slimlab.parallel.layout) names dims and mesh axes, every rank has a part of
every layer, and all work at the same time. Neither can be written in the other's words.

Production: device_map of `accelerate`, max_memory with it; stages of a pipeline (chapter 10) are a
placement too, with several micro-batches on their way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from slimlab.config import InputError, require
from slimlab.model.transformer import check_kind


@dataclass(frozen=True)
class Placement:
    """A table from layers to devices.

    table  pairs (name of a module or a parameter, device), as (("embedding", 0), ("blocks.0", 0),
           ("blocks.1", 1)); a device is a number or a name. A module's device holds for all that is
           in it, unless a longer name says otherwise

    Raises InputError for other things than pairs with a name, and for a name that stands twice.
    """

    table: tuple[tuple[str, int | str], ...]

    def __post_init__(self):
        for row in self.table:
            pair = isinstance(row, Sequence) and not isinstance(row, str) and len(row) == 2
            require(
                pair and isinstance(row[0], str) and isinstance(row[1], int | str),
                "a table of pairs (name of a module, device)",
                f"{row!r}",
                'write Placement((("embedding", 0), ("blocks.0", 0), ("blocks.1", 1)))',
            )
        names = [name for name, _ in self.table]
        twice = [name for name in names if names.count(name) > 1]
        require(
            not twice,
            "each module once",
            f"{twice[:1]} twice",
            "a layer lives on one device; what cuts a layer is a slimlab.parallel.layout.Layout",
        )
        object.__setattr__(self, "table", tuple((name, device) for name, device in self.table))

    def device_of(self, name: str) -> int | str:
        """Return the device of a parameter or a module: that of the longest name that leads to it.

        name  as named_parameters() has it

        Raises InputError if the table says nothing of it.
        """
        words, devices = name.split("."), dict(self.table)
        for count in range(len(words), 0, -1):
            start = ".".join(words[:count])
            if start in devices:
                return devices[start]
        raise InputError(
            "a table with a device for every parameter",
            f"none for {name}",
            f"add a pair ({'.'.join(words[:-1]) or name!r}, device)",
        )


def held_by_device(model: nn.Module, placement: Placement) -> dict[int | str, tuple[str, ...]]:
    """Say what each device holds.

    model      any, also on the device meta
    placement  the table
    returns    device -> names of its parameters, whole, in the order of the model; devices in the
               order of the table. A tied table stands with both its names if they are on two
               devices: each then has a copy, and the copies' gradients must be added

    Raises InputError if a name in the table matches nothing, or a parameter has no device.
    """
    params = list(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    for name, device in placement.table:
        require(
            name in modules or name in dict(params),
            f"names of modules, such as {', '.join(list(dict(model.named_children()))[:4])}",
            f"({name!r}, {device!r}), which matches nothing",
            "see model.named_modules(); pairs of a tensor dim and a mesh axis are rules of a "
            "slimlab.parallel.layout.Layout",
        )
    held = {device: [] for _, device in placement.table}
    seen = set()
    for name, param in params:
        device = placement.device_of(name)
        if (device, id(param)) not in seen:
            seen.add((device, id(param)))
            held[device].append(name)
    return {device: tuple(names) for device, names in held.items()}


def even_placement(model: nn.Module, devices: Sequence[int | str]) -> Placement:
    """Place a Decoder's layers in order, about as many blocks on each device.

    model    a Decoder
    devices  the first gets the embedding, the last what stands behind the blocks

    Raises InputError if there are more devices than blocks, or none, and for another model.
    """
    check_kind(getattr(model, "config", model), "decoder")
    num_blocks = len(model.blocks)
    require(
        1 <= len(devices) <= num_blocks,
        f"from 1 to {num_blocks} devices, one block each at least",
        f"{len(devices)} devices",
        f"give {min(max(len(devices), 1), num_blocks)} devices, or a model with more layers",
    )
    rows = [("embedding", devices[0])]
    rows += [
        (f"blocks.{number}", devices[number * len(devices) // num_blocks])
        for number in range(num_blocks)
    ]
    rest = [name for name, _ in model.named_children() if name in ("final_norm", "lm_head")]
    return Placement((*rows, *((name, devices[-1]) for name in rest)))
