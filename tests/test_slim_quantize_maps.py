"""Maps to integers: hand values, torch's own fake quantization and observers, half a step."""

import pytest
import torch
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from slimlab.config import InputError
from slimlab.plan.quantized_size import BITS, QuantScheme, bits_per_number
from slimlab.slim.quantize_maps import fake_quantize, find_map, quantize, range_of

SCHEMES = [
    QuantScheme(bits, symmetric, granularity, 8 if granularity == "group" else None, scales)
    for bits in BITS
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "group")
    for scales in ("float32", "bfloat16")
]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps(quantized):
    """The step of every number."""
    shape = quantized.integers.shape
    columns = shape[-1] // quantized.scale.shape[-1]
    return quantized.scale.repeat_interleave(columns, dim=-1).expand(shape)


def test_symmetric_integers_are_those_by_hand():
    x = torch.tensor([[-1.0, 0.25, 0.5, 7.0], [0.0, 0.0, 0.0, 0.0]])
    found = quantize(x, QuantScheme(4))
    assert found.scale.tolist() == [[1.0], [1.0]]
    assert found.integers.tolist() == [[-1, 0, 0, 7], [0, 0, 0, 0]]  # 0.5 goes to the even integer
    assert found.zero_point is None


def test_asymmetric_integers_are_those_by_hand():
    found = quantize(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), QuantScheme(2, symmetric=False))
    assert (found.scale.item(), found.zero_point.item()) == (1.0, 1)
    assert found.integers.tolist() == [[0, 1, 2, 3]]
    assert found.dequantize().tolist() == [[-1.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_number_moves_by_more_than_half_a_step(scheme):
    x = numbers(6, 32) * torch.logspace(-3, 3, 6)[:, None]
    x[3] += 100  # a row far from 0
    found = quantize(x, scheme)
    error = (found.dequantize() - x).abs()
    assert (error <= steps(found) * 0.5 + x.abs() * 1e-6).all()
    assert int(found.integers.min()) >= scheme.lowest
    assert int(found.integers.max()) <= scheme.highest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_was_quantized_is_quantized_to_itself(scheme):
    x = numbers(5, 24)
    low, high = range_of(x, scheme)
    once = quantize(x, scheme, low, high)
    again = quantize(once.dequantize(), scheme, low, high)
    assert torch.equal(once.integers, again.integers)
    assert torch.equal(once.dequantize(), again.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("constant", [3.7, -0.02, 0.0, 1e-44, 3e38])
def test_a_constant_channel_keeps_its_value(scheme, constant):
    x = torch.full((2, 8), constant)
    found = quantize(x, scheme).dequantize()
    assert found.isfinite().all()
    near = 2**-7 if scheme.scale_dtype == "bfloat16" else 1e-6
    assert torch.allclose(found, x, rtol=near, atol=2e-38)
    if constant == 0:
        assert torch.equal(found, x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantization_is_that_of_torch_with_its_gradient(bits, symmetric):
    scheme = QuantScheme(bits, symmetric)
    x = numbers(16, 40).requires_grad_()
    low, high = (0.6 * one for one in range_of(x, scheme))  # some numbers are clipped
    scale, zero_point = find_map(low, high, scheme)
    zeros = torch.zeros(16) if zero_point is None else zero_point.view(-1)
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale.view(-1), zeros.to(torch.int32), 0, scheme.lowest, scheme.highest
    )
    (wanted,) = torch.autograd.grad((theirs * theirs.detach().sin()).sum(), x)
    ours = fake_quantize(x, scheme, low, high)
    (found,) = torch.autograd.grad((ours * theirs.detach().sin()).sum(), x)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(found, wanted)
    assert 0 < (found == 0).sum() < found.numel()


def test_asymmetric_maps_are_those_of_torchs_observers():
    x = numbers(12, 20) + 0.3
    whole = MinMaxObserver(torch.quint8, torch.per_tensor_affine)
    whole(x)
    scale, zero_point = find_map(
        *range_of(x, QuantScheme(8, False, "tensor")), QuantScheme(8, False, "tensor")
    )
    wanted = whole.calculate_qparams()
    assert torch.allclose(scale.view(1), wanted[0], rtol=1e-6)
    assert torch.equal(zero_point.view(1).int(), wanted[1].int())
    rows = PerChannelMinMaxObserver(0, torch.quint8, torch.per_channel_affine)
    rows(x)
    scale, zero_point = find_map(*range_of(x, QuantScheme(8, False)), QuantScheme(8, False))
    wanted = rows.calculate_qparams()
    assert torch.allclose(scale.view(-1), wanted[0], rtol=1e-6)
    assert torch.equal(zero_point.view(-1).int(), wanted[1].int())


def test_one_loud_row_ruins_the_scale_of_a_tensor_and_not_that_of_channels():
    x = numbers(64, 64)
    x[0] *= 100
    parts = {}
    for granularity in ("tensor", "channel"):
        found = quantize(x, QuantScheme(8, True, granularity)).dequantize()
        parts[granularity] = ((found - x)[1:].norm() / x[1:].norm()).item()
    assert parts["tensor"] > 0.2
    assert parts["channel"] < 0.01


def test_positive_numbers_cost_a_quarter_of_the_squared_error_with_a_zero_point():
    x = numbers(64, 64).relu()
    error = {
        symmetric: (quantize(x, QuantScheme(8, symmetric, "tensor")).dequantize() - x).square()
        for symmetric in (True, False)
    }
    kept = x > 0
    assert 0.2 < error[False][kept].mean() / error[True][kept].mean() < 0.3


def test_scales_cost_bits():
    assert bits_per_number((16, 64), QuantScheme(4, True, "group", 32, "bfloat16")) == 4.5
    assert bits_per_number((16, 64), QuantScheme(8)) == 8.5
    assert bits_per_number((16, 64), QuantScheme(3, False, "group", 16)) == 3 + 40 / 16


@pytest.mark.parametrize("bits", [16, 5, 1, 0, True, 4.0, "8"])
def test_a_width_that_is_not_offered_is_refused(bits):
    with pytest.raises(InputError, match="one of 8, 4, 3, 2"):
        QuantScheme(bits)


def test_the_message_about_16_bits_says_that_it_is_a_cast():
    with pytest.raises(InputError, match="nearest is 8; 16 bits is a cast"):
        QuantScheme(16)


def test_groups_that_do_not_divide_are_refused_with_the_nearest_that_do():
    with pytest.raises(InputError, match="nearest that divides is 24"):
        quantize(numbers(2, 48), QuantScheme(4, True, "group", 32))
    with pytest.raises(InputError, match="granularity"):
        QuantScheme(4, quant_group_size=32)
    with pytest.raises(InputError, match="quant_group_size"):
        QuantScheme(4, granularity="group")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_counted_and_refused(bad):
    x = numbers(3, 8)
    x[1, 2] = bad
    with pytest.raises(InputError, match="1 of 24 are NaN or infinite"):
        quantize(x, QuantScheme())


def test_an_empty_tensor_is_refused():
    with pytest.raises(InputError, match=r"shape \(0, 4\)"):
        quantize(torch.empty(0, 4), QuantScheme())
