"""Objectives: what a model is asked to predict, and the loss that says how badly it did.

Chapter 04 explains the objectives, chapter 05 the loss. Causal: the next token, at every position.
Masked: tokens that were hidden (masking.py). Pairs: whether one sentence follows another
(pairs.py). Sequence to sequence: the next token of a target text, the true ones before it given,
which is teacher forcing (scheduled_sampling.py weakens it).

Every objective returns a sum and a count, never a mean: means over unequal counts do not average.
Add the sums of all micro-batches, or of all ranks, and divide once by the sum of the counts
(accumulate.py). A part without any target then adds 0 to both; a whole batch without is an error.

Devlin et al. 2018 (arXiv:1810.04805) for masked tokens and pairs; Vaswani et al. 2017
(arXiv:1706.03762), section 3.1, for the shift.

Production computes the loss in slices, so that the logits of a whole batch never exist at once,
and does not look into targets before it uses them, since on a GPU looking costs a wait.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import InputError, check_number, check_size, require
from slimlab.model.masks import packed_mask, packed_positions, padding_mask

IGNORE = -100  # the target of a position that does not count; PyTorch's cross_entropy has the same


class MaskedBatch(NamedTuple):
    """A batch for an encoder; what is None was not needed.

    inputs    (B, T) token ids, some hidden behind the mask token
    targets   (B, T) the hidden ids, IGNORE elsewhere
    lengths   (B,) tokens of each row without its padding
    segments  (B, T) 0 in the first sentence, 1 in the second
    labels    (B,) RANDOM or FOLLOWS of slimlab.train.pairs
    """

    inputs: Tensor
    targets: Tensor
    lengths: Tensor | None = None
    segments: Tensor | None = None
    labels: Tensor | None = None


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Add up the cross-entropy, -log softmax(logits)[target], of all positions that count.

    logits   (..., V)
    targets  (...) int64 from 0 to V - 1, or IGNORE
    returns  () the sum in nats, at least in 32 bits, and the number of targets that count; of a
             batch without any, 0 and 0

    Raises InputError if shapes do not fit or a target is outside the vocabulary, naming its place.
    """
    _check_targets(logits, targets)
    vocab_size = logits.shape[-1]
    # A sum of a few thousand losses is beyond float16, and loses its small terms in bfloat16.
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    loss_sum = F.cross_entropy(
        wide.reshape(-1, vocab_size),
        targets.reshape(-1).long(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return loss_sum, int((targets != IGNORE).sum())


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Average the cross-entropy over the positions that count; for one batch, not for parts of one.

    logits, targets  as in token_loss
    returns          () nats per token

    Raises InputError as token_loss does, and if no position counts.
    """
    loss_sum, num_tokens = token_loss(logits, targets)
    _check_any(num_tokens, targets)
    return loss_sum / num_tokens


def perplexity(loss: float | Tensor) -> float:
    """Turn a mean loss into the number of equally likely tokens that it amounts to.

    loss     nats per token
    returns  exp(loss), infinity if that is too large for a float
    """
    try:
        return math.exp(_number(loss))
    except OverflowError:
        return math.inf


def bits_per_byte(loss_sum_nats: float | Tensor, num_bytes: int) -> float:
    """Turn a summed loss into a measure that does not depend on the tokenizer.

    loss_sum_nats  loss of every token of a text, added
    num_bytes      of that text in UTF-8
    returns        bits per byte; 8 for a text that the model knows nothing about

    Raises InputError if num_bytes is not at least 1.
    """
    check_size("num_bytes", num_bytes)
    return _number(loss_sum_nats) / math.log(2) / num_bytes


def causal_objective(model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
    """Predict the next token at every position.

    model    ids -> logits (B, T, V), for instance a Decoder
    batch    inputs (B, T) and targets (B, T), which are one token later; optionally document_ids
             (B, T), for rows of several documents that must not see each other
    returns  loss sum in nats, number of targets

    Raises InputError as token_loss does.
    Radford et al. 2018 (GPT); Touvron et al. 2023 (arXiv:2302.13971), section 2.
    """
    inputs, targets, *document_ids = batch
    packed = {}
    if document_ids:
        packed["mask"] = packed_mask(document_ids[0])
        packed["positions"] = packed_positions(document_ids[0])
    return token_loss(model(inputs, **packed), targets)


def masked_objective(model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
    """Predict the tokens that were hidden.

    model    ids -> EncoderOutput, for instance an Encoder
    batch    MaskedBatch, or a tuple of its first fields; labels are not used
    returns  loss sum in nats, number of hidden tokens

    Raises InputError as token_loss does.
    """
    batch = MaskedBatch(*batch)
    output = _encode(model, batch)
    return token_loss(output.token_logits, batch.targets)


def pair_objective(model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
    """Tell whether the second sentence follows the first.

    model    ids -> EncoderOutput with pair_logits (B, 2)
    batch    MaskedBatch with labels; targets are not used
    returns  loss sum in nats, number of pairs

    Raises InputError for a batch without labels, or a model without a head for pairs.
    """
    batch = MaskedBatch(*batch)
    return _pair_loss(_encode(model, batch), batch)


def masked_pair_objective(model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
    """Do both at once, as BERT does: mean loss of hidden tokens plus mean loss of pairs.

    model    ids -> EncoderOutput with pair_logits (B, 2)
    batch    MaskedBatch with labels
    returns  a sum, and the number of hidden tokens; divided, they give the sum of the two means.
             Over several micro-batches the pairs are weighted by their hidden tokens.

    Raises InputError as masked_objective and pair_objective do.
    """
    batch = MaskedBatch(*batch)
    output = _encode(model, batch)
    loss_sum, num_tokens = token_loss(output.token_logits, batch.targets)
    pair_sum, num_pairs = _pair_loss(output, batch)
    return loss_sum + pair_sum * (num_tokens / num_pairs), num_tokens


def sequence_objective(model: nn.Module, batch: tuple, *, start_id: int) -> tuple[Tensor, int]:
    """Predict every token of the target from the source and the true tokens before it.

    model     (source_ids, target_ids) -> logits (B, T, V), for instance an EncoderDecoder
    batch     source_ids (B, S), targets (B, T) with IGNORE as padding, and optionally
              source_lengths (B,)
    start_id  token that stands before the first one of every target
    returns   loss sum in nats, number of targets without padding

    Raises InputError as token_loss does.
    """
    source_ids, targets, *lengths = batch
    masked = {"source_mask": padding_mask(lengths[0], source_ids.shape[1])} if lengths else {}
    return token_loss(model(source_ids, shift_right(targets, start_id), **masked), targets)


def shift_right(targets: Tensor, start_id: int) -> Tensor:
    """Make the decoder's input: every position gets the token before the one it must predict.

    targets   (B, T) ids, IGNORE as padding behind them
    start_id  what the first position gets, and the padding, which no position that counts can see
    returns   (B, T); without the shift a model would only have to copy its input

    Raises InputError if targets are not (B, T) or start_id is no id.
    """
    check_number("start_id", start_id, int, 0, math.inf)
    require(
        targets.dim() == 2 and not targets.is_floating_point(),
        "targets (sequences, positions), int64",
        f"{tuple(targets.shape)} of dtype {targets.dtype}",
        "give one sequence as targets[None]",
    )
    start = torch.full_like(targets[:, :1], start_id)
    shifted = torch.cat((start, targets[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == IGNORE, start_id)


def _number(loss: float | Tensor) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)


def _encode(model: nn.Module, batch: MaskedBatch):
    given = {}
    if batch.lengths is not None:
        given["mask"] = padding_mask(batch.lengths, batch.inputs.shape[1])
    if batch.segments is not None:
        given["segments"] = batch.segments
    return model(batch.inputs, **given)


def _pair_loss(output, batch: MaskedBatch) -> tuple[Tensor, int]:
    require(
        batch.labels is not None and output.pair_logits is not None,
        "a batch with labels and a model with pair_logits",
        f"labels {'missing' if batch.labels is None else 'given'}, pair_logits "
        f"{'missing' if output.pair_logits is None else 'given'}",
        "make the batch with slimlab.train.pairs, the model with num_segments=2",
    )
    loss_sum, num_pairs = token_loss(output.pair_logits, batch.labels)
    _check_any(num_pairs, batch.labels)
    return loss_sum, num_pairs


def _check_any(count: int, targets: Tensor) -> None:
    require(
        count > 0,
        "a batch with at least one target",
        f"targets {tuple(targets.shape)}, all of them IGNORE ({IGNORE})",
        "leave such batches out, or check how the targets were made",
    )


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    require(
        logits.dim() >= 1 and logits.shape[:-1] == targets.shape,
        f"targets {tuple(logits.shape[:-1])}, one for each row of logits {tuple(logits.shape)}",
        f"targets {tuple(targets.shape)}",
        "give ids, not one-hot vectors; logits and targets of the same batch",
    )
    require(
        targets.dtype in (torch.int64, torch.int32),
        "targets, whole numbers (int64)",
        f"targets of dtype {targets.dtype}",
        "give the ids that the tokenizer returned",
    )
    vocab_size = logits.shape[-1]
    outside = (targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise InputError(
            f"targets from 0 to {vocab_size - 1}, or IGNORE ({IGNORE})",
            f"targets[{', '.join(map(str, place))}] = {int(targets[place])} "
            f"({int(outside.sum())} such targets)",
            "use the tokenizer that the model was made for; mark padding with IGNORE",
        )
