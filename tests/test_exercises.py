"""Every exercise of the book: the grader is right about each stored answer.

The untouched exercise gets nothing, the solution everything; a right answer written another way
everything; every wrong answer runs, fails, and gets the message that is stored beside it.
`python tools/update_answers.py` writes these messages; read them before you commit them.
"""

from pathlib import Path

import make_exercises
import pytest
import update_answers
from update_answers import ANSWERS, answers_to, complaints

from slimlab.classroom.process import Keeper
from slimlab.classroom.submission import Cell, collect, mark_of, read_cells

from classroom_cases import BAND, EXERCISES, GOOD_BAND  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
ALL = update_answers.all_exercises()
SOLUTIONS = {path.stem[:2]: path for path in sorted((ROOT / "solutions").glob("[0-9]*.ipynb"))}
MIN_WRONG = 5


@pytest.fixture(scope="module")
def keeper():
    with Keeper() as keeper:
        yield keeper


def cells_of(number, folder):
    found = list((ROOT / folder).glob(f"{ALL[number].chapter}_*.ipynb"))
    assert len(found) == 1, f"{number} has a grader, so chapter and {folder}/ go with it"
    return read_cells(found[0])


def points_of(number, folder, keeper):
    return keeper.check(ALL[number], collect(cells_of(number, folder), number))


def test_exercises_are_what_their_solutions_give(capsys):
    code = make_exercises.main(["--check"])
    assert code == 0, f"run python tools/make_exercises.py\n{capsys.readouterr().out}"


def test_the_counts_are_printed(capsys):
    with capsys.disabled():
        print()
        for number, exercise in ALL.items():
            answers = answers_to(exercise)
            right = sum(one.is_right for one in answers)
            shape = f"{len(exercise.properties)} properties, {exercise.max_score} points"
            print(
                f"exercise {number}: {shape}, {right} right, {len(answers) - right} wrong answers"
            )
        print(f"{len(ALL)} exercises in {len(SOLUTIONS)} notebooks")


@pytest.mark.parametrize("chapter", SOLUTIONS)
def test_a_solutions_notebook_has_three_to_six_graded_exercises_with_hints(chapter):
    marks = {mark_of(cell) for cell in read_cells(SOLUTIONS[chapter])} - {None}
    own = {number: one for number, one in ALL.items() if one.chapter == chapter}
    assert marks == set(own), "marked cells and graders must be the same exercises"
    assert 3 <= len(own) <= 6
    for exercise in own.values():
        assert len(exercise.properties) >= 2, f"{exercise.number}: partial credit needs two"
        assert exercise.hints, f"{exercise.number} has no hint"
        names = [one.name for one in exercise.properties]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("number", ALL)
def test_the_untouched_exercise_gets_nothing(number, keeper):
    report = points_of(number, "exercises", keeper)
    assert report.score == 0, report.text()


@pytest.mark.parametrize("number", ALL)
def test_the_solution_gets_everything_whatever_the_numbers(number, keeper):
    report = points_of(number, "solutions", keeper)
    assert report.score == report.max_score > 0, report.text()
    work = collect(cells_of(number, "solutions"), number)
    seen = [ALL[number].numbers_for(None)]
    for name in ("Ada Lovelace", "Grace Hopper"):
        drawn = ALL[number].numbers_for(name, 7)
        if drawn in seen:
            continue  # the same check again
        seen.append(drawn)
        report = keeper.check(ALL[number], work, name, 7)
        assert report.score == report.max_score, f"{name}\n{report.text()}"


@pytest.mark.parametrize("number", ALL)
def test_a_right_answer_written_another_way_gets_everything(number, keeper):
    right = [one for one in answers_to(ALL[number]) if one.is_right]
    assert right, f"no right_*.py in {ANSWERS.name}/{number.replace('.', '_')}"
    for answer in right:
        assert complaints(answer, answer.check(keeper)) == []


@pytest.mark.parametrize("number", ALL)
def test_every_wrong_answer_runs_fails_and_gets_its_message(number, keeper):
    wrong = [one for one in answers_to(ALL[number]) if not one.is_right]
    assert len(wrong) >= MIN_WRONG
    messages = {}
    for answer in wrong:
        report = answer.check(keeper)
        assert complaints(answer, report) == []
        stored = answer.message_path
        assert stored.is_file(), f"run python tools/update_answers.py {number}"
        assert report.first_message() + "\n" == stored.read_text(), answer.path.name
        messages[answer.path.name] = report.first_message()
    alike = [name for name, text in messages.items() if list(messages.values()).count(text) > 1]
    assert alike == [], "wrong answers with the same message: does each carry a fault of its own?"


def test_every_stored_file_belongs_to_an_answer_and_an_exercise():
    folders = {number.replace(".", "_") for number in ALL}
    assert {path.name for path in ANSWERS.glob("*")} <= folders
    for path in ANSWERS.glob("*/*"):
        if path.name == "__pycache__":
            continue
        assert path.name.startswith(("right_", "wrong_")), path.name
        if path.suffix == ".txt":
            assert path.with_suffix(".py").is_file(), path.name


@pytest.fixture
def stored(tmp_path):
    """Answers to the sample exercise 90.1, some of them bad examples."""
    folder = tmp_path / "90_1"
    folder.mkdir()
    source = "import torch\n" + GOOD_BAND.split("\n", 1)[1]
    (folder / "right_other.py").write_text(source)
    (folder / "right_bad.py").write_text(source.replace("d < width", "d <= width"))
    (folder / "wrong_wide.py").write_text(source.replace("d < width", "d <= width"))
    (folder / "wrong_not.py").write_text(source + "# the same as the solution\n")
    (folder / "wrong_crash.py").write_text(source.replace("return", "return 1 / 0,"))
    return {one.path.name: one for one in answers_to(BAND, tmp_path)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("right_other.py", None),
        ("right_bad.py", "is not accepted"),
        ("wrong_wide.py", None),
        ("wrong_not.py", "does not see its fault"),
        ("wrong_crash.py", "does not run (raised)"),
    ],
)
def test_bad_examples_of_answers_are_complained_about(stored, keeper, name, words):
    found = complaints(stored[name], stored[name].check(keeper))
    assert [words in text for text in found] == ([True] if words else [])


def test_a_stub_gets_nothing_from_the_sample_graders_either(keeper):
    for number, exercise in EXERCISES.items():
        stubs = [
            f"def {name}(*any):\n    raise NotImplementedError()" for name in exercise.requires
        ]
        cell = Cell("cell 1", "\n".join(stubs), f"ex-{number.replace('.', '-')}")
        assert keeper.check(exercise, collect([cell], number)).score == 0
