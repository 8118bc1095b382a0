"""The command line: help with examples, messages instead of tracebacks, exit codes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from slimlab import __version__
from slimlab.classroom import grade, process, runner
from slimlab.cli import main
from slimlab.commands.book import title_of

from classroom_cases import GOOD_BAND, GOOD_MEAN, SAMPLE, write_notebook  # isort: skip

ROOT = Path(__file__).resolve().parents[1]


class Shared(process.Keeper):
    """A keeper that outlives the `with` statement of one command; `close` ends it."""

    def __exit__(self, *unused):
        pass


@pytest.fixture(scope="module")
def keeper():
    keeper = Shared()
    yield keeper
    keeper.close()


@pytest.fixture
def run(monkeypatch, keeper):
    """Call a command; all share a keeper, which takes two seconds to start."""
    monkeypatch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
    monkeypatch.setattr(process, "Keeper", lambda: keeper)
    monkeypatch.setattr(grade, "Keeper", lambda: keeper)
    return lambda *arguments: CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of one chapter with exercises, from which commands are run."""
    title = [{"cell_type": "markdown", "metadata": {}, "id": "t", "source": "# 90 A sample"}]
    for folder in ("chapters", "exercises", "solutions"):
        path = write_notebook(tmp_path / "book" / folder / "90_sample.ipynb", "x = 6 * 7\nprint(x)")
        notebook = json.loads(path.read_text())
        notebook["cells"] = title + notebook["cells"]
        path.write_text(json.dumps(notebook))
    monkeypatch.chdir(tmp_path / "book")
    return tmp_path / "book"


@pytest.mark.parametrize("name", [None, *main.commands])
def test_every_command_has_help_with_an_example(run, name):
    result = run(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert f"slimlab {name or 'doctor'}" in result.output
    assert "\f" not in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_every_option_is_explained():
    for command in main.commands.values():
        for one in command.params:
            assert isinstance(one, click.Argument) or one.help, f"{command.name} {one.name}"


def test_the_version_is_shown(run):
    assert run("--version").output.strip() == f"slimlab, version {__version__}"


def test_chapters_are_listed_with_their_exercises(run, book):
    result = run("list")
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0] == ["90_sample", "90", "A", "sample"]
    assert lines[1] == ["90.1", "A", "band", "of", "keys", "★★", "4", "points"]


def test_a_chapter_runs_and_an_unknown_one_lists_those_there_are(run, book):
    result = run("run", "90", "--out", book / "ran")
    assert result.exit_code == 0, result.output
    assert "42" in (book / "ran" / "90_sample.ipynb").read_text()
    result = run("run", "17_absent")
    assert result.exit_code == 2
    assert "choose one of 90_sample" in result.stderr


def test_a_chapter_that_fails_gives_exit_code_1(run, book):
    write_notebook(book / "chapters" / "90_sample.ipynb", "1 / 0")
    result = run("run", "90")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.output


def test_a_notebook_is_checked_exercise_by_exercise(run, book, tmp_path):
    path = write_notebook(tmp_path / "my.ipynb", "import torch", GOOD_BAND)
    result = run("check", "90", path)
    assert result.exit_code == 1
    assert "4 of 4 points" in result.output
    assert "no cell that starts with the line `# exercise 90.2`" in result.output
    assert result.output.splitlines()[-1] == "4 of 7 points"
    result = run("check", "90_sample", path, "--exercise", "90.1", "--student", "Ada")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "4 of 4 points"


def test_a_hint_is_given_on_request(run, tmp_path):
    path = write_notebook(tmp_path / "my.ipynb", "# exercise 90.1\nx = 1")
    result = run("check", "90", path, "--exercise", "90.1", "--hint", 1)
    assert "hint 1: Which keys may query 0 see?" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "77", "my.ipynb"], "choose from: "),
        (["check", "attention", "my.ipynb"], "choose from: "),
        (["check", "90", "absent.ipynb"], "absent.ipynb, no file"),
        (["check", "90", "broken.ipynb"], "broken.ipynb: JSONDecodeError"),
        (["check", "90", "my.ipynb", "--exercise", "90.9"], "choose from: 90.1, 90.2"),
        (["check", "90", "my.ipynb", "--exercise", "90.1", "--hint", "9"], "hint=1 to hint=2"),
        (["grade", "absent"], "check the path"),
        (["grade", "empty"], "none in"),
        (["grade", "class", "--deadline", "tomorrow"], "ISO form"),
        (["grade", "class", "--late-penalty", "7"], "penalty"),
        (["grade", "class", "--chapter", "77"], "choose from: "),
        (["grade", "class", "--submitted", "absent.csv"], "absent.csv"),
        (["grade", "class", "--jobs", "0"], "at least one job"),
        (["handout", "class"], "holds something else"),
        (["handout", "new", "--solutions", "7"], "choose from: 90"),
    ],
)
def test_bad_input_gets_a_message_and_exit_code_2(run, book, arguments, words):
    write_notebook(book / "my.ipynb", GOOD_BAND)
    write_notebook(book / "class" / "Ada.ipynb", GOOD_BAND)
    (book / "broken.ipynb").write_text("{")
    (book / "empty").mkdir()
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.startswith("slimlab: asked for: ")
    assert "Traceback" not in result.output
    assert not (book / "class" / "scores").exists()
    assert "Traceback" in run("--debug", *arguments).stderr


