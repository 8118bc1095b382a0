"""Which parameters a model has: every name and shape, from the configuration alone.

`param_shapes` writes down what chapter 03 builds, tensor by tensor; all counts of parameters in
the book are sums over it. Chapter 05 multiplies them with bytes, later chapters cut them up.

What production models have besides: several feed-forward layers of which a token visits a few
(mixture of experts), norms on queries and keys, tables padded to a multiple of 64 rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from slimlab.config import ModelConfig, require

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Write down the name and the shape of every parameter.

    config   all of it is read
    returns  name -> shape, in the order of the model's named_parameters(). A matrix that maps I
             features to O has the shape (O, I), as nn.Linear keeps it. A tied lm_head is the table
             of the tokens once more and stands in the list once, as embedding.tokens.weight.

    Raises InputError for what is no configuration.
    """
    check_config(config)
    stacks = {"decoder": _decoder, "encoder": _encoder, "encoder_decoder": _encoder_decoder}
    return dict(stacks[config.kind](config))


def check_config(config: ModelConfig) -> None:
    """Refuse a model, a dict or a name where a plan needs the configuration.

    config  what was given
    """
    require(
        isinstance(config, ModelConfig),
        "a ModelConfig",
        f"a {type(config).__name__}",
        "give model.config, ModelConfig(...) or family_config(name)",
    )


def num_params(config: ModelConfig) -> int:
    """Count the parameters of a model exactly.

    config   all of it is read
    """
    return sum(prod(shape) for shape in param_shapes(config).values())


def params_by_part(config: ModelConfig) -> dict[str, int]:
    """Count the parameters of each part of the model; the parts add up to num_params.

    config   all of it is read
    returns  part -> count: "tokens", "positions" and "segments" are tables, "attention" (cross-
             attention too), "feed_forward" and "norms" are those of all blocks together, the last
             norm included, "heads" is what stands behind the last block: lm_head if it is not
             tied, an encoder's transform, pooler and biases. Parts that are empty are left out.
    """
    counts = {}
    for name, shape in param_shapes(config).items():
        part = _part(name)
        counts[part] = counts.get(part, 0) + prod(shape)
    return counts


def attention_params(config: ModelConfig) -> int:
    """Count the entries of W^Q, W^K, W^V and W^O of one layer, and of their biases if it has them.

    config   d_model, num_heads, num_kv_heads, d_head and bias are read
    returns  2 D H E + 2 D K E without biases; 4 D^2, whatever H is, if K = H and E = D/H
    """
    return _count(_attention(config, "attention"))


def feed_forward_params(config: ModelConfig, *, gated: bool | None = None) -> int:
    """Count the entries of one layer's feed-forward matrices, and of their biases if it has them.

    config   d_model, d_ff, feed_forward and bias are read
    gated    three matrices (SwiGLU, as in LLaMA) or two; as in config if not given
    returns  2 D F or 3 D F without biases
    """
    return _count(_feed_forward(_varied(config, gated), "feed_forward"))


def block_params(config: ModelConfig, *, gated: bool | None = None) -> int:
    """Count the parameters of one Transformer block: attention, feed-forward layer, two norms.

    config   all sizes but vocab_size, seq_len and num_layers are read
    gated    see feed_forward_params
    returns  attention_params + feed_forward_params + 2 D, if a norm has a gain and no bias
    """
    return _count(_block(_varied(config, gated), "block"))


def decoder_params(
    config: ModelConfig,
    *,
    gated: bool | None = None,
    tied_embeddings: bool | None = None,
    learned_positions: bool | None = None,
) -> int:
    """Count the parameters of a decoder exactly.

    config             all sizes are read; seq_len only for learned positions
    gated              see feed_forward_params
    tied_embeddings    one table embeds tokens and scores the next one, or two tables do
    learned_positions  a table with one row per position, or none
    returns            L blocks, a last norm and the tables. What is not given is as in config.
    """
    choices = {"kind": "decoder", "num_segments": 0}
    if tied_embeddings is not None:
        choices["tie_embeddings"] = tied_embeddings
    if learned_positions is not None:
        choices["positions"] = "learned" if learned_positions else "none"
    return num_params(replace(_varied(config, gated), **choices))


