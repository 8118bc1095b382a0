"""Cut a width into heads, put heads together, share key heads between query heads.

Chapter 02 explains these four lines of bookkeeping. Heads stand before positions, (B, H, T, E),
so that one matrix product serves all heads of all sequences.

Production code leaves out `repeat_heads`: its kernels read one key head from several query heads
without making copies.
"""

from torch import Tensor


def split_heads(x: Tensor, d_head: int) -> Tensor:
    """Cut the last dim of x into heads of d_head features and put the heads before the positions.

    x        (B, T, H*E)
    d_head   E; the number of heads follows from the width, so a slice of the heads works too
    returns  (B, H, T, E), a view
    """
    return x.unflatten(-1, (-1, d_head)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """Put the heads of x side by side again: the inverse of split_heads.

    x        (B, H, T, E)
    returns  (B, T, H*E)
    """
    return x.transpose(-3, -2).flatten(-2)


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Give every query head its key or value head: K heads become H, each used H/K times in a row.

    x        (B, K, S, E) keys or values; (S, E) where there is no head dim
    query    (B, H, T, E), read for H only
    returns  (B, H, S, E); x itself if K = H

    Ainslie et al. 2023 (arXiv:2305.13245): grouped queries; K = 1 is Shazeer's multi-query (2019).
    """
    if x.dim() == 2 or x.shape[-3] == query.shape[-3]:
        return x
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3)


def sum_groups(grad: Tensor, x: Tensor) -> Tensor:
    """Add up the gradients of the query heads that share one key head.

    This is the backward pass of repeat_heads: what was copied forward is summed backward.

    grad     (B, H, S, E) gradient of the repeated heads
    x        (B, K, S, E), read for K only
    returns  (B, K, S, E)
    """
    if x.dim() == 2 or x.shape[-3] == grad.shape[-3]:
        return grad
    return grad.unflatten(-3, (x.shape[-3], -1)).sum(-3)
