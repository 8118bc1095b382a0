"""What a check gives back: points by property, what was seen, and where to look.

Used by every exercise. Texts are the same at every run, so that notebooks that hold them can be
compared and tests can store them. Production graders (nbgrader, otter) show tracebacks instead.
"""

from dataclasses import dataclass, field
from html import escape

from slimlab.classroom.exercise import Exercise
from slimlab.config import InputError

STYLE = "text-align:left;padding:2px 10px;vertical-align:top"


@dataclass(frozen=True)
class Problem:
    """Why something earned no points.

    saw       what the student's work gave
    expected  what was expected
    look      where to look
    """

    saw: str
    expected: str
    look: str

    def __str__(self):
        return f"saw: {self.saw}\nexpected: {self.expected}\nlook at: {self.look}"


@dataclass(frozen=True)
class Outcome:
    """What became of one property.

    name        the property
    points      what it earned
    max_points  what it can earn
    kind        "passed", "failed" (its check), "raised" (an error in the student's code), "stopped"
                (a limit, or the process ended) or "not run"
    problem     why, unless it passed
    """

    name: str
    points: int
    max_points: int
    kind: str
    problem: Problem | None = None

    def message(self) -> str:
        """Return the property's name and its problem, the text stored beside a wrong answer."""
        return self.name if self.problem is None else f"{self.name}\n{self.problem}"


@dataclass(frozen=True)
class Report:
    """The result of checking one exercise.

    exercise  what was checked
    outcomes  one per property, in order
    problem   why nothing could be checked, or None
    printed   what the student's code printed, at most its first lines
    notes     remarks, such as which numbers were used
    hint      how many hints to show, 0 for none; only the last of them is shown
    """

    exercise: Exercise
    outcomes: tuple[Outcome, ...]
    problem: Problem | None = None
    printed: str = ""
    notes: tuple[str, ...] = ()
    hint: int = field(default=0, compare=False)

    def __post_init__(self):
        check_hint(self.exercise, self.hint)

    @property
    def score(self) -> int:
        """The points earned."""
        return sum(outcome.points for outcome in self.outcomes)

    @property
    def max_score(self) -> int:
        """The points there are."""
        return sum(outcome.max_points for outcome in self.outcomes)

    def first_message(self) -> str:
        """Return the first thing that went wrong, or nothing if all is well."""
        if self.problem is not None:
            return str(self.problem)
        failed = [outcome for outcome in self.outcomes if outcome.kind != "passed"]
        return failed[0].message() if failed else ""

    def heading(self) -> str:
        """Return number, title, stars and score in one line."""
        stars = "★" * self.exercise.stars
        of = f"{self.score} of {self.max_score} points"
        return f"Exercise {self.exercise.number}  {self.exercise.title}  {stars}  {of}"

    def __repr__(self):
        return f"<exercise {self.exercise.number}: {self.score} of {self.max_score} points>"

    def text(self) -> str:
        """Return the whole report as plain text."""
        lines = [self.heading()]
        if self.problem is not None:
            lines += ["✗ nothing could be checked", *_indented(str(self.problem))]
        else:
            before = None
            for outcome in self.outcomes:
                mark = "✓" if outcome.kind == "passed" else "✗"
                lines.append(f"{mark} {outcome.points}/{outcome.max_points}  {outcome.name}")
                if outcome.problem:
                    same = outcome.problem == before
                    lines += _indented("the same as above" if same else str(outcome.problem))
                before = outcome.problem
        if self.printed:
            lines += ["your code printed:", *_indented(self.printed)]
        return "\n".join([*lines, *self.notes, *self.hint_lines()])

    def hint_lines(self) -> list[str]:
        """Return the hint that was asked for, and how to ask for the next one."""
        lines = []
        if self.hint:
            lines.append(f"hint {self.hint}: {self.exercise.hints[self.hint - 1]}")
        if self.score < self.max_score and self.hint < len(self.exercise.hints):
            lines.append(f'a hint waits: check("{self.exercise.number}", hint={self.hint + 1})')
        return lines

    def html(self) -> str:
        """Return the report as a piece of HTML without scripts; everything in it is escaped."""
        rows = []
        if self.problem is not None:
            rows.append(_row("✗", "", "nothing could be checked", self.problem))
        else:
            for outcome in self.outcomes:
                mark = "✓" if outcome.kind == "passed" else "✗"
                points = f"{outcome.points}/{outcome.max_points}"
                rows.append(_row(mark, points, outcome.name, outcome.problem))
        parts = [f"<p><b>{escape(self.heading())}</b></p>", f"<table>{''.join(rows)}</table>"]
        if self.printed:
            shown = f"<summary>your code printed</summary><pre>{escape(self.printed)}</pre>"
            parts.append(f"<details>{shown}</details>")
        parts += [f"<p>{escape(line)}</p>" for line in [*self.notes, *self.hint_lines()]]
        return "".join(parts)


def check_hint(exercise: Exercise, hint: int) -> None:
    """Raise InputError unless `exercise` has a hint number `hint`; 0 is none and always there."""
    count = len(exercise.hints)
    if not 0 <= hint <= count:
        there = f"choose hint=1 to hint={count}" if count else "this exercise has none"
        raise InputError("a hint that exists", f"hint={hint}", there)


def nothing_checked(exercise: Exercise, problem: Problem, hint: int = 0) -> Report:
    """Return the report of an exercise that could not be checked at all.

    exercise  the exercise
    problem   why
    hint      how many hints to show
    """
    outcomes = tuple(Outcome(one.name, 0, one.points, "not run") for one in exercise.properties)
    return Report(exercise, outcomes, problem, hint=hint)


def _indented(text: str) -> list[str]:
    return [f"       {line}" for line in text.splitlines()]


def _row(mark: str, points: str, name: str, problem: Problem | None) -> str:
    why = "" if problem is None else escape(str(problem)).replace("\n", "<br>")
    cells = (mark, points, escape(name), why)
    return "<tr>" + "".join(f'<td style="{STYLE}">{cell}</td>' for cell in cells) + "</tr>"
