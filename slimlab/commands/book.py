"""`slimlab doctor`, `list` and `run`: the machine, the chapters, a chapter from top to bottom.

Chapter 00 uses them. Production notebooks are run by schedulers with parameters (papermill).
"""

import json
import re
import sys
from pathlib import Path

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool):
    """Say what this machine has; for each problem the line that mends it.

    \b
    Exit code 1 if something that the book needs is missing.
    Examples:
      slimlab doctor
      slimlab doctor --json > machine.json
    \f

    as_json  print JSON
    """
    from slimlab.doctor import examine, is_healthy, table

    findings = examine()
    if as_json:
        click.echo(json.dumps([vars(one) for one in findings], indent=2))
    else:
        click.echo(table(findings))
    sys.exit(0 if is_healthy(findings) else 1)


@click.command(name="list")
def list_chapters():
    """List chapters, and their exercises with stars and points.

    \b
    Example:
      slimlab list
    """
    from slimlab.classroom.exercise import load_exercises
    from slimlab.classroom.runner import find_root

    root = find_root()
    for path in sorted((root / "chapters").glob("*.ipynb")):
        click.echo(f"{path.stem:<34} {title_of(path)}")
        for number, exercise in load_exercises(path.stem[:2]).items():
            stars = "★" * exercise.stars
            click.echo(f"    {number:<5} {exercise.title}  {stars}  {exercise.max_score} points")


@click.command()
@click.argument("chapters", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), help="Where the executed copies go.")
def run(chapters: tuple[str, ...], out: Path | None):
    """Run CHAPTERS (all of them without one) from top to bottom and keep executed copies.

    \b
    Examples:
      slimlab run 01
      slimlab run 00 01_attention --out mine/
    \f

    chapters  numbers or names
    out       folder of the executed copies
    """
    from slimlab.classroom.runner import find_root, run_chapters

    root = find_root()
    out = out or root / "build" / "run"
    reports = run_chapters(chapters, out, root)
    click.echo(f"executed copies: {out}")
    sys.exit(1 if any(report.failure for report in reports) else 0)


def title_of(path: Path) -> str:
    """Return the first heading of the notebook at `path`, or nothing."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(one["source"]) for one in cells if one["cell_type"] == "markdown")
    except (ValueError, KeyError, TypeError):
        return "(not a notebook)"
    found = re.search(r"^#\s+(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
