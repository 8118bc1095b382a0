"""What a student calls in a notebook: student(), numbers() and check().

    from slimlab.classroom.check import check, numbers, student
    check("1.1").score         # the report, then the points
    check("1.1", hint=1)       # the same with the first hint

A check takes the newest executed form of every cell that starts with `# exercise 1.1`, and the
imports those cells use, and runs them in a process of its own with limits of time, memory and
output. The limits are not a sandbox. The last line of a check cell ends in `.score`: nbgrader reads
that number as partial credit. Every chapter's exercises use it.
"""

import sys
from pathlib import Path

from slimlab.classroom.exercise import find_exercise
from slimlab.classroom.process import shared_keeper
from slimlab.classroom.report import Report, nothing_checked
from slimlab.classroom.session import SESSION
from slimlab.classroom.submission import (
    Problem,
    Submission,
    collect,
    latest_cells,
    mark_of,
    read_cells,
)
from slimlab.config import InputError


def student(name: str) -> None:
    """Say whose numbers are drawn from now on in this notebook.

    name  first and last name as the teacher's list has it; case and separators do not matter
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError("your name", f"{name!r}", 'write student("Ada Lovelace")')
    SESSION.begin(name, SESSION.seed, SESSION.grading)
    if not SESSION.grading:
        print(f"Numbers are drawn for {name}.")


def numbers(number: str) -> dict:
    """Return the numbers of an exercise: this student's, or those of the book.

    number  the exercise, "1.1"

    Raises InputError that lists the exercises there are.
    """
    return find_exercise(number).numbers_for(SESSION.name, SESSION.class_seed())


def check(
    number: str, *, hint: int = 0, student: str | None = None, file: str | Path | None = None
) -> Report:
    """Check one exercise, show the report and return it.

    number   the exercise, "1.1"
    hint     show this hint too: 1 for the first
    student  check with this student's numbers instead of those of student()
    file     take the cells from this notebook or script instead of the running notebook
    returns  a Report with .score, .max_score and .outcomes

    Raises InputError for an exercise that does not exist and where there is no notebook to look in.
    """
    exercise = find_exercise(number)
    if SESSION.grading:
        problem = Problem("a check inside a checked cell", "it in a cell of its own", "that cell")
        return nothing_checked(exercise, problem)
    if file is not None:
        work = collect(read_cells(file), number)
    else:
        cells = latest_cells(_history(), number, SESSION.cell_ids, SESSION.failed)
        ran = any(mark_of(cell) == number for cell in cells)
        work = collect(cells, number) if ran else Submission((), problem=_not_run(number))
    report = shared_keeper().check(
        exercise,
        work,
        student or SESSION.name,
        SESSION.class_seed(),
        hint,
    )
    show(report)
    return report


def show(report: Report) -> None:
    """Show `report`: as a table in a notebook, as text elsewhere."""
    if _shell() is None:
        print(report.text())
    else:
        from IPython.display import display

        display({"text/plain": report.text(), "text/html": report.html()}, raw=True)


def _shell() -> object | None:
    # a notebook has imported IPython already; a process for checks should not have to
    ipython = sys.modules.get("IPython")
    return ipython and ipython.get_ipython()


def _history() -> list[str]:
    shell = _shell()
    if shell is None:
        raise InputError(
            "a running notebook",
            "a plain Python process",
            "run this in a notebook, or `slimlab check 01 my.ipynb` in a terminal",
        )
    return [*shell.history_manager.input_hist_raw, *SESSION.unrecorded]


def _remember(result: object) -> None:
    # nbval and some editors run cells that IPython's history leaves out
    info, place = result.info, result.execution_count
    if not info.store_history:
        SESSION.unrecorded.append(info.raw_cell)
        return
    if info.cell_id is not None:
        SESSION.cell_ids[place] = info.cell_id
    if not result.success:
        SESSION.failed.add(place)


def _not_run(number: str) -> Problem:
    saw = f"no cell with the first line `# exercise {number}` that has been run"
    look = "your cell: run it (after a restart again), then this one"
    return Problem(saw, "your work, run in this notebook", look)


if _shell() is not None:
    # after a cell, not before: the cell that imports this module has begun already
    _shell().events.register("post_run_cell", _remember)
