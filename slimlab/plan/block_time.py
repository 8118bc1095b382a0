"""Seconds of a block, of the tables before the first and of the logits behind the last.

Each is a list of operations of slimlab.plan.rank_clock: what Megatron-LM's program does, kernel by
kernel. slimlab.plan.step_time makes a step of them; chapter 11 compares a block with published
milliseconds (Korthikanti et al. 2022, arXiv:2205.05198, table 4).

Left out are kernels that touch few bytes, and the time between kernels where a GPU waits for its
host.
"""

from dataclasses import dataclass

from slimlab.config import ModelConfig
from slimlab.plan.layout_bytes import message_bytes
from slimlab.plan.layout_memory import rank_heads
from slimlab.plan.parallel_config import ParallelConfig, padded_vocab_size
from slimlab.plan.rank_clock import (
    ACTIVATE,
    ADD,
    DROP_SCORES,
    GATE,
    LOSS,
    MERGE_HEADS,
    NORM,
    QKV_BIAS,
    ROTATE,
    SOFTMAX,
    TABLES,
    Clock,
)


@dataclass(frozen=True)
class PartTime:
    """Seconds of a part of the model for one micro-batch, on one rank.

    forward_s          of the forward pass
    backward_s         of the backward pass
    recompute_s        of what is computed again before it
    weight_gradient_s  part of backward_s: the products that make weight gradients
    tensor_s           part of all: collectives of the tensor group that nothing hides
    """

    forward_s: float
    backward_s: float
    recompute_s: float = 0.0
    weight_gradient_s: float = 0.0
    tensor_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Forward pass, backward pass and recomputation."""
        return self.forward_s + self.backward_s + self.recompute_s


def block_time(config: ModelConfig, clock: Clock) -> PartTime:
    """Predict one block's seconds for one micro-batch.

    config   a decoder
    clock    what seconds are computed from
    returns  its seconds; with full recomputation forward_s counts again, with selective that of the
             scores, the two products around them and what lies between
    """
    forward_s, input_s, weight_s = _products_s(config, clock)
    scores = _scores_s(config, clock)
    kernels = _kernels_s(config, clock)
    hidden = weight_s if clock.software.overlap_tensor else 0.0
    there_s, back_s = _tensor_s(config, clock, input_s, hidden)
    forward_s += scores[0] + kernels[0] + there_s
    backward_s = input_s + weight_s + scores[1] + kernels[1] + back_s
    again = {"none": 0.0, "selective": scores[0], "full": forward_s}
    recompute = clock.parallel.recompute
    if clock.software.attention == "fused":
        again["selective"] = 0.0  # its backward pass makes the scores again in any case
    tensor_s = there_s * (2 if recompute == "full" else 1) + back_s
    return PartTime(forward_s, backward_s, again[recompute], weight_s, tensor_s)


def logits_time(config: ModelConfig, clock: Clock) -> PartTime:
    """Predict the seconds of the last norm, the logits and the loss for one micro-batch.

    config  a decoder
    clock   what seconds are computed from
    """
    parallel = clock.parallel
    tokens = parallel.micro_batch_size * config.seq_len
    width = padded_vocab_size(config.vocab_size, parallel.tensor) // parallel.tensor
    sizes = (tokens, config.d_model, width)
    launch = clock.constants.kernel_s
    norm = clock.kernels_s(NORM, _outside(tokens * config.d_model, parallel))
    loss = clock.kernels_s(LOSS, tokens * width)
    n_bytes = tokens * config.d_model * clock.software.item_bytes
    forward_s = clock.product_s(*sizes) + launch + norm[0] + loss[0]
    # Maximum, sum and the target's score, of each position.
    small_s = 3 * clock.collective_s("all_reduce", "tensor", 4 * tokens)
    weight_s = clock.product_s(config.d_model, tokens, width) + launch
    backward_s = clock.product_s(tokens, width, config.d_model) + launch + norm[1] + loss[1]
    moved_s = clock.collective_s("all_reduce", "tensor", n_bytes)
    exposed_s = max(0.0, moved_s - weight_s) if clock.software.overlap_tensor else moved_s
    backward_s += weight_s + exposed_s
    return PartTime(forward_s + small_s, backward_s, 0.0, weight_s, small_s + exposed_s)


def tables_time(config: ModelConfig, clock: Clock) -> PartTime:
    """Predict the seconds of the tables before the first block for one micro-batch.

    config  a decoder
    clock   what seconds are computed from
    """
    row = clock.parallel.micro_batch_size * config.seq_len * config.d_model
    forward_s, backward_s = clock.kernels_s(TABLES, _outside(row, clock.parallel))
    moved_s = clock.collective_s("all_reduce", "tensor", row * clock.software.item_bytes)
    return PartTime(forward_s + moved_s, backward_s, tensor_s=moved_s)


def _outside(num_elements: float, parallel: ParallelConfig) -> float:
    """Elements on a rank of what stands between the sharded layers."""
    return num_elements / (parallel.tensor if parallel.sequence_parallel else 1)


def _products_s(config: ModelConfig, clock: Clock) -> tuple[float, float, float]:
    """Seconds of the linear layers' products: forward, input gradients, weight gradients."""
    tensor = clock.parallel.tensor
    heads, kv_heads = rank_heads(config, tensor)
    tokens = clock.parallel.micro_batch_size * config.seq_len
    width, hidden = heads * config.d_head, config.d_ff // tensor
    layers = (
        (config.d_model, width + 2 * kv_heads * config.d_head),
        (width, config.d_model),
        (config.d_model, hidden * (2 if config.gated else 1)),
        (hidden, config.d_model),
    )
    launch = clock.constants.kernel_s
    forward_s = sum(clock.product_s(tokens, i, o) + launch for i, o in layers)
    input_s = sum(clock.product_s(tokens, o, i) + launch for i, o in layers)
    weight_s = sum(clock.product_s(i, tokens, o) + launch for i, o in layers)
    if not clock.software.fused_gradients:
        moved = clock.software.item_bytes + 2 * clock.software.gradient_bytes
        weight_s += clock.memory_s(sum(i * o for i, o in layers) * moved)
    return forward_s, input_s, weight_s


