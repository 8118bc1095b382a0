"""Ranks in threads: messages, collectives, ledgers, random numbers, gradients."""

import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from slimlab.comm.base import Communicator
from slimlab.comm.launch import RankResults, run_ranks
from slimlab.comm.ledger import LedgerEntry, PayloadLedger
from slimlab.comm.reductions import reduce_in_rank_order
from slimlab.config import InputError


def test_every_rank_runs_once_and_results_come_in_rank_order():
    results = run_ranks(lambda comm, a, b: (comm.rank, comm.world_size, a + b), 5, args=(2, 3))
    assert isinstance(results, RankResults)
    assert results == [(rank, 5, 5) for rank in range(5)]


def test_one_rank_alone_can_do_everything_but_talk():
    def program(comm):
        comm.barrier()
        return comm.all_reduce(torch.tensor([2.0]), op="mean").item()

    assert run_ranks(program, 1) == [2.0]


def test_a_message_arrives_with_its_values_shape_and_dtype():
    def program(comm):
        if comm.rank == 0:
            comm.send(torch.arange(6, dtype=torch.int16).view(2, 3), 1)
            comm.send(torch.tensor(2.5), 1)
            comm.send(torch.zeros(0, 4), 1)
            return None
        return [comm.recv(0) for _ in range(3)]

    received = run_ranks(program, 2)[1]
    assert received[0].dtype == torch.int16
    assert received[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert received[1].item() == 2.5
    assert received[2].shape == (0, 4)


def test_what_the_sender_changes_later_does_not_reach_the_receiver():
    def program(comm):
        if comm.rank == 0:
            x = torch.ones(3)
            comm.send(x, 1)
            x.zero_()
            comm.barrier()
            return None
        comm.barrier()
        received = comm.recv(0)
        received += 1
        return received.tolist()

    assert run_ranks(program, 2)[1] == [2.0, 2.0, 2.0]


def test_messages_of_one_tag_keep_their_order_and_tags_do_not_mix():
    def program(comm):
        if comm.rank == 0:
            for number in range(4):
                comm.send(torch.tensor(number), 1, tag=number % 2)
            return None
        return [comm.recv(0, tag=tag).item() for tag in (1, 0, 1, 0)]

    assert run_ranks(program, 2)[1] == [1, 0, 3, 2]


def test_a_slice_or_a_transposed_tensor_is_sent_whole():
    whole = torch.arange(12).view(3, 4)

    def program(comm):
        if comm.rank == 0:
            comm.send(whole.T[1:], 1)
            comm.send(torch.ones(1).expand(3), 1)
            return None
        return comm.recv(0), comm.recv(0)

    cut, expanded = run_ranks(program, 2)[1]
    assert torch.equal(cut, whole.T[1:])
    assert cut.is_contiguous()
    assert expanded.tolist() == [1, 1, 1]


def test_a_ring_of_messages_visits_every_rank():
    def program(comm):
        after, before = (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size
        token = torch.tensor([comm.rank])
        for _ in range(comm.world_size - 1):
            comm.send(token, after)
            token = torch.cat([comm.recv(before), torch.tensor([comm.rank])])
        return token.tolist()

    assert run_ranks(program, 4) == [[1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2], [0, 1, 2, 3]]


REDUCED = {"sum": [6.0, 0.0], "mean": [2.0, 0.0], "max": [3.0, 1.0], "min": [1.0, -1.0]}


@pytest.mark.parametrize("op", REDUCED)
def test_all_reduce_gives_every_rank_the_same_new_tensor(op):
    parts = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.0])]

    def program(comm):
        result = comm.all_reduce(parts[comm.rank], op=op)
        values = result.tolist()
        result.zero_()  # must change neither the argument nor what another rank got
        comm.barrier()
        return values

    assert run_ranks(program, 3) == [REDUCED[op]] * 3
    assert [part.tolist() for part in parts] == [[1, 1], [3, -1], [2, 0]]


def test_collectives_follow_each_other_without_mixing():
    def program(comm):
        return [comm.all_reduce(torch.tensor(comm.rank + step)).item() for step in range(20)]

    assert run_ranks(program, 3) == [[3 + 3 * step for step in range(20)]] * 3


def test_sums_have_the_same_bits_in_every_run():
    # 1e8, 1 and -1e8 in float32: the order of the additions shows in the result.
    def program(comm):
        generator = torch.Generator().manual_seed(comm.rank)
        return comm.all_reduce(torch.randn(200, generator=generator) * 10.0 ** (2 * comm.rank))

    first = run_ranks(program, 4)[0]
    for _ in range(50):
        assert all(torch.equal(result, first) for result in run_ranks(program, 4))
    parts = [
        torch.randn(200, generator=torch.Generator().manual_seed(r)) * 100.0**r for r in range(4)
    ]
    assert torch.equal(first, ((parts[0] + parts[1]) + parts[2]) + parts[3])
    assert not torch.equal(first, ((parts[3] + parts[2]) + parts[1]) + parts[0])


def test_ranks_print_in_order_and_the_same_every_time(capsys):
    def program(comm):
        print(f"rank {comm.rank} begins")
        comm.barrier()
        print(f"rank {comm.rank} ends")

    for _ in range(20):
        run_ranks(program, 3)
        expected = [f"rank {rank} {what}" for what in ("begins", "ends") for rank in range(3)]
        assert capsys.readouterr().out.splitlines() == expected


def test_each_rank_draws_from_a_random_state_of_its_own():
    def program(comm):
        torch.manual_seed(comm.rank)
        random.seed(comm.rank)
        drawn = []
        for _ in range(3):
            drawn.append((torch.rand(1).item(), random.random()))
            comm.barrier()  # here the other ranks draw
        return drawn

    results = run_ranks(program, 3)
    for rank in range(3):
        torch.manual_seed(rank)
        random.seed(rank)
        assert results[rank] == [(torch.rand(1).item(), random.random()) for _ in range(3)]