def _varied(config: ModelConfig, gated: bool | None) -> ModelConfig:
    if gated is None or gated == config.gated:
        return config
    return replace(config, feed_forward="swiglu" if gated else "gelu")


def _count(shapes: Shapes) -> int:
    return sum(prod(shape) for _, shape in shapes)


def _linear(name: str, d_in: int, d_out: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (d_out, d_in)
    if bias:
        yield f"{name}.bias", (d_out,)


def _norm(config: ModelConfig, name: str) -> Shapes:
    yield f"{name}.weight", (config.d_model,)
    if config.norm == "layer" and config.bias:
        yield f"{name}.bias", (config.d_model,)


def _attention(config: ModelConfig, name: str) -> Shapes:
    query, key = config.num_heads * config.d_head, config.num_kv_heads * config.d_head
    yield from _linear(f"{name}.q_proj", config.d_model, query, config.bias)
    yield from _linear(f"{name}.k_proj", config.d_model, key, config.bias)
    yield from _linear(f"{name}.v_proj", config.d_model, key, config.bias)
    yield from _linear(f"{name}.out_proj", query, config.d_model, config.bias)


def _feed_forward(config: ModelConfig, name: str) -> Shapes:
    for matrix in ("gate_proj", "up_proj") if config.gated else ("up_proj",):
        yield from _linear(f"{name}.{matrix}", config.d_model, config.d_ff, config.bias)
    yield from _linear(f"{name}.down_proj", config.d_ff, config.d_model, config.bias)


def _block(config: ModelConfig, name: str, *, cross: bool = False) -> Shapes:
    for attention in ("attention", "cross_attention") if cross else ("attention",):
        norm = "cross_norm" if attention == "cross_attention" else "attention_norm"
        yield from _norm(config, f"{name}.{norm}")
        yield from _attention(config, f"{name}.{attention}")
    yield from _norm(config, f"{name}.feed_forward_norm")
    yield from _feed_forward(config, f"{name}.feed_forward")


def _blocks(config: ModelConfig, name: str, *, cross: bool = False) -> Shapes:
    for layer in range(config.num_layers):
        yield from _block(config, f"{name}.{layer}", cross=cross)


def _embedding(config: ModelConfig) -> Shapes:
    yield "embedding.tokens.weight", (config.vocab_size, config.d_model)
    if config.positions == "learned":
        yield "embedding.positions.weight", (config.seq_len, config.d_model)
    if config.num_segments:
        yield "embedding.segments.weight", (config.num_segments, config.d_model)


def _last_norm(config: ModelConfig, name: str) -> Shapes:
    # With norm_place "post" every block ends in a norm.
    if config.norm_place == "pre":
        yield from _norm(config, name)


def _lm_head(config: ModelConfig) -> Shapes:
    if not config.tie_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.d_model)


def _decoder(config: ModelConfig) -> Shapes:
    yield from _embedding(config)
    yield from _blocks(config, "blocks")
    yield from _last_norm(config, "final_norm")
    yield from _lm_head(config)


def _encoder(config: ModelConfig) -> Shapes:
    yield "token_bias", (config.vocab_size,)
    yield from _embedding(config)
    if config.norm_place == "post":
        yield from _norm(config, "embedding_norm")
    yield from _blocks(config, "blocks")
    yield from _last_norm(config, "final_norm")
    yield from _linear("token_transform", config.d_model, config.d_model, config.bias)
    yield from _norm(config, "token_norm")
    yield from _lm_head(config)
    if config.num_segments:
        yield from _linear("pooler", config.d_model, config.d_model, config.bias)
        yield from _linear("pair_head", config.d_model, 2, config.bias)


def _encoder_decoder(config: ModelConfig) -> Shapes:
    yield from _embedding(config)
    yield from _blocks(config, "encoder_blocks")
    yield from _last_norm(config, "encoder_norm")
    yield from _blocks(config, "blocks", cross=True)
    yield from _last_norm(config, "final_norm")
    yield from _lm_head(config)


def _part(name: str) -> str:
    """Return the part that a parameter belongs to, read from its name."""
    words = name.split(".")
    if words[0] == "embedding":
        return words[1]
    if any(word.endswith("norm") for word in words):
        return "norms"
    for part in ("attention", "feed_forward"):
        if any(word.endswith(part) for word in words):
            return part
    return "heads"
