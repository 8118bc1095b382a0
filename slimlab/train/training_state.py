"""What has to be kept, besides the weights, so that training goes on as if never interrupted.

The optimizer's state, by the names of the parameters and not by their numbers, so that a file can
be read by a person and by a program that groups them otherwise; and the states of the random
generators, from which dropout draws. Chapter 05 explains them.

Production keeps more: the places of all data readers, the counters of all schedules, one random
state per rank.
"""

import torch
from torch import Tensor, nn

from slimlab.config import require

# How PyTorch computes the update; chosen anew on the machine that goes on.
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict, dict]:
    """Take an optimizer's state apart.

    optimizer  any of torch.optim's form, over parameters of `model`
    model      gives the names
    returns    tensors named "exp_avg/blocks.0.norm.weight", and the rest, which JSON can hold:
               groups of settings with the names of their parameters, and values that are no tensors
    """
    names = _names_of(optimizer, model)
    tensors, values = {}, {}
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{names[id(param)]}"] = value
            else:
                values.setdefault(names[id(param)], {})[key] = value
    groups = [
        {
            "params": [names[id(param)] for param in group["params"]],
            "settings": {
                key: value.item() if isinstance(value, Tensor) else value
                for key, value in group.items()
                if key not in ("params", "param_names", *IMPLEMENTATION)
            },
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"groups": groups, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tensors: dict[str, Tensor],
    rest: dict,
    source: str,
) -> None:
    """Put a state that `optimizer_state` took apart back into an optimizer of the same parameters.

    optimizer      made anew, with the same groups
    model          gives the names
    tensors, rest  what optimizer_state returned
    source         where they come from, for messages

    Raises InputError if the groups are of other parameters or a tensor has another shape.
    """
    names = _names_of(optimizer, model)
    now = [[names[id(param)] for param in group["params"]] for group in optimizer.param_groups]
    stored = [group["params"] for group in rest["groups"]]
    require(
        now == stored,
        f"an optimizer state of {sum(map(len, now))} parameters in {len(now)} groups",
        f"{source}: {sum(map(len, stored))} in {len(stored)} groups, or others, or another order",
        "make the optimizer as it was made for the run that saved",
    )
    numbers = {name: number for number, name in enumerate(sum(now, []))}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    state = {numbers[name]: dict(values) for name, values in rest["values"].items()}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        require(
            name in numbers and (tensor.dim() == 0 or tuple(tensor.shape) == shapes[name]),
            f"{key} of a parameter, in its shape {shapes.get(name, '')}",
            f"{source}: {full_name} {tuple(tensor.shape)}",
            "make the optimizer as it was made for the run that saved",
        )
        state.setdefault(numbers[name], {})[key] = tensor
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**group, **_as_before(group, old["settings"])}
        for group, old in zip(current, rest["groups"])
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _as_before(group: dict, settings: dict) -> dict:
    """JSON makes lists of tuples, such as betas."""
    return {
        key: tuple(value) if isinstance(group.get(key), tuple) else value
        for key, value in settings.items()
    }


def _names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, str]:
    names = {id(param): name for name, param in model.named_parameters()}
    strangers = sum(id(p) not in names for group in optimizer.param_groups for p in group["params"])
    require(
        not strangers,
        "an optimizer of this model's parameters",
        f"{strangers} parameters that are not the model's",
        "make the optimizer after the model is built and on its device",
    )
    return names


def random_state(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the states of torch's global generators: the CPU's and the device's own.

    device  where the model computes
    """
    states = {"cpu": torch.get_rng_state()}
    kind = torch.device(device).type
    if kind == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif kind == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device | str = "cpu") -> bool:
    """Put the generators back into the states that `random_state` returned.

    states   by kind of device
    device   where the model computes now
    returns  False if the states hold none for this kind of device, whose draws then differ
    """
    kind = torch.device(device).type
    torch.set_rng_state(states["cpu"])
    if kind == "cuda" and kind in states:
        torch.cuda.set_rng_state(states[kind], device)
    elif kind == "mps" and kind in states:
        torch.mps.set_rng_state(states[kind])
    return kind in states
