"""The recipe of the model of the book, in numbers: what `slimlab train` does unless told otherwise.

slimlab.train.reference trains it; chapter 05 shows the evidence for each choice, which lies in
reference_evidence.json. Bits per byte (bpb) below are from there: held-out text of Python 3.11, one
choice changed, equal work. Seeds differ by about 0.01, so smaller differences decide nothing.

Production recipes are found by trials at several small sizes and carried over to a large one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass

FORMAT_VERSION = 1  # raised when the same numbers would train another model

# 256 bytes, 1023 merges and the end of a text: 3.1 bytes a token, so that a window sees more text
# than with fewer; with many more tokens most are too rare to be learned. Divisible by 8.
VOCAB_SIZE = 1280

MODEL = {
    # 400 bytes. Longer windows cost more, and their batches hold fewer different places.
    "seq_len": 128,
    # Narrow: a wider model sees the text fewer times in 75 s. With 4 heads and 4 blocks every
    # part can be cut in two and in four, which later chapters do.
    "d_model": 128,
    "num_layers": 4,
    "num_heads": 4,
    "feed_forward": "swiglu",
    # A text read ten times is soon known by heart, yet dropout slows learning more than it helps.
    "dropout": 0.0,
}

# Blocks begin as the identity, so the first steps can be long.
RESIDUAL = "zero"

TRAINING = {
    # As many as two cores do in 70 to 75 s; ten times through the text.
    "num_steps": 1000,
    # Small, for many updates: 1024 tokens each.
    "batch_size": 8,
    # The greatest that still helps: at 5e-3 the model ends 0.17 bpb worse.
    "peak_lr": 2e-3,
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
