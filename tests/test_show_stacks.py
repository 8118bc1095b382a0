"""Stacked bars hold the sizes they were given, part on part, with their totals."""

import pytest

from slimlab import show
from slimlab.config import InputError

STACKS = {"all kept": {"weights": 2.0, "layers": 5.0}, "again": {"weights": 2.0, "inputs": 1.0}}


def pieces(figure):
    """(row, left, width) of every piece that can be seen, by part."""
    axes = figure.axes[0]
    return {
        bars.get_label(): [
            (round(one.get_y() + one.get_height() / 2), one.get_x(), one.get_width())
            for one in bars
            if one.get_width()
        ]
        for bars in axes.containers
    }


def test_each_part_begins_where_the_one_before_ends():
    assert pieces(show.stacked_bars(STACKS, "MiB")) == {
        "weights": [(0, 0.0, 2.0), (1, 0.0, 2.0)],
        "layers": [(0, 2.0, 5.0)],
        "inputs": [(1, 2.0, 1.0)],
    }


def test_totals_stand_behind_the_bars_inside_the_axes_and_labels_beside_them():
    axes = show.stacked_bars(STACKS, "MiB", number_format="{:.1f}").axes[0]
    written = {text.get_text().strip(): text.get_position() for text in axes.texts}
    assert written == {"7.0": (7.0, 0), "3.0": (3.0, 1)}
    assert axes.get_xlim()[1] > 7.5  # room for the number behind the longest
    assert [label.get_text() for label in axes.get_yticklabels()] == list(STACKS)
    assert axes.get_xlabel() == "MiB"


def test_parts_differ_in_colour_or_shade():
    many = {f"part {k}": 1.0 for k in range(12)}
    axes = show.stacked_bars({"all": many}, "bytes").axes[0]
    looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in axes.containers]
    assert len(set(looks)) == 12


@pytest.mark.parametrize(
    ("stacks", "words"),
    [({}, "at least one bar"), ({"a": {}}, "at least one bar"), ({"a": {"b": -1}}, "at least 0")],
)
def test_bad_sizes_are_refused(stacks, words):
    with pytest.raises(InputError, match=words):
        show.stacked_bars(stacks, "bytes")
