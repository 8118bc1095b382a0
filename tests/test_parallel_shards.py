"""Shards of the data: disjoint, drawn anew each epoch, found again from the number of a step."""

import pytest
import torch

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError
from slimlab.parallel.data_shards import DataShards, Position, until_all_end
from slimlab.plan.data_parallel import shard_sizes


def shards_of(world_size, num_samples=23, batch_size=5, **options):
    return [
        DataShards(num_samples, batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def joined(shards, step):
    return torch.cat([shard(step) for shard in shards])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("last", ["drop", "pad", "short"])
def test_shards_are_disjoint_and_an_epoch_sees_every_sample_once_as_far_as_promised(
    last, world_size
):
    shards = shards_of(world_size, last=last)
    num_batches = shards[0].batches_per_epoch
    seen = torch.cat([joined(shards, step) for step in range(num_batches)]).tolist()
    if last == "drop":
        assert (num_batches, len(seen), len(set(seen))) == (4, 20, 20)
    elif last == "pad":
        assert (num_batches, len(seen)) == (5, 25)
        assert sorted(seen[:23]) == list(range(23))
        assert seen[23:] == seen[:2]
    else:
        assert num_batches == 5
        assert sorted(seen) == list(range(23))
        assert len(joined(shards, 4)) == 3


@pytest.mark.parametrize("last", ["drop", "pad", "short"])
def test_the_batches_are_the_same_at_every_number_of_ranks(last):
    (alone,) = shards_of(1, last=last)
    for world_size in (2, 3, 5):
        shards = shards_of(world_size, last=last)
        for step in (0, 3, 4, 11):
            assert joined(shards, step).tolist() == alone(step).tolist()
            sizes = tuple(len(shard(step)) for shard in shards)
            assert sizes == shard_sizes(len(alone(step)), world_size)


def test_orders_differ_between_epochs_and_seeds_also_between_neighbours():
    (shard,) = shards_of(1)
    orders = [shard.order(epoch) for epoch in range(4)]
    orders += [shards_of(1, seed=seed)[0].order(0) for seed in (1, 2, 3)]
    assert len({tuple(order.tolist()) for order in orders}) == 7
    assert all(sorted(order.tolist()) == list(range(23)) for order in orders)


def test_what_drop_leaves_out_differs_between_epochs():
    (shard,) = shards_of(1)
    left_out = {tuple(sorted(shard.order(epoch)[20:].tolist())) for epoch in range(4)}
    assert len(left_out) > 1


def test_without_shuffle_samples_come_in_their_order():
    (shard,) = shards_of(1, shuffle=False)
    assert joined([shard], 4).tolist() == [0, 1, 2, 3, 4]
    assert shard(2).tolist() == [10, 11, 12, 13, 14]


def test_a_run_goes_on_from_the_number_of_its_step_with_another_number_of_ranks():
    before = shards_of(2, last="pad")
    walked = [joined(before, step).tolist() for step in range(12)]
    # Another process, other ranks, and steps asked for in any order.
    after = shards_of(3, last="pad")
    assert [joined(after, step).tolist() for step in reversed(range(7, 12))] == walked[:6:-1]
    assert after[0].position(7) == Position(epoch=1, batch=2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_samples": 0}, "num_samples = 0"),
        ({"batch_size": 2.0}, "batch_size = 2.0"),
        ({"batch_size": 2}, "give batch_size=3, or start 2 ranks"),
        ({"batch_size": 24}, "give batch_size=23 at most"),
        ({"last": "keep"}, "drop, pad, short"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_one_that_does(options, named):
    with pytest.raises(InputError, match=named):
        shards_of(3, **options)


def test_ranks_and_steps_that_are_not_there_are_refused():
    with pytest.raises(InputError, match="rank = 3"):
        DataShards(9, 3, rank=3, world_size=3)
    with pytest.raises(InputError, match="step = -1"):
        DataShards(9, 3)(-1)


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_shard_sizes_are_of_a_whole_number_of_samples(bad):
    with pytest.raises(InputError, match="num_samples"):
        shard_sizes(bad, 2)


@pytest.mark.parametrize("numbers", [[0, 0], [2, 2], [3, 0, 1], [1]])
def test_ranks_walk_on_until_all_data_has_ended(numbers):
    def program(comm):
        return list(until_all_end(comm, range(numbers[comm.rank])))

    results = run_ranks(program, len(numbers))
    longest = max(numbers)
    for number, seen in zip(numbers, results):
        assert seen == [*range(number), *[None] * (longest - number)]
    for ledger in results.ledgers:
        assert ledger.num_calls("all_reduce") == longest + 1
        assert ledger.total_bytes() == 8 * (longest + 1)
