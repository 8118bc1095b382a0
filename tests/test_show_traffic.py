"""Figures of traffic hold the numbers of their trace, with units, and refuse what does not fit."""

import numpy
import pytest
import torch
from matplotlib.colors import to_hex

from slimlab import show
from slimlab.comm.clocks import ClockOffset
from slimlab.comm.collectives import binomial_broadcast, ring_all_reduce
from slimlab.comm.events import Event, Message
from slimlab.comm.launch import run_ranks
from slimlab.comm.network import Network, dialled
from slimlab.comm.trace import Trace, traced
from slimlab.config import InputError
from slimlab.show.timeline import LOOKS, time_unit
from slimlab.show.traffic import binary_bytes, short_number

MATRIX = [[0, 300, 0], [0, 0, 120_000], [5, 0, 0]]


def texts(axes):
    return {text.get_text() for text in axes.texts if text.get_text()}


def trace_of(program, world_size=4):
    return run_ranks(dialled(traced(program), Network(3.0, 4.0)), world_size)[0].result.trace


@pytest.fixture(scope="module")
def ring():
    return trace_of(lambda comm: ring_all_reduce(comm, torch.ones(8)))


def bars_of(figure):
    """(row, begin, width, colour) of every bar, in the order of drawing."""
    boxes = [
        (one.get_paths()[0].get_extents(), one.get_facecolor()[0])
        for one in figure.axes[0].collections
    ]
    return [
        (round((box.y0 + box.y1) / 2), box.x0, box.width, to_hex(colour)) for box, colour in boxes
    ]


def arrows_of(figure):
    """(from place, to place) of every arrow."""
    marks = [one for one in figure.axes[0].texts if getattr(one, "arrow_patch", None)]
    return [(tuple(one.xyann), tuple(one.xy)) for one in marks]


def test_cells_of_the_matrix_hold_what_was_sent_and_the_others_nothing():
    axes = show.bytes_figure(torch.tensor(MATRIX), "who to whom").axes[0]
    written = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert written == {(0, 1): "300", (1, 2): "120,000", (2, 0): "5"}
    values = axes.images[0].get_array()
    assert numpy.ma.filled(values, 0).tolist() == MATRIX
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("to rank", "from rank")
    assert axes.get_title() == "who to whom"


def test_the_scale_of_the_matrix_says_what_it_counts():
    figure = show.bytes_figure([[0, 2], [3, 0]], value_label="messages")
    assert figure.axes[1].get_ylabel() == "messages"


def test_a_matrix_of_more_ranks_has_short_numbers_and_of_many_none():
    nine = torch.full((9, 9), 400_040)
    assert texts(show.bytes_figure(nine).axes[0]) == {"400 k"}
    assert texts(show.bytes_figure(torch.ones(24, 24)).axes[0]) == set()


@pytest.mark.parametrize("matrix", [[[1, 2]], [1, 2], torch.zeros(0, 0)])
def test_what_is_no_square_is_refused(matrix):
    with pytest.raises(InputError, match="world_size"):
        show.bytes_figure(matrix)


def test_a_matrix_of_nothing_can_be_drawn():
    assert texts(show.bytes_figure(torch.zeros(2, 2)).axes[0]) == set()


def test_the_timeline_has_a_bar_for_every_call_in_the_row_of_its_rank(ring):
    found = bars_of(show.timeline_figure(ring))
    expected = [(one.rank, one.begin_s, one.seconds) for one in ring.events]
    assert [bar[0] for bar in found] == [row for row, _, _ in expected]
    assert [bar[1] for bar in found] == pytest.approx([begin for _, begin, _ in expected])
    assert [bar[2] for bar in found] == pytest.approx([width for _, _, width in expected])
    assert {bar[3] for bar in found} == {LOOKS["send and receive"][0].lower()}


def test_the_timeline_has_an_arrow_for_every_message_from_its_begin_to_its_end(ring):
    found = arrows_of(show.timeline_figure(ring))
    assert len(found) == ring.messages.sum()
    # The first message of rank 0: 3 s on the way and two floats of a second each.
    assert ((0.0, pytest.approx(0.3)), (5.0, pytest.approx(0.7))) in found
    assert arrows_of(show.timeline_figure(ring, arrows=False)) == []


def test_the_timeline_names_its_kinds_its_labels_and_its_clock():
    def program(comm):
        comm.compute(30.0)
        with comm.label("sum"):
            ring_all_reduce(comm, torch.ones(8))
        comm.all_reduce(torch.ones(8))

    figure = show.timeline_figure(trace_of(program))
    (legend,) = figure.legends
    kinds = [text.get_text() for text in legend.get_texts()]
    assert kinds == ["send and receive", "compute", "collective"]
    words = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert words == ["sum", "all_reduce"] * 4
    assert figure.axes[0].get_xlabel() == "virtual time (s)"


