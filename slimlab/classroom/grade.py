"""Grade a folder of submissions: a table of scores and a page per student.

Every submission runs exercise by exercise in processes with limits, so one that hangs costs its own
deadlines and no more, and one that cannot be read gets a row that says why. Nothing is written
before everything is graded. The command `slimlab grade` calls it; the README's section on classes
shows it. Production systems (nbgrader) keep a database, and feedback by hand; this does not.
The limits are not a sandbox: grade work that you do not trust in a container.
"""

import queue
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slimlab.classroom.collected import Handed, days_late, read_deadline
from slimlab.classroom.exercise import chapter_of, exercises_of, load_exercises, plain_name
from slimlab.classroom.process import Keeper
from slimlab.classroom.report import Report
from slimlab.classroom.session import read_settings
from slimlab.classroom.submission import Cell, collect, mark_of, read_cells, student_named
from slimlab.config import InputError, require


@dataclass(frozen=True)
class Rules:
    """How a class is graded.

    chapter       only this chapter, "01"; None grades what each notebook holds
    seed          numbers are drawn from name and seed; None: only where a notebook calls student()
    deadline      when work was due; None for never
    late_penalty  part of the points lost for every day begun, 0.1 for a tenth
    """

    chapter: str | None = None
    seed: int | None = None
    deadline: datetime | None = None
    late_penalty: float = 0.0

    def __post_init__(self):
        inside = 0 <= self.late_penalty <= 1
        require(inside, "a penalty from 0 to 1", f"{self.late_penalty}", "write 0.1 for a tenth")


@dataclass(frozen=True)
class Row:
    """One line of scores.csv; `late` counts days begun after the deadline, `file` is the work."""

    student: str
    chapter: str
    exercise: str
    points: float
    max: int
    late: int
    message: str
    file: str = ""


@dataclass(frozen=True)
class Graded:
    """What grading one submission gave: its `rows`, and the `reports` for the student's page."""

    handed: Handed
    rows: tuple[Row, ...]
    reports: tuple[Report, ...] = ()


def class_rules(folder: Path, given: dict) -> Rules:
    """Return the rules of grading.

    folder  may hold a classroom.toml
    given   chapter, seed, deadline and late_penalty, None where they were not given
    """
    settings = read_settings(folder / "classroom.toml")
    settings |= {key: value for key, value in given.items() if value is not None}
    chapter, deadline = settings.get("chapter"), settings.get("deadline")
    if chapter is not None:
        chapter = next(iter(exercises_of(chapter).values())).chapter
    return Rules(
        chapter,
        settings.get("seed"),
        None if deadline is None else read_deadline(str(deadline)),
        settings.get("late_penalty", 0.0),
    )


def grade_class(
    submissions: list[Handed],
    rules: Rules,
    jobs: int = 2,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Graded]:
    """Grade every submission and return the results in the same order.

    submissions  what was handed in
    rules        chapter, seed, deadline, penalty
    jobs         how many are graded at a time
    progress     wraps the iterable of finished submissions, for a progress bar
    """
    require(jobs >= 1, "at least one job", f"jobs = {jobs}", "give 1 or more")
    idle: queue.Queue[Keeper] = queue.Queue()
    keepers = [Keeper() for _ in range(min(jobs, len(submissions)))]
    for keeper in keepers:
        idle.put(keeper)

    def one(place: int) -> tuple[int, Graded]:
        keeper = idle.get()
        try:
            return place, grade_submission(submissions[place], rules, keeper)
        finally:
            idle.put(keeper)

    results: dict[int, Graded] = {}
    try:
        with ThreadPoolExecutor(len(keepers)) as pool:
            waiting = [pool.submit(one, place) for place in range(len(submissions))]
            try:
                for done in progress(as_completed(waiting)):
                    place, graded = done.result()
                    results[place] = graded
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for keeper in keepers:
                    keeper.abort()
                raise
    finally:
        for keeper in keepers:
            keeper.close()
    return [results[place] for place in range(len(submissions))]


