"""Schedules: what stands in them, that they end, what they hold; broken ones are found."""

from graphlib import TopologicalSorter

import pytest
import schedule_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import MICRO_BATCHES, NAMES, STAGES, schedules

from slimlab.config import InputError
from slimlab.parallel.schedule_checks import (
    check_schedule,
    find_deadlock,
    order_problems,
    timeline_problems,
)
from slimlab.parallel.schedules import gpipe, interleaved, naive, one_forward_one_backward
from slimlab.parallel.schedules_zero_bubble import make_schedule, zb_h1, zb_v
from slimlab.plan.pipeline_bubbles import forecast_peaks
from slimlab.plan.pipeline_schedule import (
    Instruction,
    Schedule,
    held_activations,
    peak_activations,
    read_schedule,
)
from slimlab.plan.pipeline_simulator import ScheduleDeadlockError, simulate
from slimlab.plan.stage_times import StageTimes
from slimlab.plan.step_timeline import Slot, StepTimeline

UNIT = StageTimes(1, 1, 1)


def test_small_schedules_are_those_of_the_papers():
    assert str(naive(2, 2)) == "stage 0: F0 B0 F1 B1\nstage 1: F0 B0 F1 B1"
    assert str(gpipe(2, 2)) == "stage 0: F0 F1 B0 B1\nstage 1: F0 F1 B0 B1"
    # Narayanan et al. 2021 (arXiv:2104.04473), figure 4, above, with 4 stages and 8 micro-batches.
    assert one_forward_one_backward(4, 8) == read_schedule(
        [
            "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7",
            "F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 B6 B7",
            "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7",
            "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7",
        ],
        name="1f1b",
    )
    # The same figure, below: the last stage, whose second chunk is the end of the model.
    last = interleaved(4, 8, 2).stages[3]
    assert " ".join(map(str, last[:14])) == (
        "F0 F1 F2 F3 F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4 B0"
    )


@settings(max_examples=150, deadline=None)
@given(schedule=schedules())
def test_each_micro_batch_passes_each_chunk_once_and_nothing_waits_in_a_circle(schedule):
    assert order_problems(schedule) == []
    everything = {
        (virtual, letter, batch)
        for virtual, letters, batch in schedule_cases.parts_of(schedule).values()
        for letter in letters
    }
    chunks = len(schedule.stages) * schedule.num_chunks
    assert len(everything) == 3 * chunks * schedule.num_micro_batches
    order = list(TopologicalSorter(schedule_cases.graph_of(schedule)).static_order())
    assert len(order) == sum(map(len, schedule.stages))
    assert find_deadlock(schedule) == find_deadlock(schedule, "block") == ()
    check_schedule(schedule)


@settings(max_examples=150, deadline=None)
@given(schedule=schedules())
def test_nothing_starts_before_what_it_needs_has_ended(schedule):
    assert timeline_problems(schedule, simulate(schedule, UNIT)) == []


@settings(max_examples=150, deadline=None)
@given(schedule=schedules())
def test_peaks_of_activations_are_those_of_the_theory(schedule):
    p, m, v = len(schedule.stages), schedule.num_micro_batches, schedule.num_chunks
    peaks = peak_activations(schedule)
    assert peaks == forecast_peaks(schedule.name, p, m, v)
    assert peaks == simulate(schedule, UNIT).peak_activations
    most = {"naive": 1, "gpipe": m, "1f1b": min(m, p), "zb_h1": min(m, p)}
    if schedule.name in most:
        assert max(peaks) == most[schedule.name]
    if schedule.name == "zb_v" and m >= 2 * p - 1:
        assert peaks == (2 * p,) * p
    if schedule.name == "interleaved" and m % p == 0 and v > 1 and m > p:
        # Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.3: 1 + (p - 1) / (p v) times p.
        assert peaks[0] / v == pytest.approx(p * (1 + (p - 1) / (p * v)))


