"""A trace holds what a program sent, from rank to rank, and when; its file opens in a viewer."""

import json
import time

import pytest
import torch
from comm_runtimes import started_by, why_not

from slimlab.comm.clocks import ClockOffset, align_clocks
from slimlab.comm.collectives import ALGORITHMS, ring_all_reduce
from slimlab.comm.events import Event, Message, from_record, steps_of, to_record
from slimlab.comm.launch import run_ranks
from slimlab.comm.report import MismatchError
from slimlab.comm.trace import Trace, TracedCommunicator, gather_trace, traced
from slimlab.config import InputError
from slimlab.plan.alpha_beta import cost_of


def trace_of(program, world_size=4, args=()):
    return run_ranks(traced(program), world_size, args=args)[0].trace


def every_kind_of_message(comm):
    """1, 2, 3, 4 and 5 floats from rank 0 to rank 1 in five ways, 6 back in one."""
    if comm.rank == 0:
        comm.send(torch.ones(1), 1)
        handle = comm.isend(torch.ones(2), 1)
        comm.sendrecv(torch.ones(3), 1, 1)
        handle.wait()
        comm.send(torch.ones(4), 1, tag=7)
        comm.send(torch.ones(5), 1)
    elif comm.rank == 1:
        comm.recv(0)
        late = comm.irecv(0)
        comm.sendrecv(torch.ones(6), 0, 0)
        late.wait()
        comm.recv(0, out=torch.empty(5))
        comm.recv(0, tag=7)


def test_messages_and_bytes_are_counted_from_rank_to_rank():
    trace = trace_of(every_kind_of_message, 3)
    assert trace.messages.tolist() == [[0, 5, 0], [1, 0, 0], [0, 0, 0]]
    assert trace.bytes.tolist() == [[0, 60, 0], [24, 0, 0], [0, 0, 0]]


def test_totals_per_rank_count_both_ends_of_a_message():
    trace = trace_of(every_kind_of_message, 3)
    counted = [
        (one.messages_sent, one.bytes_sent, one.messages_received, one.bytes_received)
        for one in trace.totals()
    ]
    assert counted == [(5, 60, 1, 24), (1, 24, 5, 60), (0, 0, 0, 0)]
    assert [one.num_calls for one in trace.totals()] == [5, 5, 0]
    assert trace.table().splitlines()[1].split()[:6] == ["0", "5", "5", "60", "1", "24"]


def test_the_payload_ledger_is_the_same_as_without_a_trace():
    def program(comm):
        every_kind_of_message(comm)
        comm.all_reduce(torch.ones(8))
        comm.split(comm.rank % 2).barrier()

    plain = run_ranks(program, 3)
    watched = run_ranks(traced(program), 3)
    assert [one.entries for one in watched.ledgers] == [one.entries for one in plain.ledgers]


def test_results_are_the_same_as_without_a_trace():
    def program(comm, x):
        total = ring_all_reduce(comm, x * comm.rank)
        return comm.all_reduce(total, "max", async_op=True).wait().tolist()

    args = (torch.arange(5.0),)
    watched = run_ranks(traced(program), 3, args=args)
    assert [one.result for one in watched] == run_ranks(program, 3, args=args)
    assert [one.trace is None for one in watched] == [False, True, True]


def test_hand_written_collectives_show_their_links():
    trace = trace_of(lambda comm: ring_all_reduce(comm, torch.ones(8)))
    ring = [[6 * (dst == (src + 1) % 4) for dst in range(4)] for src in range(4)]
    assert trace.messages.tolist() == ring
    assert trace.bytes.tolist() == [[8 * count for count in row] for row in ring]


def test_a_collective_of_the_runtime_is_one_event_with_its_payload_and_no_links():
    def program(comm):
        comm.all_reduce(torch.ones(3))
        comm.barrier()
        comm.scatter(torch.ones(8) if comm.rank == 1 else None, src=1)

    trace = trace_of(program)
    assert [(one.call, one.n_bytes) for one in trace.of_rank(0)] == [
        ("all_reduce", 12),
        ("barrier", 0),
        ("scatter", 8),
    ]
    assert trace.of_rank(1)[2].n_bytes == 32
    assert trace.messages.sum() == 0
    assert all(one.peer is None for one in trace.events)


