"""Means with their intervals beside a line at zero: which differences are differences.

Chapter 13 uses it for runs over several seeds. Medicine calls it a forest plot.
"""

from collections.abc import Mapping

from matplotlib.figure import Figure

from slimlab.config import require
from slimlab.show.style import BLUE, GREY, VERMILION, new_figure

WIDTH, ROW_HEIGHT = 6.4, 0.36


def interval_figure(
    rows: Mapping[str, tuple[float, float]], x_label: str, title: str = ""
) -> Figure:
    """Draw a mark with an interval per row, the first row at the top.

    rows     label -> (mean, how far the interval reaches to either side)
    x_label  what the numbers are, with their unit, and which side is better
    title    printed above
    returns  the figure; blue circles where the interval lies below 0, red squares where it lies
             above, grey diamonds where it holds 0

    Raises InputError without rows, or for an interval of less than no width.
    """
    require(bool(rows), "at least one row", "none", 'pass {"label": (mean, half)}')
    wrong = {label: row for label, row in rows.items() if not row[1] >= 0}
    require(not wrong, "intervals of a width of 0 or more", f"{wrong}", "give (mean, half)")
    figure, axes = new_figure(figsize=(WIDTH, 1.1 + ROW_HEIGHT * len(rows)))
    axes.axvline(0, color=GREY, linewidth=1)
    for place, (mean, half) in enumerate(rows.values()):
        sure = abs(mean) > half
        marker = ("s" if mean > 0 else "o") if sure else "D"
        colour = (VERMILION if mean > 0 else BLUE) if sure else GREY
        axes.errorbar(mean, place, xerr=half, fmt=marker, color=colour, capsize=3)
        text = f"{mean:+.3f} ± {half:.3f}"
        axes.annotate(
            text, (mean, place), (0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.margins(x=0.15)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(False, axis="y")
    axes.set(xlabel=x_label)
    axes.set_title(title, loc="left")
    return figure
