"""A dialled network: seconds that were computed by hand, and results that do not change."""

import time
from math import inf

import pytest
import torch
from comm_runtimes import started_by, why_not
from hypothesis import given
from hypothesis import strategies as st

from slimlab.comm.clocks import VirtualClock, WallClock
from slimlab.comm.collectives import ALGORITHMS, ring_all_reduce
from slimlab.comm.launch import run_ranks
from slimlab.comm.links import Wire
from slimlab.comm.network import DialledCommunicator, Network, dialled
from slimlab.comm.ports import Lane
from slimlab.comm.report import DeadlockError, MismatchError
from slimlab.comm.trace import TracedCommunicator, traced
from slimlab.config import InputError
from slimlab.plan.alpha_beta import Link, alpha_beta_s

# 3 s on the way and 4 bytes per second: a float takes a second, and numbers come out whole.
PLAIN = Network(3.0, 4.0)


def clocks_of(program, world_size, network=PLAIN, **options):
    return [one.clock_s for one in run_ranks(dialled(program, network), world_size, **options)]


def test_one_message_takes_latency_and_bytes_and_its_sender_only_bytes():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(5), 1)
        else:
            comm.recv(0)

    assert clocks_of(program, 2) == [5.0, 8.0]


def test_ping_pong_takes_two_messages():
    def program(comm):
        for _ in range(3):
            if comm.rank == 0:
                comm.send(torch.ones(2), 1)
                comm.recv(1)
            else:
                comm.send(comm.recv(0), 0)

    assert clocks_of(program, 2) == [3 * 2 * (3 + 2), 3 * 2 * (3 + 2) - 3]


def test_two_messages_on_one_wire_share_their_latency_but_not_the_wire():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(5), 1)
            comm.send(torch.ones(2), 1)
            return comm.clock_s
        return comm.recv(0).sum().item(), comm.clock_s, comm.recv(0).sum().item(), comm.clock_s

    results = run_ranks(dialled(program, PLAIN), 2)
    assert [one.result for one in results] == [7.0, (5.0, 8.0, 2.0, 10.0)]


def test_overhead_is_not_shared():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(5), 1)
            comm.send(torch.ones(2), 1)
        else:
            comm.recv(0)
            comm.recv(0)

    assert clocks_of(program, 2, Network(0.0, 4.0, overhead_s=3.0)) == [13.0, 13.0]
    assert clocks_of(program, 2, Network(1.0, 4.0, overhead_s=2.0)) == [11.0, 12.0]


def test_isend_returns_at_once_and_its_wait_when_the_bytes_have_left():
    def program(comm):
        if comm.rank == 0:
            first, second = comm.isend(torch.ones(5), 1), comm.isend(torch.ones(2), 2)
            times = [comm.clock_s]
            for handle in (first, second):
                handle.wait()
                times.append(comm.clock_s)
            return times
        comm.recv(0)
        return comm.clock_s

    results = run_ranks(dialled(program, PLAIN), 3)
    assert [one.result for one in results] == [[0.0, 5.0, 7.0], 8.0, 10.0]


def test_messages_that_arrive_together_come_in_one_after_the_other():
    def program(comm):
        if comm.rank:
            comm.send(torch.ones(5), 0)
            return None
        times = []
        for src in (1, 2, 3):
            comm.recv(src)
            times.append(comm.clock_s)
        return times

    results = run_ranks(dialled(program, PLAIN), 4)
    assert results[0].result == [8.0, 13.0, 18.0]
    assert [one.clock_s for one in results[1:]] == [5.0, 5.0, 5.0]


def test_a_message_comes_in_while_its_receiver_waits_for_a_later_one():
    def program(comm):
        if comm.rank == 1:
            comm.compute(20.0)
        if comm.rank:
            comm.send(torch.ones(5), 0)
            return None
        comm.recv(1)
        between = comm.clock_s
        comm.recv(2)
        return between, comm.clock_s

    assert run_ranks(dialled(program, PLAIN), 3)[0].result == (28.0, 28.0)


