"""Steps of large training runs as their makers printed them, to hold the planner to.

Table 1 of Narayanan et al. 2021 fits two constants of the step-time model (tools/fit_planner.py);
everything else here only tests it. Chapter 11 draws predicted beside printed. Rates are rounded as
printed; a rate of 138 TFLOP/s is known to 0.4 %.
"""

from dataclasses import dataclass, replace

from slimlab.config import ModelConfig
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.training_flop import training_step_flop

MEGATRON_2021 = "Narayanan et al. 2021 (arXiv:2104.04473v5)"
MEGATRON_2022 = "Korthikanti et al. 2022 (arXiv:2205.05198)"


@dataclass(frozen=True)
class PublishedStep:
    """A step whose duration was published.

    name        which model, on how many GPUs
    config      the model
    parallel    its layout
    batch_size  sequences of a step
    software    key of slimlab.plan.software.SOFTWARE
    hardware    key of slimlab.plan.hardware.CLUSTERS
    step_s      seconds, as printed or from the printed rate
    source      where
    """

    name: str
    config: ModelConfig
    parallel: ParallelConfig
    batch_size: int
    software: str
    hardware: str
    step_s: float
    source: str


def gpt_config(
    num_layers: int, d_model: int, num_heads: int, vocab_size: int = 51200, seq_len: int = 2048
) -> ModelConfig:
    """Return a GPT as Megatron-LM trains it: learned positions, LayerNorm, GELU, biases, dropout.

    num_layers, d_model, num_heads, vocab_size, seq_len  sizes
    """
    return ModelConfig(
        vocab_size, seq_len, d_model, num_layers, num_heads, positions="learned", norm="layer",
        feed_forward="gelu_tanh", bias=True, tie_embeddings=True, dropout=0.1,
    )  # fmt: skip


def step_of_rate(
    config: ModelConfig, batch_size: int, num_gpus: int, flop_per_s_per_gpu: float
) -> float:
    """Return the seconds of a step from a rate that counts each block's forward pass twice.

    config, batch_size  a model, sequences of a step
    num_gpus            that share it
    flop_per_s_per_gpu  as printed

    Narayanan et al. 2021, equation 3.
    """
    flop = training_step_flop(config, batch_size, recompute="block")
    return flop / (num_gpus * flop_per_s_per_gpu)


# num_layers, d_model, num_heads; tensor, pipeline, data, micro-batch, chunks; batch; TFLOP/s
# Micro-batches and chunks are from the scripts beside the paper, NVIDIA/Megatron-LM examples/sc21.
# fmt: off
TABLE_1 = (
    ("1.7B", (24, 2304, 24), (1, 1, 32, 16, 1), 512, 137),
    ("3.6B", (30, 3072, 32), (2, 1, 32, 16, 1), 512, 138),
    ("7.5B", (36, 4096, 32), (4, 1, 32, 16, 1), 512, 142),
    ("18.4B", (40, 6144, 48), (8, 1, 32, 8, 1), 1024, 135),
    ("39.1B", (48, 8192, 64), (8, 2, 32, 4, 1), 1536, 138),
    ("76.1B", (60, 10240, 80), (8, 4, 32, 2, 3), 1792, 140),
    ("145.6B", (80, 12288, 96), (8, 8, 24, 2, 2), 2304, 148),
    ("310.1B", (96, 16384, 128), (8, 16, 15, 1, 2), 2160, 155),
    ("529.6B", (105, 20480, 128), (8, 35, 9, 1, 3), 2520, 163),
    ("1008.0B", (128, 25600, 160), (8, 64, 6, 1, 1), 3072, 163),
)
# The rows PTD-P. Tensor 8; that 175B has no chunks and 530B three per stage is not printed there.
TABLE_2 = (
    ("174.6B", (96, 12288, 96), (8, 12, 4, 1, 1), 1536, 153),
    ("174.6B", (96, 12288, 96), (8, 12, 8, 1, 1), 1536, 149),
    ("174.6B", (96, 12288, 96), (8, 12, 16, 1, 1), 1536, 141),
    ("529.6B", (105, 20480, 128), (8, 35, 2, 1, 3), 2240, 171),
    ("529.6B", (105, 20480, 128), (8, 35, 4, 1, 3), 2240, 167),
    ("529.6B", (105, 20480, 128), (8, 35, 8, 1, 3), 2240, 159),
)
# Seconds with full recomputation, and with selective and sequence parallelism (tables 3 and 5).
TABLE_5 = (
    ("22B", (48, 6144, 64), (8, 1, 1, 4, 1), 4, 1.42, 1.10),
    ("175B", (96, 12288, 96), (8, 8, 1, 1, 3), 64, 18.13, 13.75),
    ("530B", (105, 20480, 128), (8, 35, 1, 1, 3), 280, 49.05, 37.83),
    ("1T", (128, 25600, 160), (8, 64, 1, 1, 1), 512, 94.42, 71.49),
)
# fmt: on
# Milliseconds of a block of the 22B model, 8 ranks, micro-batch 4: forward, backward with
# recomputation. Korthikanti et al. 2022, table 4.
TABLE_4 = {
    ("none", False): (7.7, 11.9),
    ("none", True): (7.2, 11.8),
    ("full", False): (7.7, 19.5),
    ("selective", False): (7.7, 13.2),
    ("selective", True): (7.2, 13.1),
}


def _steps_of(rows: tuple, source: str) -> tuple[PublishedStep, ...]:
    steps = []
    for name, sizes, (tensor, pipeline, data, micro_batch_size, chunks), batch, rate in rows:
        config = gpt_config(*sizes)
        parallel = ParallelConfig(data, pipeline, tensor, micro_batch_size, chunks, "1f1b", "full")
        step_s = step_of_rate(config, batch, parallel.world_size, rate * 1e12)
        name = f"{name} on {parallel.world_size}"
        given = (config, parallel, batch, "megatron-2021", "a100-80gb", step_s, source)
        steps.append(PublishedStep(name, *given))
    return tuple(steps)


def _steps_of_2022(selective: bool) -> tuple[PublishedStep, ...]:
    steps = []
    for name, sizes, (tensor, pipeline, data, micro, chunks), batch, full_s, new_s in TABLE_5:
        parallel = ParallelConfig(data, pipeline, tensor, micro, chunks, "1f1b", "full")
        if selective:
            parallel = replace(parallel, recompute="selective", sequence_parallel=True)
        given = (gpt_config(*sizes), parallel, batch, "megatron-2022", "a100-80gb")
        step_s, source = new_s if selective else full_s, f"{MEGATRON_2022}, table 5"
        steps.append(PublishedStep(f"{name} on {parallel.world_size}", *given, step_s, source))
    return tuple(steps)


SC21_TABLE_1 = _steps_of(TABLE_1, f"{MEGATRON_2021}, table 1")
SC21_TABLE_2 = _steps_of(TABLE_2, f"{MEGATRON_2021}, table 2, PTD-P")
RECOMPUTED_FULL = _steps_of_2022(selective=False)
RECOMPUTED_SELECTIVE = _steps_of_2022(selective=True)
