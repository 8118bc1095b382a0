"""Which bytes each axis moves in a step: calls, their payload, and what a ring sends of it.

The axis tensor moves activations in every block of every micro-batch, the axis pipeline activations
between stages, the axis data gradients (with ZeRO weights too) once per step or, from zero_stage 2
on, per micro-batch. Where each may stand follows: the busiest inside a host. Chapter 11 prints it.

Narayanan et al. 2021 (arXiv:2104.04473), sections 2 and 3.2; Rajbhandari et al. 2020
(arXiv:1910.02054), section 7. Left out: reports of a few numbers (norms, losses).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from slimlab.config import ModelConfig, check_number
from slimlab.plan.layout_memory import block_rank_params, stage_params
from slimlab.plan.parallel_config import (
    ParallelConfig,
    check_parallel,
    num_micro_batches,
    padded_vocab_size,
    stage_layers,
)
from slimlab.plan.software import Software

FLOAT32_BYTES = 4
# Per byte of the whole tensor and call, what a ring of w ranks sends: (w - 1)/w times this.
RINGS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Transfer:
    """Calls of one kind that a rank makes in a step.

    axis        "tensor", "pipeline" or "data"
    purpose     what they carry
    name        "send", or a collective
    calls       how many
    n_bytes     of each: of a message, or of the whole tensor of a collective
    group_size  ranks that take part
    """

    axis: str
    purpose: str
    name: str
    calls: int
    n_bytes: float
    group_size: int

    @property
    def sent_bytes(self) -> float:
        """What the rank sends in all calls; a collective is a ring's."""
        if self.name == "send":
            return self.calls * self.n_bytes
        share = RINGS[self.name] * (self.group_size - 1) / self.group_size
        return self.calls * self.n_bytes * share


def step_transfers(
    config: ModelConfig,
    parallel: ParallelConfig,
    batch_size: int,
    software: Software | None = None,
    *,
    stage: int = 0,
) -> list[Transfer]:
    """List what each rank of a stage sends in one step.

    config, parallel, batch_size  a model, its layout, sequences of a step
    software                      split_messages, item_bytes, gradient_bytes; Software() if None
    stage                         from 0
    returns                       the transfers of more than no byte; groups of one rank have none

    Raises InputError for a layout that cannot be, or a stage that there is not.
    """
    check_parallel(config, parallel, batch_size)
    check_number("stage", stage, int, 0, parallel.pipeline - 1)
    software = software or Software()
    count = num_micro_batches(parallel, batch_size)
    found = [
        *_tensor_transfers(config, parallel, software, stage, count),
        *_pipeline_transfers(config, parallel, software, stage, count),
        *_data_transfers(config, parallel, software, stage, count),
    ]
    return [one for one in found if one.group_size > 1 and one.calls]


def axis_bytes(
    config: ModelConfig,
    parallel: ParallelConfig,
    batch_size: int,
    software: Software | None = None,
    *,
    stage: int = 0,
) -> dict[str, float]:
    """Add up the bytes that a rank sends along each axis in one step.

    config, parallel, batch_size, software, stage  as in step_transfers
    returns                                        axis -> bytes

    Raises InputError as step_transfers does.
    """
    sums = dict.fromkeys(("tensor", "pipeline", "data"), 0.0)
    for one in step_transfers(config, parallel, batch_size, software, stage=stage):
        sums[one.axis] += one.sent_bytes
    return sums


def message_bytes(config: ModelConfig, parallel: ParallelConfig, software: Software) -> int:
    """Return the bytes of the activations of a micro-batch between two layers, all of them.

    config    d_model and seq_len are read
    parallel  micro_batch_size is read
    software  item_bytes is read
    """
    return parallel.micro_batch_size * config.seq_len * config.d_model * software.item_bytes


