"""Sixteen bits: a cast and no map to integers, stored at half the size.

A bfloat16 is a float32 without the lower 16 bits of its fraction, rounded; a float16 has more
fraction and a shorter range. Nothing is calibrated, no scale is kept. Chapter 14 begins with it:
what 8 and 4 bits save is to be compared with this, since nobody stores 32.

Production computes in bfloat16 as well, where the processor has instructions for it.
"""

import copy

import torch
from torch import nn

from slimlab.config import check_choice, require
from slimlab.model.tensor_files import state_of
from slimlab.slim.quantize_maps import check_finite

CASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def cast_model(model: nn.Module, dtype: str = "bfloat16") -> nn.Module:
    """Return a copy of a model whose numbers have 16 bits.

    model    any module in float32; stays as it is
    dtype    "bfloat16", or "float16", which ends at 65,504
    returns  the copy, in eval mode; save_quantized_model stores it as it is

    Raises InputError for another type, for a model that is not in float32, and for numbers that
    are not finite, or would not be.
    """
    check_choice("dtype", dtype, tuple(CASTS))
    highest = torch.finfo(CASTS[dtype]).max
    for name, tensor in state_of(model).items():
        given, change = f"{name} of {tensor.dtype}", "convert it: model.float()"
        require(tensor.dtype == torch.float32, "a model in float32", given, change)
        check_finite(tensor, name)
        num_lost = int(torch.isinf(tensor.detach().to(CASTS[dtype])).sum())
        given = f"{name}: {num_lost:,} of {tensor.numel():,} are larger"
        change = 'give dtype="bfloat16", which has the range of float32'
        require(num_lost == 0, f"numbers up to {highest:,.0f}", given, change)
    return copy.deepcopy(model).to(CASTS[dtype]).eval()


def cast_of(model: nn.Module) -> str | None:
    """Name the type of a model that cast_model returned; None for any other.

    model  any module
    """
    kinds = {tensor.dtype for tensor in state_of(model).values()}
    return next((name for name, kind in CASTS.items() if kinds == {kind}), None)
