"""Figures of data parallelism: who reads which sample, what hides behind what, what ranks bring.

Chapter 08 uses them. Dashboards of training (TensorBoard, Weights and Biases) draw one line per
rank over time; these draw what was predicted and what was counted over the number of ranks.
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from slimlab.config import require
from slimlab.show.style import (
    COLOURS,
    GREEN,
    GREY,
    LINE_STYLES,
    MARKERS,
    ORANGE,
    new_figure,
    to_array,
)
from slimlab.show.timeline import time_unit

NOBODY = "–"


def shards_figure(rows: Mapping[str, Sequence[int | None]], title: str = "") -> Figure:
    """Draw which rank reads which sample: a row of cells per step, each with a rank's number.

    rows     label of the step -> the rank that reads sample 0, 1, ...; None: nobody does
    title    printed above
    returns  the figure

    Raises InputError if there are no rows, or rows of different lengths.
    """
    lengths = sorted({len(row) for row in rows.values()})
    change = 'pass {"step 0": [0, 1, None]}, with as many ranks in every row'
    require(lengths not in ([], [0]), "at least one step with a sample", f"{dict(rows)}", change)
    require(len(lengths) == 1, "as many samples in every row", f"rows of {lengths}", change)
    (num_samples,) = lengths
    size = (1.4 + 0.42 * num_samples, 0.9 + 0.34 * len(rows))
    figure, axes = new_figure(figsize=size)
    for place, row in enumerate(rows.values()):
        for sample, rank in enumerate(row):
            colour = "white" if rank is None else COLOURS[rank % len(COLOURS)]
            look = {"facecolor": colour, "edgecolor": "white" if rank is not None else GREY}
            cell = Rectangle((sample - 0.46, place - 0.42), 0.92, 0.84, lw=0.6, **look)
            axes.add_patch(cell)
            text = NOBODY if rank is None else str(rank)
            # Okabe and Ito's blue, red and green are dark, the others light.
            dark = rank is not None and rank % len(COLOURS) in (0, 1, 2, 6)
            axes.text(
                sample, place, text, ha="center", va="center", color="white" if dark else "black"
            )
    axes.set_xlim(-0.6, num_samples - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks(range(num_samples))
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="sample", title=title)
    return figure


def overlap_figure(
    ways: Mapping[str, tuple[float, Sequence[tuple[float, float]]]], title: str = ""
) -> Figure:
    """Draw what a rank computes and, one line below, what travels meanwhile: two lines per way.

    ways     label -> (seconds of computing, from 0 on; (begin, end) in seconds of each exchange)
    title    printed above
    returns  the figure; exchanges are numbered where there is room, and what of them is not hidden
             behind computing has another colour and hatch

    Raises InputError if there are no ways, or an exchange ends before it begins.
    """
    change = 'pass {"overlapped": (1.0, [(0.5, 0.7), (1.0, 1.2)])}'
    require(bool(ways), "at least one way", "none", change)
    for name, (_, spans) in ways.items():
        orderly = all(0 <= begin <= end for begin, end in spans)
        asked = "exchanges that begin at 0 or later and end after that"
        require(orderly, asked, f"{name}: {list(spans)}", change)
    ends = {
        name: max([compute_s, *(end for _, end in spans)])
        for name, (compute_s, spans) in ways.items()
    }
    longest_s = max(ends.values())
    unit, per_s = time_unit(longest_s)
    figure, axes = new_figure(figsize=(8.0, 1.1 + 0.75 * len(ways)))
    for place, (name, (compute_s, spans)) in enumerate(ways.items()):
        axes.broken_barh([(0, compute_s * per_s)], (place - 0.38, 0.36), color=GREY)
        for number, (begin, end) in enumerate(spans, start=1):
            seen = min(max(begin, compute_s), end)
            for start, stop, look in (
                (begin, seen, {"facecolor": GREEN}),
                (seen, end, {"facecolor": ORANGE, "hatch": "////"}),
            ):
                if stop > start:
                    bar = [(start * per_s, (stop - start) * per_s)]
                    axes.broken_barh(bar, (place + 0.02, 0.36), edgecolor="white", lw=0.8, **look)
            if end - begin > 0.03 * longest_s:
                white = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
                middle = (begin + end) / 2 * per_s, place + 0.2
                look = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(*middle, f"{number}", bbox=white, **look)
        behind = ends[name] * per_s
        axes.text(behind, place, f" {behind:.3g} {unit}", va="center", fontsize=8)
    axes.set_yticks(range(len(ways)), list(ways))
    axes.set_ylim(len(ways) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * longest_s * per_s)
    axes.grid(False, axis="y")
    axes.set(xlabel=f"time ({unit})", title=title)
    handles = [
        Patch(facecolor=GREY, label="computing"),
        Patch(facecolor=GREEN, label="exchange, hidden"),
        Patch(facecolor=ORANGE, hatch="////", edgecolor="white", label="exchange, waited for"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def scaling_figure(
    predicted: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    measured: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    y_label: str,
    title: str = "",
    marks: str = "measured",
    ideal: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    x_label: str = "ranks",
) -> Figure:
    """Draw a quantity over the number of ranks, both logarithmic: lines predicted, marks found.

    predicted  label -> (ranks, values), equally many
    measured   label -> (ranks, values); a label of predicted gets its colour and a mark
    y_label    what the values are, with their unit
    title      printed above
    marks      how the values of the marks were found: measured, or clocked on a dialled network
    ideal      label -> (ranks, values) of thin grey lines to compare with
    x_label    what grows to the right
    returns    the figure

    Raises InputError if there is nothing to draw, numbers are not positive, or differ in number.
    """
    ideal = dict(ideal or {})
    labels = list(dict.fromkeys([*predicted, *measured]))
    require(bool(labels), "at least one line", "none", 'pass {"strong": (ranks, values)}')
    for label, columns in [*predicted.items(), *measured.items(), *ideal.items()]:
        xs, ys = map(to_array, columns)
        given = f"{label}: {xs.shape} ranks, {ys.shape} values"
        require(xs.shape == ys.shape and xs.ndim == 1, "a value for each number of ranks", given,
                "cut the longer one")  # fmt: skip
        positive = bool((xs > 0).all() and (ys > 0).all())
        asked = "positive numbers on logarithmic axes"
        require(positive, asked, f"{label}: one of 0 or less", "leave it out")
    figure, axes = new_figure(figsize=(7.6, 3.8))
    handles = []
    for index, (label, columns) in enumerate(ideal.items()):
        look = {"color": GREY, "lw": 1.2, "linestyle": (0, (4 + 3 * index, 2))}
        axes.plot(*map(to_array, columns), **look)
        handles.append(Line2D([], [], label=label, **look))
    for index, label in enumerate(labels):
        colour = COLOURS[index % len(COLOURS)]
        line = {"linestyle": LINE_STYLES[index % len(LINE_STYLES)] if label in predicted else ""}
        mark = {"marker": MARKERS[index % len(MARKERS)] if label in measured else ""}
        if label in predicted:
            axes.plot(*map(to_array, predicted[label]), color=colour, **line)
        if label in measured:
            axes.plot(*map(to_array, measured[label]), color=colour, linestyle="", **mark)
        handles.append(Line2D([], [], color=colour, label=label, **line, **mark))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    both = f"lines: predicted, marks: {marks}" if measured and predicted else None
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "handlelength": 3.0}
    axes.legend(handles=handles, title=both, **place)
    return figure
