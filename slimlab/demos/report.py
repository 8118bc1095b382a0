"""What a demo reports: tables, and what was predicted beside what was measured.

Every demo of slimlab.demos fills one on every rank, from numbers that all ranks know, so that all
come to the same verdict and end with the same exit code. Production benchmarks (nccl-tests, OSU)
print tables like these, and leave it to the reader to judge them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from slimlab.comm.base import Communicator
from slimlab.comm.report import text_table

MAX_CHECKS = 16


@dataclass(frozen=True)
class Check:
    """One thing that was predicted and measured.

    what       in a few words
    predicted  a number or a word, or one per rank
    measured   of the same kind
    agrees     whether the two fit
    """

    what: str
    predicted: object
    measured: object
    agrees: bool


@dataclass
class Report:
    """What one demo found.

    demo        its name
    backend     what carried the messages
    world_size  number of ranks
    tables      titles and tables for people to read
    checks      what was predicted and measured
    numbers     what else was measured, for programs to read; JSON must be able to hold it
    """

    demo: str
    backend: str
    world_size: int
    tables: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether everything that was measured fits what was predicted."""
        return bool(self.checks) and all(check.agrees for check in self.checks)

    def table(self, title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table.

        title    what it shows
        headers  one word or two per column
        rows     one value per column
        """
        self.tables.append(f"{title}\n{text_table(headers, rows)}")

    def check(
        self, what: str, predicted: object, measured: object, agrees: bool | None = None
    ) -> None:
        """Compare a prediction with what was measured.

        what       in a few words
        predicted  a number or a word, or one per rank
        measured   of the same kind
        agrees     whether the two fit; None: they must be equal
        """
        agrees = predicted == measured if agrees is None else agrees
        self.checks.append(Check(what, predicted, measured, bool(agrees)))

    def text(self) -> str:
        """Write all of it for people to read."""
        ranks = f"{self.world_size} rank" + "s" * (self.world_size > 1)
        title = f"{self.demo}: {ranks}, backend {self.backend}"
        # Of many checks the tables before tell; what disagrees is shown in any case.
        shown = [one for one in self.checks if len(self.checks) <= MAX_CHECKS or not one.agrees]
        rows = [
            (one.what, short(one.predicted), short(one.measured), "yes" if one.agrees else "NO")
            for one in shown
        ]
        checks = [text_table(("checked", "predicted", "measured", "agree"), rows)] if rows else []
        return "\n\n".join([title, *self.tables, *checks, self.verdict()])

    def verdict(self) -> str:
        """Say in one line whether everything agrees."""
        wrong = [check.what for check in self.checks if not check.agrees]
        if wrong:
            return f"{len(wrong)} of {len(self.checks)} checks DISAGREE: {'; '.join(wrong)}"
        return f"all {len(self.checks)} checks agree"

    def json(self) -> str:
        """Write all but the tables as one line of JSON."""
        about = {"demo": self.demo, "backend": self.backend, "world_size": self.world_size}
        checks = [asdict(check) for check in self.checks]
        return json.dumps(about | {"agrees": self.agrees, "checks": checks} | self.numbers)


def report_of(demo: str, comm: Communicator) -> Report:
    """Begin the report of a demo.

    demo  its name
    comm  the communicator of all ranks
    """
    return Report(demo, comm.backend, comm.world_size)


def short(value: object) -> str:
    """Write a number, a word, or one of them per rank, as a table shows it.

    value  what to write
    """
    if isinstance(value, list | tuple):
        if not value:
            return "none"
        if all(one == value[0] for one in value):
            each = " on each rank" if len(value) > 1 else ""
            return f"{short(value[0])}{each}"
        shown = [short(one) for one in value[:4]]
        return ", ".join(shown + ["..."] * (len(value) > 4))
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def time_text(seconds: float) -> str:
    """Write seconds with three digits, in the unit that suits them.

    seconds  at least 0
    """
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6))
    values = [(float(f"{seconds * factor:.3g}"), unit) for unit, factor in units]
    value, unit = next((one for one in values if one[0] >= 1), values[-1])
    return f"{value:g} {unit}"


def size_text(n_bytes: int) -> str:
    """Write a number of bytes, in KiB or MiB where it is a whole number of them.

    n_bytes  at least 0
    """
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size and n_bytes % size == 0:
            return f"{n_bytes // size} {unit}"
    return f"{n_bytes:,} B"
