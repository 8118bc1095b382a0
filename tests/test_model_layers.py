"""Norms and feed-forward layers against the formulas written out in float64."""

import math

import pytest
import torch

from slimlab.config import InputError
from slimlab.model.layers import FeedForward, LayerNorm, RMSNorm, make_norm


def test_rms_norm_divides_by_the_root_of_the_mean_square():
    torch.manual_seed(0)
    norm, x = RMSNorm(5, 0.1).double(), torch.randn(2, 3, 5, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    for row in range(2):
        for place in range(3):
            v = x[row, place].tolist()
            size = math.sqrt(sum(one**2 for one in v) / 5 + 0.1)
            expected = [one / size * gain for one, gain in zip(v, norm.weight.tolist())]
            assert norm(x)[row, place].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_centres_and_divides_by_the_deviation_without_correction(bias):
    torch.manual_seed(0)
    norm, x = LayerNorm(5, 0.1, bias=bias).double(), torch.randn(2, 5, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    expected = expected + norm.bias if bias else expected
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert (norm.bias is not None) == bias


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("kind", "bend"), [("gelu", gelu), ("gelu_tanh", gelu_tanh), ("relu", lambda x: max(x, 0.0))]
)
@pytest.mark.parametrize("bias", [True, False])
def test_two_matrices_with_a_bend_between_them(kind, bend, bias):
    torch.manual_seed(0)
    layer, x = FeedForward(3, 7, kind, bias=bias).double(), torch.randn(2, 3, dtype=torch.float64)
    wide = x @ layer.up_proj.weight.T + (layer.up_proj.bias if bias else 0)
    bent = torch.tensor([[bend(v) for v in row] for row in wide.tolist()], dtype=torch.float64)
    expected = bent @ layer.down_proj.weight.T + (layer.down_proj.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_swiglu_gates_with_a_third_matrix():
    torch.manual_seed(0)
    layer, x = FeedForward(3, 7, "swiglu").double(), torch.randn(2, 3, dtype=torch.float64)
    gate = x @ layer.gate_proj.weight.T
    expected = (gate * gate.sigmoid() * (x @ layer.up_proj.weight.T)) @ layer.down_proj.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert len(list(layer.parameters())) == 3


def test_the_norm_of_a_name_and_unknown_names():
    assert isinstance(make_norm("rms", 4, 1e-5, True), RMSNorm)
    assert make_norm("layer", 4, 1e-5, False).bias is None
    with pytest.raises(InputError, match="rms, layer"):
        make_norm("batch", 4, 1e-5, True)
    with pytest.raises(InputError, match="swiglu"):
        FeedForward(4, 8, "geglu")
    with pytest.raises(InputError, match="d_ff"):
        FeedForward(4, 0)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_the_gradient_of_rms_norm_is_that_of_finite_differences(shape):
    torch.manual_seed(0)
    norm = RMSNorm(5, 0.1).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def call(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, (x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_adds_up_16_bit_squares_in_32_bits(dtype):
    x = torch.full((1, 64), 300.0, dtype=dtype)  # 300^2 is beyond float16
    norm = RMSNorm(64, 1e-5).to(dtype)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x), torch.ones_like(x))
    small = torch.full((1, 64), 1e-4, dtype=dtype)
    expected = 1e-4 / math.sqrt(1e-8 + 1e-5)
    # 16-bit numbers have 8 or 11 significant bits.
    assert norm(small)[0, 0].item() == pytest.approx(expected, rel=0.02)
