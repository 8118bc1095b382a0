"""Bytes that each rank holds under a layout: weights, gradients, optimizer, activations.

Weights and what belongs to them follow from the shapes of the model (params.py), cut by the axes
tensor and pipeline, and by ZeRO along data. Activations are counted as Korthikanti et al. 2022
(arXiv:2205.05198), section 4, count them for kernels that are fused: 16 bits per element, masks of
dropout of 1 byte; models with other feed-forward layers, heads and attention are counted alike.
slimlab.plan.activations counts what this book's own models keep on a CPU, which is more.
Rajbhandari et al. 2020 (arXiv:1910.02054) for ZeRO. Chapter 11 draws it.

Not counted: outputs that wait to be sent (Korthikanti et al., appendix B, free them), buffers of
communication, and what an allocator loses between tensors.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from math import prod

from slimlab.config import ModelConfig
from slimlab.plan.parallel_config import (
    ParallelConfig,
    check_parallel,
    num_micro_batches,
    padded_vocab_size,
    stage_layers,
)
from slimlab.plan.software import Software
from slimlab.plan.tensor_parallel import local_param_shapes

MASK_BYTES = 1  # of an element in a mask of dropout
FLOAT32_BYTES = 4


def rank_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    batch_size: int,
    software: Software | None = None,
) -> dict[str, float]:
    """Predict what a rank of the fullest stage holds when it holds most.

    config      a decoder, trained by AdamW
    parallel    the layout
    batch_size  sequences of a step, over all replicas
    software    attention, gradient_bytes and item_bytes are read; Software() if not given
    returns     "weights", "gradients", "optimizer", "gathered" (zero_stage 3: the weights of two
                blocks at a time), "activations", "working" (recomputation: one block's), "logits"
                -> bytes; all zeros are left out

    Raises InputError for a layout that cannot be.
    """
    # Stages between the second and the last have the layers of the second, and hold less.
    stages = sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1})
    found = _bytes_of(config, parallel, batch_size, software, stages)
    return max(found, key=lambda items: sum(items.values()))


def all_stage_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    batch_size: int,
    software: Software | None = None,
) -> tuple[dict[str, float], ...]:
    """Predict what a rank of every stage holds when it holds most.

    config, parallel, batch_size, software  as in rank_bytes
    returns                                 for each stage the items of rank_bytes

    Raises InputError for a layout that cannot be.
    """
    return _bytes_of(config, parallel, batch_size, software, range(parallel.pipeline))


def _bytes_of(
    config: ModelConfig,
    parallel: ParallelConfig,
    batch_size: int,
    software: Software | None,
    stages: Iterable[int],
) -> tuple[dict[str, float], ...]:
    check_parallel(config, parallel, batch_size)
    software = software or Software()
    count = num_micro_batches(parallel, batch_size)
    layers = stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)
    return tuple(
        _stage_bytes(config, parallel, software, count, stage, layers[stage]) for stage in stages
    )


def fullest_params(config: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Find the stage with the most parameters.

    config, parallel  as in stage_params
    returns           the stage, and the parameters of each of its ranks
    """
    stages = sorted({0, min(1, parallel.pipeline - 1), parallel.pipeline - 1})
    counts = {stage: stage_params(config, parallel, stage) for stage in stages}
    return max(counts.items(), key=lambda item: item[1])


def stage_params(config: ModelConfig, parallel: ParallelConfig, stage: int) -> int:
    """Count the parameters of each rank of a stage, as if zero_stage were 0.

    config    a decoder
    parallel  pipeline, tensor and num_chunks are read
    stage     from 0; the first holds the tables of tokens and positions, the last the norm behind
              the last block and the table of the logits, a copy of the first's if it is tied
    """
    layers = stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)[stage]
    block, positions, last_norm = _whole_params(config, parallel.tensor)
    table = padded_vocab_size(config.vocab_size, parallel.tensor) // parallel.tensor
    table *= config.d_model
    count, last = layers * block, parallel.pipeline - 1
    if stage == 0:
        count += table + positions
    if stage == last:
        count += last_norm
        count += 0 if config.tie_embeddings and last == 0 else table
    return count


def block_rank_params(config: ModelConfig, tensor: int) -> int:
    """Count the parameters of a block on each rank of a tensor group.

    config  a decoder
    tensor  ranks of the group; norms and biases behind row-parallel layers are on every rank
    """
    return _whole_params(config, tensor)[0]


@lru_cache(maxsize=256)
def _whole_params(config: ModelConfig, tensor: int) -> tuple[int, int, int]:
    """Parameters per rank of a block, of the table of positions, of the last norm."""
    one = replace(config, num_layers=1, vocab_size=padded_vocab_size(1, tensor))
    sizes = {name: prod(shape) for name, shape in local_param_shapes(one, tensor).items()}
    block, positions, last_norm = (
        sum(size for name, size in sizes.items() if name.startswith(start))
        for start in ("blocks.0.", "embedding.positions", "final_norm")
    )
    return block, positions, last_norm


