"""Which weights of a matrix are left.

Chapter 15 draws three ways of losing half of a matrix. Tools for sparse matrices (matplotlib's spy)
draw millions of elements as dots; here each has a square of its own.
"""

from collections.abc import Mapping

import numpy
from matplotlib.figure import Figure
from torch import Tensor

from slimlab.config import require
from slimlab.show.maps import check_map
from slimlab.show.style import BLUE, GREY, TEXT_PT, new_figure

LARGEST = 40


def sparsity_figure(masks: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw prune_masks side by side: a filled square stays, a dot is pruned.

    masks    name -> (O, I) bool, at most 40 rows and columns
    title    printed above all
    returns  the figure

    Raises InputError if there is none, or one is no matrix or too large to be seen.
    """
    require(bool(masks), "at least one mask", "none", 'pass {"name": mask}')
    arrays = {name: check_map(mask, 2, "(O, I)").astype(bool) for name, mask in masks.items()}
    for name, array in arrays.items():
        asked, given = f"at most {LARGEST} rows and columns", f"{name}: {array.shape}"
        require(max(array.shape) <= LARGEST, asked, given, "give a corner: mask[:16, :16]")
    longest = max(max(array.shape) for array in arrays.values())
    cell = min(0.16, 3.0 / longest)
    size = (len(arrays) * (longest * cell + 0.4) + 0.3, longest * cell + 1.4)
    figure, grid = new_figure(1, len(arrays), figsize=size, squeeze=False)
    for axes, (name, array) in zip(grid[0], arrays.items(), strict=True):
        for where, marker, colour, part, label in (
            (array, "s", BLUE, 0.75, "stays"),
            (~array, ".", GREY, 0.35, "pruned"),
        ):
            rows, columns = numpy.nonzero(where)
            area = (72 * cell * part) ** 2
            axes.scatter(columns, rows, s=area, marker=marker, color=colour, label=label, lw=0)
        axes.set(xlim=(-0.6, array.shape[1] - 0.4), ylim=(array.shape[0] - 0.4, -0.6))
        axes.set(aspect="equal", xlabel="input feature", title=name, xticks=[], yticks=[])
        axes.grid(False)
    grid[0][0].set_ylabel("output feature")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=TEXT_PT + 1)
    return figure
