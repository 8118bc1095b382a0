"""Compensated rounding, smoothing and outlier columns: hand values, exact search, less error."""

from itertools import product

import pytest
import torch

from slimlab.config import InputError
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_compensate import (
    compensated_rounding,
    outlier_columns,
    output_error,
    smoothing_factors,
)
from slimlab.slim.quantize_layers import Int8Linear, QuantizedWeight
from slimlab.slim.quantize_maps import Quantized, quantize


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares_of(x):
    return x.double().t() @ x.double()


def correlated(rows, columns, seed=0):
    return numbers(rows, columns, seed=seed) @ numbers(columns, columns, seed=seed + 1)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_compensated_rounding_loses_less_of_the_output(bits, symmetric, granularity):
    scheme = QuantScheme(bits, symmetric, granularity, 16 if granularity == "group" else None)
    weight, squares = numbers(24, 48), squares_of(correlated(200, 48, seed=2))
    nearest = output_error(weight, quantize(weight, scheme), squares)
    moved = compensated_rounding(weight, squares, scheme)
    assert output_error(weight, moved, squares) < 0.9 * nearest
    assert moved.integers.dtype == quantize(weight, scheme).integers.dtype
    assert scheme.lowest <= moved.integers.min() <= moved.integers.max() <= scheme.highest


def test_inputs_without_correlation_leave_rounding_to_the_nearest():
    weight = numbers(6, 12)
    for granularity, size in (("channel", None), ("group", 4)):
        scheme = QuantScheme(3, False, granularity, size)
        found = compensated_rounding(weight, torch.eye(12), scheme)
        assert torch.equal(found.integers, quantize(weight, scheme).integers)
        assert torch.equal(found.scale, quantize(weight, scheme).scale)


def test_each_column_moves_the_later_ones_to_their_best_values():
    # After each column, the rest is the least-squares answer given what is rounded already.
    weight, x = numbers(1, 5), correlated(50, 5, seed=4)
    squares, scheme = squares_of(x), QuantScheme(2)
    found = compensated_rounding(weight, squares, scheme, damping=1e-9)
    scale = found.scale.item()
    target, done = weight.double(), []
    for column in range(5):
        rest = squares[column:, column:]
        past = torch.tensor(done, dtype=torch.float64) - target[0, :column]
        best = target[0, column:] - torch.linalg.solve(rest, squares[column:, :column] @ past)
        done.append((best[0] / scale).round().clamp(-1, 1).item() * scale)
    assert found.dequantize()[0].tolist() == pytest.approx(done)


def test_the_best_of_all_roundings_is_not_far_better():
    weight, squares, scheme = numbers(1, 6), squares_of(correlated(50, 6, seed=2)), QuantScheme(2)
    found = compensated_rounding(weight, squares, scheme)
    nearest = output_error(weight, quantize(weight, scheme), squares)
    every = torch.tensor(list(product((-1, 0, 1), repeat=6)), dtype=torch.int8)
    tried = [Quantized(one[None], found.scale, None, scheme) for one in every]
    best = min(output_error(weight, one, squares) for one in tried)
    assert best <= output_error(weight, found, squares) <= nearest


def test_columns_that_were_never_used_are_rounded_to_the_nearest():
    x = correlated(40, 8, seed=3)
    x[:, 5] = 0
    weight, scheme = numbers(4, 8), QuantScheme(4)
    found = compensated_rounding(weight, squares_of(x), scheme)
    assert torch.equal(found.integers[:, 5], quantize(weight, scheme).integers[:, 5])
    assert compensated_rounding(weight, torch.zeros(8, 8), scheme).scale.isfinite().all()


def test_constant_and_zero_rows_stay_what_they_are():
    weight = torch.stack([torch.zeros(8), torch.full((8,), 0.3)])
    squares = squares_of(correlated(40, 8))
    for symmetric in (True, False):
        found = compensated_rounding(weight, squares, QuantScheme(4, symmetric)).dequantize()
        assert torch.equal(found[0], weight[0])
        assert torch.allclose(found[1], weight[1], rtol=1e-5)


def test_output_error_is_that_of_the_outputs():
    weight, x = numbers(5, 8), numbers(30, 8, seed=1)
    rounded = quantize(weight, QuantScheme(3))
    wanted = (x @ (weight - rounded.dequantize()).t()).norm() / (x @ weight.t()).norm()
    assert output_error(weight, rounded, squares_of(x)) == pytest.approx(wanted.item(), rel=1e-4)
    assert output_error(weight, rounded, torch.zeros(8, 8)) == 0.0


def test_smoothing_factors_are_those_by_hand():
    weight = torch.tensor([[1.0, -4.0, 0.0, 2.0]])
    found = smoothing_factors(torch.tensor([4.0, 16.0, 5.0, 0.0]), weight)
    assert found.tolist() == [2.0, 2.0, 1.0, 1.0]
    whole = smoothing_factors(torch.tensor([4.0, 16.0, 5.0, 0.0]), weight, strength=1)
    assert whole.tolist() == [4.0, 16.0, 1.0, 1.0]


def test_smoothing_and_outliers_both_rescue_int8_from_loud_columns():
    weight, x = numbers(64, 128), numbers(40, 128, seed=1)
    x[:, [3, 77]] *= 100
    exact = x @ weight.t()
    loudest = x.abs().amax(dim=0)

    def lost(layer):
        return ((layer(x) - exact).norm() / exact.norm()).item()

    plain = lost(Int8Linear(QuantizedWeight(quantize(weight, QuantScheme()))))
    factors = smoothing_factors(loudest, weight)
    smooth = QuantizedWeight(quantize(weight * factors, QuantScheme()))
    assert lost(Int8Linear(smooth, smoothing=factors)) < 0.7 * plain
    places = outlier_columns(loudest)
    assert places.tolist() == [3, 77]
    rest = QuantizedWeight(quantize(weight.index_fill(1, places, 0.0), QuantScheme()))
    assert lost(Int8Linear(rest, outliers=places, outlier_weight=weight[:, places])) < 0.2 * plain


def test_what_does_not_fit_is_refused():
    weight, scheme = numbers(4, 8), QuantScheme(4)
    with pytest.raises(InputError, match=r"squares \(8, 8\)"):
        compensated_rounding(weight, torch.eye(4), scheme)
    with pytest.raises(InputError, match="64 of 64 are NaN"):
        compensated_rounding(weight, torch.full((8, 8), float("nan")), scheme)
    with pytest.raises(InputError, match="1 of 32 are NaN"):
        compensated_rounding(weight.index_fill(0, torch.tensor([0]), 1.0).masked_fill(
            torch.arange(32).view(4, 8) == 9, float("nan")), torch.eye(8), scheme)  # fmt: skip
    with pytest.raises(InputError, match="nearest that divides is 4"):
        compensated_rounding(weight, torch.eye(8), QuantScheme(4, True, "group", 5))
    with pytest.raises(InputError, match="damping"):
        compensated_rounding(weight, torch.eye(8), scheme, damping=0)
    with pytest.raises(InputError, match=r"\(8, 8\) that have no inverse with damping = 0.01"):
        compensated_rounding(weight, -torch.eye(8), scheme)
    with pytest.raises(InputError, match="strength"):
        smoothing_factors(torch.ones(8), weight, strength=1.5)
    with pytest.raises(InputError, match=r"column_max \(8,\)"):
        smoothing_factors(torch.ones(7), weight)
    with pytest.raises(InputError, match="threshold"):
        outlier_columns(torch.ones(8), threshold=0)
