"""Diagrams: shapes of matrix products, boxes with arrows, ranks with messages.

Chapters 00 to 02 use them. Drawing tools (Mermaid, Graphviz) place boxes by themselves; here the
caller says where they stand, and the picture is the same on every machine.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from slimlab.config import require
from slimlab.show.style import BLACK, BLUE, COLOURS, GREY, TEXT_PT, VERMILION, new_figure

Matrix = tuple[str, str, str]
PALE = "#E8F1F8"


def matrix_product_figure(
    products: Sequence[tuple[Matrix, Matrix, Matrix]],
    sizes: Mapping[str, int],
    title: str = "",
) -> Figure:
    """Draw matrix products to scale, one per row: left times right gives result.

    products  rows of three matrices (name, rows, columns), where rows and columns are letters:
              (("Q", "T", "E"), ("Kᵀ", "E", "S"), ("scores", "T", "S"))
    sizes     letter -> number, for example {"T": 3, "E": 4, "S": 5}
    title     printed above
    returns   the figure; each matrix carries its name, its letters and their numbers

    Raises InputError if two matrices cannot be multiplied, the result has other sizes, or a letter
    has no size.
    """
    require(bool(products), "at least one product", "none", "pass a list with three matrices")
    letters = {letter for row in products for matrix in row for letter in matrix[1:]}
    missing = sorted(letters - set(sizes))
    require(not missing, f"a size for each of {sorted(letters)}", f"none for {missing}", "add it")
    for left, right, result in products:
        fits = left[2] == right[1] and (left[1], right[2]) == (result[1], result[2])
        given = " × ".join(f"{m[0]} ({m[1]}, {m[2]})" for m in (left, right))
        asked = "products (n, k) × (k, m) = (n, m)"
        require(fits, asked, f"{given} = {result[0]} {result[1:]}", "check the letters")
    unit, gap = 0.27, 0.75
    widths = [[sizes[m[2]] * unit for m in row] for row in products]
    heights = [max(sizes[m[1]] for m in row) * unit for row in products]
    column_widths = [max(row[k] for row in widths) for k in range(3)]
    size = (
        sum(column_widths) + 4 * gap,
        sum(heights) + 0.6 * len(products) + (0.5 if title else 0.2),
    )
    figure, axes = blank(size, title)
    top = size[1] - (0.3 if title else 0.0)
    for row, height in zip(products, heights):
        left_edge, middle = gap, top - 0.4 - height / 2
        for k, matrix in enumerate(row):
            centre = left_edge + column_widths[k] / 2
            draw_matrix(axes, matrix, sizes, (centre, middle), unit, COLOURS[k])
            if k < 2:
                sign_x = left_edge + column_widths[k] + gap / 2
                axes.text(sign_x, middle, "×="[k], ha="center", va="center", fontsize=16)
            left_edge += column_widths[k] + gap
        top -= height + 0.6
    return figure


def draw_matrix(
    axes: Axes,
    matrix: Matrix,
    sizes: Mapping[str, int],
    centre: tuple[float, float],
    unit: float,
    colour: str,
) -> None:
    """Draw one `matrix` into `axes` around `centre`: cells of side `unit`, edges in `colour`.

    sizes  letter -> number
    """
    name, row_letter, column_letter = matrix
    rows, columns = sizes[row_letter], sizes[column_letter]
    width, height = columns * unit, rows * unit
    left, bottom = centre[0] - width / 2, centre[1] - height / 2
    axes.add_patch(
        Rectangle((left, bottom), width, height, facecolor=PALE, edgecolor=colour, lw=1.8)
    )
    for k in range(1, columns):
        axes.plot([left + k * unit] * 2, [bottom, bottom + height], color="white", lw=1)
    for k in range(1, rows):
        axes.plot([left, left + width], [bottom + k * unit] * 2, color="white", lw=1)
    axes.text(*centre, name, ha="center", va="center", fontsize=TEXT_PT + 1, weight="bold")
    beside = {"fontsize": 9, "color": BLACK}
    axes.text(
        centre[0], bottom + height + 0.05, f"{column_letter}={columns}", ha="center", **beside
    )
    axes.text(
        left - 0.06,
        centre[1],
        f"{row_letter}={rows}",
        ha="right",
        va="center",
        rotation=90,
        **beside,
    )


def flow_figure(steps: Sequence[str], labels: Sequence[str] = (), title: str = "") -> Figure:
    """Draw a chain from left to right: text → tokenizer → ids → model → probabilities.

    steps    words in the boxes; "\\n" starts a new line
    labels   words above the arrows, one fewer than steps; none if empty
    title    printed above
    returns  the figure

    Raises InputError if the number of labels does not fit.
    """
    require(bool(steps), "at least one step", "none", 'pass the words: ["text", "ids"]')
    fits = len(labels) in (0, len(steps) - 1)
    asked = f"{len(steps) - 1} labels, or none"
    require(fits, asked, f"{len(labels)} labels", "one for each arrow")
    boxes = {f"{k}": (float(k), 0.0, text) for k, text in enumerate(steps)}
    labels = list(labels) or [""] * (len(steps) - 1)
    arrows = [(f"{k}", f"{k + 1}", text) for k, text in enumerate(labels)]
    return box_figure(boxes, arrows, title)


def box_figure(
    boxes: Mapping[str, tuple[float, float, str]],
    arrows: Sequence[tuple[str, str, str]],
    title: str = "",
) -> Figure:
    """Draw boxes on a grid and arrows between them.

    boxes    name -> (column, row, text); row 0 is the lowest, fractions are allowed
    arrows   (from name, to name, label); the label may be empty
    title    printed above
    returns  the figure

    Raises InputError if an arrow names a box that is not there.
    """
    require(bool(boxes), "at least one box", "none", 'pass {"name": (0, 0, "text")}')
    for source, target, _ in arrows:
        missing = {source, target} - set(boxes)
        asked = f"arrows between the boxes {sorted(boxes)}"
        require(not missing, asked, f"{sorted(missing)}", "use the names of the boxes")
    longest = max(len(line) for _, _, text in boxes.values() for line in text.split("\n"))
    labelled = max([len(label) for _, _, label in arrows], default=0)
    width, height = 0.4 + 0.09 * longest, 0.62
    step_x, step_y = width + max(0.4, 0.2 + 0.085 * labelled), 1.15
    columns = [place[0] for place in boxes.values()]
    rows = [place[1] for place in boxes.values()]
    size = (
        (max(columns) - min(columns)) * step_x + width + 0.3,
        (max(rows) - min(rows)) * step_y + height + (0.7 if title else 0.3),
    )
    figure, axes = blank(size, title)
    centres = {}
    for name, (column, row, text) in boxes.items():
        x = (column - min(columns)) * step_x + width / 2 + 0.15
        y = (row - min(rows)) * step_y + height / 2 + 0.15
        centres[name] = axes.text(x, y, text, ha="center", va="center", zorder=3)
        style = "round,pad=0,rounding_size=0.08"
        corner = (x - width / 2, y - height / 2)
        patch = FancyBboxPatch(
            corner, width, height, boxstyle=style, facecolor=PALE, edgecolor=BLUE, lw=1.5
        )
        centres[name] = (x, y, axes.add_patch(patch))
    for source, target, label in arrows:
        draw_arrow(axes, centres[source], centres[target], label)
    return figure


def draw_arrow(axes: Axes, source: tuple, target: tuple, label: str) -> None:
    """Draw an arrow in `axes` from the edge of one box to another, with `label` beside it.

    source  x, y and the patch that the arrow leaves
    target  x, y and the patch that it reaches
    """
    arrow = {"arrowstyle": "-|>", "color": BLACK, "lw": 1.3, "shrinkA": 1, "shrinkB": 1}
    arrow |= {"patchA": source[2], "patchB": target[2]}
    axes.annotate("", xy=target[:2], xytext=source[:2], arrowprops=arrow, zorder=2)
    if label:
        middle = (source[0] + target[0]) / 2, (source[1] + target[1]) / 2
        beside = abs(source[1] - target[1]) > abs(source[0] - target[0]) * 0.6
        place = {"ha": "left", "va": "center"} if beside else {"ha": "center", "va": "bottom"}
        axes.text(
            middle[0] + 0.07 * beside, middle[1] + 0.05 * (not beside), label, fontsize=8, **place
        )


def lanes_figure(
    world_size: int,
    messages: Sequence[tuple[int, int, int, str]],
    work: Sequence[tuple[int, int, str]] = (),
    title: str = "",
) -> Figure:
    """Draw ranks as lanes, steps from left to right, and messages as arrows between lanes.

    world_size  number of lanes; rank 0 is the uppermost
    messages    (step, src, dst, label): leaves src in that step, arrives in the next
    work        (step, rank, text): what a rank does in a step, as a box on its lane
    title       printed above
    returns     the figure

    Raises InputError if a rank is not one of the world's.
    """
    named = [rank for _, src, dst, _ in messages for rank in (src, dst)]
    for rank in [*named, *(rank for _, rank, _ in work)]:
        asked = f"ranks 0 to {world_size - 1}"
        require(0 <= rank < world_size, asked, f"rank {rank}", "check messages and work")
    last = max([step + 1 for step, *_ in messages] + [step for step, *_ in work] + [1])
    longest = max([len(text) for *_, text in work] + [4])
    step_x, step_y, box = max(1.3, 0.45 + 0.085 * longest), 0.8, 0.3 + 0.085 * longest
    size = (1.1 + last * step_x + box, (world_size - 1) * step_y + (1.3 if title else 1.0))
    figure, axes = blank(size, title)
    lanes = [0.6 + (world_size - 1 - rank) * step_y for rank in range(world_size)]
    left = 0.9 + box / 2
    for rank, y in enumerate(lanes):
        axes.plot([0.8, size[0] - 0.1], [y, y], color=GREY, lw=1, zorder=1)
        axes.text(0.72, y, f"rank {rank}", ha="right", va="center")
    for step, rank, text in work:
        x, y = left + step * step_x, lanes[rank]
        corner = (x - box / 2, y - 0.15)
        axes.add_patch(
            Rectangle(corner, box, 0.3, facecolor=PALE, edgecolor=BLUE, lw=1.2, zorder=2)
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=8, zorder=3)
    for step, src, dst, label in messages:
        tail, head = (left + step * step_x, lanes[src]), (left + (step + 1) * step_x, lanes[dst])
        arrow = {"arrowstyle": "-|>", "color": VERMILION, "lw": 1.5, "shrinkA": 12, "shrinkB": 12}
        axes.annotate("", xy=head, xytext=tail, arrowprops=arrow, zorder=4)
        middle = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(*middle, label, ha="center", va="center", fontsize=8, bbox=white, zorder=5)
    axes.text(size[0] - 0.1, 0.2, "time →", ha="right", va="center", color=GREY, fontsize=9)
    return figure


def blank(size: tuple[float, float], title: str) -> tuple[Figure, Axes]:
    """Return a figure of `size` in inches, without axes lines, with `title`; 1 unit is 1 inch."""
    figure, axes = new_figure(figsize=size, layout="none")
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, size[0]), ylim=(0, size[1]))
    axes.axis("off")
    if title:
        axes.text(size[0] / 2, size[1] - 0.08, title, ha="center", va="top", fontsize=TEXT_PT + 1)
    return figure, axes
