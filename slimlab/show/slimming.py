"""What became of a model that was made smaller: its way through the steps, and the ratios.

`slimlab slim` draws slimming_figure beside its report; chapter 15 ends with pareto_figure.
Dashboards of production draw such points for hundreds of runs, and let one filter them.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slimlab.config import require
from slimlab.show.style import BLUE, COLOURS, GREY, MARKERS, VERMILION, new_figure
from slimlab.slim.report import SlimReport

MEGABYTE = 1e6
SLOW, FAST = 40, 400  # areas of the dots, in points


def slimming_figure(report: SlimReport, title: str = "") -> Figure:
    """Draw size and bits per byte after each step, and every ratio of slim to original.

    report   of slimlab.slim.recipe.slim_checkpoint
    title    printed above
    returns  the figure: on the left the steps from the original on, on the right a bar for each
             ratio, lines from the least to the greatest round where there were several
    """
    figure, (way, ratios) = new_figure(1, 2, figsize=(8.6, 3.4), width_ratios=(1, 1.1))
    _draw_way(way, report)
    _draw_ratios(ratios, report)
    figure.suptitle(title or f"{report.weights_ratio:.3f} of the file for {report.price:+.4f} bits "
                    "per byte", fontsize=11)  # fmt: skip
    return figure


def _draw_way(axes: Axes, report: SlimReport) -> None:
    stages = report.stages[:-1] if len(report.stages) > 2 else report.stages
    sizes = [one.weights_bytes / MEGABYTE for one in stages]
    bits = [one.bits_per_byte for one in stages]
    axes.plot(sizes, bits, color=GREY, linestyle="--", zorder=1)
    for index, one in enumerate(stages):
        place = sizes[index], bits[index]
        axes.plot(*place, MARKERS[index], color=COLOURS[index], markersize=8, label=one.name)
    axes.set_xlim(0, 1.08 * max(sizes))
    axes.margins(y=0.25)
    axes.set(xlabel="weights on disk (MB)", ylabel="bits per byte, held out")
    axes.legend(loc="best")


def _draw_ratios(axes: Axes, report: SlimReport) -> None:
    bits = report.slim.bits_per_byte / report.original.bits_per_byte
    rows = [
        ("weights on disk", report.weights_ratio, None),
        ("tensors in memory", report.memory_ratio, None),
        ("bits per byte", bits, None),
        ("tokens read per s", report.reading_ratio.median, report.reading_ratio),
        ("tokens written per s", report.writing_ratio.median, report.writing_ratio),
    ]
    for place, (_, value, spread) in enumerate(rows):
        colour, hatch = (BLUE, "") if spread is None else (VERMILION, "//")
        axes.barh(place, value, 0.6, color=colour, hatch=hatch, edgecolor="white")
        end = value
        if spread is not None:
            axes.plot([spread.low, spread.high], [place, place], color="black", linewidth=1.4)
            end = max(spread.high, value)
        axes.text(end, place, f" {value:.3g}", va="center", fontsize=8)
    axes.axvline(1, color=GREY, linestyle="--")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlabel("slim / original")
    axes.grid(False, axis="y")


def pareto_figure(reports: Mapping[str, SlimReport], title: str = "") -> Figure:
    """Draw models by size and bits per byte; a larger dot reads faster.

    reports  label -> report; all of one original
    title    printed above
    returns  the figure: the original in grey, and a line through the models that no other beats in
             both size and bits per byte

    Raises InputError for no report, or reports of different originals.
    """
    require(bool(reports), "at least one report", "none", 'pass {"label": report}')
    originals = {(one.source, one.original.bits_per_byte) for one in reports.values()}
    asked, change = "reports of one original", "draw the others in a figure of their own"
    require(len(originals) == 1, asked, f"{len(originals)} originals", change)
    first = next(iter(reports.values()))
    figure, axes = new_figure(figsize=(6.8, 4.0))
    whole = first.original.weights_bytes / MEGABYTE, first.original.bits_per_byte
    axes.scatter(*whole, s=_area(1), color=GREY, marker="o", label="original", zorder=3)
    points = []
    for index, (label, one) in enumerate(reports.items()):
        point = one.slim.weights_bytes / MEGABYTE, one.slim.bits_per_byte
        points.append(point)
        speed = one.reading_ratio.median
        axes.scatter(
            *point,
            s=_area(speed),
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
            label=f"{label} (reads x {speed:.2g})",
            zorder=3,
        )
    front = pareto_front([whole, *points])
    axes.plot(*zip(*front), color=GREY, linestyle="--", zorder=1)
    axes.set(xlabel="weights on disk (MB)", ylabel="bits per byte, held out", title=title)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.legend(markerscale=0.6)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats, sorted by the first number.

    points  pairs of numbers of which less is better
    """
    front, least = [], float("inf")
    for point in sorted(set(points)):
        if point[1] < least:
            front.append(point)
            least = point[1]
    return front


def _area(speed: float) -> float:
    return min(max(120 * speed, SLOW), FAST)