def grade_submission(handed: Handed, rules: Rules, keeper: Keeper) -> Graded:
    """Grade one submission; whatever is wrong with it becomes a row with a message.

    handed  the submission
    rules   chapter, seed, deadline, penalty
    keeper  runs the checks
    """
    late = days_late(handed.time, rules.deadline)
    try:
        require(handed.path is not None, "a notebook", "a folder without one", "hand one in")
        cells = read_cells(handed.path)
        chapters = chapters_in(cells, handed.path, rules.chapter)
        name, seed, remark = whose_numbers(handed.student, cells, rules.seed)
        rows, reports = [], []
        for number, exercise in [e for c in chapters for e in load_exercises(c).items()]:
            report = keeper.check(exercise, collect(cells, number), name, seed)
            reports.append(report)
            factor = max(0.0, 1.0 - rules.late_penalty * late)
            why = report.first_message().splitlines()
            message = " / ".join([*remark, *why] if exercise.instance else why)
            points = round(report.score * factor, 2)
            place = (handed.student, exercise.chapter, number)
            rows.append(Row(*place, points, report.max_score, late, message, handed.file))
        return Graded(handed, tuple(rows), tuple(reports))
    except InputError as error:
        message = f"{error.given}; {error.change}"
    except Exception as error:
        # One submission that the grader cannot handle must not cost the others their grades.
        message = f"the grader failed: {type(error).__name__}: {error}"
    place, most = (handed.student, rules.chapter or "", ""), max_points(rules.chapter)
    return Graded(handed, (Row(*place, 0, most, late, message, handed.file),))


def handed_in_twice(results: list[Graded]) -> list[str]:
    """Return a line for each student and chapter with more than one file among `results`.

    results  what grade_class returned
    """
    files: dict[tuple[str, str], list[str]] = {}
    for row in [row for graded in results for row in graded.rows if row.chapter]:
        known = files.setdefault((plain_name(row.student), row.chapter), [])
        known += [row.file] if row.file not in known else []
    return [
        f"{name} has handed in chapter {chapter} {len(known)} times, or there are two of that "
        f"name: {', '.join(known)}"
        for (name, chapter), known in files.items()
        if len(known) > 1
    ]


def chapters_in(cells: list[Cell], path: Path, chapter: str | None) -> list[str]:
    """Return the chapters to grade: `chapter`, or those of the marks, or that of the file's name.

    cells    the notebook's cells
    path     its path
    chapter  the one asked for, or None

    Raises InputError if nothing says which.
    """
    marks = sorted({chapter_of(number) for number in map(mark_of, cells) if number})
    named = re.search(r"(?<!\d)(\d{2})(?!\d)", path.stem)
    chapters = [chapter] if chapter else marks or ([named[1]] if named else [])
    require(
        any(load_exercises(one) for one in chapters),
        "a notebook with cells marked `# exercise 1.1`",
        f"{path.name} with {len(cells)} code cells, none of them marked",
        "hand in the notebook from exercises/, or say --chapter",
    )
    return chapters


def whose_numbers(
    student: str, cells: list[Cell], seed: int | None
) -> tuple[str | None, int, list[str]]:
    """Return name and seed to draw numbers from, and remarks about the name in the notebook.

    student  the name from the file's name, which counts
    cells    the notebook's cells, which may call student("...")
    seed     the class's seed, or None
    """
    said = student_named(cells)
    if said is None:
        remark = ["the notebook does not call student(...)"] if seed is not None else []
        return (student if seed is not None else None), seed or 0, remark
    same = plain_name(said) == plain_name(student)
    remark = [] if same else [f"the notebook says student({said!r}), the file {student!r}"]
    return student, seed or 0, remark


def max_points(chapter: str | None) -> int:
    """Return the points of `chapter`, 0 for None."""
    return sum(one.max_score for one in load_exercises(chapter).values()) if chapter else 0
