"""Turn notebooks into text and back, execute, tidy and check them.

    python tools/notebooks.py text    chapters/01_attention.ipynb > scratch.py
    python tools/notebooks.py build   scratch.py chapters/01_attention.ipynb
    python tools/notebooks.py execute chapters/*.ipynb
    python tools/notebooks.py tidy    chapters/*.ipynb
    python tools/notebooks.py check   chapters/*.ipynb solutions/*.ipynb

The text form is jupytext's percent format. A cell's name is an option of its first line:
`# %% id="rows-sum-to-one" tags=["nbval-ignore-output"]`; cells without one are named after
their content. Only the executed notebook is kept; nothing is written if a cell fails.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jupytext

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import rules  # noqa: E402

from slimlab.classroom import runner  # noqa: E402
from slimlab.classroom.line import ProgressLine  # noqa: E402
from slimlab.config import InputError, require  # noqa: E402
from slimlab.text.files import decode_utf8, read_blocks  # noqa: E402

CELL_TIMEOUT_S = 300


def to_text(notebook) -> str:
    """Write `notebook` as percent text; ids that a person chose become options."""
    for cell in notebook.cells:
        options = {"id": cell.id} if rules.is_readable(cell.id) else {}
        cell.metadata = {**options, **cell.metadata}
        cell.pop("id")
    notebook.metadata = {
        "jupytext": {"cell_metadata_filter": "all", "notebook_metadata_filter": "-all"}
    }
    return jupytext.writes(notebook, fmt="py:percent")


def from_text(text: str):
    """Read percent text into a notebook; the option `id` becomes the cell's id."""
    notebook = jupytext.reads(text, fmt="py:percent")
    for cell in notebook.cells:
        cell["id"] = str(cell.metadata.pop("id", ""))
        if not rules.is_readable(cell["id"]) and cell["id"]:
            raise SystemExit(f"cell id {cell['id']!r}: use lower-case words joined by hyphens")
    names = [cell["id"] for cell in notebook.cells if cell["id"]]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise SystemExit(f"cell ids used twice: {', '.join(twice)}")
    rules.tidy(notebook)
    return notebook


def execute(notebook, name: str, timeout_s: float) -> bool:
    """Execute and tidy `notebook`; print the failure and return False if a cell fails."""
    line = ProgressLine(name)
    failure = runner.execute(notebook, name, line.cell, timeout_s)
    line.close()
    if failure:
        print(f"{failure.traceback}\n\n{failure}", file=sys.stderr)
        return False
    rules.tidy(notebook)
    return True


def save(notebook, path: Path) -> int:
    """Write `notebook`, print the rules it breaks; returns how many."""
    runner.write_notebook(notebook, path)
    return report(path)


def report(path: Path) -> int:
    found = rules.problems(runner.read_notebook(path))
    for text in found:
        print(f"{path}: {text}")
    return len(found)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["text", "build", "execute", "tidy", "check"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--timeout", type=float, default=CELL_TIMEOUT_S, help="seconds for a cell")
    return parser.parse_args()


def build(paths: list[Path], timeout_s: float) -> int:
    require(
        len(paths) == 2,
        "a text and the notebook to make of it",
        f"{len(paths)} paths",
        "tools/notebooks.py build scratch.py chapters/NN_name.ipynb",
    )
    source, target = paths
    notebook = from_text("".join(decode_utf8(read_blocks(source), source)))
    return save(notebook, target) if execute(notebook, target.stem, timeout_s) else 1


def handle(verb: str, path: Path, timeout_s: float) -> int:
    """Do what `verb` says with one notebook; returns how many problems it has."""
    notebook = runner.read_notebook(path)
    if verb == "text":
        print(to_text(notebook), end="")
    elif verb == "execute":
        return save(notebook, path) if execute(notebook, path.stem, timeout_s) else 1
    elif verb == "tidy":
        rules.tidy(notebook)
        runner.write_notebook(notebook, path)
    else:
        return report(path)
    return 0


def main() -> int:
    arguments = parse_arguments()
    verb, paths, timeout_s = arguments.verb, arguments.paths, arguments.timeout
    jobs = [partial(handle, verb, path, timeout_s) for path in paths]
    broken = 0
    for job in [partial(build, paths, timeout_s)] if verb == "build" else jobs:
        try:
            broken += job()
        except InputError as error:
            print(error, file=sys.stderr)
            broken += 1
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
