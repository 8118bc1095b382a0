"""Networks that one dials: three all_reduces on a fast one and on a slow one.

    slimlab demo dialled_network --ranks 4 --backend threads
    slimlab demo dialled_network --ranks 64 --elements 6400
    mpirun -n 4 python -m slimlab.demos.dialled_network
    torchrun --nproc-per-node 4 -m slimlab.demos.dialled_network

A ring, a tree and recursive doubling. Every message takes alpha + beta n, as dialled: 1 ms and
100 MB/s on the fast network, 5 ms and 4 MB/s on the slow one. So which all_reduce is best is no
matter of taste: short tensors want few steps, long ones few bytes, and where the one turns into the
other depends on the network.

On threads time is computed, and the seconds must equal slimlab.plan to the last digit where the
model is exact; where it is an upper bound, they must keep to it. On processes messages are really
held back: no all_reduce may be faster than the model, and it must not be much slower, in the best
of several runs. How much slower the machine's own sending and waking up makes it, is shown.

Production has no dial; people use tc netem on a host of their own, or simulators such as SimGrid.
"""

import os
from collections.abc import Callable
from math import inf
from typing import NamedTuple

import click
import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.collectives import (
    binomial_broadcast,
    binomial_reduce,
    recursive_doubling_all_reduce,
    ring_all_reduce,
)
from slimlab.comm.links import Network
from slimlab.comm.network import DialledCommunicator
from slimlab.comm.trace import TracedCommunicator
from slimlab.demos.common import demo_command, number
from slimlab.demos.measure import count_links, flat, from_all_ranks, inputs_of, num_wrong
from slimlab.demos.report import Report, report_of, size_text, time_text
from slimlab.plan.messages import Link, alpha_beta_s, messages_of

ITEM_BYTES = 4
SHORT = 64
# All of alpha is overhead, so that steps follow each other as in the model.
NETWORKS = {
    "fast": Network(0.0, 1e8, overhead_s=1e-3),
    "slow": Network(0.0, 4e6, overhead_s=5e-3),
}
# Sleeping ranks wake up late, the more so where several share a core: so much for each step.
WAKE_UP_S = 3e-3
# The clocks of processes are aligned to a fraction of a round trip.
CLOCKS_S = 5e-4
ROUNDING = 1e-9


def tree_all_reduce(comm: Communicator, tensor: Tensor) -> Tensor:
    """Combine the tensors of all ranks on a tree and hand the sum out on the same tree.

    comm     a communicator
    tensor   this rank's part of the sum; same shape and dtype on every rank
    returns  the sum, the same on every rank

    Communicates: one binomial_reduce and one binomial_broadcast.
    """
    total = binomial_reduce(comm, tensor)
    return binomial_broadcast(comm, torch.empty_like(tensor) if total is None else total)


# By name, with the collectives that the plan knows it as.
ALGORITHMS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "ring": (ring_all_reduce, ("ring_all_reduce",)),
    "tree": (tree_all_reduce, ("binomial_reduce", "binomial_broadcast")),
    "recursive doubling": (recursive_doubling_all_reduce, ("recursive_doubling_all_reduce",)),
}


class Run(NamedTuple):
    """One all_reduce on one network, as all ranks know it.

    clock_s  from the first rank's call to the last rank's end, by the network's clock
    wrong    elements unlike the plain sum, on all ranks
    sent     messages and bytes of all ranks
    """

    clock_s: float
    wrong: int
    sent: tuple[int, int]


def program(comm: Communicator, num_elements: int, seed: int, repeats: int, slack: float) -> Report:
    """Run three all_reduces of two lengths on two networks, and compare their seconds.

    comm          the communicator of all ranks
    num_elements  of the longer float32 tensor on each rank
    seed          of the tensors
    repeats       on processes, runs at most until one keeps to the band; the quickest counts
    slack         on processes, how much slower than the model it may be: 0.5 is half
    returns       the report, the same on every rank

    Communicates: the all_reduces, and what the ranks tell each other about them.
    """
    report = report_of("dialled_network", comm)
    virtual = comm.backend == "threads"
    for length in sorted({min(SHORT, num_elements), num_elements}):
        inputs, rows = inputs_of(comm, length, seed), []
        for name, network in NETWORKS.items():
            results = {}
            for algorithm, (function, planned) in ALGORITHMS.items():
                what = f"{algorithm}, {size_text(length * ITEM_BYTES)}, {name} network"
                predicted_s = predict_s(planned, comm.world_size, length, network)
                band = band_of(predicted_s, planned, comm.world_size, None if virtual else slack)
                best_s = inf
                for _ in range(repeats):
                    run = run_once(comm, network, function, inputs)
                    best_s = min(best_s, run.clock_s)
                    if best_s <= band[1]:
                        break
                check_run(report, what, run, planned, length)
                agrees = band[0] <= best_s <= band[1]
                report.check(f"{what}: seconds", predicted_s, best_s, agrees)
                results[algorithm] = predicted_s, best_s
            rows += rows_of(name, results)
        title = f"all_reduce of {size_text(length * ITEM_BYTES)}, seconds by the network's clock"
        headers = ("network", "algorithm", "predicted", "measured", "measured / predicted", "")
        report.table(title, headers, rows)
    clock = "computed" if virtual else "measured"
    report.numbers |= {"num_elements": num_elements, "clock": clock}
    return report


