"""The simulator of schedules against longest paths, closed forms and published bubbles."""

import pytest
import schedule_cases
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schedule_cases import MICRO_BATCHES, NAMES, STAGES, schedules

from slimlab.config import InputError
from slimlab.parallel.schedule_checks import timeline_problems
from slimlab.parallel.schedules_zero_bubble import make_schedule
from slimlab.plan.pipeline_bubbles import bubble_remark, forecast_step
from slimlab.plan.pipeline_schedule import read_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes, layers_of_virtual_stages
from slimlab.plan.step_timeline import Slot, StepTimeline

UNIT = StageTimes(1, 1, 1)
WHOLE = st.integers(1, 9)

# Qi et al. 2024 (arXiv:2401.10241): stages, micro-batches and times in ms of tables 3 and 4, and
# the bubble of 1F1B from table 5. p, m, T_F, T_B, T_W, T_comm, bubble.
TABLE_5 = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091),
    (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552),
    (16, 64, 11.307, 11.254, 8.101, 0.379, 0.2082),
    (16, 128, 11.325, 11.308, 8.109, 0.378, 0.1251),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646),
    (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168),
    (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352),
]


@pytest.mark.parametrize("row", TABLE_5)
def test_the_simulator_gives_the_published_bubbles_of_1f1b_with_messages(row):
    p, m, *times, published = row
    step = simulate(make_schedule("1f1b", p, m), StageTimes(*times))
    assert step.bubble_fraction == pytest.approx(published, abs=5e-5 + 1e-9)
    assert step.span_bubble_fraction == pytest.approx(step.bubble_fraction)
    forecast = forecast_step("1f1b", p, m, StageTimes(*times))
    assert forecast.bubble_fraction == pytest.approx(step.bubble_fraction, rel=1e-9)
    # Without its messages it would be off by more than the last printed digit.
    still = forecast_step("1f1b", p, m, StageTimes(*times[:3]))
    assert still.bubble_fraction < published - 5e-3


@settings(max_examples=120, deadline=None)
@given(schedule=schedules(), data=st.data())
def test_starts_are_the_longest_paths_for_stages_that_are_not_equal(schedule, data):
    count = schedule.num_virtual_stages
    columns = st.lists(st.integers(1, 9), min_size=count, max_size=count)
    forward, gradient, weights = (data.draw(columns) for _ in range(3))
    between = data.draw(st.lists(st.integers(0, 9), min_size=count - 1, max_size=count - 1))
    step = simulate(schedule, StageTimes(forward, gradient, weights, between))
    seconds = {"F": forward, "I": gradient, "W": weights}
    starts = schedule_cases.earliest_starts(schedule, seconds, between)
    found = {
        (slot.stage, place): slot.start_s for row in step.slots for place, slot in enumerate(row)
    }
    assert found == starts
    assert timeline_problems(schedule, step) == []
    total = schedule.num_micro_batches * (sum(forward) + sum(gradient) + sum(weights))
    assert sum(step.computing_s) == total
    gaps = [sum(end - start for start, end in step.gaps(n)) for n in range(step.num_stages)]
    assert tuple(gaps) == step.idle_s


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["naive", "gpipe", "1f1b"]),
    p=STAGES,
    m=MICRO_BATCHES,
    times=st.tuples(WHOLE, WHOLE, WHOLE),
    message_s=st.integers(0, 99),
)
def test_closed_forms_with_messages_of_any_length(name, p, m, times, message_s):
    given = StageTimes(*times, message_s)
    step, forecast = simulate(make_schedule(name, p, m), given), forecast_step(name, p, m, given)
    assert forecast.step_s == step.step_s
    assert step.idle_s == (forecast.bubble_s,) * p
    assert forecast.bubble_fraction == pytest.approx(step.bubble_fraction)
    assert forecast.bubble_ratio == pytest.approx(step.bubble_ratio)


@settings(max_examples=150, deadline=None)
@given(
    p=STAGES, m=MICRO_BATCHES, v=st.integers(1, 4), times=st.tuples(WHOLE, WHOLE, WHOLE),
    message_s=st.integers(0, 18),
)  # fmt: skip
def test_closed_form_of_interleaved_with_messages_that_it_hides(p, m, v, times, message_s):
    if m % p or message_s > min(times[0], times[1] + times[2]):
        message_s = 0
    given = StageTimes(*times, message_s)
    step = simulate(make_schedule("interleaved", p, m, v), given)
    assert forecast_step("interleaved", p, m, given, v).step_s == step.step_s


