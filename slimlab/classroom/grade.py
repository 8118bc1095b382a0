"""Grade a folder of submissions: a table of scores and a page per student.

Every submission runs exercise by exercise in processes with limits, so one that hangs costs its own
deadlines and no more, and one that cannot be read gets a row that says why. Nothing is written
before everything is graded. The command `slimlab grade` calls it; the README's section on classes
shows it. Production systems (nbgrader) keep a database, and feedback by hand; this does not.
The limits are not a sandbox: grade work that you do not trust in a container.
"""

import csv
import math
import queue
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slimlab.classroom.exercise import chapter_of, load_exercises, plain_name
from slimlab.classroom.process import Keeper
from slimlab.classroom.report import Report
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
class Handed:
    """One submission.

    student  the name, from the file's or the folder's name
    path     the notebook, or None if the folder holds none
    time     when it was handed in
    """

    student: str
    path: Path | None
    time: datetime


@dataclass(frozen=True)
class Row:
    """One line of scores.csv; `late` counts days begun after the deadline."""

    student: str
    chapter: str
    exercise: str
    points: float
    max: int
    late: int
    message: str


@dataclass(frozen=True)
class Graded:
    """What grading one submission gave: its `rows`, and the `reports` for the student's page."""

    handed: Handed
    rows: tuple[Row, ...]
    reports: tuple[Report, ...] = ()


def find_submissions(folder: Path, out: Path, times: dict[str, datetime]) -> list[Handed]:
    """Return the submissions in `folder`: its notebooks, and those of one folder per student.

    folder  what was collected
    out     left out, where it lies inside `folder`
    times   hand-in times by plain name; others are the files' times of change

    Raises InputError if there is none.
    """
    require(folder.is_dir(), "a folder of submissions", f"{folder}", "check the path")
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.resolve() == out.resolve():
            continue
        if entry.is_dir():
            inside = sorted(entry.rglob("*.ipynb"))
            inside = [path for path in inside if ".ipynb_checkpoints" not in path.parts]
            found += [(entry.name, path) for path in inside or [None]]
        elif entry.suffix == ".ipynb":
            found.append((re.sub(r"[_\- ]+\d{2}([_\- ].*)?$", "", entry.stem), entry))
    require(
        len(found) > 0, "notebooks (.ipynb) or a folder per student", f"none in {folder}",
        "collect the notebooks there first",
    )  # fmt: skip
    handed = []
    for name, path in found:
        student = re.sub(r"[_\s]+", " ", name).strip()
        changed = datetime.fromtimestamp((path or folder).stat().st_mtime).astimezone()
        handed.append(Handed(student, path, times.get(plain_name(student), changed)))
    return handed


def read_times(path: Path) -> dict[str, datetime]:
    """Return hand-in times by plain name from a CSV file with columns student and submitted.

    path  the file; times in ISO form, without a zone they are local

    Raises InputError for a missing column or a time that cannot be read.
    """
    require(path.is_file(), "a CSV file of hand-in times", f"{path}", "check the path")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    times = {}
    for number, row in enumerate(rows, start=2):
        if not row.get("student") or not row.get("submitted"):
            given = f"line {number} of {path.name}: {dict(row)}"
            raise InputError("columns student and submitted", given, "fill in both")
        times[plain_name(row["student"])] = read_time(row["submitted"])
    return times


def read_time(text: str) -> datetime:
    """Return the time that `text` says in ISO form, local if it names no zone."""
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except ValueError:
        raise InputError(
            "a time in ISO form", repr(text), "write it like 2027-01-31T23:59"
        ) from None


def days_late(time: datetime, deadline: datetime | None) -> int:
    """Return how many days had begun between `deadline` and `time`; 0 if it was in time."""
    if deadline is None:
        return 0
    return max(0, math.ceil((time - deadline).total_seconds() / 86_400))


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
            rows.append(Row(*place, points, report.max_score, late, message))
        return Graded(handed, tuple(rows), tuple(reports))
    except InputError as error:
        message = f"{error.given}; {error.change}"
    except Exception as error:
        # One submission that the grader cannot handle must not cost the others their grades.
        message = f"the grader failed: {type(error).__name__}: {error}"
    most = max_points(rules.chapter)
    return Graded(handed, (Row(handed.student, rules.chapter or "", "", 0, most, late, message),))


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
