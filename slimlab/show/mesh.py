"""A mesh of ranks on its hosts: which axes join whom, and which leave a host.

Chapter 11 draws it. Tools for clusters (nvidia-smi topo, hwloc's lstopo) draw cables; here the axes
of a program are drawn.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from slimlab.config import require
from slimlab.parallel.mesh import AXES, MeshShape
from slimlab.show.diagrams import blank
from slimlab.show.style import BLACK, BLUE, GREEN, GREY, VERMILION

STYLES = {"tensor": (VERMILION, "-"), "pipeline": (BLUE, "--"), "data": (GREEN, ":")}
MAX_RANKS = 32
BOX = 0.46


def mesh_figure(shape: MeshShape, hosts: Sequence[object], title: str = "") -> Figure:
    """Draw ranks as boxes on their hosts, and a line between neighbours along each axis.

    shape    of the mesh, at most 32 ranks
    hosts    the host of each position of the mesh, in order
    title    printed above
    returns  the figure: replicas from left to right, stages downwards, the ranks of a tensor group
             beside each other; a frame round each host; a box says rank and coordinates

    Raises InputError for too many ranks, or hosts that are not one per rank.
    """
    require(
        shape.world_size <= MAX_RANKS,
        f"at most {MAX_RANKS} ranks in a figure",
        f"{shape.world_size}",
        "draw a smaller mesh",
    )
    given = f"{len(hosts)}"
    require(len(hosts) == shape.world_size, f"{shape.world_size} hosts", given, "give one per rank")
    width = shape.tensor * 1.0 + 0.5
    height = shape.pipeline * 1.05 + (1.1 if title else 0.8)
    size = ((shape.data - 1) * width + shape.tensor + 0.3, height)
    figure, axes = blank(size, title)
    places = [_place(shape, position, width) for position in range(shape.world_size)]
    for axis in AXES:
        groups = {shape.positions_along(axis, position) for position in range(shape.world_size)}
        for one, other in (pair for group in groups for pair in zip(group, group[1:])):
            _draw_link(axes, places[one], places[other], axis)
    for host in dict.fromkeys(hosts):
        _draw_host(axes, [at for at, own in zip(places, hosts) if own == host], host)
    for position, (x, y) in enumerate(places):
        corner = (x - BOX / 2, y - BOX / 2)
        box = Rectangle(corner, BOX, BOX, facecolor="white", edgecolor=BLACK, lw=1.2, zorder=3)
        axes.add_patch(box)
        numbers = ",".join(str(at) for at in shape.coordinates_at(position))
        axes.text(x, y + 0.07, f"{position}", ha="center", va="center", fontsize=9, zorder=4)
        axes.text(x, y - 0.11, numbers, ha="center", va="center", fontsize=7, zorder=4)
    lines = [
        Line2D([], [], color=colour, linestyle=style, label=axis)
        for axis, (colour, style) in STYLES.items()
    ]
    axes.legend(handles=lines, loc="lower center", ncols=3)
    return figure


def _place(shape: MeshShape, position: int, width: float) -> tuple[float, float]:
    replica, stage, part = shape.coordinates_at(position)
    return 0.65 + replica * width + part * 1.0, 1.0 + (shape.pipeline - 1 - stage) * 1.05


def _draw_link(axes: Axes, one: tuple, other: tuple, axis: str) -> None:
    colour, style = STYLES[axis]
    # An arc for replicas, whose way passes over the other ranks of the tensor group.
    bend = 0.35 if axis == "data" else 0.0
    arrow = {"arrowstyle": "-", "color": colour, "linestyle": style, "lw": 2.0}
    arrow["connectionstyle"] = f"arc3,rad={-bend}"
    axes.annotate("", xy=other, xytext=one, arrowprops=arrow, zorder=2)


def _draw_host(axes: Axes, places: list[tuple[float, float]], host: object) -> None:
    left, bottom = (min(at) - 0.36 for at in zip(*places))
    right, top = (max(at) + 0.36 for at in zip(*places))
    size = (right - left, top - bottom)
    frame = Rectangle((left, bottom), *size, fill=False, edgecolor=GREY, lw=1.2, zorder=1)
    axes.add_patch(frame)
    axes.text(left, bottom - 0.04, f"host {host}", fontsize=8, color=GREY, va="top")