def test_peaks_of_four_stages_and_eight_micro_batches_in_micro_batches_of_a_whole_stage():
    found = {}
    for name in NAMES:
        schedule = make_schedule(name, 4, 8)
        found[name] = [peak / schedule.num_chunks for peak in peak_activations(schedule)]
    assert found == {
        "naive": [1, 1, 1, 1],
        "gpipe": [8, 8, 8, 8],
        "1f1b": [4, 3, 2, 1],
        "interleaved": [5.5, 4.5, 3.5, 2.5],
        "zb_h1": [4, 4, 4, 4],
        "zb_v": [4, 4, 4, 4],
    }


def test_a_stage_holds_activations_from_the_forward_to_the_weight_gradient():
    order = read_schedule(["F0 F1 I0 F2 W0 B1 I2 W2"]).stages[0]
    assert [held for _, held in held_activations(order)] == [1, 2, 2, 3, 3, 2, 1, 1]


@settings(max_examples=60, deadline=None)
@given(p=STAGES, m=MICRO_BATCHES, v=st.integers(1, 4))
def test_interleaving_one_chunk_is_1f1b_and_one_stage_needs_no_pipeline(p, m, v):
    assert interleaved(p, m, 1).stages == one_forward_one_backward(p, m).stages
    assert simulate(interleaved(1, m, v), UNIT).bubble_fraction == 0


