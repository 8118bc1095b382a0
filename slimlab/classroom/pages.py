"""Write a class's results: scores.csv, totals.csv and one self-contained page per student.

Everything a student wrote is escaped; a page needs no network. Files are written under a temporary
name and then put in place, so a reader never meets half of one. The README's section on classes
shows them. Production systems write into a gradebook instead.
"""

import csv
import io
import re
import tempfile
from dataclasses import astuple, fields
from html import escape
from pathlib import Path

from slimlab.classroom.exercise import plain_name
from slimlab.classroom.grade import Graded, Row
from slimlab.config import InputError
from slimlab.text.files import write_atomically

NOT_A_SANDBOX = "Checked in processes with limits of time, memory and output. Not a sandbox."
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
td,th{{text-align:left;padding:.1em .7em;vertical-align:top}}
pre{{background:#f4f4f4;padding:.5em;overflow:auto}}</style></head>
<body><h1>{title}</h1>{body}<p><small>{foot}</small></p></body></html>
"""


def write_results(results: list[Graded], out: Path) -> list[Path]:
    """Write all files of a graded class and return their paths.

    results  what grade_class returned
    out      the folder, made if it is not there
    """
    rows = [row for graded in results for row in graded.rows]
    texts = {"scores.csv": scores(rows), "totals.csv": totals(rows)}
    for student, own in by_student(results).items():
        texts[f"{page_name(student, texts)}.html"] = page(student, own)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in texts]


def prepare(out: Path) -> None:
    """Make the folder `out`; raise InputError if nothing can be written there.

    out  where results will go; better known before a class is graded than after
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        given = f"{out}: {error.strerror or error}"
        raise InputError("a folder for the results", given, "choose another with --out") from None


def scores(rows: list[Row]) -> str:
    """Return scores.csv: one line per student and exercise of `rows`."""
    return _csv([one.name for one in fields(Row)], [astuple(row) for row in rows])


def totals(rows: list[Row]) -> str:
    """Return totals.csv: one line per student, chapter and file of `rows`."""
    sums: dict[tuple[str, str, str], list] = {}
    for row in rows:
        entry = sums.setdefault((row.student, row.chapter, row.file), [0.0, 0, 0])
        entry[0], entry[1] = round(entry[0] + row.points, 2), entry[1] + row.max
        entry[2] = max(entry[2], row.late)
    return _csv(
        ["student", "chapter", "points", "max", "late", "file"],
        [(*key[:2], *entry, key[2]) for key, entry in sums.items()],
    )


def by_student(results: list[Graded]) -> dict[str, list[Graded]]:
    """Return `results` grouped by student, in order."""
    found: dict[str, list[Graded]] = {}
    for graded in results:
        found.setdefault(graded.handed.student, []).append(graded)
    return found


def page(student: str, own: list[Graded]) -> str:
    """Return the page of one `student` from all that belongs to them, `own`."""
    rows = [row for graded in own for row in graded.rows]
    points, most = sum(row.points for row in rows), sum(row.max for row in rows)
    body = [f"<p><b>{points:g} of {most} points</b></p>"]
    for graded in own:
        name = graded.handed.path.name if graded.handed.path else "no notebook"
        when = graded.handed.time.isoformat(sep=" ", timespec="minutes")
        late = max(row.late for row in graded.rows) if graded.rows else 0
        days = f", {late} day{'s' * (late > 1)} late" if late else ""
        body.append(f"<h2>{escape(name)}</h2><p>handed in {escape(when)}{days}</p>")
        if not graded.reports:
            body += [f"<p>{escape(row.message)}</p>" for row in graded.rows]
        body += [report.html() for report in graded.reports]
    title = escape(f"slimlab: {student}")
    return PAGE.format(title=title, body="".join(body), foot=NOT_A_SANDBOX)


def page_name(student: str, taken: dict[str, str]) -> str:
    """Return a file name for `student` without ending that is not among the `taken` names."""
    name = re.sub(r"\W+", "-", plain_name(student)) or "student"
    # a file system takes 255 bytes, and the temporary name is longer
    name = name.encode("utf-8", errors="replace")[:150].decode(errors="ignore")
    number, unique = 1, name
    while f"{unique}.html" in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


def _csv(head: list[str], rows: list[tuple]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    for row in rows:
        writer.writerow([_safe(value) for value in row])
    # the mark lets spreadsheets read names in any script
    return "\ufeff" + text.getvalue()


def _safe(value: object) -> object:
    # a spreadsheet would run a text that begins like a formula
    text = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t")
    return f"'{value}" if text else value
