"""Where every byte goes that a forward pass keeps for the backward pass, tensor by tensor.

Counted is what autograd saves when the models of this book run on a CPU: every tensor once, however
many operations need it. Not counted are parameters, what the caller gives (ids, targets, a mask)
and what is gone before the backward pass begins. Chapter 05 draws the ledger and compares it with
the tensors that autograd holds.

Korthikanti et al. 2022 (arXiv:2205.05198), section 4, count a GPT block in 16 bits as s b h (34 +
5 a s / h) bytes; slimlab.plan.training_memory says where the two counts differ.

Production keeps less: a GPU's kernels store what dropout hid as 1 byte per element, fused losses
never hold all logits, and offloading moves the rest to the processor's memory.
"""

from slimlab.config import ModelConfig, check_choice, check_size, require
from slimlab.plan.training_flop import FORMS, RECOMPUTE, batch_lengths

INDEX_BYTES = 8  # int64
FLOAT32_BYTES = 4
MASKS = ("none", "padding", "packed")


def activation_bytes(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    source_len: int | None = None,
    recompute: str = "none",
    form: str = "fused",
    mask: str = "none",
    bytes_per_element: int = 4,
) -> dict[str, int]:
    """Predict what is kept between the forward and the backward pass of a training step.

    config      all of it is read
    batch_size  B sequences
    seq_len     T tokens of each, config.seq_len if not given; those of the decoder if there are two
                halves
    source_len  S tokens of each sequence of the encoder, seq_len if not given; for two halves only
    recompute   "none", or "block": of every block only its input
    form        form of attention: "explicit", "tiled" or "fused"
    mask        what the caller gives: "none", "padding" (padding_mask; of the source, if there are
                two halves) or "packed" (packed_mask and packed_positions, decoder only)
    bytes_per_element  4 for a model in float32, 2 for one whose weights have 16 bits, with the loss
                in float32. Autocast keeps some tensors in either and 16-bit copies of weights
                besides: that is not predicted here
    returns     "part.tensor" -> bytes, of all layers together. The parts are embedding, attention,
                cross_attention, feed_forward, blocks (their inputs, with recomputation), memory
                (what an encoder hands to a decoder), head and loss; the values add up to the whole.

    Raises InputError for sizes that are not positive whole numbers, and for unknown words.
    """
    check_choice("recompute", recompute, RECOMPUTE)
    _check_words(config, form, mask, bytes_per_element)
    T, S = batch_lengths(config, batch_size, seq_len, source_len)
    given = {"form": form, "mask": mask, "bytes_per_element": bytes_per_element}
    items = _Items()
    # (length, cross-attention to a source) of every stack of blocks
    stacks = [(S, False), (T, True)] if config.kind == "encoder_decoder" else [(T, False)]
    for length, cross in stacks:
        items.join(_embedding(config, batch_size, length, mask, bytes_per_element))
        if recompute == "block":
            items.join(_block_inputs(config, batch_size, length, mask, bytes_per_element))
        else:
            source = S if cross else None
            causal = cross or config.kind == "decoder"
            block = block_activation_bytes(
                config, batch_size, length, memory_len=source, causal=causal, **given
            )
            items.join(block, times=config.num_layers)
    if config.kind == "encoder_decoder":
        items.join(_last_norm(config, "memory.norm", batch_size * S, bytes_per_element))
        items.add("memory.output", batch_size * S * config.d_model * bytes_per_element)
    items.join(_head(config, batch_size, T, bytes_per_element))
    return dict(items)


def block_activation_bytes(
    config: ModelConfig,
    batch_size: int,
    seq_len: int | None = None,
    *,
    memory_len: int | None = None,
    causal: bool = True,
    form: str = "fused",
    mask: str = "none",
    bytes_per_element: int = 4,
) -> dict[str, int]:
    """Predict what one block keeps; with recomputation, what it needs for a moment going back.

    config, batch_size, seq_len, form, mask, bytes_per_element  as in activation_bytes
    memory_len  S positions of an encoder's output, for a block with cross-attention; the memory
                itself is not in the block's account, since all blocks share it
    causal      later positions are hidden
    returns     "part.tensor" -> bytes

    Raises InputError as activation_bytes does.
    """
    _check_words(config, form, mask, bytes_per_element)
    T, _ = batch_lengths(config, batch_size, seq_len, None)
    sizes = (batch_size, T, bytes_per_element)
    items = _Items()
    items.join(_around(config, "attention", *sizes))
    if config.positions == "rotary":
        # Sines and cosines, for queries and for keys.
        angles = _angles(config, batch_size, T, mask)
        items.add("attention.rotary", 4 * angles * bytes_per_element)
    items.join(_attention(config, "attention", form, *sizes, T))
    own_mask = "none" if memory_len is not None else mask
    items.join(_mask("attention", own_mask, causal, form, *sizes, T))
    if memory_len is not None:
        check_size("memory_len", memory_len)
        items.join(_around(config, "cross_attention", *sizes))
        items.join(_attention(config, "cross_attention", form, *sizes, memory_len))
        items.join(_mask("cross_attention", mask, False, form, *sizes, memory_len))
    items.join(_around(config, "feed_forward", *sizes))
    for tensor in HIDDEN[config.feed_forward]:
        items.add(f"feed_forward.{tensor}", batch_size * T * config.d_ff * bytes_per_element)
    return dict(items)


# What a feed-forward layer keeps of F features each. ReLU's gradient is read from its result, which
# the next matrix keeps anyway; the others need what went in.
HIDDEN = {
    "gelu": ("up", "activated"),
    "gelu_tanh": ("up", "activated"),
    "relu": ("activated",),
    "swiglu": ("gate", "gate_activated", "up", "product"),
}


