"""What ranks send each other: as a matrix, as the steps of an algorithm, and what it costs.

Chapter 07 draws with them what slimlab.comm.trace has counted and what slimlab.plan.alpha_beta
predicts. Viewers of traces (Vampir, Nsight Systems) draw matrices of thousands of ranks; here each
number is written where there is room for it.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from slimlab.comm.events import Event, steps_of
from slimlab.comm.trace_data import Trace
from slimlab.config import require
from slimlab.show.style import (
    BLUE,
    COLOURS,
    GREY,
    LINE_STYLES,
    MARKERS,
    new_figure,
    to_array,
)

MAX_NUMBERED_RANKS, MAX_EXACT_RANKS = 12, 8


def bytes_figure(
    matrix: Tensor | list, title: str = "", value_label: str = "payload (bytes)"
) -> Figure:
    """Draw who sent how much to whom.

    matrix       (world_size, world_size)  row src, column dst, as trace.bytes or trace.messages
    title        printed above
    value_label  what is counted, with its unit
    returns      the figure; nothing was sent where a cell is empty; the others carry their number
                 where there are at most 12 ranks, to the last digit where there are at most 8

    Raises InputError for a matrix that is not square.
    """
    values = to_array(matrix)
    require(
        values.ndim == 2 and values.shape[0] == values.shape[1] and values.size > 0,
        "a matrix of (world_size, world_size)",
        f"shape {values.shape}",
        "pass trace.bytes or trace.messages",
    )
    world_size = len(values)
    numbered = world_size <= MAX_NUMBERED_RANKS
    written = "{:,.0f}".format if world_size <= MAX_EXACT_RANKS else short_number
    longest = max(len(written(value)) for value in values.flat)
    cell = max(0.42, 0.14 + 0.075 * longest) if numbered else 4.0 / world_size
    size = world_size * cell
    figure, axes = new_figure(figsize=(max(size, 2.0) + 1.9, max(size, 2.0) + 0.9))
    shown = numpy.where(values > 0, values, numpy.nan)
    top = max(float(values.max()), 1.0)
    image = axes.imshow(shown, vmin=0, vmax=top, cmap="Blues")
    axes.plot([-0.5, world_size - 0.5], [-0.5, world_size - 0.5], color=GREY, lw=0.8)
    for (src, dst), value in numpy.ndenumerate(values):
        if numbered and value > 0:
            colour = "white" if value > 0.6 * top else "black"
            look = {"ha": "center", "va": "center", "color": colour, "fontsize": 8}
            axes.text(dst, src, written(value), **look)
    for axis, name in ((axes.xaxis, "to rank"), (axes.yaxis, "from rank")):
        axis.set_ticks(range(0, world_size, max(1, -(-world_size // 12))))
        axis.set_label_text(name)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label=value_label, fraction=0.05, format="{x:,.0f}")
    return figure


def steps_figure(
    trace: Trace, title: str = "", text: Callable[[Event], str] | None = None
) -> Figure:
    """Draw an algorithm as steps: an arrow per message, from one step to the next.

    trace    of all ranks; when something happened does not count, only who waited for whom
    title    printed above
    text     from the event that sends to the word beside its arrow; None: its payload in bytes
    returns  the figure; a word that all arrows of a step share stands below the step

    Raises InputError for a trace without messages between ranks.
    """
    change = "trace an algorithm of slimlab.comm.collectives, or one that sends"
    found = steps_of(trace.events)
    require(bool(found), "a trace with messages between ranks", "none", change)
    text = text or (lambda event: short_number(event.sent.n_bytes, "B"))
    steps = [
        {event: text(event) for _, event in sending}
        for _, sending in groupby(found, lambda one: one[0])
    ]
    longest = max(len(word) for step in steps for word in step.values())
    width, num_ranks = max(1.0, 0.5 + 0.08 * longest), trace.world_size
    size = (1.0 + width * len(steps), 1.2 + 0.62 * (num_ranks - 1))
    figure, axes = new_figure(figsize=size)
    for rank in range(num_ranks):
        places = range(len(steps) + 1)
        axes.plot(places, [rank] * len(places), "o-", color=GREY, lw=0.8, ms=3, zorder=1)
    below = []
    for number, step in enumerate(steps):
        shared = len(set(step.values())) == 1
        below.append(f"{number + 1}\n{next(iter(step.values()))}" if shared else f"{number + 1}\n")
        for event, word in step.items():
            _draw_step(axes, number, event, "" if shared else word)
    axes.set_xticks([number + 0.5 for number in range(len(steps))], below)
    axes.set_yticks(range(num_ranks))
    axes.set(xlabel="step", ylabel="rank", title=title, xlim=(-0.1, len(steps) + 0.1))
    axes.set_ylim(num_ranks - 0.8, -0.2)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def cost_figure(
    predicted: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    measured: Mapping[str, tuple[Sequence[float], ...]] | None = None,
    title: str = "",
    guides: Mapping[str, float] | None = None,
    x_label: str = "payload (bytes)",
    marks: str = "measured",
) -> Figure:
    """Draw seconds over bytes, both logarithmic: predictions as lines, measurements as marks.

    predicted  label -> (bytes, seconds), equally many
    measured   label -> (bytes, seconds), or (bytes, seconds, lowest, highest) with their band; a
               label of predicted gets its colour and mark
    title      printed above
    guides     label -> bytes of a vertical line, for crossovers
    x_label    what the bytes are of
    marks      how the seconds of the marks were found: measured, or clocked on a dialled network
    returns    the figure

    Raises InputError if numbers are not positive, or differ in number.
    """
    measured = dict(measured or {})
    labels = list(dict.fromkeys([*predicted, *measured]))
    require(bool(labels), "at least one algorithm", "none", 'pass {"ring": (bytes, seconds)}')
    for label, columns in [*predicted.items(), *measured.items()]:
        arrays = [to_array(column) for column in columns]
        fits = len(arrays) in (2, 4) and len({array.shape for array in arrays}) == 1
        given = f"{label}: {[list(array.shape) for array in arrays]}"
        require(fits, "as many seconds as bytes", given, "cut the longer one")
        positive = all((array > 0).all() for array in arrays)
        asked = "positive numbers on logarithmic axes"
        require(positive, asked, f"{label}: one of 0 or less", "leave it out")
    figure, axes = new_figure(figsize=(8.4, 3.8))
    handles = []
    for index, label in enumerate(labels):
        line = {"linestyle": LINE_STYLES[index % len(LINE_STYLES)] if label in predicted else ""}
        mark = {"marker": MARKERS[index % len(MARKERS)] if label in measured else ""}
        colour = COLOURS[index % len(COLOURS)]
        handles.append(Line2D([], [], color=colour, label=label, **line, **mark))
        if label in predicted:
            axes.plot(*map(to_array, predicted[label]), color=colour, **line)
        if label in measured:
            xs, ys, *band = map(to_array, measured[label])
            errors = [ys - band[0], band[1] - ys] if band else None
            look = {"linestyle": "", "elinewidth": 1, "capsize": 2, **mark}
            axes.errorbar(xs, ys, errors, color=colour, **look)
    for index, (label, place) in enumerate((guides or {}).items()):
        look = {"color": GREY, "linestyle": (0, (4 + 3 * index, 2)), "lw": 1.2, "label": label}
        handles.append(axes.axvline(place, **look))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _tick_bytes(axes)
    axes.set(xlabel=x_label, ylabel="time (s)", title=title)
    both = f"lines: predicted, marks: {marks}" if measured and predicted else None
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "handlelength": 3.0}
    axes.legend(handles=handles, title=both, **place)
    return figure


def short_number(value: float, unit: str = "") -> str:
    """Write a number so that it fits into a cell: 960, 8,192, 240 k, 1.05 M.

    value  at least 0
    unit   stands behind it, as in 8,192 B or 1.05 MB
    """
    for least, factor, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if value >= least:
            return f"{value / factor:.3g} {letter}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


def binary_bytes(value: float) -> str:
    """Write bytes as a tick of an axis: 64 B, 4 KiB, 16 MiB.

    value  above 0
    """
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g} B"


def _draw_step(axes: Axes, step: int, event: Event, word: str) -> None:
    src, dst = event.rank, event.sent.peer
    arrow = {"arrowstyle": "-|>", "color": BLUE, "lw": 1.4, "shrinkA": 3, "shrinkB": 4}
    axes.annotate("", xy=(step + 1, dst), xytext=(step, src), arrowprops=arrow, zorder=2)
    if word:
        # Close to the sender, where no other arrow has its word.
        share = 0.35 / abs(dst - src)
        place = step + share + 0.04, src + share * (dst - src)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.text(*place, word, ha="left", va="center", fontsize=8, bbox=white, zorder=3)


def _tick_bytes(axes: Axes) -> None:
    low, high = (numpy.log2(limit) for limit in axes.get_xlim())
    powers = range(int(numpy.ceil(low)), int(numpy.floor(high)) + 1)
    step = max(1, -(-len(powers) // 7))
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in powers[::step]]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_bytes(value)))
    axes.xaxis.set_minor_locator(NullLocator())