def test_groups_are_traced_into_the_same_trace_with_ranks_of_the_world():
    def program(comm):
        group = comm.split(comm.rank % 2, key=-comm.rank)
        if group.rank == 0:
            group.send(torch.ones(2), 1)
        else:
            group.recv(0)

    trace = trace_of(program)
    sent = [(one.rank, one.peer) for one in trace.events if one.sent]
    assert sent == [(2, 0), (3, 1)]


def test_every_message_has_one_end_that_sends_and_one_that_receives():
    def program(comm):
        every_kind_of_message(comm)
        pair = comm.split(0 if comm.rank < 2 else None)
        if pair is not None:
            every_kind_of_message(pair)
        ring_all_reduce(comm, torch.ones(5))

    trace = trace_of(program, 3)
    sent = {one.sent.key: (one.rank, one.sent) for one in trace.events if one.sent}
    received = {one.received.key: (one.rank, one.received) for one in trace.events if one.received}
    assert len(sent) == trace.messages.sum() == 6 + 6 + 12
    assert sent.keys() == received.keys()
    for key, (src, there) in sent.items():
        dst, here = received[key]
        assert (here.peer, there.peer, here.n_bytes) == (src, dst, there.n_bytes)


def test_receives_that_are_waited_for_out_of_order_keep_their_messages():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(1), 1)
            comm.send(torch.ones(2), 1)
            return
        first, second = comm.irecv(0), comm.irecv(0)
        second.wait()
        first.wait()

    trace = trace_of(program, 2)
    sizes = {one.sent.key: one.sent.n_bytes for one in trace.events if one.sent}
    assert {one.received.key: one.received.n_bytes for one in trace.events if one.received} == sizes


def test_labels_name_the_calls_inside_of_them():
    def program(comm):
        comm.barrier()
        with comm.label("sum"):
            comm.barrier()
            with comm.label("step 1"):
                comm.split(0).barrier()

    labels = [one.label for one in trace_of(program, 2).of_rank(0)]
    assert labels == ["", "sum", "sum / step 1", "sum / step 1"]


def test_events_of_a_rank_follow_each_other_and_start_at_zero():
    trace = trace_of(every_kind_of_message, 3)
    assert min(one.begin_s for one in trace.events) == 0.0
    assert not trace.virtual
    for rank in range(3):
        times = [time for one in trace.of_rank(rank) for time in (one.begin_s, one.end_s)]
        assert times == sorted(times)
    assert trace.offsets == (ClockOffset(0.0, 0.0),) * 3


def test_gathering_a_trace_leaves_no_trace():
    def program(comm):
        comm = TracedCommunicator(comm)
        comm.barrier()
        first = gather_trace(comm)
        second = gather_trace(comm)
        return None if first is None else (first == second, len(first.events))

    results = run_ranks(program, 3)
    assert results[0] == (True, 3)
    assert [one.num_calls() for one in results.ledgers] == [1, 1, 1]


def test_a_call_that_fails_is_no_event():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(3), 1)
            return
        with pytest.raises(InputError):
            comm.recv(1)
        with pytest.raises(InputError):
            comm.recv(0, out=torch.empty(4))

    trace = trace_of(program, 2)
    assert [(one.rank, one.call) for one in trace.events] == [(0, "send")]


def test_only_the_traced_communicator_of_the_world_has_a_trace():
    with pytest.raises(Exception, match="gather_trace: the traced communicator of all ranks"):
        run_ranks(gather_trace, 2)
    with pytest.raises(Exception, match="of a group"):
        run_ranks(lambda comm: gather_trace(TracedCommunicator(comm).split(0)), 2)


