"""Attention without the score matrix: online softmax over tiles of keys.

`tiled_attention` never holds more than tile_size scores per query and saves for the backward pass
only the output and one number per query, the logarithm of the softmax's denominator. The backward
pass computes the weights of each tile again. Chapter 01 explains it.

Milakov and Gimelshein 2018 (arXiv:1805.02867): online softmax. Dao et al. 2022 (arXiv:2205.14135):
FlashAttention, algorithms 1 to 4.

Production kernels do this inside one GPU program that keeps a tile in fast memory and accumulates
in float32; they tile the queries as well, skip tiles that a causal mask hides whole, and use
random numbers again for dropout. Here the arithmetic is the point: it saves memory, not time. Nor
can it be differentiated twice, or by the transforms of torch.func.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from slimlab.config import check_size, require
from slimlab.model.heads import repeat_heads, sum_groups
from slimlab.model.masks import apply_mask


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    tile_size: int = 128,
) -> Tensor:
    """Compute softmax(query key^T * scale + mask) value, a tile of keys at a time.

    query      (B, H, T, E)
    key        (B, K, S, E)
    value      (B, K, S, Ev)
    mask       boolean, additive or None, broadcast to (B, H, T, S)
    scale      factor on the scores
    tile_size  keys per tile, at least 1; need not divide S
    returns    (B, H, T, Ev), differentiable once in query, key, value and an additive mask

    Input is taken as checked: call slimlab.model.attention.scaled_dot_product_attention.
    """
    check_size("tile_size", tile_size)
    return TiledAttention.apply(query, key, value, mask, scale, tile_size)


class TiledAttention(torch.autograd.Function):
    """Tie tiled_forward and tiled_backward together; saves its inputs, output and logsumexp."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale, tile_size):
        """Compute the output and save what the backward pass needs.

        ctx, query, key, value, mask, scale, tile_size as in tiled_attention
        """
        ctx.scale, ctx.tile_size = scale, tile_size
        with _own_precision(query):
            wide = _widened(query, key, value, mask)
            output, logsumexp = tiled_forward(*wide, scale, tile_size)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        """Return the gradients of query, key, value and mask.

        ctx          what forward saved
        grad_output  (B, H, T, Ev)

        Raises InputError if these gradients are to be differentiated (create_graph=True).
        """
        # once_differentiable would let through what it cannot see, a constant grad_output: the
        # second derivatives would then lack a term without a word.
        require(
            not torch.is_grad_enabled(),
            "the gradient of tiled attention, once",
            "a gradient that is to be differentiated again (create_graph=True)",
            'choose form="explicit" there',
        )
        saved = ctx.saved_tensors
        with _own_precision(grad_output):
            given = (*_widened(grad_output, *saved), ctx.scale, ctx.tile_size)
            grad_mask = mask_gradient(*given) if ctx.needs_input_grad[3] else None
            grads = (*tiled_backward(*given), grad_mask)
        narrow = (g if g is None else g.to(x.dtype) for g, x in zip(grads, saved))
        return *narrow, None, None


def _own_precision(x: Tensor) -> AbstractContextManager:
    """Switch autocast off: it would round the scores forward and not backward, or otherwise."""
    known = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if known else nullcontext()


