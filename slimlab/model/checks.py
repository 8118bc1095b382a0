"""What attention asks of its input, checked before anything is computed.

All three forms of attention share these checks, so that bad input gets the same error from each.
Chapters 01 and 02 show the errors. Production kernels check less and broadcast more.
"""

import math

import torch
from torch import Tensor

from slimlab.config import require
from slimlab.model.masks import check_mask

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> None:
    """Refuse input that attention is not defined for.

    query  (B, H, T, E); (H, T, E) and (T, E) too, and more dims before H
    key    (B, K, S, E), K divides H
    value  (B, K, S, Ev)
    mask   None, or see masks.check_mask
    scale  None or a finite number

    Raises InputError that names the two sizes or kinds that do not agree.
    """
    named = {"query": query, "key": key, "value": value}
    _check_kinds(named)
    _check_shapes(named)
    require(
        scale is None or (isinstance(scale, int | float) and math.isfinite(scale)),
        "scale: a finite number, or None for 1/sqrt(d_head)",
        f"scale = {scale!r}",
        "leave scale out",
    )
    if mask is not None:
        if isinstance(mask, Tensor):
            _check_same({**named, "mask": mask}, "device")
        check_mask(mask, (*query.shape[:-1], key.shape[-2]))
        require(
            not mask.is_floating_point() or mask.dtype == query.dtype,
            f"an additive mask of the scores' dtype, {query.dtype}",
            f"a mask of dtype {mask.dtype}",
            f"give mask.to({query.dtype}), or a boolean mask",
        )


def _check_kinds(named: dict[str, Tensor]) -> None:
    for name, x in named.items():
        dense = isinstance(x, Tensor) and x.layout == torch.strided
        require(
            dense and x.dtype in FLOATS and x.dim() >= 2,
            f"{name}: a floating tensor of at least two dims, (positions, features), dense and of "
            "16, 32 or 64 bits",
            _describe(x),
            f"give {name} as a tensor such as {name}.float(), with a row for every position",
        )
    _check_same(named, "dtype")
    _check_same(named, "device")


def _check_same(named: dict[str, Tensor], attribute: str) -> None:
    found = {name: getattr(x, attribute) for name, x in named.items()}
    require(
        len(set(found.values())) == 1,
        f"one {attribute} for {', '.join(named)}",
        ", ".join(f"{name} {value}" for name, value in found.items()),
        "convert them to one with .to(...)",
    )


def _check_shapes(named: dict[str, Tensor]) -> None:
    query, key, value = named.values()
    given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    require(
        query.dim() == key.dim() == value.dim()
        and query.shape[:-3] == key.shape[:-3]
        and key.shape[:-3] == value.shape[:-3],
        "query (B, H, T, E), key (B, K, S, E), value (B, K, S, Ev) with the same B",
        given,
        "give all three the same number of dims and the same sizes before the heads",
    )
    require(
        query.shape[-1] == key.shape[-1] >= 1,
        "query and key with the same number of features per head (their dot product needs it)",
        given,
        "project both to the same d_head; only value may have another",
    )
    require(
        key.shape[-2] == value.shape[-2] >= 1,
        "a value for every key, and at least one key",
        given,
        "make key and value from the same positions",
    )
    if query.dim() == 2:
        return
    num_heads, num_kv_heads = query.shape[-3], key.shape[-3]
    require(
        num_kv_heads == value.shape[-3] and num_kv_heads >= 1 and num_heads % num_kv_heads == 0,
        "as many key heads as value heads, and num_kv_heads that divides num_heads",
        f"{given}: {num_heads} query, {num_kv_heads} key and {value.shape[-3]} value heads",
        "project keys and values to a number of heads that divides the queries'",
    )


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        layout = "" if x.layout == torch.strided else f" and layout {x.layout}"
        return f"a tensor of shape {tuple(x.shape)} and dtype {x.dtype}{layout}"
    return f"a {type(x).__name__}"