def test_all_ranks_start_from_the_callers_random_state_and_leave_it_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn = run_ranks(lambda comm: torch.rand(4), 3)
    assert all(torch.equal(x, expected) for x in drawn)
    assert torch.equal(torch.rand(4), expected)


def test_a_model_made_from_one_seed_has_the_same_weights_on_every_rank():
    def program(comm):
        torch.manual_seed(0)
        first = nn.Linear(3, 4)
        comm.barrier()
        return torch.cat(
            [p.flatten() for p in (*first.parameters(), *nn.Linear(4, 2).parameters())]
        )

    results = run_ranks(program, 4)
    assert all(torch.equal(result, results[0]) for result in results)


def data_and_model():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    torch.manual_seed(1)
    return inputs, nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def serial_gradients():
    inputs, model = data_and_model()
    model(inputs).square().mean().backward()
    return [p.grad for p in model.parameters()]


# Gradients are means of 12 * 2 products below 10 in size, summed in another order.
GRADIENT_TOLERANCE = 24 * 10 * 2.0**-53


@pytest.mark.parametrize("when", ["after the backward pass", "in hooks during it"])
def test_each_rank_backpropagates_its_share_in_its_own_thread(when):
    def program(comm):
        inputs, model = data_and_model()
        shard = inputs.chunk(comm.world_size)[comm.rank]

        def average(parameter):
            parameter.grad = comm.all_reduce(parameter.grad, op="mean")

        if when == "in hooks during it":
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(average)
        model(shard).square().mean().backward()
        if when == "after the backward pass":
            for parameter in model.parameters():
                average(parameter)
        return [p.grad for p in model.parameters()]

    for grads in run_ranks(program, 3):
        for found, expected in zip(grads, serial_gradients()):
            assert (found - expected).abs().max() <= GRADIENT_TOLERANCE


def test_tensors_travel_as_data_without_gradient():
    def program(comm):
        x = torch.ones(2, requires_grad=True)
        comm.send(x, 1 - comm.rank)
        return comm.recv(1 - comm.rank).requires_grad, comm.all_reduce(x).requires_grad

    assert run_ranks(program, 2) == [(False, False)] * 2


def test_the_ledger_notes_the_payload_of_every_call():
    def program(comm):
        comm.all_reduce(torch.zeros(3, 5, dtype=torch.float64))
        if comm.rank == 0:
            comm.send(torch.zeros(7, dtype=torch.float16), 2)
        elif comm.rank == 2:
            comm.recv(0)
        comm.barrier()
        return comm.ledger.total_bytes()

    results = run_ranks(program, 3)
    assert results == [3 * 5 * 8 + 7 * 2, 3 * 5 * 8, 3 * 5 * 8 + 7 * 2]
    first = results.ledgers[0]
    assert first.entries == [
        LedgerEntry("all_reduce", 120, torch.float64, (3, 5), None),
        LedgerEntry("send", 14, torch.float16, (7,), 2),
        LedgerEntry("barrier", 0, None, None, None),
    ]
    assert results.ledgers[2].entries[1] == LedgerEntry("recv", 14, torch.float16, (7,), 0)
    assert (first.total_bytes("send"), first.num_calls("send"), first.num_calls()) == (14, 1, 3)
    assert first.total_bytes("recv") == 0


def test_the_ledgers_table_has_a_line_per_kind_of_call():
    ledger = PayloadLedger()
    for _ in range(3):
        ledger.add("send", torch.zeros(1000), peer=1)
    ledger.add("barrier")
    assert ledger.table().splitlines() == [
        "call     calls  bytes", "send     3      12,000", "barrier  1      0",
    ]  # fmt: skip


def test_a_call_that_fails_is_not_in_the_ledger():
    def program(comm):
        with pytest.raises(InputError):
            comm.send(torch.ones(3), 5)
        return comm.ledger.num_calls()

    assert run_ranks(program, 2) == [0, 0]


def test_runs_may_nest():
    def program(comm):
        inner = run_ranks(lambda c: c.all_reduce(torch.tensor(comm.rank + c.rank)).item(), 2)
        return comm.all_reduce(torch.tensor(inner[0])).item()

    # Rank r gets (r + 0) + (r + 1); over three ranks 1 + 3 + 5.
    assert run_ranks(program, 3) == [9, 9, 9]


def test_many_ranks_take_turns():
    def program(comm):
        return comm.all_reduce(torch.tensor(comm.rank)).item()

    assert run_ranks(program, 100) == [4950] * 100


def test_reduction_keeps_integers_whole():
    parts = [torch.tensor([2**40 + rank]) for rank in range(3)]
    assert reduce_in_rank_order(parts, "sum").tolist() == [3 * 2**40 + 3]
    assert reduce_in_rank_order(parts, "max").dtype == torch.int64


def test_a_runtime_must_write_every_call():
    class Half(Communicator):
        def _send(self, tensor, dst, tag):
            pass

    with pytest.raises(TypeError, match="_all_reduce"):
        Half(0, 2)


def test_a_program_is_reproducible_to_the_last_turn():
    def program(comm, trace):
        for step in range(3):
            trace.append((step, comm.rank))
            if comm.rank == step:
                comm.send(torch.tensor(step), (comm.rank + 1) % 4)
            elif comm.rank == step + 1:
                comm.recv(step)
            trace.append((step, comm.rank))
        comm.barrier()

    traces = []
    for _ in range(20):
        traces.append([])
        run_ranks(program, 4, args=(traces[-1],))
    assert all(a == b for a, b in pairwise(traces))