@pytest.mark.parametrize("p", range(1, 9))
def test_orders_equal_those_of_torch_for_interleaved_and_both_zero_bubble_schedules(p):
    for m in range(1, 17):
        ours = schedule_cases.words(zb_v(p, m))
        assert ours == schedule_cases.torch_words("ScheduleZBVZeroBubble", p, m, 2)
        if m % max(1, m // p):
            continue  # torch takes rounds of equal length only
        for v in (2, 3):
            ours = schedule_cases.words(interleaved(p, m, v))
            assert ours == schedule_cases.torch_words("ScheduleInterleaved1F1B", p, m, v)
        # On one chunk torch's interleaved zero bubble is ZB-H1.
        ours = schedule_cases.words(zb_h1(p, m))
        assert ours == schedule_cases.torch_words("ScheduleInterleavedZeroBubble", p, m, 1)


@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
def test_orders_equal_what_torch_computes_for_gpipe_and_1f1b(p):
    for m in {1, p, p + 1, 3 * p}:
        assert schedule_cases.words(gpipe(p, m)) == schedule_cases.torch_calls(
            "ScheduleGPipe", p, m
        )
        if m >= p:  # torch refuses fewer
            ours = schedule_cases.words(one_forward_one_backward(p, m))
            assert ours == schedule_cases.torch_calls("Schedule1F1B", p, m)


@settings(max_examples=60, deadline=None)
@given(schedule=schedules())
def test_every_virtual_stage_has_one_place_and_text_gives_the_schedule_back(schedule):
    places = [schedule.place_of(number) for number in range(schedule.num_virtual_stages)]
    assert len(set(places)) == schedule.num_stages * schedule.num_chunks
    assert [schedule.virtual_stage(*place) for place in places] == list(range(len(places)))
    rows = [row.partition(": ")[2] for row in str(schedule).splitlines()]
    named = {"num_chunks": schedule.num_chunks, "placement": schedule.placement}
    assert read_schedule(rows, name=schedule.name, **named) == schedule


def test_neighbours_in_a_v_share_the_stage_where_it_turns():
    schedule = Schedule("w", 1, ((), (), ()), num_chunks=3, placement="v")
    assert [schedule.place_of(n)[0] for n in range(9)] == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    assert schedule.receiver_of(("forward", 2, 0)) is None
    assert schedule.receiver_of(("forward", 3, 0)) == 1
    assert schedule.receiver_of(("input_gradient", 6, 0)) is None
    assert schedule.receiver_of(("input_gradient", 5, 0)) == 1
    assert schedule.receiver_of(("forward", 8, 0)) is None
    assert schedule.receiver_of(("weight_gradient", 4, 0)) is None


def test_crossed_micro_batches_deadlock_and_each_stage_says_whom_it_waits_for():
    crossed = read_schedule(["F0 B0 F1 B1", "F1 B1 F0 B0"])
    assert order_problems(crossed) == []
    first, second = find_deadlock(crossed)
    assert (first.stage, first.for_stage, str(first.for_instruction)) == (0, 1, "B0")
    assert str(second) == "stage 1 at F1 waits for F1 of stage 0"
    with pytest.raises(ScheduleDeadlockError) as caught:
        check_schedule(crossed)
    assert caught.value.circle == (0, 1)
    assert "stage 0 at B0 waits for B0 of stage 1" in caught.value.given
    assert "0 -> 1 -> 0" in caught.value.change
    assert isinstance(caught.value, InputError)


def test_a_deadlock_leaves_out_stages_that_have_ended_and_follows_those_that_wait_behind_it():
    # Stages 1 and 2 wait for each other; stage 0 waits for one of them; stage 3 would come after.
    schedule = read_schedule(
        ["F0 F1 B0 B1", "F0 B0 F1 B1", "F1 F0 B1 B0", "F0 F1 B0 B1"], name="bad"
    )
    with pytest.raises(ScheduleDeadlockError) as caught:
        simulate(schedule, UNIT)
    assert caught.value.circle == (1, 2)
    assert [one.stage for one in caught.value.waiting] == [0, 1, 2, 3]


def test_what_no_list_has_is_waited_for_in_vain():
    (waiting,) = find_deadlock(read_schedule(["F0", "F0 F1"]))
    assert waiting.for_instruction is None
    assert "stage 1 at F1 waits for stage 0, whose list does not have" in str(waiting)
    with pytest.raises(ScheduleDeadlockError, match="add what is missing"):
        simulate(read_schedule(["F0", "F0 F1"]), UNIT)


def test_a_stage_that_waits_for_itself_is_told_to_move_it():
    (waiting,) = find_deadlock(read_schedule(["W0 F0 I0"]))
    assert str(waiting) == "stage 0 at W0 waits for its own I0, which stands later"
    with pytest.raises(ScheduleDeadlockError, match="move what stage 0 waits for"):
        simulate(read_schedule(["W0 F0 I0"]), UNIT)


@pytest.mark.parametrize("name", NAMES)
def test_sends_that_wait_for_their_receiver_let_only_naive_and_gpipe_end(name):
    # In 1F1B neighbours send to each other at once: activations down, gradients up.
    for p in range(1, 6):
        for m in (1, 2, 3, 4, 8):
            stuck = find_deadlock(make_schedule(name, p, m), "rendezvous")
            assert bool(stuck) == (name not in ("naive", "gpipe") and p > 1 and m > 1)


def test_a_rendezvous_deadlock_names_the_message_and_where_its_receiver_is():
    (first, second) = find_deadlock(one_forward_one_backward(2, 2), "rendezvous")
    assert first.sending
    assert second.sending
    assert str(first) == "stage 0 at F1 waits until stage 1, which is at B0, takes its message"
    assert str(second) == "stage 1 at B0 waits until stage 0, which is at F1, takes its message"


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), data=st.data())
def test_one_instruction_more_one_less_or_a_forward_after_its_gradient_is_found(schedule, data):
    stage = data.draw(st.integers(0, schedule.num_stages - 1))
    order = list(schedule.stages[stage])
    place = data.draw(st.integers(0, len(order) - 1))
    one = order[place]
    fault = data.draw(st.sampled_from(["missing", "twice", "before"]))
    if fault == "missing":
        del order[place]
        said = {f"stage {stage}: {one} is missing"}
        if one.kind in ("input_gradient", "weight_gradient"):
            said.add(f"stage {stage}: B{str(one)[1:]} is missing")
    elif fault == "twice":
        order.insert(place, one)
        said = {f"stage {stage}: {one} stands more than once"}
    else:
        late = next(it for it in order if it.kind != "forward")
        mine = Instruction("forward", late.micro_batch, late.chunk)
        order.remove(mine)
        order.insert(order.index(late) + 1, mine)
        said = {f"stage {stage}: {late} stands before {mine}"}
    rows = (*schedule.stages[:stage], tuple(order), *schedule.stages[stage + 1 :])
    v, placement = schedule.num_chunks, schedule.placement
    broken = Schedule("broken", schedule.num_micro_batches, rows, v, placement)
    assert said & set(order_problems(broken))
    with pytest.raises(InputError, match=f"stage {stage}: "):
        check_schedule(broken)