def _widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors, those of 16 bits in float32: a sum over many keys needs its range."""
    return [
        x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x
        for x in tensors
    ]


def tiles(num_keys: int, tile_size: int) -> Iterator[slice]:
    """Cut num_keys keys into slices of tile_size; the last may be shorter."""
    for start in range(0, num_keys, tile_size):
        yield slice(start, min(start + tile_size, num_keys))


def tile_scores(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, tile: slice
) -> Tensor:
    """Compute the masked scores of all queries against one tile of keys.

    query    (B, H, T, E)
    key      (B, K, S, E)
    mask     boolean, additive or None, broadcast to (B, H, T, S)
    scale    factor on the scores
    tile     which keys
    returns  (B, H, T, keys in the tile)
    """
    scores = query @ repeat_heads(key[..., tile, :], query).mT * scale
    return apply_mask(scores, mask if mask is None else _mask_tile(mask, tile))


def tiled_forward(query, key, value, mask, scale, tile_size):
    """Run the online softmax over the tiles.

    After each tile, running_sum and weighted hold the softmax's denominator and numerator for the
    keys seen so far, both divided by exp(running_max). A larger maximum shrinks them.

    query, key, value, mask, scale, tile_size  as in tiled_attention
    returns  output (B, H, T, Ev) and logsumexp (B, H, T, 1)
    """
    running_max = query.new_full((*query.shape[:-1], 1), -torch.inf)
    running_sum = torch.zeros_like(running_max)
    weighted = query.new_zeros((*query.shape[:-1], value.shape[-1]))
    for tile in tiles(key.shape[-2], tile_size):
        scores = tile_scores(query, key, mask, scale, tile)
        new_max = torch.maximum(running_max, scores.amax(-1, keepdim=True))
        # A query that has met only hidden keys so far: -inf - (-inf) would be NaN.
        shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
        shrink = torch.exp(running_max - shift)
        weights = torch.exp(scores - shift)
        running_sum = running_sum * shrink + weights.sum(-1, keepdim=True)
        weighted = weighted * shrink + weights @ repeat_heads(value[..., tile, :], query)
        running_max = new_max
    return weighted / running_sum, running_max + torch.log(running_sum)


def tile_gradients(grad_output, query, key, value, mask, output, logsumexp, scale, tile_size):
    """Compute every tile's weights again, and with them the gradient of its scores.

    grad_output  (B, H, T, Ev)
    output       (B, H, T, Ev) and logsumexp (B, H, T, 1), as the forward pass left them
    query, key, value, mask, scale, tile_size  as in tiled_attention
    yields       the tile, its weights and the gradient of its scores, both (B, H, T, keys in it)
    """
    # The softmax's own gradient subtracts the weighted mean of grad_weights: this row sum.
    mean = (grad_output * output).sum(-1, keepdim=True)
    for tile in tiles(key.shape[-2], tile_size):
        weights = torch.exp(tile_scores(query, key, mask, scale, tile) - logsumexp)
        grad_weights = grad_output @ repeat_heads(value[..., tile, :], query).mT
        yield tile, weights, weights * (grad_weights - mean)


def tiled_backward(grad_output, query, key, value, mask, output, logsumexp, scale, tile_size):
    """Compute the gradients of query, key and value.

    grad_output, query, key, value, mask, output, logsumexp, scale, tile_size  as in tile_gradients
    returns  gradients in the shapes of query, key, value
    """
    grad_query = torch.zeros_like(query)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    for tile, weights, grad_scores in tile_gradients(
        grad_output, query, key, value, mask, output, logsumexp, scale, tile_size
    ):
        grad_query += grad_scores @ repeat_heads(key[..., tile, :], query) * scale
        grad_key[..., tile, :] = sum_groups(grad_scores.mT @ query * scale, key)
        grad_value[..., tile, :] = sum_groups(weights.mT @ grad_output, value)
    return grad_query, grad_key, grad_value


def mask_gradient(grad_output, query, key, value, mask, output, logsumexp, scale, tile_size):
    """Compute the gradient of an additive mask: that of the scores, summed where it was broadcast.

    grad_output, query, key, value, mask, output, logsumexp, scale, tile_size  as in tile_gradients
    returns  the gradient in the shape of mask: a full matrix only if the mask is one
    """
    grad_mask = torch.zeros_like(mask)
    for tile, _, grad_scores in tile_gradients(
        grad_output, query, key, value, mask, output, logsumexp, scale, tile_size
    ):
        target = _mask_tile(grad_mask, tile)
        target += grad_scores.sum_to_size(target.shape)
    return grad_mask


def _mask_tile(mask: Tensor, tile: slice) -> Tensor:
    # A mask with one column holds for every key, whatever the tile.
    return mask if mask.shape[-1] == 1 else mask[..., tile]
