"""Finding a student's work in notebooks, scripts and kernels, whatever else they hold."""

import json

import pytest

from slimlab.classroom.submission import (
    Cell,
    collect,
    latest_cells,
    mark_of,
    parsable,
    read_cells,
    student_named,
)
from slimlab.config import InputError

from classroom_cases import GOOD_BAND, submit, write_notebook  # isort: skip


@pytest.mark.parametrize(
    ("source", "grade_id", "number"),
    [
        ("# exercise 1.1\nx = 1", "", "1.1"),
        ("\n\n#  Exercise 12.3: a window\nx = 1", "", "12.3"),
        ("%%time\n# exercise 1.1\nx = 1", "", "1.1"),
        ("x = 1", "ex-1-1", "1.1"),
        ("x = 1", "ex-1-1-2", "1.1"),
        ("#Exercise 1.1\nx = 1", "", "1.1"),
        ("# exercise 1.1 (mine)\nx = 1", "", "1.1"),
        ("# EXERCISE 1.1 ★★\r\nx = 1", "", "1.1"),
        ("# exercise 1.1 took me an hour\nx = 1", "", None),
        ("x = 1\n# exercise 1.1", "", None),
        ("# exercise 1.11x", "", None),
        ("# check 1.1", "check-1-1", None),
        ("", "", None),
        ("# exercise 1.2\nx = 1", "ex-1-1", "1.2"),
    ],
)
def test_a_cell_is_marked_by_its_first_line_or_else_by_its_grade_id(source, grade_id, number):
    assert mark_of(Cell("cell 1", source, grade_id)) == number


def test_marked_cells_are_joined_in_order_and_used_imports_added():
    found = submit(
        "import torch, os\nprint('big work')",
        "# exercise 90.1\nhelper = 1",
        "import json",
        "from math import sqrt as root\nimport numpy.linalg",
        "# exercise 90.2\nfrom random import choice\nother = 2",
        "# exercise 90.1\ny = root(torch.ones(1)); numpy; choice",
    )
    assert [cell.source.splitlines()[1][:6] for cell in found.cells] == ["helper", "y = ro"]
    assert found.imports.splitlines() == [
        "import torch, os",
        "from math import sqrt as root",
        "import numpy.linalg",
        "from random import choice",
    ]


def test_a_syntax_error_in_another_cell_changes_nothing():
    found = submit("import torch", "def broken(:", GOOD_BAND)
    assert found.problem is None
    assert found.imports == "import torch"


def test_a_syntax_error_in_the_marked_cell_is_named_with_its_line():
    found = submit("import torch", "# exercise 90.1\ndef f():\n    return (1")
    assert found.problem.saw.startswith("cell 2 cannot be read as Python: ")
    assert found.problem.look == "line 3 of cell 2: return (1"


def test_null_bytes_are_a_problem_and_no_crash():
    assert "cannot be read" in submit("# exercise 90.1\nx = '\0'").problem.saw


def test_magics_are_blanked_out_of_cells_that_hold_them():
    source, error = parsable("%time x = 1\n!ls\nif True:\n    %timeit y\nx?\nz = 7 % 4")
    assert error is None
    assert source == "pass\npass\nif True:\n    pass\npass\nz = 7 % 4"
    source = "y = (7\n  % 4)"
    assert parsable(source) == (source, None)


def test_a_missing_mark_is_named():
    assert "`# exercise 90.1`" in submit("x = 1").problem.saw


def history(*sources):
    return ["", *sources]


def test_only_the_newest_form_of_a_cell_counts_in_a_kernel():
    found = latest_cells(
        history(
            "# exercise 1.1\ndef f(): return 1",
            "# exercise 1.1\ndef g(): return 1",
            "import torch",
            "# exercise 1.1\ndef f(): return 2",
            "# exercise 1.2\ndef f(): return 9",
        ),
        "1.1",
    )
    work = collect(found, "1.1")
    assert [cell.label for cell in work.cells] == ["In [2]", "In [4]"]
    assert "return 2" in work.cells[1].source


def test_a_cell_that_was_split_in_two_replaces_the_one_before():
    found = latest_cells(
        history(
            "# exercise 1.1\ndef f(): pass\ndef g(): pass",
            "# exercise 1.1\ndef f(): return 1",
            "# exercise 1.1\ndef g(): return 1",
        ),
        "1.1",
    )
    assert [cell.label for cell in collect(found, "1.1").cells] == ["In [2]", "In [3]"]


