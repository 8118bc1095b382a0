"""Masks on attention scores: which query may attend to which key.

A boolean mask is True where a query may attend. An additive mask is a float that is added to the
scores: 0 changes nothing, minus infinity hides a key, anything between is a bias. Both act on the
scores, before the softmax; chapter 01 shows what goes wrong elsewhere.

Two rules are stricter than PyTorch's, because each of them turns a silent wrong result into an
error. A mask has two dims (T, S) or as many as the scores: of three dims nobody can tell whether
the first means sequences or heads. A query that may attend to no key is refused: its softmax is
0/0, which some kernels return as NaN and others as 0.

Production code never stores a causal mask: its kernels compare positions inside a tile. And it
does not look into a mask before it computes, since on a GPU looking costs a wait, and torch.func's
vmap does not allow it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.config import InputError, check_size, require

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def causal_mask(T: int, S: int | None = None, *, device: torch.device | None = None) -> Tensor:
    """Let every query attend to itself and to what stands before it.

    T        number of queries
    S        number of keys, T if not given; the last query stands at the last key, so S - T keys
             are a past that every query may see
    device   where the mask is made
    returns  (T, S) boolean, True where a query may attend
    Raises InputError if S < T: the first T - S queries would stand before every key.
    """
    S = T if S is None else S
    check_size("T", T)
    check_size("S", S)
    require(
        S >= T,
        "at least as many keys as queries",
        f"T = {T} queries, S = {S} keys: the first {T - S} would attend nowhere",
        f"give S of at least {T}, or leave it out",
    )
    query_position = torch.arange(S - T, S, device=device)[:, None]
    return torch.arange(S, device=device) <= query_position


def padding_mask(lengths: Sequence[int] | Tensor, S: int) -> Tensor:
    """Hide the padding behind each sequence of a batch.

    lengths  (B,) number of true tokens per sequence, from 1 to S
    S        number of keys, padding included
    returns  (B, 1, 1, S) boolean, True where a key is a token
    Raises InputError if a length is not a whole number from 1 to S.
    """
    check_size("S", S)
    asked = f"lengths: one whole number from 1 to S = {S} per sequence"
    change = "count the true tokens of each sequence; leave out sequences that have none"
    try:
        counts = torch.as_tensor(lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(asked, f"lengths = {lengths!r}", change) from error
    whole = counts.dim() == 1 and counts.numel() > 0 and counts.dtype in WHOLE
    require(
        whole and bool(((counts >= 1) & (counts <= S)).all()),
        asked,
        f"lengths = {counts.tolist()}",
        change,
    )
    return (torch.arange(S, device=counts.device) < counts[:, None])[:, None, None, :]


def with_causal(mask: Tensor | None, T: int, S: int, device: torch.device | None = None) -> Tensor:
    """Hide what a mask hides and what stands later.

    mask     boolean or additive, broadcast to (B, H, T, S); None hides nothing
    T, S     numbers of queries and keys, see causal_mask
    device   where the mask is made
    returns  a mask of the kind given, boolean if none was
    """
    causal = causal_mask(T, S, device=device)
    if mask is None:
        return causal
    if mask.dtype == torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, -torch.inf)


def packed_mask(document_ids: Tensor) -> Tensor:
    """Keep documents that share a row from seeing each other; causal within each.

    document_ids  (B, T) whole numbers, one number per document
    returns       (B, 1, T, T) boolean: a query may attend to the tokens of its own document that
                  do not stand later
    Raises InputError if document_ids is not (B, T).
    """
    _check_document_ids(document_ids)
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & causal_mask(document_ids.shape[1], device=document_ids.device)


def packed_positions(document_ids: Tensor) -> Tensor:
    """Count positions from 0 anew in every document of a row.

    document_ids  (B, T) whole numbers; a document is a run of equal ones
    returns       (B, T) int64
    Raises InputError if document_ids is not (B, T).
    """
    _check_document_ids(document_ids)
    place = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(starts, place, 0).cummax(dim=1).values
    return place - first


def chunk_mask(T: int, chunk_len: int, *, leaky: bool = False) -> Tensor:
    """Cut a text into chunks; a query sees its own chunk and all before it, nothing later.

    T          tokens
    chunk_len  tokens of a chunk; the last may be shorter
    leaky      let a query see its whole chunk, the later part too: the rule "this chunk and all
               before it" by itself. Trained to predict the next token, a model then reads it off.
    returns    (T, T) boolean; not leaky it equals causal_mask(T) for every chunk_len
    """
    check_size("T", T)
    check_size("chunk_len", chunk_len)
    chunk = torch.arange(T) // chunk_len
    seen = chunk[:, None] >= chunk
    return seen if leaky else seen & causal_mask(T)


def _check_document_ids(document_ids: Tensor) -> None:
    fits = isinstance(document_ids, Tensor) and document_ids.dim() == 2
    require(
        fits and document_ids.dtype in WHOLE,
        "document_ids (B, T): for every token the number of its document",
        f"{tuple(document_ids.shape)} of dtype {document_ids.dtype}"
        if isinstance(document_ids, Tensor)
        else f"a {type(document_ids).__name__}",
        "give torch.tensor([[0, 0, 1, 1, 1]]) for two documents in one row",
    )


def to_additive(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn a boolean mask into what is added to the scores.

    mask     boolean, or additive already
    dtype    floating type of the scores
    returns  0 where a query may attend, minus infinity where not; an additive mask in `dtype`
    Raises InputError for a mask of whole numbers, and for a dtype without minus infinity.
    """
    _check_mask_kind(mask)
    require(
        dtype.is_floating_point,
        "dtype: a floating type, for its minus infinity",
        f"dtype = {dtype}",
        "give the dtype of query",
    )
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def apply_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Hide scores or add a bias to them, before the softmax.

    scores   (B, H, T, S)
    mask     boolean or additive, broadcast to the scores; None leaves them as they are
    returns  (B, H, T, S), minus infinity where a query may not attend
    """
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask


def check_mask(mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a mask that would give a wrong or undefined result.

    mask   boolean (True: may attend) or floating (added to the scores)
    shape  (B, H, T, S) of the scores

    Raises InputError for a mask that is neither, does not fit, holds NaN or plus infinity, holds
    only 0 and 1 as floats, or has a row that allows no key at all.
    """
    _check_mask_kind(mask)
    _check_mask_shape(mask, tuple(shape))
    if mask.is_meta:  # a tensor without values, as torch.device("meta") makes
        return
    if mask.is_floating_point():
        _check_additive_values(mask)
    allowed = mask if mask.dtype == torch.bool else mask != -torch.inf
    empty = ~allowed.any(dim=-1)
    if empty.any():
        row = tuple(empty.nonzero()[0].tolist())
        raise InputError(
            "a mask that lets every query attend to at least one key",
            f"mask[{', '.join(map(str, row))}] allows none of its {mask.shape[-1]} keys "
            f"({int(empty.sum())} such rows of {empty.numel()})",
            "let the query attend to itself, or leave it out and drop its result; "
            "if True meant 'hidden' in your mask, give ~mask",
        )


