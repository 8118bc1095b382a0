"""Figures of pipeline steps hold every slot where and as long as it was."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex, to_rgba

from slimlab import show
from slimlab.config import InputError
from slimlab.parallel.schedules_zero_bubble import make_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes
from slimlab.show.schedules import LOOKS, describe_step


@pytest.fixture(autouse=True)
def _style():
    show.use_style()


def step_of(name, p, m, *times):
    return simulate(make_schedule(name, p, m), StageTimes(*times))


def bars_of(axes):
    """(stage, start, end, colour, opacity) of each bar, rounded."""
    found = []
    for bars in axes.collections:
        (box,) = [path.get_extents() for path in bars.get_paths()]
        colour = tuple(bars.get_facecolor()[0])
        stage = round((box.y0 + box.y1) / 2)
        edges = round(box.x0, 9), round(box.x1, 9)
        found.append((stage, *edges, to_hex(colour[:3]).upper(), round(float(colour[3]), 3)))
    return sorted(found)


def test_every_instruction_is_a_bar_at_its_stage_from_its_start_to_its_end():
    step = step_of("zb_h1", 3, 4, 1, 2, 1, 0.5)
    (axes,) = show.schedule_figure(step, "small", unit="slots").axes
    assert bars_of(axes) == sorted(
        (slot.stage, slot.start_s, slot.end_s, LOOKS[slot.instruction.kind][0], 1.0)
        for row in step.slots
        for slot in row
    )
    assert axes.get_xlabel() == "time (slots)"
    assert axes.get_ylim() == (2.6, -0.6)


def test_each_bar_carries_its_micro_batch_where_there_is_room():
    step = step_of("1f1b", 2, 3, 1, 1, 1)
    (axes,) = show.schedule_figure(step, unit="slots").axes
    placed = [(*text.get_position(), text.get_text()) for text in axes.texts]
    assert sorted(placed) == sorted(
        ((slot.start_s + slot.end_s) / 2, slot.stage, str(slot.instruction.micro_batch))
        for row in step.slots
        for slot in row
    )
    (crowded,) = show.schedule_figure(step_of("1f1b", 2, 300, 1, 1, 1), unit="slots").axes
    assert [text.get_text() for text in crowded.texts] == []


def test_seconds_are_drawn_in_the_unit_that_fits():
    (axes,) = show.schedule_figure(step_of("gpipe", 2, 2, 1e-3, 1e-3, 1e-3)).axes
    assert axes.get_xlabel() == "time (ms)"
    assert axes.get_xlim() == pytest.approx((0, 9))
    assert bars_of(axes)[0][:3] == (0, 0, 1)


def test_several_steps_share_their_time_axis_and_each_says_its_bubble_and_peak():
    steps = {"ideal": step_of("1f1b", 4, 4, 1, 1, 1), "measured": step_of("1f1b", 4, 4, 1, 1, 1, 1)}
    figure = show.schedule_figure(steps, "beside each other", unit="slots")
    first, second = figure.axes
    assert first.get_title(loc="left") == (
        "ideal: bubble 42.9% of the step, 75.0% of the computing; at most 4 micro-batches held"
    )
    assert second.get_title(loc="left").startswith("measured: bubble ")
    assert first.get_xlim() == second.get_xlim() == (0, steps["measured"].step_s)
    assert figure.get_suptitle() == "beside each other"


def test_peaks_are_said_in_micro_batches_of_a_whole_stage():
    assert "at most 5.5 micro-batches held" in describe_step(step_of("interleaved", 4, 8, 1, 1, 1))


def test_later_chunks_are_paler_and_the_legend_says_so():
    figure = show.schedule_figure(step_of("zb_v", 2, 3, 1, 1, 1), unit="slots")
    opacities = {bar[-1] for bar in bars_of(figure.axes[0])}
    assert opacities == {1.0, 0.35}
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["forward", "input gradient", "weight gradient", "paler: a later chunk"]
    plain = show.schedule_figure(step_of("gpipe", 2, 3, 1, 1, 1)).legends[0]
    assert [text.get_text() for text in plain.get_texts()] == ["forward", "backward"]


def test_messages_are_arrows_from_end_to_arrival():
    step = step_of("gpipe", 2, 1, 2, 2, 2, 1)
    (axes,) = show.schedule_figure(step, unit="slots", messages=True).axes
    arrows = [(t.xyann, t.xy) for t in axes.texts if t.get_text() == ""]
    assert arrows == [((2, 0.4), (3, 0.6)), ((9, 0.6), (10, 0.4))]
    (plain,) = show.schedule_figure(step, unit="slots").axes
    assert [t for t in plain.texts if t.get_text() == ""] == []


def test_bad_input_is_refused_and_leaves_no_figure_open():
    plt.close("all")
    for draw in (
        lambda: show.schedule_figure({}),
        lambda: show.schedule_figure(step_of("gpipe", 1, 1, 1, 1, 1), unit="weeks"),
    ):
        with pytest.raises(InputError):
            draw()
    assert plt.get_fignums() == []


def test_kinds_are_told_apart_without_colour():
    hatches = [hatch for _, hatch, _ in LOOKS.values()]
    assert len(set(hatches)) == len({to_rgba(colour) for colour, *_ in LOOKS.values()}) == 4
