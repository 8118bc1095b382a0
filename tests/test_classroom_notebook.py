"""Checks inside a running notebook, students' notebooks made from solutions, and nbgrader."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import make_exercises
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from slimlab.classroom import runner
from slimlab.classroom.check import check, numbers, student
from slimlab.classroom.session import SESSION, Session, read_settings
from slimlab.config import InputError

from classroom_cases import BAND, GOOD_BAND, SAMPLE, solution_notebook, write_notebook  # isort: skip


@pytest.fixture
def own_checks(monkeypatch):
    monkeypatch.setenv("SLIMLAB_CHECKS", str(SAMPLE))
    monkeypatch.setattr(SESSION, "name", None)
    monkeypatch.setattr(SESSION, "seed", 0)


def execute(*sources):
    """Run the code cells in a kernel of their own; return the executed cells."""
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    failure = runner.execute(notebook, "sample", lambda *_: None)
    assert failure is None, failure and failure.traceback
    return notebook.cells


def shown(cell, kind="text/plain"):
    return [output.data[kind] for output in cell.outputs if "data" in output]


def test_check_in_a_notebook_takes_the_cells_as_they_were_run(own_checks):
    cells = execute(
        "import torch\nfrom slimlab.classroom.check import check, numbers, student",
        GOOD_BAND.replace("d < width", "d <= width"),
        '# check 90.1\ncheck("90.1", hint=1).score',
        GOOD_BAND,
        "check('90.1')",
        'student("Ada Lovelace")\nnumbers("90.1")',
        'check("90.1", student="Grace Hopper").score',
    )
    report, score = shown(cells[2])
    assert score == "2"
    assert "2 of 4 points" in report
    assert f"hint 1: {BAND.hints[0]}" in report
    assert "<table>" in cells[2].outputs[0].data["text/html"]
    report, value = shown(cells[4])
    assert "4 of 4 points" in report
    assert value == "<exercise 90.1: 4 of 4 points>"
    assert shown(cells[5]) == [repr(BAND.numbers_for("Ada Lovelace", 0))]
    assert shown(cells[6])[1] == "4"
    # nbgrader takes anything on stderr in a check cell for a failure
    names = [output.get("name") for cell in cells for output in cell.outputs]
    assert "stderr" not in names


def test_cells_that_leave_no_history_are_checked_too(own_checks):
    manager, client = start_new_kernel()
    replies = []
    for source in (
        "import torch\nfrom slimlab.classroom.check import check",
        GOOD_BAND,
        'check("90.1").score',
    ):
        client.execute_interactive(
            source, store_history=False, timeout=60, output_hook=replies.append
        )
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    results = [r["content"]["data"] for r in replies if r["msg_type"] == "execute_result"]
    assert [result["text/plain"] for result in results] == ["4"]


def test_a_check_before_its_cell_was_run_says_so(own_checks):
    cells = execute("import torch\nfrom slimlab.classroom.check import check", 'check("90.1")')
    (report, _) = shown(cells[1])
    assert "no cell with the first line `# exercise 90.1` that has been run" in report
    assert "run it (after a restart again)" in report


def test_a_cell_that_the_editor_names_is_replaced_by_its_newest_form(own_checks):
    manager, client = start_new_kernel()
    replies = []

    def run(source, cell_id):
        content = {"code": source, "store_history": True, "silent": False, "stop_on_error": False}
        message = client.session.msg("execute_request", content, metadata={"cellId": cell_id})
        client.shell_channel.send(message)
        while True:
            reply = client.get_iopub_msg(timeout=60)
            replies.append(reply)
            mine = reply["parent_header"].get("msg_id") == message["header"]["msg_id"]
            if mine and reply["content"].get("execution_state") == "idle":
                return

    run("import torch\nfrom slimlab.classroom.check import check", "first")
    run(GOOD_BAND.replace("torch.", "toch.") + "extra = undefined\n", "work")
    run(GOOD_BAND, "work")
    run('check("90.1").score', "check")
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    results = [r["content"]["data"] for r in replies if r["msg_type"] == "execute_result"]
    assert [result["text/plain"] for result in results] == ["4"]


def test_check_outside_a_notebook_says_what_to_do_instead(own_checks, tmp_path, capsys):
    with pytest.raises(InputError, match="slimlab check 01"):
        check("90.1")
    path = write_notebook(tmp_path / "my.ipynb", "import torch", GOOD_BAND)
    assert check("90.1", file=path).score == 4
    assert "4 of 4 points" in capsys.readouterr().out
    with pytest.raises(InputError, match="hint=1 to hint=2"):
        check("90.1", file=path, hint=3)


def test_a_check_inside_a_checked_cell_checks_nothing(own_checks, tmp_path):
    cell = GOOD_BAND + 'from slimlab.classroom.check import check\ncheck("90.1").score\n'
    path = write_notebook(tmp_path / "my.ipynb", "import torch", cell)
    assert check("90.1", file=path).score == 4


def test_a_name_is_needed_for_numbers_of_ones_own(own_checks):
    student("Ada")
    assert numbers("90.1") == BAND.numbers_for("Ada", 0)
    for wrong in ("", "  ", 3):
        with pytest.raises(InputError, match="your name"):
            student(wrong)


def test_the_seed_comes_from_the_class_file_above(monkeypatch, tmp_path):
    (tmp_path / "classroom.toml").write_text("seed = 2027\n")
    (tmp_path / "exercises").mkdir()
    monkeypatch.chdir(tmp_path / "exercises")
    assert Session().class_seed() == 2027


@pytest.mark.parametrize(
    ("text", "words"),
    [("seed = ", "classroom.toml"), ("sead = 3", "'sead'"), ('seed = "x"', "seed = 'x'")],
)
def test_a_class_file_with_a_mistake_is_refused(tmp_path, text, words):
    (tmp_path / "classroom.toml").write_text(text)
    with pytest.raises(InputError, match=words):
        read_settings(tmp_path / "classroom.toml")


@pytest.fixture
def root(tmp_path):
    runner.write_notebook(solution_notebook(), tmp_path / "solutions" / "90_sample.ipynb")
    return tmp_path


def make(root, *options):
    return make_exercises.main(["--root", str(root), "--checks", str(SAMPLE / "ch90.py"), *options])


def test_students_notebooks_hold_no_solution_and_no_output(root):
    solutions = root / "solutions" / "90_sample.ipynb"
    notebook = runner.read_notebook(solutions)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="seen")]
    notebook.cells[1].execution_count = 3
    runner.write_notebook(notebook, solutions)
    assert make(root) == 0
    text = (root / "exercises" / "90_sample.ipynb").read_text()
    for gone in ("BEGIN", "END", "distance", "sum() == 5", "hides the spread", "seen"):
        assert gone not in text
    made = runner.read_notebook(root / "exercises" / "90_sample.ipynb")
    stub = "    # YOUR CODE HERE\n    raise NotImplementedError()"
    assert [cell.source.count(stub) for cell in made.cells] == [0, 0, 0, 1, 0, 2, 0, 0]
    assert made.cells[7].source.endswith("YOUR ANSWER HERE")
    assert [cell.id for cell in made.cells] == [cell.id for cell in notebook.cells]
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in made.cells)


def test_both_notebooks_carry_what_nbgrader_needs(root):
    make(root)
    expected = ["ex-90-1", "check-90-1", "ex-90-2", "check-90-2", "open-open"]
    for folder in ("solutions", "exercises"):
        cells = runner.read_notebook(root / folder / "90_sample.ipynb").cells
        marked = [cell.metadata.nbgrader for cell in cells if "nbgrader" in cell.metadata]
        assert [one.grade_id for one in marked] == expected
        assert [one.get("points") for one in marked] == [None, 4, None, 3, 0]
        assert [one.locked for one in marked] == [False, True, False, True, False]


def test_comparing_finds_a_hand_made_change_and_making_again_mends_it(root, capsys):
    assert make(root, "--check") == 1
    assert not (root / "exercises").exists()
    make(root)
    assert make(root, "--check") == 0
    path = root / "exercises" / "90_sample.ipynb"
    before = path.read_bytes()
    path.write_text(path.read_text().replace("YOUR CODE HERE", "your code here"))
    assert make(root, "--check") == 1
    assert "not what 90_sample.ipynb gives" in capsys.readouterr().out
    make(root)
    assert path.read_bytes() == before
    shutil.copy(path, root / "exercises" / "91_orphan.ipynb")
    assert make(root, "--check") == 1


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("# exercise 90.1\n### BEGIN SOLUTION\nx = 1", "without an end' in line 2 of cell 'odd'"),
        ("# exercise 90.1\nx = 1\n### END SOLUTION", "in line 3 of cell 'odd'"),
        ("# exercise 90.1\n### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION", "line 3"),
        ("# check 90.1\n### BEGIN HIDDEN TESTS\ncheck('90.1').score", "HIDDEN TESTS"),
        ("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "has no mark"),
        ("# exercise 90.9\nx = 1", "graders exist for 90.1, 90.2"),
        ("# check 90.1\ncheck('90.1')", "ends in"),
        ("# check 90.1\ncheck('90.2').score", "ends in"),
    ],
)
def test_mistakes_of_an_author_are_named_and_nothing_is_written(root, capsys, source, words):
    path = root / "solutions" / "90_sample.ipynb"
    notebook = runner.read_notebook(path)
    notebook.cells.append(new_code_cell(source, id="odd"))
    runner.write_notebook(notebook, path)
    before = path.read_bytes()
    assert make(root) == 2
    assert words in capsys.readouterr().err
    assert path.read_bytes() == before
    assert not (root / "exercises").exists()


def test_regions_keep_their_indentation_and_several_may_stand_in_a_cell():
    source = (
        "a\n  ### BEGIN SOLUTION\n  b\n  ### END SOLUTION\nc\n### BEGIN SOLUTION\n### END SOLUTION"
    )
    made = make_exercises.replace_regions(source, "SOLUTION", ["one", "two"], "cell")
    assert made == "a\n  one\n  two\nc\none\ntwo"


needs_nbgrader = pytest.mark.skipif(
    importlib.util.find_spec("nbgrader") is None,
    reason="nbgrader is not installed: python -m pip install nbgrader==0.9.6",
)


@needs_nbgrader
def test_nbgrader_makes_the_same_notebooks_and_gives_the_same_points(root, monkeypatch):
    make(root)
    ours = runner.read_notebook(root / "exercises" / "90_sample.ipynb")
    solved = runner.read_notebook(root / "solutions" / "90_sample.ipynb")
    course = root / "course"
    (course / "source" / "ps1").mkdir(parents=True)
    shutil.copy(root / "solutions" / "90_sample.ipynb", course / "source" / "ps1")
    # nbgrader calls alembic by name
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    for name, value in {"PATH": path, "SLIMLAB_CHECKS": str(SAMPLE)}.items():
        monkeypatch.setenv(name, value)

    def nbgrader(*arguments):
        command = [sys.executable, "-m", "nbgrader", *arguments]
        done = subprocess.run(command, cwd=course, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]

    nbgrader("generate_assignment", "ps1")
    release = runner.read_notebook(course / "release" / "ps1" / "90_sample.ipynb")
    assert [cell.source for cell in release.cells] == [cell.source for cell in ours.cells]
    edits = {"good": ("", ""), "half": ("values.max() -", "values.max() +"), "blank": None}
    for name, edit in edits.items():
        handed = copy.deepcopy(release)
        for cell, full in zip(handed.cells, solved.cells):
            if edit and cell.metadata.get("nbgrader", {}).get("solution"):
                cell.source = full.source.replace(*edit)
        runner.write_notebook(handed, course / "submitted" / name / "ps1" / "90_sample.ipynb")
    nbgrader("autograde", "ps1")
    nbgrader("export")
    lines = (course / "grades.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    assert {row["student_id"]: float(row["raw_score"]) for row in rows} == {
        "good": 7.0,
        "half": 5.0,
        "blank": 0.0,
    }


def test_a_notebook_of_markdown_alone_is_left_as_it_is():
    notebook = new_notebook(cells=[new_markdown_cell("# words")])
    assert make_exercises.student_version(notebook) == notebook
    assert json.loads(nbformat.writes(notebook))["cells"][0]["source"] == ["# words"]