@settings(max_examples=150, deadline=None)
@given(p=STAGES, m=MICRO_BATCHES, times=st.tuples(WHOLE, WHOLE, st.integers(0, 12)))
def test_closed_form_of_zb_h1_for_any_times(p, m, times):
    step = simulate(make_schedule("zb_h1", p, m), StageTimes(*times))
    assert forecast_step("zb_h1", p, m, StageTimes(*times)).step_s == step.step_s
    forward, gradient, weights = times
    if m >= p and weights <= min(forward, gradient):
        # As table 2 of arXiv:2401.10241 says.
        assert step.idle_s == ((p - 1) * (forward + gradient - weights),) * p


@settings(max_examples=60, deadline=None)
@given(p=STAGES, more=st.integers(0, 8), slot_s=WHOLE)
def test_zb_v_of_equal_times_waits_before_its_first_and_after_its_last_instruction(p, more, slot_s):
    m, times = 2 * p - 1 + more, StageTimes(slot_s, slot_s, slot_s)
    step = simulate(make_schedule("zb_v", p, m), times)
    assert forecast_step("zb_v", p, m, times, 2).step_s == step.step_s
    assert step.span_bubble_fraction == 0
    for stage in range(p):
        ends = {0, step.step_s}
        assert all(ends & set(gap) for gap in step.gaps(stage))


@settings(max_examples=60, deadline=None)
@given(p=STAGES, m=MICRO_BATCHES, times=st.tuples(WHOLE, WHOLE, WHOLE))
def test_both_definitions_of_the_bubble(p, m, times):
    for name in ("gpipe", "1f1b"):
        step = simulate(make_schedule(name, p, m), StageTimes(*times))
        assert step.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))
        assert step.bubble_ratio == pytest.approx((p - 1) / m)
    for v, rounds in ((2, 1), (3, 2)):
        chunked = simulate(make_schedule("interleaved", p, rounds * p, v), StageTimes(*times))
        assert chunked.bubble_ratio == pytest.approx((p - 1) / (rounds * p * v))


def test_bubbles_of_the_sizes_that_the_book_shows():
    # t_b = 2 t_f, as in slots of one forward.
    small = simulate(make_schedule("gpipe", 4, 4), UNIT)
    assert small.bubble_fraction == pytest.approx(3 / 7)
    assert small.bubble_ratio == 0.75
    assert small.idle_slots() == (9, 9, 9, 9)
    large = simulate(make_schedule("gpipe", 8, 32), UNIT)
    assert large.bubble_fraction == pytest.approx(7 / 39)
    bubbles = {}
    for name in NAMES:
        schedule = make_schedule(name, 4, 8)
        times = StageTimes(2, 2, 2).in_chunks(schedule.num_chunks)
        bubbles[name] = simulate(schedule, times).idle_slots()
    assert bubbles == {
        "naive": (144, 144, 144, 144),
        "gpipe": (18, 18, 18, 18),
        "1f1b": (18, 18, 18, 18),
        "interleaved": (9, 9, 9, 9),
        "zb_h1": (6, 6, 6, 6),
        "zb_v": (3, 3, 3, 3),
    }


def test_idle_slots_of_times_that_do_not_divide_are_refused():
    step = simulate(make_schedule("gpipe", 2, 2), UNIT)
    assert step.idle_slots(0.5) == (6, 6)
    with pytest.raises(InputError, match="whole slots of 2 s"):
        step.idle_slots(2)
    with pytest.raises(InputError):
        step.idle_slots(0)


@settings(max_examples=60, deadline=None)
@given(p=st.integers(2, 8), slow=st.integers(0, 7), factor=st.integers(2, 9))
def test_one_slow_stage_sets_the_period(p, slow, factor):
    assume(slow < p)
    each = [factor if stage == slow else 1 for stage in range(p)]
    for name in ("gpipe", "1f1b"):
        steps = [
            simulate(make_schedule(name, p, m), StageTimes(each, each, each)).step_s
            for m in (2 * p, 2 * p + 1, 2 * p + 2)
        ]
        assert [late - early for early, late in zip(steps, steps[1:])] == [3 * factor] * 2


def slots(step):
    return [[(str(s.instruction), s.start_s, s.end_s) for s in row] for row in step.slots]


