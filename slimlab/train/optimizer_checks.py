"""What the optimizers ask of their settings, their parameters and a state that is loaded.

The rules themselves are in optimizer.py; chapter 05 explains them. torch.optim checks most
settings too, but of a state that is loaded it keeps what it does not understand.
"""

from collections.abc import Iterable, Iterator
from math import inf

import torch
from torch import Tensor

from slimlab.config import check_number, require

# What "above 0" and "below 1" mean for a check with closed ends.
LEAST, MOST = 1e-30, 1 - 1e-9
# Options of torch's optimizers that change the rule, each with the one value known here.
_FOREIGN = {"amsgrad": False, "nesterov": False, "maximize": False, "dampening": 0}


class CheckedOptimizer(torch.optim.Optimizer):
    """torch's bookkeeping of groups and state, with settings that are checked in every group.

    params    parameters, or groups (dicts) with settings of their own
    defaults  the settings of a group that does not name them

    Raises InputError for no parameters, for such as are not floating-point, and for settings out
    of range.
    """

    def __init__(self, params: Iterable, defaults: dict):
        listed = list(params) if isinstance(params, Iterable) else params
        require(
            isinstance(listed, list) and len(listed) > 0,
            "parameters, or groups of parameters",
            "none" if listed == [] else f"a {type(params).__name__}",
            "give model.parameters(); a generator can be walked through only once",
        )
        super().__init__(listed, defaults)

    def add_param_group(self, param_group: dict) -> None:
        """Take up one more group of parameters.

        param_group  "params" and the settings that differ from the optimizer's own

        Raises InputError as the class does.
        """
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            require(
                param.is_floating_point(),
                "parameters of real floating-point numbers",
                f"a parameter of dtype {param.dtype} and shape {tuple(param.shape)}",
                "leave it out, or make it a buffer of the model",
            )

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a saved state, be it this class's or that of torch.optim's of its name.

        state_dict  what state_dict() of either returned; its settings replace the present ones

        Raises InputError if it was saved under a rule that is not written here.
        """
        for group in state_dict["param_groups"]:
            for option, known in _FOREIGN.items():
                require(
                    group.get(option, known) == known,
                    f"a saved state with {option} = {known}, the only rule written here",
                    f"{option} = {group.get(option)}",
                    "go on with the torch.optim class that saved it",
                )
        super().load_state_dict(state_dict)

    def parameters_with_gradient(self) -> Iterator[tuple[dict, Tensor, Tensor]]:
        """Walk through (group, parameter, gradient); one without gradient is left out.

        Raises InputError for a sparse gradient.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                require(
                    not param.grad.is_sparse,
                    "dense gradients",
                    f"a sparse gradient of shape {tuple(param.shape)}",
                    "make the embedding without sparse=True",
                )
                yield group, param, param.grad


def check_settings(settings: dict) -> None:
    """Refuse settings that no optimizer can use.

    settings  lr, and any of betas, eps, weight_decay and momentum

    Raises InputError that names the setting, its value and its range.
    """
    check_number("lr", settings["lr"], float, LEAST, inf)
    for name in ("eps", "weight_decay"):
        check_number(name, settings.get(name, 0), float, 0, inf)
    check_number("momentum", settings.get("momentum", 0), float, 0, MOST)
    betas = settings.get("betas", (0, 0))
    require(
        isinstance(betas, tuple | list) and len(betas) == 2,
        "betas: two numbers, each from 0 up to but not including 1",
        f"betas = {betas!r}",
        "give betas=(0.9, 0.95)",
    )
    for place, value in enumerate(betas):
        check_number(f"betas[{place}]", value, float, 0, MOST)
