"""An exercise: what a student must write, and the properties that earn its points.

Every chapter with exercises has a grader module `slimlab/classroom/checks/chNN.py`. It is loaded
when one of its exercises is asked for, and every `Exercise` that stands at its top level counts:

    from slimlab.classroom.exercise import Exercise
    from slimlab.classroom.grading import expect_close, expect_equal

    window = Exercise(
        "1.1",
        "Attention inside a window",
        requires=("window_mask",),
        stars=2,
        hints=("Which keys may query 0 see?", "Compare the two indices by subtraction."),
        instance=lambda rng: {"T": rng.randint(5, 9), "width": rng.randint(2, 4)},
    )

    @window.property("the shape is right", points=1)
    def _(student, numbers):
        mask = student.window_mask(numbers["T"], numbers["width"])
        expect_equal(tuple(mask.shape), (numbers["T"], numbers["T"]), "the shape", "its two sizes")

`student.name` is what the student's cells define; a name that is missing fails the property with a
message. `numbers` is the dictionary that `instance` drew from the student's name and the seed of
the class (`instance=None` gives an empty one). A property passes when its function returns; it
fails by `CheckFailed(saw, expected, look)`, which the `expect_...` helpers of
`slimlab.classroom.grading` raise. An error inside the student's code fails it too, and names the
line. Give properties in the order of their importance: the first failing one is the message that
the student reads first, and the one that tests/answers stores beside each wrong answer.

The notebook side, in solutions/NN_name.ipynb: the student's cell starts with the mark
`# exercise 1.1` and holds `### BEGIN SOLUTION` and `### END SOLUTION`; the check cell starts with
`# check 1.1` and ends with `check("1.1").score`. tools/make_exercises.py makes exercises/ from it.

Production graders (nbgrader, otter) run a whole notebook; these run the marked cells alone, in a
process of their own with limits. Limits are not a sandbox.
"""

import hashlib
import importlib
import importlib.util
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from slimlab.config import InputError, require

CHECKS_PACKAGE = "slimlab.classroom.checks"
OWN_CHECKS = "SLIMLAB_CHECKS"


@dataclass(frozen=True)
class Property:
    """One thing that must hold, and what it is worth.

    name        a short sentence, shown to the student
    points      what it earns, a whole number
    deadline_s  wall-clock limit in seconds
    function    called with the student's names and the numbers; returns or raises CheckFailed
    """

    name: str
    points: int
    deadline_s: float
    function: Callable


class Exercise:
    """A task, its hints and its properties.

    number              chapter and place, "1.1"
    title               a few words
    requires            the names that the student's cells must define
    stars               1 to 3, how hard it is
    hints               shown one at a time on request
    instance            draws this student's numbers: instance(rng) -> dict, rng a random.Random
    load_deadline_s     limit for running the student's cells themselves, in seconds
    total_deadline_s    limit for everything together, in seconds
    memory_mib          resident memory allowed above the empty process, in MiB
    may_start_programs  whether the student's code may start other programs
    """

    def __init__(
        self,
        number: str,
        title: str,
        *,
        requires: tuple[str, ...],
        stars: int = 1,
        hints: tuple[str, ...] = (),
        instance: Callable[[random.Random], dict] | None = None,
        load_deadline_s: float = 10.0,
        total_deadline_s: float = 60.0,
        memory_mib: int = 1024,
        may_start_programs: bool = False,
    ):
        chapter_of(number)
        require(stars in (1, 2, 3), "1, 2 or 3 stars", f"{stars!r}", "choose one of them")
        require(
            not isinstance(requires, str) and len(requires) > 0,
            "the names that the student must define, as a tuple",
            f"requires = {requires!r}",
            'write requires=("name",)',
        )
        self.number, self.title, self.stars = number, title, stars
        self.requires, self.hints, self.instance = tuple(requires), tuple(hints), instance
        self.load_deadline_s, self.total_deadline_s = load_deadline_s, total_deadline_s
        self.memory_mib, self.may_start_programs = memory_mib, may_start_programs
        self.properties: list[Property] = []
        self.source = ""

    @property
    def chapter(self) -> str:
        """The chapter's two digits, "01" for exercise 1.1."""
        return chapter_of(self.number)

    @property
    def max_score(self) -> int:
        """The points of all properties together."""
        return sum(one.points for one in self.properties)

    def property(self, name: str, points: int = 1, deadline_s: float = 10.0) -> Callable:
        """Add the decorated function as the next property.

        name        a short sentence
        points      a whole number of at least 1
        deadline_s  seconds after which it is ended and fails
        """
        require(
            isinstance(points, int) and points >= 1,
            "a whole number of points, at least 1",
            f"points = {points!r} for {name!r}",
            "give whole points; weigh properties against each other instead of using fractions",
        )

        def add(function: Callable) -> Callable:
            self.properties.append(Property(name, points, deadline_s, function))
            return function

        return add

    def numbers_for(self, name: str | None, seed: int = 0) -> dict:
        """Draw the numbers of one student; the same name and seed always give the same.

        name  the student's name in any case and with any separators; None gives the book's numbers
        seed  the seed of the class
        """
        if self.instance is None:
            return {}
        key = f"{plain_name(name or '')}|{seed}|{self.number}"
        digest = hashlib.sha256(key.encode()).digest()
        return self.instance(random.Random(int.from_bytes(digest, "big")))


