"""Pictures of how a Transformer is put together, and of masks that have tokens of their own.

Chapter 03 draws the encoder-decoder with `framed_figure` and four kinds of mask with `mask_panels`.
Drawing tools place boxes by themselves; here the caller says where they stand, so that a stream of
vectors is a straight line and what works beside it stands beside it.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from slimlab.config import require
from slimlab.show.diagrams import PALE, blank, draw_arrow
from slimlab.show.maps import check_map, draw_mask
from slimlab.show.style import BLUE, GREY, new_figure

ROW, HEIGHT, GAP, MARGIN = 0.62, 0.36, 0.7, 0.3  # inches


def framed_figure(
    boxes: Mapping[str, tuple[int, float, str]],
    arrows: Sequence[tuple[str, str, str]],
    frames: Mapping[str, Sequence[str]] | None = None,
    title: str = "",
) -> Figure:
    """Draw boxes in columns, arrows between them, and frames around what is repeated.

    boxes    name -> (column, row, text); row 0 is the lowest; a column is as wide as its longest
             text, and columns are whole numbers from 0
    arrows   (from name, to name, label); the label may be empty
    frames   label -> names of the boxes inside; the label stands at the frame's upper left
    title    printed above
    returns  the figure

    Raises InputError if an arrow or a frame names a box that is not there.
    """
    require(bool(boxes), "at least one box", "none", 'pass {"name": (0, 0, "text")}')
    named = {name for source, target, _ in arrows for name in (source, target)}
    named |= {name for names in (frames or {}).values() for name in names}
    missing = sorted(named - set(boxes))
    asked = f"names of the boxes {sorted(boxes)}"
    require(not missing, asked, f"{missing}", "use the names of the boxes")
    longest = [0] * (max(column for column, _, _ in boxes.values()) + 1)
    for column, _, text in boxes.values():
        longest[column] = max(longest[column], len(text))
    widths = [0.3 + 0.088 * letters for letters in longest]
    lefts = [MARGIN + sum(widths[:k]) + k * GAP for k in range(len(widths))]
    top = max(row for _, row, _ in boxes.values()) * ROW + HEIGHT
    size = (lefts[-1] + widths[-1] + MARGIN, top + MARGIN + (0.55 if title else MARGIN))
    figure, axes = blank(size, title)
    placed = {}
    for name, (column, row, text) in boxes.items():
        corner = (lefts[column], row * ROW + MARGIN)
        placed[name] = draw_box(axes, corner, widths[column], text)
    for label, names in (frames or {}).items():
        draw_frame(axes, [placed[name] for name in names], label)
    for source, target, label in arrows:
        tail, head = placed[source], placed[target]
        draw_arrow(axes, tail, head, "")
        middle = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(
            *middle, label, ha="center", va="center", fontsize=9, bbox=white if label else None
        )
    return figure


def draw_box(axes: Axes, corner: tuple[float, float], width: float, text: str) -> tuple:
    """Draw a box with `text` into `axes`; return its centre x, y and the patch.

    corner  lower left, inches
    width   inches
    """
    patch = FancyBboxPatch(
        corner, width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.07", facecolor=PALE,
        edgecolor=BLUE, lw=1.4, zorder=2,
    )  # fmt: skip
    axes.add_patch(patch)
    x, y = corner[0] + width / 2, corner[1] + HEIGHT / 2
    axes.text(x, y, text, ha="center", va="center", zorder=3)
    return x, y, patch


def draw_frame(axes: Axes, inside: Sequence[tuple], label: str) -> None:
    """Draw a dashed frame into `axes` around the boxes `inside`, with `label` in its corner."""
    patches = [patch for _, _, patch in inside]
    left = min(patch.get_x() for patch in patches) - 0.17
    right = max(patch.get_x() + patch.get_width() for patch in patches) + 0.17
    low = min(patch.get_y() for patch in patches) - 0.13
    high = max(patch.get_y() for patch in patches) + HEIGHT + 0.13
    axes.add_patch(
        FancyBboxPatch(
            (left, low),
            right - left,
            high - low,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="none",
            edgecolor=GREY,
            linestyle="--",
            lw=1.2,
            zorder=1,
        )  # fmt: skip
    )
    axes.text(left + 0.1, high - 0.08, label, ha="left", va="top", color=GREY, fontsize=9)


def mask_panels(
    panels: Mapping[str, tuple[Tensor, Sequence[str], Sequence[str]]], title: str = ""
) -> Figure:
    """Draw boolean masks side by side, each with tokens of its own at its rows and columns.

    panels   name -> (mask (T, S), T queries, S keys); True where the query may attend
    title    printed above
    returns  the figure

    Raises InputError if a mask is no matrix or has another number of labels.
    """
    require(bool(panels), "at least one mask", "none", 'pass {"name": (mask, queries, keys)}')
    arrays = {name: check_map(mask, 2, "(T, S)") for name, (mask, _, _) in panels.items()}
    cell = 0.28
    widths = [array.shape[1] * cell + 1.3 for array in arrays.values()]
    height = max(array.shape[0] for array in arrays.values()) * cell + 1.9
    figure, grid = new_figure(
        1, len(panels), figsize=(sum(widths), height), squeeze=False, width_ratios=widths
    )
    for axes, (name, (_, queries, keys)) in zip(grid[0], panels.items()):
        draw_mask(axes, arrays[name].astype(bool), queries, keys, marker_pt=cell * 40)
        axes.tick_params(axis="x", rotation=90)
        axes.set_title(name)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure
