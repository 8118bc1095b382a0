"""What all benchmarks share: turns taken in one process, ratios round by round, their spread.

Two times from two runs differ by what else the machine did meanwhile. Here the rivals take turns,
each round in the other order, and what is reported is the ratio inside a round, over all rounds.
On a machine with other work the processor's own time (--clock cpu, all threads added up) is the
steadier measure of work done; it says nothing about waiting, and nothing about a GPU.
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

from slimlab.config import check_size, require

Laps = Mapping[str, float]
Prepare = Callable[[], Callable[[], Laps | None]]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Comparison:
    """Times of two rivals at one task, measured in turns.

    task            what was done
    ours            name of the first rival
    theirs          name of the second
    ours_s          seconds of the first, one per round
    theirs_s        seconds of the second, one per round
    """

    task: str
    ours: str
    theirs: str
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Our seconds over theirs, round by round; below 1 ours is faster."""
        return [ours / theirs for ours, theirs in zip(self.ours_s, self.theirs_s)]

    def summary(self) -> dict:
        """Return medians and the spread of the ratio, as the table and the JSON show them."""
        ratios = self.ratios
        return {
            "task": self.task,
            "rounds": len(ratios),
            "ours": self.ours,
            "theirs": self.theirs,
            "ours_median_s": statistics.median(self.ours_s),
            "theirs_median_s": statistics.median(self.theirs_s),
            "ratio_median": statistics.median(ratios),
            "ratio_quartiles": quartiles(ratios),
            "ratio_interval_95": median_interval(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }


def take_turns(
    rivals: Mapping[str, Prepare], rounds: int, warm_up: int = 1, clock: str = "wall"
) -> dict[str, dict[str, list[float]]]:
    """Measure every rival once per round, in the order of the mapping and backwards in turn.

    rivals   name -> a function that prepares, which is not timed, and returns what is timed. That
             may return seconds of its own parts, by name.
    rounds   measurements of each rival
    warm_up  rounds before, which do not count
    clock    a key of CLOCKS
    returns  name of the rival -> part -> seconds of each round; the part "" is the whole
    """
    check_size("rounds", rounds)
    now = CLOCKS[clock]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in rivals}
    gc.freeze()  # what was there before need not be looked through in every round
    try:
        for number in range(-warm_up, rounds):
            order = list(rivals) if number % 2 == 0 else list(reversed(rivals))
            for name in order:
                for part, seconds in _measure(rivals[name], now).items():
                    if number >= 0:
                        times[name].setdefault(part, []).append(seconds)
    finally:
        gc.unfreeze()
    return times


def _measure(prepare: Prepare, now: Callable[[], float]) -> Laps:
    run = prepare()
    gc.collect()  # so that nobody pays for the other's garbage
    start = now()
    laps = run()
    return {"": now() - start, **(laps or {})}


def compare(
    task: str, rivals: Mapping[str, Prepare], rounds: int, warm_up: int = 1, clock: str = "wall"
) -> list[Comparison]:
    """Measure two rivals at one task, and at the parts of it that both report.

    task     what is done
    rivals   ours first, see take_turns
    rounds, warm_up, clock  as in take_turns
    returns  the comparison of the whole, then one per part
    """
    require(len(rivals) == 2, "two rivals", f"{len(rivals)}", "give ours, then theirs")
    times = take_turns(rivals, rounds, warm_up, clock)
    ours, theirs = times
    return [
        Comparison(
            f"{task}: {part}" if part else task,
            ours,
            theirs,
            tuple(times[ours][part]),
            tuple(times[theirs][part]),
        )
        for part in times[ours]
        if part in times[theirs]
    ]


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the values below which a quarter and three quarters of `values` lie."""
    if len(values) == 1:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> list[float] | None:
    """Return an interval that holds the true median with at least this confidence.

    values      independent measurements, of any distribution
    confidence  between 0 and 1
    returns     two of the values; None if there are too few: at 95 % fewer than 6

    As many values lie below the true median as heads fall in as many throws of a coin.
    """
    ordered, count = sorted(values), len(values)
    tail, outside = 0.0, None
    for number in range(count // 2):
        tail += math.comb(count, number) / 2**count
        if 2 * tail > 1 - confidence:
            break
        outside = number
    return None if outside is None else [ordered[outside], ordered[-1 - outside]]


def environment(given: argparse.Namespace) -> dict:
    """Describe the machine, as far as it bears on the times; `given` are the options of parser."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (math.nan,) * 3
    return {
        "clock": given.clock,
        "threads": given.threads,
        "cores": os.cpu_count(),
        "load_before": [round(value, 2) for value in load],
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Make a command line with the options that all benchmarks have.

    description  what --help says
    rounds       measurements of each rival if --rounds is not given
    """
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, default=rounds, help=f"rounds (default {rounds})")
    made.add_argument("--threads", type=int, default=1, help="threads of either (default 1)")
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="default wall")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return made


def report(
    name: str, settings: dict, where: dict, comparisons: Sequence[Comparison], as_json: bool
) -> None:
    """Print what was measured.

    name         of the benchmark
    settings     sizes and versions
    where        from environment
    comparisons  what was measured
    as_json      print one JSON object with all times instead of a table
    """
    if as_json:
        rows = [{**asdict(one), **one.summary()} for one in comparisons]
        print(
            json.dumps({"benchmark": name, "settings": settings, "environment": where} | {
                "results": rows
            }, indent=1)
        )  # fmt: skip
        return
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(table(comparisons))
    print("ratio = our time / their time, paired round by round; below 1 ours is faster")


def table(comparisons: Sequence[Comparison]) -> str:
    """Lay out the summaries of `comparisons` as text."""
    heads = ("task", "ours", "theirs", "ratio", "95 % of median", "quartiles", "rounds")
    rows = [heads]
    for summary in (one.summary() for one in comparisons):
        interval = summary["ratio_interval_95"]
        rows.append((
            summary["task"],
            milliseconds(summary["ours_median_s"]),
            milliseconds(summary["theirs_median_s"]),
            f"{summary['ratio_median']:.3f}",
            "{:.3f} to {:.3f}".format(*interval) if interval else "too few rounds",
            "{:.3f} to {:.3f}".format(*summary["ratio_quartiles"]),
            str(summary["rounds"]),
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def milliseconds(seconds: float) -> str:
    """Write `seconds` in milliseconds with three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:.0f} ms"


def refuse_without(package: str) -> None:
    """End the program with a sentence if the rival `package` is not installed."""
    try:
        __import__(package)
    except ImportError:
        sys.exit(f"this benchmark compares with {package}: pip install {package}")
