"""The collectives of the book, written with send and receive only.

They take a communicator first and then what the communicator's own method of that kind takes, and
use nothing of it but its rank, the number of ranks and its messages. So they run on every runtime,
in every group, and wherever a communicator is wrapped in another: traced, or in a network that
is slower than the machine's. Every message stands in the ledger; slimlab.plan.messages predicts
how many there are between which ranks, how many bytes they carry, and how long they take.

Chapter 07 derives each, draws its steps and says which to use when. What production libraries do
besides: choose by length and number of ranks, cut messages into slices so that one travels while
the one before is added, use several rings or trees at once, and know which ranks are near.
"""

from collections.abc import Callable
from types import MappingProxyType

from slimlab.comm.collectives_hosts import two_level_all_reduce
from slimlab.comm.collectives_pairwise import pairwise_all_to_all
from slimlab.comm.collectives_recursive import (
    rabenseifner_all_reduce,
    recursive_doubling_all_reduce,
)
from slimlab.comm.collectives_ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from slimlab.comm.collectives_tree import (
    binomial_broadcast,
    binomial_reduce,
    scatter_ring_broadcast,
)

__all__ = [
    "ALGORITHMS",
    "binomial_broadcast",
    "binomial_reduce",
    "pairwise_all_to_all",
    "rabenseifner_all_reduce",
    "recursive_doubling_all_reduce",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_reduce_scatter",
    "scatter_ring_broadcast",
    "two_level_all_reduce",
]

# By the names that slimlab.plan.messages predicts them under.
ALGORITHMS: MappingProxyType[str, Callable] = MappingProxyType({
    function.__name__: function
    for function in (
        ring_all_reduce,
        ring_reduce_scatter,
        ring_all_gather,
        recursive_doubling_all_reduce,
        rabenseifner_all_reduce,
        two_level_all_reduce,
        binomial_broadcast,
        binomial_reduce,
        scatter_ring_broadcast,
        pairwise_all_to_all,
    )
})  # fmt: skip
