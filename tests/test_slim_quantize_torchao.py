"""Beside torchao, where it is installed: the same integers, scales and zero points."""

import warnings

import pytest
import torch
from torch import nn

from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_maps import quantize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # kernels for a GPU that are not there
    REASON = "torchao is no requirement; pip install torchao to compare with it"
    torchao = pytest.importorskip("torchao", reason=REASON)
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_,
        quantize_affine,
    )


def weight_of():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_integers_scales_and_zero_points_are_those_of_torchao(bits, symmetric, granularity):
    size = 16 if granularity == "group" else None
    scheme, x = QuantScheme(bits, symmetric, granularity, size), weight_of()
    ours = quantize(x, scheme)
    block = {"tensor": (8, 64), "channel": (1, 64), "group": (1, 16)}[granularity]
    kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    dtype = torch.int8 if symmetric else torch.uint8
    ends = scheme.lowest, scheme.highest
    scale, zero = choose_qparams_affine(x, kind, block, dtype, *ends, zero_point_dtype=torch.int32)
    theirs = quantize_affine(x, block, scale, zero, dtype, *ends)
    assert torch.allclose(scale.flatten(), ours.scale.flatten(), rtol=1e-6, atol=0)
    if not symmetric:
        assert torch.equal(zero.flatten().int(), ours.zero_point.flatten().int())
    assert torch.equal(theirs, ours.integers)
    meant = dequantize_affine(theirs, block, scale, zero, dtype, *ends)
    assert torch.allclose(meant, ours.dequantize(), rtol=1e-5, atol=1e-6)


def test_a_model_that_multiplies_in_int8_is_as_near_as_torchaos():
    draw = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    x = torch.randn(16, 64, generator=draw)
    with torch.no_grad():
        true = model(x)
        ours = quantize_model(model, activations="dynamic")(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantize_(model, Int8DynamicActivationInt8WeightConfig())
        theirs = model(x)
    off, their_off, apart = (
        float((one - other).norm() / true.norm())
        for one, other in ((ours, true), (theirs, true), (ours, theirs))
    )
    assert their_off < 0.03
    assert off < 1.2 * their_off
    assert apart < 0.03
