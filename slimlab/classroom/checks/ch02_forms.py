"""The forms that answers to chapter 02's exercises have, and the numbers that a module holds.

The graders ask here first whether they got a function, a module or a whole number at all, so that
a student who returns something else reads what was asked, not where the grader stumbled.

Production tools count parameters alone; here every tensor that a module reaches counts.
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal

FLOAT64 = {"atol": 1e-9, "rtol": 0.0, "reason": "float64 rounding"}


def form_of(value: object) -> str:
    """Say in a few words what `value` is."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, dict):
        keys = [str(key) for key in value]
        return f"{kind} with the keys {', '.join(keys[:4])}" + (", ..." if keys[4:] else "")
    if isinstance(value, list | tuple):
        return f"{kind} of {len(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    plain = isinstance(value, bool | int | float | str)
    return f"{value!r}, of type {kind}" if plain else f"an object of type {kind}"


def function_of(student, name: str) -> Callable:
    """Return what the cells of `student` define as `name`; fail if it cannot be called."""
    found = getattr(student, name)
    asked, look = f"a function: def {name}(...)", f"how your cell defines {name}"
    expect(callable(found), f"{name} is {form_of(found)}", asked, look)
    return found


def expect_verdict(
    function: Callable, program: Callable, is_right: bool, what: str, look: str
) -> None:
    """Expect the student's test of a program to say whether that program is right.

    function  the student's test
    program   that it is given
    is_right  what it should say
    what      which program it is, for the message
    look      where to look, for the message
    """
    saw = function(program)
    is_bool = isinstance(saw, bool)
    expect(is_bool, f"{what}: {form_of(saw)}", "True or False", "the return lines")
    expect_equal(saw, is_right, what, look)


def whole_number(value: object, what: str, look: str) -> int:
    """Return `value` as an int; fail unless it is a whole number of Python, NumPy or torch.

    what  what it is, for the message
    look  where to look, for the message
    """
    if not isinstance(value, bool):
        with suppress(TypeError):
            return int(operator.index(value))
    raise CheckFailed(f"{what}: {form_of(value)}", "a whole number of type int", look)


def expect_module(made: object, what: str, asked: str) -> nn.Module:
    """Return `made`; fail unless it is a module.

    what   the call that made it, for the message
    asked  what it should be, for the message
    """
    look = "what is returned: an object of a class made from nn.Module"
    if made is None:
        look = "the last line: a function without return gives None"
    elif isinstance(made, dict):
        look = "what is returned: the layer itself, not its numbers alone"
    expect(isinstance(made, nn.Module), f"{what} returned {form_of(made)}", asked, look)
    return made


def expect_same_weights(layer: nn.Module, before: dict, what: str, look: str) -> None:
    """Fail unless `layer` still holds the numbers in `before`, a copy of its old state_dict.

    what  of what they are the numbers, such as "the old layer's {}" with a place for the name
    look  where to look
    """
    now = layer.state_dict()
    for name, weight in before.items():
        expect(name in now, f"no {what.format(name)} any more", "the same as before", look)
        expect_close(now[name], weight, what.format(name), look, **FLOAT64)


def weights_of(module: nn.Module) -> list[Tensor]:
    """List the tensors in which `module` keeps weights, whatever way it keeps them.

    Looked through are parameters, buffers and attributes, also in lists, tuples, dictionaries and
    objects of the student's own classes. No weights are whole numbers and truth values, a single
    number such as a scale, and a tensor of two different values such as a mask.
    """
    found, seen, left = [], set(), [module]
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found += [one] if _holds_weights(one) else []
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one
        elif isinstance(one, nn.Module | SimpleNamespace) or type(one).__module__ == "__main__":
            left += vars(one).values() if hasattr(one, "__dict__") else ()
    return found


def _holds_weights(one: Tensor) -> bool:
    if not one.is_floating_point() or one.numel() < 2:
        return False
    return isinstance(one, nn.Parameter) or one.detach().unique().numel() > 2


def count_numbers(tensors: list[Tensor]) -> int:
    """Count the places in memory that `tensors` name: what two of them share counts once."""
    places = set()
    for one in tensors:
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(one.shape, one.stride()):
            offsets = offsets.unsqueeze(-1) + stride * torch.arange(size)
        places.update((one.data_ptr() + one.element_size() * offsets).flatten().tolist())
    return len(places)
