"""Cases of slimlab.comm for every runtime: collectives of all ranks."""

import torch
from comm_checks import (
    LENGTHS,
    MODES,
    SHAPES,
    case,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_gather,
    check_reduce,
    check_reduce_scatter,
    check_scatter,
    equal_rows,
    for_dtypes,
    neighbours,
    ops_of,
    part,
    same,
    uneven_rows,
)

from slimlab.comm.ledger import LedgerEntry


@case
def barriers(comm):
    for _ in range(3):
        comm.barrier()
    assert comm.ledger.entries[-1] == LedgerEntry("barrier", 0, None, None, None, comm._group)


@for_dtypes
def broadcast(comm, dtype):
    for mode in MODES:
        check_broadcast(comm, (3, 2), dtype, comm.world_size - 1, mode=mode)


@case
def broadcast_from_every_rank(comm):
    for src in range(comm.world_size):
        check_broadcast(comm, (4,), src=src, seed=src)


@for_dtypes
def reduce(comm, dtype):
    for op in ops_of(dtype):
        for mode in MODES:
            check_reduce(comm, (5,), dtype, op, comm.world_size - 1, mode=mode)


@case
def reduce_to_every_rank(comm):
    for dst in range(comm.world_size):
        check_reduce(comm, (2, 3), op="max", dst=dst, seed=dst)


@for_dtypes
def all_reduce(comm, dtype):
    for op in ops_of(dtype):
        for mode in MODES:
            check_all_reduce(comm, (5, 3), dtype, op, mode=mode)


@for_dtypes
def started_all_reduce(comm, dtype):
    for op in ops_of(dtype):
        for mode in MODES:
            check_all_reduce(comm, (5,), dtype, op, mode=mode, started=True)


@case
def broadcast_reduce_and_all_reduce_of_every_shape(comm):
    for shape in SHAPES:
        check_broadcast(comm, shape)
        check_reduce(comm, shape)
        check_all_reduce(comm, shape, mode="in place")


@case
def all_reduce_of_every_length(comm):
    for length in LENGTHS:
        check_all_reduce(comm, (length,), mode="in place")


@case
def collectives_of_views(comm):
    x = part(comm.rank, (4, 6)).to(comm.device)
    total = sum(part(rank, (4, 6)) for rank in range(comm.world_size))
    same(comm.all_reduce(x.T), total.T.contiguous(), "all_reduce of x.T")
    same(comm.reduce(x[:, 1]), total[:, 1].contiguous() if comm.rank == 0 else None, "reduce")
    same(comm.broadcast(x[::2]), part(0, (4, 6))[::2].contiguous(), "broadcast of x[::2]")
    expanded = x[:1, :1].expand(3, 2)
    same(comm.all_reduce(expanded), total[:1, :1].repeat(3, 2), "all_reduce of expanded")
    joined = torch.cat([part(rank, (4, 6)).T for rank in range(comm.world_size)])
    same(comm.all_gather(x.T), joined, "all_gather of x.T")
    same(comm.gather(x.T), joined if comm.rank == 0 else None, "gather of x.T")
    whole = part(9, (6, comm.world_size)).to(comm.device)
    rows = part(9, (6, comm.world_size)).T
    same(comm.scatter(whole.T), rows[comm.rank : comm.rank + 1].contiguous(), "scatter of x.T")
    same(comm.all_to_all(whole.T), torch.cat([rows[comm.rank : comm.rank + 1]] * comm.world_size),
         "all_to_all of x.T")  # fmt: skip
    same(comm.reduce_scatter(whole.T), rows[comm.rank : comm.rank + 1] * comm.world_size,
         "reduce_scatter of x.T")  # fmt: skip


@case
def parameters_travel_as_data(comm):
    weight = torch.nn.Parameter(part(comm.rank, (3,)).to(comm.device))
    assert comm.broadcast(weight, out=weight) is weight
    same(weight, part(0, (3,)), "a broadcast parameter")
    result = comm.all_reduce(weight)
    assert not result.requires_grad
    handle = comm.all_reduce(weight, out=weight, async_op=True)
    assert handle.wait() is weight
    assert weight.requires_grad
    same(weight, part(0, (3,)) * comm.world_size, "an all_reduced parameter")


@case
def started_all_gathers_end_in_any_order(comm):
    sizes = [uneven_rows(comm), equal_rows(comm), [0] * comm.world_size]
    mine = [part(comm.rank, (some[comm.rank], 3), seed=7).to(comm.device) for some in sizes]
    outs = [None, torch.empty(sum(sizes[1]), 3, device=comm.device), None]
    handles = [
        comm.all_gather(x, sizes=some, out=out, async_op=True)
        for x, some, out in zip(mine, sizes, outs)
    ]
    total = comm.all_reduce(mine[1], async_op=True)
    check_all_reduce(comm, (4,), op="max")
    for some, out, handle in reversed(list(zip(sizes, outs, handles))):
        parts = [part(rank, (n, 3), seed=7) for rank, n in enumerate(some)]
        whole = handle.wait()
        assert out is None or whole is out
        same(whole, torch.cat(parts), f"the all_gather of {some}")
    same(total.wait(), sum(part(rank, (equal_rows(comm)[rank], 3), seed=7) for rank in
         range(comm.world_size)), "the all_reduce started after them")  # fmt: skip