def test_both_directions_are_used_at_the_same_time():
    def program(comm):
        comm.sendrecv(torch.ones(5), 1 - comm.rank, 1 - comm.rank)

    assert clocks_of(program, 2) == [8.0, 8.0]


def test_computing_moves_the_clock_and_a_message_that_came_meanwhile_costs_nothing():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.ones(5), 1)
        else:
            comm.compute(100.0)
            comm.recv(0)

    assert clocks_of(program, 2) == [5.0, 100.0]


def test_a_slow_wire_in_a_ring_delays_one_step_and_then_every_step():
    def program(comm):
        right, left = (comm.rank + 1) % 4, (comm.rank - 1) % 4
        times = []
        for _ in range(4):
            comm.sendrecv(torch.ones(1), right, left)
            times.append(comm.clock_s)
        return times

    slow = Network(3.0, 4.0, links={(1, 2): Wire(9.0, 4.0)})
    results = [one.result for one in run_ranks(dialled(program, slow), 4)]
    # Rank 2 receives over the slow wire, rank 3 feels it a step later, rank 1 after four.
    assert results == [
        [4.0, 8.0, 18.0, 22.0],
        [4.0, 8.0, 12.0, 22.0],
        [10.0, 14.0, 18.0, 22.0],
        [4.0, 14.0, 18.0, 22.0],
    ]


def test_ranks_of_a_host_are_near():
    def program(comm):
        if comm.rank == 0:
            for dst in (1, 2, 3):
                comm.send(torch.ones(0), dst)
        else:
            comm.recv(0)

    for hosts in (2, ("a", "a", "b", "b")):
        network = Network(50.0, 4.0, hosts=hosts, inside=Wire(1.0))
        assert clocks_of(program, 4, network) == [0.0, 1.0, 50.0, 50.0]


def test_groups_have_the_same_clocks_and_wires_of_the_world():
    def program(comm):
        group = comm.split(comm.rank % 2)
        if group.rank == 0:
            group.send(torch.ones(1), 1)
        else:
            group.recv(0)
        return comm.clock_s == group.clock_s

    network = Network(3.0, 4.0, links={(1, 3): Wire(7.0, 4.0)})
    results = run_ranks(dialled(program, network), 4)
    assert [one.clock_s for one in results] == [1.0, 1.0, 4.0, 8.0]
    assert all(one.result for one in results)