def test_an_unexpected_error_is_one_line_and_names_the_way_to_see_more(run, book, monkeypatch):
    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(runner, "find_root", fail)
    result = run("list")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "slimlab: OSError: disk full",
        "(slimlab --debug ... shows where)",
    ]


def test_a_package_that_cannot_be_imported_leads_to_the_doctor(run, book, monkeypatch):
    def fail(*_):
        raise ImportError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(runner, "find_root", fail)
    assert "slimlab doctor says what is missing" in run("list").stderr


def test_the_number_of_an_exercise_checks_that_one_alone(run, tmp_path):
    path = write_notebook(tmp_path / "my.ipynb", "import torch", GOOD_BAND)
    result = run("check", "90.1", path)
    assert result.exit_code == 0
    assert "4 of 4 points" in result.output
    assert "90.2" not in result.output


@pytest.mark.parametrize("out", ["scores", "scores/deeper"])
def test_a_place_where_nothing_can_be_written_is_told_at_once(run, book, out):
    write_notebook(book / "class" / "Ada.ipynb", GOOD_BAND)
    (book / "scores").write_text("a file")
    result = run("grade", "class", "--out", out)
    assert result.exit_code == 2
    assert "choose another with --out" in result.stderr
    result = run("handout", book / "scores" / "new")
    assert result.exit_code == 2
    assert "a folder for the handout" in result.stderr


def test_a_class_is_graded_by_its_own_rules(run, book):
    folder = book / "class"
    folder.mkdir()
    (folder / "classroom.toml").write_text(
        'deadline = 2027-01-31T12:00:00\nlate_penalty = 0.5\nsolutions = ["90"]\n'
    )
    write_notebook(folder / "Ada_90.ipynb", "import torch", GOOD_BAND, GOOD_MEAN)
    write_notebook(folder / "Grace_90.ipynb", "import torch", GOOD_BAND)
    times = book / "times.csv"
    times.write_text("student,submitted\nAda,2027-01-31T11:00\nGrace,2027-01-31T13:00\n")
    result = run("grade", folder, "--submitted", times, "--jobs", 1)
    assert result.exit_code == 0, result.output
    with (folder / "scores" / "scores.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [(r["student"], r["points"], r["late"]) for r in csv.DictReader(file)]
    expected = [
        ("Ada", "4.0", "0"),
        ("Ada", "3.0", "0"),
        ("Grace", "2.0", "1"),
        ("Grace", "0.0", "1"),
    ]
    assert rows == expected
    assert "not a sandbox" in result.output.lower()
    # a second run replaces the files and does not take the results for a submission
    assert run("grade", folder, "--submitted", times, "--jobs", 1).exit_code == 0
    assert len(list((folder / "scores").glob("*.html"))) == 2


def test_a_handout_switches_solutions_on(run, book):
    result = run("handout", "class", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert "class: 2 notebooks, solutions of: none" in result.output
    assert run("handout", "class", "--solutions", "90").exit_code == 0
    assert (book / "class" / "solutions" / "90_sample.ipynb").is_file()
    assert "seed = 5" in (book / "class" / "classroom.toml").read_text()


def test_the_command_runs_as_a_program_of_its_own(tmp_path):
    program = [sys.executable, "-m", "slimlab.cli"]
    done = subprocess.run(
        [*program, "check", "90", "absent.ipynb"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "SLIMLAB_CHECKS": str(SAMPLE), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "slimlab: asked for: a notebook (.ipynb) or script (.py)\n"
        "given: absent.ipynb, no file\nchange: check the path\n"
    )


def test_a_pipe_that_knows_no_stars_gets_question_marks(book):
    done = subprocess.run(
        [sys.executable, "-m", "slimlab.cli", "list"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
        | {"SLIMLAB_CHECKS": str(SAMPLE)},
        cwd=book,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"90.1" in done.stdout
    assert b"?" in done.stdout


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    path = write_notebook(tmp_path / "my.ipynb", "x = 1")
    program = f"{sys.executable} -m slimlab.cli check 90 {path} | head -n 1"
    environment = {"PYTHONPATH": str(ROOT), "SLIMLAB_CHECKS": str(SAMPLE), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(program, shell=True, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("Exercise 90.1")
    assert "Error" not in done.stderr


def test_help_does_not_wait_for_torch():
    program = "import sys, slimlab.cli; print(sorted({'torch', 'IPython'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_title_of_what_is_no_notebook_says_so(tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text("{")
    assert title_of(path) == "(not a notebook)"