@case
def results_belong_to_their_rank(comm):
    x = part(comm.rank, (4,)).to(comm.device)
    for call in (comm.all_reduce, comm.broadcast, comm.all_gather):
        result = call(x)
        expected = result.cpu() + comm.rank
        result += comm.rank
        comm.barrier()
        same(result, expected, f"the result of {call.__name__}, after all ranks changed theirs")


@case
def started_all_reduces_end_in_any_order(comm):
    parts = [part(comm.rank, (n,), seed=n).to(comm.device) for n in (3, 0, 5000)]
    handles = [comm.all_reduce(x, async_op=True) for x in parts]
    comm.barrier()
    check_all_reduce(comm, (4,), op="max")
    if comm.world_size > 1:
        dst, src = neighbours(comm)
        comm.sendrecv(parts[0], dst, src)
    for x, handle in reversed(list(zip(parts, handles))):
        n = x.numel()
        total = sum(part(rank, (n,), seed=n) for rank in range(comm.world_size))
        same(handle.wait(), total, f"the all_reduce of {n} elements")
        same(handle.wait(), total, f"the all_reduce of {n} elements, waited for again")


@case
def random_sums_have_the_same_bits_on_every_rank_and_every_time(comm):
    for length in (1, 6, 1000, 40_000):
        parts = [
            torch.randn(length, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
            for rank in range(comm.world_size)
        ]
        exact = sum(x.double() for x in parts)
        # Each of n - 1 additions rounds once, relative to a sum of absolute values at most.
        allowed = comm.world_size * 2.0**-24 * sum(x.double().abs() for x in parts)
        results = [comm.all_reduce(parts[comm.rank].to(comm.device)) for _ in range(2)]
        assert ((results[0].cpu() - exact).abs() <= allowed).all()
        same(results[1], results[0].cpu(), "the same all_reduce again")
        bits = comm.all_gather(results[0].view(1, -1)).cpu()
        assert (bits == bits[0]).all(), f"the ranks got different sums of {length} elements"


@for_dtypes
def reduce_scatter(comm, dtype):
    for op in ops_of(dtype):
        check_reduce_scatter(comm, equal_rows(comm), (3,), dtype, op)
        check_reduce_scatter(comm, uneven_rows(comm), (), dtype, op, mode="out")


@for_dtypes
def all_gather(comm, dtype):
    check_all_gather(comm, equal_rows(comm), (3,), dtype)
    check_all_gather(comm, uneven_rows(comm), (), dtype, mode="out")


@for_dtypes
def gather(comm, dtype):
    check_gather(comm, equal_rows(comm), (3,), dtype, comm.world_size - 1)
    check_gather(comm, uneven_rows(comm), (), dtype, comm.world_size - 1, mode="out")


@for_dtypes
def scatter(comm, dtype):
    check_scatter(comm, equal_rows(comm), (3,), dtype, comm.world_size - 1)
    check_scatter(comm, uneven_rows(comm), (), dtype, comm.world_size - 1, mode="out")


@for_dtypes
def all_to_all(comm, dtype):
    check_all_to_all(comm, [equal_rows(comm)] * comm.world_size, (3,), dtype)
    table = [
        [(src + 2 * dst) % 3 for dst in range(comm.world_size)] for src in range(comm.world_size)
    ]
    check_all_to_all(comm, table, (), dtype, mode="out")


@case
def gather_and_scatter_by_every_rank(comm):
    for root in range(comm.world_size):
        check_gather(comm, uneven_rows(comm), (2,), dst=root, seed=root)
        check_scatter(comm, uneven_rows(comm), (2,), src=root, seed=root)


@case
def parts_of_awkward_sizes(comm):
    n = comm.world_size
    for sizes, more in (
        ([0] * n, ()),  # nothing at all
        ([0] * n, (3,)),
        ([2] * n, (0,)),  # rows without elements
        ([0] * (n - 1) + [5], (2,)),  # all on the last
        ([5] + [0] * (n - 1), ()),  # all on the first
        ([1] * n, (2, 1, 3)),
        ([rank * 37 for rank in range(n)], ()),
        ([3] * (n - 1) + [20_001], ()),  # a large one among small ones
    ):
        check_all_gather(comm, sizes, more)
        check_gather(comm, sizes, more)
        check_scatter(comm, sizes, more)
        check_reduce_scatter(comm, sizes, more)


@case
def parts_of_equal_sizes_may_be_named(comm):
    x, sizes = part(comm.rank, (2,)).to(comm.device), [2] * comm.world_size
    whole = torch.cat([part(rank, (2,)) for rank in range(comm.world_size)])
    same(comm.all_gather(x, sizes=sizes), whole, "all_gather")
    same(comm.scatter(whole.to(comm.device), sizes=sizes), whole[comm.rank * 2 :][:2], "scatter")


@case
def all_to_all_of_awkward_sizes(comm):
    n = comm.world_size
    for table, more in (
        ([[0] * n] * n, ()),
        ([[0] * n] * n, (2,)),
        ([[3] * n] * n, (0,)),
        ([[4] + [0] * (n - 1)] * n, ()),  # everything to rank 0
        ([[4] * n] + [[0] * n] * (n - 1), (2,)),  # everything from rank 0
        ([[5 if src == dst else 0 for dst in range(n)] for src in range(n)], ()),  # to oneself
        ([[src * n + dst for dst in range(n)] for src in range(n)], ()),
        ([[20_001 if src < dst else 1 for dst in range(n)] for src in range(n)], ()),
    ):
        check_all_to_all(comm, table, more)