def program_of(name, num_elements, world_size):
    """A program that makes one collective, of num_elements, and what its prediction needs."""
    hosts = {"ranks_per_host": 2} if name == "two_level_all_reduce" else {}

    def program(comm):
        part = num_elements // world_size if name == "ring_all_gather" else num_elements
        ALGORITHMS[name](comm, torch.ones(part), **hosts)

    return program, hosts


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_alpha_beta_model_predicts_every_algorithm_exactly(name):
    alpha_s, bytes_per_s = 1e-4, 1e8
    for world_size in (2, 3, 4, 5, 6, 7, 8):
        program, hosts = program_of(name, 840, world_size)
        predicted_s = alpha_beta_s(
            name, world_size, 840, 4, Link(alpha_s, 1 / bytes_per_s), **hosts
        )
        network = Network(0.0, bytes_per_s, overhead_s=alpha_s)
        assert max(clocks_of(program, world_size, network)) == pytest.approx(predicted_s, rel=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_where_alpha_is_latency_steps_that_need_not_wait_overlap_and_none_takes_longer(name):
    alpha_s, bytes_per_s = 1e-4, 1e8
    for world_size in (2, 4, 5, 8):
        program, hosts = program_of(name, 840, world_size)
        predicted_s = alpha_beta_s(
            name, world_size, 840, 4, Link(alpha_s, 1 / bytes_per_s), **hosts
        )
        needed_s = max(clocks_of(program, world_size, Network(alpha_s, bytes_per_s)))
        if world_size == 5:
            assert needed_s <= predicted_s * (1 + 1e-12)
        else:
            assert needed_s == pytest.approx(predicted_s, rel=1e-12)


COLLECTIVES = {
    "barrier": lambda comm, x: comm.barrier(),
    "broadcast": lambda comm, x: comm.broadcast(x, src=1),
    "reduce": lambda comm, x: comm.reduce(x, dst=1, op="max"),
    "all_reduce": lambda comm, x: comm.all_reduce(x),
    "mean": lambda comm, x: comm.all_reduce(x, "mean", async_op=True).wait(),
    "reduce_scatter": lambda comm, x: comm.reduce_scatter(x, sizes=[1, 4, 1]),
    "all_gather": lambda comm, x: comm.all_gather(x),
    "gather": lambda comm, x: comm.gather(x[: comm.rank], dst=2, sizes=[0, 1, 2]),
    "scatter": lambda comm, x: comm.scatter(x if comm.rank == 1 else None, src=1),
    "all_to_all": lambda comm, x: comm.all_to_all(x),
    "split": lambda comm, x: comm.split(comm.rank % 2).all_reduce(x),
    "into out": lambda comm, x: comm.all_reduce(x, out=x),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_gives_the_same_and_stands_in_the_ledger_once(name):
    def program(comm):
        result = COLLECTIVES[name](comm, torch.arange(6.0) + comm.rank)
        return None if result is None else result.tolist()

    plain, slow = run_ranks(program, 3), run_ranks(dialled(program, PLAIN), 3)
    assert [one.result for one in slow] == plain
    assert [one.entries for one in slow.ledgers] == [one.entries for one in plain.ledgers]
    assert max(one.clock_s for one in slow) > 0


def test_collectives_take_the_time_of_their_messages():
    one_step = 3.0 + 0.5

    def seconds(call, world_size=4):
        return max(clocks_of(call, world_size))

    assert seconds(lambda comm: comm.barrier()) == 2 * 3.0
    assert seconds(lambda comm: comm.all_reduce(torch.ones(2)), 4) == pytest.approx(
        alpha_beta_s("ring_all_reduce", 4, 2, 4, Link(3.0, 0.25)), abs=0
    )
    assert seconds(lambda comm: comm.all_gather(torch.ones(1, dtype=torch.int16))) == 3 * one_step
    # Three parts leave one port after the other, and come into one.
    assert seconds(lambda comm: comm.gather(torch.ones(2))) == 3.0 + 3 * 2.0
    assert seconds(lambda comm: comm.scatter(torch.ones(8))) == 3.0 + 3 * 2.0


def test_messages_of_a_collective_do_not_mix_with_those_of_the_program():
    def program(comm):
        other = 1 - comm.rank
        handle = comm.isend(torch.tensor([10.0 + comm.rank]), other)
        total = comm.all_reduce(torch.ones(1))
        handle.wait()
        return total.item(), comm.recv(other).item()

    results = run_ranks(dialled(program, PLAIN), 2)
    assert [one.result for one in results] == [(2.0, 11.0), (2.0, 10.0)]


def test_an_asynchronous_all_reduce_travels_while_the_rank_computes():
    def program(comm, seconds):
        handle = comm.all_reduce(torch.ones(2), async_op=True)
        comm.compute(seconds)
        handle.wait()

    # Two steps of 3 s and a float.
    assert clocks_of(program, 2, args=(5.0,)) == [8.0, 8.0]
    assert clocks_of(program, 2, args=(50.0,)) == [50.0, 50.0]


def test_asynchronous_collectives_run_in_the_order_in_which_they_were_begun():
    def program(comm):
        first = comm.all_reduce(torch.tensor([1.0]), async_op=True)
        second = comm.all_reduce(torch.tensor([10.0]), async_op=True)
        third = comm.all_reduce(torch.tensor([100.0]))
        order = (second, first) if comm.rank else (first, second)
        return third.item(), sum(handle.wait().item() for handle in order)

    results = run_ranks(dialled(program, Network(3.0)), 2)
    assert [one.result for one in results] == [(200.0, 22.0)] * 2
    assert [one.clock_s for one in results] == [3 * 2 * 3.0] * 2


def test_ranks_that_meet_in_different_collectives_are_told_apart():
    def program(comm):
        return comm.all_reduce(torch.ones(2)) if comm.rank else comm.broadcast(torch.ones(2))

    with pytest.raises(MismatchError, match="different collectives"):
        run_ranks(dialled(program, PLAIN), 2)


def test_a_deadlock_on_a_dialled_network_names_the_lines_of_the_program():
    with pytest.raises(DeadlockError, match=r"recv\(src=1, tag=0\).*comm.recv\(1 - comm.rank\)"):
        run_ranks(dialled(lambda comm: comm.recv(1 - comm.rank), PLAIN), 2)


def test_a_trace_on_a_dialled_network_shows_its_seconds():
    def program(comm):
        comm.compute(2.0)
        comm.sendrecv(torch.ones(5), 1 - comm.rank, 1 - comm.rank)
        with comm.label("sum"):
            comm.all_reduce(torch.ones(2))

    results = run_ranks(dialled(traced(program), PLAIN), 2)
    trace = results[0].result.trace
    assert trace.virtual
    assert [(one.call, one.begin_s, one.end_s) for one in trace.of_rank(1)] == [
        ("compute", 0.0, 2.0),
        ("sendrecv", 2.0, 10.0),
        ("all_reduce", 10.0, 18.0),
    ]
    assert trace.bytes.tolist() == [[0, 20], [20, 0]]
    assert trace.totals()[0].computed_s == 2.0
    assert trace.totals()[0].in_calls_s == 16.0
    assert results[0].clock_s == 18.0  # gathering the trace took no time


def test_two_hundred_ranks_in_a_ring():
    def program(comm):
        baton = torch.tensor([comm.rank])
        right, left = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
        for _ in range(3):
            baton = comm.sendrecv(baton, right, left)
        return baton.item()

    results = run_ranks(dialled(program, Network(0.25, 32.0)), 200)
    assert [one.result for one in results] == [(rank - 3) % 200 for rank in range(200)]
    assert {one.clock_s for one in results} == {1.5}


def test_the_seconds_are_the_same_every_time():
    def program(comm):
        comm.compute(0.1 * comm.rank)
        ring_all_reduce(comm, torch.ones(7))
        comm.gather(torch.ones(1 + comm.rank), sizes=[1, 2, 3, 4, 5])

    network = Network(0.3, 11.0, hosts=2, inside=Wire(0.01, 70.0, 0.003))
    first = clocks_of(program, 5, network)
    assert clocks_of(program, 5, network) == first
    assert len(set(first)) > 1


def test_a_lane_carries_one_message_at_a_time_and_fills_gaps():
    lane = Lane()
    assert lane.take(0.0, 2.0) == 0.0
    assert lane.take(1.0, 2.0) == 2.0
    assert lane.take(10.0, 2.0) == 10.0
    assert lane.take(3.0, 6.0) == 4.0  # exactly the gap
    assert lane.take(0.0, 0.5) == 12.0
    assert lane.take(0.0, 0.0) == 12.5  # what is empty does not overtake
    assert lane.take(20.0, 0.0) == 20.0


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=30),
    st.sampled_from([1.0, 0.1, 1e-6]),
)
def test_a_lane_never_carries_two_messages_and_wastes_no_gap(wishes, unit):
    lane, busy = Lane(), []
    for earliest, length in wishes:
        start_s = lane.take(earliest * unit, length * unit)
        slot = (round(start_s / unit), round(start_s / unit) + length)
        free = [
            first
            for first in range(earliest, 1000)
            if not any(first < end and begin < first + max(length, 1) for begin, end in busy)
        ]
        assert slot[0] == free[0] or (length == 0 and slot[0] in [end for _, end in busy])
        busy += [slot] if length else []


