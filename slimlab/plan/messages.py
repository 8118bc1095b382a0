"""What each collective sends: messages and bytes between every two ranks, exactly.

Chapter 07 predicts with it, and compares with what the ledgers counted. The formulas follow from
the mathematics of each algorithm: which part must go from whom to whom. They read numbers only,
never the code of slimlab.comm.collectives. slimlab.plan.alpha_beta, whose names are passed on,
predicts seconds.

With w ranks a tensor of n elements is cut into w parts; part j goes from element n j // w on to
n (j + 1) // w. |j| is its length. Real libraries add headers, acknowledgements and, for long
messages, a question whether the receiver is ready; none of these is a payload.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from slimlab.config import check_choice, check_number, check_size, require
from slimlab.plan.alpha_beta import (
    Cost,
    Link,
    alpha_beta_s,
    cost_of,
    crossover_bytes,
    lower_bound_bytes,
    lower_bound_steps,
)
from slimlab.plan.phases import phases_of

__all__ = [
    "ALGORITHMS",
    "Cost",
    "Link",
    "Traffic",
    "alpha_beta_s",
    "cost_of",
    "crossover_bytes",
    "lower_bound_bytes",
    "lower_bound_steps",
    "messages_of",
    "phases_of",
]

# Source, destination, number of messages, elements in all of them.
Sent = Iterator[tuple[int, int, int, int]]


@dataclass(frozen=True)
class Traffic:
    """What crosses the links in one collective.

    messages   w rows of w numbers: messages[i][j] is how many rank i sends to rank j
    n_bytes    n_bytes[i][j]: the payload of these
    num_steps  steps that follow each other
    """

    messages: tuple[tuple[int, ...], ...]
    n_bytes: tuple[tuple[int, ...], ...]
    num_steps: int

    @property
    def messages_sent(self) -> tuple[int, ...]:
        """Messages that each rank sends."""
        return tuple(map(sum, self.messages))

    @property
    def bytes_sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends."""
        return tuple(map(sum, self.n_bytes))

    @property
    def messages_received(self) -> tuple[int, ...]:
        """Messages that each rank receives."""
        return tuple(map(sum, zip(*self.messages)))

    @property
    def bytes_received(self) -> tuple[int, ...]:
        """Bytes that each rank receives."""
        return tuple(map(sum, zip(*self.n_bytes)))

    def bytes_leaving_hosts(self, ranks_per_host: int) -> tuple[int, ...]:
        """Return the bytes that each host sends to others.

        ranks_per_host  ranks fill one host after the other; the last may not be full
        """
        check_size("ranks_per_host", ranks_per_host)
        leaving = [0] * -(-len(self.n_bytes) // ranks_per_host)
        for src, row in enumerate(self.n_bytes):
            for dst, n_bytes in enumerate(row):
                if src // ranks_per_host != dst // ranks_per_host:
                    leaving[src // ranks_per_host] += n_bytes
        return tuple(leaving)


@dataclass(frozen=True)
class _Given:
    """What a formula reads: w, n, the bounds of w parts, and options of some collectives."""

    world_size: int
    num_elements: int
    bounds: tuple[int, ...]
    root: int
    ranks_per_host: int | None


def messages_of(
    algorithm: str,
    world_size: int,
    num_elements: int,
    item_bytes: int,
    *,
    root: int = 0,
    ranks_per_host: int | None = None,
    sizes: Sequence[int] | None = None,
) -> Traffic:
    """Predict what a collective of slimlab.comm.collectives sends, exactly.

    algorithm       its name, one of ALGORITHMS
    world_size      w, number of ranks
    num_elements    n of the tensor on each rank; for ring_all_gather of the whole that it makes
    item_bytes      bytes per element
    root            src or dst of the collectives that have one; the others do not read it
    ranks_per_host  of two_level_all_reduce; the others do not read it
    sizes           elements of each rank's part, for ring_reduce_scatter and ring_all_gather only;
                    None: parts that differ by at most one element
    returns         messages and bytes from each rank to each, and the steps

    Raises InputError for an unknown name, or numbers that do not fit.
    """
    phases = phases_of(algorithm, world_size, ranks_per_host=ranks_per_host)
    check_number("num_elements", num_elements, int, 0, inf)
    check_size("item_bytes", item_bytes)
    check_number("root", root, int, 0, world_size - 1)
    bounds = _bounds(num_elements, world_size)
    if sizes is not None:
        check_choice("algorithm with sizes", algorithm, ("ring_reduce_scatter", "ring_all_gather"))
        bounds = tuple(accumulate(sizes, initial=0))
        require(
            len(sizes) == world_size and bounds[-1] == num_elements and min(sizes) >= 0,
            f"sizes of {world_size} parts, together {num_elements} elements",
            f"sizes = {list(sizes)}",
            "give one number per rank, in rank order, that add up to num_elements",
        )
    given = _Given(world_size, num_elements, bounds, root, ranks_per_host)
    messages = [[0] * world_size for _ in range(world_size)]
    n_bytes = [[0] * world_size for _ in range(world_size)]
    for src, dst, count, elements in _FORMULAS[algorithm](given):
        messages[src][dst] += count
        n_bytes[src][dst] += elements * item_bytes
    num_steps = sum(phase.num_steps for phase in phases)
    return Traffic(tuple(map(tuple, messages)), tuple(map(tuple, n_bytes)), num_steps)


def _bounds(num_elements: int, num_parts: int) -> tuple[int, ...]:
    return tuple(num_elements * part // num_parts for part in range(num_parts + 1))


def _ring(
    ring: Sequence[int], bounds: Sequence[int], reduces: bool = True, gathers: bool = True
) -> Sent:
    """Messages from each rank of a ring to the next.

    Part j travels from place j + 1 round to place j while it is summed: it crosses every link but
    the one out of place j. Then it travels from j to j - 1: every link but the one into place j.
    """
    size = len(ring)
    for place in range(size if size > 1 else 0):
        right = (place + 1) % size
        elements = 0
        if reduces:
            elements += bounds[-1] - (bounds[place + 1] - bounds[place])
        if gathers:
            elements += bounds[-1] - (bounds[right + 1] - bounds[right])
        yield ring[place], ring[right], (size - 1) * (reduces + gathers), elements


def _folded(core: int, world_size: int, num_elements: int) -> Sent:
    """Every rank beyond core gives its tensor to the one core below it, and gets the result."""
    for rank in range(core, world_size):
        yield rank, rank - core, 1, num_elements
        yield rank - core, rank, 1, num_elements


def _recursive_doubling(given: _Given) -> Sent:
    """A power of two of ranks: the whole tensor to each rank whose number differs in one bit."""
    core = 1 << (given.world_size.bit_length() - 1)
    yield from _folded(core, given.world_size, given.num_elements)
    for rank in range(core):
        for bit in range(core.bit_length() - 1):
            yield rank, rank ^ (1 << bit), 1, given.num_elements


def _rabenseifner(given: _Given) -> Sent:
    """As recursive doubling in pairs, with other lengths.

    At distance d a rank works on an aligned block of d parts. Halving, it sends its partner's
    block, doubling, its own: together the aligned block of 2 d parts that holds both.
    """
    core = 1 << (given.world_size.bit_length() - 1)
    bounds = _bounds(given.num_elements, core)
    yield from _folded(core, given.world_size, given.num_elements)
    for rank in range(core):
        for distance in (1 << bit for bit in range(core.bit_length() - 1)):
            first = rank - rank % (2 * distance)
            elements = bounds[first + 2 * distance] - bounds[first]
            yield rank, rank ^ distance, 2, elements


def _two_level(given: _Given) -> Sent:
    """Rings in every host, rings through all hosts at each place, and a last host's odd ranks."""
    per_host = given.ranks_per_host
    core = given.world_size - given.world_size % per_host
    bounds = _bounds(given.num_elements, per_host)
    yield from _folded(core, given.world_size, given.num_elements)
    for first in range(0, core, per_host):
        yield from _ring(range(first, first + per_host), bounds)
    for place in range(per_host):
        pieces = _bounds(bounds[place + 1] - bounds[place], core // per_host)
        yield from _ring(range(place, core, per_host), pieces)


def _tree(given: _Given, down: bool) -> Sent:
    """Counted from the root, a rank's parent is its number without the highest bit."""
    for place in range(1, given.world_size):
        parent = place - (1 << (place.bit_length() - 1))
        ranks = [(one + given.root) % given.world_size for one in (parent, place)]
        src, dst = ranks if down else reversed(ranks)
        yield src, dst, 1, given.num_elements


def _scatter_ring(given: _Given) -> Sent:
    """A halving scatter, then a ring; places are counted from the root.

    Place v gets its block from v without its lowest bit d, and the block holds the parts of the d
    places from v on, as far as there are any.
    """
    w, bounds = given.world_size, given.bounds
    ring = [(place + given.root) % w for place in range(w)]
    for place in range(1, w):
        lowest = place & -place
        elements = bounds[min(place + lowest, w)] - bounds[place]
        yield ring[place - lowest], ring[place], 1, elements
    yield from _ring(ring, bounds, reduces=False)


def _pairwise(given: _Given) -> Sent:
    """Part j of every rank to rank j."""
    for src in range(given.world_size):
        for dst in range(given.world_size):
            if src != dst:
                yield src, dst, 1, given.bounds[dst + 1] - given.bounds[dst]


_FORMULAS: dict[str, Callable[[_Given], Sent]] = {
    "ring_all_reduce": lambda given: _ring(range(given.world_size), given.bounds),
    "ring_reduce_scatter": lambda given: _ring(
        range(given.world_size), given.bounds, gathers=False
    ),
    "ring_all_gather": lambda given: _ring(range(given.world_size), given.bounds, reduces=False),
    "recursive_doubling_all_reduce": _recursive_doubling,
    "rabenseifner_all_reduce": _rabenseifner,
    "two_level_all_reduce": _two_level,
    "binomial_broadcast": lambda given: _tree(given, down=True),
    "binomial_reduce": lambda given: _tree(given, down=False),
    "scatter_ring_broadcast": _scatter_ring,
    "pairwise_all_to_all": _pairwise,
}
ALGORITHMS = tuple(_FORMULAS)
