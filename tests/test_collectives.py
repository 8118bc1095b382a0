"""Collectives written with messages: right results, and exactly the messages that are predicted."""

import pytest
import torch
from collective_cases import (
    ALL_REDUCES,
    REDUCING,
    Case,
    call,
    check_cases,
    every_case,
    inputs,
    run_cases,
)
from comm_runtimes import started_by, why_not
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.comm import collectives
from slimlab.comm.collectives import ALGORITHMS
from slimlab.comm.collectives_shared import TAG
from slimlab.comm.launch import run_ranks
from slimlab.comm.network import Network, dialled
from slimlab.comm.report import RankError
from slimlab.comm.thread_ranks import run_in_threads
from slimlab.config import InputError
from slimlab.plan.messages import Link, alpha_beta_s

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
DTYPES += [torch.int32, torch.complex64]


@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_collective_is_right_and_sends_what_the_model_predicts(world_size):
    cases = every_case(world_size)
    check_cases(cases, run_ranks(run_cases, world_size, args=(cases,)))


@pytest.mark.parametrize("world_size", [12, 13])
def test_worlds_of_more_ranks_too(world_size):
    cases = every_case(world_size, lengths=(5, 40))
    check_cases(cases, run_ranks(run_cases, world_size, args=(cases,)))


@pytest.mark.parametrize("runtime", ["mpich", "openmpi", "gloo"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_between_processes_they_are_right_and_send_the_same(runtime, world_size):
    if reason := why_not(runtime):
        pytest.skip(reason)
    # The longest one travels apart from its header.
    cases = every_case(world_size, lengths=(0, 1, 5, 20000))
    cases += [Case(name, 7, torch.bfloat16, "mean", ranks_per_host=1) for name in ALL_REDUCES]
    cases += [Case(name, 6, row=(2, 3)) for name in ALGORITHMS]
    with started_by(runtime) as backend:
        results = run_ranks(run_cases, world_size, backend=backend, args=(cases,))
    check_cases(cases, results)


@pytest.mark.parametrize("world_size", [4, 6, 7])
def test_two_levels_with_hosts_of_every_size(world_size):
    cases = [
        Case("two_level_all_reduce", 29, ranks_per_host=count, op="max")
        for count in range(1, world_size + 1)
    ]
    check_cases(cases, run_ranks(run_cases, world_size, args=(cases,)))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_on_a_dialled_network_they_take_the_seconds_that_are_predicted(name, world_size):
    even = world_size & (world_size - 1) == 0
    per_host = 2 if world_size % 2 == 0 else 1
    for num_elements in (48 * world_size, 48 * world_size + 1, 7):
        case = Case(name, num_elements, root=1, ranks_per_host=per_host)
        tensors = inputs(case, world_size)
        for latency_s in (1.0, 100.0):
            program = dialled(
                lambda comm, case=case, tensors=tensors: call(comm, case, tensors[comm.rank]),
                Network(latency_s, 1.0),
            )
            found_s = max(one.clock_s for one in run_ranks(program, world_size))
            link = Link(latency_s, 1.0)
            predicted_s = alpha_beta_s(
                name, world_size, num_elements, 4, link, ranks_per_host=per_host
            )
            assert found_s <= predicted_s * (1 + 1e-9), case
            exact = name in ("ring_all_reduce", "rabenseifner_all_reduce")
            if exact or (even and num_elements % world_size == 0):
                assert found_s == pytest.approx(predicted_s, rel=1e-9), case


@st.composite
def cases_of(draw, world_size):
    name = draw(st.sampled_from(list(ALGORITHMS)))
    dtype = draw(st.sampled_from(DTYPES + [torch.bool] * (name not in REDUCING)))
    ops = ["sum"]
    if dtype.is_floating_point or dtype.is_complex:
        ops.append("mean")
    if not dtype.is_complex:
        ops += ["max", "min"]
    row = draw(st.lists(st.integers(0, 3), max_size=2))
    return Case(
        name,
        draw(st.integers(0, 40)),
        dtype,
        draw(st.sampled_from(ops)),
        draw(st.integers(0, world_size - 1)),
        draw(st.integers(1, world_size)),
        name in ALL_REDUCES and draw(st.booleans()),
        tuple(row),
    )


@given(st.data(), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_any_length_world_dtype_op_root_and_shape(data, world_size):
    cases = data.draw(st.lists(cases_of(world_size), min_size=1, max_size=4))
    check_cases(cases, run_ranks(run_cases, world_size, args=(cases,)))


def bits(tensor):
    return tensor.view(torch.int32).tolist()


@pytest.mark.parametrize("op", ["sum", "mean", "max", "min"])
@pytest.mark.parametrize("name", ALL_REDUCES)
def test_all_ranks_end_with_the_same_bits(name, op):
    # 0 and -0, infinities and not-a-numbers of several bits, which an order of operands can show
    odd = torch.tensor(
        [0, -(2**31), 0x7F800000, 0x7FC00001, 0x7FC00002, -0x3FFFFD], dtype=torch.int32
    )
    odd = odd.view(torch.float32)

    def program(comm):
        generator = torch.Generator().manual_seed(comm.rank)
        tensor = torch.randn(97, generator=generator) * 10 ** torch.randn(97, generator=generator)
        picked = odd[torch.randint(len(odd), (60,), generator=generator)]
        tensor = torch.cat([tensor, picked])
        arguments = [2] if name == "two_level_all_reduce" else []
        return ALGORITHMS[name](comm, tensor, *arguments, op), tensor

    for world_size in (2, 3, 4, 6, 7, 8):
        results, tensors = zip(*run_ranks(program, world_size))
        assert all(bits(result) == bits(results[0]) for result in results)
        again = run_ranks(program, world_size)
        assert bits(again[-1][0]) == bits(results[0])
        exact = torch.stack([tensor[:97].double() for tensor in tensors])
        exact = {
            "sum": exact.sum(0),
            "mean": exact.mean(0),
            "max": exact.amax(0),
            "min": exact.amin(0),
        }
        size = exact["max"].abs().max() * 0 + torch.stack(tensors)[:, :97].abs().sum(0)
        assert ((results[0][:97] - exact[op]).abs() <= size * 1e-6).all()


def test_no_collective_counts_on_messages_that_wait_in_a_buffer():
    for world_size in (2, 5, 8):
        cases = every_case(world_size, lengths=(0, 3, 24))
        results, _ = run_in_threads(run_cases, world_size, 60.0, (cases,), eager_bytes=-1)
        check_cases(cases, results)


def test_they_work_in_groups_which_count_their_own_ranks():
    def program(comm):
        group = comm.split(comm.rank % 2)
        return [
            call(group).tolist()
            for call in (
                lambda c: collectives.ring_all_reduce(c, torch.tensor([1.0 + comm.rank])),
                lambda c: collectives.rabenseifner_all_reduce(c, torch.tensor([1.0 + comm.rank])),
                lambda c: collectives.binomial_broadcast(c, torch.tensor([comm.rank]), 1),
                lambda c: collectives.ring_all_gather(c, torch.tensor([comm.rank])),
            )
        ]

    results = run_ranks(program, 5)
    assert results[0] == results[2] == results[4] == [[9.0], [9.0], [2], [0, 2, 4]]
    assert results[1] == results[3] == [[6.0], [6.0], [3], [1, 3]]


def test_messages_of_a_program_that_are_under_way_are_left_alone():
    def program(comm):
        other = 1 - comm.rank
        sent = comm.isend(torch.tensor([10 + comm.rank]), other)
        total = collectives.ring_all_reduce(comm, torch.tensor([1, 2]))
        sent.wait()
        return total.tolist(), comm.recv(other).item()

    assert run_ranks(program, 2) == [([2, 4], 11), ([2, 4], 10)]
    assert TAG > 0


def test_a_tensor_that_is_not_contiguous_is_read_and_left_as_it_is():
    def program(comm):
        tensor = torch.arange(6.0).view(2, 3).T
        result = collectives.ring_all_reduce(comm, tensor)
        with pytest.raises(InputError, match="contiguous"):
            collectives.ring_all_reduce(comm, tensor, out=tensor)
        return result

    for result in run_ranks(program, 3):
        assert result.shape == (3, 2)
        assert torch.equal(result, 3 * torch.arange(6.0).view(2, 3).T)


def test_a_tensor_without_dims_and_one_with_a_gradient():
    def program(comm):
        weight = torch.tensor(2.0, requires_grad=True)
        results = []
        for name in ALL_REDUCES:
            arguments = [1] if name == "two_level_all_reduce" else []
            results.append(ALGORITHMS[name](comm, weight, *arguments))
        assert all(one.shape == () and not one.requires_grad for one in results)
        return [one.item() for one in results]

    assert run_ranks(program, 3) == [[6.0] * len(ALL_REDUCES)] * 3


@pytest.mark.parametrize("name", [*ALL_REDUCES, "binomial_reduce"])
def test_scratch_memory_can_be_brought_and_must_fit(name):
    def program(comm):
        arguments = {"ranks_per_host": 2} if name == "two_level_all_reduce" else {}
        tensor = torch.ones(7)
        work = torch.empty(8)
        for _ in range(2):
            result = ALGORITHMS[name](comm, tensor, work=work, **arguments)
            assert result is None or result.tolist() == [comm.world_size] * 7
        ALGORITHMS[name](comm, torch.ones(1), work=torch.empty(2), **arguments)
        for wrong in (torch.empty(1), torch.empty(9, dtype=torch.float64), torch.empty(3, 4)):
            if name == "binomial_reduce" and comm.rank > 0:
                continue  # a rank without children needs none
            with pytest.raises(InputError, match=f"{name}: work"):
                ALGORITHMS[name](comm, tensor, work=wrong, **arguments)

    for world_size in (3, 4):
        run_ranks(program, world_size)


def test_out_takes_the_result_and_is_returned():
    def program(comm):
        tensor = torch.full((2, 3), 1.0 + comm.rank)
        outs = {}
        for name in ALL_REDUCES:
            arguments = [2] if name == "two_level_all_reduce" else []
            outs[name] = out = torch.empty(2, 3)
            assert ALGORITHMS[name](comm, tensor, *arguments, out=out) is out
        for name in ("binomial_broadcast", "scatter_ring_broadcast"):
            out = tensor.clone()
            assert ALGORITHMS[name](comm, out, 1, out=out) is out
            outs[name] = out * 1.5
        part = torch.empty(1, 3)
        whole = tensor[:1].repeat(2, 1)
        assert collectives.ring_reduce_scatter(comm, whole, out=part) is part
        outs["parts"] = part.repeat(2, 1)
        joined = torch.empty(2, 3)
        collectives.ring_all_gather(comm, torch.ones(1, 3), out=joined)
        outs["joined"] = joined * 3
        assert collectives.pairwise_all_to_all(comm, joined, out=tensor) is tensor
        assert torch.equal(tensor, joined)
        root = torch.ones(2, 3)
        result = collectives.binomial_reduce(comm, root, 1, out=root)
        assert (result is root) == (comm.rank == 1)
        assert root.sum() == (12 if comm.rank == 1 else 6)
        return [out.tolist() for out in outs.values()]

    for outs in run_ranks(program, 2):
        assert all(out == [[3.0] * 3] * 2 for out in outs)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda c: collectives.ring_all_reduce(c, [1.0]), "a dense tensor"),
        (lambda c: collectives.ring_all_reduce(c, torch.ones(2), "product"), "op: one of"),
        (lambda c: collectives.ring_all_reduce(c, torch.ones(2).bool()), "that has a sum"),
        (lambda c: collectives.rabenseifner_all_reduce(c, torch.ones(2).long(), "mean"), "a mean"),
        (lambda c: collectives.ring_all_reduce(c, torch.ones(2), out=torch.ones(3)), "out"),
        (lambda c: collectives.ring_reduce_scatter(c, torch.ones(3)), "that 2 ranks divide"),
        (lambda c: collectives.ring_reduce_scatter(c, torch.ones(3), sizes=[1, 1]), "add up"),
        (lambda c: collectives.ring_reduce_scatter(c, torch.tensor(1.0)), "at least one dim"),
        (lambda c: collectives.ring_all_gather(c, torch.ones(3), sizes=[1, 1]), "part of sizes"),
        (lambda c: collectives.binomial_broadcast(c, torch.ones(3), 2), "src"),
        (lambda c: collectives.binomial_reduce(c, torch.ones(3), -1), "dst"),
        (lambda c: collectives.scatter_ring_broadcast(c, torch.ones(3), True), "src"),
        (lambda c: collectives.two_level_all_reduce(c, torch.ones(3), 3), "ranks_per_host"),
        (lambda c: collectives.two_level_all_reduce(c, torch.ones(3), 0), "ranks_per_host"),
        (lambda c: collectives.pairwise_all_to_all(c, torch.ones(3)), "that 2 ranks divide"),
        (
            lambda c: collectives.pairwise_all_to_all(c, torch.ones(2), send_sizes=[1, 1]),
            "both send_sizes and recv_sizes",
        ),
        (
            lambda c: collectives.pairwise_all_to_all(
                c, torch.ones(2), send_sizes=[1, 1], recv_sizes=[2, 2]
            ),
            "keeps so many rows",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(call, expected):
    def program(comm):
        with pytest.raises(InputError, match=expected):
            call(comm)
        assert comm.ledger.entries == []

    run_ranks(program, 2)


@pytest.mark.parametrize("name", ALL_REDUCES)
def test_a_tensor_of_another_length_on_one_rank_is_found(name):
    def program(comm):
        arguments = [1] if name == "two_level_all_reduce" else []
        ALGORITHMS[name](comm, torch.ones(4 if comm.rank else 8), *arguments)

    with pytest.raises(RankError, match="out"):
        run_ranks(program, 2)


def test_uneven_all_to_all_moves_what_was_asked():
    sizes = [[0, 2, 1], [3, 1, 0], [2, 2, 2]]

    def program(comm):
        send, recv = sizes[comm.rank], [row[comm.rank] for row in sizes]
        values = [10.0 * comm.rank + dst for dst in range(3) for _ in range(send[dst])]
        got = collectives.pairwise_all_to_all(
            comm, torch.tensor(values), send_sizes=send, recv_sizes=recv
        )
        sent = {e.peer: e.n_bytes for e in comm.ledger.entries if e.call == "send"}
        return got.tolist(), sent

    results = run_ranks(program, 3)
    for rank, (got, sent) in enumerate(results):
        assert got == [10.0 * src + rank for src in range(3) for _ in range(sizes[src][rank])]
        assert sent == {dst: 4 * sizes[rank][dst] for dst in range(3) if dst != rank}
