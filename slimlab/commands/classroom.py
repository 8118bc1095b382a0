"""`slimlab check`, `grade` and `handout`: one's own notebook, a class, a copy of the book.

Chapter 00 uses `check`. Production graders (nbgrader, Otter) keep a database and run containers.
"""

import re
import sys
from pathlib import Path

import click

from slimlab.config import InputError, require


@click.command()
@click.argument("chapter")
@click.argument("notebook", type=click.Path(path_type=Path))
@click.option("--exercise", "only", metavar="N.M", help="Only this exercise.")
@click.option("--hint", type=int, default=0, help="Show this hint too (with --exercise).")
@click.option("--student", help="Whose numbers to use; default: the notebook's student(...).")
@click.option("--seed", type=int, default=None, help="The class's seed; default: classroom.toml.")
def check(
    chapter: str, notebook: Path, only: str | None, hint: int, student: str | None, seed: int | None
):
    """Check the exercises of CHAPTER in NOTEBOOK, cell by marked cell.

    \b
    The cells run in processes with limits of time, memory and output: not a sandbox.
    Exit code 0 with all points, 1 otherwise.
    Examples:
      slimlab check 02 my.ipynb
      slimlab check 01 my.ipynb --exercise 1.2 --hint 1
    \f

    chapter   number or name, or the number of one exercise
    notebook  an .ipynb or a .py in percent format
    only      one exercise, "1.2"
    hint      which hint to show
    student   whose numbers to use
    seed      the class's seed
    """
    from slimlab.classroom.exercise import exercises_of
    from slimlab.classroom.process import Keeper
    from slimlab.classroom.session import SESSION
    from slimlab.classroom.submission import collect, read_cells, student_named

    exercises = exercises_of(chapter)
    only = only or (chapter if re.fullmatch(r"\d+\.\d+", chapter) else None)
    if only is not None:
        if only not in exercises:
            there = ", ".join(exercises)
            raise InputError("an exercise of this chapter", repr(only), f"choose from: {there}")
        exercises = {only: exercises[only]}
    cells = read_cells(notebook)
    name = student or student_named(cells)
    seed = SESSION.class_seed() if seed is None else seed
    score = most = 0
    with Keeper() as keeper:
        for number, exercise in exercises.items():
            report = keeper.check(exercise, collect(cells, number), name, seed, hint)
            click.echo(report.text() + "\n")
            score, most = score + report.score, most + report.max_score
    click.echo(f"{score} of {most} points")
    sys.exit(0 if score == most else 1)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--chapter", help="Only this chapter; default: what each notebook holds.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: FOLDER/scores.")
@click.option("--seed", type=int, help="Draw every student's numbers from name and this seed.")
@click.option("--deadline", help="2027-01-31T23:59, or a day, to its end.")
@click.option("--late-penalty", type=float, help="Part of the points lost per day begun: 0.1.")
@click.option(
    "--submitted",
    type=click.Path(path_type=Path),
    help="CSV with columns student, submitted; default: the files' times.",
)
@click.option("--jobs", type=int, default=2, show_default=True, help="Graded at a time.")
def grade(folder: Path, out: Path | None, submitted: Path | None, jobs: int, **given):
    """Grade every notebook in FOLDER, or in one folder per student inside it.

    \b
    Writes scores.csv, totals.csv and a page per student. A file classroom.toml in FOLDER may hold
    seed, deadline and late_penalty. Students' code runs in processes with limits of time, memory
    and output: not a sandbox. Grade work that you do not trust in a container.
    Examples:
      slimlab grade submissions/
      slimlab grade submissions/ --chapter 01 --deadline 2027-01-31T23:59 --late-penalty 0.1
    \f

    folder     what was collected
    out        folder of the results
    submitted  CSV of hand-in times
    jobs       graded at a time
    given      chapter, seed, deadline and late_penalty, where they were given
    """
    from tqdm import tqdm

    from slimlab.classroom.collected import find_submissions, read_times
    from slimlab.classroom.grade import class_rules, grade_class, handed_in_twice
    from slimlab.classroom.pages import NOT_A_SANDBOX, prepare, write_results

    out = out or folder / "scores"
    rules = class_rules(folder, given)
    submissions = find_submissions(folder, out, read_times(submitted) if submitted else {})
    require(jobs >= 1, "at least one job", f"jobs = {jobs}", "give 1 or more")
    prepare(out)
    bar = {"total": len(submissions), "unit": "notebook", "desc": "grading", "disable": None}
    results = grade_class(submissions, rules, jobs, lambda items: tqdm(items, **bar))
    for graded in results:
        points, most = (sum(getattr(row, k) for row in graded.rows) for k in ("points", "max"))
        trouble = "" if graded.reports else f"  {graded.rows[0].message}"
        click.echo(f"{graded.handed.student:<28} {points:6g} of {most}{trouble}")
    for line in handed_in_twice(results):
        click.echo(line)
    write_results(results, out)
    click.echo(f"{len(results)} notebooks: {out / 'scores.csv'}, totals.csv and pages")
    click.echo(NOT_A_SANDBOX)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--solutions", help="Chapters whose solutions are switched on: 01,02. '' for none.")
@click.option("--seed", type=int, help="The class's seed, written into classroom.toml.")
def handout(folder: Path, solutions: str | None, seed: int | None):
    """Make a student's copy of the book in FOLDER; again to switch solutions on.

    \b
    Exercises that lie there already are never overwritten.
    Examples:
      slimlab handout class/ --seed 2027
      slimlab handout class/ --solutions 01,02
    \f

    folder     where the copy goes
    solutions  chapters, separated by commas
    seed       the class's seed
    """
    from slimlab.classroom.handout import make_handout
    from slimlab.classroom.runner import find_root

    wanted = None
    if solutions is not None:
        parts = [part.strip() for part in solutions.split(",") if part.strip()]
        wanted = tuple(part.zfill(2) for part in parts)
    made = make_handout(find_root(), folder, wanted, seed)
    shown = ", ".join(made.solutions) or "none"
    click.echo(f"{made.folder}: {made.num_files} notebooks, solutions of: {shown}")
    for name in made.kept:
        click.echo(f"kept as it was: exercises/{name}")
