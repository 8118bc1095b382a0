"""Tensors cut into pieces: which rank holds which rows or columns of which matrix.

Chapter 09 draws the pair of layers cut by columns and by rows, the matrices of collectives, and a
model's layout. Production tools print layouts as text (torch.distributed.tensor.debug); here pieces
are to scale, and numbered, so that colour says nothing alone.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from slimlab.config import check_choice, check_size, require
from slimlab.show.diagrams import PALE, blank
from slimlab.show.style import BLUE, COLOURS, GREY, TEXT_PT, new_figure, to_array

HOW = ("whole", "rows", "columns", "partial")
UNIT, GAP, SHIFT = 0.14, 0.2, 0.16  # inches: per row or column, around a sign, between partial sums
SIGN_WIDTH = 0.11  # inches per letter of a sign

Piece = tuple[str, int, int, str]


def cut_figure(items: Sequence[Piece | str], num_ranks: int, title: str = "") -> Figure:
    """Draw a formula whose matrices are cut: each piece carries the number of its rank.

    items      from left to right: matrices (name, rows, columns, how) and signs such as "·" between
               them; how is "whole" (every rank has it), "rows" or "columns" (each rank has a part)
               or "partial" (each rank has one of full size, and the matrix is their sum)
    num_ranks  pieces of what is cut
    title      printed above
    returns    the figure; a piece that all have is grey and without a number

    Raises InputError if nothing is drawn, how is unknown, or a size does not divide.
    """
    check_size("num_ranks", num_ranks)
    matrices = [item for item in items if not isinstance(item, str)]
    require(bool(matrices), "at least one matrix", "none", 'pass [("X", 4, 8, "whole")]')
    for name, rows, columns, how in matrices:
        check_choice("how", how, HOW)
        size = {"rows": rows, "columns": columns}.get(how, num_ranks)
        require(
            size % num_ranks == 0,
            f"{how} of {name} that {num_ranks} ranks can share equally",
            f"{size}",
            f"draw it with a multiple of {num_ranks}",
        )
    widths = [_width(item, num_ranks) for item in items]
    tallest = max(rows * UNIT + _spread(how, num_ranks) for _, rows, _, how in matrices)
    size = (sum(widths) + GAP * (len(items) + 1), tallest + (1.25 if title else 0.95))
    figure, axes = blank(size, title)
    left, middle = GAP, 0.5 + tallest / 2
    for item, width in zip(items, widths):
        if isinstance(item, str):
            axes.text(left + width / 2, middle, item, ha="center", va="center", fontsize=12)
        else:
            _draw_matrix(axes, item, left, middle, num_ranks)
        left += width + GAP
    return figure


def block_matrices_figure(
    matrices: Mapping[str, Tensor], num_ranks: int, title: str = ""
) -> Figure:
    """Draw matrices side by side: a filled square for every number that is not 0.

    matrices   name -> (R, C); rows are numbers of all ranks, rank by rank, and so are columns
    num_ranks  parts that rows and columns belong to, equal ones; lines stand between them
    title      printed above all
    returns    the figure

    Raises InputError if there is no matrix, or one does not divide by num_ranks.
    """
    check_size("num_ranks", num_ranks)
    require(bool(matrices), "at least one matrix", "none", 'pass {"name": matrix}')
    arrays = {name: to_array(matrix) for name, matrix in matrices.items()}
    for name, array in arrays.items():
        require(
            array.ndim == 2 and not any(size % num_ranks for size in array.shape),
            f"a matrix whose sides {num_ranks} ranks share equally",
            f"{name} {array.shape}",
            "stack the rows of all ranks",
        )
    shares = [array.shape[1] for array in arrays.values()]
    side = 0.17
    tallest = max(array.shape[0] for array in arrays.values())
    size = (sum(shares) * side + 0.75 * len(arrays), tallest * side + 1.1)
    figure, grid = new_figure(
        1, len(arrays), figsize=size, squeeze=False, gridspec_kw={"width_ratios": shares}
    )
    for axes, (name, array) in zip(grid[0], arrays.items()):
        _draw_blocks(axes, array, num_ranks)
        axes.set_title(name, fontsize=TEXT_PT)
    grid[0][0].set_ylabel("after, rank by rank")
    figure.supxlabel("before, rank by rank", fontsize=TEXT_PT)
    figure.suptitle(title, fontsize=TEXT_PT + 1)
    return figure


def layout_figure(
    held: Mapping[str, Sequence[str]], whole: Mapping[str, bool], title: str = ""
) -> Figure:
    """Tabulate what each rank holds of each tensor: parts in colour, what all have in grey.

    held     name -> what stands in the cell of each rank, such as "(16, 32)"
    whole    name -> every rank holds all of it
    title    printed above
    returns  the figure, tensors from the top and ranks from the left

    Raises InputError if nothing is held, rows have different lengths, or names do not agree.
    """
    lengths = {len(cells) for cells in held.values()}
    require(
        len(lengths) == 1 and held.keys() == whole.keys(),
        "for each tensor one text per rank, and whether it is whole",
        f"texts of {sorted(lengths)} ranks, {len(held)} and {len(whole)} names",
        "give both by the same names",
    )
    num_ranks = lengths.pop()
    figure, axes = new_figure(figsize=(2.6 + 1.15 * num_ranks, 0.8 + 0.3 * len(held)))
    for row, (name, cells) in enumerate(held.items()):
        for rank, text in enumerate(cells):
            look = {"facecolor": "#E4E4E4", "edgecolor": "white"}
            if not whole[name]:
                look = {"facecolor": COLOURS[rank % len(COLOURS)], "edgecolor": "white"}
            axes.add_patch(Rectangle((rank - 0.5, row - 0.5), 1, 1, lw=1.5, **look, alpha=0.55))
            axes.text(rank, row, text, ha="center", va="center", fontsize=9)
    axes.set(xlim=(-0.5, num_ranks - 0.5), ylim=(len(held) - 0.5, -0.5))
    axes.set_yticks(range(len(held)), list(held))
    axes.set_xticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    return figure


def _spread(how: str, num_ranks: int) -> float:
    return SHIFT * (num_ranks - 1) if how == "partial" else 0.0


def _width(item: Piece | str, num_ranks: int) -> float:
    if isinstance(item, str):
        return SIGN_WIDTH * len(item)
    name, _, columns, how = item
    return max(columns * UNIT + _spread(how, num_ranks), 0.1 * len(name))


def _draw_matrix(axes: Axes, item: Piece, left: float, middle: float, num_ranks: int) -> None:
    name, rows, columns, how = item
    width, height, spread = columns * UNIT, rows * UNIT, _spread(how, num_ranks)
    top = middle + (height + spread) / 2
    left += (_width(item, num_ranks) - width - spread) / 2
    for rank in range(num_ranks if how != "whole" else 1):
        x, y, piece = left, top - height, [width, height]
        if how == "columns":
            piece[0] = width / num_ranks
            x = left + rank * piece[0]
        elif how == "rows":
            piece[1] = height / num_ranks
            y = top - (rank + 1) * piece[1]
        elif how == "partial":
            x, y = left + rank * SHIFT, top - height - rank * SHIFT
        colour = GREY if how == "whole" else COLOURS[rank % len(COLOURS)]
        look = {"edgecolor": colour, "facecolor": PALE if how != "whole" else "#EEEEEE"}
        axes.add_patch(Rectangle((x, y), *piece, lw=1.6, zorder=2 + rank, **look))
        # Of overlapping sheets only the lower right corner of each stays in sight.
        at = (x + piece[0] / 2, y + piece[1] / 2)
        if how == "partial" and rank < num_ranks - 1:
            at = (x + SHIFT / 2, y + piece[1] - SHIFT)
        if how != "whole":
            axes.text(*at, str(rank), ha="center", va="center", fontsize=9, color=colour, zorder=9)
    below = top - height - spread - 0.06
    words = {"whole": "on all ranks", "partial": "to be added"}.get(how, f"cut by {how}")
    axes.text(
        left + (width + spread) / 2, below, f"{name}\n{words}", ha="center", va="top", fontsize=9
    )


def _draw_blocks(axes: Axes, array: "numpy.ndarray", num_ranks: int) -> None:  # noqa: F821
    num_rows, num_columns = array.shape
    for row, column in zip(*array.nonzero()):
        axes.add_patch(Rectangle((column + 0.1, row + 0.1), 0.8, 0.8, facecolor=BLUE))
    line = {"color": GREY, "linewidth": 0.8}
    for part in range(1, num_ranks):
        axes.axhline(part * num_rows / num_ranks, **line)
        axes.axvline(part * num_columns / num_ranks, **line)
    axes.set(xlim=(0, num_columns), ylim=(num_rows, 0), aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(True)
