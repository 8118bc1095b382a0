"""A sum over all ranks on a ring: bytes predicted and counted, seconds measured.

    slimlab demo ring_all_reduce --ranks 4 --backend threads
    python -m slimlab.demos.ring_all_reduce --ranks 2 --backend mpi --json
    mpirun -n 4 python -m slimlab.demos.ring_all_reduce
    torchrun --nproc-per-node 4 -m slimlab.demos.ring_all_reduce --elements 4000000

Each rank sends 2 (w - 1) messages to its right neighbour, together 2 (w - 1) / w of the tensor: as
few bytes as any all_reduce can do with (slimlab.plan.alpha_beta.lower_bound_bytes). Then the sum is
compared with the one that a single process computes, and timed in turns with the all_reduce of the
runtime. After `slimlab calibrate` the seconds are predicted too.

Production libraries (NCCL, RCCL, Gloo) use the same ring for long tensors, cut finer.
"""

import math
import os
import statistics

import click
import torch

from slimlab.comm.base import Communicator
from slimlab.comm.calibrate import load_calibration
from slimlab.comm.collectives import ring_all_reduce
from slimlab.comm.trace import TracedCommunicator
from slimlab.demos.common import demo_command, number
from slimlab.demos.measure import (
    count_links,
    differing_links,
    flat,
    from_all_ranks,
    inputs_of,
    num_wrong,
    spread_text,
    take_turns,
)
from slimlab.demos.report import Report, report_of, time_text
from slimlab.plan.messages import Link, alpha_beta_s, lower_bound_bytes, messages_of

ITEM_BYTES = 4
MAX_ROWS = 16


def program(comm: Communicator, num_elements: int, seed: int, repeats: int) -> Report:
    """Sum a tensor of all ranks on the ring, count what it sends, and time it.

    comm          the communicator of all ranks
    num_elements  of the float32 tensor on each rank
    seed          of the tensors
    repeats       how often either all_reduce is timed
    returns       the report, the same on every rank

    Communicates: repeats + 2 ring_all_reduces, repeats + 1 all_reduces of the runtime, and what
    the ranks tell each other about them.
    """
    inputs = inputs_of(comm, num_elements, seed)
    own, plain = inputs[comm.rank], sum(inputs)

    traced = TracedCommunicator(comm)
    total = ring_all_reduce(traced, own)

    report = report_of("ring_all_reduce", comm)
    wrong = flat(from_all_ranks(comm, [num_wrong(total, plain)]))
    report.check("elements unlike the plain sum", [0] * comm.world_size, wrong)
    check_counts(report, count_links(comm, traced.events), num_elements)
    out, work = torch.empty_like(own), torch.empty(num_elements + 1, device=comm.device)
    actions = {
        "ring_all_reduce": lambda: ring_all_reduce(comm, own, out=out, work=work),
        "all_reduce": lambda: comm.all_reduce(own, out=out),
    }
    show_seconds(report, take_turns(comm, actions, repeats), num_elements)
    return report


def check_counts(report: Report, counted: tuple[list, list], num_elements: int) -> None:
    """Compare messages and bytes with the prediction, and with the least there can be.

    report        takes the checks
    counted       messages and bytes from rank to rank
    num_elements  of the tensor
    """
    w = report.world_size
    predicted = messages_of("ring_all_reduce", w, num_elements, ITEM_BYTES)
    sent = [list(map(sum, rows)) for rows in counted]
    report.check("messages that each rank sends", list(predicted.messages_sent), sent[0])
    report.check("bytes that each rank sends", list(predicted.bytes_sent), sent[1])
    report.check("links unlike the prediction", 0, differing_links(counted, predicted))
    bound = math.ceil(lower_bound_bytes(w, num_elements * ITEM_BYTES))
    busiest = max(sent[1])
    # Parts differ by at most one element, in each of the two halves.
    near = bound <= busiest < bound + 2 * ITEM_BYTES
    report.check("busiest rank: bytes, and the lower bound", bound, busiest, agrees=near)
    rows = [
        (f"{src} to {(src + 1) % w}", f"{expected:,}", f"{found:,}")
        for src, expected, found in zip(range(w if w > 1 else 0), predicted.bytes_sent, sent[1])
    ]
    if rows:
        headers = ("link", "predicted", "counted")
        report.table("bytes on each link of the ring", headers, rows[:MAX_ROWS])
    report.numbers |= {"num_elements": num_elements, "lower_bound_bytes": bound}


def show_seconds(report: Report, seconds: dict[str, list[float]], num_elements: int) -> None:
    """Show the seconds of both all_reduces, and of the ring the predicted ones.

    report        takes table and numbers
    seconds       by name, of each repeat
    num_elements  of the tensor
    """
    kept, w = load_calibration(report.backend), report.world_size
    predicted, note = "", "; slimlab calibrate lets this be predicted"
    if kept is not None:
        # In each step of a ring messages go both ways at every rank, as in an exchange.
        line = kept.exchange
        link = Link(line.alpha_s, line.beta_s_per_byte)
        cost = {"link": link, "gamma_s_per_byte": kept.gamma_s_per_byte}
        predicted_s = alpha_beta_s("ring_all_reduce", w, num_elements, ITEM_BYTES, **cost)
        if report.backend == "threads":  # they take turns, so exchanges of two ranks add up
            predicted_s *= w / 2
        low, high = (time_text(predicted_s * share) for share in line.band)
        predicted = f"{time_text(predicted_s)} ({low} to {high})"
        report.numbers["predicted_s"] = predicted_s
        note = f"; predicted with what was kept on {kept.date[:10]}"
    cores = os.cpu_count() or 1
    if report.backend != "threads" and w > cores:
        note += f"; {w} ranks share {cores} cores, the prediction gives each its own"
    rows = [(name, predicted if name == "ring_all_reduce" else "", spread_text(times))
            for name, times in seconds.items()]  # fmt: skip
    report.table(
        f"seconds of the slowest rank{note}", ("", "predicted", "median (middle half)"), rows
    )
    ours, theirs = (statistics.median(times) for times in seconds.values())
    report.numbers |= {"ring_s": ours, "runtime_s": theirs}


main = demo_command(
    program,
    number("--elements", click.IntRange(0, 2**30), 1_000_003, "Of the tensor on each rank.",
           "num_elements"),
    number("--repeats", click.IntRange(1, 10_000), 5, "Timed runs of either all_reduce."),
    number("--seed", click.IntRange(0, 2**63 - 1), 0, "Of the tensors."),
)  # fmt: skip

if __name__ == "__main__":
    main()
