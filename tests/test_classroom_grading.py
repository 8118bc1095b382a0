"""The comparisons of graders: what fails, with which words, and that they cannot be weakened."""

import random
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from slimlab.classroom import grading
from slimlab.classroom.exercise import Exercise, chapter_of, find_exercise, load_exercises
from slimlab.classroom.grading import (
    CheckFailed,
    clean,
    expect,
    expect_close,
    expect_equal,
    expect_raises,
    number,
)
from slimlab.classroom.report import Outcome, Problem, Report, nothing_checked
from slimlab.config import InputError

from classroom_cases import BAND, EXERCISES, SAMPLE  # isort: skip


@pytest.mark.parametrize(
    ("saw", "expected"),
    [
        (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]], dtype=torch.float64)),
        (3, 3.0),
        ([1.0, 2.0], torch.tensor([1.0, 2.0])),
        (np.float64(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")])),
        (torch.nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (1.0 + 9e-6, 1.0),
        ([Fraction(1, 2), Decimal("0.25")], torch.tensor([0.5, 0.25])),
    ],
)
def test_close_values_pass_in_any_form(saw, expected):
    expect_close(saw, expected, "it", "there")


@pytest.mark.parametrize(
    ("saw", "expected", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "it of shape (2, 3)"),
        (torch.tensor([[0.0, 1.0], [0.0, 7.0]]), torch.zeros(2, 2), "it: 7 at [1, 1]"),
        (torch.tensor([0.0, float("nan")]), torch.zeros(2), "it: nan at [1]"),
        (float("nan"), float("nan"), "it: nan"),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), "it: inf at [0]"),
        (1.0 + 2e-5, 1.0, "it: 1.00002"),
        ("one", 1.0, "it: 'one', of type str"),
        (None, 1.0, "it: None, of type NoneType"),
        (torch.tensor([1j]), torch.tensor([1.0]), "it is complex"),
        (object(), 1.0, "it: an object of type object"),
    ],
)
def test_other_values_fail_and_say_where(saw, expected, words):
    with pytest.raises(CheckFailed) as caught:
        expect_close(saw, expected, "it", "there")
    assert caught.value.saw == words
    assert caught.value.look == "there"


def test_another_kind_or_shape_may_have_a_place_of_its_own():
    for saw in (torch.zeros(2), "one", object()):
        with pytest.raises(CheckFailed) as caught:
            expect_close(saw, torch.zeros(3), "it", "there", form="what you return")
        assert caught.value.look == "what you return"


@pytest.mark.parametrize(("factor", "named"), [(1 + 1e-7, True), (1 + 1e-4, False), (1.0, None)])
def test_digits_lost_to_float32_are_named(factor, named):
    right = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64)
    if named is None:
        expect_close(right * factor, right, "it", "there", rtol=1e-12)
        return
    with pytest.raises(CheckFailed) as caught:
        expect_close(right * factor, right, "it", "there", rtol=1e-12)
    assert ("float32 on the way" in caught.value.look) == named


def test_the_tolerance_and_its_reason_are_shown():
    with pytest.raises(CheckFailed) as caught:
        expect_close(1.0, 2.0, "it", "there", atol=0.25, rtol=0.125, reason="two roundings")
    assert caught.value.expected == "2, within 0.25 plus 0.125 of it (two roundings)"


@pytest.mark.parametrize(
    ("saw", "expected"),
    [
        ([1, 2], (1, 2)),
        (torch.Size([2, 3]), (2, 3)),
        (torch.tensor([True, False]), [True, False]),
        ({"a": 1}, {"a": 1.0}),
        ({3, 1}, frozenset([1, 3])),
        (torch.float32, torch.float32),
        (np.int64(4), 4),
        (None, None),
    ],
)
def test_equal_plain_values_pass(saw, expected):
    expect_equal(saw, expected, "it", "there")


class Anything:
    """Equal to whatever it is compared with."""

    def __eq__(self, other):
        return True

    __hash__ = None


class Close(float):
    """A float that is equal to all others."""

    __eq__ = Anything.__eq__
    __hash__ = None


@pytest.mark.parametrize(
    ("saw", "expected"),
    [
        ([1, 2], (1, 3)),
        ([1, 2], (1, 2, 3)),
        (True, 1),
        (None, 0),
        ("1", 1),
        (torch.float16, torch.float32),
        (Anything(), 3),
        (Close(2.0), 3.0),
        ([Anything()], [3]),
    ],
)
def test_unequal_values_fail_even_if_their_class_says_otherwise(saw, expected):
    with pytest.raises(CheckFailed):
        expect_equal(saw, expected, "it", "there")


def test_a_shape_of_one_dim_is_written_as_python_writes_it():
    with pytest.raises(CheckFailed) as caught:
        expect_equal((3,), (4,), "the shape", "there")
    assert (caught.value.saw, caught.value.expected) == ("the shape: (3,)", "(4,)")


def test_a_condition_must_be_true_itself():
    expect(True, 1, 1, "there")
    expect(torch.tensor(True), 1, 1, "there")
    for condition in (1, "yes", torch.tensor([True, True]), torch.tensor(1), None):
        with pytest.raises(CheckFailed):
            expect(condition, 1, 1, "there")


def test_the_expected_error_counts_and_no_other():
    expect_raises(lambda: int("x"), ValueError, "text", "there")
    with pytest.raises(CheckFailed, match="was accepted and gave 3"):
        expect_raises(lambda: 3, ValueError, "text", "there")
    with pytest.raises(CheckFailed, match="ZeroDivisionError"):
        expect_raises(lambda: 1 / 0, ValueError, "text", "there")


