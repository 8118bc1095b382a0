"""Predicted bars and measured marks hold the numbers they were given, place by place."""

import numpy
import pytest

from slimlab import show
from slimlab.config import InputError

PANELS = {"left": ([2.0, 1.0, 0.5], [2.1, 1.0, 0.7]), "both": ([1.0, 1.0, 0.0], [1.2, 1.1, 0.1])}


def test_each_panel_draws_its_predictions_as_bars_and_its_measurements_as_marks():
    figure = show.predicted_figure(PANELS, ["a", "b", "c"], "surprise (bits)", "two floors")
    assert len(figure.axes) == 2
    for axes, (name, (predicted, measured)) in zip(figure.axes, PANELS.items()):
        assert axes.get_title() == name
        assert axes.get_ylabel() == "surprise (bits)"
        assert [bar.get_height() for bar in axes.patches] == predicted
        numpy.testing.assert_allclose(axes.lines[0].get_ydata(), measured, rtol=1e-6)
        assert axes.lines[0].get_linestyle() == "None"
    assert [text.get_text() for text in figure.axes[-1].get_xticklabels()] == ["a", "b", "c"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()


def test_one_legend_tells_bars_from_marks():
    figure = show.predicted_figure(PANELS, ["a", "b", "c"], "surprise (bits)")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["measured", "predicted"]


@pytest.mark.parametrize(
    "panels", [{}, {"left": ([1.0, 2.0], [1.0, 2.0, 3.0])}, {"left": ([1.0], [1.0])}]
)
def test_panels_without_a_number_for_each_label_are_refused(panels):
    with pytest.raises(InputError):
        show.predicted_figure(panels, ["a", "b", "c"], "bits")
