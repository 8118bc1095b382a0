"""Hidden tokens: what an encoder has to fill in.

Chapter 04 explains it. Of the tokens 15 % are chosen. Of the chosen, 80 % are replaced by the mask
token, 10 % by a random one and 10 % stay; the model must tell all of them, and nothing else. The
mask token never occurs after pre-training, so a model that met only masks would have no reason to
represent any other token well.

Devlin et al. 2018 (arXiv:1810.04805), section 3.1 and appendix A.1. LLaMA and GPT hide nothing:
they predict the next token.

Production hides whole words or runs of tokens (SpanBERT, T5), draws anew in every epoch, and often
hides more than 15 %.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.config import InputError, check_number, check_size, require
from slimlab.model.block import check_ids
from slimlab.train.objectives import IGNORE

MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens; the rest stays as it is


def mask_tokens(
    ids: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    generator: torch.Generator,
    fraction: float = 0.15,
    keep: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Choose tokens, hide most of them, and say what they were.

    ids         (B, T) token ids, left as they are
    mask_id     the id that hides
    vocab_size  V
    generator   of all random draws
    fraction    share of the tokens of each row that is chosen, rounded, but at least one token
    keep        special ids, padding among them: never chosen, never put in another's place
    returns     inputs (B, T), and targets (B, T): the true id where one was chosen, else IGNORE

    A row with nothing but special ids gets no target. Raises InputError for ids outside the
    vocabulary, a fraction outside (0, 1], and a batch in which nothing can be chosen.
    """
    _check(ids, mask_id, vocab_size, fraction, keep)
    special = torch.tensor([mask_id, *keep], device=ids.device)
    candidates = ~torch.isin(ids, special)  # (B, T)
    require(
        bool(candidates.any()),
        "a batch with at least one token that can be hidden",
        f"ids {tuple(ids.shape)}, all of them special: {special.tolist()}",
        "leave such batches out, or name fewer ids in keep",
    )
    chosen = _choose(candidates, fraction, generator)
    kinds = _uniform(ids, generator)
    ordinary = torch.arange(vocab_size, device=ids.device)
    ordinary = ordinary[~torch.isin(ordinary, special)]
    others = ordinary[(_uniform(ids, generator) * len(ordinary)).long()]  # (B, T)
    inputs = torch.where(chosen & (kinds < MASKED), mask_id, ids)
    inputs = torch.where(chosen & (kinds >= 1 - RANDOM), others, inputs)
    return inputs, torch.where(chosen, ids, IGNORE)


def _choose(candidates: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """In each row, the candidates that come first in a random order."""
    available = candidates.sum(dim=1)
    counts = (available * fraction).round().clamp(min=1).minimum(available)
    order = _uniform(candidates, generator).masked_fill(~candidates, 2.0)  # behind all others
    places = order.argsort(dim=1).argsort(dim=1)
    return places < counts[:, None]


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    # In 64 bits: of the 2**24 values of float32, a row of a few thousand would hold equal ones.
    draws = torch.rand(
        like.shape, generator=generator, device=generator.device, dtype=torch.float64
    )
    return draws.to(like.device)


def _check(
    ids: Tensor, mask_id: int, vocab_size: int, fraction: float, keep: Sequence[int]
) -> None:
    check_size("vocab_size", vocab_size)
    check_ids("ids", ids, vocab_size)
    check_number("mask_id", mask_id, int, 0, vocab_size - 1)
    check_number("fraction", fraction, float, 1e-9, 1)
    for special_id in keep:
        check_number("each id in keep", special_id, int, 0, vocab_size - 1)
    if len({mask_id, *keep}) == vocab_size:
        raise InputError(
            "a vocabulary with tokens that are not special",
            f"{vocab_size} tokens, all of them special",
            "name fewer ids in keep",
        )
