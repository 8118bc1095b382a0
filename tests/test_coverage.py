"""The tables of what is covered are true: the cells exist, ran, assert, and can fail.

That each perturbation makes its cell fail is tested while nbval runs the chapters, by
tools/perturb_plugin.py; here it is shown on a small chapter that the plugin notices what is wrong.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import covered
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
ITEMS = covered.load(CHAPTERS / "coverage")
# Counted from 1; item 6 belongs to the chapter on SlimPajama from end to end.
REQUIRED = {f"C{number:03}" for number in range(1, 73)} - {"C006"}
REQUIRED |= {f"C{number:03}" for number in [*range(83, 139), *range(143, 162)]}
REQUIRED |= {
    f"E{number:02}"
    for number in [*range(1, 6), 9, *range(11, 47), 49, 50, *range(56, 85), *range(86, 94)]
}


def test_every_item_points_at_cells_that_ran_and_assert():
    print(covered.counts(ITEMS))
    assert covered.problems(ITEMS, CHAPTERS) == []


def test_no_item_is_missing():
    assert sorted(REQUIRED - {item.id for item in ITEMS}) == []


def test_at_least_a_third_of_the_asserted_items_can_be_made_to_fail():
    numbers = covered.counts(ITEMS)
    assert numbers["perturbed"] >= covered.MIN_PERTURBED_SHARE * numbers["asserted"] > 0


@pytest.fixture
def book(tmp_path):
    """Write a chapter of six cells and a table with the given items; return its folder."""
    cells = [
        ("code", "setup", "factor = 2\ndef double(x):\n    return factor * x"),
        ("code", "twice", "assert double(3) == 6"),
        ("code", "idle", "print(double(1))"),
        ("markdown", "story", "Written in 2017 (Vaswani et al.,\narXiv:1706.03762)."),
        ("code", "list", "calls = ['once']\nprint(calls)"),
        (
            "code",
            "last",
            "calls.append('twice')\nassert calls == ['once', 'twice'] and factor == 2",
        ),
    ]
    notebook = nbformat.v4.new_notebook()
    for number, (kind, name, source) in enumerate(cells, start=1):
        new_cell = getattr(nbformat.v4, f"new_{kind}_cell")
        cell = new_cell(source, id=name)
        if kind == "code":
            cell.execution_count = number
        notebook.cells.append(cell)
    notebook.cells[2].execution_count = None
    printed = nbformat.v4.new_output("stream", name="stdout", text="['once']\n")
    notebook.cells[4].outputs = [printed]
    nbformat.write(notebook, tmp_path / "01_x.ipynb")
    (tmp_path / "coverage").mkdir()

    same = {"title": "Twice", "question": "What is twice 3?", "answer": "6"}

    def write(*items, **keys):
        lines = []
        for number, item in enumerate(items or [keys], start=1):
            item = {"id": f"C{number}", **same, **item}
            lines += ["[[item]]", *(f"{key} = {json.dumps(value)}" for key, value in item.items())]
        text = "\n".join(lines)
        (tmp_path / "coverage" / "01_x.toml").write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"cell": "twice"}, None),
        ({"cell": ["setup", "twice"]}, None),
        ({"cell": "thrice"}, "no cell 'thrice'"),
        ({"cell": "setup"}, "no assertion in setup"),
        ({"cell": ["twice", "idle"]}, "cell 'idle' was not executed"),
        ({"cell": "story"}, "cell 'story' is text"),
        ({}, "names no cell"),
        ({"cell": "twice", "question": "Twice"}, "the question is not one"),
        ({"cell": "twice", "answer": " "}, "the question has no answer"),
        ({"cell": "twice", "chapter": "09_y"}, "the chapter does not exist"),
        ({"cell": "twice", "perturb": "x = 1", "perturb_at": "setup"}, "is none of its cells"),
        ({"background": True}, "background without a source"),
        ({"background": True, "source": "arXiv:1234.5678"}, "does not quote the source"),
        ({"background": True, "source": "Vaswani et al., arXiv:1706.03762"}, None),
    ],
)
def test_a_table_that_is_not_true_is_rejected(book, keys, expected):
    folder = book(**keys)
    found = covered.problems(covered.load(folder / "coverage"), folder)
    if expected is None:
        assert found == []
    else:
        assert any(expected in text for text in found), found


PERTURBATIONS = [
    ("factor = 3", "caught"),
    ("double = lambda x: x", "caught"),
    ("unused = 1", "passes although"),
    ("double = None", "TypeError instead of AssertionError"),
    ("1 / 0", "the perturbation itself fails"),
    ("import os; os._exit(0)", "the process ended"),
]


def test_the_tool_perturbs_a_chapter_and_tells_what_happened(book):
    items = [{"cell": "twice", "perturb": perturb} for perturb, _ in PERTURBATIONS[:-1]]
    folder = book(*items, {"cell": "last", "perturb": "calls = []"})
    command = [sys.executable, str(ROOT / "tools" / "covered.py"), "perturb", "01_x", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told = list(json.loads(done.stdout).values())
    wanted = [text for _, text in PERTURBATIONS[:-1]] + ["caught"]
    assert [words in text for words, text in zip(wanted, told, strict=True)] == [True] * 6, told


def run_nbval(folder):
    """Run nbval on a chapter as `make test` does, with this project's conftest.py."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-cell-timeout=60",
        "-p",
        "conftest",
    ]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command += [str(folder), "--color=no", "-q"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, cwd=folder, env=environment
    )
    return done.stdout


def test_a_perturbation_must_make_the_cell_fail_by_its_assertion(book):
    """The cells before and after are run once and pass; in-place changes of a copy stay there."""
    items = [{"cell": "twice", "perturb": perturb} for perturb, _ in PERTURBATIONS]
    append = {"cell": "last", "perturb": "calls.append('thrice')"}
    print_it = {"cell": "last", "perturb": "print('seen'); factor = 3"}
    told = run_nbval(book(*items, append, print_it))
    assert "8 perturbations were tried" in told
    assert "1 failed, 4 passed" in told
    for number, (_, words) in enumerate(PERTURBATIONS, start=1):
        seen = f"C{number} (Twice): " in told
        assert seen == (words != "caught"), told
        assert words == "caught" or any(
            words in line for line in told.splitlines() if f"C{number} (Twice): " in line
        )


def test_the_page_lists_topic_question_and_folded_answer_under_the_chapter():
    item = covered.Item("C1", "Rows < sums", "01_x", ("a",), "Why do rows sum to 1?", "Division.")
    page = covered.page([item], {"01_x": "Attention"})
    assert "## [Attention](chapters/01_x.ipynb)" in page
    assert "\nRows &lt; sums\n" in page
    assert "<details><summary>Why do rows sum to 1?</summary>Division.</details>" in page
    assert "C1" not in page
