"""Execute a notebook cell by cell, with a progress line and a readable report of what went wrong.

Chapter 00 explains how to run the book. It starts one fresh kernel for a notebook, in an empty
temporary folder (so that no chapter depends on where it is run), with SLIMLAB_BATCH=1, which
keeps progress bars out of saved outputs. Production tools (papermill, nbconvert, jupyter-cache)
also pass parameters, run notebooks of other languages and keep a cache; this one does not.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from slimlab.classroom.line import ProgressLine
from slimlab.config import InputError, require
from slimlab.text.files import write_atomically

SOURCE_FOLDER = Path(__file__).resolve().parents[2]
CELL_TIMEOUT_S = 300
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class CellFailure:
    """The first cell of a notebook that failed.

    chapter      the notebook's name without its ending
    cell_number  position among all cells, counted from 1
    cell_id      the cell's name inside the file
    line_number  line inside the cell, counted from 1, or None if the kernel died
    source_line  that line's text
    error        kind and message, as Python prints them
    traceback    the whole traceback without colours
    change       what the reader can do about it
    """

    chapter: str
    cell_number: int
    cell_id: str
    line_number: int | None
    source_line: str
    error: str
    traceback: str
    change: str

    def __str__(self):
        where = "" if self.line_number is None else f", line {self.line_number}"
        lines = [f"{self.chapter}: cell {self.cell_number} ({self.cell_id}){where} failed"]
        lines += [f"    {self.source_line.strip()}"] if self.source_line.strip() else []
        return "\n".join([*lines, self.error, f"change: {self.change}"])


@dataclass(frozen=True)
class RunReport:
    """How one notebook ran.

    chapter    the notebook's name without its ending
    output     where the executed notebook lies; it is there after a failure too
    num_cells  how many code cells it holds
    seconds    how long it took, kernel start included
    failure    the first failing cell, or None
    """

    chapter: str
    output: Path
    num_cells: int
    seconds: float
    failure: CellFailure | None


def find_root(start: str | Path | None = None) -> Path:
    """Return the book's folder, the one that holds `chapters/`.

    start    where to look first, then upward; the current folder if None
    returns  the absolute path

    The folder that this package lies in is tried last. Raises InputError if there is none.
    """
    start = Path.cwd() if start is None else Path(start).resolve()
    for folder in [start, *start.parents, SOURCE_FOLDER]:
        if any((folder / "chapters").glob("*.ipynb")):
            return folder
    raise InputError(
        "the book's folder, the one that holds chapters/ with the notebooks",
        f"started in {start}; neither it nor a folder above it holds one",
        "change into the folder that you cloned (cd slimlab) and try again",
    )


def find_chapter(name: str, root: Path) -> Path:
    """Return the path of one chapter.

    name  "01", "01_attention" or a path to a notebook
    root  the book's folder

    Raises InputError that lists the chapters if none or several fit.
    """
    if name.endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    stem = Path(name).stem
    chapters = sorted((root / "chapters").glob("*.ipynb"))
    found = [path for path in chapters if path.stem == stem or path.stem.startswith(stem + "_")]
    known = ", ".join(path.stem for path in chapters)
    require(len(found) == 1, "a chapter's number or name", repr(name), f"choose one of {known}")
    return found[0]


def run_chapters(
    names: Iterable[str], output_folder: str | Path, root: Path | None = None
) -> list[RunReport]:
    """Run chapters one after another and print a progress line and every failure.

    names          numbers ("01"), names or paths; all chapters if empty
    output_folder  where the executed copies go; the chapters themselves stay as they are
    root           the book's folder; found from the current folder if None
    returns        one RunReport per chapter, in order; a failure does not stop the others
    """
    root = find_root() if root is None else root
    names = list(names) or [path.stem for path in sorted((root / "chapters").glob("*.ipynb"))]
    reports = []
    for path in [find_chapter(name, root) for name in names]:
        reports.append(run_notebook(path, Path(output_folder) / path.name))
        if reports[-1].failure:
            print(f"\n{reports[-1].failure}\nkept: {reports[-1].output}\n", flush=True)
    return reports


def run_notebook(
    path: str | Path,
    output: str | Path,
    on_cell: Callable[[str, int, int], None] | None = None,
    cell_timeout_s: float = CELL_TIMEOUT_S,
) -> RunReport:
    """Execute one notebook in a kernel of its own and save the executed copy.

    path            the notebook to run
    output          where the executed copy goes; may be `path` itself
    on_cell         called as on_cell(chapter, k, n) before code cell k of n; the default draws a
                    progress line with chapter, cell and seconds
    cell_timeout_s  a cell that runs longer is interrupted and counts as failed
    returns         RunReport; look at its `failure`

    Raises InputError if `path` is not a notebook, no kernel starts, or nothing can be written. An
    interrupt from the keyboard leaves `output` as it was.
    """
    path, output = Path(path), Path(output)
    notebook = read_notebook(path)
    _make_folder(output.parent)
    started = time.perf_counter()
    line = None if on_cell else ProgressLine(path.stem)
    try:
        failure = execute(notebook, path.stem, on_cell or line.cell, cell_timeout_s)
    finally:
        if line:
            line.close()
    write_notebook(notebook, output)
    num_cells = len([cell for cell in notebook.cells if cell.cell_type == "code"])
    return RunReport(path.stem, output, num_cells, time.perf_counter() - started, failure)


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """Read a notebook from `path` in format 4; InputError if it is missing or not a notebook."""
    require(
        path.is_file(), "a notebook (.ipynb)", f"{path}, which does not exist", "check the path"
    )
    asked, change = "a notebook (.ipynb)", "save it again from Jupyter, or take a fresh copy"
    try:
        notebook = nbformat.read(path, as_version=4)
    # What nbformat raises depends on what the file holds in the place of a notebook.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(asked, f"{path}, which is not one: {reason}", change) from error
    for number, cell in enumerate(notebook.cells, start=1):
        given = f"{path}, whose cell {number} has no text"
        require(isinstance(cell.get("source"), str), asked, given, change)
    return notebook


def write_notebook(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write `notebook` to `path`, whole or not at all; InputError if it cannot be written."""
    _make_folder(path.parent)
    text = nbformat.writes(notebook).rstrip("\n") + "\n"
    # In JSON the escape \\ud800 means what UTF-8 has no bytes for, half a surrogate pair.
    write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        change = "choose another folder, or give yourself the right to write there"
        raise InputError("a folder to write in", f"{folder}: {error.strerror}", change) from error


