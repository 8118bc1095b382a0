"""Figures of data parallelism show whose sample is whose and every number, and refuse the rest."""

import pytest
from matplotlib.colors import to_hex

from slimlab import show
from slimlab.config import InputError
from slimlab.show.style import COLOURS, GREEN, GREY, ORANGE

ROWS = {"step 0": [1, None, 0], "step 1": [0, 1, None]}


def test_a_cell_has_the_number_and_the_colour_of_its_rank():
    axes = show.shards_figure(ROWS, "who reads what").axes[0]
    found = {(text.get_position()): text.get_text() for text in axes.texts}
    assert found == {(0, 0): "1", (1, 0): "–", (2, 0): "0", (0, 1): "0", (1, 1): "1", (2, 1): "–"}
    colours = [to_hex(cell.get_facecolor()) for cell in axes.patches[:3]]
    assert colours == [COLOURS[1].lower(), "#ffffff", COLOURS[0].lower()]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ROWS)
    assert (axes.get_title(), axes.get_xlabel()) == ("who reads what", "sample")


@pytest.mark.parametrize("rows", [{}, {"step 0": []}, {"step 0": [0], "step 1": [0, 1]}])
def test_rows_that_do_not_fit_are_refused(rows):
    with pytest.raises(InputError, match="sample"):
        show.shards_figure(rows)


def test_lines_marks_and_ideal_hold_their_numbers():
    line, marks, ideal = ([1, 2, 4], [1.0, 1.5, 3.0]), ([1, 4], [1.0, 3.25]), ([1, 4], [1, 4])
    figure = show.scaling_figure(
        {"strong": line}, {"strong": marks}, "gain", "title", ideal={"one for one": ideal}
    )
    (axes,) = figure.axes
    drawn = [tuple(map(list, one.get_data())) for one in axes.lines]
    assert drawn == [ideal, line, marks]
    assert axes.lines[1].get_color() == axes.lines[2].get_color()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("ranks", "gain", "title")
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["one for one", "strong"]
    assert legend.get_title().get_text() == "lines: predicted, marks: measured"
    assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.parametrize("columns", [([1, 2], [1.0]), ([1, 2], [1.0, 0.0]), ([0], [1.0])])
def test_numbers_that_cannot_be_drawn_are_refused(columns):
    with pytest.raises(InputError, match="strong"):
        show.scaling_figure({"strong": columns}, {}, "gain")
    with pytest.raises(InputError, match="at least one line"):
        show.scaling_figure({}, {}, "gain")


SPANS = [(0.75, 1.0), (1.0, 1.5), (1.5, 2.5)]


def test_exchanges_are_hidden_as_long_as_the_rank_computes():
    axes = show.overlap_figure({"a": (2.0, SPANS), "b": (2.0, [])}, "title").axes[0]
    bars = [
        (to_hex(one.get_facecolor()[0]), box.x0, box.x1)
        for one in axes.collections
        for box in [one.get_paths()[0].get_extents()]
    ]
    hidden, seen = to_hex(GREEN), to_hex(ORANGE)
    computing = (to_hex(GREY), 0.0, 2.0)
    assert bars == [
        computing,
        (hidden, 0.75, 1.0),
        (hidden, 1.0, 1.5),
        (hidden, 1.5, 2.0),
        (seen, 2.0, 2.5),
        computing,
    ]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", " 2.5 s", " 2 s"]
    assert (axes.get_xlabel(), axes.get_title()) == ("time (s)", "title")


@pytest.mark.parametrize("ways", [{}, {"a": (1.0, [(0.5, 0.25)])}, {"a": (1.0, [(-1.0, 0.25)])}])
def test_exchanges_out_of_order_are_refused(ways):
    with pytest.raises(InputError, match="at least one way|begin at 0"):
        show.overlap_figure(ways)