def test_messages_that_overlap_block_or_wait_for_their_receiver():
    schedule = make_schedule("gpipe", 2, 2)
    found = {
        messages: simulate(schedule, StageTimes(2, 1, 1, 1, messages=messages))
        for messages in ("overlap", "block", "rendezvous")
    }
    assert slots(found["overlap"]) == [
        [("F0", 0, 2), ("F1", 2, 4), ("B0", 10, 12), ("B1", 12, 14)],
        [("F0", 3, 5), ("F1", 5, 7), ("B0", 7, 9), ("B1", 9, 11)],
    ]
    # The sender computes nothing while its message is on its way.
    assert slots(found["block"]) == [
        [("F0", 0, 2), ("F1", 3, 5), ("B0", 11, 13), ("B1", 14, 16)],
        [("F0", 3, 5), ("F1", 6, 8), ("B0", 8, 10), ("B1", 11, 13)],
    ]
    # Nor does the receiver, and the message starts when it asks for it.
    assert slots(found["rendezvous"]) == [
        [("F0", 0, 2), ("F1", 3, 5), ("B0", 11, 13), ("B1", 14, 16)],
        [("F0", 3, 5), ("F1", 6, 8), ("B0", 8, 10), ("B1", 11, 13)],
    ]
    assert [(m.src, m.dst, m.start_s, m.end_s) for m in found["overlap"].messages] == [
        (0, 1, 2, 3), (0, 1, 4, 5), (1, 0, 9, 10), (1, 0, 11, 12),
    ]  # fmt: skip


def test_a_sender_that_waits_for_its_receiver_starts_its_next_instruction_late():
    # Stage 1 computes F0 from 3 to 13; it takes the message of F1, ready at 5, at 13.
    schedule, times = read_schedule(["F0 F1 F2", "F0 F1 F2"]), ([2, 10], 1, 1, 1)
    block = simulate(schedule, StageTimes(*times, messages="block"))
    waits = simulate(schedule, StageTimes(*times, messages="rendezvous"))
    assert [start for _, start, _ in slots(block)[0]] == [0, 3, 6]
    assert [start for _, start, _ in slots(block)[1]] == [3, 13, 23]
    assert [start for _, start, _ in slots(waits)[0]] == [0, 3, 14]
    assert [start for _, start, _ in slots(waits)[1]] == [3, 14, 25]


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), message_s=WHOLE)
def test_messages_that_block_are_never_faster_and_without_messages_all_kinds_are_one(
    schedule, message_s
):
    overlap = simulate(schedule, StageTimes(1, 1, 1, message_s))
    block = simulate(schedule, StageTimes(1, 1, 1, message_s, "block"))
    assert block.step_s >= overlap.step_s
    still = simulate(schedule, UNIT)
    assert still.slots == simulate(schedule, StageTimes(1, 1, 1, 0, "block")).slots
    moving = sum(m.src != m.dst for m in overlap.messages)
    assert moving == len(overlap.messages)
    if schedule.placement == "loop" and schedule.num_stages > 1:
        assert moving == 2 * schedule.num_micro_batches * (schedule.num_virtual_stages - 1)
    if schedule.placement == "v":
        assert moving == 4 * schedule.num_micro_batches * (schedule.num_stages - 1)


def test_a_v_sends_nothing_where_it_turns():
    step = simulate(make_schedule("zb_v", 2, 1), StageTimes(1, 1, 1, 10))
    assert [(m.src, m.dst) for m in step.messages] == [(0, 1), (1, 0), (0, 1), (1, 0)]
    assert slots(step)[1][:2] == [("F0", 11, 12), ("F0.1", 12, 13)]


def test_activations_held_over_time():
    step = simulate(make_schedule("1f1b", 2, 3), UNIT)
    assert step.held(0) == ((0, 1), (1, 2), (4, 2), (6, 2), (7, 2), (10, 1))
    assert step.peak_activations == (2, 1)


