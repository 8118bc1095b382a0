"""How much arithmetic a training step does: every matrix product, from the configuration alone.

Counted is what torch.utils.flop_counter counts: the matrix products, two FLOP for every product of
two entries and its addition. Norms, softmax, activations and the optimizer are left out: they are
few FLOP per byte and cost time by the memory they touch. A causal mask saves nothing here, as it
saves nothing in the counter; a kernel that skips hidden tiles does up to half of "products" less.

Chapter 05 compares the prediction with the count, and with what a machine can do. For a decoder
with K = H and F = 4 D the sums below are equations 7 of Korthikanti et al. 2022 (arXiv:2205.05198)
and, with recomputation, 3 of Narayanan et al. 2021 (arXiv:2104.04473).

Production planners add what is not arithmetic: communication, bubbles, and how far below its peak
a processor runs for each shape.
"""

from slimlab.config import ModelConfig, check_choice, check_size, require
from slimlab.plan.flops import attention_flop
from slimlab.plan.params import check_config

FORMS = ("explicit", "tiled", "fused")
RECOMPUTE = ("none", "block")


def forward_flop_by_part(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
) -> dict[str, int]:
    """Count the FLOP of one forward pass, part by part.

    config      all sizes are read, and kind, feed_forward and num_segments
    batch_size  B sequences
    seq_len     T tokens of each, config.seq_len if not given; those of the decoder if there are two
                halves
    source_len  S tokens of each sequence of the encoder, seq_len if not given; for two halves only
    returns     part -> FLOP. "projections" makes queries, keys, values and the output of attention
                (cross-attention too), "products" is QK^T and the weighted average, "feed_forward"
                the two or three matrices, "logits" the scores of all V tokens at all positions,
                "heads" (encoder only) the transform before them, the pooler and the pair head.

    Raises InputError for sizes that are not positive whole numbers or a source without a place.
    """
    T, S = batch_lengths(config, batch_size, seq_len, source_len)
    L, D, tokens = config.num_layers, config.d_model, batch_size * T
    parts = dict.fromkeys(("projections", "products", "feed_forward"), 0)
    _add_stack(parts, config, batch_size, T)
    if config.kind == "encoder_decoder":
        _add_stack(parts, config, batch_size, S)
        parts["projections"] += L * _projection_flop(config, tokens, batch_size * S)
        parts["products"] += L * _product_flop(config, batch_size, T, S)
    parts["logits"] = 2 * tokens * D * config.vocab_size
    if config.kind == "encoder":
        parts["heads"] = 2 * tokens * D * D
        if config.num_segments:  # pooler and pair head read the first token only
            parts["heads"] += 2 * batch_size * D * D + 2 * batch_size * D * 2
    return parts


def forward_flop(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
) -> int:
    """Count the FLOP of one forward pass.

    config, batch_size, seq_len, source_len  as in forward_flop_by_part
    returns                                  the sum of its parts
    """
    return sum(forward_flop_by_part(config, batch_size, seq_len, source_len=source_len).values())


def backward_flop(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
    form: str = "explicit",
) -> int:
    """Count the FLOP of one backward pass: every product forward needs two backward.

    One gives the gradient of the input, one that of the weights (or of the other factor).

    config, batch_size, seq_len, source_len  as in forward_flop_by_part
    form     form of attention; "tiled" and "fused" do not keep the scores and compute them again,
             five products for the two of the forward pass
    returns  twice forward_flop, and half of "products" more if the form is not "explicit"

    Torch's counter sees fused attention on a GPU, not on a CPU: count with form="explicit" there.
    """
    check_choice("form", form, FORMS)
    parts = forward_flop_by_part(config, batch_size, seq_len, source_len=source_len)
    again = 0 if form == "explicit" else parts["products"] // 2
    return 2 * sum(parts.values()) + again


def recomputed_flop(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
    recompute: str = "block",
) -> int:
    """Count the FLOP that recomputation adds to a training step.

    config, batch_size, seq_len, source_len  as in forward_flop_by_part
    recompute  "none", or "block": the forward pass of every block a second time, of logits and
               heads not
    returns    FLOP
    """
    check_choice("recompute", recompute, RECOMPUTE)
    parts = forward_flop_by_part(config, batch_size, seq_len, source_len=source_len)
    inside = parts["projections"] + parts["products"] + parts["feed_forward"]
    return inside if recompute == "block" else 0


def training_step_flop(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
    recompute: str = "none",
    form: str = "explicit",
) -> int:
    """Count the FLOP of one training step: forward, backward, and what is computed again.

    With recompute="none" and form="explicit" it is the model's own work, the numerator of the
    model FLOP utilisation (MFU); with what a run really does, that of its hardware utilisation.

    config, batch_size, seq_len, source_len  as in forward_flop_by_part
    recompute  "none" or "block", see recomputed_flop
    form       "explicit", "tiled" or "fused", see backward_flop
    returns    FLOP; an encoder's loss is taken to use all its outputs

    Raises InputError for sizes that are not positive whole numbers, and for unknown words.
    """
    sizes = {"seq_len": seq_len, "source_len": source_len}
    return (
        forward_flop(config, batch_size, **sizes)
        + backward_flop(config, batch_size, **sizes, form=form)
        + recomputed_flop(config, batch_size, **sizes, recompute=recompute)
    )


def _add_stack(parts: dict[str, int], config: ModelConfig, batch_size: int, T: int) -> None:
    """Add the self-attention and the feed-forward layers of one stack of blocks."""
    L, tokens = config.num_layers, batch_size * T
    matrices = 3 if config.gated else 2
    parts["projections"] += L * _projection_flop(config, tokens, tokens)
    parts["products"] += L * _product_flop(config, batch_size, T, T)
    parts["feed_forward"] += L * 2 * tokens * matrices * config.d_model * config.d_ff


def _projection_flop(config: ModelConfig, num_queries: int, num_keys: int) -> int:
    query = 2 * config.num_heads * config.d_head  # into the heads and out of them
    key_and_value = 2 * config.num_kv_heads * config.d_head
    return 2 * config.d_model * (num_queries * query + num_keys * key_and_value)


def _product_flop(config: ModelConfig, batch_size: int, T: int, S: int) -> int:
    width = config.num_heads * config.d_head
    return attention_flop(T, width, num_keys=S, batch_size=batch_size)


def batch_lengths(
    config: ModelConfig, batch_size: int, seq_len: int | None, source_len: int | None
) -> tuple[int, int]:
    """Check the sizes of a batch, and fill in those that were not given.

    config, batch_size, seq_len, source_len  as in forward_flop_by_part
    returns  T and S

    Raises InputError as forward_flop_by_part does.
    """
    check_config(config)
    check_size("batch_size", batch_size)
    T = config.seq_len if seq_len is None else seq_len
    check_size("seq_len", T)
    require(
        source_len is None or config.kind == "encoder_decoder",
        "source_len only for a model of two halves",
        f"source_len = {source_len}, kind = {config.kind!r}",
        "leave source_len out",
    )
    S = T if source_len is None else source_len
    check_size("source_len", S)
    require(
        config.positions not in ("learned", "sinusoidal") or max(T, S) <= config.seq_len,
        f"at most {config.seq_len} positions, the table of this model (seq_len)",
        f"{max(T, S)} positions",
        "plan for fewer, or for a configuration with a larger seq_len",
    )
    return T, S