def tied_table_bytes(config: ModelConfig, parallel: ParallelConfig, software: Software) -> float:
    """Return the bytes of the gradient of a table that the first and the last stage both hold.

    config    vocab_size, d_model and tie_embeddings are read
    parallel  tensor and pipeline are read
    software  gradient_bytes is read
    returns   per rank; 0 for one stage, or tables that are not tied
    """
    if parallel.pipeline == 1 or not config.tie_embeddings:
        return 0.0
    rows = padded_vocab_size(config.vocab_size, parallel.tensor) / parallel.tensor
    return rows * config.d_model * software.gradient_bytes


def _tensor_transfers(
    config: ModelConfig, parallel: ParallelConfig, software: Software, stage: int, count: int
) -> Iterator[Transfer]:
    n_bytes, size = message_bytes(config, parallel, software), parallel.tensor
    layers = stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)[stage]
    there = 2 * count * layers * (2 if parallel.recompute == "full" else 1)
    back = 2 * count * layers
    # The first stage sums rows of the shared table, the last the gradient behind the logits.
    there += count if stage == 0 else 0
    back += count if stage == parallel.pipeline - 1 else 0
    if parallel.sequence_parallel:
        # Going back, column-parallel layers gather their inputs once more.
        gathers = there + back + 2 * count * layers
        yield Transfer("tensor", "activations", "all_gather", gathers, n_bytes, size)
        yield Transfer("tensor", "activations", "reduce_scatter", there + back, n_bytes, size)
    else:
        yield Transfer("tensor", "activations", "all_reduce", there + back, n_bytes, size)
    if stage == parallel.pipeline - 1:
        # Maximum, sum and the target's score of each position.
        tokens = parallel.micro_batch_size * config.seq_len
        purpose, calls = "loss", 3 * count
        yield Transfer("tensor", purpose, "all_reduce", calls, tokens * FLOAT32_BYTES, size)


def _pipeline_transfers(
    config: ModelConfig, parallel: ParallelConfig, software: Software, stage: int, count: int
) -> Iterator[Transfer]:
    p, v, last = parallel.pipeline, parallel.num_chunks, parallel.pipeline - 1
    n_bytes = message_bytes(config, parallel, software)
    # The last stage passes on to the first unless the chunk is the last, and the other way round.
    there = count * (v - 1 if stage == last else v)
    back = count * (v - 1 if stage == 0 else v)
    whole = parallel.sequence_parallel or not software.split_messages
    held = parallel.tensor if parallel.sequence_parallel or software.split_messages else 1
    yield Transfer("pipeline", "activations", "send", there, n_bytes / held, p)
    yield Transfer("pipeline", "gradients", "send", back, n_bytes / held, p)
    if not whole and p > 1:
        received = count * (2 * v - (stage in (0, last)))
        size = parallel.tensor
        yield Transfer("tensor", "parts of messages", "all_gather", received, n_bytes, size)
    shared = tied_table_bytes(config, parallel, software)
    if shared and stage in (0, last):
        yield Transfer("pipeline", "tied table", "all_reduce", 1, shared, 2)


def _data_transfers(
    config: ModelConfig, parallel: ParallelConfig, software: Software, stage: int, count: int
) -> Iterator[Transfer]:
    size, held = parallel.data, stage_params(config, parallel, stage)
    gradients, weights = held * software.gradient_bytes, held * software.item_bytes
    zero = parallel.zero_stage
    if zero == 0:
        yield Transfer("data", "gradients", "all_reduce", 1, gradients, size)
    elif zero < 3:
        calls = count if zero == 2 else 1
        yield Transfer("data", "gradients", "reduce_scatter", calls, gradients, size)
        yield Transfer("data", "weights", "all_gather", 1, weights, size)
    else:
        layers = stage_layers(config.num_layers, parallel.pipeline, parallel.num_chunks)[stage]
        for purpose, rest in (("blocks", 0), ("tables", 1)):
            block = block_rank_params(config, parallel.tensor)
            part = held - layers * block if rest else block
            calls = count * (1 if rest else layers)
            there, back = part * software.item_bytes, part * software.gradient_bytes
            yield Transfer("data", purpose, "all_gather", 2 * calls, there, size)
            yield Transfer("data", purpose, "reduce_scatter", calls, back, size)
