"""Predicted numbers as bars, measured ones as marks on them: one panel for each case.

Chapter 04 uses it for the loss that no model can beat and the loss that models have. Papers draw
the two as lines of a table; on top of each other they are compared without reading.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from slimlab.config import require
from slimlab.show.style import SKY, VERMILION, new_figure, to_array

PANEL_HEIGHT = 2.1


def predicted_figure(
    panels: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    labels: Sequence[str],
    y_label: str,
    title: str = "",
) -> Figure:
    """Draw a panel per case, one below the other, all with the same places and the same axis.

    panels   title of the panel -> (predicted, measured), as many of each as there are labels
    labels   what stands at each place
    y_label  what the numbers are, with their unit
    title    printed above all
    returns  the figure

    Raises InputError if there is no panel, or one with more or fewer numbers than labels.
    """
    require(bool(panels), "at least one panel", "none", 'pass {"title": (predicted, measured)}')
    height = PANEL_HEIGHT * len(panels) + 0.6
    figure, rows = new_figure(
        len(panels), 1, figsize=(6.4, height), sharex=True, sharey=True, squeeze=False
    )
    for axes, (name, numbers) in zip(rows[:, 0], panels.items()):
        predicted, measured = (to_array(one) for one in numbers)
        shapes = f"{name}: {predicted.shape} predicted, {measured.shape} measured"
        fits = predicted.shape == measured.shape == (len(labels),)
        require(fits, f"{len(labels)} numbers of both kinds", shapes, "give one for each label")
        places = range(len(labels))
        axes.bar(places, predicted, 0.7, color=SKY, label="predicted")
        axes.plot(places, measured, "D", color=VERMILION, label="measured")
        axes.set(title=name, ylabel=y_label)
        axes.grid(False, axis="x")
        axes.margins(y=0.12)
    rows[-1, 0].set_xticks(range(len(labels)), labels, rotation=60, ha="right")
    handles, names = rows[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2)
    figure.suptitle(title, x=0.02, ha="left")
    return figure
