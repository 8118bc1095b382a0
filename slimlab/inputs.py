"""The one error that all bad input gets, and the checks that raise it.

Every function that takes input uses them, and modules import them from `slimlab.config`, which
passes them on.
"""

from collections.abc import Sequence
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


def check_number(
    name: str, value: object, kind: type, low: float, high: float, above: bool = False
) -> None:
    """Refuse what is not a number from low to high; neither infinity nor not-a-number is one.

    name   what the number is called, for the message
    value  what was given
    kind   int: whole numbers only; float: whole numbers too
    low    the least number allowed
    high   the greatest
    above  low itself is not allowed

    Raises InputError.
    """
    kinds = (int,) if kind is int else (int, float)
    limit = "" if high == float("inf") else f" and at most {high:.12g}"
    start = f"{'above' if above else 'of at least'} {low:g}"
    require(
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and low <= value <= high
        and not (above and value == low)
        and abs(value) != float("inf"),
        f"{name}, a {'whole ' if kind is int else ''}number {start}{limit}",
        f"{name} = {value!r}",
        f"give {name} such a number",
    )