def test_a_measured_timeline_says_how_well_its_clocks_agree():
    events = (Event(0, "barrier", 0, 0.0, 0.002), Event(1, "barrier", 0, 0.001, 0.002))
    offsets = (ClockOffset(0.0, 0.0), ClockOffset(0.5, 2e-5))
    figure = show.timeline_figure(Trace(2, events, offsets))
    assert figure.axes[0].get_xlabel() == "time (ms, ranks ± 0.02)"


def test_a_call_that_took_no_time_is_a_thin_line():
    events = (Event(0, "isend", 0, 0.5, 0.5), Event(0, "barrier", 0, 0.0, 1.0))
    figure = show.timeline_figure(Trace(1, events, (ClockOffset(0.0, 0.0),)))
    assert [width > 0 for _, _, width, _ in bars_of(figure)] == [True, True]


def test_steps_are_arrows_with_what_they_share_below(ring):
    figure = show.steps_figure(ring)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"{step}\n8 B" for step in range(1, 7)
    ]
    expected = [((step, src), (step + 1, (src + 1) % 4)) for step in range(6) for src in range(4)]
    assert arrows_of(figure) == expected
    assert texts(axes) == set()


def test_words_that_differ_stand_at_their_arrows():
    trace = trace_of(lambda comm: binomial_broadcast(comm, torch.ones(3)))
    figure = show.steps_figure(trace, text=lambda event: f"to {event.peer}")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\nto 1", "2\n"]
    assert texts(axes) == {"to 2", "to 3"}


def test_traces_without_what_a_figure_draws_are_refused():
    empty = Trace(2, (), (ClockOffset(0.0, 0.0),) * 2)
    with pytest.raises(InputError, match="a trace with events"):
        show.timeline_figure(empty)
    with pytest.raises(InputError, match="a trace with messages between ranks"):
        show.steps_figure(empty)


def test_an_arrow_needs_both_its_ends():
    lost = Event(0, "send", 4, 0.0, 1.0, sent=Message(1, 4, "lost"))
    assert arrows_of(show.timeline_figure(Trace(2, (lost,), (ClockOffset(0.0, 0.0),) * 2))) == []


SIZES = [1024.0, 2.0**20, 2.0**25]


def test_predictions_are_lines_and_measurements_marks_of_the_same_colour():
    predicted = {"ring": (SIZES, [1e-3, 2e-3, 3e-2]), "tree": (SIZES, [1e-4, 3e-3, 9e-2])}
    measured = {"tree": (SIZES[:2], [2e-4, 4e-3], [1e-4, 3e-3], [3e-4, 6e-3])}
    guides = {"they meet": 2.0**17}
    figure = show.cost_figure(predicted, measured, "cost", guides, marks="clocked")
    axes = figure.axes[0]
    lines = [one for one in axes.lines if one.get_linestyle() != "None"]
    for line, (_, seconds) in zip(lines, predicted.values()):
        assert list(line.get_ydata()) == pytest.approx(seconds)
    marks = axes.containers[0].lines[0]
    assert list(marks.get_xdata()) == SIZES[:2]
    assert marks.get_color() == lines[1].get_color() != lines[0].get_color()
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["ring", "tree", "they meet"]
    assert legend.get_title().get_text() == "lines: predicted, marks: clocked"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("payload (bytes)", "time (s)")
    figure.canvas.draw()
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert ticks[0] == "1 KiB"
    assert all(tick.endswith("iB") for tick in ticks)


def test_measurements_alone_need_no_prediction():
    axes = show.cost_figure({}, {"ring": (SIZES, [1e-3, 2e-3, 3e-2])}).axes[0]
    assert axes.get_legend().get_title().get_text() == ""


@pytest.mark.parametrize(
    ("predicted", "words"),
    [
        ({}, "at least one algorithm"),
        ({"a": (SIZES, [1.0])}, "as many seconds as bytes"),
        ({"a": ([0.0], [1.0])}, "positive numbers"),
        ({"a": ([1.0], [1.0], [1.0])}, "as many seconds as bytes"),
    ],
)
def test_bad_costs_are_refused(predicted, words):
    with pytest.raises(InputError, match=words):
        show.cost_figure(predicted)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (99_999, "B", "99,999 B"),
        (240_000, "B", "240 kB"),
        (1.05e6, "", "1.05 M"),
        (3e9, "B", "3 GB"),
    ],
)
def test_numbers_are_written_short(value, unit, text):
    assert short_number(value, unit) == text


def test_bytes_of_an_axis_are_written_in_powers_of_two():
    assert [binary_bytes(2.0**power) for power in (3, 12, 24, 31)] == [
        "8 B",
        "4 KiB",
        "16 MiB",
        "2 GiB",
    ]


@pytest.mark.parametrize(
    ("seconds", "unit"), [(0.0, "s"), (2.0, "s"), (0.2, "ms"), (3e-5, "µs"), (4e-8, "ns")]
)
def test_times_are_written_in_a_unit_that_fits(seconds, unit):
    assert time_unit(seconds)[0] == unit
