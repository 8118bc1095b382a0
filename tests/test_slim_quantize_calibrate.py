"""Ranges of activations: what was seen, torch's observers, and the least error by search."""

import pytest
import torch
from torch import nn
from torch.ao.quantization.observer import HistogramObserver, MinMaxObserver

from slimlab.config import InputError
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_calibrate import METHODS, choose_range, record_inputs
from slimlab.slim.quantize_maps import quantize

WHOLE = QuantScheme(8, False, "tensor")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error_of(values, ends, scheme):
    low, high = (torch.tensor([one]) for one in ends)
    return (quantize(values, scheme, low, high).dequantize() - values).square().mean().item()


def test_what_went_into_every_layer_is_recorded():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).train()
    batches = [numbers(3, 5, 4), numbers(2, 4, seed=1)]
    records = record_inputs(model, batches, squares=True, max_rows=8)
    seen = torch.cat([batches[0].view(-1, 4), batches[1]])
    assert list(records) == ["0", "2"]
    first = records["0"]
    assert (first.low, first.high, first.num_rows) == (seen.min(), seen.max(), 17)
    assert torch.equal(first.column_max, seen.abs().amax(dim=0))
    assert torch.allclose(first.squares, (seen.double().t() @ seen.double()))
    assert torch.equal(first.rows, torch.cat([seen[:4], seen[15:]]))
    later = model[1](model[0](seen))
    assert torch.allclose(records["2"].column_max, later.abs().amax(dim=0))
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_a_model_that_fails_keeps_no_hooks():
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(RuntimeError):
        record_inputs(model, [numbers(2, 5)])
    assert not model[0]._forward_pre_hooks


def test_dropout_is_off_while_inputs_are_recorded():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 2)).train()
    x = torch.ones(8, 4)
    assert record_inputs(model, [x])["1"].column_max.tolist() == [1.0] * 4


def test_min_max_is_that_of_torchs_observer():
    x = numbers(1000) + 0.3
    observer = MinMaxObserver(torch.quint8)
    observer(x)
    assert choose_range(x, "min_max", WHOLE) == (observer.min_val, observer.max_val)


def test_percentiles_are_those_by_hand_and_of_torch():
    x = torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    assert choose_range(x, "percentile", WHOLE, percentile=90) == (5.0, 95.0)
    assert choose_range(x, "percentile", WHOLE, percentile=100) == (0.0, 100.0)
    x = numbers(10001)
    wanted = torch.quantile(x, torch.tensor([0.005, 0.995])).tolist()
    assert choose_range(x, "percentile", WHOLE, percentile=99) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_range_of_the_least_error_is_at_least_as_good_as_the_others(bits, symmetric):
    scheme = QuantScheme(bits, symmetric, "tensor")
    x = numbers(4000)
    x[0] = 30.0  # an outlier
    error = {one: error_of(x, choose_range(x, one, scheme), scheme) for one in METHODS}
    assert error["mse"] <= error["min_max"]
    if bits < 8:
        assert error["mse"] < 0.7 * error["min_max"]


def test_the_range_of_the_least_error_is_not_worse_than_torchs_search():
    scheme = QuantScheme(4, False, "tensor")
    x = numbers(5000)
    x[0] = 12.0
    observer = HistogramObserver(quant_min=0, quant_max=15, dtype=torch.quint8)
    observer(x)
    scale, zero = observer.calculate_qparams()
    theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), 0, 15)
    theirs = (theirs - x).square().mean().item()
    assert error_of(x, choose_range(x, "mse", scheme), scheme) < 1.05 * theirs


def test_a_constant_sample_has_a_range():
    for method in METHODS:
        assert choose_range(torch.full((5,), 2.0), method, WHOLE) == (2.0, 2.0)
        assert choose_range(torch.zeros(5), method, WHOLE) == (0.0, 0.0)


def test_bad_samples_and_methods_are_refused():
    with pytest.raises(InputError, match="one of min_max, percentile, mse"):
        choose_range(numbers(3), "entropy", WHOLE)
    with pytest.raises(InputError, match="none"):
        choose_range(torch.empty(0), "min_max", WHOLE)
    with pytest.raises(InputError, match="1 of 3 are NaN"):
        choose_range(torch.tensor([1.0, float("nan"), 2.0]), "mse", WHOLE)
    for percentile in (50, 101, float("nan")):
        with pytest.raises(InputError, match="percentile"):
            choose_range(numbers(3), "percentile", WHOLE, percentile=percentile)
    with pytest.raises(InputError, match="granularity"):
        choose_range(numbers(3), "mse", QuantScheme())
    with pytest.raises(InputError, match="at least one batch"):
        record_inputs(nn.Linear(2, 2), [])
    with pytest.raises(InputError, match="the input of the layer: 4 of 4"):
        record_inputs(nn.Linear(2, 2), [torch.full((2, 2), float("inf"))])
