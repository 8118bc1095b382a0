"""Committed notebooks are executed, tidy and built like a chapter; each rule is shown to bite.

That stored outputs are what the code gives today is checked by nbval:
pytest --nbval --nbval-cell-timeout=300 chapters solutions
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import layout
import nbformat
import notebooks
import pytest
import rules
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from slimlab.classroom import runner
from slimlab.config import InputError

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
LIBRARY = layout.public_names(ROOT / "slimlab")
PARTS = "Goals;The idea;The maths;The smallest code;The library code;A prediction tested;Exercises"


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def test_there_are_chapters_and_a_solution_for_each_that_has_exercises():
    assert CHAPTERS
    assert {path.name for path in SOLUTIONS} <= {path.name for path in CHAPTERS}


@pytest.mark.parametrize("path", [*CHAPTERS, *SOLUTIONS], ids=name_of)
def test_a_notebook_is_executed_and_tidy(path):
    assert rules.problems(runner.read_notebook(path)) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=name_of)
def test_a_chapter_has_eight_parts_short_cells_and_no_name_of_the_library(path):
    assert rules.chapter_problems(runner.read_notebook(path), LIBRARY) == []


@pytest.fixture
def good():
    """An executed, tidy notebook in eight parts."""
    last = "What the documents say, and what production systems do"
    cells = [new_markdown_cell(f"## {part}") for part in [*PARTS.split(";"), last]]
    code = new_code_cell("def tiny_sum(a, b):\n    return a + b\n\n\ntiny_sum(1, 2)", id="tiny-sum")
    code.execution_count = 1
    code.outputs = [
        new_output("stream", name="stdout", text="3\n"),
        new_output("execute_result", {"text/plain": "3"}, execution_count=1),
    ]
    notebook = new_notebook(cells=[*cells, code])
    rules.tidy(notebook)
    return notebook


def test_a_good_notebook_breaks_no_rule(good):
    assert rules.problems(good) == []
    assert rules.chapter_problems(good, {}) == []


def error_output():
    return new_output("error", ename="ValueError", evalue="no", traceback=["no"])


def break_count(notebook):
    notebook.cells[-1].execution_count = None


def break_order(notebook):
    notebook.cells[-1].execution_count = 7


def break_error(notebook):
    notebook.cells[-1].outputs.append(error_output())


def break_stderr(notebook):
    output = new_output("stream", name="stderr", text="a warning")
    notebook.cells[-1].outputs.append(output)


def break_address(notebook):
    notebook.cells[-1].outputs[0].text = "<Head object at 0x7f41ee079000>"


def break_path(notebook):
    notebook.cells[-1].outputs[0].text = 'File "/home/ada/slimlab/x.py"'


def break_path_in_code(notebook):
    notebook.cells[-1].source = 'open("/home/ada/corpus.txt")'


def break_metadata(notebook):
    notebook.cells[-1].metadata["execution"] = {"iopub.status.busy": "2026-11-21T10:00:00"}


def break_kernel(notebook):
    notebook.metadata.kernelspec.name = "my-venv"


def break_streams(notebook):
    stream = new_output("stream", name="stdout", text="3\n")
    notebook.cells[-1].outputs = [stream, copy.deepcopy(stream)]


def break_ids(notebook):
    notebook.cells[0]["id"] = notebook.cells[1]["id"]


def break_image(notebook):
    data = {"image/png": "A" * 400_000}
    notebook.cells[-1].outputs.append(new_output("display_data", data))


def break_format(notebook):
    notebook.nbformat_minor = 4


def break_empty(notebook):
    notebook.cells.append(new_markdown_cell("", id="nothing"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (break_count, "not executed: code cell 1 of 1"),
        (break_order, "not executed from top to bottom"),
        (break_error, "a stored error: ValueError: no"),
        (break_stderr, "text on standard error"),
        (break_address, "an object's address"),
        (break_path, "an absolute path in the output"),
        (break_path_in_code, "an absolute path in the code"),
        (break_metadata, "untidy: metadata"),
        (break_kernel, "untidy: the notebook's metadata"),
        (break_streams, "untidy: printed text in several pieces"),
        (break_ids, "is used twice"),
        (break_image, "an image of 300000 bytes"),
        (break_format, "format 4.4"),
        (break_empty, "untidy: it is empty"),
    ],
)
def test_a_broken_notebook_is_rejected(good, damage, expected):
    damage(good)
    found = rules.problems(good)
    assert len(found) == 1, found
    assert expected in found[0]


def test_an_error_may_be_stored_where_the_cell_says_so(good):
    break_error(good)
    good.cells[-1].metadata["tags"] = ["raises-exception"]
    assert rules.problems(good) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n" * 26, "26 lines, at most 25"),
        ("def causal_mask(n):\n    return n", "causal_mask is defined in slimlab.model.masks too"),
        ("%timeit 1", "a magic or a shell command"),
        ("!ls", "a magic or a shell command"),
        ("x = 1  # as C012 says", "C012 means nothing to a reader"),
    ],
)
def test_a_cell_that_does_not_belong_into_a_chapter_is_rejected(good, source, expected):
    good.cells[-1].source = source.rstrip("\n")
    found = rules.chapter_problems(good, {"causal_mask": "slimlab.model.masks"})
    assert any(expected in text for text in found), found


def test_a_chapter_without_one_of_the_eight_parts_is_rejected(good):
    for number in range(8):
        less = copy.deepcopy(good)
        del less.cells[number]
        (problem,) = rules.chapter_problems(less, {})
        assert f"no section for part {number + 1}" in problem


def test_tidying_mends_what_differs_from_run_to_run(good):
    expected = copy.deepcopy(good)
    for damage in (break_order, break_metadata, break_kernel, break_format):
        damage(good)
    stream, result = good.cells[-1].outputs
    first, second = copy.deepcopy(stream), copy.deepcopy(stream)
    first.text, second.text = "3", "\n"
    good.cells[-1].outputs = [first, second, result]
    good.cells[0]["id"] = "8f14e45f"
    rules.tidy(good)
    assert good == expected


def test_tidying_twice_changes_nothing(good):
    expected = copy.deepcopy(good)
    rules.tidy(good)
    assert good == expected


def test_equal_cells_get_different_names():
    notebook = new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("x = 1")])
    rules.tidy(notebook)
    first, second = (cell.id for cell in notebook.cells)
    assert second == f"{first}-2"


TEXT = """# %% [markdown] id="title"
# # A chapter
#
# Where $x^2$ stands.

