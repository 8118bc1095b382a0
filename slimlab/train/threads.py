"""How many threads a small model should train with: asked of the machine, not assumed.

Two threads share a matrix product only if both can run. On two idle cores they make the model of
the book almost twice as fast; where another program holds a core, each product waits for the slower
thread, and the same two threads take several times as long as one. Chapter 05 trains with what is
found here.

Production binds each process to cores of its own (numactl, cgroups), so that the question does not
arise.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from slimlab.config import check_size, require

REPEATS = 3


@contextmanager
def fastest_threads(
    trial: Callable[[], object], candidates: Sequence[int] | None = None
) -> Iterator[int]:
    """Compute with as many threads as are fastest now; put the number back afterwards.

    trial       a short piece of the work to come, such as one training step on a throw-away model
    candidates  numbers of threads to try; if not given 1, 2 and 4, as far as there are processors
                and OMP_NUM_THREADS allows
    yields      the number chosen

    Results may differ in their last bits between numbers of threads, which add in another order.
    Raises InputError for candidates that are no whole numbers of at least 1, or none.
    """
    if candidates is None:
        most = min(num_processors(), _allowed_threads())
        candidates = [n for n in (1, 2, 4) if n <= most]
    require(len(candidates) > 0, "at least one candidate", "none", "leave candidates out")
    for number in candidates:
        check_size("candidates", number)
    before = torch.get_num_threads()
    try:
        chosen = candidates[0]
        if len(candidates) > 1:
            chosen = min(candidates, key=lambda number: _median_s(trial, number))
        torch.set_num_threads(chosen)
        yield chosen
    finally:
        torch.set_num_threads(before)


def num_processors() -> int:
    """Count the processors that this process may use, which a container or a scheduler limits."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _allowed_threads() -> int:
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return int(wished) if wished.isdecimal() and int(wished) > 0 else num_processors()


def _median_s(trial: Callable[[], object], num_threads: int) -> float:
    torch.set_num_threads(num_threads)
    trial()  # the first run starts threads and takes memory
    seconds = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        trial()
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)