def test_stages_of_layers_add_their_times_and_the_last_one_its_logits():
    layer, logits = StageTimes(1, 1.5, 0.5, 0.1), StageTimes(4, 2, 2)
    times = StageTimes.of_layers([3, 2, 1], layer, last_stage=logits)
    assert times == StageTimes((3, 2, 5), (4.5, 3.0, 3.5), (1.5, 1.0, 2.5), 0.1)
    assert StageTimes.of_layers([2, 2], layer) == StageTimes((2, 2), (3.0, 3.0), (1.0, 1.0), 0.1)
    assert StageTimes(6, 3, 9, 2).in_chunks(3) == StageTimes(2, 1, 3, 2)
    assert layers_of_virtual_stages(24, 4, 3) == [2] * 12


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StageTimes([1, 0, 1], 1, 1), "forward_s[1] = 0"),
        (lambda: StageTimes(0, 1, 1), "give every stage a layer"),
        (lambda: StageTimes.of_layers([3, 0, 2], UNIT), "none in [1]"),
        (lambda: StageTimes.of_layers([3, 0, 2], UNIT), "at most 5 virtual stages"),
        (lambda: StageTimes.of_layers([1, 1], StageTimes(1, [1, 1], 1)), "input_gradient_s"),
        (lambda: StageTimes.of_layers([], UNIT), "number of virtual stages"),
        (lambda: StageTimes.of_layers([1.5], UNIT), "layers[0] = 1.5"),
        (lambda: layers_of_virtual_stages(12, 8, 2), "at most num_chunks = 1"),
        (lambda: layers_of_virtual_stages(12, 16), "at most num_stages = 12"),
        (lambda: layers_of_virtual_stages(12, 5), "1, 2, 3, 4, 6, 12"),
        (lambda: layers_of_virtual_stages(0, 5), "num_layers = 0"),
        (lambda: StageTimes(1, -1, 1), "input_gradient_s = -1"),
        (lambda: StageTimes(1, 1, 1, float("inf")), "message_s = inf"),
        (lambda: StageTimes(1, 1, 1, 1, "pigeons"), "messages = 'pigeons'"),
        (lambda: StageTimes([1, 1], 1, 1).in_chunks(2), "lists for forward_s"),
        (lambda: StageTimes(1, 1, 1).in_chunks(0), "num_chunks = 0"),
        (lambda: simulate(make_schedule("gpipe", 3, 2), StageTimes([1, 1], 1, 1)), "3 for 3"),
        (lambda: simulate(make_schedule("gpipe", 3, 2), StageTimes(1, 1, 1, [1])), "2 for 3"),
        (lambda: StepTimeline("none", ()), "no slot"),
        (lambda: forecast_step("none", 2, 2, UNIT), "one of naive"),
        (lambda: forecast_step("gpipe", 2, 2, UNIT, 2), "num_chunks = 1"),
        (lambda: forecast_step("zb_v", 2, 4, UNIT), "num_chunks = 2"),
        (lambda: forecast_step("gpipe", 0, 2, UNIT), "num_stages = 0"),
        (lambda: forecast_step("gpipe", 2, 2, StageTimes([1, 2], 1, 1)), "lists for forward_s"),
        (lambda: forecast_step("gpipe", 2, 2, StageTimes(1, 1, 1, 1, "block")), "overlap"),
        (lambda: forecast_step("interleaved", 2, 3, StageTimes(1, 1, 1, 1), 2), "multiple of p"),
        (lambda: forecast_step("interleaved", 2, 4, StageTimes(1, 1, 1, 2), 2), "no longer than"),
        (lambda: forecast_step("zb_h1", 2, 3, StageTimes(1, 1, 1, 1)), "no message time"),
        (lambda: forecast_step("zb_v", 2, 3, StageTimes(1, 2, 1), 2), "three equal times"),
        (lambda: forecast_step("zb_v", 3, 4, UNIT, 2), "2 p - 1 = 5"),
        (lambda: bubble_remark(0, 1), "num_stages = 0"),
    ],
)
def test_bad_input_gets_an_input_error_with_its_numbers(make, said):
    with pytest.raises(InputError) as caught:
        make()
    assert said in str(caught.value)


def test_slots_of_a_stage_that_overlap_are_refused():
    first, second = read_schedule(["F0 F1"]).stages[0]
    with pytest.raises(InputError, match="stage 0: F0 ends at 2, F1 starts at 1"):
        StepTimeline("measured", ((Slot(0, first, 0, 2), Slot(0, second, 1, 3)),))


def test_fewer_micro_batches_than_stages_are_allowed_and_their_bubble_is_said():
    step = simulate(make_schedule("1f1b", 4, 2), UNIT)
    assert step.bubble_fraction == pytest.approx(3 / 5)
    assert bubble_remark(4, 2) == (
        "2 micro-batches for 4 stages: each stage stands idle for 60% of the step. "
        "16 would make it 16%."
    )
    assert bubble_remark(4, 4) == ""
