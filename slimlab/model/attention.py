"""Attention in three forms that give the same numbers, and the layer that has many heads.

* explicit: the formula, with the whole score matrix; this is what chapters 01 and 02 explain
* tiled: online softmax over tiles of keys, which shows what fused attention does (tiled.py)
* fused: PyTorch's kernel

Shape letters, here and in the whole book: B sequences, T tokens (queries), S key and value tokens,
H heads, K key/value heads, D d_model, E d_head, F d_ff, V vocabulary; Ev features of a value.

Vaswani et al. 2017 (arXiv:1706.03762), sections 3.2.1 and 3.2.2.

Production layers also drop out weights, keep keys and values between calls, and pass "causal" to
the kernel as a flag so that hidden tiles are skipped; here every mask is a tensor.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import check_divides, check_size, require
from slimlab.model.checks import check_attention
from slimlab.model.heads import merge_heads, repeat_heads, split_heads
from slimlab.model.masks import apply_mask
from slimlab.model.tiled import tiled_attention


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute softmax(query key^T * scale + mask), row by row.

    query    (B, H, T, E)
    key      (B, K, S, E), K divides H
    mask     boolean (True: may attend) or additive, broadcast to (B, H, T, S)
    scale    factor on the scores, 1/sqrt(E) if not given
    returns  (B, H, T, S), not negative, every row sums to 1

    Raises InputError as scaled_dot_product_attention does.
    Vaswani et al. 2017, equation 1.
    """
    check_attention(query, key, key, mask, scale)
    return _weights(query, key, mask, _scale_of(query, scale))


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    form: str = "explicit",
) -> Tensor:
    """Average the values, weighted by how well each key answers each query.

    query    (B, H, T, E); also (H, T, E), and (T, E) for one head of one sequence
    key      (B, K, S, E), K divides H: K = H multi-head, K = 1 multi-query, between grouped-query
    value    (B, K, S, Ev)
    mask     boolean (True: may attend) or additive, broadcast to (B, H, T, S)
    scale    factor on the scores, 1/sqrt(E) if not given
    form     "explicit", "tiled" or "fused": the same result, other memory and speed
    returns  (B, H, T, Ev)

    Raises InputError if shapes, kinds or devices do not agree, for an unknown form, and if the
    mask lets some query attend nowhere.
    Vaswani et al. 2017, equation 1.
    """
    require(
        form in FORMS,
        f"form: one of {', '.join(FORMS)}",
        f"form = {form!r}",
        "choose one of these names",
    )
    check_attention(query, key, value, mask, scale)
    return FORMS[form](query, key, value, mask, _scale_of(query, scale))


def explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Compute softmax(query key^T * scale + mask) value as the formula says.

    query, key, value, mask, scale  as in scaled_dot_product_attention, checked
    returns  (B, H, T, Ev)
    """
    weights = _weights(query, key, mask, scale)
    return weights @ repeat_heads(value, query)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Hand the work to PyTorch's kernel.

    query, key, value, mask, scale  as in scaled_dot_product_attention, checked
    returns  (B, H, T, Ev)
    """
    grouped = query.dim() > 2 and query.shape[-3] != key.shape[-3]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )


FORMS = {"explicit": explicit_attention, "tiled": tiled_attention, "fused": fused_attention}


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ repeat_heads(key, query).mT * scale  # (B, H, T, S)
    return torch.softmax(apply_mask(scores, mask), dim=-1)


def _scale_of(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


class MultiHeadAttention(nn.Module):
    """Attend with several heads, each in its own projection, and project their results back.

    d_model       D, width of the input and of the output
    num_heads     H
    num_kv_heads  K, H if not given; divides H; 1 is multi-query
    d_head        E, d_model // num_heads if not given
    bias          give the four projections a bias
    form          form of attention, see scaled_dot_product_attention
    d_context     width of the context in cross-attention, d_model if not given

    Its layers are q_proj, k_proj, v_proj and out_proj. The head counts are read from the width of
    their results, so the layer also works on a slice of the heads.

    Raises InputError for sizes that are not positive whole numbers or do not divide.
    Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 for K < H.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        d_head: int | None = None,
        *,
        bias: bool = False,
        form: str = "fused",
        d_context: int | None = None,
    ):
        super().__init__()
        check_size("d_model", d_model)
        check_size("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_size("num_kv_heads", num_kv_heads)
        check_divides("num_kv_heads", num_kv_heads, "num_heads", num_heads)
        if d_head is None:
            check_divides("num_heads", num_heads, "d_model", d_model)
            d_head = d_model // num_heads
        check_size("d_head", d_head)
        d_context = d_model if d_context is None else d_context
        check_size("d_context", d_context)
        require(form in FORMS, f"form: one of {', '.join(FORMS)}", f"form = {form!r}", "choose one")
        self.d_head, self.form = d_head, form
        self.q_proj = nn.Linear(d_model, num_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_context, num_kv_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_context, num_kv_heads * d_head, bias=bias)
        self.out_proj = nn.Linear(num_heads * d_head, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let every position of x attend to the positions of context, or of x itself.

        x               (B, T, D)
        context         (B, S, d_context); x itself if not given (self-attention)
        mask            boolean (True: may attend) or additive, broadcast to (B, H, T, S)
        return_weights  also return the weights, computed by the explicit formula
        returns         (B, T, D), or that and the weights (B, H, T, S)

        Raises InputError if width or dtype do not fit, and as scaled_dot_product_attention does.
        """
        context = x if context is None else context
        _check_input("x", x, self.q_proj)
        _check_input("context", context, self.k_proj)
        query = split_heads(self.q_proj(x), self.d_head)  # (B, H, T, E)
        key = split_heads(self.k_proj(context), self.d_head)  # (B, K, S, E)
        value = split_heads(self.v_proj(context), self.d_head)
        heads = scaled_dot_product_attention(query, key, value, mask, form=self.form)
        output = self.out_proj(merge_heads(heads))  # (B, T, D)
        return (output, attention_weights(query, key, mask)) if return_weights else output


def _check_input(name: str, x: Tensor, projection: nn.Linear) -> None:
    width, dtype = projection.in_features, projection.weight.dtype
    fits = isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == width
    given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
    require(
        fits and x.is_floating_point(),
        f"{name}: floating, (sequences, positions, {width})",
        f"{name} {given}" + (f" of dtype {x.dtype}" if isinstance(x, Tensor) else ""),
        f"embed the tokens in {width} features; add the batch dim with {name}[None]",
    )
    require(
        x.dtype == dtype or torch.is_autocast_enabled(x.device.type),
        f"{name} in the layer's dtype, {dtype}",
        f"{name} of dtype {x.dtype}",
        f"give {name}.to({dtype}), or convert the layer with layer.to({x.dtype})",
    )
