"""Where to compute: the accelerator that this machine has, or its processor.

Chapter 05 uses it. Production also picks one of several accelerators by the rank of the process;
here that is the caller's: device="cuda:1".
"""

import torch
from torch import nn

from slimlab.config import InputError, require


def choose_device(
    device: str | torch.device = "auto", model: nn.Module | None = None
) -> torch.device:
    """Turn the name of a device into a device that is there.

    device   "auto": where `model` lies if that is an accelerator already, else the first of cuda,
             mps and cpu that this machine has; or PyTorch's name for one
    model    to be trained or used
    returns  a torch.device

    Raises InputError for a name that PyTorch does not know and for a device that is not there.
    """
    names = _available()
    if device == "auto":
        first = next(iter(model.parameters()), None) if model is not None else None
        on_accelerator = first is not None and first.device.type in ("cuda", "mps")
        return first.device if on_accelerator else names[0]
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            'device: "auto" or PyTorch\'s name of one',
            repr(device),
            'give device="auto", "cpu", "cuda", "cuda:1" or "mps"',
        ) from error
    there = chosen.type in {name.type for name in names} or chosen.type == "meta"
    there &= chosen.type != "cuda" or (chosen.index or 0) < torch.cuda.device_count()
    require(
        there,
        f"the device {device}",
        f"a machine with {', '.join(map(str, names))} for PyTorch {torch.__version__}",
        'give device="auto", or install a PyTorch built for that device',
    )
    return chosen


def _available() -> list[torch.device]:
    names = ["cuda"] if torch.cuda.is_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [torch.device(name) for name in (*names, "cpu")]
