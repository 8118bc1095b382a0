"""Gradient accumulation: the gradient of a batch that does not fit into memory, piece by piece.

Chapter 05 explains it, and why pieces must be weighted by their tokens: the mean of means is not
the mean when one piece has 3 tokens and the next has 30. Two widely used libraries had that error
until October 2024 (huggingface/transformers pull request 34191, pytorch/torchtune pull 1875).

Production also keeps ranks from talking until the last piece (DistributedDataParallel.no_sync).
"""

from collections.abc import Callable
from contextlib import nullcontext
from math import ceil

import torch
from torch import Tensor, nn

from slimlab.config import check_size, require

# (model, batch) -> (sum of losses over target tokens, number of target tokens)
Objective = Callable[[nn.Module, object], tuple[Tensor, int | Tensor]]


def accumulate_gradients(
    model: nn.Module,
    batch: object,
    objective: Objective,
    micro_batch_size: int | None = None,
    *,
    context: Callable = nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Tensor, int]:
    """Set every parameter's gradient to that of the mean loss over all target tokens of a batch.

    model             whose gradients are replaced
    batch             of B sequences: a tensor, or tensors in tuples or dicts, all with dim 0 = B
    objective         objective(model, batch) returns the sum of losses and the number of tokens
    micro_batch_size  sequences in memory at a time; None: all B
    context           makes the context of each forward pass, such as autocast
    scale             what is applied to the loss before back-propagation, such as LossScaler.scale
    returns           the mean loss per token, on the model's device, and the number of tokens

    The result is that of the whole batch at once, up to the order of additions.
    Raises InputError if no token of the batch is a target.
    """
    model.zero_grad(set_to_none=True)
    pieces = split_batch(batch, micro_batch_size)
    loss_sum, num_tokens, divisor = 0.0, 0, 0
    for piece in pieces:
        with context():
            piece_loss, piece_tokens = objective(model, piece)
        num_tokens += int(piece_tokens)
        # A forecast of the batch's tokens: sums, not yet means, could overflow 16 bits.
        divisor = divisor or max(num_tokens, 1) * len(pieces)
        scale(piece_loss / divisor).backward()
        loss_sum = loss_sum + piece_loss.detach()
    require(
        num_tokens > 0,
        "a batch with at least one target token",
        "a batch in which none is",
        "check what marks the positions that do not count; mask a larger fraction",
    )
    if divisor != num_tokens:
        for param in model.parameters():
            if param.grad is not None:
                param.grad.mul_(divisor / num_tokens)
    return loss_sum / num_tokens, num_tokens


def split_batch(batch: object, micro_batch_size: int | None) -> list:
    """Cut a batch into pieces of at most so many sequences.

    batch             as in accumulate_gradients
    micro_batch_size  None: one piece
    returns           pieces of the same form; the last one may be smaller

    Raises InputError if tensors of the batch disagree about the number of sequences.
    """
    sizes = []
    map_tensors(lambda tensor: sizes.append(tensor.shape[0] if tensor.dim() else None), batch)
    require(
        bool(sizes) and len(set(sizes)) == 1 and sizes[0],
        "a batch: tensors with the same number of sequences, at least one, as dim 0",
        f"{len(sizes)} tensors with dim 0 of {sorted(set(map(str, sizes)))}",
        "leave out of the batch what does not belong to single sequences",
    )
    if micro_batch_size is None or micro_batch_size >= sizes[0]:
        return [batch]
    check_size("micro_batch_size", micro_batch_size)
    starts = [micro_batch_size * i for i in range(ceil(sizes[0] / micro_batch_size))]
    return [map_tensors(lambda t, at=at: t[at : at + micro_batch_size], batch) for at in starts]


def map_tensors(function: Callable[[Tensor], object], batch: object) -> object:
    """Apply a function to every tensor of a batch and keep its form.

    function  of one tensor
    batch     a tensor, or tuples (named or not), lists and dicts of them; the rest stays as it is
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {name: map_tensors(function, one) for name, one in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_tensors(function, one) for one in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def move_batch(batch: object, device: torch.device) -> object:
    """Copy a batch to a device.

    batch   as in accumulate_gradients
    device  where the model is
    """
    return map_tensors(lambda tensor: tensor.to(device), batch)