def test_a_real_clock_sleeps_and_a_virtual_one_never_goes_back():
    virtual = VirtualClock(5.0)
    virtual.advance_to(3.0)
    assert virtual.now_s() == 5.0
    real = WallClock(0.0)
    goal_s = real.now_s() + 0.01
    real.advance_to(goal_s)
    assert real.now_s() >= goal_s


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latency_s": -1.0}, "latency_s"),
        ({"bytes_per_s": 0}, "bytes_per_s: a bandwidth above 0"),
        ({"overhead_s": inf}, "overhead_s"),
        ({"links": {(0, 1): Wire(1.0, -1.0)}}, r"bytes_per_s of link \(0, 1\)"),
        ({"links": {(0, 1): 3.0}}, r"the wire of link \(0, 1\)"),
        ({"hosts": 2}, "both hosts and inside"),
        ({"inside": Wire(1.0)}, "both hosts and inside"),
        ({"hosts": 0, "inside": Wire(1.0)}, "hosts"),
    ],
)
def test_impossible_networks_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Network(**({"latency_s": 1.0} | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"links": {(0, 2): Wire(1.0)}}, "links between ranks 0 to 1"),
        ({"hosts": "abc", "inside": Wire(1.0)}, "the host of each of 2 ranks"),
    ],
)
def test_a_network_must_fit_the_world(options, words):
    with pytest.raises(Exception, match=words):
        run_ranks(dialled(lambda comm: None, Network(1.0, **options)), 2)