# %% id="twice-three" tags=["nbval-ignore-output"]
x = 3
print(2 * x)

# %%
x
"""


def test_text_goes_to_a_notebook_and_back_unchanged():
    notebook = notebooks.from_text(TEXT)
    names = [cell.id for cell in notebook.cells]
    assert names[:2] == ["title", "twice-three"]
    assert names[2].startswith("cell-")
    assert notebook.cells[1].metadata == {"tags": ["nbval-ignore-output"]}
    assert notebooks.to_text(notebook) == TEXT


@pytest.mark.parametrize("name", ["Rows Sum", "rows_sum", "twice-three"])
def test_cell_names_that_cannot_be_used_are_refused(name):
    with pytest.raises(SystemExit):
        notebooks.from_text(TEXT.replace('id="title"', f'id="{name}"'))


def build(source, target):
    tool = str(ROOT / "tools" / "notebooks.py")
    command = [sys.executable, tool, "build", str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_build_executes_in_an_empty_folder_with_a_quiet_environment(tmp_path):
    source, target = tmp_path / "a.py", tmp_path / "01_a.ipynb"
    source.write_text(
        "# %%\nimport os\n\nimport slimlab\n\n"
        'print(os.listdir(), os.environ["SLIMLAB_BATCH"], slimlab.__name__)'
    )
    done = build(source, target)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(target, 4)
    assert notebook.cells[0].outputs[0].text == "[] 1 slimlab\n"
    assert rules.problems(notebook) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01_a.ipynb", "a.py"]


def test_build_that_fails_names_the_cell_and_the_line_and_writes_nothing(tmp_path):
    source, target = tmp_path / "a.py", tmp_path / "01_a.ipynb"
    source.write_text('# %%\nx = 3\n\n# %% id="boom"\ny = 1\nassert x == 4, "three is not four"')
    done = build(source, target)
    assert done.returncode == 1
    assert "01_a: cell 2 (boom), line 2 failed" in done.stderr
    assert "AssertionError: three is not four" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.py"]


def run_nbval(folder):
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-cell-timeout=60"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)


def test_a_stale_notebook_is_rejected_and_a_fresh_one_is_not(good, tmp_path):
    good.cells[-1].outputs = good.cells[-1].outputs[1:]
    nbformat.write(good, tmp_path / "01_fresh.ipynb")
    good.cells[-1].source = good.cells[-1].source.replace("1, 2", "1, 3")
    nbformat.write(good, tmp_path / "02_stale.ipynb")
    done = run_nbval(tmp_path)
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "02_stale" in done.stdout


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Calls tools/notebooks.py as a command line does, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["notebooks.py", *arguments])
        return notebooks.main()

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "a.py"], "1 paths"),
        (["build", "missing.py", "b.ipynb"], "missing.py: No such file"),
        (["build", "latin1.py", "b.ipynb"], "byte 0xe9 at offset 3"),
        (["check", "junk.ipynb"], "which is not one"),
    ],
)
def test_the_tool_tells_bad_input_without_a_traceback(tool, capsys, arguments, message):
    Path("latin1.py").write_bytes(b"caf\xe9")
    Path("junk.ipynb").write_text("junk")
    assert tool(*arguments) == 1
    assert message in capsys.readouterr().err


def test_a_broken_notebook_does_not_keep_the_tool_from_the_next(tool, good, capsys):
    Path("1.ipynb").write_text("junk")
    break_count(good)
    nbformat.write(good, "2.ipynb")
    assert tool("check", "1.ipynb", "2.ipynb") == 1
    told = capsys.readouterr()
    assert "1.ipynb, which is not one" in told.err
    assert "2.ipynb: not executed" in told.out


def write_cells(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)


def test_a_failing_run_keeps_what_was_executed_and_says_where_it_stopped(tmp_path):
    write_cells(tmp_path / "03_x.ipynb", "print('first')", "y = 0\n1 / y", "print('third')")
    seen = []
    report = runner.run_notebook(
        tmp_path / "03_x.ipynb", tmp_path / "out.ipynb", lambda *call: seen.append(call)
    )
    assert seen == [("03_x", 1, 3), ("03_x", 2, 3)]
    failure = report.failure
    assert (failure.cell_number, failure.line_number, failure.source_line) == (2, 2, "1 / y")
    assert failure.error == "ZeroDivisionError: division by zero"
    assert "change:" in str(failure)
    kept = nbformat.read(report.output, 4)
    assert kept.cells[0].outputs[0].text == "first\n"
    assert kept.cells[2].outputs == []


def test_a_cell_that_never_ends_is_interrupted_and_reported(tmp_path):
    write_cells(tmp_path / "04_x.ipynb", "while True:\n    pass")
    report = runner.run_notebook(
        tmp_path / "04_x.ipynb", tmp_path / "out.ipynb", lambda *call: None, cell_timeout_s=2
    )
    assert "ran out of time" in report.failure.change


def test_a_kernel_that_dies_is_reported(tmp_path):
    write_cells(tmp_path / "05_x.ipynb", "import os\nos._exit(3)")
    report = runner.run_notebook(
        tmp_path / "05_x.ipynb", tmp_path / "out.ipynb", lambda *call: None, cell_timeout_s=20
    )
    assert "the kernel died" in report.failure.change
    assert (tmp_path / "out.ipynb").is_file()


def test_the_book_is_found_from_below_and_a_foreign_folder_is_told_what_to_do(
    tmp_path, monkeypatch
):
    (tmp_path / "chapters").mkdir()
    write_cells(tmp_path / "chapters" / "01_x.ipynb", "1")
    assert runner.find_root(tmp_path / "chapters") == tmp_path
    monkeypatch.setattr(runner, "SOURCE_FOLDER", tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds chapters/"):
        runner.find_root(tmp_path.parent)


def test_chapters_are_found_by_number_name_and_path(tmp_path):
    (tmp_path / "chapters").mkdir()
    path = tmp_path / "chapters" / "01_x.ipynb"
    write_cells(path, "1")
    write_cells(tmp_path / "chapters" / "02_y.ipynb", "1")
    for name in ("01", "01_x", "01_x.ipynb", str(path)):
        assert runner.find_chapter(name, tmp_path) == path
    with pytest.raises(InputError, match="01_x, 02_y"):
        runner.find_chapter("07", tmp_path)


CELL = '{"cell_type": "code", "execution_count": null, "metadata": {}, "outputs": [], "source": %s}'
BOOK = '{"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "no json", "", "[]", "null", "5", "{}", '{"nbformat": 4}', '{"nbformat": 99}', "[" * 10**5,
        BOOK % "null", BOOK % "[{}]", BOOK % '["x"]', BOOK % f"[{CELL % 'null'}]",
        f"<<<<<<< HEAD\n{BOOK % '[]'}",
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_notebook_is_refused(tmp_path, text):
    path = tmp_path / "x.ipynb"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.ipynb, wh"):
        runner.read_notebook(path)


def test_half_a_surrogate_pair_survives_in_a_notebook(tmp_path):
    path = tmp_path / "x.ipynb"
    path.write_text(BOOK % f"[{CELL % json.dumps('x = 1  # ' + chr(0xD800))}]")
    runner.write_notebook(runner.read_notebook(path), path)
    assert runner.read_notebook(path).cells[0].source == "x = 1  # \ud800"


def test_a_place_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    write_cells(tmp_path / "06_x.ipynb", "1")
    (tmp_path / "file").write_text("in the way")
    seen = []
    with pytest.raises(InputError, match="a folder to write in"):
        runner.run_notebook(
            tmp_path / "06_x.ipynb", tmp_path / "file" / "out.ipynb", lambda *call: seen.append(1)
        )
    assert seen == []


def test_an_interrupt_from_the_keyboard_leaves_the_notebook_as_it_was(tmp_path):
    path = tmp_path / "07_x.ipynb"
    write_cells(path, "1", "2")
    before = path.read_bytes()

    def interrupt(chapter, number, total):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_notebook(path, path, interrupt)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["07_x.ipynb"]


def test_a_kernel_that_does_not_start_is_told_with_the_command_that_shows_why(
    tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'ipykernel_launcher' in sys.orig_argv: os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    write_cells(tmp_path / "08_x.ipynb", "1")
    with pytest.raises(InputError, match="-m ipykernel_launcher"):
        runner.run_notebook(tmp_path / "08_x.ipynb", tmp_path / "out.ipynb", lambda *call: None)
    assert not (tmp_path / "out.ipynb").exists()
