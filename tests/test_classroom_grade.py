"""Grading a class: every submission gets its rows, and none can stall or spoil the others."""

import csv
import os
from datetime import datetime, timedelta

import pytest

from slimlab.classroom import collected, grade, handout, pages
from slimlab.classroom.collected import Handed
from slimlab.classroom.grade import Graded, Row, Rules
from slimlab.classroom.report import Outcome, Report
from slimlab.classroom.session import read_settings
from slimlab.config import InputError

from classroom_cases import (  # isort: skip
    GOOD_BAND,
    GOOD_MEAN,
    SAMPLE,
    write_notebook,
)

HANGS = GOOD_MEAN.replace("return values.mean()", "while True: pass")


@pytest.fixture(scope="module")
def graded_class(tmp_path_factory):
    """A folder of submissions of every kind, graded once: the results by student and the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
        folder = tmp_path_factory.mktemp("class")
        write_notebook(
            folder / "Ada_Lovelace_90_sample.ipynb", "import torch", GOOD_BAND, GOOD_MEAN
        )
        write_notebook(folder / "hanging.ipynb", "import torch", GOOD_BAND, HANGS)
        write_notebook(folder / "Grace Hopper" / "90_sample.ipynb", "import torch", GOOD_MEAN)
        write_notebook(folder / "unmarked.ipynb", "x = 1")
        write_notebook(folder / "<b>bold" / "my.ipynb", "# exercise 90.1\nprint('<i>hi</i>')")
        (folder / "nobody").mkdir()
        (folder / "broken.ipynb").write_text("{")
        (folder / ".hidden.ipynb").write_text("{")
        (folder / "notes.txt").write_text("not a submission")
        write_notebook(folder / "Grace Hopper" / ".ipynb_checkpoints" / "90_sample.ipynb", "y")
        out = folder / "scores"
        out.mkdir()
        found = collected.find_submissions(folder, out, {})
        seen = []
        progress = lambda items: (seen.append(1) or one for one in items)  # noqa: E731
        results = grade.grade_class(found, Rules(chapter="90"), 2, progress)
        files = pages.write_results(results, out)
        assert len(seen) == len(results) == len(found) == 7
    return {one.handed.student: one for one in results}, files, out


def points(graded):
    return [(row.exercise, row.points, row.max) for row in graded.rows]


def test_every_submission_is_found_and_named_after_its_file_or_folder(graded_class):
    results, _, _ = graded_class
    expected = {"Ada Lovelace", "hanging", "Grace Hopper", "unmarked", "broken", "nobody"}
    assert set(results) == expected | {"<b>bold"}


def test_points_are_given_by_property(graded_class):
    results, _, _ = graded_class
    assert points(results["Ada Lovelace"]) == [("90.1", 4, 4), ("90.2", 3, 3)]
    assert points(results["hanging"]) == [("90.1", 4, 4), ("90.2", 2, 3)]
    assert points(results["Grace Hopper"]) == [("90.1", 0, 4), ("90.2", 3, 3)]


def test_whatever_is_wrong_with_a_submission_becomes_its_message(graded_class):
    results, _, _ = graded_class
    assert "did not finish within 1 s" in results["hanging"].rows[1].message
    assert "no cell that starts with the line" in results["Grace Hopper"].rows[0].message
    assert "format" not in results["broken"].rows[0].message
    assert results["broken"].rows[0].message.startswith("broken.ipynb: JSONDecodeError")
    assert results["nobody"].rows[0].message == "a folder without one; hand one in"
    for name in ("broken", "nobody"):
        assert points(results[name]) == [("", 0.0, 7)]


def test_the_tables_hold_a_line_for_everything(graded_class):
    results, files, out = graded_class
    with (out / "scores.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    header = ["student", "chapter", "exercise", "points", "max", "late", "message", "file"]
    assert list(rows[0]) == header
    assert len(rows) == sum(len(one.rows) for one in results.values()) == 12
    with (out / "totals.csv").open(encoding="utf-8-sig", newline="") as file:
        totals = {row["student"]: row for row in csv.DictReader(file)}
    assert (totals["Ada Lovelace"]["points"], totals["Ada Lovelace"]["max"]) == ("7.0", "7")
    assert (totals["hanging"]["points"], totals["hanging"]["chapter"]) == ("6.0", "90")
    assert sorted(path.name for path in files) == sorted(os.listdir(out))


def test_every_student_has_a_page_that_needs_nothing_else(graded_class):
    _, files, out = graded_class
    names = {path.name for path in files if path.suffix == ".html"}
    assert {"ada-lovelace.html", "grace-hopper.html", "b-bold.html"} < names
    assert len(names) == 7
    for name in names:
        text = (out / name).read_text()
        assert "http" not in text
        assert "<script" not in text
        assert "Not a sandbox" in text
    text = (out / "b-bold.html").read_text()
    assert "<b>bold" not in text
    assert "<i>hi" not in text
    assert "&lt;i&gt;hi&lt;/i&gt;" in text


def test_the_chapter_is_that_of_the_marks_or_else_of_the_files_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
    marked = [grade.Cell("cell 1", GOOD_BAND)]
    assert grade.chapters_in(marked, tmp_path / "my.ipynb", None) == ["90"]
    assert grade.chapters_in([], tmp_path / "90_sample.ipynb", None) == ["90"]
    assert grade.chapters_in(marked, tmp_path / "my.ipynb", "90") == ["90"]
    with pytest.raises(InputError, match="none of them marked"):
        grade.chapters_in([], tmp_path / "my.ipynb", None)


def test_numbers_are_drawn_for_the_name_of_the_file(tmp_path):
    said = [grade.Cell("cell 1", 'student("Grace")')]
    assert grade.whose_numbers("Ada", [], None) == (None, 0, [])
    assert grade.whose_numbers("Ada", [], 7)[:2] == ("Ada", 7)
    name, seed, remarks = grade.whose_numbers("Ada", said, 7)
    assert (name, seed) == ("Ada", 7)
    assert "student('Grace')" in remarks[0]
    assert grade.whose_numbers("GRACE", said, None) == ("GRACE", 0, [])


@pytest.mark.parametrize(
    ("hours", "late"), [(-1, 0), (0, 0), (0.1, 1), (24, 1), (24.1, 2), (240, 10)]
)
def test_days_late_are_counted_when_begun(hours, late):
    deadline = datetime(2027, 1, 31, 23, 59).astimezone()
    assert collected.days_late(deadline + timedelta(hours=hours), deadline) == late
    assert collected.days_late(deadline, None) == 0


class FullMarks:
    """Stands in for a Keeper: every property passes."""

    def check(self, exercise, submission, name, seed):
        passed = [(one.name, one.points, one.points, "passed") for one in exercise.properties]
        return Report(exercise, tuple(Outcome(*one) for one in passed))


@pytest.mark.parametrize(
    ("days", "penalty", "expected"), [(0, 0.1, 4), (1, 0.1, 3.6), (3, 0.25, 1.0), (30, 0.1, 0)]
)
def test_late_work_loses_its_part(tmp_path, monkeypatch, days, penalty, expected):
    monkeypatch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
    deadline = datetime(2027, 1, 31).astimezone()
    path = write_notebook(tmp_path / "a.ipynb", GOOD_BAND)
    handed = Handed("Ada", path, deadline + timedelta(days=days))
    rules = Rules("90", None, deadline, penalty)
    row = grade.grade_submission(handed, rules, FullMarks()).rows[0]
    assert (row.points, row.late) == (pytest.approx(expected), days)


def test_a_penalty_outside_its_range_is_refused():
    with pytest.raises(InputError, match="penalty"):
        Rules(late_penalty=10)


class Breaks:
    """Stands in for a Keeper that cannot be started."""

    def check(self, *arguments):
        raise RuntimeError("no process")


def test_a_failure_of_the_grader_itself_is_one_students_row(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
    path = write_notebook(tmp_path / "a.ipynb", GOOD_BAND)
    handed = Handed("Ada", path, datetime.now().astimezone())
    (row,) = grade.grade_submission(handed, Rules(), Breaks()).rows
    assert row.message == "the grader failed: RuntimeError: no process"


def test_hand_in_times_come_from_a_table_where_one_is_given(tmp_path):
    times = tmp_path / "times.csv"
    times.write_text("student,submitted\nada lovelace,2027-02-01T10:00\n")
    found = collected.read_times(times)
    write_notebook(tmp_path / "class" / "Ada_Lovelace.ipynb", "x")
    write_notebook(tmp_path / "class" / "Grace.ipynb", "x")
    os.utime(tmp_path / "class" / "Grace.ipynb", (0, 0))
    handed = collected.find_submissions(tmp_path / "class", tmp_path / "out", found)
    assert handed[0].time == datetime(2027, 2, 1, 10).astimezone()
    assert handed[1].time.timestamp() == 0


@pytest.mark.parametrize(
    "text", ["name,time\na,b\n", "student,submitted\nAda,\n", "student\nAda\n"]
)
def test_a_table_of_times_with_a_gap_is_refused(tmp_path, text):
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(InputError, match="columns student and submitted"):
        collected.read_times(tmp_path / "times.csv")
    with pytest.raises(InputError, match="ISO form"):
        collected.read_time("tomorrow")


def test_a_table_as_a_spreadsheet_writes_it_is_read(tmp_path):
    path = tmp_path / "times.csv"
    path.write_bytes("\ufeffstudent;submitted\r\nJürgen;2027-02-01T10:00\r\n".encode())
    assert collected.read_times(path) == {"jürgen": datetime(2027, 2, 1, 10).astimezone()}
    path.write_bytes("student;submitted\r\nJürgen;2027-02-01T10:00\r\n".encode("latin-1"))
    with pytest.raises(InputError, match="CSV UTF-8"):
        collected.read_times(path)


@pytest.mark.parametrize(
    ("text", "late"),
    [
        ("2027-01-31", 0),
        ("2027-01-31T23:59", 1),
        ("2027-01-31T23:59:59", 0),
        ("2027-01-31T23:59:58", 1),
    ],
)
def test_a_day_as_a_deadline_lasts_until_its_end(text, late):
    handed = datetime(2027, 1, 31, 23, 59, 59).astimezone()
    assert collected.days_late(handed, collected.read_deadline(text)) == late


def test_a_deadline_with_a_zone_is_that_moment_everywhere():
    zulu = collected.read_deadline("2027-01-31T12:00Z")
    assert zulu == collected.read_deadline("2027-01-31T14:00+02:00")


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("Ada_Lovelace_90", "Ada Lovelace"),
        ("Ada Lovelace-90-sample (2)", "Ada Lovelace"),
        ("student_17_90", "student 17"),
        ("student_17_90_31", "student 17"),
        ("Ada_77", "Ada"),
        ("Ada_1990", "Ada 1990"),
        ("S90", "S90"),
    ],
)
def test_the_name_in_a_files_name_ends_before_the_chapters_number(
    tmp_path, monkeypatch, name, student
):
    monkeypatch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
    write_notebook(tmp_path / f"{name}.ipynb", "x = 1")
    (handed,) = collected.find_submissions(tmp_path, tmp_path / "scores", {})
    assert handed.student == student


def test_what_systems_put_beside_the_work_is_no_submission(tmp_path):
    for name in (
        "__MACOSX/._Ada_01.ipynb",
        "Ada/.ipynb_checkpoints/01-checkpoint.ipynb",
        "Ada/._01.ipynb",
        "Ada/sub/01.ipynb",
        "earlier/01.ipynb",
        "Grace_01.IPYNB",
    ):
        write_notebook(tmp_path / name, "x = 1")
    (tmp_path / "earlier" / "scores.csv").write_text("")
    (tmp_path / "Emmy_01.ipynb").symlink_to(tmp_path / "nowhere")
    (tmp_path / "submissions.zip").write_bytes(b"PK")
    found = collected.find_submissions(tmp_path, tmp_path / "scores", {})
    names = [(one.student, one.file.split("/")[-1]) for one in found]
    assert names == [("Ada", "01.ipynb"), ("Emmy", "Emmy_01.ipynb"), ("Grace", "Grace_01.IPYNB")]
    with pytest.raises(InputError, match="no file"):
        grade.read_cells(found[1].path)


def test_two_files_of_one_student_are_named_and_never_added_up(tmp_path):
    paths = [tmp_path / name for name in ("Ada_01.ipynb", "Ada_01_final.ipynb", "Grace_01.ipynb")]
    handed = [Handed(path.name[:-9], path, datetime.now().astimezone()) for path in paths]
    results = [
        Graded(one, (Row(name, "01", "1.1", 3.0, 6, 0, "", one.file),))
        for one, name in zip(handed, ("Ada", "ada", "Grace"))
    ]
    (line,) = grade.handed_in_twice(results)
    assert line.startswith("ada has handed in chapter 01 2 times")
    assert "Ada_01.ipynb" in line
    assert "Ada_01_final.ipynb" in line
    table = pages.totals([row for one in results for row in one.rows]).splitlines()[1:]
    assert [row.split(",")[2:4] for row in table] == [["3.0", "6"]] * 3


def test_a_folder_without_notebooks_is_refused(tmp_path):
    with pytest.raises(InputError, match="none in"):
        collected.find_submissions(tmp_path, tmp_path / "scores", {})
    with pytest.raises(InputError, match="check the path"):
        collected.find_submissions(tmp_path / "absent", tmp_path, {})


def rows_of(student, message):
    handed = Handed(student, None, datetime.now().astimezone())
    return Graded(handed, (Row(student, "90", "90.1", 1.5, 4, 0, message),))


def test_a_spreadsheet_runs_nothing_that_a_student_wrote(tmp_path):
    pages.write_results([rows_of("=cmd()", "@SUM(A1)")], tmp_path)
    text = (tmp_path / "scores.csv").read_text(encoding="utf-8-sig")
    assert "'=cmd(),90,90.1,1.5,4,0,'@SUM(A1)" in text


def test_students_whose_names_look_alike_get_pages_of_their_own(tmp_path):
    files = pages.write_results([rows_of("Ada-L", "x"), rows_of("Ada L.", "y")], tmp_path)
    assert [path.name for path in files[2:]] == ["ada-l.html", "ada-l-2.html"]


def test_the_name_of_a_page_fits_into_any_file_system(tmp_path):
    files = pages.write_results([rows_of("李" * 80, "x"), rows_of("x" * 249, "y")], tmp_path)
    assert all(path.is_file() for path in files)
    assert all(len(path.name.encode()) < 200 for path in files)


def test_a_folder_that_cannot_be_written_is_found_before_grading(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "scores"):
        with pytest.raises(InputError, match="choose another with --out"):
            pages.prepare(out)
    pages.prepare(tmp_path / "new" / "scores")
    assert os.listdir(tmp_path / "new" / "scores") == []


@pytest.fixture
def book(tmp_path):
    for folder in ("chapters", "exercises", "solutions"):
        for name in ("01_a", "02_b"):
            write_notebook(tmp_path / "book" / folder / f"{name}.ipynb", f"{folder} {name}")
    return tmp_path / "book"


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_handout_holds_no_solution_until_it_is_switched_on(book, tmp_path):
    target = tmp_path / "out"
    made = handout.make_handout(book, target, seed=7)
    assert made.num_files == 4
    expected = ["README.txt", "chapters/01_a.ipynb", "chapters/02_b.ipynb", "classroom.toml"]
    expected += ["exercises/01_a.ipynb", "exercises/02_b.ipynb"]
    assert files_in(target) == sorted(expected)
    assert handout.make_handout(book, target, ("01",)).solutions == ("01",)
    assert files_in(target) == sorted([*expected, "solutions/01_a.ipynb"])
    assert read_settings(target / "classroom.toml") == {"solutions": ["01"], "seed": 7}
    handout.make_handout(book, target)
    assert files_in(target) == sorted([*expected, "solutions/01_a.ipynb"])
    handout.make_handout(book, target, ())
    assert files_in(target) == sorted(expected)


def test_a_handout_never_overwrites_work(book, tmp_path):
    target = tmp_path / "out"
    handout.make_handout(book, target)
    mine = write_notebook(target / "exercises" / "01_a.ipynb", "my work")
    before = mine.read_bytes()
    made = handout.make_handout(book, target, ("01", "02"))
    assert made.kept == ("01_a.ipynb",)
    assert mine.read_bytes() == before


def test_a_handout_that_was_interrupted_goes_on(book, tmp_path, monkeypatch):
    real, calls = handout.shutil.copyfile, []

    def copy_twice(source, target):
        calls.append(target)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(handout.shutil, "copyfile", copy_twice)
    with pytest.raises(KeyboardInterrupt):
        handout.make_handout(book, tmp_path / "class", ("01",), 5)
    monkeypatch.setattr(handout.shutil, "copyfile", real)
    made = handout.make_handout(book, tmp_path / "class")
    assert made.solutions == ("01",)
    assert not [name for name in files_in(tmp_path / "class") if name.endswith(".part")]


def test_a_handout_goes_into_no_other_folder_and_knows_its_chapters(book, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        handout.make_handout(book, tmp_path / "thesis")
    with pytest.raises(InputError, match="choose from: 01, 02"):
        handout.make_handout(book, tmp_path / "out", ("07",))
    assert not (tmp_path / "out").exists()
