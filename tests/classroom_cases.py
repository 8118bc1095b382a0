"""The sample exercises 90.1 and 90.2 of the classroom's tests, and notebooks made from cells."""

import json
from pathlib import Path

import jupytext

from slimlab.classroom.exercise import load_exercises
from slimlab.classroom.submission import Cell, collect

SAMPLE = Path(__file__).resolve().parent / "sample"
EXERCISES = load_exercises(SAMPLE / "ch90.py")
BAND, MEAN = EXERCISES["90.1"], EXERCISES["90.2"]

GOOD_BAND = """# exercise 90.1
def band_mask(T, width):
    if width < 1:
        raise ValueError(width)
    d = torch.arange(T)[:, None] - torch.arange(T)[None, :]
    return (d >= 0) & (d < width)
"""
GOOD_MEAN = """# exercise 90.2
def mean_of(values):
    return values.mean()


def spread_of(values):
    return (values.max() - values.min()).item()
"""


def solution_notebook():
    """The sample solutions as a notebook with readable cell ids."""
    notebook = jupytext.reads((SAMPLE / "90_sample.txt").read_text(), fmt="py:percent")
    for cell in notebook.cells:
        cell["id"] = cell.metadata.pop("id")
    return notebook


def submit(*sources, exercise=BAND):
    """The submission that cells with these sources make for `exercise`."""
    cells = [Cell(f"cell {k}", source) for k, source in enumerate(sources, start=1)]
    return collect(cells, exercise.number)


def write_notebook(path, *sources):
    """Write code cells as a notebook file, as a student's Jupyter would."""
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**empty, "id": f"c{k}", "source": source} for k, source in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook))
    return path
