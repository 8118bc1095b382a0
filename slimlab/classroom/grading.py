"""What graders compare with, and the one way in which a property fails.

All comparisons use torch functions that were bound when this module was imported, that is, before
the student's code runs, so `torch.allclose = ...` in a notebook changes nothing here. After the
student's code `comparison_is_sound` compares values that are known to differ; if that comparison
passes, something under it was changed and no point is given. A determined cheat shares the process
and could still win: limits are not a sandbox.

The exercises of every chapter use it. Production graders compare with `assert` or
`torch.testing.assert_close`, whose messages speak to programmers; these say where to look.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import Parameter

_tensor, _abs, _isnan, _where = torch.tensor, torch.abs, torch.isnan, torch.where
_detach, _to, _tolist, _reshape = Tensor.detach, Tensor.to, Tensor.tolist, Tensor.reshape
_argmax, _all, _full_like, _as_subclass = (
    torch.argmax,
    torch.all,
    torch.full_like,
    Tensor.as_subclass,
)
_eq, _le, _sub, _float64 = torch.eq, torch.le, torch.sub, torch.float64
_isinstance, _type = isinstance, type
SEVEN_DIGITS = "what costs digits, the rest agrees: float32 on the way, or a small number added"


class CheckFailed(Exception):
    """A property does not hold.

    saw       what the student's code gave
    expected  what was expected
    look      where to look, a few words that point and do not tell
    """

    def __init__(self, saw: object, expected: object, look: str):
        super().__init__(f"saw {saw}, expected {expected}, look at {look}")
        self.saw, self.expected, self.look = clean(saw), clean(expected), clean(look)


def clean(text: object, limit: int = 600) -> str:
    """Return `text` without what differs between runs: addresses and folders; at most `limit` long.

    text   anything; a float is rounded to four digits
    limit  the greatest number of characters
    """
    if _type(text) is float:
        text = number(text)
    line = re.sub(r"0x[0-9a-fA-F]{4,}", "0x...", str(text))
    line = re.sub(r"(?<![\w.])/(?:[\w.@+-]+/)+", ".../", line)
    return line if len(line) <= limit else line[: limit - 4] + " ..."


def number(value: float, other: float | None = None) -> str:
    """Write a number with four digits, or with ten where `other` would look the same.

    value  the number to write
    other  the number that it is set against
    """
    short = f"{value:.4g}"
    return f"{value:.10g}" if other is not None and short == f"{other:.4g}" else short


def expect_close(
    saw: object,
    expected: object,
    what: str,
    look: str,
    *,
    atol: float = 0.0,
    rtol: float = 1e-5,
    reason: str = "float32 rounding",
    form: str | None = None,
) -> None:
    """Fail unless every element is within atol + rtol * |expected|, compared in float64.

    saw       a tensor of any shape, a number or nested lists of numbers
    expected  the same, of the same shape
    what      what is compared: "the weights"
    look      where to look
    atol      absolute tolerance
    rtol      relative tolerance
    reason    why this tolerance; shown beside it
    form      where to look if it is no tensor, or one of another shape; None: at `look`
    """
    left, right = _as_tensor(saw, what, form or look), _as_tensor(expected, what, look)
    if tuple(left.shape) != tuple(right.shape):
        seen, wanted = tuple(left.shape), tuple(right.shape)
        raise CheckFailed(f"{what} of shape {seen}", f"shape {wanted}", form or look)
    if left.numel() == 0:
        return
    excess = _excess(left, right, atol, rtol)
    if bool(_all(_le(excess, 0.0))):
        return
    if max(atol, rtol) < 1e-8 and bool(_all(_le(_excess(left, right, 1e-6, 1e-6), 0.0))):
        look = SEVEN_DIGITS
    place = int(_argmax(_reshape(excess, (-1,))))
    a, b = _tolist(_reshape(left, (-1,)))[place], _tolist(_reshape(right, (-1,)))[place]
    where = f" at {_index(place, tuple(left.shape))}" if left.dim() else ""
    raise CheckFailed(
        f"{what}: {number(a, b)}{where}",
        f"{number(b, a)}{where}, within {_tolerance(atol, rtol)} ({reason})",
        look,
    )


def expect_equal(saw: object, expected: object, what: str, look: str) -> None:
    """Fail unless both are equal as plain values; a list equals a tuple with the same elements.

    saw       numbers, text, None, tensors, or lists, tuples, sets and dictionaries of these
    expected  the same
    what      what is compared: "the shape"
    look      where to look
    """
    left, right = plain(saw, what, look), plain(expected, what, look)
    if _type(left) is bool and _type(right) is not bool or left != right:
        raise CheckFailed(f"{what}: {_show(saw)}", _show(expected), look)


def expect_raises(call: Callable, kind: type[Exception], what: str, look: str) -> None:
    """Fail unless call() raises `kind`; an exercise that is not written yet does not count.

    call  a function without arguments
    kind  the class of the expected error
    what  what should be refused: "a width of 0"
    look  where to look
    """
    try:
        result = call()
    except NotImplementedError:
        raise
    except kind:
        return
    except Exception as error:
        saw = f"{what} gave {_type(error).__name__}: {error}"
        raise CheckFailed(saw, f"{kind.__name__}", look) from None
    raise CheckFailed(f"{what} was accepted and gave {_show(result)}", f"{kind.__name__}", look)


def expect(condition: bool, saw: object, expected: object, look: str) -> None:
    """Fail unless `condition` is True itself; anything merely truthy is not enough.

    condition  a bool, or a tensor with one bool
    saw        what the student's code gave
    expected   what was expected
    look       where to look
    """
    if _isinstance(condition, Tensor):
        condition = condition.numel() == 1 and condition.dtype == torch.bool and condition.item()
    if condition is not True:
        raise CheckFailed(_show(saw), _show(expected), look)


def comparison_is_sound() -> bool:
    """Return whether known-unequal values still fail and equal ones still pass."""
    one, other = _tensor([1.0, 2.0]), _tensor([1.0, 2.5])
    must_fail = (
        (expect_close, one, other),
        (expect_close, 1.0, 1.5),
        (expect_close, one, _tensor([1.0, float("nan")])),
        (expect_equal, (1, 2), (1, 3)),
        (expect_equal, one, other),
    )
    for compare, saw, expected in must_fail:
        try:
            compare(saw, expected, "canary", "canary")
        except CheckFailed:
            continue
        return False
    try:
        expect_close(one, _tensor([1.0, 2.0]), "canary", "canary")
        expect_equal((1, "a"), [1, "a"], "canary", "canary")
        expect(False, 0, 0, "canary")
    except CheckFailed as failure:
        return failure.saw == "0"
    return False


def plain(value: object, what: str, look: str) -> object:
    """Return `value` rebuilt from Python's own types, so that no class can redefine equality.

    value  what to rebuild
    what   what it is, for the message
    look   where to look, for the message
    """
    kind = _type(value)
    if value is None or kind in (bool, int, float, str, bytes, complex):
        return value
    if _isinstance(value, Tensor):
        base = _detach(_as_subclass(value, Tensor))
        return plain(_tolist(base), what, look)
    if kind in (list, tuple, torch.Size, range):
        return tuple(plain(one, what, look) for one in value)
    if kind in (set, frozenset):
        return frozenset(plain(one, what, look) for one in value)
    if kind in (Fraction, Decimal):
        return float(value)
    if kind is dict:
        return {plain(k, what, look): plain(v, what, look) for k, v in value.items()}
    if kind in (torch.dtype, torch.device):
        return str(value)
    if kind.__module__ == "numpy":
        return plain(value.tolist(), what, look)
    raise CheckFailed(
        f"{what}: an object of type {kind.__name__}", "plain numbers, text or tensors", look
    )


def _excess(left: Tensor, right: Tensor, atol: float, rtol: float) -> Tensor:
    excess = _sub(_abs(_sub(left, right)), atol + rtol * _abs(right))
    # inf - inf is nan although both agree; any other nan is a fault
    excess = _where(_isnan(excess), _full_like(excess, float("inf")), excess)
    return _where(_eq(left, right), _full_like(excess, -1.0), excess)


def _as_tensor(value: object, what: str, look: str) -> Tensor:
    if _type(value) in (Tensor, Parameter) or _isinstance(value, Tensor):
        found = _detach(_as_subclass(value, Tensor))
        if found.is_complex():
            raise CheckFailed(f"{what} is complex", "real numbers", look)
        return _to(found, device="cpu", dtype=_float64)
    try:
        return _tensor(plain(value, what, look), dtype=_float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        shown = clean(repr(value), 200) if "'" in repr(value) else _show(value)
        seen = f"{what}: {shown}, of type {_type(value).__name__}"
        raise CheckFailed(seen, "a tensor or a number", look) from None


def _index(place: int, shape: tuple[int, ...]) -> str:
    index = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(str(rest))
    return f"[{', '.join(reversed(index))}]"


def _tolerance(atol: float, rtol: float) -> str:
    parts = [f"{atol:.3g}"] if atol else []
    parts += [f"{rtol:.3g} of it"] if rtol else []
    return " plus ".join(parts) or "nothing"


def _show(value: object) -> str:
    if _type(value) is float:
        return number(value)
    if _isinstance(value, Tensor):
        shape = tuple(value.shape)
        if value.numel() > 12:
            return f"a tensor of shape {shape}"
        value = _tolist(_detach(value))
    if _type(value) in (list, tuple):
        shown = ", ".join(_show(one) for one in value)
        comma = "," if len(value) == 1 else ""
        return f"[{shown}]" if _type(value) is list else f"({shown}{comma})"
    return clean(value if _type(value) is str else repr(value), 200)
