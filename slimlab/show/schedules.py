"""A step of a pipeline: what each stage computed, and when; several steps one below the other.

Chapter 10 draws schedules with it, and the timeline of a real run beside the ideal one. Viewers
(Perfetto, Nsight Systems) show each kernel and message; here a bar is a whole instruction.
"""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from slimlab.config import check_choice, require
from slimlab.plan.pipeline_schedule import BACKWARD, FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from slimlab.plan.step_timeline import Slot, StepTimeline
from slimlab.show.style import BLACK, BLUE, GREEN, ORANGE, VERMILION, new_figure
from slimlab.show.timeline import MAX_ARROWS, MAX_HATCHED, time_unit

# Kind of instruction -> colour, hatch, words.
LOOKS = {
    FORWARD: (BLUE, "", "forward"),
    BACKWARD: (VERMILION, "////", "backward"),
    INPUT_GRADIENT: (ORANGE, "\\\\\\\\", "input gradient"),
    WEIGHT_GRADIENT: (GREEN, "....", "weight gradient"),
}
# Chunks after the first are paler, so that a micro-batch's ways through a stage are told apart.
PALEST = 0.35
WIDTH_IN = 8.0
NUMBER_PT = 7


def schedule_figure(
    steps: StepTimeline | Mapping[str, StepTimeline],
    title: str = "",
    *,
    unit: str = "s",
    messages: bool = False,
) -> Figure:
    """Draw a bar for each instruction, with its micro-batch; white is idle time, the bubble.

    steps     a timeline, or several by their names: these are drawn one below the other with the
              same time axis, for instance {"measured": ..., "ideal": ...}
    title     printed above
    unit      of the times: "s" (drawn in s, ms, µs or ns, as fits) or "slots", plain numbers
    messages  draw each message as an arrow, where there are not too many
    returns   the figure; every panel says its bubble by both definitions, and the most activations
              that a stage holds, in micro-batches through the whole stage

    Raises InputError if there is nothing to draw, or the unit is another.
    """
    steps = {steps.name: steps} if isinstance(steps, StepTimeline) else dict(steps)
    require(bool(steps), "at least one step", "none", 'pass {"name": timeline}')
    check_choice("unit", unit, ("s", "slots"))
    longest = max(step.step_s for step in steps.values())
    name, per_s = time_unit(longest) if unit == "s" else ("slots", 1.0)
    heights = [0.7 + 0.3 * step.num_stages for step in steps.values()]
    figure, rows = new_figure(
        len(steps),
        1,
        figsize=(WIDTH_IN, min(11.0, sum(heights) + 0.9)),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (label, step) in zip(rows[:, 0], steps.items()):
        _draw_step(axes, step, per_s, longest * per_s, messages)
        axes.set_title(f"{label}: {describe_step(step)}", loc="left")
    rows[-1, 0].set_xlabel(f"time ({name})")
    rows[-1, 0].set_xlim(0, longest * per_s)
    figure.suptitle(title)
    used = {slot.instruction.kind for step in steps.values() for row in step.slots for slot in row}
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=words)
        for kind, (colour, hatch, words) in LOOKS.items()
        if kind in used
    ]
    if any(step.num_chunks > 1 for step in steps.values()):
        handles.append(Patch(facecolor=(BLACK, PALEST), label="paler: a later chunk"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def describe_step(step: StepTimeline) -> str:
    """Say a step's bubble, by both definitions, and its peak of activations.

    step  simulated or measured
    """
    peak = max(step.peak_activations) / step.num_chunks
    return (
        f"bubble {step.bubble_fraction:.1%} of the step, {step.bubble_ratio:.1%} of the computing; "
        f"at most {peak:.3g} micro-batches held"
    )


def _draw_step(axes: Axes, step: StepTimeline, per_s: float, span: float, messages: bool) -> None:
    slots = [slot for row in step.slots for slot in row]
    hatched = len(slots) <= MAX_HATCHED
    for slot in slots:
        _draw_slot(axes, slot, step.num_chunks, per_s, hatched)
        _draw_number(axes, slot, per_s, span)
    if messages and len(step.messages) <= MAX_ARROWS:
        for one in step.messages:
            side = 0.4 if one.dst > one.src else -0.4
            tail, head = (one.start_s * per_s, one.src + side), (one.end_s * per_s, one.dst - side)
            arrow = {"arrowstyle": "-|>", "color": BLACK, "lw": 0.7, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=head, xytext=tail, arrowprops=arrow, zorder=3)
    axes.set_ylabel("stage")
    axes.set_ylim(step.num_stages - 0.4, -0.6)
    axes.set_yticks(range(0, step.num_stages, max(1, -(-step.num_stages // 16))))
    axes.grid(False)


def _draw_slot(axes: Axes, slot: Slot, num_chunks: int, per_s: float, hatched: bool) -> None:
    colour, hatch, _ = LOOKS[slot.instruction.kind]
    paler = slot.instruction.chunk / max(1, num_chunks - 1) * (1 - PALEST)
    axes.broken_barh(
        [(slot.start_s * per_s, (slot.end_s - slot.start_s) * per_s)],
        (slot.stage - 0.4, 0.8),
        facecolor=(colour, 1 - paler),
        edgecolor="white",
        linewidth=0.6,
        hatch=hatch if hatched else "",
        zorder=2,
    )


def _draw_number(axes: Axes, slot: Slot, per_s: float, span: float) -> None:
    """Write the micro-batch where its digits have room."""
    word = str(slot.instruction.micro_batch)
    width = (slot.end_s - slot.start_s) * per_s / span * WIDTH_IN * 0.88
    if width * 72 > NUMBER_PT * (0.65 * len(word) + 0.5):
        place = (slot.start_s + slot.end_s) / 2 * per_s, slot.stage
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        axes.text(*place, word, ha="center", va="center", fontsize=NUMBER_PT, bbox=white, zorder=4)
