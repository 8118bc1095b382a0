"""The steps of each collective: how many, and which share of the tensor a message of them carries.

slimlab.plan.alpha_beta makes seconds of them, slimlab.plan.messages the traffic between ranks. They
are written from the mathematics of each algorithm and never look at the code that they predict.
Chapter 07 draws the steps. Real networks do not keep step: a late rank makes its neighbours late.

Thakur, Rabenseifner and Gropp 2005 (Int. J. High Perform. Comput. Appl. 19) has this table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from slimlab.config import check_choice, check_size, require


@dataclass(frozen=True)
class Phase:
    """Steps of a collective that are alike.

    num_steps  how many, one after the other
    share      of the tensor that the largest message carries
    combines   what arrives is added to what is there
    in_host    the messages stay inside a host
    """

    num_steps: int
    share: Fraction
    combines: bool = False
    in_host: bool = False

    def largest_message(self, num_elements: int) -> int:
        """Return the elements of its largest message; parts differ by at most one element.

        num_elements  of the tensor
        """
        return ceil(num_elements * self.share)


def phases_of(algorithm: str, world_size: int, *, ranks_per_host: int | None = None) -> list[Phase]:
    """List the phases of a collective of slimlab.comm.collectives.

    algorithm       its name, a key of PHASES
    world_size      w, number of ranks
    ranks_per_host  of two_level_all_reduce; the others do not read it

    Raises InputError for an unknown name, or sizes that do not fit.
    """
    check_choice("algorithm", algorithm, tuple(PHASES))
    check_size("world_size", world_size)
    if algorithm == "two_level_all_reduce":
        check_ranks_per_host(ranks_per_host, world_size)
    phases = PHASES[algorithm](world_size, ranks_per_host)
    return [phase for phase in phases if phase.num_steps]


def num_doublings(world_size: int) -> int:
    """Return how often 1 must be doubled to reach a number of ranks: log2 w, rounded up.

    world_size  w
    """
    return (world_size - 1).bit_length()


def check_ranks_per_host(ranks_per_host: object, world_size: int) -> None:
    """Refuse a number of ranks per host that is missing or does not fit.

    ranks_per_host  from 1 to world_size
    world_size      number of ranks

    Raises InputError.
    """
    whole = isinstance(ranks_per_host, int) and not isinstance(ranks_per_host, bool)
    require(
        whole and 1 <= ranks_per_host <= world_size,
        f"ranks_per_host, a whole number from 1 to {world_size}",
        f"ranks_per_host = {ranks_per_host!r}",
        "two_level_all_reduce needs it; give the number that the program is given",
    )


def _ring_all_reduce(world_size: int, ranks_per_host: int | None) -> list[Phase]:
    share = Fraction(1, world_size)
    return [Phase(world_size - 1, share, combines=True), Phase(world_size - 1, share)]


def _recursive_doubling(world_size: int, ranks_per_host: int | None) -> list[Phase]:
    core, folded = _core(world_size)
    doubling = Phase(core.bit_length() - 1, Fraction(1), combines=True)
    return [Phase(folded, Fraction(1), combines=True), doubling, Phase(folded, Fraction(1))]


def _rabenseifner(world_size: int, ranks_per_host: int | None) -> list[Phase]:
    core, folded = _core(world_size)
    shares = [Fraction(1 << bit, core) for bit in range(core.bit_length() - 1)]
    return [
        Phase(folded, Fraction(1), combines=True),
        *(Phase(1, share, combines=True) for share in reversed(shares)),
        *(Phase(1, share) for share in shares),
        Phase(folded, Fraction(1)),
    ]


def _two_level(world_size: int, ranks_per_host: int) -> list[Phase]:
    num_hosts, left_over = divmod(world_size, ranks_per_host)
    folded = int(left_over > 0)
    near, far = Fraction(1, ranks_per_host), Fraction(1, ranks_per_host * num_hosts)
    return [
        Phase(folded, Fraction(1), combines=True),
        Phase(ranks_per_host - 1, near, combines=True, in_host=True),
        Phase(num_hosts - 1, far, combines=True),
        Phase(num_hosts - 1, far),
        Phase(ranks_per_host - 1, near, in_host=True),
        Phase(folded, Fraction(1)),
    ]


def _scatter_ring(world_size: int, ranks_per_host: int | None) -> list[Phase]:
    rounds = num_doublings(world_size)
    # The root's first message is for the ranks beyond the largest power of two below w.
    parts = [min(1 << bit, world_size - (1 << bit)) for bit in range(rounds)]
    scatter = [Phase(1, Fraction(count, world_size)) for count in reversed(parts)]
    return [*scatter, Phase(world_size - 1, Fraction(1, world_size))]


def _core(world_size: int) -> tuple[int, int]:
    """Return the largest power of two of ranks, and 1 if there are more, else 0."""
    core = 1 << (world_size.bit_length() - 1)
    return core, int(core < world_size)


PHASES: dict[str, Callable[[int, int | None], list[Phase]]] = {
    "ring_all_reduce": _ring_all_reduce,
    "ring_reduce_scatter": lambda w, _: [Phase(w - 1, Fraction(1, w), combines=True)],
    "ring_all_gather": lambda w, _: [Phase(w - 1, Fraction(1, w))],
    "recursive_doubling_all_reduce": _recursive_doubling,
    "rabenseifner_all_reduce": _rabenseifner,
    "two_level_all_reduce": _two_level,
    "binomial_broadcast": lambda w, _: [Phase(num_doublings(w), Fraction(1))],
    "binomial_reduce": lambda w, _: [Phase(num_doublings(w), Fraction(1), combines=True)],
    "scatter_ring_broadcast": _scatter_ring,
    "pairwise_all_to_all": lambda w, _: [Phase(w - 1, Fraction(1, w))],
}
