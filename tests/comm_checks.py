"""What a call must give on every rank, computed by each rank alone from all ranks' inputs.

What a rank brings follows from a seed, so that no rank trusts another. Values are small whole
numbers: sums are exact in every dtype and in every order.
"""

from collections.abc import Callable
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.calls import REDUCTIONS
from slimlab.comm.ledger import LedgerEntry
from slimlab.comm.wire import DTYPES, MAX_DIMS

MODES = ("new", "out", "in place")
CASES: dict[str, Callable] = {}
FLOAT = torch.float32
SHAPES = ((), (0,), (1,), (7,), (3, 0, 2), (2, 3, 4), (1,) * MAX_DIMS)
# Elements of 4 bytes: nothing, less than one per rank, odd, and around limits that runtimes have
# for small messages (4 KiB, 64 KiB), up to what no runtime keeps in a buffer.
LENGTHS = (0, 1, 2, 3, 5, 13, 991, 992, 993, 1024, 16351, 16352, 16385, 300_001)


def part(rank: int, shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    low = 0 if dtype in (torch.bool, torch.uint8) else -7
    high = 2 if dtype == torch.bool else 8
    values = torch.randint(low, high, tuple(shape), generator=generator)
    if dtype.is_complex:
        return torch.complex(values.double(), values.flip(0).double() + 1).to(dtype)
    return values.to(dtype)


def parts_of(comm: Communicator, shape, dtype=torch.float32, seed=0) -> list[Tensor]:
    return [part(rank, shape, dtype, seed) for rank in range(comm.world_size)]


def ops_of(dtype: torch.dtype) -> list[str]:
    if dtype == torch.bool:
        return []
    if dtype.is_complex:
        return ["sum", "mean"]
    return list(REDUCTIONS) if dtype.is_floating_point else ["sum", "max", "min"]


def reduced(parts: list[Tensor], op: str) -> Tensor:
    """Combine in the widest dtype of the kind, round once."""
    dtype = parts[0].dtype
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack([one.to(torch.complex128 if dtype.is_complex else wide) for one in parts])
    if op == "max":
        return stack.amax(0).to(dtype)
    if op == "min":
        return stack.amin(0).to(dtype)
    total = stack.sum(0)
    return (total / len(parts) if op == "mean" else total).to(dtype)


def same(found: object, expected: Tensor | None, told: str, roundings: int = 0) -> None:
    """Compare values, shape, dtype; the result must be a plain contiguous tensor without gradient.

    roundings  how often the result may have been rounded, one unit in the last place each
    """
    if expected is None:
        assert found is None, f"{told}: {found}, expected None"
        return
    assert isinstance(found, Tensor), f"{told}: {found!r}, expected a tensor"
    kinds = [(str(one.dtype), tuple(one.shape)) for one in (found, expected)]
    assert kinds[0] == kinds[1], f"{told}: {kinds[0]}, expected {kinds[1]}"
    assert found.is_contiguous(), f"{told}: not contiguous"
    here = found.detach().cpu()
    if roundings:
        allowed = roundings * torch.finfo(expected.dtype).eps * expected.abs().double()
        wide = torch.complex128 if expected.is_complex() else torch.float64
        equal = bool(((here.to(wide) - expected.to(wide)).abs() <= allowed).all())
    else:
        equal = torch.equal(here, expected)
    if not equal:
        values = [one.flatten()[:12].tolist() for one in (here, expected)]
        raise AssertionError(f"{told}: {values[0]}, expected {values[1]}")


def check(
    comm: Communicator, name: str, mine: Tensor | None, expected: Tensor | None, call, mode: str,
    *, roundings: int = 0, told: str = "", peer: int | None = None, payload: Tensor | None = None,
) -> None:  # fmt: skip
    """Make a call and compare result, argument, out and ledger with what they must be.

    name      of the call in the ledger
    mine      the argument; None: there is none
    call      from (argument, out) to the result
    mode      "new": no out; "out": a tensor full of ones; "in place": the argument itself
    payload   what the ledger is to count; None: the argument
    """
    told = f"{name}({told}, {mode}) on rank {comm.rank} of {comm.world_size}"
    given = None if mine is None else mine.to(comm.device)
    before = None if mine is None else mine.clone(memory_format=torch.contiguous_format)
    expected = None if expected is None else expected.clone()
    out = {"new": None, "in place": given}.get(mode)
    if mode == "out" and expected is not None:
        out = torch.ones(expected.shape, dtype=expected.dtype, device=comm.device)
    num_before = len(comm.ledger.entries)
    result = call(given, out)
    same(result, expected, told, roundings)
    if expected is not None:
        assert out is None or result is out, f"{told}: the result is not out"
        assert out is not None or not result.requires_grad, f"{told}: a result with a gradient"
        is_new = mode == "in place" or given is None or not result.numel()
        assert is_new or result.data_ptr() != given.data_ptr(), f"{told}: the argument itself"
    if given is not None and mode != "in place":
        same(given.contiguous(), before, f"{told}: the argument afterwards")
    payload = mine if payload is None else payload
    n_bytes = prod(payload.shape) * payload.element_size()
    found = [
        (one.call, one.n_bytes, one.dtype, one.shape, one.peer)
        for one in comm.ledger.entries[num_before:]
    ]
    noted = [(name, n_bytes, payload.dtype, tuple(payload.shape), peer)]
    assert found == noted, f"{told}: the ledger has {found}, expected {noted}"


def check_broadcast(comm, shape, dtype=torch.float32, src=0, seed=0, mode="new"):
    parts = parts_of(comm, shape, dtype, seed)
    check(
        comm, "broadcast", parts[comm.rank], parts[src],
        lambda x, out: comm.broadcast(x, src, out=out), mode, told=f"{dtype} {shape}, src={src}",
    )  # fmt: skip


def check_reduce(comm, shape, dtype=torch.float32, op="sum", dst=0, seed=0, mode="new"):
    parts = parts_of(comm, shape, dtype, seed)
    check(
        comm, "reduce", parts[comm.rank], reduced(parts, op) if comm.rank == dst else None,
        lambda x, out: comm.reduce(x, dst, op, out=out),
        mode if comm.rank == dst else "new",
        roundings=op == "mean", told=f"{dtype} {shape}, dst={dst}, {op}",
    )  # fmt: skip


def check_all_reduce(comm, shape, dtype=torch.float32, op="sum", seed=0, mode="new", started=False):
    parts = parts_of(comm, shape, dtype, seed)

    def call(x, out):
        result = comm.all_reduce(x, op, out=out, async_op=started)
        return result.wait() if started else result

    check(
        comm, "all_reduce", parts[comm.rank], reduced(parts, op), call, mode,
        roundings=op == "mean", told=f"{dtype} {shape}, {op}" + ", async" * started,
    )  # fmt: skip


def check_reduce_scatter(comm, sizes, more=(), dtype=torch.float32, op="sum", seed=0, mode="new"):
    """sizes: rows per rank, given to the call only if they differ; more: the other dims."""
    parts = parts_of(comm, (sum(sizes), *more), dtype, seed)
    whole = reduced(parts, op)
    check(
        comm, "reduce_scatter", parts[comm.rank], whole.split(sizes)[comm.rank],
        lambda x, out: comm.reduce_scatter(x, op, sizes=uneven(sizes), out=out), mode,
        roundings=op == "mean", told=f"{dtype}, sizes={sizes}, {more}, {op}",
    )  # fmt: skip


def check_all_gather(comm, sizes, more=(), dtype=torch.float32, seed=0, mode="new"):
    parts = [part(rank, (n, *more), dtype, seed) for rank, n in enumerate(sizes)]
    check(
        comm, "all_gather", parts[comm.rank], torch.cat(parts),
        lambda x, out: comm.all_gather(x, sizes=uneven(sizes), out=out), mode,
        told=f"{dtype}, sizes={sizes}, {more}",
    )  # fmt: skip


def check_gather(comm, sizes, more=(), dtype=torch.float32, dst=0, seed=0, mode="new"):
    parts = [part(rank, (n, *more), dtype, seed) for rank, n in enumerate(sizes)]
    check(
        comm, "gather", parts[comm.rank], torch.cat(parts) if comm.rank == dst else None,
        lambda x, out: comm.gather(x, dst, sizes=uneven(sizes), out=out),
        mode if comm.rank == dst else "new", told=f"{dtype}, sizes={sizes}, {more}, dst={dst}",
    )  # fmt: skip


def check_scatter(comm, sizes, more=(), dtype=torch.float32, src=0, seed=0, mode="new"):
    whole = part(src, (sum(sizes), *more), dtype, seed)
    mine = whole if comm.rank == src else None
    expected = whole.split(sizes)[comm.rank]
    check(
        comm, "scatter", mine, expected,
        lambda x, out: comm.scatter(x, src, sizes=None if x is None else uneven(sizes), out=out),
        mode, told=f"{dtype}, sizes={sizes}, {more}, src={src}",
        payload=expected if mine is None else None,
    )  # fmt: skip


def check_all_to_all(comm, table, more=(), dtype=torch.float32, seed=0, mode="new"):
    """table: rows from each rank (first index) to each rank; equal numbers are left out."""
    wholes = [part(rank, (sum(row), *more), dtype, seed) for rank, row in enumerate(table)]
    column = [row[comm.rank] for row in table]
    equal = len({n for row in table for n in row}) == 1
    sizes = {} if equal else {"send_sizes": table[comm.rank], "recv_sizes": column}
    pieces = [whole.split(row)[comm.rank] for whole, row in zip(wholes, table)]
    check(
        comm, "all_to_all", wholes[comm.rank], torch.cat(pieces),
        lambda x, out: comm.all_to_all(x, out=out, **sizes), mode,
        told=f"{dtype}, rows={table}, {more}",
    )  # fmt: skip


def check_messages(comm, tensors: list[Tensor], tag=0, mode="new"):
    """Send rank r's tensor to rank r + 1, with send and recv; odd ranks receive first."""
    rank, world_size = comm.rank, comm.world_size
    if world_size == 1:
        return
    dst, src = (rank + 1) % world_size, (rank - 1) % world_size

    def sends():
        check(
            comm, "send", tensors[rank], None, lambda x, out: comm.send(x, dst, tag), "new",
            told=f"{tensors[rank].dtype} {tuple(tensors[rank].shape)}, tag={tag}", peer=dst,
        )  # fmt: skip

    def receives():
        check(
            comm, "recv", None, tensors[src].contiguous(),
            lambda x, out: comm.recv(src, tag, out=out), mode,
            told=f"src={src}, tag={tag}", peer=src, payload=tensors[src],
        )  # fmt: skip

    for step in (sends, receives) if rank % 2 == 0 else (receives, sends):
        step()


def uneven(sizes: list[int]) -> list[int] | None:
    return None if len(set(sizes)) == 1 else list(sizes)


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


def for_dtypes(function):
    """Make one case per dtype of a function of (comm, dtype)."""
    for dtype in DTYPES:
        name = f"{function.__name__} of {str(dtype).removeprefix('torch.')}".replace("_", " ")
        CASES[name] = lambda comm, dtype=dtype: function(comm, dtype)
    return function


@contextmanager
def noted(comm, *entries):
    """Check what the ledger gets: (call, payload, peer) each."""
    before, group = len(comm.ledger.entries), comm._group
    yield
    expected = [
        LedgerEntry(call, x.numel() * x.element_size(), x.dtype, tuple(x.shape), peer, group)
        for call, x, peer in entries
    ]
    found = comm.ledger.entries[before:]
    assert found == expected, f"the ledger has {found}, expected {expected}"


def neighbours(comm) -> tuple[int, int]:
    return (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size


def others(comm) -> list[int]:
    return [rank for rank in range(comm.world_size) if rank != comm.rank]


def equal_rows(comm, rows: int = 2) -> list[int]:
    return [rows] * comm.world_size


def uneven_rows(comm) -> list[int]:
    """3, 0, 1, 0, 4, ...: neither the first nor the last holds most, some hold nothing."""
    return [(3, 0, 1, 0, 4)[rank % 5] for rank in range(comm.world_size)]
