"""The house rules of slimlab, each checked, and each check shown to fail on a broken module."""

from pathlib import Path

import layout
import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "slimlab"
MODULES = layout.modules(PACKAGE)


def test_modules_import_only_from_rooms_that_come_before_them():
    print("order:", ", ".join(layout.ORDER))
    assert layout.import_problems(PACKAGE) == []


def test_modules_import_each_other_in_no_circle():
    assert layout.import_cycles(PACKAGE) == []


def test_modules_and_functions_fit_a_screen():
    assert [text for path in MODULES for text in layout.size_problems(path)] == []


def test_public_things_have_docstrings_that_name_every_parameter():
    assert [text for path in MODULES for text in layout.docstring_problems(path)] == []


def test_the_words_are_those_of_the_field():
    assert [text for path in MODULES for text in layout.word_problems(path, PACKAGE)] == []


def test_init_files_hold_a_docstring_and_nothing_that_runs():
    inits = [path for path in MODULES if path.name == "__init__.py"]
    assert [text for path in inits for text in layout.init_problems(path)] == []


def test_every_folder_of_python_files_is_a_package():
    folders = {path.parent for path in MODULES}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.fixture
def package(tmp_path):
    """An empty package in which a test writes broken modules."""
    folder = tmp_path / "slimlab"
    for name in ("", "text", "model"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text('"""Say."""\n')
    return folder


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from slimlab.comm.base import Communicator", "comes later"),
        ("def f():\n    import slimlab.cli", "comes later"),
        ("from slimlab import show", "comes later"),
        ("import matplotlib.pyplot as plt", "may be imported in show only"),
        ("from mpi4py import MPI", "may be imported in comm, doctor only"),
        ("import nbformat", "may be imported in classroom only"),
        ("from . import attention", "write the full name"),
        ("from torch import *", "write the full name"),
    ],
)
def test_wrong_imports_are_found(package, source, expected):
    (package / "model" / "heads.py").write_text(source)
    (problem,) = layout.import_problems(package)
    assert expected in problem


def test_a_room_without_a_place_in_the_order_is_found(package):
    (package / "extras.py").write_text("")
    assert "no place in the order" in layout.import_problems(package)[0]


def test_a_circle_of_imports_is_found(package):
    (package / "model" / "a.py").write_text("from slimlab.model import b")
    (package / "model" / "b.py").write_text("from slimlab.model.c import x")
    (package / "model" / "c.py").write_text("def f():\n    from slimlab.model.a import y")
    (circle,) = layout.import_cycles(package)
    assert circle.count("->") == 3


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Say."""\ndef f(width):\n    """Return it."""', "does not name ['width']"),
        ('"""Say."""\ndef f(*rest, key=1):\n    """Take rest."""', "does not name ['key']"),
        ('"""Say."""\nclass A:\n    def __init__(self, n):\n        pass', "A has no docstring"),
        (
            '"""Say."""\nclass A:\n    """Hold it."""\n    def __init__(self, n):\n        pass',
            "A.__init__ does not name ['n']",
        ),
        ('"""Say."""\ndef f():\n    return 1', "f has no docstring"),
        ("x = 1", "no docstring"),
    ],
)
def test_missing_docstrings_and_parameters_are_found(package, source, expected):
    path = package / "config.py"
    path.write_text(source)
    assert expected in layout.docstring_problems(path)[0]


def test_private_helpers_and_constructors_described_at_their_class_need_no_docstring(package):
    path = package / "config.py"
    path.write_text(
        '"""Say."""\ndef _f(x):\n    pass\n\n\n'
        'class A:\n    """Hold n."""\n\n    def __init__(self, n):\n        self.n = n\n'
    )
    assert layout.docstring_problems(path) == []


@pytest.mark.parametrize("line", ["comm.allreduce(x)", "peak_flops = 3", "self.n_embd = 8"])
def test_words_of_a_private_dialect_are_found(package, line):
    path = package / "config.py"
    path.write_text(line)
    assert len(layout.word_problems(path, package)) == 1


@pytest.mark.parametrize("line", ["comm.all_reduce(x)", "peak_flop_per_s = 3", "comm.Allreduce"])
def test_words_of_the_field_are_not(package, line):
    path = package / "config.py"
    path.write_text(line)
    assert layout.word_problems(path, package) == []


def test_long_modules_and_functions_are_found(package):
    path = package / "config.py"
    path.write_text("def f():\n" + "    x = 1\n" * 60 + "\n" * 300)
    assert len(layout.size_problems(path)) == 2


@pytest.mark.parametrize("source", ['"""Say."""\nx = 1', '"""Say."""\nimport os', "", "x = 1"])
def test_init_files_that_run_something_are_found(package, source):
    path = package / "model" / "__init__.py"
    path.write_text(source)
    assert layout.init_problems(path)
