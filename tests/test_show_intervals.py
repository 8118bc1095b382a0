"""Each interval stands in its row, and its mark says on which side of zero it lies."""

import pytest

from slimlab import show
from slimlab.config import InputError

ROWS = {"helps": (-0.4, 0.1), "hurts": (0.3, 0.2), "unknown": (0.1, 0.2)}


def test_rows_are_in_order_and_marks_tell_the_side():
    figure = show.interval_figure(ROWS, "difference (nats)", "who helps")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ROWS)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is the uppermost
    marks = [bar.lines[0] for bar in axes.containers]
    assert [mark.get_xdata()[0] for mark in marks] == [mean for mean, _ in ROWS.values()]
    assert [mark.get_marker() for mark in marks] == ["o", "s", "D"]
    assert len({mark.get_color() for mark in marks}) == 3


def test_the_bars_reach_as_far_as_the_interval():
    (axes,) = show.interval_figure(ROWS, "difference (nats)").axes
    for bar, (mean, half) in zip(axes.containers, ROWS.values()):
        (segment,) = bar.lines[2][0].get_segments()
        assert segment[:, 0].tolist() == pytest.approx([mean - half, mean + half])


@pytest.mark.parametrize("rows", [{}, {"a": (1.0, -0.1)}, {"a": (1.0, float("nan"))}])
def test_rows_that_are_no_intervals_are_refused(rows):
    with pytest.raises(InputError):
        show.interval_figure(rows, "nats")
