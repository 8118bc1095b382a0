"""Cases of slimlab.comm for every runtime: groups of ranks, and programs drawn by chance."""

import torch
from comm_checks import (
    FLOAT,
    case,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_gather,
    check_messages,
    check_reduce,
    check_reduce_scatter,
    check_scatter,
    equal_rows,
    neighbours,
    ops_of,
    part,
    same,
    uneven_rows,
)

from slimlab.comm.ledger import LedgerEntry
from slimlab.comm.wire import DTYPES


def check_everything(comm, seed: int) -> None:
    """All operations in a group, small."""
    last = comm.world_size - 1
    comm.barrier()
    check_broadcast(comm, (3,), src=last, seed=seed)
    check_reduce(comm, (3,), dst=last, seed=seed)
    check_all_reduce(comm, (3,), op="mean", seed=seed, mode="in place")
    check_all_reduce(comm, (3,), op="min", seed=seed, started=True)
    check_reduce_scatter(comm, uneven_rows(comm), seed=seed)
    check_all_gather(comm, uneven_rows(comm), (2,), seed=seed)
    check_gather(comm, uneven_rows(comm), dst=last, seed=seed)
    check_scatter(comm, equal_rows(comm), src=last, seed=seed)
    check_all_to_all(comm, [uneven_rows(comm)] * comm.world_size, seed=seed)
    check_messages(comm, [part(rank, (rank,), seed=seed) for rank in range(comm.world_size)])


@case
def evens_and_odds(comm):
    group = comm.split(comm.rank % 2)
    expected = tuple(range(comm.rank % 2, comm.world_size, 2))
    assert group.ranks == expected
    assert (group.rank, group.world_size) == (expected.index(comm.rank), len(expected))
    check_everything(group, seed=comm.rank % 2)
    check_everything(comm, seed=2)


@case
def keys_reverse_the_order(comm):
    group = comm.split(0, key=-comm.rank)
    assert group.ranks == tuple(reversed(range(comm.world_size)))
    assert group.rank == comm.world_size - 1 - comm.rank
    check_everything(group, seed=1)


@case
def equal_keys_keep_the_order_of_ranks(comm):
    group = comm.split(0, key=comm.rank % 2)
    n = comm.world_size
    assert group.ranks == (*range(0, n, 2), *range(1, n, 2))
    check_everything(group, seed=3)


@case
def a_rank_without_color_is_in_no_group(comm):
    group = comm.split(None if comm.rank == 0 else -3)
    if comm.rank == 0:
        assert group is None
    else:
        assert group.ranks == tuple(range(1, comm.world_size))
        check_everything(group, seed=4)
    assert comm.split(None) is None
    comm.barrier()


@case
def groups_of_groups(comm):
    half = comm.split(comm.rank * 2 // comm.world_size, key=-comm.rank)
    pair = half.split(half.rank // 2)
    alone = pair.split(pair.rank)
    assert pair.ranks == half.ranks[half.rank // 2 * 2 :][:2]
    assert alone.ranks == (comm.rank,)
    for number, group in enumerate((alone, pair, half, comm)):
        check_everything(group, seed=number)


@case
def several_groups_of_the_same_ranks_do_not_mix(comm):
    first, second = comm.split(7), comm.split(7)
    if comm.world_size == 1:
        return
    (dst, src), both = neighbours(comm), (first, second, comm)
    receives = [group.irecv(src, 4) for group in reversed(both)]
    sends = [
        group.isend(part(comm.rank, (3,), seed=seed).to(comm.device), dst, 4)
        for seed, group in enumerate(both)
    ]
    for seed, handle in zip((2, 1, 0), receives):
        same(handle.wait(), part(src, (3,), seed=seed), f"the message in group {seed}")
    for handle in sends:
        handle.wait()
    handles = [
        group.all_reduce(part(comm.rank, (2,), seed=seed).to(comm.device), async_op=True)
        for seed, group in enumerate(both)
    ]
    for seed in (1, 2, 0):
        total = sum(part(rank, (2,), seed=seed) for rank in range(comm.world_size))
        same(handles[seed].wait(), total, f"the all_reduce in group {seed}")


@case
def rows_and_columns_of_a_grid(comm):
    row, column = comm.split(comm.rank // 2), comm.split(comm.rank % 2)
    x = part(comm.rank, (3,)).to(comm.device)
    found = column.all_reduce(row.all_reduce(x))
    grid = [part(rank, (3,)) for rank in range(comm.world_size)]
    expected = sum(
        sum(grid[rank // 2 * 2 : rank // 2 * 2 + 2])
        for rank in range(comm.rank % 2, comm.world_size, 2)
    )
    same(found, expected, "all_reduce over rows, then over columns")


@case
def groups_share_the_ledger_and_say_who_they_are(comm):
    group = comm.split(comm.rank % 2, key=-comm.rank)
    members = tuple(sorted(range(comm.rank % 2, comm.world_size, 2), reverse=True))
    assert group.ledger is comm.ledger
    x = part(comm.rank, (3,)).to(comm.device)
    group.all_reduce(x)
    assert comm.ledger.entries[-1] == LedgerEntry("all_reduce", 12, FLOAT, (3,), None, members)
    if group.world_size > 1:
        dst, src = neighbours(group)
        group.sendrecv(x, dst, src)
        assert [(entry.peer, entry.group) for entry in comm.ledger.entries[-2:]] == [
            (dst, members), (src, members),
        ]  # fmt: skip
    comm.all_reduce(x)
    assert comm.ledger.entries[-1].group is None


@case
def a_program_drawn_by_chance(comm):
    """All ranks draw the same calls and sizes."""
    generator = torch.Generator().manual_seed(11)
    n = comm.world_size
    for seed in range(40):
        which, root, dtype, length = torch.randint(10**6, (4,), generator=generator).tolist()
        sizes = torch.randint(6, (n,), generator=generator).tolist()
        root, dtype, length = root % n, DTYPES[dtype % len(DTYPES)], length % 50
        more = ((), (2,))[seed % 2]
        numbers = dtype if ops_of(dtype) else FLOAT
        check, *arguments = [
            (check_broadcast, (length,), dtype, root),
            (check_reduce, (length,), numbers, "sum", root),
            (check_all_reduce, (length,), numbers, "sum"),
            (check_reduce_scatter, sizes, more, numbers, "sum"),
            (check_all_gather, sizes, more, dtype),
            (check_gather, sizes, more, dtype, root),
            (check_scatter, sizes, more, dtype, root),
            (check_all_to_all, [sizes] * n, more, dtype),
        ][which % 8]
        check(comm, *arguments, seed=seed)
        check_messages(comm, [part(rank, (size,), dtype, seed) for rank, size in enumerate(sizes)])
