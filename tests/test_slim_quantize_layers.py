"""Layers of integers: equal to the floats they stand for, exact sums, torch's own as an oracle."""

import pytest
import torch
from torch.nn import functional as F

from slimlab.config import InputError
from slimlab.plan.quantized_size import BITS, QuantScheme
from slimlab.slim.quantize_layers import (
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    multiply,
)
from slimlab.slim.quantize_maps import quantize

SCHEMES = [
    QuantScheme(bits, symmetric, granularity, 12 if granularity == "group" else None)
    for bits in BITS
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "group")
]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EIGHT = QuantScheme()


def held(weight, scheme=EIGHT):
    return QuantizedWeight(quantize(weight, scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_only_layer_is_the_linear_layer_of_its_dequantized_weight(scheme):
    weight, bias, x = numbers(10, 36), numbers(10, seed=1), numbers(2, 3, 36, seed=2)
    layer = QuantizedLinear(held(weight, scheme), bias)
    assert torch.equal(layer(x), F.linear(x, quantize(weight, scheme).dequantize(), bias))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_embedding_looks_up_rows_of_the_dequantized_table(scheme):
    table, ids = numbers(11, 36), torch.tensor([[3, 0, 10], [3, 3, 7]])
    found = QuantizedEmbedding(held(table, scheme))(ids)
    assert torch.equal(found, quantize(table, scheme).dequantize()[ids])
    assert QuantizedEmbedding(held(table, scheme))(ids[:0]).shape == (0, 3, 36)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_layer_holds_the_packed_bytes_and_no_floats_beside_them(scheme):
    layer = QuantizedLinear(held(numbers(16, 48), scheme))
    packed = 16 * 48 * scheme.num_bits // 8
    scales = layer.table.scale.numel() * (4 if scheme.symmetric else 5)
    assert sum(one.nbytes for one in layer.buffers()) == packed + scales
    assert list(layer.parameters()) == []


@pytest.mark.parametrize("num_rows", [0, 1, 3, 17])
@pytest.mark.parametrize("num_columns", [1, 2, 7, 64, 100])
def test_integer_products_are_exact(num_rows, num_columns):
    draw = torch.Generator().manual_seed(0)
    for num_outputs in (1, 5, 16):
        x = torch.randint(-128, 128, (num_rows, num_columns), generator=draw).to(torch.int8)
        w = torch.randint(-127, 128, (num_outputs, num_columns), generator=draw).to(torch.int8)
        found = multiply(x, w)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), x.long() @ w.long().t())


def test_sums_of_the_largest_products_are_exact():
    x = torch.full((2, 4096), -128, dtype=torch.int8)
    w = torch.full((3, 4096), 127, dtype=torch.int8)
    assert multiply(x, w).unique().tolist() == [-128 * 127 * 4096]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("shape", [(1, 40), (2, 5, 40), (40,)])
