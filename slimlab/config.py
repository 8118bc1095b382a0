"""Configurations that check themselves.

A configuration is a frozen dataclass: it cannot be changed after it was checked. Use
`dataclasses.replace` for a variant. Chapter 00 explains the letters, chapters 01 and 02 the heads,
chapter 03 the choices, chapter 05 the training.
"""

from dataclasses import dataclass
from math import inf

from slimlab.inputs import (
    InputError,
    check_choice,
    check_divides,
    check_number,
    check_size,
    require,
)

__all__ = [
    "InputError",
    "ModelConfig",
    "TrainingConfig",
    "check_choice",
    "check_divides",
    "check_number",
    "check_size",
    "require",
]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and the choices that make a Transformer; sizes are plain numbers of elements.

    Sizes (d_head defaults to d_model // num_heads)
    num_kv_heads    defaults to num_heads (multi-head); 1 is multi-query, in between grouped-query
    d_ff            defaults to 4 * d_model; with three matrices (swiglu) to 8/3 * d_model, rounded
                    up to a multiple of 8, which costs as many parameters
    seq_len         the longest sequence

    Choices
    kind            "decoder", "encoder" or "encoder_decoder" (num_layers blocks in each half)
    positions       "rotary", "learned", "sinusoidal" or "none"
    rotary_layout   which features make a rotary pair: "half" (i and i + d_head/2) or "interleaved"
                    (2i and 2i + 1)
    rotary_base     base of the rotary frequencies
    norm            "rms" or "layer"; norm_eps is added under its square root
    norm_place      "pre" (before each sub-layer) or "post" (after each sum)
    feed_forward    "gelu", "gelu_tanh", "relu" or "swiglu"
    bias            linear layers and LayerNorm have biases
    tie_embeddings  one table embeds tokens and scores the next one
    num_segments    kinds of segment that an encoder tells apart: 0 or, as BERT, 2
    dropout         part of the features set to zero in training, on embeddings and sub-layers

    slimlab.model.families has the choices of published models. Raises InputError if a size is not a
    positive whole number or does not divide, or a choice is unknown or contradicts another.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    d_head: int | None = None
    d_ff: int | None = None
    kind: str = "decoder"
    positions: str = "rotary"
    rotary_layout: str = "half"
    rotary_base: float = 10000.0
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_place: str = "pre"
    feed_forward: str = "gelu"
    bias: bool = False
    tie_embeddings: bool = True
    num_segments: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        for name, names in CHOICES.items():
            check_choice(name, getattr(self, name), names)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.d_ff is None and isinstance(self.d_model, int):
            d_ff = 8 * -(-self.d_model // 3) if self.gated else 4 * self.d_model
            object.__setattr__(self, "d_ff", d_ff)
        if self.d_head is None:
            check_size("d_model", self.d_model)
            check_size("num_heads", self.num_heads)
            check_divides("num_heads", self.num_heads, "d_model", self.d_model)
            object.__setattr__(self, "d_head", self.d_model // self.num_heads)
        for name in SIZES:
            check_size(name, getattr(self, name))
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)
        self._check_choices()

    @property
    def gated(self) -> bool:
        """The feed-forward layer has three matrices, one of which gates."""
        return self.feed_forward == "swiglu"

    def _check_choices(self) -> None:
        require(
            self.positions != "sinusoidal" or self.d_model % 2 == 0,
            "an even d_model for sinusoidal positions, a sine beside each cosine",
            f"d_model = {self.d_model}",
            'make d_model even, or positions="learned"',
        )
        for name, low in {"rotary_base": 1.0, "norm_eps": 0.0}.items():
            value = getattr(self, name)
            require(
                isinstance(value, int | float) and low < value < float("inf"),
                f"{name}, a number above {low:g}",
                f"{name} = {value!r}",
                f"leave {name} out for its default",
            )
        for name in ("bias", "tie_embeddings"):
            value = getattr(self, name)
            asked, change = f"{name}, True or False", f"give {name}=True or {name}=False"
            require(isinstance(value, bool), asked, f"{name} = {value!r}", change)
        require(
            isinstance(self.dropout, int | float) and 0 <= self.dropout < 1,
            "dropout, a part from 0 up to, not including, 1",
            f"dropout = {self.dropout!r}",
            "give dropout=0.1, or 0 to switch it off",
        )
        segments = self.num_segments
        require(
            isinstance(segments, int) and segments >= 0 and not isinstance(segments, bool),
            "num_segments, a whole number of at least 0",
            f"num_segments = {segments!r}",
            "give 2 for pairs of sentences, 0 for none",
        )
        require(
            segments == 0 or self.kind == "encoder",
            'segments in an encoder only (kind="encoder")',
            f"num_segments = {segments}, kind = {self.kind!r}",
            "leave num_segments out",
        )


SIZES = (
    "vocab_size", "seq_len", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_head", "d_ff",
)  # fmt: skip
CHOICES = {
    "kind": ("decoder", "encoder", "encoder_decoder"),
    "positions": ("rotary", "learned", "sinusoidal", "none"),
    "rotary_layout": ("half", "interleaved"),
    "norm": ("rms", "layer"),
    "norm_place": ("pre", "post"),
    "feed_forward": ("gelu", "gelu_tanh", "relu", "swiglu"),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained; together with model and data it determines every weight.

    num_steps         updates of the weights
    batch_size        B, sequences of one update
    seq_len           T, tokens of a sequence
    micro_batch_size  sequences in memory at a time; defaults to batch_size
    peak_lr           the learning rate after warm-up; it falls to final_lr_fraction of that
    warmup_steps      updates until peak_lr is reached; defaults to num_steps // 20
    weight_decay      pull of the weights toward zero
    betas             how much of their past AdamW's averages of gradients and squares keep
    clip_norm         longest gradient that is applied as it is; None: no clipping
    optimizer         "adamw" (PyTorch's, fused), "adamw_own" (written in this book) or "sgd"
                      (momentum 0.9)
    precision         of matrix products: "float32", "bfloat16" or "float16"
    recompute         "none", or "block": blocks forget their activations, and the backward pass
                      computes them again
    seed              of the windows drawn and of dropout
    validate_every    steps between measurements on held-out text; None: after the last step alone
    save_every        steps between checkpoints, None likewise; keep_checkpoints of them are kept
    device            "auto" (the first of cuda, mps and cpu that is there), or PyTorch's name

    Raises InputError if a number is out of its range or a choice is unknown.
    """

    num_steps: int
    batch_size: int
    seq_len: int
    micro_batch_size: int | None = None
    peak_lr: float = 1e-3
    warmup_steps: int | None = None
    final_lr_fraction: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 1.0
    optimizer: str = "adamw"
    precision: str = "float32"
    recompute: str = "none"
    seed: int = 0
    validate_every: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    device: str = "auto"

    def __post_init__(self):
        for name, names in TRAINING_CHOICES.items():
            check_choice(name, getattr(self, name), names)
        check_size("num_steps", self.num_steps)
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", self.num_steps // 20)
        for name, (kind, low, high) in TRAINING_NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in MAY_BE_NONE:
                high = getattr(self, high) if isinstance(high, str) else high
                check_number(name, value, kind, low, high, above=name in ABOVE_LEAST)
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        asked, change = "betas, a pair of numbers", "give betas=(0.9, 0.95)"
        require(pair, asked, f"betas = {self.betas!r}", change)
        for beta in self.betas:
            check_number("each of betas", beta, float, 0, 1 - 1e-12)
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON makes lists of pairs
        named = isinstance(self.device, str) and bool(self.device)
        require(named, "device, a name", f"device = {self.device!r}", 'give device="auto"')


# Whole or real, least and greatest: a number, or the field that bounds it.
TRAINING_NUMBERS = {
    "batch_size": (int, 1, inf),
    "seq_len": (int, 1, inf),
    "micro_batch_size": (int, 1, "batch_size"),
    "peak_lr": (float, 0, inf),
    "warmup_steps": (int, 0, "num_steps"),
    "final_lr_fraction": (float, 0, 1),
    "weight_decay": (float, 0, inf),
    "clip_norm": (float, 0, inf),
    "seed": (int, 0, 2**32 - 1),
    "validate_every": (int, 1, inf),
    "save_every": (int, 1, inf),
    "keep_checkpoints": (int, 1, inf),
}
ABOVE_LEAST = ("peak_lr", "clip_norm")
MAY_BE_NONE = ("micro_batch_size", "clip_norm", "validate_every", "save_every")
TRAINING_CHOICES = {
    "optimizer": ("adamw", "adamw_own", "sgd"),
    "precision": ("float32", "bfloat16", "float16"),
    "recompute": ("none", "block"),
}