def _check_mask_kind(mask: object) -> None:
    require(
        isinstance(mask, Tensor) and mask.layout == torch.strided,
        "mask: a dense tensor, boolean or floating, or None",
        f"a {type(mask).__name__}"
        + (f" of layout {mask.layout}" if isinstance(mask, Tensor) else ""),
        "use causal_mask, padding_mask or torch.tensor(...)",
    )
    require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        "a boolean mask (True: may attend) or a floating one (added to the scores)",
        f"a mask of dtype {mask.dtype}",
        "use mask.bool() if 1 means 'may attend', mask == 0 if 1 means 'hidden'",
    )


def _check_mask_shape(mask: Tensor, shape: tuple[int, ...]) -> None:
    fits = mask.dim() in (2, len(shape)) and all(
        size in (1, full) for size, full in zip(mask.shape, shape[-mask.dim() :])
    )
    require(
        fits,
        f"a mask of shape {shape[-2:]} or one that broadcasts to {shape}",
        f"a mask of shape {tuple(mask.shape)}",
        "use (T, S) for one mask for all, (B, 1, T, S) for one per sequence, "
        "(1, H, T, S) for one per head, (B, 1, 1, S) for padding",
    )


def _check_additive_values(mask: Tensor) -> None:
    bad = mask.isnan() | (mask == torch.inf)
    if bad.any():
        raise InputError(
            "an additive mask of finite numbers and minus infinity",
            f"a mask with {int(mask.isnan().sum())} NaN and {int((mask == torch.inf).sum())} +inf",
            "0 * -inf is NaN: build the mask with torch.where or slimlab.model.masks.to_additive",
        )
    # All zeros is the additive mask that hides nothing, so only a 1 gives the mistake away.
    ones = mask == 1
    require(
        not bool(((mask == 0) | ones).all() and ones.any()),
        "an additive mask: 0 where a query may attend, minus infinity where not",
        "a floating mask that holds only 0 and 1, almost surely a boolean mask given as floats: "
        "added to the scores it would hide nothing",
        "use mask.bool(); if you do mean to add 1 to some scores, give mask - 1: "
        "the softmax gives the same weights",
    )
