"""Write the message that each wrong answer gets beside it, for review.

    python tools/update_answers.py            for every exercise that has a grader
    python tools/update_answers.py 1.2 2.1    for these

tests/answers/1_2/ holds right_NAME.py and wrong_NAME.py, each the cell of exercise 1.2 as a student
would write it, imports included; the mark may be left out. wrong_NAME.txt is written here and
compared by tests/test_exercises.py: read it before you commit it, it is what a student will read.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from slimlab.classroom.exercise import Exercise, find_exercise, load_exercises  # noqa: E402
from slimlab.classroom.process import Keeper  # noqa: E402
from slimlab.classroom.report import Report  # noqa: E402
from slimlab.classroom.submission import Cell, collect  # noqa: E402
from slimlab.text.files import write_atomically  # noqa: E402

ANSWERS = ROOT / "tests" / "answers"


@dataclass(frozen=True)
class Answer:
    """One stored answer to an exercise."""

    exercise: Exercise
    path: Path

    @property
    def is_right(self) -> bool:
        return self.path.name.startswith("right_")

    @property
    def message_path(self) -> Path:
        return self.path.with_suffix(".txt")

    def check(self, keeper: Keeper) -> Report:
        """Return what the grader says; a wrong answer's report ends where its message is found."""
        mark = f"ex-{self.exercise.number.replace('.', '-')}"
        cell = Cell("cell 1", self.path.read_text(encoding="utf-8"), mark)
        work = collect([cell], self.exercise.number)
        return keeper.check(self.exercise, work, until_failed=not self.is_right)


def all_exercises() -> dict[str, Exercise]:
    """Return every exercise of the book by number."""
    chapters = [load_exercises(f"{chapter:02d}") for chapter in range(100)]
    return {number: one for chapter in chapters for number, one in chapter.items()}


def answers_to(exercise: Exercise, folder: Path = ANSWERS) -> list[Answer]:
    """Return the stored answers to `exercise`, right ones first."""
    own = folder / exercise.number.replace(".", "_")
    paths = [*sorted(own.glob("right_*.py")), *sorted(own.glob("wrong_*.py"))]
    return [Answer(exercise, path) for path in paths]


def complaints(answer: Answer, report: Report) -> list[str]:
    """Return what is wrong with a stored answer itself, given its report."""
    name = f"{answer.exercise.number} {answer.path.name}"
    if answer.is_right:
        complete = report.score == report.max_score
        return [] if complete else [f"{name} is not accepted:\n{report.first_message()}"]
    if report.score == report.max_score:
        return [f"{name} gets all points: the grader does not see its fault"]
    kinds = [one.kind for one in report.outcomes if one.kind != "passed"]
    if kinds[0] != "failed":
        return [f"{name} does not run ({kinds[0]}), a wrong answer should:\n{report.text()}"]
    return []


def main(numbers: list[str]) -> int:
    exercises = [find_exercise(one) for one in numbers] or list(all_exercises().values())
    found = []
    with Keeper() as keeper:
        for answer in [one for exercise in exercises for one in answers_to(exercise)]:
            report = answer.check(keeper)
            found += complaints(answer, report)
            if not answer.is_right:
                write_atomically(answer.message_path, f"{report.first_message()}\n".encode())
                print(f"{answer.exercise.number} {answer.path.name}")
                print("    " + report.first_message().replace("\n", "\n    "))
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