def test_a_rank_that_skips_a_collective_is_found_when_the_trace_is_gathered():
    def program(comm):
        if comm.rank:
            comm.barrier()

    with pytest.raises(MismatchError, match=r"0     gather_trace\(\)"):
        trace_of(program, 2)


def test_only_programs_are_traced():
    with pytest.raises(InputError, match="program: a function"):
        traced("program")


def test_charging_time_needs_a_dialled_network():
    with pytest.raises(Exception, match="compute: a rank on a dialled network"):
        run_ranks(lambda comm: TracedCommunicator(comm).compute(1.0), 1)


def test_records_of_events_survive_json():
    event = Event(1, "sendrecv", 7, 0.5, 1.5, "a", Message(2, 3, "x"), None)
    assert from_record(json.loads(json.dumps(to_record(event)))) == event
    assert event.shifted(1.0).begin_s == 1.5


def test_steps_follow_from_who_waits_for_whom():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(1), 2)
            comm.send(torch.ones(1), 1)
        elif comm.rank == 2:
            comm.recv(0)
            comm.send(torch.ones(1), 3)
        else:
            comm.recv(0 if comm.rank == 1 else 2)

    steps = steps_of(trace_of(program).events)
    assert [(step, one.rank, one.peer) for step, one in steps] == [(0, 0, 2), (1, 0, 1), (1, 2, 3)]


def test_in_a_ring_all_ranks_send_in_every_step():
    steps = steps_of(trace_of(lambda comm: ring_all_reduce(comm, torch.ones(4)), 3).events)
    assert [(step, one.rank) for step, one in steps] == [(s, r) for s in range(4) for r in range(3)]


