"""What the demos measure with: the same inputs on every rank, counts per link, seconds.

Programs of chapter 07 do these things in their own cells. Production benchmarks warm up longer,
bind ranks to cores, and repeat until the spread is small.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.events import Event, link_matrix
from slimlab.comm.timings import settle
from slimlab.demos.report import time_text
from slimlab.plan.messages import Traffic


def inputs_of(comm: Communicator, num_elements: int, seed: int) -> list[Tensor]:
    """Make the tensors of all ranks, the same on every rank: each can work out what must come out.

    They hold small whole numbers, whose float32 sums are exact in any order.

    comm          the communicator of all ranks
    num_elements  of each tensor
    seed          of the draw
    returns       one float32 tensor of shape (num_elements,) per rank
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (comm.world_size, num_elements)
    drawn = torch.randint(-8, 9, shape, generator=generator, dtype=torch.int8)
    return list(drawn.float().to(comm.device))


def num_wrong(found: Tensor | None, expected: Tensor | None) -> int:
    """Count the elements that differ; all of them count where the shapes do.

    found     what a collective returned
    expected  what one process computes; None: nothing was to be returned
    """
    if found is None or expected is None:
        return 0 if found is expected else 1
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return max(found.numel(), expected.numel(), 1)
    return int((found != expected).sum())


def from_all_ranks(comm: Communicator, numbers: Sequence[float]) -> list[list[float]]:
    """Bring numbers of all ranks together.

    comm     the communicator of all ranks
    numbers  of this rank, as many as on the others; all whole or all not
    returns  one list per rank, the same on every rank

    Communicates: one all_gather.
    """
    whole = all(isinstance(one, int) for one in numbers)
    own = torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64, device=comm.device)
    return comm.all_gather(own).view(comm.world_size, -1).tolist()


def count_links(comm: Communicator, events: Iterable[Event]) -> tuple[list, list]:
    """Add up the messages and bytes from rank to rank that traced communicators wrote down.

    comm     the communicator of all ranks, without a trace
    events   of this rank
    returns  messages and bytes, each a list of one row per rank that sends; the same on every rank

    Communicates: one all_gather.
    """
    events, w = list(events), comm.world_size
    own = [link_matrix(events, w, counted)[comm.rank] for counted in ("messages", "bytes")]
    rows = from_all_ranks(comm, torch.cat(own).tolist())
    return [row[:w] for row in rows], [row[w:] for row in rows]


def differing_links(counted: tuple[list, list], predicted: Traffic) -> int:
    """Count the links that carried other messages or bytes than predicted.

    counted    what count_links returned
    predicted  by slimlab.plan.messages
    """
    expected = [list(map(list, one)) for one in (predicted.messages, predicted.n_bytes)]
    links = [zip(*map(flat, pair)) for pair in zip(counted, expected)]
    return sum(any(a != b for a, b in both) for both in zip(*links))


def flat(rows: Iterable[Iterable[int]]) -> list[int]:
    """Put the rows of a matrix one behind the other.

    rows  of numbers
    """
    return [value for row in rows for value in row]


def take_turns(
    comm: Communicator, actions: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Time several actions, one after the other and again, from a barrier to the last rank's end.

    In turns, since a machine is faster in one second than in the next.

    comm     the communicator of all ranks
    actions  by name, the same on every rank
    repeats  how often each is timed; once more before, which is not
    returns  name -> seconds of each time, of the slowest rank

    Communicates: barriers, what the actions do, and one all_gather.
    """
    taken = []
    for _ in range(repeats + 1):
        for action in actions.values():
            comm.barrier()
            begin_s = perf_counter()
            action()
            settle(comm)
            taken.append(perf_counter() - begin_s)
    slowest = [max(column) for column in zip(*from_all_ranks(comm, taken))]
    return {
        name: slowest[len(actions) + place :: len(actions)] for place, name in enumerate(actions)
    }


def spread_text(seconds: Sequence[float]) -> str:
    """Write the median of some seconds, and between which the middle half of them lies.

    seconds  at least one
    """
    if len(seconds) == 1:
        return time_text(seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{time_text(median)} ({time_text(low)} to {time_text(high)})"


def texts_of_all(comm: Communicator, text: str) -> list[str]:
    """Bring a text of every rank together.

    comm     the communicator of all ranks
    text     of this rank
    returns  the texts in rank order, the same on every rank

    Communicates: two all_gathers.
    """
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(comm.device)
    sizes = flat(from_all_ranks(comm, [len(own)]))
    parts = comm.all_gather(own, sizes=sizes).cpu().split(sizes)
    return [bytes(part.tolist()).decode() for part in parts]
