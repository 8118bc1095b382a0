"""What others reported about their models and runs, each figure beside its source.

Chapter 00 predicts these figures with slimlab.plan.flops. They are rounded as printed. Estimates
by others than a model's makers say so in their source: what GPT-3 cost was never published.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One reported figure.

    value   the figure
    unit    its unit
    source  where it was printed
    """

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class PublishedModel:
    """The reported sizes of one decoder.

    name         as its authors call it
    num_params   parameters, rounded as printed
    d_model      width
    num_heads    heads per layer
    num_layers   blocks
    d_ff         width of the feed-forward layer
    vocab_size   tokens in the vocabulary
    seq_len      longest context in training
    num_tokens   tokens that the training passed over
    gated        the feed-forward layer has three matrices (SwiGLU)
    source       where the sizes were printed
    """

    name: str
    num_params: float
    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    vocab_size: int
    seq_len: int
    num_tokens: float
    gated: bool
    source: str


GPT3_PAPER = "Brown et al. 2020, arXiv:2005.14165"
LLAMA_PAPER = "Touvron et al. 2023, arXiv:2302.13971"
LAMBDA = "estimate by Lambda, June 2020, lambdalabs.com/blog/demystifying-gpt-3"

GPT3_TRAINING_FLOP = Published(3.14e23, "FLOP", f"{GPT3_PAPER}, table D.1")
GPT3_TRAINING_PF_DAYS = Published(3640.0, "PF-days", f"{GPT3_PAPER}, table D.1")
V100_FLOP_PER_S = Published(28e12, "FLOP per second, assumed for a V100 in float16", LAMBDA)
V100_DOLLARS_PER_HOUR = Published(1.50, "dollars per GPU-hour", LAMBDA)
GPT3_GPU_YEARS = Published(355.0, "V100-years", LAMBDA)
GPT3_DOLLARS = Published(4.6e6, "dollars", LAMBDA)

LLAMA_65B_TOKENS_PER_S = Published(
    380.0, "tokens per second and GPU", f"{LLAMA_PAPER}, section 2.4"
)
LLAMA_65B_GPUS = Published(2048, "A100 GPUs with 80 GB", f"{LLAMA_PAPER}, section 2.4")
LLAMA_65B_DAYS = Published(21.0, "days for 1.4e12 tokens", f"{LLAMA_PAPER}, section 2.4")

# d_ff is not in the paper's table: 2/3 of 4 * d_model (section 2.2), rounded up to a multiple of
# 256 as in the released code.
SIZES = f"{LLAMA_PAPER}, table 2; vocabulary and d_ff from the released code and weights"

GPT3_175B = PublishedModel(
    "GPT-3 175B", 175.0e9, 12288, 96, 96, 49152, 50257, 2048, 300e9, False,
    f"{GPT3_PAPER}, table 2.1; vocabulary from GPT-2",
)  # fmt: skip
# fmt: off
LLAMA = (
    PublishedModel("LLaMA-7B", 6.7e9, 4096, 32, 32, 11008, 32000, 2048, 1.0e12, True, SIZES),
    PublishedModel("LLaMA-13B", 13.0e9, 5120, 40, 40, 13824, 32000, 2048, 1.0e12, True, SIZES),
    PublishedModel("LLaMA-33B", 32.5e9, 6656, 52, 60, 17920, 32000, 2048, 1.4e12, True, SIZES),
    PublishedModel("LLaMA-65B", 65.2e9, 8192, 64, 80, 22016, 32000, 2048, 1.4e12, True, SIZES),
)
# fmt: on
