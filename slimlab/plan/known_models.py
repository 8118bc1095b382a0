"""Published models by name, with the batch they were trained with, for the planner.

Sizes are those of the papers, written in the choices of ModelConfig: a few details that cost no
time (BLOOM's ALiBi, its norm behind the table of tokens) are not there, and count as no positions.
Chapter 11 plans them; slimlab.model.families has the choices alone.
"""

from dataclasses import dataclass, replace

from slimlab.config import ModelConfig, check_choice
from slimlab.plan.published_runs import gpt_config


@dataclass(frozen=True)
class KnownModel:
    """A published model.

    config      its sizes
    batch_size  sequences of a step in its training, the largest that was used
    source      where they stand
    """

    config: ModelConfig
    batch_size: int
    source: str


def _llama(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        32000, 2048, d_model, num_layers, num_heads, d_ff=d_ff, feed_forward="swiglu",
        tie_embeddings=False,
    )  # fmt: skip


GPT3 = "Brown et al. 2020 (arXiv:2005.14165), table 2.1"
LLAMA = "Touvron et al. 2023 (arXiv:2302.13971), table 2; d_ff from the released code"
SC21 = "Narayanan et al. 2021 (arXiv:2104.04473), table 1"
BLOOM_CONFIG = replace(gpt_config(70, 14336, 112, 250880), positions="none", dropout=0.0)

MODELS = {
    "gpt2-1.5b": KnownModel(gpt_config(48, 1600, 25, 50257, 1024), 512, "Radford et al. 2019"),
    "gpt3-13b": KnownModel(gpt_config(40, 5120, 40, 50257), 1024, GPT3),
    "gpt3-175b": KnownModel(gpt_config(96, 12288, 96, 50257), 1536, GPT3),
    "gpt-530b": KnownModel(gpt_config(105, 20480, 128), 2520, SC21),
    "gpt-1t": KnownModel(gpt_config(128, 25600, 160), 3072, SC21),
    "bloom-176b": KnownModel(BLOOM_CONFIG, 2048, "BigScience 2022 (arXiv:2211.05100), table 3"),
    "llama-7b": KnownModel(_llama(4096, 32, 32, 11008), 2048, LLAMA),
    "llama-13b": KnownModel(_llama(5120, 40, 40, 13824), 2048, LLAMA),
    "llama-33b": KnownModel(_llama(6656, 60, 52, 17920), 2048, LLAMA),
    "llama-65b": KnownModel(_llama(8192, 80, 64, 22016), 2048, LLAMA),
}


def find_model(name: str) -> KnownModel:
    """Return a model of MODELS.

    name  its key

    Raises InputError that lists all names.
    """
    check_choice("model", name, tuple(MODELS))
    return MODELS[name]
