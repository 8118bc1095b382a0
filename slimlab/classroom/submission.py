"""Find a student's work: the cells marked `# exercise 1.1`, the imports they use, nothing else.

A syntax error in another cell, a deleted check cell or a changed test cell therefore cannot
change what is graded. Cells come from a notebook, from a percent-format script or from the
history of a running kernel. Every chapter's exercises use it; nbgrader runs the whole notebook.
"""

import ast
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimlab.classroom.report import Problem
from slimlab.config import InputError, require

MAX_FILE_BYTES = 100_000_000
MARK = re.compile(r"#+\s*exercise\s*(\d{1,2}\.\d{1,2})\s*(?:[^\w\s].*)?$", re.IGNORECASE)
GRADE_ID = re.compile(r"ex-(\d{1,2})-(\d{1,2})(?:-.*)?$")


@dataclass(frozen=True)
class Cell:
    """One code cell.

    label     how a message names it: "cell 4" or "In [7]"
    source    its text
    grade_id  nbgrader's name for it, or ""
    """

    label: str
    source: str
    grade_id: str = ""


@dataclass(frozen=True)
class Submission:
    """A student's work on one exercise.

    cells    the marked cells, in order, magics blanked out
    imports  the import statements of other cells that the marked ones use
    problem  why it cannot be run, or None
    """

    cells: tuple[Cell, ...]
    imports: str = ""
    problem: Problem | None = None


def mark_of(cell: Cell) -> str | None:
    """Return the number of the exercise that `cell` is marked for, or None.

    cell  its first line counts that is neither empty nor a magic; without a mark there, its
          grade_id does
    """
    lines = [line.strip() for line in cell.source.splitlines()]
    first = next((line for line in lines if line and not line.startswith("%")), "")
    found = MARK.match(first)
    if found:
        return found[1]
    found = GRADE_ID.match(cell.grade_id)
    return f"{int(found[1])}.{int(found[2])}" if found else None


def collect(cells: Sequence[Cell], number: str) -> Submission:
    """Return the work on exercise `number` among `cells`.

    cells   all code cells of a notebook, in order
    number  "1.1"
    """
    marked = [cell for cell in cells if mark_of(cell) == number]
    if not marked:
        saw = f"no cell that starts with the line `# exercise {number}`"
        return Submission(
            (), problem=Problem(saw, "your work in a cell with that first line", "the first line")
        )
    ready, used = [], set()
    for cell in marked:
        source, error = parsable(cell.source)
        if error is not None:
            return Submission((), problem=_syntax_problem(cell, error))
        ready.append(Cell(cell.label, source, cell.grade_id))
        used |= _names_used(ast.parse(source))
    others = [cell for cell in cells if mark_of(cell) != number]
    return Submission(tuple(ready), "\n".join(_imports(others, used)))


def parsable(source: str) -> tuple[str, SyntaxError | None]:
    """Return `source` with IPython's magics blanked out if that makes it parse, and the error.

    source   a cell's text
    returns  the text to run, and None; or the text as it was, and what is wrong in it
    """
    magic = re.compile(r"^(\s*)(?:[%!].*|[\w.]+\?{1,2}\s*)$", re.MULTILINE)
    first = None
    for text in (source, magic.sub(r"\1pass", source)):
        try:
            ast.parse(text)
            return text, None
        except SyntaxError as error:
            first = first or error
        except ValueError as error:
            first = first or SyntaxError(str(error))
    return source, first


def latest_cells(
    history: Sequence[str],
    number: str,
    ids: Mapping[int, str] | None = None,
    failed: Collection[int] = (),
) -> list[Cell]:
    """Return the cells of a kernel's history, keeping only the newest form of each marked cell.

    history  IPython's raw inputs; entry 7 is In [7]
    number   the exercise whose marked cells are reduced to their newest form
    ids      which cell an input came from, by place, where the editor says it (JupyterLab does)
    failed   the places of inputs that ended with an error

    Cells stand in the order in which they were first run. Of inputs without an id, an older one is
    dropped once every name that it defines is defined by newer ones, or if it failed or does not
    parse and a newer one exists.
    """
    ids, kept, defined = ids or {}, {}, set()
    first = {}
    for place in range(len(history)):
        first.setdefault(ids.get(place, place), place)
    for place in range(len(history) - 1, -1, -1):
        cell, origin = Cell(f"In [{place}]", history[place]), ids.get(place, place)
        if mark_of(cell) == number:
            source, error = parsable(cell.source)
            names = set() if error else _names_defined(ast.parse(source))
            older = error or place in failed or names <= defined
            if origin in kept or (defined and older):
                continue
            kept[origin] = cell
            if error:
                break
            defined |= names or {"a cell that defines nothing"}
        else:
            kept.setdefault(origin, cell)
    return [kept[origin] for origin in sorted(kept, key=first.get)]


