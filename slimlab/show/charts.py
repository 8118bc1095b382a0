"""Curves, bars and bytes per rank.

Chapters 00 to 02 use them for loss, time, memory and messages. Dashboards (TensorBoard, Weights
and Biases) draw the same curves live from a log; these are drawn once, from numbers in memory.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimlab.config import require
from slimlab.show.style import COLOURS, GREY, LINE_STYLES, MARKERS, new_figure, to_array

HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
MAX_MARKED_POINTS = 25
MAX_TICKS = 8
# Lengths of dash and gap in line widths: long, dotted, dash and dot, then ever longer dashes.
GUIDE_DASHES = ((4, 2), (1, 1.2), (6, 1.5, 1, 1.5))


def curves(
    series: Mapping[str, tuple[Sequence[float], ...]],
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    guides: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one line per series, each with a colour and a line style of its own.

    series   label -> (x values, y values), equally many; with (x, y, halves) a bar from y - half to
             y + half stands at each point, for intervals
    x_label  what x is, with its unit: "sequence length (tokens)"
    y_label  what y is, with its unit: "time (s)"
    title    printed above
    log_x    logarithmic x axis
    log_y    logarithmic y axis
    guides   label -> y value of a horizontal line, for predictions and limits; each line has dashes
             of its own
    returns  the figure

    Raises InputError if x and y differ in number, or a logarithmic axis meets a value <= 0.
    """
    require(bool(series), "at least one series", "none", 'pass {"label": (x, y)}')
    figure, axes = new_figure()
    for index, (label, columns) in enumerate(series.items()):
        xs, ys, *halves = map(to_array, columns)
        given = f"{label}: x of shape {xs.shape}, y of shape {ys.shape}"
        fits = xs.ndim == 1 and {xs.shape} == {one.shape for one in (ys, *halves)} and len(xs) > 0
        require(fits, "as many y as x values, in one row each", given, "cut the longer one")
        for values, name, log in [(xs, "x", log_x), (ys, "y", log_y)]:
            asked = f"positive {name} values on a logarithmic axis"
            least = f"{label}: {values.min()}"
            require(not log or bool((values > 0).all()), asked, least, f"drop log_{name}")
        axes.plot(
            xs,
            ys,
            color=COLOURS[index % len(COLOURS)],
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)] if len(xs) <= MAX_MARKED_POINTS else "",
            label=label,
        )
        if halves:
            colour = COLOURS[index % len(COLOURS)]
            axes.errorbar(xs, ys, halves[0], fmt="none", ecolor=colour, capsize=3)
    for index, (label, value) in enumerate((guides or {}).items()):
        dashes = GUIDE_DASHES[index] if index < len(GUIDE_DASHES) else (4 + 3 * index, 2)
        axes.axhline(value, color=GREY, linestyle=(0, dashes), label=label)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    places = sorted({float(x) for xs, *_ in series.values() for x in xs})
    apart = all(right > 1.3 * left for left, right in zip(places, places[1:]))
    if log_x and apart and len(places) <= MAX_TICKS:
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.xaxis.minorticks_off()
    if len(series) + len(guides or {}) > 1:
        axes.legend(handlelength=3.5 if guides else None)
    return figure


def bars(
    values: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    y_label: str,
    title: str = "",
    log_y: bool = False,
    number_format: str = "{:.3g}",
    horizontal: bool = False,
) -> Figure:
    """Draw one bar per label, or one group of bars per label, with its number written on it.

    values         label -> number, or label -> {series: number}
    y_label        what the numbers are, with their unit
    title          printed above
    log_y          logarithmic axis of the numbers
    number_format  how the number on a bar is written
    horizontal     bars to the right, for long labels
    returns        the figure

    Raises InputError if the groups do not hold the same series.
    """
    require(bool(values), "at least one bar", "none", 'pass {"label": number}')
    grouped = {k: v if isinstance(v, Mapping) else {"": v} for k, v in values.items()}
    names = list(next(iter(grouped.values())))
    require(bool(names), "at least one series in a group", "none", 'pass {"label": {"a": 1}}')
    for label, group in grouped.items():
        asked, given = f"the series {names} in every group", f"{label}: {list(group)}"
        require(list(group) == names, asked, given, "give every group the same series in order")
    size = (6.4, max(1.8, 0.9 + 0.34 * len(grouped) * len(names))) if horizontal else None
    figure, axes = new_figure(figsize=size)
    draw = axes.barh if horizontal else axes.bar
    thickness = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [k + (index - (len(names) - 1) / 2) * thickness for k in range(len(grouped))]
        drawn = draw(
            places,
            [float(group[name]) for group in grouped.values()],
            thickness,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            label=name,
        )
        axes.bar_label(drawn, fmt=number_format, padding=2, fontsize=8)
    axes.margins(**{"x" if horizontal else "y": 0.12})
    label_bars(axes, list(grouped), y_label, log_y, horizontal)
    axes.set_title(title)
    if len(names) > 1:
        axes.legend()
    return figure


def label_bars(axes: Axes, labels: list[str], y_label: str, log_y: bool, horizontal: bool) -> None:
    """Write `labels` at the bars of `axes` and `y_label` (with `log_y`) at their numbers.

    horizontal  True if the bars run to the right; the first label is then the uppermost
    """
    if horizontal:
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel(y_label)
        axes.set_xscale("log" if log_y else "linear")
        axes.grid(False, axis="y")
        return
    axes.set_xticks(range(len(labels)), labels)
    if sum(len(label) for label in labels) > 60:
        axes.tick_params(axis="x", rotation=30)
    axes.set_ylabel(y_label)
    axes.set_yscale("log" if log_y else "linear")
    axes.grid(False, axis="x")


def ledger_figure(ledgers: Sequence, title: str = "payload handed to each call") -> Figure:
    """Draw how many bytes each rank handed to each kind of call, one stack per rank.

    ledgers  in rank order: PayloadLedger objects, as in `run_ranks(...).ledgers`
    title    printed above
    returns  the figure; the number on a stack is the rank's total in bytes
    """
    require(len(ledgers) > 0, "the ledger of at least one rank", "none", "pass results.ledgers")
    calls = sorted({entry.call for ledger in ledgers for entry in ledger.entries})
    figure, axes = new_figure()
    base = [0] * len(ledgers)
    for index, call in enumerate(calls):
        heights = [ledger.total_bytes(call) for ledger in ledgers]
        axes.bar(
            range(len(ledgers)),
            heights,
            0.6,
            bottom=base,
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            label=call,
        )
        base = [low + height for low, height in zip(base, heights)]
    for rank, total in enumerate(base):
        axes.text(rank, total, f"{total:,} B", ha="center", va="bottom", fontsize=8)
    axes.set(xlabel="rank", ylabel="payload (bytes)", title=title)
    axes.set_xticks(range(len(ledgers)))
    axes.grid(False, axis="x")
    axes.set_ylim(0, 1.1 * max(base) or 1)
    if calls:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
