"""What messages cost on this machine: alpha, beta and gamma, measured, fitted and kept.

`slimlab calibrate` measures, `load_calibration` reads what it has kept. A message of n bytes takes
alpha + beta n, and to combine n bytes that have arrived takes gamma n. Where two ranks send to each
other at the same time, as in the steps of a ring, they share memory and cores: such an exchange has
a line of its own. Chapter 07 predicts seconds with them.

No machine keeps to a line: short messages travel with their header, long ones wait for the
receiver, caches end. So a fit comes with its band: between which shares of the line the
measurements lay.

Production libraries (NCCL, MPI's tuning tables) measure or assume such costs to choose algorithms;
LogP and LogGP split alpha further.
"""

import json
import os
import platform
import socket
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import torch

from slimlab import __version__
from slimlab.comm.base import Communicator
from slimlab.comm.launch import run_ranks
from slimlab.comm.place import library_of
from slimlab.comm.timings import combine_s, exchanges_s, round_trips_s
from slimlab.config import check_size, require
from slimlab.text.cache import cache_folder
from slimlab.text.files import write_atomically
from slimlab.text.progress import progress

# 8 bytes to 4 MiB.
SIZES_BYTES = tuple(8 << power for power in range(20))
COMBINED_BYTES = SIZES_BYTES[6:]
ROUNDS, TRIPS = 5, 20
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Fit:
    """A line through seconds over bytes, and how well they keep to it.

    alpha_s          seconds of a message without bytes
    beta_s_per_byte  seconds per byte
    band             the least and the largest share of the line's seconds that was measured
    """

    alpha_s: float
    beta_s_per_byte: float
    band: tuple[float, float]

    def predicted_s(self, n_bytes: int) -> float:
        """Return the line's seconds.

        n_bytes  of a message
        """
        return self.alpha_s + self.beta_s_per_byte * n_bytes


@dataclass(frozen=True)
class Calibration:
    """What was measured of one runtime on one machine.

    backend           "threads", "mpi", "gloo" or "nccl"
    alpha_s           seconds of a message, however short
    beta_s_per_byte   seconds per byte of a message
    gamma_s_per_byte  seconds to combine a byte that has arrived with one that is there
    band              the least and the largest share of alpha + beta n that a message took
    exchange          the line of two messages that cross, sent with sendrecv
    combine_band      as band, of combining
    sizes_bytes       of the messages
    seconds           that they took, medians of all rounds
    library           what carried them, with its version
    machine           name, kind of processor, number of cores
    versions          of Python, torch and slimlab
    date              when, in UTC
    """

    backend: str
    alpha_s: float
    beta_s_per_byte: float
    gamma_s_per_byte: float
    band: tuple[float, float]
    exchange: Fit
    combine_band: tuple[float, float]
    sizes_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    library: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    date: str


