"""Attention in three forms that give the same numbers, and the layer that has many heads.

* explicit: the formula, with the whole score matrix; this is what chapters 01 and 02 explain
* tiled: online softmax over tiles of keys, which shows what fused attention does (tiled.py)
* fused: PyTorch's kernel

Shape letters, here and in the whole book: B sequences, T tokens (queries), S key and value tokens,
H heads, K key/value heads, D d_model, E d_head, F d_ff, V vocabulary; Ev features of a value.

Vaswani et al. 2017 (arXiv:1706.03762), sections 3.2.1 and 3.2.2.

Production layers also drop out weights, project queries, keys and values by one matrix, and read
the cache in place.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import check_divides, check_size, require
from slimlab.model.cache import LayerCache
from slimlab.model.checks import check_attention
from slimlab.model.heads import merge_heads, repeat_heads, split_heads
from slimlab.model.masks import apply_mask, check_mask, with_causal
from slimlab.model.positions import rotate
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
    causal: bool = False,
) -> Tensor:
    """Average the values, weighted by how well each key answers each query.

    query    (B, H, T, E); also (H, T, E), and (T, E) for one head of one sequence
    key      (B, K, S, E), K divides H: K = H multi-head, K = 1 multi-query, between grouped-query
    value    (B, K, S, Ev)
    mask     boolean (True: may attend) or additive, broadcast to (B, H, T, S)
    scale    factor on the scores, 1/sqrt(E) if not given
    form     "explicit", "tiled" or "fused": the same result, other memory and speed
    causal   hide later keys too, as causal_mask(T, S) does; without a mask the fused form is only
             told so and builds none
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
    if causal and form == "fused" and mask is None and query.shape[-2] == key.shape[-2]:
        return _fused(query, key, value, None, _scale_of(query, scale), is_causal=True)
    if causal and (query.shape[-2] > 1 or mask is not None):
        mask = with_causal(mask, query.shape[-2], key.shape[-2], query.device)
        check_mask(mask, (*query.shape[:-1], key.shape[-2]))
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
    return _fused(query, key, value, mask, scale)


FORMS = {"explicit": explicit_attention, "tiled": tiled_attention, "fused": fused_attention}


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> Tensor:
    grouped = query.dim() > 2 and query.shape[-3] != key.shape[-3]
    return F.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=grouped, is_causal=is_causal
    )


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ repeat_heads(key, query).mT * scale  # (B, H, T, S)
    return torch.softmax(apply_mask(scores, mask), dim=-1)


def _scale_of(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale


class MultiHeadAttention(nn.Module):
    """Attend with several heads, each in its own projection, and project their results back.

    d_model        D, width of the input and of the output
    num_heads      H
    num_kv_heads   K, H if not given; divides H; 1 is multi-query
    d_head         E, d_model // num_heads if not given
    bias           give the four projections a bias
    form           form of attention, see scaled_dot_product_attention
    d_context      width of the context in cross-attention, d_model if not given
    rotary_layout  see positions.rotate; read only where forward is given angles

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
        rotary_layout: str = "half",
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
        self.d_head, self.form, self.rotary_layout = d_head, form, rotary_layout
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
        *,
        causal: bool = False,
        angles: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let every position of x attend to the positions of context, or of x itself.

        x               (B, T, D)
        context         (B, S, d_context); x itself if not given (self-attention)
        mask            boolean (True: may attend) or additive, broadcast to (B, H, T, S)
        return_weights  also return the weights, computed by the explicit formula
        causal          hide what stands later, besides what the mask hides
        angles          (T, E/2) or (B, T, E/2): turn queries and keys by them (self-attention)
        cache           keys and values of the past, which S then counts too; those of x are added.
                        In cross-attention: keys and values of the context, made at the first call
        returns         (B, T, D), or that and the weights (B, H, T, S)

        Raises InputError if width or dtype do not fit, and as scaled_dot_product_attention does.
        """
        _check_input("x", x, self.q_proj)
        query = split_heads(self.q_proj(x), self.d_head)  # (B, H, T, E)
        if context is None:
            _check_input("x", x, self.k_proj)
            key, value = self._keys_and_values(x)  # (B, K, S, E)
            if angles is not None:
                query = rotate(query, angles, self.rotary_layout)
                key = rotate(key, angles, self.rotary_layout)
            if cache is not None:
                key, value = cache.append(key, value)
        elif cache is not None and cache.memory is not None:
            key, value = cache.memory
        else:
            _check_input("context", context, self.k_proj)
            key, value = self._keys_and_values(context)
            if cache is not None:
                cache.memory = (key, value)
        heads = scaled_dot_product_attention(query, key, value, mask, form=self.form, causal=causal)
        output = self.out_proj(merge_heads(heads))  # (B, T, D)
        if not return_weights:
            return output
        if causal:
            mask = with_causal(mask, query.shape[-2], key.shape[-2], query.device)
        return output, attention_weights(query, key, mask)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        key = split_heads(self.k_proj(context), self.d_head)
        return key, split_heads(self.v_proj(context), self.d_head)


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
