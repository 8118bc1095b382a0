"""Make the students' notebooks from the solutions.

    python tools/make_exercises.py            make exercises/*.ipynb from solutions/*.ipynb
    python tools/make_exercises.py --check    compare instead; exit code 1 if they differ

What lies between `### BEGIN SOLUTION` and `### END SOLUTION` becomes `# YOUR CODE HERE` and
`raise NotImplementedError()`, what lies between `### BEGIN HIDDEN TESTS` and
`### END HIDDEN TESTS` goes away, and so do outputs: the same as nbgrader does with the same source.
Cells that start with `# exercise 1.1` or `# check 1.1` first get nbgrader's metadata, in the
solutions too; the points come from the exercise's grader.
"""

import argparse
import copy
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nbformat  # noqa: E402

from slimlab.classroom.exercise import chapter_of, load_exercises  # noqa: E402
from slimlab.classroom.runner import read_notebook, write_notebook  # noqa: E402
from slimlab.classroom.submission import Cell, mark_of  # noqa: E402
from slimlab.config import InputError  # noqa: E402

CODE_STUB = ["# YOUR CODE HERE", "raise NotImplementedError()"]
TEXT_STUB = ["YOUR ANSWER HERE"]
CHECK_MARK = re.compile(r"#+\s*check\s+(\d{1,2}\.\d{1,2})\s*$", re.IGNORECASE)
SCORE_LINE = re.compile(r"""check\(["'](\d{1,2}\.\d{1,2})["'].*\)\.score$""")


def student_version(notebook):
    """Return a copy of `notebook` without solutions, hidden tests and outputs."""
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        stub = CODE_STUB if cell.cell_type == "code" else TEXT_STUB
        source = replace_regions(cell.source, "SOLUTION", stub, cell.id)
        cell.source = replace_regions(source, "HIDDEN TESTS", [], cell.id)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return made


def replace_regions(source: str, kind: str, stub: list[str], cell_id: str) -> str:
    """Replace each region of `kind` in `source` by `stub`, indented as its first marker is.

    Raises InputError naming `cell_id` and the line if markers are nested or one is missing.
    """
    kept, opened = [], None
    for number, line in enumerate(source.split("\n"), start=1):
        begins, ends = (f"### {edge} {kind}" in line for edge in ("BEGIN", "END"))
        if (begins and opened is not None) or (ends and opened is None):
            unbalanced(kind, line.strip(), cell_id, number)
        if begins:
            opened = number
            indent = line[: len(line) - len(line.lstrip())]
            kept += [indent + text for text in stub]
        elif ends:
            opened = None
        elif opened is None:
            kept.append(line)
    if opened is not None:
        unbalanced(kind, f"### BEGIN {kind} without an end", cell_id, opened)
    return "\n".join(kept)


def unbalanced(kind: str, text: str, cell_id: str, number: int):
    raise InputError(
        f"pairs of ### BEGIN {kind} and ### END {kind}",
        f"{text!r} in line {number} of cell {cell_id!r}",
        "put each pair around one body, in one cell",
    )


def annotate(notebook, exercises: dict) -> None:
    """Give `notebook`'s marked cells nbgrader's metadata; points are those of `exercises`."""
    counts: dict[str, int] = {}
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)
        number = mark_of(Cell("", cell.source)) if cell.cell_type == "code" else None
        checked = CHECK_MARK.match(cell.source.split("\n")[0].strip())
        has_region = "### BEGIN SOLUTION" in cell.source
        if number:
            known(number, exercises, cell.id)
            counts[number] = counts.get(number, 0) + 1
            suffix = f"-{counts[number]}" if counts[number] > 1 else ""
            name = f"ex-{number.replace('.', '-')}{suffix}"
            cell.metadata["nbgrader"] = metadata(name, solution=True)
        elif checked and cell.cell_type == "code":
            points = known(checked[1], exercises, cell.id).max_score
            last = SCORE_LINE.search(cell.source.rstrip())
            if not last or last[1] != checked[1]:
                wanted = f'check("{checked[1]}").score'
                last_line = cell.source.rstrip().split("\n")[-1]
                change = "end it so: nbgrader reads that number as partial credit"
                raise InputError(f"a check cell that ends in {wanted}", repr(last_line), change)
            name = f"check-{checked[1].replace('.', '-')}"
            cell.metadata["nbgrader"] = metadata(name, locked=True, grade=True, points=points)
        elif has_region and cell.cell_type == "markdown":
            cell.metadata["nbgrader"] = metadata(
                f"open-{cell.id}", solution=True, grade=True, points=0
            )
        elif has_region:
            change = "start the cell with the line `# exercise 1.1`"
            raise InputError("a solution in a marked cell", f"cell {cell.id!r} has no mark", change)


def metadata(grade_id: str, *, solution=False, locked=False, grade=False, points=None) -> dict:
    """Return nbgrader's cell metadata, schema 3, for a cell called `grade_id`."""
    extra = {} if points is None else {"points": points}
    return {
        "grade": grade,
        "grade_id": grade_id,
        "locked": locked,
        **extra,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }


def known(number: str, exercises: dict, cell_id: str):
    if number not in exercises:
        there = ", ".join(exercises) or "none"
        raise InputError(
            "an exercise that has a grader",
            f"{number} in cell {cell_id!r}; graders exist for {there}",
            f"write it in slimlab/classroom/checks/ch{chapter_of(number)}.py, or mend the mark",
        )
    return exercises[number]


def make(path: Path, target: Path, exercises: dict, compare_only: bool = False) -> list[str]:
    """Bring `target` up to date with the solutions in `path`; return what differed."""
    notebook = read_notebook(path)
    annotated = copy.deepcopy(notebook)
    annotate(annotated, exercises)
    made = student_version(annotated)
    nbformat.validate(made)
    different = []
    if annotated != notebook:
        different.append(f"{path}: nbgrader's metadata")
        if not compare_only:
            write_notebook(annotated, path)
    if not target.is_file() or read_notebook(target) != made:
        different.append(f"{target}: not what {path.name} gives")
        if not compare_only:
            write_notebook(made, target)
    return different


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that holds solutions/")
    parser.add_argument("--checks", type=Path, help="a grader module of your own")
    given = parser.parse_args(arguments)
    solutions = sorted((given.root / "solutions").glob("*.ipynb"))
    wanted = {path.name for path in solutions}
    different = [
        f"{path}: has no solutions"
        for path in sorted((given.root / "exercises").glob("*.ipynb"))
        if path.name not in wanted
    ]
    try:
        for path in solutions:
            exercises = load_exercises(given.checks or path.stem[:2])
            target = given.root / "exercises" / path.name
            different += make(path, target, exercises, given.check)
    except InputError as error:
        print(f"{path}\n{error}", file=sys.stderr)
        return 2
    for line in different:
        print(line if given.check else f"made: {line}")
    print(f"{len(solutions)} solutions, {len(different)} differences")
    return 1 if given.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
