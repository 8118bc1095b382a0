"""The recipe of the model of the book, in numbers: what `slimlab train` does unless told otherwise.

slimlab.train.reference trains it. Choices with a number below were measured; depth, heads, warm-up,
betas and clipping were not, and are what is customary. The runs are in reference_evidence.json,
chapter 05 shows them, benchmarks/reference_recipe.py makes more. Bits per byte are of one or two
seeds each, on the text of Python 3.11. Three seeds of the recipe itself reach 1.65 to 1.68, so that
differences of 0.02 decide nothing.

Production recipes are found by trials at several small sizes and carried over to a large one, on
text that is used for nothing else; here the text that chose the recipe also judges the model.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

FORMAT_VERSION = 1  # raised when the same numbers would train another model

# 256 bytes, 1023 merges and the end of a text, divisible by 8. 767 merges: 0.01 worse;
# 1535: the same, and the output matrix costs more.
VOCAB_SIZE = 1280

MODEL = {
    # 400 bytes. Twice as long in batches half as large: 0.05 worse, and slower.
    "seq_len": 128,
    # Narrow: at equal work 192 sees the text fewer times and ends 0.06 worse. With 4 heads and 4
    # blocks all parts can be cut in two and in four, as later chapters do.
    "d_model": 128,
    "num_layers": 4,
    "num_heads": 4,
    # With GELU 0.05 to 0.09 worse. Not named, since ModelConfig has them anyway: rotary positions,
    # the greatest gain of all (none: 0.21 worse, learned ones: 0.35).
    "feed_forward": "swiglu",
    # The text is read almost ten times, yet 0.1 costs 0.03.
    "dropout": 0.0,
}

# Blocks begin as the identity. Four blocks do not need that: "scaled" and "plain" end at 1.65 and
# 1.66, no worse.
RESIDUAL = "zero"

TRAINING = {
    # What two cores do in about 75 s.
    "num_steps": 1000,
    # Small, for many updates: 1024 tokens each. Twice as large, half as many: 0.10 worse; half as
    # large, twice as many: the same, in more time.
    "batch_size": 8,
    # 1e-3: 0.02 worse, 3e-3 too; 5e-3: 0.17 worse.
    "peak_lr": 2e-3,
    # None, or ten times as much: no difference beyond chance in so short a training.
    "weight_decay": 0.1,
    "seed": 0,
}
VALIDATE_EVERY = 100
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Recipe:
    """All that, with the corpus and a seed, determines a model.

    vocab_size         tokens
    model              sizes and choices of ModelConfig, but vocab_size
    training           settings of TrainingConfig, but seq_len; another seed makes another model
                       of the same recipe
    residual           as in slimlab.model.initialise
    validate_every     steps between measurements
    held_out_fraction  part of the text to measure by
    """

    vocab_size: int
    model: dict
    training: dict
    residual: str = RESIDUAL
    validate_every: int = VALIDATE_EVERY
    held_out_fraction: float = HELD_OUT_FRACTION

    def fingerprint(self, corpus_fingerprint: str = "") -> str:
        """Return 12 hexadecimal digits that differ when any number of the recipe does.

        corpus_fingerprint  of the text, if it counts too
        """
        settings = asdict(self)
        settings["training"] = {k: v for k, v in self.training.items() if k != "seed"}
        content = [FORMAT_VERSION, corpus_fingerprint, settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


RECIPE = Recipe(VOCAB_SIZE, MODEL, TRAINING)