def fit_line(sizes_bytes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Fit alpha + beta n so that the sum of all relative errors is least.

    Relative, since the seconds span several powers of ten and short messages count as much as long
    ones; their sum and not their squares, since a disturbed measurement is far off. Such a line
    passes through two of the points, or through one with alpha or beta 0: all are tried.

    sizes_bytes  of the messages, at least two different ones
    seconds      that each took, above 0
    returns      the line and its band

    Raises InputError for numbers that do not fit.
    """
    points = list(zip(sizes_bytes, seconds))
    require(
        len(points) == len(sizes_bytes) == len(seconds) and len(set(sizes_bytes)) > 1,
        "fit_line: seconds for at least two sizes",
        f"{len(seconds)} seconds for sizes {sorted(set(sizes_bytes))[:5]}",
        "measure messages of several sizes",
    )
    require(
        min(seconds) > 0,
        "fit_line: seconds above 0",
        f"{min(seconds)!r}",
        "measure many messages together if the clock is too coarse for one",
    )
    lines = [(0.0, s / n) for n, s in points if n] + [(s, 0.0) for _, s in points]
    for (n, s), (m, t) in combinations(points, 2):
        if n != m:
            beta = (t - s) / (m - n)
            lines.append((s - beta * n, beta))
    lines = [(alpha, beta) for alpha, beta in lines if alpha >= 0 and beta >= 0]

    def error(line: tuple[float, float]) -> float:
        return sum(abs(line[0] + line[1] * n - s) / s for n, s in points)

    alpha, beta = min(lines, key=error)
    shares = [s / (alpha + beta * n) for n, s in points]
    return Fit(alpha, beta, (min(shares), max(shares)))


def calibrate(backend: str, *, rounds: int = ROUNDS) -> Calibration:
    """Measure and fit the messages of two ranks on this machine; a few seconds.

    Each round starts the ranks anew: where the system puts them, and their memory, differs from
    start to start by more than messages differ within one.

    backend  "threads", "mpi", "gloo" or "nccl"
    rounds   starts of which the medians count
    returns  what was measured, not yet kept

    Raises InputError for a backend that this machine does not have, and what run_ranks raises.
    """
    check_size("rounds", rounds)
    found = []
    for _ in progress(range(rounds), f"calibrating {backend}"):
        found += run_ranks(_measured, 2, backend=backend, timeout_s=DEADLINE_S)[:1]
    messages, exchanges, combined = (
        [statistics.median(column) for column in zip(*(one[part] for one in found))]
        for part in ("messages_s", "exchanges_s", "combined_s")
    )
    line, gamma = fit_line(SIZES_BYTES, messages), fit_line(COMBINED_BYTES, combined)
    return Calibration(
        backend=backend,
        alpha_s=line.alpha_s,
        beta_s_per_byte=line.beta_s_per_byte,
        gamma_s_per_byte=gamma.beta_s_per_byte,
        band=line.band,
        exchange=fit_line(SIZES_BYTES, exchanges),
        combine_band=gamma.band,
        sizes_bytes=SIZES_BYTES,
        seconds=tuple(messages),
        library=found[0]["library"],
        machine={
            "host": socket.gethostname(),
            "processor": platform.machine(),
            "cores": os.cpu_count() or 1,
        },
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "slimlab": __version__,
        },
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _measured(comm: Communicator) -> dict:
    """The program of one round: medians of messages, exchanges and additions of every size."""
    peer, messages, exchanges = 1 - comm.rank, [], []
    for n_bytes in SIZES_BYTES:
        tensor = torch.ones(n_bytes, dtype=torch.uint8, device=comm.device)
        messages.append(statistics.median(round_trips_s(comm, tensor, peer, TRIPS)[0]))
        exchanges.append(statistics.median(exchanges_s(comm, tensor, peer, TRIPS)))
    comm.barrier()
    combined = [statistics.median(combine_s(comm, n_bytes, TRIPS)) for n_bytes in COMBINED_BYTES]
    return {
        "messages_s": messages,
        "exchanges_s": exchanges,
        "combined_s": combined,
        "library": library_of(comm.backend),
    }


def calibration_path(backend: str) -> Path:
    """Return the file that keeps a calibration of this machine.

    A home may be shared by many machines, so the name tells which.

    backend  "threads", "mpi", "gloo" or "nccl"
    """
    host = "".join(c if c.isalnum() or c in ".-" else "_" for c in socket.gethostname())
    return cache_folder() / "calibration" / f"{backend}-{host}.json"


def save_calibration(calibration: Calibration) -> Path:
    """Keep a calibration, in the place of an older one of the same backend and machine.

    calibration  what calibrate returned
    returns      the file

    Raises InputError if it cannot be written.
    """
    path = calibration_path(calibration.backend)
    with suppress(OSError):  # writing says why
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(calibration), indent=2) + "\n").encode())
    return path


def load_calibration(backend: str) -> Calibration | None:
    """Return what `slimlab calibrate` kept of a backend on this machine.

    backend  "threads", "mpi", "gloo" or "nccl"
    returns  None if there is none, or none that can be read
    """
    try:
        kept = json.loads(calibration_path(backend).read_text(encoding="utf-8"))
        line = kept["exchange"]
        kept["exchange"] = Fit(line["alpha_s"], line["beta_s_per_byte"], tuple(line["band"]))
        for name in ("band", "combine_band", "sizes_bytes", "seconds"):
            kept[name] = tuple(kept[name])
        found = Calibration(**kept)
        numbers = (found.alpha_s, found.beta_s_per_byte, found.gamma_s_per_byte, line["alpha_s"])
        return found if found.backend == backend and min(numbers) >= 0 else None
    except (OSError, ValueError, TypeError, LookupError):
        return None
