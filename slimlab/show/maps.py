"""Attention weights and masks as pictures: rows are queries, columns are keys.

Chapters 01 and 02 use them. Tools for exploring large models (BertViz) draw maps of all layers
that react to the mouse; these are static, small enough to hold the number of every cell.
"""

from collections.abc import Sequence

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from slimlab.config import require
from slimlab.show.style import BLUE, GREY, TEXT_PT, new_figure, to_array

MAX_NUMBERED_CELLS = 100
MAX_LABELS = 32


def attention_map(
    weights: Tensor | list,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    title: str = "",
    value_label: str = "attention weight",
) -> Figure:
    """Draw one matrix of attention weights, or of scores.

    weights      (T, S)  row t says how query t weighs the keys; negative values are drawn too,
                         with two hues that meet at 0
    queries      T       labels of the rows; positions if None
    keys         S       labels of the columns; those of `queries` if None and T = S
    title                printed above
    value_label          printed beside the colour bar
    returns              the figure; cells carry their number where there are at most 100

    Raises InputError if the sizes do not fit.
    """
    values = check_map(weights, 2, "(T, S)")
    num_queries, num_keys = values.shape
    cell = 0.5 if values.size <= MAX_NUMBERED_CELLS else min(0.3, 5.0 / max(values.shape))
    size = (max(2.8, num_keys * cell + 2.0), max(2.2, num_queries * cell + 1.2))
    figure, axes = new_figure(figsize=size)
    image = draw_map(axes, values, queries, keys, colour_limits(values))
    axes.set_title(title)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    figure.colorbar(image, ax=axes, label=value_label, fraction=0.05)
    return figure


