"""Batches: windows of token ids with the same window one token later as the target.

Chapter 00 uses it, chapter 05 trains with it.

Production differs: ids lie in memory-mapped files, windows are packed from whole documents, every
rank draws its own share, and the place in the stream is part of the checkpoint.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from slimlab.config import InputError, check_size, require


def token_windows(
    ids: Sequence[int] | Tensor, seq_len: int, batch_size: int, num_batches: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw windows at random places, with repetition.

    ids          (N,) token ids of the text, N > seq_len
    seq_len      T, tokens of a window
    batch_size   B, windows of a batch
    num_batches  batches to draw
    seed         determines the places: a whole number from 0 to 2**64 - 1
    returns      an iterator of (inputs, targets), each (B, T) int64; targets[:, t] is the token
                 that follows inputs[:, t]

    Raises InputError if ids is not one-dimensional, holds no whole numbers or is too short, or a
    size is not at least 1.
    """
    tokens = text_ids(ids, seq_len, batch_size)
    check_size("num_batches", num_batches)
    require(
        isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 64,
        "seed, a whole number from 0 to 2**64 - 1",
        f"seed = {seed!r}",
        "give seed=0",
    )
    windows = tokens.unfold(0, seq_len + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    places = (
        torch.randint(len(windows), (batch_size,), generator=generator) for _ in range(num_batches)
    )
    return ((windows[at, :-1], windows[at, 1:]) for at in places)


def consecutive_windows(
    ids: Sequence[int] | Tensor, seq_len: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through the text once, for a measurement in which each token is a target once.

    ids         (N,) token ids of the text, N > seq_len
    seq_len     T, tokens of a window
    batch_size  B, windows of a batch
    returns     an iterator of (inputs, targets), each (B, T) int64; the last batch has fewer
                windows, and what is left of the text comes as one shorter window

    Raises InputError as `token_windows` does.
    """
    tokens = text_ids(ids, seq_len, batch_size)
    num_windows = (len(tokens) - 1) // seq_len
    rest = num_windows * seq_len
    inputs, targets = (tokens[at : at + rest].view(-1, seq_len) for at in (0, 1))
    batches = zip(inputs.split(batch_size), targets.split(batch_size))
    shorter = [(tokens[None, rest:-1], tokens[None, rest + 1 :])]
    return chain(batches, shorter if rest < len(tokens) - 1 else [])


def text_ids(ids: Sequence[int] | Tensor, seq_len: int, batch_size: int = 1) -> Tensor:
    """Turn the ids of a text into a tensor, or say why they cannot be cut into windows.

    ids         (N,) token ids of the text, N > seq_len
    seq_len     T, tokens of a window
    batch_size  B, windows of a batch
    returns     (N,) int64

    Raises InputError as `token_windows` does.
    """
    check_size("seq_len", seq_len)
    check_size("batch_size", batch_size)
    asked = "ids, a sequence of whole numbers"
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        given = f"a {type(ids).__name__} ({error})"
        change = "encode the text first: tokenizer.encode(text); of a stream make a list"
        raise InputError(asked, given, change) from error
    require(
        tokens.ndim == 1,
        f"{asked}, one dimension",
        f"shape {tuple(tokens.shape)}",
        "join the documents into one sequence, with a special token between them",
    )
    # An empty list becomes a tensor of floats: its shortness is the fault to name.
    require(
        len(tokens) > seq_len,
        f"a text of at least seq_len + 1 = {seq_len + 1} tokens",
        f"{len(tokens)} tokens",
        "give a longer text or a smaller seq_len",
    )
    require(
        not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool),
        asked,
        f"dtype {tokens.dtype}",
        "give the ids that tokenizer.encode returns",
    )
    return tokens.long()