def run_once(comm: Communicator, network: Network, function: Callable, inputs: list[Tensor]) -> Run:
    """Run one all_reduce on a network whose clocks begin at 0.

    comm      the communicator of all ranks
    network   to dial
    function  the all_reduce
    inputs    the tensors of all ranks

    Communicates: what the function does, and two all_gathers of what was measured.
    """
    dialled = DialledCommunicator(comm, network)
    traced = TracedCommunicator(dialled)
    comm.barrier()
    begin_s = dialled.clock_s
    total = function(traced, inputs[comm.rank])
    end_s = dialled.clock_s
    wrong = num_wrong(total, sum(inputs))
    begins, ends, wrongs = zip(*from_all_ranks(comm, [begin_s, end_s, float(wrong)]))
    messages, n_bytes = count_links(comm, traced.events)
    sent = sum(flat(messages)), sum(flat(n_bytes))
    return Run(max(ends) - min(begins), int(sum(wrongs)), sent)


def predict_s(planned: tuple[str, ...], world_size: int, length: int, network: Network) -> float:
    """Predict the seconds of collectives that follow each other.

    planned     their names in slimlab.plan.messages
    world_size  number of ranks
    length      of the tensor, in elements
    network     all links alike
    """
    link = Link(network.latency_s + network.overhead_s, 1 / network.bytes_per_s)
    return sum(alpha_beta_s(name, world_size, length, ITEM_BYTES, link) for name in planned)


def band_of(
    predicted_s: float, planned: tuple[str, ...], world_size: int, slack: float | None
) -> tuple[float, float]:
    """Return the least and the most seconds that fit a prediction.

    predicted_s  by the model
    planned      names of the collectives
    world_size   number of ranks
    slack        how much slower processes may be; None: the clock is computed
    """
    powers = world_size & (world_size - 1) == 0
    # Else ranks that are ready sooner begin sooner, and the model is an upper bound.
    low_s = predicted_s if powers or planned == ("ring_all_reduce",) else 0.0
    if slack is None:
        return low_s * (1 - ROUNDING), predicted_s * (1 + ROUNDING)
    steps = sum(messages_of(name, world_size, 1, ITEM_BYTES).num_steps for name in planned)
    crowd = max(1.0, world_size / (os.cpu_count() or 1))
    high_s = predicted_s * (1 + slack) + steps * WAKE_UP_S * crowd
    return low_s - CLOCKS_S, high_s if steps else inf


def check_run(report: Report, what: str, run: Run, planned: tuple[str, ...], length: int) -> None:
    """Compare the sum, messages and bytes of a run with plain computation and the plan.

    report   takes the checks
    what     was run
    run      what came of it
    planned  names of the collectives
    length   of the tensor, in elements
    """
    plans = [messages_of(name, report.world_size, length, ITEM_BYTES) for name in planned]
    report.check(f"{what}: elements unlike the plain sum", 0, run.wrong)
    predicted = sum(sum(plan.messages_sent) for plan in plans)
    report.check(f"{what}: messages of all ranks", predicted, run.sent[0])
    predicted = sum(sum(plan.bytes_sent) for plan in plans)
    report.check(f"{what}: bytes of all ranks", predicted, run.sent[1])


def rows_of(network: str, results: dict[str, tuple[float, float]]) -> list[tuple]:
    """Make the rows of one network, and mark the fastest algorithm.

    network  its name
    results  algorithm -> predicted and measured seconds
    """
    best = [min(seconds) for seconds in zip(*results.values())]
    rows = []
    for algorithm, (predicted_s, found_s) in results.items():
        share = f"{found_s / predicted_s:.3f}" if predicted_s else ""
        marks = [
            word
            for word, one, least in zip(("predicted", "found"), (predicted_s, found_s), best)
            if one == least
        ]
        mark = f"fastest, {' and '.join(marks)}" if marks and best[0] else ""
        rows.append((network, algorithm, time_text(predicted_s), time_text(found_s), share, mark))
    return rows


main = demo_command(
    program,
    number("--elements", click.IntRange(1, 2**26), 100_000, "Of the longer tensor on each rank.",
           "num_elements"),
    number("--repeats", click.IntRange(1, 1000), 10, "On processes: runs at most."),
    number("--slack", click.FloatRange(0), 0.5, "On processes: so much slower may it be."),
    number("--seed", click.IntRange(0, 2**63 - 1), 0, "Of the tensors."),
)  # fmt: skip

if __name__ == "__main__":
    main()
