"""What one message costs: round trips between pairs of ranks, from 8 bytes to 4 MiB.

    slimlab demo ping_pong --ranks 2 --backend gloo
    python -m slimlab.demos.ping_pong --ranks 2 --backend mpi --json
    mpirun -n 2 python -m slimlab.demos.ping_pong
    torchrun --nproc-per-node 2 -m slimlab.demos.ping_pong --trips 50

Ranks 0 and 1 are a pair, 2 and 3, and so on; an odd last rank looks on. Half a round trip is a
message. Through the medians a line is fitted, alpha + beta n: alpha is what a message costs however
short it is, beta what each byte adds. The share of the line that was really measured tells how far
to trust it.

All pairs talk at the same time, so more pairs than the machine has cores for show what it is like
to share them. Production benchmarks of the kind: OSU's osu_latency and osu_bw, Intel's IMB.
"""

import statistics

import click
import torch

from slimlab.comm.base import Communicator
from slimlab.comm.calibrate import Fit, fit_line, load_calibration
from slimlab.comm.timings import round_trips_s
from slimlab.comm.trace import TracedCommunicator
from slimlab.demos.common import demo_command, number
from slimlab.demos.measure import count_links, from_all_ranks, num_wrong, spread_text
from slimlab.demos.report import Report, report_of, size_text, time_text


def program(comm: Communicator, max_bytes: int, trips: int, seed: int) -> Report:
    """Send tensors of many sizes to a partner and back, count them and time them.

    comm       the communicator of all ranks, at least two
    max_bytes  of the longest message
    trips      round trips of each size that are timed
    seed       of the payload
    returns    the report, the same on every rank

    Communicates: (trips + 1) messages of each size from every rank of a pair to the other.
    """
    sizes = sizes_up_to(max_bytes)
    peer = comm.rank ^ 1
    plays = peer < comm.world_size
    generator = torch.Generator().manual_seed(seed)
    payload = torch.randint(0, 256, (sizes[-1],), generator=generator, dtype=torch.uint8)
    payload = payload.to(comm.device)

    traced, seconds, wrong = TracedCommunicator(comm), [], 0
    comm.barrier()
    for n_bytes in sizes:
        one_way_s = [0.0] * trips
        if plays:
            one_way_s, arrived = round_trips_s(traced, payload[:n_bytes], peer, trips)
            wrong += num_wrong(arrived, payload[:n_bytes])
        seconds.append(one_way_s)

    report = report_of("ping_pong", comm)
    report.check("bytes that arrived changed", 0, sum(sum(from_all_ranks(comm, [wrong]), [])))
    check_counts(report, count_links(comm, traced.events), sizes, trips)
    by_rank = from_all_ranks(comm, [value for row in seconds for value in row])
    # The rank that begins sees whole round trips, the other one waits in its first receive.
    show_seconds(report, sizes, [by_rank[rank] for rank in range(0, len(by_rank) - 1, 2)], trips)
    return report


def sizes_up_to(max_bytes: int) -> list[int]:
    """List the powers of two from 8 to max_bytes, in bytes.

    max_bytes  at least 16
    """
    return [1 << power for power in range(3, max_bytes.bit_length())]


def check_counts(report: Report, counted: tuple, sizes: list[int], trips: int) -> None:
    """Compare messages and bytes with what the round trips must send.

    report   takes the checks
    counted  messages and bytes from rank to rank
    sizes    of the messages, in bytes
    trips    timed ones of each size
    """
    messages, n_bytes = counted
    in_pair = [rank ^ 1 < report.world_size for rank in range(report.world_size)]
    each = predicted_traffic(sizes, trips)
    for what, predicted, rows in zip(("messages", "bytes"), each, (messages, n_bytes)):
        report.check(f"{what} sent", [predicted * one for one in in_pair], [*map(sum, rows)])
    strangers = sum(
        count for src, row in enumerate(messages) for dst, count in enumerate(row) if dst != src ^ 1
    )
    report.check("messages outside of pairs", 0, strangers)


def predicted_traffic(sizes: list[int], trips: int) -> tuple[int, int]:
    """Predict the messages that each rank of a pair sends, and their bytes.

    sizes  of the messages, in bytes
    trips  timed ones of each size; one more comes before
    """
    return (trips + 1) * len(sizes), (trips + 1) * sum(sizes)


def show_seconds(report: Report, sizes: list[int], by_pair: list[list[float]], trips: int) -> None:
    """Fit a line for each pair, and show the seconds of the first with their spread.

    report   takes tables and numbers
    sizes    of the messages, in bytes
    by_pair  seconds of every message, size by size, for each pair
    trips    of each size
    """
    grouped = [[times[at : at + trips] for at in range(0, len(times), trips)] for times in by_pair]
    medians = [[statistics.median(times) for times in pair] for pair in grouped]
    fits = [fit_line(sizes, one) for one in medians]
    rows = [
        (size_text(n_bytes), spread_text(times), time_text(fits[0].predicted_s(n_bytes)))
        for n_bytes, times in zip(sizes, grouped[0])
    ]
    headers = ("message", "median (middle half)", "the line")
    report.table("ranks 0 and 1: seconds of one message, half a round trip", headers, rows)
    rows = [(f"{2 * pair}, {2 * pair + 1}", *line_texts(fit)) for pair, fit in enumerate(fits)]
    kept = load_calibration(report.backend)
    if kept is not None:
        fit = Fit(kept.alpha_s, kept.beta_s_per_byte, kept.band)
        rows.append((f"kept {kept.date[:10]}", *line_texts(fit)))
    headers = ("ranks", "alpha", "beta per KiB", "bandwidth", "measured / line")
    report.table("alpha + beta n, fitted", headers, rows)
    report.numbers |= {
        "sizes_bytes": sizes,
        "seconds": medians,
        "alpha_s": [fit.alpha_s for fit in fits],
        "beta_s_per_byte": [fit.beta_s_per_byte for fit in fits],
        "band": [fit.band for fit in fits],
    }


def line_texts(fit: Fit) -> tuple[str, str, str, str]:
    """Write a line as a table shows it: alpha, beta, bandwidth, band.

    fit  the line
    """
    beta = fit.beta_s_per_byte
    rate = f"{1e-9 / beta:.3g} GB/s" if beta else "no limit seen"
    band = f"{fit.band[0]:.2f} to {fit.band[1]:.2f}"
    return time_text(fit.alpha_s), time_text(beta * 2**10), rate, band


main = demo_command(
    program,
    number("--max-bytes", click.IntRange(16, 2**30), 2**22, "Of the longest message."),
    number("--trips", click.IntRange(1, 10_000), 20, "Timed round trips of each size."),
    number("--seed", click.IntRange(0, 2**63 - 1), 0, "Of the payload."),
    ranks=2,
    least=2,
)

if __name__ == "__main__":
    main()
