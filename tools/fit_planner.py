"""Fit the planner's two fitted constants on table 1 of Narayanan et al. 2021; print how it does.

    python tools/fit_planner.py

Gauss and Newton on the relative errors of the ten steps, derivatives by differences. Leaving one
step out at a time, and predicting it with what the other nine fit, shows what a fit is worth.
Two empty models are fitted to the same table: a rate that is the same everywhere, and a line in the
logarithm of the number of parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from slimlab.plan.hardware import Constants, find_cluster
from slimlab.plan.params import num_params
from slimlab.plan.published_runs import (
    RECOMPUTED_FULL,
    RECOMPUTED_SELECTIVE,
    SC21_TABLE_1,
    SC21_TABLE_2,
    PublishedStep,
)
from slimlab.plan.software import find_software
from slimlab.plan.step_time import step_time
from slimlab.plan.training_flop import training_step_flop

FITTED = ("matmul_efficiency", "memory_efficiency")
Model = Callable[[PublishedStep], float]


def predicted_s(step: PublishedStep, constants: Constants | None = None) -> float:
    """The planner's seconds of a published step."""
    cluster, software = find_cluster(step.hardware), find_software(step.software)
    given = {"software": software, "constants": constants}
    return step_time(step.config, cluster, step.parallel, step.batch_size, **given).total_s


def fit(steps: Sequence[PublishedStep]) -> Constants:
    """The constants with the least sum of squared relative errors."""
    values = np.array([getattr(Constants(), name) for name in FITTED])
    for _ in range(6):
        there = _errors(steps, values)
        slopes = np.stack([(_errors(steps, values + d) - there) / 1e-4 for d in 1e-4 * np.eye(2)])
        values = values - np.linalg.lstsq(slopes.T, there, rcond=None)[0]
    return _constants(values)


def fit_planner(steps: Sequence[PublishedStep]) -> Model:
    constants = fit(steps)
    return lambda step: predicted_s(step, constants)


def fit_constant_rate(steps: Sequence[PublishedStep]) -> Model:
    """The empty model: every GPU does the same FLOP per second in every run."""
    rate = np.mean([_rate(step) for step in steps])
    return lambda step: step.step_s * _rate(step) / rate


def fit_line(steps: Sequence[PublishedStep]) -> Model:
    """The other empty model: that rate is a line in the logarithm of the number of parameters."""
    sizes = [np.log(num_params(step.config)) for step in steps]
    slope, start = np.polyfit(sizes, [_rate(step) for step in steps], 1)

    def seconds(step: PublishedStep) -> float:
        return step.step_s * _rate(step) / (start + slope * np.log(num_params(step.config)))

    return seconds


MODELS = {"planner": fit_planner, "constant rate": fit_constant_rate, "line": fit_line}


def left_out(fit_model: Callable, steps: Sequence[PublishedStep]) -> float:
    """Mean absolute relative error of each step, predicted by what the others fit."""
    pairs = [(step, [other for other in steps if other is not step]) for step in steps]
    return float(np.mean([abs(fit_model(rest)(step) / step.step_s - 1) for step, rest in pairs]))


def mean_error(model: Model, steps: Sequence[PublishedStep]) -> float:
    return float(np.mean([abs(model(step) / step.step_s - 1) for step in steps]))


def errors_of(fit_model: Callable) -> dict[str, float]:
    """The mean absolute errors of a model, fitted on table 1, on all tables."""
    model = fit_model(SC21_TABLE_1)
    return {
        "table 1, one left out": left_out(fit_model, SC21_TABLE_1),
        "table 2": mean_error(model, SC21_TABLE_2),
        "full recomputation": mean_error(model, RECOMPUTED_FULL),
        "selective": mean_error(model, RECOMPUTED_SELECTIVE),
    }


def _rate(step: PublishedStep) -> float:
    """FLOP per second and GPU, each block's forward pass twice if it was computed twice."""
    recompute = "block" if step.parallel.recompute == "full" else "none"
    flop = training_step_flop(step.config, step.batch_size, recompute=recompute)
    return flop / (step.parallel.world_size * step.step_s)


def _constants(values: np.ndarray) -> Constants:
    return replace(Constants(), **dict(zip(FITTED, map(float, values))))


def _errors(steps: Sequence[PublishedStep], values: np.ndarray) -> np.ndarray:
    constants = _constants(values)
    return np.array([predicted_s(step, constants) / step.step_s - 1 for step in steps])


def main() -> None:
    constants = fit(SC21_TABLE_1)
    for name in FITTED:
        print(f"{name} = {getattr(constants, name):.4f}, kept: {getattr(Constants(), name)}")
    for steps in (SC21_TABLE_1, SC21_TABLE_2, RECOMPUTED_FULL, RECOMPUTED_SELECTIVE):
        print(steps[0].source)
        for step in steps:
            seconds = predicted_s(step)
            error = f"{seconds / step.step_s - 1:+.1%}"
            print(f"  {step.name:<16} {step.step_s:8.2f} s, predicted {seconds:8.2f} s  {error}")
    print(f"{'mean absolute error':<22}" + "".join(f"{name:>16}" for name in MODELS))
    found = {name: errors_of(fit_model) for name, fit_model in MODELS.items()}
    for table in found["planner"]:
        print(f"{table:<22}" + "".join(f"{errors[table]:>16.1%}" for errors in found.values()))


if __name__ == "__main__":
    main()
