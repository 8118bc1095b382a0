"""Bars made of parts: where the bytes of a training step are.

Chapter 05 draws the ledger of a step's memory, chapter 11 where the seconds of a step go.
Production tools draw memory over time (torch.cuda.memory._record_memory_history); here each bar is
one moment or one choice.
"""

from collections.abc import Mapping

from matplotlib.figure import Figure

from slimlab.config import require
from slimlab.show.charts import HATCHES, label_bars
from slimlab.show.style import COLOURS, GREY, SKY, VERMILION, new_figure

# Each colour is drawn pale as well, so that many parts stay apart; hatches tell them apart too.
SHADES = (1.0, 0.5)


def stacked_bars(
    stacks: Mapping[str, Mapping[str, float]],
    x_label: str,
    title: str = "",
    number_format: str = "{:.3g}",
) -> Figure:
    """Draw one bar to the right per label, built of its parts, with its total written behind it.

    stacks         label -> {part: size}; a part that a label does not have is left out there
    x_label        what the sizes are, with their unit
    title          printed above
    number_format  how a total is written
    returns        the figure; parts of one name have one colour and hatch, and the legend's order
                   is that of the stacks

    Raises InputError for no parts at all and for a size below 0.
    """
    parts = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    asked, change = "at least one bar with a part", 'pass {"label": {"part": 1.0}}'
    require(bool(parts), asked, f"{dict(stacks)!r:.60}", change)
    sizes = [float(size) for stack in stacks.values() for size in stack.values()]
    require(min(sizes) >= 0, "sizes of at least 0", f"{min(sizes)}", "draw differences as bars")
    height = max(1.8, 0.9 + 0.45 * len(stacks), 0.3 + 0.2 * len(parts))
    figure, axes = new_figure(figsize=(7.4, height))
    lefts = dict.fromkeys(stacks, 0.0)
    for index, part in enumerate(parts):
        widths = [float(stack.get(part, 0.0)) for stack in stacks.values()]
        axes.barh(
            range(len(stacks)),
            widths,
            0.6,
            left=list(lefts.values()),
            color=COLOURS[index % len(COLOURS)],
            alpha=SHADES[index // len(COLOURS) % len(SHADES)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white",
            label=part,
        )
        lefts = {name: left + width for (name, left), width in zip(lefts.items(), widths)}
    for row, total in enumerate(lefts.values()):
        axes.text(total, row, f" {number_format.format(total)}", va="center", fontsize=8)
    axes.set_title(title)
    axes.set_xlim(0, 1.15 * max(lefts.values()) or 1)
    label_bars(axes, list(stacks), x_label, log_y=False, horizontal=True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def waterfall_figure(
    pieces: Mapping[str, float],
    x_label: str,
    title: str = "",
    guides: Mapping[str, float] | None = None,
) -> Figure:
    """Draw pieces as bars that begin where the one above ended, so that the last ends at the sum.

    pieces   label -> size, at least 0, from the top
    x_label  what the sizes are, with their unit
    title    printed above
    guides   label -> place of a vertical line, such as a measured sum
    returns  the figure; each bar carries its size, and the sum is the last bar

    Raises InputError if there is no piece, or one below 0.
    """
    require(bool(pieces), "at least one piece", "none", 'pass {"label": size}')
    least = min(pieces, key=pieces.get)
    given = f"{least}: {pieces[least]}"
    require(pieces[least] >= 0, "pieces of at least 0", given, "draw differences as bars")
    figure, axes = new_figure(figsize=(7.0, 0.9 + 0.34 * (len(pieces) + 1)))
    total, guides = sum(pieces.values()), guides or {}
    rows, start = {**pieces, "all": total}, 0.0
    for row, (label, size) in enumerate(rows.items()):
        left = 0.0 if label == "all" else start
        colour = GREY if label == "all" else SKY
        axes.barh(row, size, 0.7, left=left, color=colour, edgecolor="white")
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(
            left + size + 0.01 * total, row, f"{size:.3g}", va="center", fontsize=8, bbox=white
        )
        start += size
    for label, place in guides.items():
        axes.axvline(place, color=VERMILION, linestyle="--", label=label)
    if guides:
        figure.legend(loc="outside lower right")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel=x_label, title=title, xlim=(0, 1.15 * max([total, *guides.values()])))
    return figure