def _stage_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    software: Software,
    num_micro_batches: int,
    stage: int,
    layers: int,
) -> dict[str, float]:
    held = held_micro_batches(parallel, num_micro_batches, stage)
    state = _state_bytes(config, parallel, software, stage)
    kept = block_kept_bytes(config, parallel, software) * layers * held
    extra = _end_bytes(config, parallel, software.item_bytes, stage, held)
    working = 0.0
    if parallel.recompute == "full":
        whole = replace(parallel, recompute="none")
        working = block_kept_bytes(config, whole, software)
    items = {**state, "activations": kept + extra["activations"], "working": working}
    items["logits"] = extra["logits"]
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def _state_bytes(
    config: ModelConfig, parallel: ParallelConfig, software: Software, stage: int
) -> dict[str, float]:
    count, zero, data = stage_params(config, parallel, stage), parallel.zero_stage, parallel.data
    gathered = 0
    if zero == 3:
        gathered = 2 * block_rank_params(config, parallel.tensor) * software.item_bytes
    return {
        "weights": count * software.item_bytes / (data if zero >= 3 else 1),
        "gradients": count * software.gradient_bytes / (data if zero >= 2 else 1),
        "optimizer": count * software.optimizer_bytes / (data if zero >= 1 else 1),
        "gathered": gathered,
    }


def held_micro_batches(parallel: ParallelConfig, num_micro_batches: int, stage: int) -> float:
    """Count the micro-batches whose activations a stage holds when it holds most.

    parallel           pipeline, num_chunks and schedule are read
    num_micro_batches  m, of a replica
    stage              from 0
    returns            all m under GPipe; p - stage under 1F1B; with v chunks per stage
                       (p v + p - 1 - 2 stage) / v, a part of which is some chunks' alone; never
                       more than m

    Korthikanti et al. 2022, section 4.2.3, for stage 0: 1 + (p - 1) / (p v) times p.
    """
    p, v = parallel.pipeline, parallel.num_chunks
    if parallel.schedule == "gpipe":
        return num_micro_batches
    if v == 1:
        return min(p - stage, num_micro_batches)
    return min((p * v + p - 1 - 2 * stage) / v, num_micro_batches)


def block_kept_bytes(config: ModelConfig, parallel: ParallelConfig, software: Software) -> float:
    """Count what a rank keeps of one block for one micro-batch.

    config    all sizes are read, feed_forward, dropout and positions
    parallel  micro_batch_size, tensor, recompute and sequence_parallel are read
    software  attention and item_bytes are read
    returns   for a GPT block with dropout s b h (10 + 24/t + 5 a s/(h t)) bytes, of Korthikanti et
              al. 2022, table 2, and its variants
    """
    tokens = parallel.micro_batch_size * config.seq_len
    outside = parallel.tensor if parallel.sequence_parallel else 1
    if parallel.recompute == "full":
        return tokens * config.d_model * software.item_bytes / outside
    between = _outside_bytes(config, software) / outside
    return tokens * (between + _inside_bytes(config, parallel, software))


def _outside_bytes(config: ModelConfig, software: Software) -> int:
    """Per token, what stands between the sharded layers: inputs of norms and layers, and masks."""
    masks = 2 * MASK_BYTES if config.dropout else 0
    return config.d_model * (4 * software.item_bytes + masks)


def _inside_bytes(config: ModelConfig, parallel: ParallelConfig, software: Software) -> float:
    """Per token and rank, what the sharded layers keep."""
    size, (query, key) = software.item_bytes, rank_heads(config, parallel.tensor)
    kept = (2 * query + 2 * key) * config.d_head * size  # queries, keys, values, the average
    # Gated: gate, up and their product; else what goes into the activation and what comes out.
    kept += (3 if config.gated else 2) * config.d_ff / parallel.tensor * size
    if software.attention == "fused":
        return kept + query * FLOAT32_BYTES  # log of the sum of each row's exponentials
    if parallel.recompute == "selective":
        return kept
    scores = size + ((size + MASK_BYTES) if config.dropout else 0)
    return kept + query * config.seq_len * scores


def rank_heads(config: ModelConfig, tensor: int) -> tuple[int, int]:
    """Return the heads of each rank of a tensor group, and its key/value heads, at least one.

    config  num_heads and num_kv_heads are read
    tensor  ranks of the group
    """
    return config.num_heads // tensor, max(1, config.num_kv_heads // tensor)


def _end_bytes(
    config: ModelConfig, parallel: ParallelConfig, item_bytes: int, stage: int, held: float
) -> dict[str, float]:
    """Activations of the tables before the first block and of the logits behind the last."""
    tokens = parallel.micro_batch_size * config.seq_len
    row = tokens * config.d_model
    outside = parallel.tensor if parallel.sequence_parallel else 1
    kept = logits = 0.0
    if stage == 0 and config.dropout:
        kept += row * MASK_BYTES * held / outside
    if stage == parallel.pipeline - 1:
        kept += 2 * row * item_bytes / outside  # inputs of the last norm and of the logits
        width = padded_vocab_size(config.vocab_size, parallel.tensor) / parallel.tensor
        logits = tokens * width * FLOAT32_BYTES
    return {"activations": kept, "logits": logits}