def test_a_rank_receives_one_message_in_a_step_first_what_it_asks_for_first():
    def program(comm):
        if comm.rank == 0:
            for src in (3, 1, 2):
                comm.recv(src)
        else:
            comm.send(torch.ones(1), 0)

    steps = steps_of(trace_of(program).events)
    assert [(step, one.rank) for step, one in steps] == [(0, 3), (1, 1), (2, 2)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_have_as_many_steps_as_the_model_says(name):
    hosts = {"ranks_per_host": 2} if name == "two_level_all_reduce" else {}
    for world_size in (2, 3, 5, 8):
        trace = trace_of(lambda comm: ALGORITHMS[name](comm, torch.ones(120), **hosts), world_size)
        cost = cost_of(name, world_size, **hosts)
        assert steps_of(trace.events)[-1][0] + 1 == cost.alphas + cost.host_alphas


def test_steps_end_where_a_message_came_from_outside_of_the_trace():
    event = Event(0, "recv", 4, 0.0, 1.0, received=Message(1, 4, "nobody's"))
    later = Event(0, "send", 4, 1.0, 2.0, sent=Message(1, 4, "late"))
    assert steps_of([event, later]) == []


@pytest.fixture
def written(tmp_path):
    def program(comm):
        with comm.label("all"):
            every_kind_of_message(comm)
            comm.barrier()

    trace, path = trace_of(program, 3), tmp_path / "trace.json"
    trace.to_chrome(path)
    return trace, json.loads(path.read_text()), path


def test_the_file_names_the_ranks_and_has_a_bar_for_every_event(written):
    trace, data, _ = written
    named = {
        one["pid"]: one["args"]["name"]
        for one in data["traceEvents"]
        if one["ph"] == "M" and one["name"] == "process_name"
    }
    assert named == {rank: f"rank {rank}" for rank in range(3)}
    bars = [one for one in data["traceEvents"] if one["ph"] == "X"]
    assert [one["name"] for one in bars] == [one.call for one in trace.events]
    assert [one["args"]["bytes"] for one in bars] == [one.n_bytes for one in trace.events]
    assert {one["args"]["label"] for one in bars} == {"all"}
    for bar, event in zip(bars, trace.events):
        assert bar["ts"] == pytest.approx(event.begin_s * 1e6, abs=0.1)
        assert bar["dur"] == pytest.approx(event.seconds * 1e6, abs=0.1)


def test_every_entry_of_the_file_has_what_a_viewer_needs(written):
    _, data, _ = written
    kinds = {one["ph"] for one in data["traceEvents"]}
    assert kinds == {"M", "X", "s", "f"}
    for one in data["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "ts"} <= one.keys()
        assert one["ph"] != "X" or one["dur"] > 0


def test_bars_of_one_rank_do_not_overlap_in_the_file(written):
    _, data, _ = written
    for rank in range(3):
        bars = [one for one in data["traceEvents"] if one["ph"] == "X" and one["pid"] == rank]
        for before, after in zip(bars, bars[1:]):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6


def test_arrows_lie_inside_of_bars_and_join_the_two_ends_of_a_message(written):
    trace, data, _ = written
    ends = {
        kind: {one["id"]: one for one in data["traceEvents"] if one["ph"] == kind} for kind in "sf"
    }
    assert ends["s"].keys() == ends["f"].keys()
    assert len(ends["s"]) == trace.messages.sum()
    bars = [one for one in data["traceEvents"] if one["ph"] == "X"]
    for kind, found in ends.items():
        for one in found.values():
            around = [
                bar
                for bar in bars
                if bar["pid"] == one["pid"] and bar["ts"] <= one["ts"] < bar["ts"] + bar["dur"]
            ]
            assert len(around) == 1
            assert kind == "s" or one["bp"] == "e"


def test_an_old_file_stays_if_the_new_one_cannot_be_written(written, tmp_path):
    trace, _, path = written
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with pytest.raises(InputError, match="a file that can be written"):
        trace.to_chrome(tmp_path / "no such folder" / "trace.json")


def test_a_trace_without_events_is_one():
    trace = trace_of(lambda comm: None, 2)
    assert isinstance(trace, Trace)
    assert trace.end_s == 0.0
    assert trace.bytes.tolist() == [[0, 0], [0, 0]]


def run_on(runtime, program, world_size):
    reason = why_not(runtime)
    if reason is not None:
        pytest.skip(reason)
    with started_by(runtime) as backend:
        return run_ranks(program, world_size, backend=backend)


def skewed_offsets(comm):
    """How far the clocks seem apart, if each rank's is 5 s before that of the rank before it."""
    offset = align_clocks(comm, lambda: time.perf_counter() + 5.0 * comm.rank)
    return offset.offset_s, offset.uncertainty_s


def chain(comm):
    """Rank after rank sends on what it has received; then a collective, and a group's message."""
    if comm.rank:
        comm.recv(comm.rank - 1)
    if comm.rank + 1 < comm.world_size:
        comm.send(torch.ones(3), comm.rank + 1)
    comm.all_reduce(torch.ones(2))
    group = comm.split(0, key=-comm.rank)
    group.sendrecv(torch.ones(5), (group.rank + 1) % 3, (group.rank - 1) % 3)


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_clocks_of_processes_are_aligned_within_what_is_said(runtime):
    for rank, (offset_s, uncertainty_s) in enumerate(run_on(runtime, skewed_offsets, 3)):
        # All ranks of one machine read the same clock.
        assert abs(offset_s + 5.0 * rank) <= uncertainty_s < 1.0


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_processes_are_traced_as_threads_are(runtime):
    results = run_on(runtime, traced(chain), 3)
    trace, expected = results[0].trace, trace_of(chain, 3)
    assert torch.equal(trace.bytes, expected.bytes)
    assert torch.equal(trace.messages, expected.messages)
    kinds = [(one.rank, one.call, one.n_bytes, one.sent, one.received) for one in trace.events]
    assert kinds == [
        (one.rank, one.call, one.n_bytes, one.sent, one.received) for one in expected.events
    ]
    assert [one.total_bytes() for one in results.ledgers] == [60, 72, 60]
    left = {one.sent.key: one for one in trace.events if one.sent}
    for event in trace.events:
        if event.received:
            doubt_s = trace.offsets[event.rank].uncertainty_s
            doubt_s += trace.offsets[event.received.peer].uncertainty_s
            assert event.end_s >= left[event.received.key].begin_s - doubt_s
