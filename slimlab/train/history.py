"""The history of a run: a record per step, in memory and in a file that survives the run.

Chapter 05 plots it. history.jsonl holds one JSON object a line; after a kill it may have a broken
last line, and lines of steps that the last checkpoint does not know: both are removed when the run
goes on, so that each step stands there once.

Production sends such records to a service with plots for many people.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from slimlab.config import InputError
from slimlab.text.files import write_atomically


@dataclass
class History:
    """What happened in every step of a run; step 1 is the first update.

    records  dicts with step, loss (nats per token, before the update), lr, grad_norm (before
             clipping; None if the step was skipped), num_tokens, seconds, and validation_loss
             where it was measured (after the update)
    """

    records: list[dict] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """Numbers of the updates, from 1."""
        return [record["step"] for record in self.records]

    @property
    def losses(self) -> list[float]:
        """Mean loss of each batch in nats per token."""
        return [record["loss"] for record in self.records]

    @property
    def lrs(self) -> list[float]:
        """Learning rate of each update."""
        return [record["lr"] for record in self.records]

    @property
    def grad_norms(self) -> list[float | None]:
        """Norm of the gradient before clipping; None where float16 overflowed."""
        return [record["grad_norm"] for record in self.records]

    @property
    def num_tokens(self) -> list[int]:
        """Target tokens of each batch."""
        return [record["num_tokens"] for record in self.records]

    @property
    def seconds(self) -> list[float]:
        """Wall time of each step, without validation and saving."""
        return [record["seconds"] for record in self.records]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """Steps at which held-out text was measured, and its loss in nats per token."""
        key = "validation_loss"
        return [(record["step"], record[key]) for record in self.records if key in record]


class HistoryFile:
    """Append records to a file, from the step on at which a run begins or goes on.

    path   the file, made if missing; None: nothing is written
    start  updates made already; later records, of a run that was killed, are removed
    """

    def __init__(self, path: Path | None, start: int):
        self.earlier = _read(path, start) if path else []
        self._file, self._path = None, path
        if path is not None:
            lines = "".join(json.dumps(record) + "\n" for record in self.earlier)
            write_atomically(path, lines.encode())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, record: dict) -> None:
        """Write one line.

        record  what JSON can hold

        Raises InputError if the disk is full.
        """
        if self._file:
            with self._full_disk_told():
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk: before the checkpoint that counts on them."""
        if self._file:
            with self._full_disk_told():
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file:
            with suppress(OSError):  # what a full disk did not take was told by append
                self._file.close()

    @contextmanager
    def _full_disk_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                "a history that can be written",
                f"{self._path}: {error.strerror or error}; checkpoints are as they were",
                "make room on the disk; the same call then goes on from the last checkpoint",
            ) from error


def read_history(path: str | os.PathLike) -> History:
    """Read a history.jsonl.

    path  the file, or the folder of a run in which it lies

    A missing file is an empty history; a line that was being written when the run was killed, and
    all after it, are left out.
    """
    path = Path(path)
    return History(_read(path / "history.jsonl" if path.is_dir() else path, None))


def _read(path: Path, last_step: int | None) -> list[dict]:
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                if last_step is not None and record["step"] > last_step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            records.append(record)
    return records
