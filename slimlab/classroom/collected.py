"""What a class has handed in: a folder's notebooks, whose they are, when they came.

A folder as it comes from a course platform or a zip file: names with anything in them, copies that
macOS or Jupyter put beside the work, links that lead nowhere. slimlab.classroom.grade grades what
is found here; the README's section on classes shows it. Course platforms know their students by
number and the time of every upload; this knows names of files.
"""

import csv
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from slimlab.classroom.exercise import load_exercises, plain_name
from slimlab.config import InputError, require


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

    @property
    def file(self) -> str:
        """The notebook's name with that of its folder."""
        return f"{self.path.parent.name}/{self.path.name}" if self.path else ""


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
        earlier = (entry / "scores.csv").is_file()  # results of a run with another --out
        if earlier or entry.resolve() == out.resolve() or not _is_handed_in(entry, folder):
            continue
        if entry.is_dir():
            inside = [path for path in sorted(entry.rglob("*")) if _is_notebook(path)]
            inside = [path for path in inside if _is_handed_in(path, folder)]
            found += [(entry.name, path) for path in inside or [None]]
        elif _is_notebook(entry):
            found.append((_name_in(entry.stem), entry))
    require(
        len(found) > 0, "notebooks (.ipynb) or a folder per student", f"none in {folder}",
        "collect the notebooks there first",
    )  # fmt: skip
    handed = []
    for name, path in found:
        student = re.sub(r"[_\s]+", " ", name).strip()
        there = path if path is not None and path.exists() else folder
        changed = datetime.fromtimestamp(there.stat().st_mtime).astimezone()
        handed.append(Handed(student, path, times.get(plain_name(student), changed)))
    return handed


def _name_in(stem: str) -> str:
    """Return the student in the name of a file: what stands before the chapter's number."""
    numbers = list(re.finditer(r"[_\- ]+(\d{2})(?=[_\- ]|$)", stem))
    # in student_17_01 the last number is the chapter's; a day at the end is no chapter
    chapters = [one for one in numbers if load_exercises(one[1])]
    return stem[: (chapters or numbers)[-1].start()] if numbers else stem


def _is_notebook(path: Path) -> bool:
    return path.suffix.lower() == ".ipynb" and not path.is_dir()


def _is_handed_in(path: Path, folder: Path) -> bool:
    # macOS puts __MACOSX and ._NAME into zip files, Jupyter keeps .ipynb_checkpoints
    inside = path.relative_to(folder).parts
    return not any(part.startswith((".", "__")) for part in inside)


def read_times(path: Path) -> dict[str, datetime]:
    """Return hand-in times by plain name from a CSV file with columns student and submitted.

    path  the file; times in ISO form, without a zone they are local

    Raises InputError for a missing column or a time that cannot be read.
    """
    require(path.is_file(), "a CSV file of hand-in times", f"{path}", "check the path")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("UTF-8 text", f"{path.name}: {error}", "save it as CSV UTF-8") from None
    # spreadsheets write semicolons where numbers have a comma
    separator = ";" if lines and ";" in lines[0] else ","
    rows = list(csv.DictReader(lines, delimiter=separator))
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


def read_deadline(text: str) -> datetime:
    """Return the deadline that `text` says; a day without a time ends when the day ends."""
    only_day = re.fullmatch(r"\d{4}-?\d\d-?\d\d", text.strip())
    return read_time(f"{text.strip()}T23:59:59.999999" if only_day else text)


def days_late(time: datetime, deadline: datetime | None) -> int:
    """Return how many days had begun between `deadline` and `time`; 0 if it was in time."""
    if deadline is None:
        return 0
    return max(0, math.ceil((time - deadline).total_seconds() / 86_400))
