"""Scheduled sampling: feed a model some of its own words while it learns.

Chapter 04 explains it. Under teacher forcing a model reads true tokens only; when it writes, it
reads its own, and one mistake leads to the next (exposure bias). Scheduled sampling replaces some
of the true inputs by the model's own words, more and more of them.

Bengio et al. 2015 (arXiv:1506.03099) do it step by step in a recurrent network. A Transformer
predicts all positions in one pass, so two passes are made: the first, from true tokens, supplies
the words, the second reads the mixture and is trained (Mihaylova and Martins 2019,
arXiv:1906.07651). Huszar 2015 (arXiv:1511.05101) shows that the objective is not consistent: with
unlimited data it does not lead to the true distribution.

Production hardly uses it: large models trained by teacher forcing alone make few enough mistakes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slimlab.config import check_number, require
from slimlab.model.generation import choose
from slimlab.train.objectives import causal_objective


def scheduled_objective(
    model: Callable[[Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    *,
    own_fraction: float,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Predict the next token from inputs of which some are the model's own words.

    model         ids -> logits (B, T, V): a Decoder, or for an EncoderDecoder
                  lambda ids: model.decode(ids, memory)
    batch         inputs (B, T) and targets (B, T)
    own_fraction  share of inputs that are replaced, from 0 (teacher forcing) to 1
    generator     of all random draws
    returns       loss sum in nats, number of targets; gradients flow through the second pass only

    Raises InputError as mixed_inputs and causal_objective do.
    """
    inputs, targets = batch
    with torch.no_grad():
        logits = model(inputs)
    mixed = mixed_inputs(inputs, logits, own_fraction=own_fraction, generator=generator)
    return causal_objective(model, (mixed, targets))


def mixed_inputs(
    inputs: Tensor,
    logits: Tensor,
    *,
    own_fraction: float,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    """Replace inputs by what the model would have written in their place.

    inputs        (B, T) true ids, left as they are
    logits        (B, T, V) what the model says from them; logits[:, t] speaks of position t + 1
    own_fraction  chance of each input after the first to be replaced
    generator     of all random draws, on the device of logits
    temperature   0 takes the likeliest word, 1 draws as the model says
    returns       (B, T) ids; the first of each row is the true one

    Raises InputError if shapes do not fit or own_fraction is not from 0 to 1.
    """
    check_number("own_fraction", own_fraction, float, 0, 1)
    require(
        logits.shape[:-1] == inputs.shape and inputs.dim() == 2,
        "logits (B, T, V) for inputs (B, T)",
        f"logits {tuple(logits.shape)}, inputs {tuple(inputs.shape)}",
        "give the logits that the model returned for these inputs",
    )
    words = choose(logits[:, :-1].flatten(0, 1), temperature, generator=generator)
    draws = torch.rand(words.shape, generator=generator, device=logits.device)
    true = inputs[:, 1:].flatten()
    mixed = torch.where(draws < own_fraction, words, true).view(inputs.shape[0], -1)
    return torch.cat((inputs[:, :1], mixed), dim=1)


def own_fraction_at(step: int, *, pace: float) -> float:
    """Raise the share of the model's own words along an inverse sigmoid.

    step     updates so far
    pace     k of the paper, at least 1: the share is a half after k ln k updates
    returns  1 - k / (k + exp(step / k)): nearly 0 at first, nearly 1 in the end

    Raises InputError for numbers out of range.
    Bengio et al. 2015, section 2.4.
    """
    check_number("step", step, int, 0, math.inf)
    check_number("pace", pace, float, 1, math.inf)
    return 1 / (1 + pace * math.exp(-step / pace))
