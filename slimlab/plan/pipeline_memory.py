"""Activations that each stage of a pipeline keeps, byte by byte, as its schedule lets go of them.

Chapter 10 compares it with what autograd holds in a real run. What a chunk keeps of a micro-batch
follows from slimlab.plan.activations; how many micro-batches are kept at a time, from the order of
the instructions. GPipe keeps all of them, 1F1B as many as there are stages ahead.

Where a schedule parts the backward pass, the gradient at the result of every layer with weights
waits for the weight gradient, beside the activations; only the loss's own are gone by then. That
is two thirds as much again, which counts of micro-batches do not show.

Not counted: results that wait to be sent, and received gradients but those that wait.

slimlab.plan.layout_memory counts the same for kernels that are fused, in 16 bits. Korthikanti et
al. 2022 (arXiv:2205.05198), section 4.2.3.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from slimlab.config import ModelConfig, check_size, require
from slimlab.plan.activations import activation_bytes
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Schedule,
)


def chunk_bytes(
    config: ModelConfig,
    num_layers: int,
    batch_size: int,
    seq_len: int | None = None,
    *,
    first: bool = False,
    last: bool = False,
    **choices: object,
) -> int:
    """Predict what a chunk keeps of one micro-batch.

    config      of a decoder
    num_layers  of the chunk
    batch_size  B, sequences of the micro-batch
    seq_len     T tokens of each, config.seq_len if not given
    first       it has the embedding
    last        it has the final norm, the logits and the loss
    choices     recompute, form, mask and bytes_per_element of activation_bytes

    Raises InputError as activation_bytes does.
    """
    one = replace(config, num_layers=num_layers)
    items = activation_bytes(one, batch_size, seq_len, **choices)
    absent = ([] if first else ["embedding"]) + ([] if last else ["head", "loss"])
    return sum(number for name, number in items.items() if name.split(".")[0] not in absent)


def waiting_bytes(
    config: ModelConfig,
    num_layers: int,
    batch_size: int,
    seq_len: int | None = None,
    *,
    first: bool = False,
    last: bool = False,
    bytes_per_element: int = 4,
) -> int:
    """Predict the gradients that wait between the two parts of a chunk's backward pass.

    config, num_layers, batch_size, seq_len, first, last  as in chunk_bytes
    bytes_per_element  of weights and activations
    returns  bytes of one micro-batch: a gradient at the result of every layer with weights
    """
    query, key = config.num_heads * config.d_head, config.num_kv_heads * config.d_head
    # Two norms, the two layers that end in the stream; queries, keys, values; up, and gate.
    block = 4 * config.d_model + query + 2 * key + (2 if config.gated else 1) * config.d_ff
    features = num_layers * block + first * config.d_model
    if last:
        features += config.vocab_size + (config.d_model if config.norm_place == "pre" else 0)
    length = config.seq_len if seq_len is None else seq_len
    return batch_size * length * features * bytes_per_element


def peak_bytes(
    config: ModelConfig,
    schedule: Schedule,
    layers: Sequence[int],
    micro_batch_sizes: Sequence[int],
    seq_len: int | None = None,
    **choices: object,
) -> tuple[int, ...]:
    """Predict the most that each stage keeps for backward passes at a time.

    config             of a decoder
    schedule           what each stage does
    layers             of each virtual stage
    micro_batch_sizes  sequences of each micro-batch
    seq_len            T, config.seq_len if not given
    choices            as in chunk_bytes
    returns            bytes of each stage

    Raises InputError for lists that do not fit the schedule, and as activation_bytes does.
    """
    count, batches = schedule.num_virtual_stages, schedule.num_micro_batches
    require(
        len(layers) == count and len(micro_batch_sizes) == batches,
        f"layers of {count} virtual stages, sizes of {batches} micro-batches",
        f"{len(layers)} and {len(micro_batch_sizes)}",
        "give one number for each",
    )
    for size in micro_batch_sizes:
        check_size("each of micro_batch_sizes", size)
    known = {}
    for place, size in product(range(count), set(micro_batch_sizes)):
        ends = {"first": place == 0, "last": place == count - 1}
        given = config, layers[place], size, seq_len
        known[place, size] = (
            chunk_bytes(*given, **ends, **choices),
            _parted_bytes(*given, **ends, item_bytes=choices.get("bytes_per_element", 4)),
        )
    peaks = []
    for stage, order in enumerate(schedule.stages):
        held, now, peak = {}, 0, 0
        for one in order:
            key = schedule.virtual_stage(stage, one.chunk), one.micro_batch
            whole, more = known[key[0], micro_batch_sizes[one.micro_batch]]
            gained = {FORWARD: whole, INPUT_GRADIENT: more}.get(one.kind, 0)
            held[key] = held.get(key, 0) + gained
            now += gained
            peak = max(peak, now)
            if one.kind in (BACKWARD, WEIGHT_GRADIENT):
                now -= held.pop(key)
        peaks.append(peak)
    return tuple(peaks)


def _parted_bytes(
    config: ModelConfig,
    num_layers: int,
    batch_size: int,
    seq_len: int | None,
    *,
    first: bool,
    last: bool,
    item_bytes: int,
) -> int:
    """What is kept more after an input gradient: what waits, without what the loss had."""
    given = config, num_layers, batch_size, seq_len
    more = waiting_bytes(*given, first=first, last=last, bytes_per_element=item_bytes)
    items = activation_bytes(config, batch_size, seq_len)
    return more - (items["loss.log_probabilities"] if last else 0)
