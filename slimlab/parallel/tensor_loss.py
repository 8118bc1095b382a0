"""The loss over a vocabulary that is cut: logits stay where they are.

Chapter 09 derives it. The cross-entropy at a position is log(sum of exp(logit)) minus the logit of
the target. Of a part of the vocabulary that takes two numbers: the logarithm of its own sum, and
the target's logit if it is among its words. So ranks exchange two numbers per position, whatever
the size of the vocabulary, and the gradient, softmax minus one at the target, needs nothing more.
If ranks read different batches, the numbers do not fit together: nothing else would notice.

Production: Megatron-LM's vocab_parallel_cross_entropy makes three all_reduces (maximum, sum,
target), torch's loss_parallel likewise; both keep the softmax, here logits are read again instead.
Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slimlab.comm.base import Communicator
from slimlab.config import InputError, require
from slimlab.model.masks import packed_mask, packed_positions
from slimlab.train.objectives import IGNORE, token_loss


def vocabulary_parallel_loss(
    logits: Tensor, targets: Tensor, group: Communicator
) -> tuple[Tensor, int]:
    """Add up the cross-entropy of all positions that count, from logits that are never gathered.

    logits   (..., V / world_size) of the words from rank V / world_size on: a shard
    targets  (...) int64 from 0 to V - 1, or IGNORE; the same on every rank
    group    the ranks that share the vocabulary
    returns  () the sum in nats, at least in 32 bits, and the number of targets that count, both the
             same on every rank; equal to slimlab.train.objectives.token_loss of the whole logits

    Communicates: one all_gather of two numbers per position; backward nothing.
    Raises InputError as token_loss does, before it communicates; on every rank, if the ranks were
    given different targets, so that a target is found among no rank's words, or among those of two.
    """
    if group.world_size == 1:
        return token_loss(logits, targets)
    _check_targets(logits, targets, group.world_size)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    flat, wanted = wide.reshape(-1, wide.shape[-1]), targets.reshape(-1).long()
    return _Loss.apply(flat, wanted, group), int((targets != IGNORE).sum())


def tensor_parallel_objective(model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
    """Predict the next token at every position, as causal_objective of slimlab.train.objectives.

    model    a Decoder that slimlab.parallel.tensor.tensor_parallel has cut
    batch    as in causal_objective; the same on every rank of the tensor group
    returns  loss sum in nats, number of targets, both the same on every rank of the group

    Communicates: what the model's layers do, and the loss.
    Raises InputError as token_loss does.
    """
    inputs, targets, *document_ids = batch
    packed = {}
    if document_ids:
        packed["mask"] = packed_mask(document_ids[0])
        packed["positions"] = packed_positions(document_ids[0])
    logits = model(inputs, **packed)
    if logits.shape[-1] == model.config.vocab_size:
        return token_loss(logits, targets)
    return vocabulary_parallel_loss(logits, targets, model.tensor_parallel.group)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, group):
        local = targets - group.rank * logits.shape[-1]
        here = (local >= 0) & (local < logits.shape[-1])
        local = local.masked_fill(~here, 0)[:, None]
        counted = targets != IGNORE
        limits = torch.finfo(logits.dtype)  # no logit is as small or as large
        picked = logits.gather(1, local)[:, 0].masked_fill_(~here, limits.min)
        picked = picked.masked_fill_(~counted, limits.max)
        parts = torch.stack((logits.logsumexp(-1), picked))[None]  # (1, 2, N)
        parts = group.all_gather(parts)
        normaliser, found = parts[:, 0].logsumexp(0), parts[:, 1]
        elsewhere, ignored = found == limits.min, found == limits.max
        _check_found(elsewhere, ignored)
        wanted = found.masked_fill(elsewhere | ignored, 0).sum(0)
        ctx.save_for_backward(logits, normaliser, local, here, counted)
        return (normaliser - wanted).masked_fill_(~counted, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, normaliser, local, here, counted = ctx.saved_tensors
        result = (logits - normaliser[:, None]).exp_()
        result.scatter_add_(1, local, here[:, None].to(result.dtype).neg_())
        return result.mul_((counted * grad)[:, None]), None, None


def _check_found(elsewhere: Tensor, ignored: Tensor) -> None:
    """Refuse targets that are not among the words of exactly one rank; all ranks see the same."""
    world_size, num_positions = elsewhere.shape
    once = (elsewhere.sum(0) == world_size - 1) & ~ignored.any(0)
    wrong = int((~(once | ignored.all(0))).sum())
    require(
        wrong == 0,
        "the same batch on every rank that shares the model",
        f"batches that differ: {wrong} of {num_positions} targets are not found exactly once among "
        f"the words of {world_size} ranks",
        "cut the data over the axis data alone; ranks of a tensor group read the same sequences",
    )


def _check_targets(logits: Tensor, targets: Tensor, world_size: int) -> None:
    require(
        logits.dim() >= 1 and logits.shape[:-1] == targets.shape,
        f"targets {tuple(logits.shape[:-1])}, one for each row of logits {tuple(logits.shape)}",
        f"targets {tuple(targets.shape)}",
        "give ids, not one-hot vectors; logits and targets of the same batch, of all positions",
    )
    require(
        targets.dtype in (torch.int64, torch.int32),
        "targets, whole numbers (int64)",
        f"targets of dtype {targets.dtype}",
        "give the ids that the tokenizer returned",
    )
    vocab_size = logits.shape[-1] * world_size
    outside = (targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise InputError(
            f"targets from 0 to {vocab_size - 1}, or IGNORE ({IGNORE}), where {world_size} ranks "
            f"have {logits.shape[-1]} words each",
            f"targets[{', '.join(map(str, place))}] = {int(targets[place])} "
            f"({int(outside.sum())} such targets)",
            "use the tokenizer that the model was made for; mark padding with IGNORE",
        )
