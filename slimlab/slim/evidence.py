"""Runs over several seeds that are too long for a chapter: kept as data, read by chapters 13 to 15.

Programs in benchmarks/ write the files of the folder evidence/, with the setting, which was fixed
before the runs, the machine and the date. What is compared is the difference between two runs of
the same seed, over several seeds: seeds differ more among themselves than the methods do.

Production tracks such runs in a data base (Weights and Biases, MLflow); the interval is Student's
("The probable error of a mean", Biometrika 1908).
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from slimlab.config import InputError, require

FOLDER = Path(__file__).with_name("evidence")
# Student's t for 95 % between both tails, by degrees of freedom from 1.
T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def stored_evidence(name: str) -> dict:
    """Read the runs of one benchmark.

    name     of its file, without .json
    returns  what the benchmark wrote: setting, environment, date and one entry per run

    Raises InputError if there is no such file.
    """
    path = FOLDER / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.json"))) or "none"
        raise InputError("stored runs", f"{name!r}", f"choose from: {known}") from error


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Say how sure a mean is.

    values   independent measurements, at least two: of one seed each
    returns  their mean, and how far the interval that holds the true mean with 95 % confidence
             reaches to either side, if the measurements are about normally distributed

    Raises InputError for fewer than two.
    """
    count = len(values)
    require(count >= 2, "at least two values", f"{count}", "run more seeds")
    quantile = T_95[min(count - 1, len(T_95)) - 1]
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(count)
