"""Activations that each stage of a pipeline keeps, byte by byte, as its schedule lets go of them.

Chapter 10 compares it with what autograd holds in a real run. What a chunk keeps of a micro-batch
follows from slimlab.plan.activations; how many micro-batches are kept at a time, from the order of
the instructions. GPipe keeps all of them, 1F1B as many as there are stages ahead.

Not counted: results that wait to be sent, and, where a schedule parts the backward pass, gradients
that wait for weight gradients; there this is an upper bound of the activations alone, since an
input gradient lets go of what no weight gradient needs.

slimlab.plan.layout_memory counts the same for kernels that are fused, in 16 bits. Korthikanti et
al. 2022 (arXiv:2205.05198), section 4.2.3.
"""

from collections.abc import Sequence
from dataclasses import replace

from slimlab.config import ModelConfig, check_size, require
from slimlab.plan.activations import activation_bytes
from slimlab.plan.pipeline_schedule import BACKWARD, FORWARD, WEIGHT_GRADIENT, Schedule


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


def peak_bytes(
    config: ModelConfig,
    schedule: Schedule,
    layers: Sequence[int],
    micro_batch_sizes: Sequence[int],
    seq_len: int | None = None,
    **choices: object,
) -> tuple[int, ...]:
    """Predict the most that each stage keeps of forward passes at a time.

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
    for place, number in enumerate(layers):
        ends = {"first": place == 0, "last": place == count - 1}
        for size in set(micro_batch_sizes):
            known[place, size] = chunk_bytes(config, number, size, seq_len, **ends, **choices)
    peaks = []
    for stage, order in enumerate(schedule.stages):
        held = peak = 0
        for one in order:
            place = schedule.virtual_stage(stage, one.chunk)
            kept = known[place, micro_batch_sizes[one.micro_batch]]
            held += kept * (one.kind == FORWARD)
            peak = max(peak, held)
            held -= kept * (one.kind in (BACKWARD, WEIGHT_GRADIENT))
        peaks.append(peak)
    return tuple(peaks)