def test_a_network_is_dialled_before_it_is_traced():
    def program(comm):
        DialledCommunicator(TracedCommunicator(comm), PLAIN)

    with pytest.raises(Exception, match="dial first, then trace"):
        run_ranks(program, 1)


def test_only_programs_are_dialled_and_only_on_networks():
    with pytest.raises(InputError, match="network: a Network"):
        dialled(print, 1e-3)
    with pytest.raises(InputError, match="program: a function"):
        dialled(PLAIN, PLAIN)


def test_negative_computing_is_refused():
    with pytest.raises(Exception, match="seconds"):
        run_ranks(dialled(lambda comm: comm.compute(-1.0), PLAIN), 1)


def test_a_label_without_a_trace_does_nothing():
    def program(comm):
        with comm.label("nothing"):
            comm.barrier()

    assert clocks_of(program, 1) == [0.0]


def run_on(runtime, program, world_size):
    reason = why_not(runtime)
    if reason is not None:
        pytest.skip(reason)
    with started_by(runtime) as backend:
        return run_ranks(program, world_size, backend=backend)


def real_time(comm):
    """Seconds of a ping-pong of 1000 bytes, of two messages in a row, and of a collective."""
    payload, times = torch.ones(250), []
    for count in (1, 2):
        comm.barrier()
        begin_s = time.perf_counter()
        if comm.rank == 0:
            for _ in range(count):
                comm.send(payload, 1)
            comm.recv(1)
        else:
            for _ in range(count):
                comm.recv(0)
            comm.send(payload, 0)
        times.append(time.perf_counter() - begin_s)
    begin_s = time.perf_counter()
    total = comm.all_reduce(payload, async_op=True).wait()
    comm.compute(0.02)
    times.append(time.perf_counter() - begin_s)
    return times, total.sum().item()


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_processes_wait_at_least_as_long_as_was_dialled(runtime):
    network = Network(0.02, 1e5)
    results = run_on(runtime, dialled(real_time, network), 2)
    (once_s, twice_s, sum_s), total = results[0].result
    assert total == 500.0
    assert once_s >= 2 * (0.02 + 0.01)
    assert twice_s >= 2 * (0.02 + 0.01) + 0.01
    assert sum_s >= 2 * (0.02 + 0.005) + 0.02
    assert [one.total_bytes("send") for one in results.ledgers] == [3000, 2000]
    assert results[0].clock_s >= once_s + twice_s + sum_s