def read_cells(path: str | Path) -> list[Cell]:
    """Return the code cells of a notebook, or of a script in percent format.

    path  an .ipynb or .py file

    Raises InputError for a file that is missing, huge, not text or not a notebook.
    """
    path = Path(path)
    there = path.is_file()
    require(there, "a notebook (.ipynb) or script (.py)", f"{path}, no file", "check the path")
    size_bytes = path.stat().st_size
    require(
        size_bytes <= MAX_FILE_BYTES,
        f"a notebook of at most {MAX_FILE_BYTES // 10**6} MB",
        f"{path.name}, {size_bytes / 1e6:.0f} MB",
        "clear the outputs (Kernel, Restart and Clear Outputs) and save again",
    )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("UTF-8 text", f"{path.name}: {error}", "save it as UTF-8") from None
    return _script_cells(text) if path.suffix == ".py" else _notebook_cells(text, path.name)


def student_named(cells: Iterable[Cell]) -> str | None:
    """Return the name in the last call student("...") among `cells`, or None.

    cells  a notebook's cells; student(name) after name = "..." in the same cell counts too
    """
    said = None
    for cell in cells:
        if "student" not in cell.source:
            continue
        source, error = parsable(cell.source)
        texts: dict[str, object] = {}
        for node in [] if error else ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                texts |= {getattr(one, "id", ""): node.value.value for one in node.targets}
            called = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "student"
            if called and node.args:
                given = node.args[0]
                name = texts.get(getattr(given, "id", ""), getattr(given, "value", None))
                said = name if isinstance(name, str) and name.strip() else said
    return said


def _notebook_cells(text: str, name: str) -> list[Cell]:
    change = "save it again from Jupyter, or take a fresh copy"
    if re.search(r"^<{7} .*^>{7} ", text, re.MULTILINE | re.DOTALL):
        raise InputError(
            "a Jupyter notebook of format 4",
            f"{name}, with the marks of an unfinished merge (<<<<<<<)",
            "choose one of the two versions: git checkout --ours or --theirs",
        )
    try:
        found = json.loads(text)["cells"]
        code = [cell.get("cell_type") == "code" for cell in found]
        sources = [cell.get("source", "") for cell in found]
        metadata = [(cell.get("metadata") or {}).get("nbgrader") or {} for cell in found]
        joined = ["".join(source) for source in sources]
        ids = [str(one.get("grade_id", "")) for one in metadata]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        given = f"{name}: {type(error).__name__}: {str(error)[:100]}"
        if '"worksheets"' in text:
            given = f"{name}, of an older format"
        raise InputError("a Jupyter notebook of format 4", given, change) from None
    return [Cell(f"cell {k + 1}", joined[k], ids[k]) for k in range(len(found)) if code[k]]


def _script_cells(text: str) -> list[Cell]:
    parts = re.split(r"^# %%(.*)$", text, flags=re.MULTILINE)
    cells = [Cell("cell 1", parts[0])] if parts[0].strip() else []
    for k, (heading, source) in enumerate(zip(parts[1::2], parts[2::2]), start=len(cells) + 1):
        if "[markdown]" not in heading and "[raw]" not in heading:
            found = re.search(r'"grade_id"\s*:\s*"([^"]*)"', heading)
            cells.append(Cell(f"cell {k}", source.strip("\n"), found[1] if found else ""))
    return cells


def _syntax_problem(cell: Cell, error: SyntaxError) -> Problem:
    text = (error.text or "").strip()
    saw = f"{cell.label} cannot be read as Python: {error.msg}"
    line = f"line {error.lineno} of " if error.lineno else "characters that are no text in "
    look = line + cell.label + (f": {text}" if text else "")
    return Problem(saw, "a cell without a syntax error", look)


def _names_used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _names_defined(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            stored = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            names |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    return names


def _imports(cells: Iterable[Cell], used: set[str]) -> list[str]:
    statements = []
    for cell in cells:
        source, error = parsable(cell.source)
        for node in [] if error else ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                bound = {(one.asname or one.name).split(".")[0] for one in node.names}
                statements += [ast.unparse(node)] if bound & (used | {"*"}) else []
    return list(dict.fromkeys(statements))