def test_an_exercise_that_is_not_written_does_not_count_as_refusing():
    def stub():
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        expect_raises(stub, RuntimeError, "a width of 0", "there")


def test_the_canary_passes_as_things_are():
    assert grading.comparison_is_sound()


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        ("expect_close", lambda *a, **k: None),
        ("expect_equal", lambda *a, **k: None),
        ("_le", lambda *a: torch.tensor(True)),
        ("_all", lambda *a: True),
        ("_abs", torch.zeros_like),
        ("plain", lambda *a: 0),
        ("expect", lambda *a: None),
        ("_eq", torch.ne),
    ],
)
def test_the_canary_dies_when_a_part_of_the_comparison_is_replaced(monkeypatch, name, replacement):
    monkeypatch.setattr(grading, name, replacement)
    assert not grading.comparison_is_sound()


def test_replacing_torch_functions_changes_no_comparison(monkeypatch):
    monkeypatch.setattr(torch, "allclose", lambda *a, **k: True)
    monkeypatch.setattr(torch, "le", lambda *a, **k: torch.tensor(True))
    monkeypatch.setattr(torch, "abs", torch.zeros_like)
    with pytest.raises(CheckFailed):
        expect_close(torch.ones(2), torch.zeros(2), "it", "there")


def test_messages_hold_no_address_and_no_folder():
    text = clean(f"{object()} in /home/ada/work/my.ipynb, a/b stays")
    assert "0x..." in text
    assert "/home" not in text
    assert ".../my.ipynb, a/b stays" in text
    assert len(clean("x" * 9000)) == 600


def test_numbers_are_rounded_unless_that_hides_the_difference():
    assert number(0.123456) == "0.1235"
    assert number(0.123456, 0.123457) == "0.123456"


def test_an_exercise_knows_its_chapter_and_its_points():
    assert (BAND.chapter, BAND.max_score) == ("90", 4)
    assert list(EXERCISES) == ["90.1", "90.2"]
    assert chapter_of("12.3") == "12"


@pytest.mark.parametrize("wrong", ["1", "1.2.3", "a.b", "", "1.2\n"])
def test_a_number_that_is_none_is_refused(wrong):
    with pytest.raises(InputError, match="exercise's number"):
        Exercise(wrong, "title", requires=("f",))


def test_fractions_of_points_and_missing_names_are_refused():
    with pytest.raises(InputError, match="whole number of points"):
        Exercise("1.1", "title", requires=("f",)).property("p", points=0.5)
    with pytest.raises(InputError, match="as a tuple"):
        Exercise("1.1", "title", requires="f")
    with pytest.raises(InputError, match="stars"):
        Exercise("1.1", "title", requires=("f",), stars=4)


def test_numbers_depend_on_name_seed_and_exercise_and_on_nothing_else():
    ada = BAND.numbers_for("Ada Lovelace", 7)
    assert ada == BAND.numbers_for("ada_lovelace", 7)
    random.seed(3)
    assert ada == BAND.numbers_for("  ADA-LOVELACE ", 7)
    drawn = {tuple(BAND.numbers_for(f"student {k}", 7).values()) for k in range(30)}
    assert len(drawn) > 5
    assert len({tuple(BAND.numbers_for("Ada", k).values()) for k in range(30)}) > 5
    assert EXERCISES["90.2"].numbers_for("Ada") == {}


def test_an_unknown_exercise_lists_those_there_are():
    with pytest.raises(InputError, match=r"90\.1, 90\.2"):
        find_exercise("90.7", SAMPLE / "ch90.py")
    with pytest.raises(InputError, match="none in this chapter"):
        find_exercise("89.1")
    assert load_exercises("89") == {}


def test_two_exercises_with_one_number_are_refused(tmp_path):
    line = 'Exercise("91.1", "t", requires=("f",))'
    head = "from slimlab.classroom.exercise import Exercise\n"
    (tmp_path / "ch91.py").write_text(f"{head}a = {line}\nb = {line}\n")
    with pytest.raises(InputError, match="one exercise for each number"):
        load_exercises(tmp_path / "ch91.py")


def test_a_report_shows_points_and_one_hint_at_a_time():
    problem = Problem("2", "3", "the sum")
    outcomes = (Outcome("first", 1, 1, "passed"), Outcome("second", 0, 3, "failed", problem))
    report = Report(BAND, outcomes, printed="hello", notes=("a note",))
    text = report.text()
    assert (report.score, report.max_score) == (1, 4)
    assert repr(report) == "<exercise 90.1: 1 of 4 points>"
    assert "✓ 1/1  first" in text
    assert "✗ 0/3  second\n       saw: 2\n       expected: 3\n       look at: the sum" in text
    assert 'a hint waits: check("90.1", hint=1)' in text
    assert BAND.hints[0] not in text
    second = Report(BAND, outcomes, hint=2).text()
    assert f"hint 2: {BAND.hints[1]}" in second
    assert BAND.hints[0] not in second
    assert "waits" not in second
    with pytest.raises(InputError, match="hint=1 to hint=2"):
        Report(BAND, outcomes, hint=3)


def test_html_escapes_what_a_student_wrote():
    report = nothing_checked(BAND, Problem("<script>alert(1)</script>", "&", "there"))
    assert "<script" not in report.html()
    assert "&lt;script&gt;" in report.html()
