"""What became of a model: sizes, quality and speed of the original and the small one side by side.

slim_checkpoint fills a SlimReport with what slimlab.slim.measure measured, `slimlab slim` prints
and draws it, chapter 15 reads it.

Production compares with the last release too, and holds back what lost too much.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Spread:
    """Several measurements of one thing.

    median   the middle one
    low      the least
    high     the greatest
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Sum up `values`."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """One model, as it was measured.

    num_params       its numbers, a tied table once, in however many bits
    weights_bytes    size of its .safetensors files
    folder_bytes     all that is read to load it: weights, JSON and tokenizer
    memory_bytes     of the parameters and buffers that it holds once it is loaded
    bits_per_byte    of the held-out text
    reading_per_s    tokens that a forward pass of several windows reads in a second
    writing_per_s    tokens that it writes in a second, one text at a time, with a cache
    """

    num_params: int
    weights_bytes: int
    folder_bytes: int
    memory_bytes: int
    bits_per_byte: float
    reading_per_s: Spread
    writing_per_s: Spread


@dataclass(frozen=True)
class Stage:
    """The model after one of the steps.

    name           "original", "distilled", "pruned", "quantized" or "as written"
    num_params     as in Measured
    weights_bytes  size of the file that it would be saved in
    bits_per_byte  of the held-out text
    seconds        that the step took
    """

    name: str
    num_params: int
    weights_bytes: int
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class SlimReport:
    """What slim_checkpoint did, and what it gained and cost.

    source         where the original lies
    out            where the small model lies
    config         SlimConfig as a dict
    text           of the corpus that was learned from and measured by: name, fingerprint
    original       Measured
    slim           Measured, of the model as it was read back from the disk
    stages         from the original to the model as written
    reading_ratio  of the rounds: small model's tokens per second / the original's
    writing_ratio  likewise
    machine        processor threads, PyTorch's version, date
    notes          what the reader should know besides
    """

    source: str
    out: str
    config: dict
    text: dict
    original: Measured
    slim: Measured
    stages: tuple[Stage, ...]
    reading_ratio: Spread
    writing_ratio: Spread
    machine: dict
    notes: tuple[str, ...] = field(default=())

    @property
    def weights_ratio(self) -> float:
        """The small model's file over the original's."""
        return self.slim.weights_bytes / self.original.weights_bytes

    @property
    def folder_ratio(self) -> float:
        """All that is read to load it over the same of the original."""
        return self.slim.folder_bytes / self.original.folder_bytes

    @property
    def memory_ratio(self) -> float:
        """Bytes of tensors held over those of the original."""
        return self.slim.memory_bytes / self.original.memory_bytes

    @property
    def price(self) -> float:
        """Bits per byte that the small model needs more."""
        return self.slim.bits_per_byte - self.original.bits_per_byte

    def as_dict(self) -> dict:
        """Return all of it, ratios and price included, for JSON."""
        ratios = ("weights_ratio", "folder_ratio", "memory_ratio", "price")
        return {**asdict(self), **{name: getattr(self, name) for name in ratios}}

    @classmethod
    def from_dict(cls, stored: dict) -> "SlimReport":
        """Read what as_dict wrote, such as report.json.

        stored  more entries do no harm
        """
        sides, ratios = ("original", "slim"), ("reading_ratio", "writing_ratio")
        own = {name: stored[name] for name in cls.__dataclass_fields__}
        own |= {name: _measured(stored[name]) for name in sides}
        own |= {name: Spread(**stored[name]) for name in ratios}
        own["stages"] = tuple(Stage(**one) for one in stored["stages"])
        return cls(**own | {"notes": tuple(stored["notes"])})

    def as_text(self) -> str:
        """Return a table of both models, and one of the steps between."""
        return "\n".join([*_table(self), "", *_stages(self), *(f"note: {n}" for n in self.notes)])


def _measured(stored: dict) -> Measured:
    speeds = {name: Spread(**stored[name]) for name in ("reading_per_s", "writing_per_s")}
    return Measured(**stored | speeds)


def _table(report: SlimReport) -> list[str]:
    old, new = report.original, report.slim
    rows = [
        ("numbers", f"{old.num_params:,}", f"{new.num_params:,}", new.num_params / old.num_params),
        ("weights on disk, bytes", f"{old.weights_bytes:,}", f"{new.weights_bytes:,}",
         report.weights_ratio),
        ("all files, bytes", f"{old.folder_bytes:,}", f"{new.folder_bytes:,}", report.folder_ratio),
        ("tensors in memory, bytes", f"{old.memory_bytes:,}", f"{new.memory_bytes:,}",
         report.memory_ratio),
        ("bits per byte, held out", f"{old.bits_per_byte:.4f}", f"{new.bits_per_byte:.4f}",
         new.bits_per_byte / old.bits_per_byte),
    ]  # fmt: skip
    lines = [f"{report.source} -> {report.out}"]
    lines += [f"{'':26}{'original':>14}{'slim':>14}{'ratio':>10}"]
    lines += [f"{name:26}{a:>14}{b:>14}{ratio:>10.3f}" for name, a, b, ratio in rows]
    for name, word, ratio in (
        ("reading, tokens/s", "reading_per_s", report.reading_ratio),
        ("writing, tokens/s", "writing_per_s", report.writing_ratio),
    ):
        a, b = (f"{getattr(one, word).median:,.0f}" for one in (old, new))
        spread = f"({ratio.low:.2f} to {ratio.high:.2f})"
        lines += [f"{name:26}{a:>14}{b:>14}{ratio.median:>10.3f} {spread}"]
    return lines


def _stages(report: SlimReport) -> list[str]:
    lines = [f"{'step':16}{'numbers':>12}{'file, bytes':>14}{'bits per byte':>16}{'seconds':>10}"]
    for one in report.stages:
        lines += [
            f"{one.name:16}{one.num_params:>12,}{one.weights_bytes:>14,}"
            f"{one.bits_per_byte:>16.4f}{one.seconds:>10.1f}"
        ]
    return lines