def test_an_int8_layer_is_the_product_of_what_both_integers_stand_for(granularity, shape):
    weight, bias, x = numbers(24, 40), numbers(24, seed=1), numbers(*shape, seed=2)
    scheme = QuantScheme(8, True, granularity)
    rows = x.view(-1, 40)
    wanted = quantize(rows, QuantScheme()).dequantize().double()
    wanted = wanted @ quantize(weight, scheme).dequantize().double().t() + bias
    found = Int8Linear(held(weight, scheme), bias)(x)
    assert found.shape == (*shape[:-1], 24)
    assert torch.allclose(found.view(-1, 24).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_an_int8_layer_with_a_fixed_range_is_torchs_own_quantized_linear():
    weight, x = numbers(24, 40), numbers(7, 40, seed=2) + 0.5
    low, high = -1.5, 2.0  # some inputs are clipped
    layer = Int8Linear(held(weight), input_range=(low, high))
    inputs = torch.quantize_per_tensor(
        x, layer.input_scale.item(), int(layer.input_zero_point), torch.quint8
    )
    theirs = torch.quantize_per_channel(
        weight, layer.table.scale.view(-1), torch.zeros(24, dtype=torch.int64), 0, torch.qint8
    )
    packed = torch.ops.quantized.linear_prepack(theirs, None)
    step = 0.15
    wanted = torch.ops.quantized.linear(inputs, packed, step, 128).int_repr().float() - 128
    found = (layer(x) / step).round().clamp(-128, 127)
    assert (found - wanted).abs().max() <= 1  # a tie
    assert (found == wanted).float().mean() > 0.99
    assert (x < low).any()
    assert (x > high).any()


def test_the_error_of_8_bits_on_both_sides_is_about_one_part_in_a_hundred():
    weight, x = numbers(256, 512), numbers(16, 512, seed=1)
    exact = F.linear(x, weight)
    part = ((Int8Linear(held(weight))(x) - exact).norm() / exact.norm()).item()
    assert 0.001 < part < 0.02


def test_rows_of_zeros_and_tiny_rows_give_finite_outputs():
    x = torch.zeros(3, 8)
    x[1] = 1e-44
    bias = numbers(4, seed=1)
    found = Int8Linear(held(numbers(4, 8)), bias)(x)
    assert torch.equal(found[0], bias)
    assert torch.allclose(found, bias.expand(3, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_inputs_do_not_become_good_outputs(bad):
    x = numbers(2, 8)
    x[1, 3] = bad
    found = Int8Linear(held(numbers(4, 8)))(x)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()
    with pytest.raises(InputError, match="1 of 16 are NaN"):
        Int8Linear(held(numbers(4, 8)), input_range=(-1, 1))(x)


def test_outlier_columns_are_multiplied_in_floats():
    weight, x = numbers(16, 32), numbers(5, 32, seed=1)
    x[:, 7] *= 200
    places = torch.tensor([7])
    rest = weight.index_fill(1, places, 0.0)
    apart = Int8Linear(held(rest), outliers=places, outlier_weight=weight[:, places])
    exact = F.linear(x, weight)
    loud = (Int8Linear(held(weight))(x) - exact).norm()
    assert (apart(x) - exact).norm() < loud / 20


def test_smoothing_divides_the_input_by_what_the_weight_was_multiplied_with():
    weight, x = numbers(16, 32), numbers(5, 32, seed=1)
    factors = 2.0 ** torch.arange(32).remainder(5)
    smooth = Int8Linear(held(weight * factors), smoothing=factors)
    plain = Int8Linear(held(weight * factors))
    assert torch.equal(smooth(x), plain(x / factors))


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        (QuantScheme(4), {}, "8 bits"),
        (QuantScheme(8, False), {}, "symmetric weight"),
        (QuantScheme(8, True, "group", 4), {}, "scale per channel"),
        (QuantScheme(), {"input_range": (1.0, -1.0)}, "in this order"),
        (QuantScheme(), {"input_range": (0.0, float("nan"))}, "high"),
        (QuantScheme(), {"smoothing": torch.zeros(8)}, "above 0"),
        (QuantScheme(), {"smoothing": torch.ones(7)}, r"\(7,\)"),
        (QuantScheme(), {"outliers": torch.tensor([1])}, r"\(4, 1\)"),
    ],
)
def test_what_does_not_fit_an_int8_layer_is_refused(scheme, options, message):
    with pytest.raises(InputError, match=message):
        Int8Linear(held(numbers(4, 8), scheme), **options)


def test_inputs_of_another_width_and_weights_that_are_no_matrices_are_refused():
    for layer in (Int8Linear(held(numbers(4, 8))), QuantizedLinear(held(numbers(4, 8)))):
        with pytest.raises(InputError, match=r"x \(\.\.\., 8\)"):
            layer(numbers(2, 4))
    with pytest.raises(InputError, match="a matrix"):
        held(numbers(4))