def execute(
    notebook: nbformat.NotebookNode,
    chapter: str,
    on_cell: Callable[[str, int, int], None],
    cell_timeout_s: float = CELL_TIMEOUT_S,
) -> CellFailure | None:
    """Execute the cells of `notebook` in place, in a fresh kernel; stop at the first failure.

    notebook        its outputs are replaced
    chapter         name for the progress line and for the report
    on_cell         called as on_cell(chapter, k, n) before code cell k of n
    cell_timeout_s  limit for one cell
    returns         the failure, or None

    Raises InputError if the kernel does not start or answer.
    """
    code_cells = [(k, cell) for k, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for _, cell in code_cells:
        cell.outputs, cell.execution_count = [], None
    with tempfile.TemporaryDirectory(prefix="slimlab-") as folder:
        try:
            client = _client(notebook, cell_timeout_s)
            with client.setup_kernel(env=kernel_environment(), cwd=folder):
                for number, (index, cell) in enumerate(code_cells, start=1):
                    on_cell(chapter, number, len(code_cells))
                    try:
                        client.execute_cell(cell, index)
                    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                        return describe_failure(chapter, index, cell, error)
        except (RuntimeError, OSError, NoSuchKernel) as error:
            raise InputError(
                "a Python kernel that starts and answers",
                f"{type(error).__name__}: {error}",
                f"run {sys.executable} -m ipykernel_launcher, which shows what it lacks; "
                "install again if it is missing: pip install -e .",
            ) from error
    return None


def _client(notebook: nbformat.NotebookNode, cell_timeout_s: float) -> NotebookClient:
    manager = AsyncKernelManager(kernel_name="python3")
    # A kernel of that name may belong to another Python on this machine.
    manager.kernel_spec.argv[0] = sys.executable
    manager.kernel_spec.argv.append("--log-level=ERROR")
    return NotebookClient(
        notebook, km=manager, timeout=cell_timeout_s, record_timing=False, interrupt_on_timeout=True
    )


def kernel_environment() -> dict[str, str]:
    """Return this process's environment, changed so that a kernel is quiet and finds slimlab."""
    paths = [str(SOURCE_FOLDER), os.environ.get("PYTHONPATH", "")]
    return {
        # As on the reference machine; dozens of threads would slow small matrices down.
        "OMP_NUM_THREADS": "2",
        **os.environ,
        "SLIMLAB_BATCH": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def describe_failure(
    chapter: str, index: int, cell: nbformat.NotebookNode, error: Exception
) -> CellFailure:
    """Turn the `error` of `cell` (at `index`, counted from 0) of `chapter` into a CellFailure."""
    stored = [output for output in cell.outputs if output.output_type == "error"]
    if stored:
        traceback = ANSI.sub("", "\n".join(stored[-1].traceback))
        message = f"{stored[-1].ename}: {ANSI.sub('', stored[-1].evalue)}"
        change = "mend that line, or restart the kernel and run the cells above it first"
    else:
        traceback = message = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        change = "the kernel died: look for too little memory, then run the chapter again"
    if isinstance(error, CellTimeoutError) or message.startswith("KeyboardInterrupt"):
        change = "the cell ran out of time: close other programs, or give it smaller sizes"
    found = re.search(rf"Cell In\[{cell.execution_count}\], line (\d+)", traceback)
    line_number = int(found[1]) if found else None
    source_line = cell.source.splitlines()[line_number - 1] if line_number else ""
    return CellFailure(
        chapter, index + 1, cell.get("id", ""), line_number, source_line, message, traceback, change
    )