class _Items(dict):
    """Names and bytes; what comes under a name twice is added up."""

    def add(self, name: str, num_bytes: int) -> None:
        self[name] = self.get(name, 0) + num_bytes

    def join(self, items: dict[str, int], times: int = 1) -> None:
        for name, num_bytes in items.items():
            self.add(name, times * num_bytes)


def _norm(config: ModelConfig, name: str, num_tokens: int, size: int) -> dict[str, int]:
    """What a norm keeps; its result is kept by the layer that reads it."""
    if config.norm == "layer":
        return {
            f"{name}_input": num_tokens * config.d_model * size,
            f"{name}_statistics": 2 * num_tokens * size,
        }
    return {
        f"{name}_input": num_tokens * config.d_model * size,
        f"{name}_statistics": num_tokens * FLOAT32_BYTES,
    }


def _dropout(config: ModelConfig, name: str, num_tokens: int, size: int) -> dict[str, int]:
    return {f"{name}.dropout": num_tokens * config.d_model * size} if config.dropout else {}


def _around(config: ModelConfig, name: str, batch_size: int, T: int, size: int) -> dict[str, int]:
    """What stands before and behind every sub-layer: its norm, what it reads, its dropout."""
    tokens = batch_size * T
    return {
        **_norm(config, f"{name}.norm", tokens, size),
        f"{name}.input": tokens * config.d_model * size,
        **_dropout(config, name, tokens, size),
    }


def _attention(
    config: ModelConfig, name: str, form: str, batch_size: int, T: int, size: int, S: int
) -> dict[str, int]:
    query = batch_size * T * config.num_heads * config.d_head * size
    # The explicit form copies keys and values for every query head that shares them.
    heads = config.num_heads if form == "explicit" else config.num_kv_heads
    key = batch_size * S * heads * config.d_head * size
    items = {"query": query, "key": key, "value": key, "output": query}
    if form == "explicit":
        items["weights"] = batch_size * config.num_heads * T * S * size
    else:
        items["logsumexp"] = batch_size * config.num_heads * T * FLOAT32_BYTES
    # The tiled form writes its result head by head; merging the heads copies it.
    if form == "tiled" and config.num_heads > 1 < T:
        items["output_by_head"] = query
    return {f"{name}.{tensor}": num_bytes for tensor, num_bytes in items.items()}


def _mask(
    name: str, mask: str, causal: bool, form: str, batch_size: int, T: int, size: int, S: int
) -> dict[str, int]:
    """What a layer keeps of masks: nothing of the caller's own, but what is made of it."""
    causal = causal and (T > 1 or mask != "none")
    if mask == "none":
        entries = T * S if causal and form != "fused" else 0
    else:
        entries = batch_size * S * (T if causal or mask == "packed" else 1)
    if form == "tiled" and not causal:
        entries = 0
    # The kernel adds its mask to the scores and needs it as numbers; the others keep booleans.
    num_bytes = entries * (size if form == "fused" else 1)
    return {f"{name}.mask": num_bytes} if num_bytes else {}


def _angles(config: ModelConfig, batch_size: int, T: int, mask: str) -> int:
    """Count the rotary angles of a batch: packed documents have positions of their own."""
    return (batch_size if mask == "packed" else 1) * T * (config.d_head // 2)


def _embedding(
    config: ModelConfig, batch_size: int, T: int, mask: str, size: int
) -> dict[str, int]:
    tokens = batch_size * T
    items = {}
    if config.positions == "learned" and mask != "packed":  # those are the caller's
        items["embedding.position_ids"] = T * INDEX_BYTES
    if config.kind == "encoder" and config.norm_place == "post":
        items |= _norm(config, "embedding.norm", tokens, size)
    return items | _dropout(config, "embedding", tokens, size)


def _block_inputs(
    config: ModelConfig, batch_size: int, T: int, mask: str, size: int
) -> dict[str, int]:
    items = {"blocks.input": config.num_layers * batch_size * T * config.d_model * size}
    if config.positions == "rotary":
        items["blocks.rotary_angles"] = _angles(config, batch_size, T, mask) * FLOAT32_BYTES
    return items


def _last_norm(config: ModelConfig, name: str, num_tokens: int, size: int) -> dict[str, int]:
    return _norm(config, name, num_tokens, size) if config.norm_place == "pre" else {}


def _check_words(config: ModelConfig, form: str, mask: str, bytes_per_element: int) -> None:
    check_choice("form", form, FORMS)
    check_choice("mask", mask, MASKS)
    require(
        mask != "packed" or config.kind == "decoder",
        'packed documents in a decoder (kind="decoder")',
        f"mask = {mask!r}, kind = {config.kind!r}",
        'give mask="padding" or "none"',
    )
    require(
        bytes_per_element in (2, 4),
        "bytes_per_element, 2 (float16, bfloat16) or 4 (float32)",
        f"bytes_per_element = {bytes_per_element!r}",
        "choose one of these numbers",
    )


def _head(config: ModelConfig, batch_size: int, T: int, size: int) -> dict[str, int]:
    tokens = batch_size * T
    row = tokens * config.d_model * size
    items = {**_last_norm(config, "head.norm", tokens, size), "head.input": row}
    if config.kind == "encoder":
        items |= {"head.transform_input": row, "head.transformed": row}
        items |= _norm(config, "head.token_norm", tokens, size)
    items["loss.log_probabilities"] = tokens * config.vocab_size * FLOAT32_BYTES
    if config.kind == "encoder" and config.num_segments:
        items["head.pooled"] = batch_size * config.d_model * size
        items["loss.pair_log_probabilities"] = batch_size * 2 * FLOAT32_BYTES
    return items
