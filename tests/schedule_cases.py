"""Every schedule at every size, a second account of what needs what, and torch's own orders."""

from graphlib import TopologicalSorter
from types import SimpleNamespace
from unittest import mock

from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from slimlab.parallel.schedules_zero_bubble import SCHEDULES, make_schedule

STAGES = st.integers(1, 8)
MICRO_BATCHES = st.integers(1, 16)
NAMES = tuple(SCHEDULES)


@st.composite
def schedules(draw, names=NAMES):
    """One of the book's schedules, of 1 to 8 stages, 1 to 16 micro-batches, up to 4 chunks."""
    name = draw(st.sampled_from(names))
    chunks = draw(st.integers(1, 4)) if name == "interleaved" else None
    return make_schedule(name, draw(STAGES), draw(MICRO_BATCHES), chunks)


def parts_of(schedule):
    """(stage, place in its list) -> (virtual stage, letters that it computes, micro-batch).

    Written from the definition of the placements, not with the methods of Schedule.
    """
    found, p = {}, len(schedule.stages)
    for stage, order in enumerate(schedule.stages):
        for place, one in enumerate(order):
            turned = schedule.placement == "v" and one.chunk % 2
            virtual = one.chunk * p + (p - 1 - stage if turned else stage)
            letters = {"forward": "F", "input_gradient": "I", "weight_gradient": "W"}
            found[stage, place] = (virtual, letters.get(one.kind, "IW"), one.micro_batch)
    return found


def graph_of(schedule):
    """Each (stage, place) -> those that must end before it starts."""
    parts = parts_of(schedule)
    maker = {(v, letter, m): key for key, (v, letters, m) in parts.items() for letter in letters}
    last = len(schedule.stages) * schedule.num_chunks - 1
    graph = {}
    for (stage, place), (virtual, letters, batch) in parts.items():
        before = {(stage, place - 1)} if place else set()
        if letters == "F" and virtual:
            before.add(maker[virtual - 1, "F", batch])
        if "I" in letters:
            before.add(maker[virtual, "F", batch])
            if virtual < last:
                before.add(maker[virtual + 1, "I", batch])
        if letters == "W":
            before.add(maker[virtual, "I", batch])
        graph[stage, place] = before
    return graph


def earliest_starts(schedule, seconds, message_s):
    """The longest path to every instruction: seconds[letter][virtual stage], messages[pair]."""
    parts, graph, ends, starts = parts_of(schedule), graph_of(schedule), {}, {}
    for key in TopologicalSorter(graph).static_order():
        virtual, letters, _ = parts[key]
        arrivals = [0]
        for other in graph[key]:
            away = other[0] != key[0]
            pair = min(virtual, parts[other][0])
            arrivals.append(ends[other] + (message_s[pair] if away else 0))
        starts[key] = max(arrivals)
        ends[key] = starts[key] + sum(seconds[letter][virtual] for letter in letters)
    return starts


def words(schedule):
    """Each stage's order as torch writes it: virtual stage, letter, micro-batch."""
    rows = [[] for _ in schedule.stages]
    for (stage, _), (virtual, letters, batch) in parts_of(schedule).items():
        rows[stage].append(f"{virtual}{'B' if letters == 'IW' else letters}{batch}")
    return rows


def torch_words(name, num_stages, num_micro_batches, num_chunks):
    """The order of a schedule of torch's that is data: it is made without any process."""
    stages = [_torch_stage(num_stages, num_stages * num_chunks) for _ in range(num_chunks)]
    # What it adds next, messages in slots of their own, is slow and not looked at.
    runtime = torch_schedules._PipelineScheduleRuntime
    with mock.patch.object(runtime, "_prepare_schedule_with_comms"):
        made = getattr(torch_schedules, name)(stages, num_micro_batches)
    return [[str(one) for one in made.pipeline_order[rank] if one] for rank in range(num_stages)]


def torch_calls(name, num_stages, num_micro_batches):
    """The order in which a schedule of torch's that is a program calls its stage, on each rank.

    Schedule1F1B's printed table has other numbers on its last rank than the program; the program
    is what trains.
    """
    rows = []
    for rank in range(num_stages):
        stage, row = _torch_stage(num_stages, num_stages), []
        stage.stage_index, stage.is_last = rank, rank == num_stages - 1
        for call in ("fwd_recv", "fwd_send", "bwd_recv", "bwd_send"):
            setattr(stage, f"get_{call}_ops", lambda n: [])
        stage.forward_one_chunk = lambda n, *rest, to=row, **named: to.append(f"{rank}F{n}")  # noqa: B023
        stage.backward_one_chunk = lambda n, to=row, **named: to.append(f"{rank}B{n}")  # noqa: B023
        schedule = getattr(torch_schedules, name)(stage, num_micro_batches)
        schedule._initialize_stage = lambda *rest: None
        schedule._step_microbatches()
        rows.append(row)
    return rows


def _torch_stage(world_size, num_stages):
    stage = SimpleNamespace(group_rank=0, group_size=world_size, num_stages=num_stages)
    stage.submod, stage.has_backward = None, True
    stage.perform_reduce_grad = lambda scale: None
    return stage
