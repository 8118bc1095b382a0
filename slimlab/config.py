"""Configurations that check themselves, and the one error that all bad input gets.

A configuration is a frozen dataclass: it cannot be changed after it was checked. Use
`dataclasses.replace` for a variant. Chapter 00 explains the letters, chapters 01 and 02 the heads,
chapter 03 the choices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt


class InputError(ValueError):
    """Say what was asked, what was given and what to change.

    asked   what the function needs, in a few words
    given   what it got: the shape, the value, the path
    change  what the reader should do about it

    It is a ValueError, so code that catches those keeps working; the command line prints it
    without a traceback.
    """

    def __init__(self, asked: str, given: str, change: str):
        super().__init__(f"asked for: {asked}\ngiven: {given}\nchange: {change}")
        self.asked, self.given, self.change = asked, given, change


def require(condition: bool, asked: str, given: str, change: str) -> None:
    """Refuse bad input: raise InputError unless the condition holds.

    condition             what must hold
    asked, given, change  as in InputError
    """
    if not condition:
        raise InputError(asked, given, change)


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
        rotary_pairs = self.positions != "rotary" or self.d_head % 2 == 0
        require(
            rotary_pairs,
            "an even d_head for rotary positions, which turn features in pairs",
            f"d_head = {self.d_head}",
            'choose num_heads so that d_model / num_heads is even, or positions="learned"',
        )
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


def check_choice(name: str, value: object, names: Sequence[str]) -> None:
    """Refuse a word that is not one of the known ones.

    name   what is chosen, for the message
    value  what was given
    names  the known words

    Raises InputError that lists them.
    """
    require(
        isinstance(value, str) and value in names,
        f"{name}: one of {', '.join(names)}",
        f"{name} = {value!r}",
        "choose one of these names",
    )


def check_size(name: str, value: object) -> None:
    """Refuse what is not a whole number of at least 1.

    name   what the size is called, for the message
    value  what was given

    Raises InputError.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(
        whole and value >= 1,
        f"{name}, a whole number of at least 1",
        f"{name} = {value!r}",
        f"give {name} a positive whole number",
    )


def check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Refuse a divisor that leaves a remainder, and name those that would not.

    divisor_name, divisor  the size that must divide, for instance num_heads
    name, value            the size that must be divided, for instance d_model

    Raises InputError.
    """
    if value % divisor:
        small = [n for n in range(1, isqrt(value) + 1) if value % n == 0]
        fitting = [str(n) for n in sorted({*small, *(value // n for n in small)})]
        listed = ", ".join(fitting if len(fitting) <= 12 else [*fitting[:11], "..."])
        raise InputError(
            f"a {divisor_name} that divides {name}",
            f"{divisor_name} = {divisor}, {name} = {value}, remainder {value % divisor}",
            f"choose {divisor_name} from {listed}, or change {name}",
        )
