"""How long a collective takes: alpha per message, beta per byte, gamma per byte that is combined.

A step, in which every rank sends at most one message and receives at most one, takes
alpha + beta * bytes. Steps follow each other, so an algorithm is a list of phases: how many steps,
and which share of the tensor a message carries. Chapter 07 predicts with it which algorithm is
fastest, and at which length another takes over. slimlab.plan.messages counts the messages.

Hockney 1994 (Parallel Computing 20) for alpha and beta; Thakur, Rabenseifner and Gropp 2005 for
the terms of each algorithm. What real networks add: links shared by several messages, a processor
that is busy while it sends, other programs, and messages too long for a buffer, which wait for the
receiver first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import inf

from slimlab.config import check_number, check_size
from slimlab.plan.phases import Phase, num_doublings, phases_of


@dataclass(frozen=True)
class Link:
    """What a message costs between two ranks: alpha_s + beta_s_per_byte * bytes.

    alpha_s          seconds per message, however short
    beta_s_per_byte  seconds per byte, one over the bandwidth

    Raises InputError for negative numbers.
    """

    alpha_s: float
    beta_s_per_byte: float

    def __post_init__(self):
        check_number("alpha_s", self.alpha_s, float, 0.0, inf)
        check_number("beta_s_per_byte", self.beta_s_per_byte, float, 0.0, inf)

    def message_s(self, n_bytes: float) -> float:
        """Return the seconds that one message takes.

        n_bytes  its payload
        """
        return self.alpha_s + self.beta_s_per_byte * n_bytes


@dataclass(frozen=True)
class Cost:
    """The terms of an algorithm's time for a tensor of n bytes that all its parts divide.

    Its seconds are alphas alpha + betas beta n + gammas gamma n, and for messages that stay inside
    a host, with its own alpha and beta, host_alphas alpha + host_betas beta n.

    alphas       steps, one message after the other
    betas        how many times n is sent one after the other
    gammas       how many times n is combined one after the other
    host_alphas  steps inside a host
    host_betas   how many times n is sent inside a host
    """

    alphas: int
    betas: Fraction
    gammas: Fraction
    host_alphas: int = 0
    host_betas: Fraction = Fraction(0)


def cost_of(algorithm: str, world_size: int, *, ranks_per_host: int | None = None) -> Cost:
    """Add up the phases of a collective, for a tensor that all its parts divide.

    algorithm, world_size, ranks_per_host  as in phases_of

    Raises InputError as phases_of does.
    """
    phases = phases_of(algorithm, world_size, ranks_per_host=ranks_per_host)

    def shares(chosen: Sequence[Phase]) -> Fraction:
        return sum((phase.num_steps * phase.share for phase in chosen), Fraction(0))

    far = [phase for phase in phases if not phase.in_host]
    near = [phase for phase in phases if phase.in_host]
    return Cost(
        alphas=sum(phase.num_steps for phase in far),
        betas=shares(far),
        gammas=shares([phase for phase in phases if phase.combines]),
        host_alphas=sum(phase.num_steps for phase in near),
        host_betas=shares(near),
    )


def alpha_beta_s(
    algorithm: str,
    world_size: int,
    num_elements: int,
    item_bytes: int,
    link: Link,
    *,
    gamma_s_per_byte: float = 0.0,
    ranks_per_host: int | None = None,
    host_link: Link | None = None,
) -> float:
    """Predict the seconds of a collective, from its call to the end on the last rank.

    All ranks are taken to keep step: each step lasts as long as its largest message. That is exact
    for ring_all_reduce and Rabenseifner's, and for the others with equal parts on a power of two of
    ranks. Else a rank that is ready sooner begins sooner, and this is an upper bound.

    algorithm         a key of slimlab.plan.phases.PHASES
    world_size        number of ranks
    num_elements      of the tensor; for ring_all_gather of the whole that it makes
    item_bytes        bytes per element
    link              between any two ranks
    gamma_s_per_byte  seconds to combine one byte that arrived with one that is there
    ranks_per_host    of two_level_all_reduce; the others do not read it
    host_link         between ranks of a host, for two_level_all_reduce; None: as link
    returns           seconds

    Raises InputError as phases_of does.
    """
    check_number("num_elements", num_elements, int, 0, inf)
    check_size("item_bytes", item_bytes)
    check_number("gamma_s_per_byte", gamma_s_per_byte, float, 0.0, inf)
    total_s = 0.0
    for phase in phases_of(algorithm, world_size, ranks_per_host=ranks_per_host):
        n_bytes = phase.largest_message(num_elements) * item_bytes
        used = host_link if phase.in_host and host_link is not None else link
        step_s = used.message_s(n_bytes) + (gamma_s_per_byte * n_bytes if phase.combines else 0.0)
        total_s += phase.num_steps * step_s
    return total_s


def crossover_bytes(
    first: str,
    second: str,
    world_size: int,
    link: Link,
    *,
    gamma_s_per_byte: float = 0.0,
    ranks_per_host: int | None = None,
    host_link: Link | None = None,
) -> float | None:
    """Find the payload at which two algorithms take equally long.

    Both times are straight lines over the payload n: latency + slope n. They meet at n = difference
    of the latencies / difference of the slopes. Below it the one with fewer messages is faster,
    above it the one that sends fewer bytes. Parts that do not come out even move the point by some
    elements.

    first, second  keys of slimlab.plan.phases.PHASES
    world_size     number of ranks
    link           between any two ranks
    gamma_s_per_byte, ranks_per_host, host_link  as in alpha_beta_s
    returns        bytes; None if one of them is never slower than the other

    Raises InputError as phases_of does.
    """
    lines = []
    for algorithm in (first, second):
        cost = cost_of(algorithm, world_size, ranks_per_host=ranks_per_host)
        near = link if host_link is None else host_link
        latency_s = cost.alphas * link.alpha_s + cost.host_alphas * near.alpha_s
        slope = cost.betas * link.beta_s_per_byte + cost.host_betas * near.beta_s_per_byte
        lines.append((latency_s, float(slope + cost.gammas * gamma_s_per_byte)))
    (first_s, first_slope), (second_s, second_slope) = lines
    if (second_s - first_s) * (first_slope - second_slope) <= 0:
        return None
    return (second_s - first_s) / (first_slope - second_slope)


def lower_bound_bytes(world_size: int, n_bytes: float) -> float:
    """Return how many bytes the busiest rank must send in any all_reduce: 2 (w - 1) / w n.

    Take one number of the tensor. Before the first rank knows its result, two ranks must know of
    all w contributions between them; getting there takes w - 2 messages, since a message joins no
    more than two groups of contributions. None of these gave a rank the result, so each of the w
    ranks must still get a message that does. Together 2 (w - 1) messages per number; the busiest
    of w ranks sends at least the average of all numbers. A ring meets the bound when its parts are
    equal. (Where switches or network cards add, it does not hold.)

    world_size  w
    n_bytes     n, of the tensor on each rank
    """
    check_size("world_size", world_size)
    return 2 * (world_size - 1) / world_size * n_bytes


def lower_bound_steps(world_size: int) -> int:
    """Return how many steps any all_reduce needs: log2 w, rounded up.

    In a step each rank hears of one other, so what it knows of can no more than double.

    world_size  w
    """
    check_size("world_size", world_size)
    return num_doublings(world_size)