def test_a_whole_backward_beside_a_half_is_found():
    assert order_problems(read_schedule(["F0 B0 W0"])) == [
        "stage 0: B0 stands beside W0",
        "stage 0: I0 is missing",
    ]


def test_only_the_first_problems_are_listed():
    with pytest.raises(InputError, match="and 15 more"):
        check_schedule(Schedule("empty", 10, ((),)))


def moved(timeline, stage, place, by_s):
    rows = [list(row) for row in timeline.slots]
    slot = rows[stage][place]
    rows[stage][place] = Slot(stage, slot.instruction, slot.start_s + by_s, slot.end_s + by_s)
    return StepTimeline(timeline.name, tuple(map(tuple, rows)))


def test_a_timeline_in_which_something_comes_too_early_is_found():
    schedule = one_forward_one_backward(3, 4)
    timeline = simulate(schedule, StageTimes(1, 1, 1, 0.5))
    early = moved(timeline, 1, 0, -0.75)
    assert timeline_problems(schedule, early) == [
        "stage 1 starts F0 at 0.75 s, but F0 of stage 0 ends at 1 s"
    ]
    # Clocks that may be apart by more than that cannot tell.
    assert timeline_problems(schedule, early, tolerance_s=0.3) == []
    assert timeline_problems(schedule, timeline, message_s=0.5) == []
    assert timeline_problems(schedule, timeline, message_s=0.6)
    assert timeline_problems(gpipe(3, 4), timeline)[0] == ("stage 0 did not do what its list says")
    assert timeline_problems(one_forward_one_backward(4, 4), timeline)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (2.0, 4), (2, True), ("2", 2)])
def test_sizes_that_are_none_are_refused(name, sizes):
    with pytest.raises(InputError, match="whole number of at least 1"):
        make_schedule(name, *sizes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_schedule("2f2b", 2, 2),
        lambda: make_schedule("interleaved", 2, 2, 0),
        lambda: make_schedule("gpipe", 2, 2, 2),
        lambda: make_schedule("zb_v", 2, 2, 3),
        lambda: Instruction("sideways", 0),
        lambda: Instruction("forward", -1),
        lambda: Instruction("forward", 0, 0.5),
        lambda: Schedule("none", 1, ()),
        lambda: Schedule("flat", 1, ((),), placement="flat"),
        lambda: Schedule("far", 1, ((Instruction("forward", 1),),)),
        lambda: Schedule("chunk", 1, ((Instruction("forward", 0, 1),),)),
        lambda: read_schedule([]),
        lambda: read_schedule(["F0 X0"]),
        lambda: read_schedule(["F 0"]),
        lambda: read_schedule(["F0.1"]),
        lambda: find_deadlock(gpipe(2, 2), "pigeons"),
        lambda: timeline_problems(gpipe(1, 1), simulate(gpipe(1, 1), UNIT), message_s=-1),
        lambda: forecast_peaks("gpipe", 2, 2, 2),
        lambda: forecast_peaks("none", 2, 2),
    ],
)
def test_bad_input_gets_an_input_error(make):
    with pytest.raises(InputError, match="change: "):
        make()