def chapter_of(number: str) -> str:
    """Return the two-digit chapter of an exercise's number, "01" for "1.1"."""
    found = re.fullmatch(r"(\d{1,2})\.(\d{1,2})", str(number))
    if not found:
        raise InputError("an exercise's number such as 1.1", f"{number!r}", "write chapter.place")
    return f"{int(found[1]):02d}"


def plain_name(name: str) -> str:
    """Return `name` in lower case with single spaces: Ada_Lovelace and "ada lovelace" are one."""
    return " ".join(re.split(r"[\W_]+", name.casefold())).strip()


def load_exercises(chapter: str | Path) -> dict[str, Exercise]:
    """Return the exercises of a chapter by number, in order.

    chapter  two digits ("01"), or the path of a grader module of your own

    A folder of a teacher's own modules chNN.py may be named in the environment variable
    SLIMLAB_CHECKS; it is looked into first. A chapter without a grader module has no exercises.
    Raises InputError if two share a number.
    """
    own = Path(os.environ.get(OWN_CHECKS, os.devnull)) / f"ch{chapter}.py"
    path = own if own.is_file() else Path(chapter)
    if path.suffix == ".py":
        module, source = _load_file(path), str(path.resolve())
    else:
        source = f"{CHECKS_PACKAGE}.ch{chapter}"
        if importlib.util.find_spec(source) is None:
            return {}
        module = importlib.import_module(source)
    found: dict[str, Exercise] = {}
    for value in vars(module).values():
        if isinstance(value, Exercise):
            require(
                value.number not in found or found[value.number] is value,
                "one exercise for each number",
                f"two with the number {value.number} in {source}",
                "renumber one of them",
            )
            value.source = source
            found[value.number] = value
    return dict(sorted(found.items(), key=lambda item: tuple(map(int, item[0].split(".")))))


def exercises_of(name: str) -> dict[str, Exercise]:
    """Return the exercises of a chapter that has some.

    name  "1", "01" or "01_attention"

    Raises InputError that lists the chapters with exercises.
    """
    digits = re.match(r"\d{1,2}(?!\d)", name)
    found = load_exercises(digits[0].zfill(2)) if digits else {}
    if not found:
        known = [f"{k:02d}" for k in range(100) if load_exercises(f"{k:02d}")]
        there = ", ".join(known) or "none yet"
        raise InputError("a chapter that has exercises", repr(name), f"choose from: {there}")
    return found


def find_exercise(number: str, source: str | Path | None = None) -> Exercise:
    """Return the exercise with this number.

    number  chapter and place, "1.1"
    source  the chapter or path of the grader module; by default the number's own chapter

    Raises InputError that lists the exercises there are.
    """
    known = load_exercises(source or chapter_of(number))
    if number not in known:
        there = ", ".join(known) or "none in this chapter yet"
        raise InputError("an exercise that exists", f"{number!r}", f"choose from: {there}")
    return known[number]


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or not path.is_file():
        raise InputError("a grader module", f"{path}", "give the path of an existing .py file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