def heads_figure(
    weights: Tensor | list,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw the attention weights of H heads side by side, in one colour scale.

    weights  (H, T, S)
    queries  T   labels of the rows; positions if None
    keys     S   labels of the columns; those of `queries` if None and T = S
    titles   H   one above each map; "head 0" and so on if None
    title        printed above all
    returns      the figure, at most four maps in a row

    Raises InputError if the sizes do not fit.
    """
    values = check_map(weights, 3, "(H, T, S)")
    num_heads = len(values)
    titles = titles or [f"head {head}" for head in range(num_heads)]
    require(len(titles) == num_heads, f"{num_heads} titles", f"{len(titles)}", "one for each head")
    columns = min(4, num_heads)
    rows = -(-num_heads // columns)
    side = 1.9 if max(values.shape[1:]) <= 8 else 2.4
    figure, grid = new_figure(
        rows, columns, figsize=(side * columns + 0.9, side * rows + 0.7), squeeze=False
    )
    for axes in grid.flat[num_heads:]:
        axes.remove()
    drawn = list(grid.flat[:num_heads])
    for axes, head_values, head_title in zip(drawn, values, titles):
        image = draw_map(axes, head_values, queries, keys, colour_limits(values), numbers=False)
        axes.set_title(head_title)
    figure.supxlabel("key", fontsize=TEXT_PT)
    figure.supylabel("query", fontsize=TEXT_PT)
    figure.suptitle(title, fontsize=TEXT_PT + 1)
    figure.colorbar(image, ax=drawn, label="attention weight", fraction=0.03)
    return figure


def mask_figure(
    masks: Tensor | list | dict[str, Tensor],
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Draw boolean masks: a filled square where a query may attend, a cross where it may not.

    masks    (T, S) boolean, True where the query may attend; or a dict of such masks by name,
             drawn side by side
    queries  T   labels of the rows; positions if None
    keys     S   labels of the columns; those of `queries` if None and T = S
    title        printed above
    returns      the figure

    Raises InputError if a mask is not a boolean matrix.
    """
    masks = masks if isinstance(masks, dict) else {title: masks}
    require(bool(masks), "at least one mask", "none", 'pass {"name": mask}')
    # Only a single mask's title may stand above its own panel.
    heading = title if len(masks) > 1 else ""
    arrays = {name: check_map(mask, 2, "(T, S)") for name, mask in masks.items()}
    for name, mask in masks.items():
        kind = str(getattr(mask, "dtype", "torch.bool" if arrays[name].max() <= 1 else "a list"))
        require("bool" in kind, "a boolean mask", f"{name or 'the mask'} of {kind}", "mask.bool()")
    widest = max(array.shape[1] for array in arrays.values())
    tallest = max(array.shape[0] for array in arrays.values())
    cell = min(0.36, 4.0 / max(widest, tallest))
    size = ((widest * cell + 1.1) * len(masks) + 0.6, tallest * cell + 1.6)
    figure, grid = new_figure(1, len(masks), figsize=size, squeeze=False)
    for axes, (name, array) in zip(grid[0], arrays.items()):
        draw_mask(axes, array.astype(bool), queries, keys, marker_pt=cell * 40)
        axes.set_title(name)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(heading, fontsize=TEXT_PT + 1)
    return figure


def check_map(values: Tensor | list, num_dims: int, shape: str) -> numpy.ndarray:
    """Return `values` as an array of `num_dims` dims; InputError naming `shape` otherwise."""
    array = to_array(values)
    require(
        array.ndim == num_dims and array.size > 0,
        f"values of shape {shape}",
        f"shape {tuple(array.shape)}",
        "select one sequence, for example weights[0]",
    )
    return array


def colour_limits(values: numpy.ndarray) -> tuple[float, float]:
    """Return the values for the two ends of the colour scale: from 0, or around 0."""
    finite = values[numpy.isfinite(values)]
    top = float(numpy.abs(finite).max()) if finite.size else 1.0
    top = top or 1.0
    return (-top if (finite < 0).any() else 0.0), top


def draw_map(
    axes: Axes,
    values: numpy.ndarray,
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
    limits: tuple[float, float],
    numbers: bool = True,
) -> "matplotlib.image.AxesImage":  # noqa: F821
    """Draw `values` (T, S) into `axes`, labelled by `queries` and `keys`; return the image.

    limits   smallest and greatest value of the colour scale
    numbers  write them into the cells where there are few
    """
    image = axes.imshow(
        values, vmin=limits[0], vmax=limits[1], cmap="PuOr" if limits[0] < 0 else "Blues"
    )
    label_cells(axes, values.shape, queries, keys)
    if numbers and values.size <= MAX_NUMBERED_CELLS:
        for (row, column), value in numpy.ndenumerate(values):
            share = abs(value) / limits[1] if numpy.isfinite(value) else 0.0
            text = f"{value:.2f}".replace("-inf", "−∞").replace("-", "−")
            colour = "white" if share > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    return image


def draw_mask(
    axes: Axes,
    mask: numpy.ndarray,
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
    marker_pt: float,
) -> None:
    """Draw the boolean `mask` (T, S) into `axes` with `queries`, `keys`, marks of `marker_pt`."""
    kinds = [
        (mask, "s", BLUE, "may attend", 1.0),
        (~mask, "x", GREY, "may not attend", 0.6),
    ]
    for where, marker, colour, label, share in kinds:
        rows, columns = numpy.nonzero(where)
        size = (marker_pt * share) ** 2
        axes.scatter(columns, rows, s=size, marker=marker, color=colour, label=label)
    num_queries, num_keys = mask.shape
    axes.set_xlim(-0.6, num_keys - 0.4)
    axes.set_ylim(num_queries - 0.4, -0.6)
    axes.set_aspect("equal")
    label_cells(axes, mask.shape, queries, keys)
    axes.set_xlabel("key")
    axes.set_ylabel("query")


def label_cells(
    axes: Axes,
    shape: tuple[int, int],
    queries: Sequence[str] | None,
    keys: Sequence[str] | None,
) -> None:
    """Label the rows of `axes` with `queries`, its columns with `keys`, as `shape` (T, S) asks."""
    if keys is None and shape[0] == shape[1]:
        keys = queries
    for axis, labels, count in [(axes.yaxis, queries, shape[0]), (axes.xaxis, keys, shape[1])]:
        if labels is None:
            step = max(1, -(-count // 8))
            axis.set_ticks(range(0, count, step))
            continue
        asked = f"one label for each of {count} {'rows' if axis is axes.yaxis else 'columns'}"
        require(len(labels) == count, asked, f"{len(labels)} labels", "give the tokens in order")
        if count <= MAX_LABELS:
            # Tokens of a text may hold dollar signs, which would be read as formulas.
            axis.set_ticks(range(count), [str(label) for label in labels], parse_math=False)
    if keys is not None and max(len(str(key)) for key in keys) > 3:
        axes.tick_params(axis="x", rotation=60)
    axes.grid(False)
    axes.tick_params(length=0)
