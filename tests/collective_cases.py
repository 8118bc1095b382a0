"""Cases for the hand-written collectives: inputs, what must come out, what must be sent.

A case is plain data, so that one launched world of any runtime can run many of them.
"""

from dataclasses import dataclass

import torch

from slimlab.comm.collectives import ALGORITHMS
from slimlab.comm.reductions import reduce_in_rank_order
from slimlab.plan.messages import messages_of

ALL_REDUCES = [name for name in ALGORITHMS if name.endswith("all_reduce")]
REDUCING = [name for name in ALGORITHMS if "reduce" in name]
PARTED = ("ring_reduce_scatter", "ring_all_gather", "pairwise_all_to_all")
LENGTHS = (0, 1, 2, 3, 5, 8, 13, 24, 64)


@dataclass(frozen=True)
class Case:
    """One call: num_elements is the length of the tensor that is cut into parts."""

    name: str
    num_elements: int
    dtype: torch.dtype = torch.float32
    op: str = "sum"
    root: int = 0
    ranks_per_host: int = 1
    in_place: bool = False
    row: tuple[int, ...] = ()

    def sizes(self, world_size):
        """Rows of nearly equal parts."""
        bounds = [self.num_elements * rank // world_size for rank in range(world_size + 1)]
        return [high - low for low, high in zip(bounds, bounds[1:])]


def inputs(case, world_size):
    """Every rank's tensor; small whole numbers, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(case.num_elements)
    rows = [case.num_elements] * world_size
    if case.name == "ring_all_gather":
        rows = case.sizes(world_size)
    return [
        torch.randint(0, 4, (count, *case.row), generator=generator).to(case.dtype)
        for count in rows
    ]


def expected(case, tensors, rank):
    """What a plain computation gives `rank`; None where the collective gives nothing."""
    sizes = case.sizes(len(tensors))
    if case.name == "ring_all_gather":
        return torch.cat(tensors)
    if case.name == "pairwise_all_to_all":
        return torch.cat([tensor.split(sizes)[rank] for tensor in tensors])
    if case.name.endswith("broadcast"):
        return tensors[case.root]
    total = reduce_in_rank_order(tensors, case.op)
    if case.name == "ring_reduce_scatter":
        return total.split(sizes)[rank]
    return total if case.name != "binomial_reduce" or rank == case.root else None


def call(comm, case, tensor):
    """Call the collective of a case on this rank's tensor."""
    function, sizes = ALGORITHMS[case.name], case.sizes(comm.world_size)
    arguments = []
    if case.name == "two_level_all_reduce":
        arguments = [case.ranks_per_host]
    elif case.name.endswith("broadcast") or case.name == "binomial_reduce":
        arguments = [case.root]
    if case.name in REDUCING:
        arguments.append(case.op)
    options = {}
    if case.name in PARTED[:2]:
        options["sizes"] = sizes
    elif case.name == "pairwise_all_to_all":
        options = {"send_sizes": sizes, "recv_sizes": [sizes[comm.rank]] * comm.world_size}
    if case.in_place:
        options["out"] = tensor
    return function(comm, tensor, *arguments, **options)


def run_cases(comm, cases):
    """Run cases; of each return what is wrong with the result, and this rank's messages.

    returns  (problem or None, [(call, peer, bytes), ...]) per case
    """
    found = []
    for case in cases:
        tensors = inputs(case, comm.world_size)
        tensor, before = tensors[comm.rank].clone(), len(comm.ledger.entries)
        result = call(comm, case, tensor)
        sent = [(one.call, one.peer, one.n_bytes) for one in comm.ledger.entries[before:]]
        want, problem = expected(case, tensors, comm.rank), None
        if want is None or result is None:
            problem = None if want is result is None else f"{result} instead of {want}"
        elif result.dtype != want.dtype or not torch.equal(result, want):
            problem = f"{result} instead of {want}"
        elif case.in_place and result is not tensor:
            problem = "not in place"
        elif not case.in_place and not torch.equal(tensor, tensors[comm.rank]):
            problem = f"the argument has become {tensor}"
        found.append((problem, sent))
    return found


def check_cases(cases, results):
    """Assert that all ranks' results are right, and their messages those of the model."""
    world_size = len(results)
    for number, case in enumerate(cases):
        where = f"{case} on {world_size} ranks"
        assert [rank[number][0] for rank in results] == [None] * world_size, where
        row_elements = torch.Size(case.row).numel()
        options = {}
        if case.name in PARTED[:2]:
            options["sizes"] = [size * row_elements for size in case.sizes(world_size)]
        # Rows are not cut by an all_to_all either, so it is counted row by row.
        rows = case.name == "pairwise_all_to_all"
        model = messages_of(
            case.name,
            world_size,
            case.num_elements * (min(row_elements, 1) if rows else row_elements),
            case.dtype.itemsize * (max(row_elements, 1) if rows else 1),
            root=case.root,
            ranks_per_host=case.ranks_per_host,
            **options,
        )
        for way, matrix in (("send", lambda m: m), ("recv", lambda m: tuple(zip(*m)))):
            counted = count([rank[number][1] for rank in results], way)
            assert counted == (matrix(model.messages), matrix(model.n_bytes)), (where, way)
        assert {one[0] for rank in results for one in rank[number][1]} <= {"send", "recv"}, where


def count(sent, way):
    """Messages and bytes from every rank's ledger, as rows over the peers."""
    messages = [[0] * len(sent) for _ in sent]
    n_bytes = [[0] * len(sent) for _ in sent]
    for rank, entries in enumerate(sent):
        for name, peer, size in entries:
            if name == way:
                messages[rank][peer] += 1
                n_bytes[rank][peer] += size
    return tuple(map(tuple, messages)), tuple(map(tuple, n_bytes))


def every_case(world_size, lengths=LENGTHS):
    """All collectives at several lengths: roots and hosts differ with the length."""
    return [
        Case(
            name,
            num_elements,
            root=(num_elements + 1) % world_size,
            ranks_per_host=num_elements % world_size + 1,
            in_place=name in ALL_REDUCES and num_elements % 2 == 1,
        )
        for name in ALGORITHMS
        for num_elements in lengths
    ]
