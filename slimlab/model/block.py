"""One block of a Transformer, and the table that tokens and positions start from.

Chapter 03 derives both orders of norm and sum. Every sub-layer adds its result to what came in:
y = x + f(norm(x)) ("pre") or y = norm(x + f(x)) ("post").

Production fuses the sum with the next norm, and keeps the stream in 32 bits where the layers
compute in 16.
"""

import torch
from torch import Tensor, nn

from slimlab.config import ModelConfig, require
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.cache import LayerCache
from slimlab.model.layers import FeedForward, make_norm
from slimlab.model.positions import sinusoidal_positions


class Block(nn.Module):
    """Attend, attend to an encoder's memory if there is one, and feed forward.

    config  sizes and choices; norm_place decides between y = x + f(norm(x)) and y = norm(x + f(x))
    cross   have cross-attention too, as the decoder of an encoder-decoder

    Its parts are attention_norm, attention, cross_norm, cross_attention, feed_forward_norm and
    feed_forward. Vaswani et al. 2017, section 3.1 ("post"); Xiong et al. 2020 (arXiv:2002.04745)
    for "pre".
    """

    def __init__(self, config: ModelConfig, cross: bool = False):
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = norm_of(config)
        self.attention = attention_of(config)
        if cross:
            self.cross_norm = norm_of(config)
            self.cross_attention = attention_of(config)
        self.feed_forward_norm = norm_of(config)
        self.feed_forward = FeedForward(
            config.d_model, config.d_ff, config.feed_forward, bias=config.bias
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        angles: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Refine every position of x.

        x            (B, T, D)
        mask         which position may attend to which, see MultiHeadAttention
        causal       hide what stands later too
        angles       rotary angles of the positions of x
        memory       (B, S, D) an encoder's output, for a block with cross-attention
        memory_mask  broadcast to (B, H, T, S)
        cache        keys and values of the past
        returns      (B, T, D)
        """
        attention = {"mask": mask, "causal": causal, "angles": angles, "cache": cache}
        x = self._add(x, self.attention_norm, self.attention, **attention)
        if memory is not None:
            attention = {"context": memory, "mask": memory_mask, "cache": cache}
            x = self._add(x, self.cross_norm, self.cross_attention, **attention)
        return self._add(x, self.feed_forward_norm, self.feed_forward)

    def _add(self, x: Tensor, norm: nn.Module, sub_layer: nn.Module, **given) -> Tensor:
        if self.pre:
            return x + self.dropout(sub_layer(norm(x), **given))
        return norm(x + self.dropout(sub_layer(x, **given)))


def norm_of(config: ModelConfig) -> nn.Module:
    """Make a norm of d_model features as `config` asks for."""
    return make_norm(config.norm, config.d_model, config.norm_eps, config.bias)


def attention_of(config: ModelConfig) -> MultiHeadAttention:
    """Make an attention layer of the sizes in `config`.

    Raises InputError for an odd d_head with rotary positions.
    """
    require(
        config.positions != "rotary" or config.d_head % 2 == 0,
        "an even d_head for rotary positions, which turn features in pairs",
        f"d_head = {config.d_head}",
        'choose num_heads so that d_model / num_heads is even, or positions="learned"',
    )
    return MultiHeadAttention(
        config.d_model,
        config.num_heads,
        config.num_kv_heads,
        config.d_head,
        bias=config.bias,
        rotary_layout=config.rotary_layout,
    )


class Embedding(nn.Module):
    """Turn ids into vectors and add what says where they stand.

    config  vocab_size, seq_len, d_model, positions, num_segments and dropout are read

    Its parts are tokens and, where the configuration asks for them, positions (a learned table)
    and segments. The sinusoidal table is computed, not learned and not saved; with it the tokens'
    vectors are multiplied by sqrt(D), as in Vaswani et al. 2017, section 3.4.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.positions = nn.Embedding(config.seq_len, config.d_model)
        if config.positions == "sinusoidal":
            table = sinusoidal_positions(config.seq_len, config.d_model)
            self.register_buffer("sinusoids", table, persistent=False)
        if config.num_segments:
            self.segments = nn.Embedding(config.num_segments, config.d_model)

    def forward(self, ids: Tensor, positions: Tensor, segments: Tensor | None = None) -> Tensor:
        """Look up and add.

        ids        (B, T) int64
        positions  (T,) or (B, T) int64
        segments   (B, T) int64; all 0 if not given
        returns    (B, T, D)
        """
        x = self.tokens(ids)
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        if self.config.positions == "sinusoidal":
            x = x * self.config.d_model**0.5 + self.sinusoids[positions].to(x.dtype)
        if self.config.num_segments:
            x = x + self.segments(torch.zeros_like(ids) if segments is None else segments)
        return x


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Refuse what is no batch of token ids of this vocabulary.

    name        what the ids are called, for the message
    ids         (B, T) whole numbers from 0 to vocab_size - 1
    vocab_size  V

    Raises InputError that names the first id that does not fit.
    """
    fits = isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype in (torch.int64, torch.int32)
    given = (
        f"{tuple(ids.shape)} of dtype {ids.dtype}" if isinstance(ids, Tensor) else f"{ids!r:.60}"
    )
    require(
        fits and ids.numel() > 0,
        f"{name}: token ids (sequences, positions), int64, at least one",
        given,
        f"give torch.tensor([tokenizer.encode(text)]) as {name}",
    )
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise_at = f"id {int(ids[row, place])} in sequence {row} at position {place}"
        require(
            False,
            f"{name}: ids from 0 to {vocab_size - 1}, the model's vocabulary",
            f"{raise_at} ({int(outside.sum())} such ids)",
            "use the tokenizer that this model was trained with, or make the model with its "
            "vocab_size",
        )


def check_positions(
    positions: Tensor | None, start: int, ids: Tensor, config: ModelConfig
) -> Tensor:
    """Return the positions of ids, counted from start unless they are given.

    positions  None, (T,) or (B, T) int64
    start      tokens that stand before ids
    ids        (B, T)
    config     positions and seq_len are read
    returns    (T,) or (B, T) int64

    Raises InputError if a text is longer than seq_len where that is a limit: where positions are a
    table. Rotary positions have no last one; how well a model does beyond its training length is
    another matter.
    """
    length = ids.shape[1]
    if positions is None:
        positions = torch.arange(start, start + length, device=ids.device)
    require(
        positions.shape in ((length,), tuple(ids.shape)),
        f"positions ({length},) or {tuple(ids.shape)}, one per token",
        f"positions {tuple(positions.shape)}",
        "leave positions out, or use packed_positions(document_ids)",
    )
    table = config.positions in ("learned", "sinusoidal")
    last = int(positions.max()) if table else -1
    require(
        last < config.seq_len,
        f"at most {config.seq_len} positions (seq_len), as many as the table of "
        f"{config.positions} positions has rows",
        f"a token at position {last}, counted from 0",
        "cut the text, read it in chunks, or make the model with a larger seq_len",
    )
    return positions
