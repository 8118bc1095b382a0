"""Configurations that check themselves, and the one error that all bad input gets.

A configuration is a frozen dataclass: it cannot be changed after it was checked. Use
`dataclasses.replace` for a variant. Chapter 00 explains the letters, chapters 01 and 02 the heads.
"""

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
    """The sizes of a decoder-only Transformer; every count is a plain number of elements.

    num_kv_heads  defaults to num_heads (multi-head); 1 is multi-query, in between grouped-query
    d_head        defaults to d_model // num_heads
    d_ff          defaults to 4 * d_model

    Raises InputError if a size is not a positive whole number or does not divide.
    """

    vocab_size: int
    seq_len: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    d_head: int | None = None
    d_ff: int | None = None

    def __post_init__(self):
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.d_ff is None and isinstance(self.d_model, int):
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        if self.d_head is None:
            check_size("d_model", self.d_model)
            check_size("num_heads", self.num_heads)
            check_divides("num_heads", self.num_heads, "d_model", self.d_model)
            object.__setattr__(self, "d_head", self.d_model // self.num_heads)
        for name, value in vars(self).items():
            check_size(name, value)
        check_divides("num_kv_heads", self.num_kv_heads, "num_heads", self.num_heads)


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
