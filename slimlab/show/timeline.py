"""What each rank was in, and when: bars for calls, arrows for messages.

Chapter 07 draws its traces with it. Viewers (Perfetto, which opens what Trace.to_chrome writes, or
Vampir) zoom into millions of events; this figure shows some hundred at once.
"""

from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from slimlab.comm.events import Event
from slimlab.comm.trace_data import Trace
from slimlab.config import require
from slimlab.show.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, new_figure

MAX_ARROWS = 400
# Hatches of many narrow bars would hide where one ends.
MAX_HATCHED = 200
THINNEST = 0.003  # of the width of a timeline
# Kind of call -> colour and hatch; calls that are not listed are collectives.
LOOKS = {
    "send": (BLUE, ""),
    "receive": (VERMILION, "////"),
    "send and receive": (PURPLE, "xxxx"),
    "wait": (ORANGE, "...."),
    "compute": (GREY, ""),
    "collective": (GREEN, "\\\\\\\\"),
}
KINDS = {
    "send": "send",
    "isend": "send",
    "recv": "receive",
    "irecv": "receive",
    "sendrecv": "send and receive",
    "wait": "wait",
    "compute": "compute",
}


def timeline_figure(trace: Trace, title: str = "", arrows: bool = True) -> Figure:
    """Draw what each rank was in, and when: a bar per call, an arrow per message.

    trace    of all ranks
    title    printed above
    arrows   draw messages, from where the sender's call begins to where the receiver's ends
    returns  the figure; calls carry their label, or the name of their collective, where there is
             room

    Raises InputError for a trace without events.
    """
    require(bool(trace.events), "a trace with events", "none", "trace a program that calls")
    unit, per_s = time_unit(trace.end_s)
    height = 1.3 + trace.world_size * min(0.6, max(0.2, 4.8 / trace.world_size))
    figure, axes = new_figure(figsize=(8.0, min(height, 11.0)))
    span = trace.end_s * per_s or 1.0
    hatched = len(trace.events) <= MAX_HATCHED
    for event in trace.events:
        _draw_bar(axes, event, per_s, span, hatched)
    _draw_words(axes, trace.events, per_s, span)
    if arrows and trace.messages.sum() <= MAX_ARROWS:
        _draw_messages(axes, trace.events, per_s)
    word = "virtual time" if trace.virtual else "time"
    measured = "" if trace.uncertainty_s == 0 else f", ranks ± {trace.uncertainty_s * per_s:.2g}"
    axes.set_xlabel(f"{word} ({unit}{measured})")
    axes.set_ylabel("rank")
    axes.set_xlim(-0.01 * span, 1.01 * span)
    axes.set_ylim(trace.world_size - 0.4, -0.6)
    axes.set_yticks(range(0, trace.world_size, max(1, -(-trace.world_size // 16))))
    axes.grid(False, axis="y")
    axes.set_title(title)
    used = {_kind(event) for event in trace.events}
    handles = [
        Patch(facecolor=colour, hatch=hatch if hatched else "", edgecolor="white", label=kind)
        for kind, (colour, hatch) in LOOKS.items()
        if kind in used
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def time_unit(longest_s: float) -> tuple[str, float]:
    """Choose a unit in which a time is a number between 1 and 1000, and how many make a second.

    longest_s  in seconds
    """
    for unit, per_s in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if longest_s * per_s >= 1:
            return unit, per_s
    return ("s", 1.0) if longest_s == 0 else ("ns", 1e9)


def _kind(event: Event) -> str:
    return KINDS.get(event.call, "collective")


def _draw_bar(axes: Axes, event: Event, per_s: float, span: float, hatched: bool) -> None:
    colour, hatch = LOOKS[_kind(event)]
    begin, width = event.begin_s * per_s, event.seconds * per_s
    # A call that took no time is still a thin line.
    shown = max(width, THINNEST * span)
    look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.5}
    look |= {"hatch": hatch} if hatched else {}
    above = 2.5 if width < shown else 2
    axes.broken_barh([(begin, shown)], (event.rank - 0.3, 0.6), zorder=above, **look)


def _draw_words(axes: Axes, events: Sequence[Event], per_s: float, span: float) -> None:
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85}
    for (rank, word), run in groupby(events, lambda event: (event.rank, _word(event))):
        run = list(run)
        begin, end = run[0].begin_s * per_s, run[-1].end_s * per_s
        if word and (end - begin) / span > 0.013 * len(word) + 0.02:
            place = (begin + end) / 2, rank
            axes.text(*place, word, ha="center", va="center", fontsize=8, bbox=white, zorder=4)


def _word(event: Event) -> str:
    return event.label or (event.call if _kind(event) == "collective" else "")


def _draw_messages(axes: Axes, events: Sequence[Event], per_s: float) -> None:
    arrives = {one.received.key: one for one in events if one.received}
    arrow = {"arrowstyle": "-|>", "color": BLACK, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
    for event in events:
        if event.sent and event.sent.key in arrives:
            other = arrives[event.sent.key]
            down = 0.3 if other.rank > event.rank else -0.3
            tail = event.begin_s * per_s, event.rank + down
            head = other.end_s * per_s, other.rank - down
            axes.annotate("", xy=head, xytext=tail, arrowprops=arrow, zorder=3)
