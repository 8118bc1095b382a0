"""Listings of library code.

Every chapter's fifth part shows slimlab's own source through `show_source`, so that a listing
never differs from the code that runs. Documentation tools (Sphinx's literalinclude) do the same
for whole files at the time a site is built.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable

from slimlab.config import InputError


def show_source(obj: Callable | type, doc: bool = True) -> None:
    """Print the source of a function, method or class under its full name.

    obj  something defined in a module: slimlab.model.masks.causal_mask, for example
    doc  False leaves docstrings out, so that a long function fits on a screen

    Raises InputError for modules and for objects without source, such as builtins.
    """
    target = inspect.unwrap(obj) if callable(obj) else obj
    try:
        if inspect.ismodule(target):  # whose source would fill many screens
            raise TypeError(target)
        source = textwrap.dedent(inspect.getsource(target))
    except (TypeError, OSError) as error:
        raise InputError(
            "a function, method or class written in a Python module",
            f"{obj!r}",
            "pass the object itself, imported from slimlab",
        ) from error
    heading = f"{target.__module__}.{target.__qualname__}"
    body = source if doc else without_docstrings(source)
    print(f"{heading}\n{'─' * len(heading)}\n{body.rstrip()}")


def without_docstrings(source: str) -> str:
    """Return `source` without the lines of its docstrings; code and comments stay as they are."""
    lines = source.splitlines()
    holders = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(source)):
        # A body that is nothing but its docstring would be left empty.
        if isinstance(node, holders) and ast.get_docstring(node) is not None and node.body[1:]:
            first, last = node.body[0].lineno, node.body[0].end_lineno
            if last < len(lines) and not lines[last].strip():
                last += 1
            lines[first - 1 : last] = [None] * (last - first + 1)
    return "\n".join(line for line in lines if line is not None)