def test_a_syntax_error_that_was_mended_is_forgotten_and_a_fresh_one_is_not():
    good, bad = "# exercise 1.1\ndef f(): return 1", "# exercise 1.1\ndef f(: return 1"
    mended = collect(latest_cells(history(bad, good), "1.1"), "1.1")
    assert mended.problem is None
    assert len(mended.cells) == 1
    fresh = collect(latest_cells(history(good, bad), "1.1"), "1.1")
    assert "In [2]" in fresh.problem.saw


def test_an_older_form_that_failed_is_forgotten_although_it_defined_more():
    failed = "# exercise 1.1\nrows = undefined\ndef f(): return 1"
    good = "# exercise 1.1\ndef f(): return 2"
    found = latest_cells(history(failed, good), "1.1", failed={1})
    assert [cell.label for cell in found if cell.label != "In [0]"] == ["In [2]"]
    assert len(latest_cells(history(good, failed), "1.1", failed={2})) == 2, "the newest stays"


def test_where_the_editor_names_cells_the_newest_form_of_each_stands_in_its_place():
    first, second = "# exercise 1.1\nhelper = 1\nold = 2", "# exercise 1.1\nuse = helper"
    changed = "# exercise 1.1\nhelper = 3"
    found = latest_cells(history(first, second, changed), "1.1", {1: "a", 2: "b", 3: "a"})
    assert [cell.source for cell in collect(found, "1.1").cells] == [changed, second]


def test_an_unmarked_cell_between_runs_of_the_same_cell_keeps_one_copy():
    cell = "# exercise 1.1\nprint('only prints')"
    assert len(collect(latest_cells(history(cell, "x = 1", cell), "1.1"), "1.1").cells) == 1


def test_a_notebook_gives_its_code_cells_with_their_place(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": "# title"},
        {"cell_type": "code", "source": ["import torch\n", "x = 1"]},
        {"cell_type": "code", "source": "y", "metadata": {"nbgrader": {"grade_id": "ex-1-2"}}},
    ]
    path = tmp_path / "my.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert read_cells(path) == [
        Cell("cell 2", "import torch\nx = 1"),
        Cell("cell 3", "y", "ex-1-2"),
    ]


def test_a_percent_script_gives_its_code_cells(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(
        "import torch\n\n# %% [markdown]\n# words\n\n# %%\n# exercise 1.1\nx = 1\n"
        '# %% nbgrader={"grade_id": "ex-1-2"}\ny = 2\n'
    )
    found = read_cells(path)
    assert [mark_of(cell) for cell in found] == [None, "1.1", "1.2"]
    assert [cell.label for cell in found] == ["cell 1", "cell 3", "cell 4"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "format 4"),
        (b'{"cells": [', "format 4"),
        (b'{"worksheets": []}', "older format"),
        (b'{"cells": [\n<<<<<<< HEAD\n1\n=======\n2\n>>>>>>> other\n]}', "unfinished merge"),
        (b'{"cells": 3}', "format 4"),
        (b'{"cells": [3]}', "format 4"),
        (b'{"cells": [{"cell_type": "code", "source": 3}]}', "format 4"),
        (b"[]", "format 4"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 100_000, "format 4"),
    ],
)
def test_what_is_no_notebook_is_refused_with_its_name(tmp_path, content, words):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        read_cells(path)
    assert "broken.ipynb" in caught.value.given


def test_a_huge_file_and_a_missing_one_are_refused(tmp_path):
    path = tmp_path / "huge.ipynb"
    with path.open("wb") as file:
        file.truncate(130_000_000)
    with pytest.raises(InputError, match=r"huge\.ipynb, 130 MB"):
        read_cells(path)
    with pytest.raises(InputError, match="no file"):
        read_cells(tmp_path / "absent.ipynb")


def test_metadata_that_an_editor_emptied_is_no_obstacle(tmp_path):
    cells = [
        {"cell_type": "code", "source": "# exercise 1.1\nx = 1", "metadata": metadata}
        for metadata in (None, {"nbgrader": None}, {"colab": {}, "id": "a"})
    ]
    path = tmp_path / "my.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert len(collect(read_cells(path), "1.1").cells) == 3


def test_a_byte_order_mark_is_no_obstacle(tmp_path):
    path = write_notebook(tmp_path / "my.ipynb", "x = 1")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [cell.source for cell in read_cells(path)] == ["x = 1"]


def test_the_name_in_the_notebook_is_found():
    cells = [Cell("cell 1", 'student("Ada")'), Cell("cell 2", "def student(:"), Cell("cell 3", "x")]
    assert student_named(cells) == "Ada"
    asked = 'name = "Grace Hopper"\nif name:\n    student(name)'
    assert student_named([*cells, Cell("cell 4", asked)]) == "Grace Hopper"
    left_empty = asked.replace("Grace Hopper", "")
    assert student_named([Cell("cell 1", left_empty)]) is None
    assert student_named(cells[1:]) is None
