"""Every collective: the runtime's against plain computation, the book's counted.

    slimlab demo collectives --ranks 4 --backend gloo
    python -m slimlab.demos.collectives --ranks 3 --backend mpi --json
    mpirun -n 4 python -m slimlab.demos.collectives
    torchrun --nproc-per-node 4 -m slimlab.demos.collectives --elements 10

Every rank knows the tensors of all, so each can work out alone what a collective must give it. Of
the runtime's collectives one sees the payload that each rank hands over; what they move inside is
the library's business. Those of slimlab.comm.collectives are made of messages between two ranks, so
that all messages and bytes on all links are compared with slimlab.plan.messages.

The length is by default no multiple of anything, so that parts are uneven. Production test suites
of MPI and NCCL check the same table, for every dtype too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import click
import torch
from torch import Tensor

from slimlab.comm import collectives
from slimlab.comm.base import Communicator
from slimlab.comm.collectives_shared import cut, part_bounds
from slimlab.comm.trace import TracedCommunicator
from slimlab.demos.common import demo_command, number
from slimlab.demos.measure import count_links, differing_links, from_all_ranks, inputs_of, num_wrong
from slimlab.demos.report import Report, report_of
from slimlab.plan.messages import Traffic, messages_of

ITEM_BYTES = 4


class Case(NamedTuple):
    """One collective.

    name       as tables show it
    run        calls it with this rank's arguments
    expected   what it must return on this rank
    predicted  of the runtime's, the elements that each rank hands over; of the book's, Traffic
    """

    name: str
    run: Callable[[], Tensor | None]
    expected: Tensor | None
    predicted: list[int] | Traffic


def program(comm: Communicator, num_elements: int, seed: int) -> Report:
    """Call every collective once, and check what comes out and what goes over the links.

    comm          the communicator of all ranks
    num_elements  of the float32 tensor on each rank
    seed          of the tensors
    returns       the report, the same on every rank

    Communicates: each collective once, and what the ranks tell each other about them.
    """
    inputs = inputs_of(comm, num_elements, seed)
    report = report_of("collectives", comm)

    wrong, payloads, cases = [], [], list(of_the_runtime(comm, inputs))
    for case in cases:
        before = comm.ledger.total_bytes()
        wrong.append(num_wrong(case.run(), case.expected))
        payloads.append(comm.ledger.total_bytes() - before)
    show_payloads(report, cases, from_all_ranks(comm, wrong), from_all_ranks(comm, payloads))

    traced, wrong = TracedCommunicator(comm), []
    cases = list(of_the_book(traced, inputs))
    for case in cases:
        with traced.label(case.name):
            wrong.append(num_wrong(case.run(), case.expected))
    counted = [
        count_links(comm, [event for event in traced.events if event.label == case.name])
        for case in cases
    ]
    show_traffic(report, cases, from_all_ranks(comm, wrong), counted)
    report.numbers |= {"num_elements": num_elements}
    return report


def of_the_runtime(comm: Communicator, inputs: list[Tensor]) -> Iterator[Case]:
    """List the runtime's collectives.

    comm     the communicator of all ranks
    inputs   the tensors of all ranks
    """
    w, rank, last = comm.world_size, comm.rank, comm.world_size - 1
    own, n, total = inputs[rank], inputs[rank].numel(), sum(inputs)
    bounds = part_bounds(n, w)
    sizes = [high - low for low, high in zip(bounds, bounds[1:])]
    part, everyone = cut(own, bounds)[rank], [n] * w
    handed_out = [n if one == last else sizes[one] for one in range(w)]
    exchanged = {"send_sizes": sizes, "recv_sizes": [sizes[rank]] * w}
    stacked = torch.stack(inputs)
    joined = torch.cat([cut(one, bounds)[place] for place, one in enumerate(inputs)])
    turned = torch.cat([cut(one, bounds)[rank] for one in inputs])

    def started() -> Tensor:
        return comm.all_reduce(own, async_op=True).wait()

    def in_group() -> Tensor:
        return comm.split(rank % 2).all_reduce(own)

    def reduced(op: str, expected: Tensor) -> Case:
        return Case(f"all_reduce, {op}", partial(comm.all_reduce, own, op), expected, everyone)

    def on_last(tensor: Tensor) -> Tensor | None:
        return tensor if rank == last else None

    yield Case("barrier", comm.barrier, None, [0] * w)
    yield Case("broadcast", partial(comm.broadcast, own, last), inputs[last], everyone)
    yield Case("reduce", partial(comm.reduce, own, last), on_last(total), everyone)
    yield reduced("sum", total)
    yield reduced("mean", total / w)
    yield reduced("max", stacked.amax(0))
    yield reduced("min", stacked.amin(0))
    yield Case("all_reduce, started", started, total, everyone)
    scattered = partial(comm.reduce_scatter, own, sizes=sizes)
    yield Case("reduce_scatter", scattered, cut(total, bounds)[rank], everyone)
    yield Case("all_gather", partial(comm.all_gather, part, sizes=sizes), joined, sizes)
    yield Case("gather", partial(comm.gather, part, last, sizes=sizes), on_last(joined), sizes)
    scattered = partial(comm.scatter, on_last(own), last, sizes=sizes if rank == last else None)
    yield Case("scatter", scattered, cut(inputs[last], bounds)[rank], handed_out)
    yield Case("all_to_all", partial(comm.all_to_all, own, **exchanged), turned, everyone)
    yield Case("split, all_reduce", in_group, sum(inputs[rank % 2 :: 2]), everyone)


def of_the_book(comm: Communicator, inputs: list[Tensor]) -> Iterator[Case]:
    """List the collectives that are written with send and receive.

    comm     the traced communicator of all ranks
    inputs   the tensors of all ranks
    """
    w, rank, last = comm.world_size, comm.rank, comm.world_size - 1
    own, n, total = inputs[rank], inputs[rank].numel(), sum(inputs)
    per_host, bounds = min(2, w), part_bounds(n, w)
    sizes = [high - low for low, high in zip(bounds, bounds[1:])]
    part = cut(own, bounds)[rank]
    joined = torch.cat([cut(one, bounds)[place] for place, one in enumerate(inputs)])
    turned = torch.cat([cut(one, bounds)[rank] for one in inputs])
    exchanged = {"send_sizes": sizes, "recv_sizes": [sizes[rank]] * w}
    cases = {
        "ring_all_reduce": ((own,), {}, total),
        "recursive_doubling_all_reduce": ((own,), {}, total),
        "rabenseifner_all_reduce": ((own,), {}, total),
        "two_level_all_reduce": ((own, per_host), {}, total),
        "ring_reduce_scatter": ((own,), {"sizes": sizes}, cut(total, bounds)[rank]),
        "ring_all_gather": ((part,), {"sizes": sizes}, joined),
        "binomial_broadcast": ((own, last), {}, inputs[last]),
        "scatter_ring_broadcast": ((own, last), {}, inputs[last]),
        "binomial_reduce": ((own, last), {}, total if rank == last else None),
        "pairwise_all_to_all": ((own,), exchanged, turned),
    }
    for name, function in collectives.ALGORITHMS.items():
        arguments, options, expected = cases[name]
        predicted = messages_of(name, w, n, ITEM_BYTES, root=last, ranks_per_host=per_host)
        yield Case(name, partial(function, comm, *arguments, **options), expected, predicted)


def show_payloads(
    report: Report, cases: list[Case], wrong: list[list], payloads: list[list]
) -> None:
    """Compare results and payloads of the runtime's collectives.

    report    takes table and checks
    cases     the collectives
    wrong     elements that differ from plain computation, a row per rank, a column per case
    payloads  bytes that each rank handed over, likewise
    """
    rows = []
    for case, bad, handed in zip(cases, map(sum, zip(*wrong)), zip(*payloads)):
        predicted = [elements * ITEM_BYTES for elements in case.predicted]
        rows.append((case.name, bad, f"{sum(predicted):,}", f"{sum(handed):,}"))
        report.check(f"{case.name}: elements unlike plain computation", 0, bad)
        report.check(f"{case.name}: bytes handed over", predicted, list(handed))
    headers = ("collective", "wrong", "bytes predicted", "bytes handed over, all ranks")
    report.table(f"the collectives of {report.backend}", headers, rows)


def show_traffic(
    report: Report, cases: list[Case], wrong: list[list], counted: list[tuple[list, list]]
) -> None:
    """Compare results, messages and bytes of the collectives written with send and receive.

    report   takes table and checks
    cases    the collectives
    wrong    elements that differ from plain computation, a row per rank, a column per case
    counted  for each case messages and bytes from rank to rank
    """
    rows = []
    for case, bad, found in zip(cases, map(sum, zip(*wrong)), counted):
        messages, n_bytes = ([sum(row) for row in rows] for rows in found)
        expected = case.predicted
        totals = zip((sum(expected.messages_sent), sum(expected.bytes_sent)), (messages, n_bytes))
        shown = [text for one, all_of_it in totals for text in (f"{one:,}", f"{sum(all_of_it):,}")]
        rows.append((case.name, bad, *shown))
        report.check(f"{case.name}: elements unlike plain computation", 0, bad)
        report.check(f"{case.name}: messages sent", list(expected.messages_sent), messages)
        report.check(f"{case.name}: bytes sent", list(expected.bytes_sent), n_bytes)
        report.check(f"{case.name}: links unlike the plan", 0, differing_links(found, expected))
    headers = ("algorithm", "wrong", "messages predicted", "counted", "bytes predicted", "counted")
    report.table("written with send and receive, all ranks together", headers, rows)


main = demo_command(
    program,
    number("--elements", click.IntRange(0, 2**26), 1003, "Of the tensor on each rank.",
           "num_elements"),
    number("--seed", click.IntRange(0, 2**63 - 1), 0, "Of the tensors."),
)  # fmt: skip

if __name__ == "__main__":
    main()