def _scores_s(config: ModelConfig, clock: Clock) -> tuple[float, float]:
    """Seconds from queries and keys to the weighted average: forward, backward."""
    seq_len, size = config.seq_len, config.d_head
    heads = clock.parallel.micro_batch_size * rank_heads(config, clock.parallel.tensor)[0]
    launch = clock.constants.kernel_s
    if clock.software.attention == "fused":
        flop = 2 * heads * seq_len**2 * size  # half of 4: later positions are hidden
        rate = clock.cluster.gpu.peak_flop_per_s * clock.constants.attention_efficiency
        # Five products backward for two forward.
        return flop / rate + launch, 2.5 * flop / rate + 2 * launch
    two_s = clock.product_s(seq_len, size, seq_len, heads) + clock.product_s(
        seq_len, seq_len, size, heads
    )
    forward_s, backward_s = two_s + 2 * launch, 2 * two_s + 4 * launch
    between = [SOFTMAX[clock.software.fused_kernels]] + [DROP_SCORES] * bool(config.dropout)
    for kernels in between:
        there_s, back_s = clock.kernels_s(kernels, heads * seq_len**2)
        forward_s, backward_s = forward_s + there_s, backward_s + back_s
    return forward_s, backward_s


def _kernels_s(config: ModelConfig, clock: Clock) -> tuple[float, float]:
    """Seconds of the element-wise kernels of a block, scores apart: forward, backward."""
    parallel, fused = clock.parallel, clock.software.fused_kernels
    tokens = parallel.micro_batch_size * config.seq_len
    heads, kv_heads = rank_heads(config, parallel.tensor)
    row = _outside(tokens * config.d_model, parallel)
    query, all_heads = (tokens * config.d_head * n for n in (heads, heads + 2 * kv_heads))
    hidden = tokens * config.d_ff / parallel.tensor
    add = ADD[fused, config.dropout > 0]
    work = [(NORM, row), (NORM, row), (add, row), (add, row)]
    work.append(((GATE if config.gated else ACTIVATE)[fused], hidden))
    work += [(QKV_BIAS, all_heads)] * config.bias
    work += [(MERGE_HEADS, query)] * (clock.software.attention == "explicit")
    if config.positions == "rotary":
        work.append((ROTATE, all_heads - tokens * config.d_head * kv_heads))
    seconds = [clock.kernels_s(kernels, count) for kernels, count in work]
    return sum(there for there, _ in seconds), sum(back for _, back in seconds)


def _tensor_s(
    config: ModelConfig, clock: Clock, input_s: float, hidden_s: float
) -> tuple[float, float]:
    """Seconds of a block's collectives along the axis tensor that nothing hides.

    Two all_reduces there and two back. With sequence parallelism each is a reduce_scatter and an
    all_gather, and back there are two all_gathers more, of inputs that weight gradients need:
    Korthikanti et al. 2022, section 4.2.2. Overlapped are the sums of input gradients, beside
    weight gradients, and those two all_gathers, beside input gradients.
    """
    parallel = clock.parallel
    n_bytes = message_bytes(config, parallel, clock.software)
    if not parallel.sequence_parallel:
        both_s = 2 * clock.collective_s("all_reduce", "tensor", n_bytes)
        back_s = both_s
        return both_s, max(0.0, back_s - hidden_s)
    gather_s = 2 * clock.collective_s("all_gather", "tensor", n_bytes)
    scatter_s = 2 * clock.collective_s("reduce_scatter", "tensor", n_bytes)
    again_s, sums_s = gather_s, max(0.0, scatter_s - hidden_s)
    if clock.software.overlap_tensor:
        again_s = max(0.0, again_s - input_s)
    return gather_s + scatter_s, gather_s + again_s + sums_s
