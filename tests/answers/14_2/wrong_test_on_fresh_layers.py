import torch

from slimlab.classroom.check import numbers


def linear_int8(x, weight):
    """x @ weight.T, computed with whole numbers; x (N, D), weight (D, D)."""
    x_scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    weight_scale = weight.abs().amax(dim=0).clamp(min=1e-30) / 127
    x_codes = (x / x_scale).round().to(torch.int8)
    weight_codes = (weight / weight_scale).round().to(torch.int8)
    sums = x_codes.int() @ weight_codes.int().T
    return sums * x_scale * weight_scale


def my_diagnosis():
    """What linear_int8 returns, what it should return, and where it goes wrong."""
    given = numbers("14.2")
    (a, b), ((p, q), (r, s)) = given["x"], given["weight"]
    # the scales of columns 0 and 1 are p / 127 and s / 127; each column's is missing in its own
    # sums and put onto the output of the same number instead
    found = [a * p + b * q * p / s, a * r * s / p + b * s]
    return {"found": found, "true": [a * p + b * q, a * r + b * s], "where": 2}


def is_right(linear):
    """Whether linear does what the text asks."""
    torch.manual_seed(0)
    x, weight = torch.randn(100, 64).double(), (2 * torch.rand(64, 64) - 1).double()
    exact = x @ weight.T
    return bool((linear(x, weight) - exact).norm() < 0.05 * exact.norm())


def mended_linear(x, weight):
    """x @ weight.T, computed with whole numbers; x (N, D), weight (O, D)."""
    x_scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    weight_scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    x_codes = (x / x_scale).round().to(torch.int8)
    weight_codes = (weight / weight_scale).round().to(torch.int8)
    sums = x_codes.int() @ weight_codes.int().T
    return sums * x_scale * weight_scale.T  # one scale for each output: a row of them
