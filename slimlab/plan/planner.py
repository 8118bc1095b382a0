"""Search: every legal layout of a model on a cluster, those that fit the memory sorted by time.

Chapter 11 asks it for layouts that were published, and `slimlab plan` for any. A layout is legal if
all sizes divide (slimlab.plan.layout_search); it fits if the fullest stage's bytes do
(layout_memory); it is as good as its step is short (step_time).

Narayanan et al. 2021 (arXiv:2104.04473), section 3, has the rules of thumb that the search should
find by itself: tensor parallelism up to the size of a host, then pipelines, then replicas.
Production searches over uneven stages, offloading and several kinds of host as well.
"""

from dataclasses import dataclass

from slimlab.config import InputError, ModelConfig, check_size
from slimlab.plan.hardware import Cluster, Constants
from slimlab.plan.layout_memory import rank_bytes
from slimlab.plan.layout_search import Choices, Refused, Search
from slimlab.plan.parallel_config import ParallelConfig, check_parallel
from slimlab.plan.software import Software
from slimlab.plan.step_time import StepTime, step_time

__all__ = ["Candidate", "Choices", "Plan", "Refused", "look_at", "plan_layouts"]


@dataclass(frozen=True)
class Candidate:
    """A layout that was looked at.

    parallel  the layout
    items     bytes of a rank of the fullest stage, by kind
    time      of a step; None if it does not fit the memory
    """

    parallel: ParallelConfig
    items: dict[str, float]
    time: StepTime | None = None

    @property
    def memory_bytes(self) -> float:
        """Bytes of a rank of the fullest stage."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Plan:
    """What a search found.

    best          layouts that fit, the fastest first
    refused       why others are not among them, the most frequent reason first
    smallest      the layout of least memory, whether it fits or not
    limit_bytes   that tensors may fill on a GPU
    num_layouts   that were looked at
    """

    best: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    smallest: Candidate
    limit_bytes: float
    num_layouts: int


def plan_layouts(
    config: ModelConfig,
    cluster: Cluster,
    num_gpus: int,
    batch_size: int,
    *,
    software: Software | None = None,
    constants: Constants | None = None,
    choices: Choices | None = None,
) -> Plan:
    """Look at every layout that the choices allow, and sort those that fit.

    config      a decoder
    cluster     of which GPUs
    num_gpus    how many, all of which are used
    batch_size  sequences of a step
    software    what the program does to save time, Software() if not given
    constants   Constants() if not given
    choices     Choices() if not given: everything
    returns     the layouts that fit, the fastest first, and why the others do not

    Raises InputError if no layout is legal, or none fits: it names the layout of least memory and
    how many GPUs would do.
    """
    software, constants = software or Software(), constants or Constants()
    check_parallel(config, ParallelConfig(), 1)  # a decoder
    check_size("num_gpus", num_gpus)
    check_size("batch_size", batch_size)
    search = Search(config, cluster, num_gpus, batch_size, software, choices or Choices())
    limit = cluster.gpu.memory_bytes * constants.memory_share
    found, smallest = [], None
    for parallel, items in search.candidates():
        one = Candidate(parallel, items)
        if smallest is None or one.memory_bytes < smallest.memory_bytes:
            smallest = one
        if one.memory_bytes > limit:
            reason = f"more memory than {limit / 1e9:.1f} GB"
            search.refuse(reason, f"{one.parallel}: {one.memory_bytes / 1e9:.1f} GB")
            continue
        given = {"software": software, "constants": constants}
        time = step_time(config, cluster, one.parallel, batch_size, **given)
        found.append(Candidate(one.parallel, one.items, time))
    if smallest is None:
        _refuse_sizes(search)
    if not found:
        _refuse_all(search, smallest, limit)
    found.sort(key=lambda one: one.time.total_s)
    refused = sorted(search.refused.values(), key=lambda one: -one.count)
    return Plan(tuple(found), tuple(refused), smallest, limit, search.num_layouts)


def look_at(
    config: ModelConfig,
    cluster: Cluster,
    parallel: ParallelConfig,
    batch_size: int,
    *,
    software: Software | None = None,
    constants: Constants | None = None,
) -> Candidate:
    """Predict memory and time of one layout, whether it fits or not.

    config, cluster, parallel, batch_size, software, constants  as in step_time
    returns                                                     the layout with both

    Raises InputError for a layout that cannot be.
    """
    given = {"software": software, "constants": constants}
    time = step_time(config, cluster, parallel, batch_size, **given)
    return Candidate(parallel, rank_bytes(config, parallel, batch_size, software), time)


def _refuse_sizes(search: Search) -> None:
    """Say that no layout is legal, and what each reason would let pass."""
    reasons = search.refused.values()
    changes = [one.change for one in reasons if one.change]
    raise InputError(
        f"a layout of {search.num_gpus} GPUs and a batch of {search.batch_size} sequences",
        "; ".join(f"{one.reason} ({one.example})" for one in reasons),
        "; or ".join(changes) or "pin fewer sizes",
    )


def _refuse_all(search: Search, smallest: Candidate, limit: float) -> None:
    """Say that no layout fits, what the smallest needs, and how many GPUs would do."""
    change = "take hardware with more memory, or a smaller model"
    for factor in (2, 4, 8, 16, 32, 64):
        number = search.num_gpus * factor
        wider = Search(
            search.config, search.cluster, number, search.batch_size, search.software,
            search.choices,
        )  # fmt: skip
        if any(sum(items.values()) <= limit for _, items in wider.candidates()):
            change = f"take num_gpus={number}, or hardware with more memory"
            break
    name = search.cluster.gpu.name
    raise InputError(
        f"a layout that fits {limit / 1e9:.1f} GB, what tensors may fill of one {name}",
        f"{search.num_gpus} GPU{'s' * (search.num_gpus > 1)}; the smallest layout needs "
        f"{smallest.memory_bytes / 1e9:.1f} GB: {smallest.parallel}",
        change,
    )
