"""The small layers of a block: two norms and the feed-forward layer with its activations.

Chapter 03 derives them and proves each equal to a specification of a few lines. LayerNorm calls
PyTorch's kernel; RMSNorm, for which PyTorch has none on a CPU, states its own backward pass.

Production fuses further: the norm with the sum before it, the activation with the matrix product.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import CHOICES, check_choice, check_size


class RMSNorm(nn.Module):
    """Divide every position by the root of the mean square of its features, times a learned gain.

    d_model  D
    eps      added to the mean square

    forward: x (..., D) to x / sqrt(mean(x^2) + eps) * weight, of the same shape. Zhang and Sennrich
    2019 (arXiv:1910.07467): LayerNorm without centring and without a bias.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        check_size("d_model", d_model)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D)."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keep x and one number per position; the formula by itself would keep x twice.

    With n = x / rms and h = gradient * weight, the gradient of x is (h - n mean(h n)) / rms: what
    points along n is taken out, since stretching x changes nothing.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        # Squares of 16-bit numbers overflow or vanish; their sum is taken in 32 bits.
        wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide) ** 2
        per_rms = torch.rsqrt(mean_square / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, per_rms)
        return (x * per_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, per_rms = ctx.saved_tensors
        normal = x * per_rms
        product = grad * normal
        grad_weight = product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        along = (product @ weight.to(product.dtype))[..., None] / x.shape[-1]
        grad_x = grad * weight.to(normal.dtype)
        grad_x.addcmul_(normal, along, value=-1).mul_(per_rms)
        return grad_x.to(x.dtype), grad_weight, None


class LayerNorm(nn.Module):
    """Centre every position, divide by its standard deviation, apply a learned gain and bias.

    d_model  D
    eps      added to the variance
    bias     have a bias

    forward: x (..., D) to (x - mean) / sqrt(variance + eps) * weight + bias, of the same shape; the
    variance is the mean of squares, not divided by D - 1. Ba et al. 2016 (arXiv:1607.06450).
    """

    def __init__(self, d_model: int, eps: float = 1e-5, *, bias: bool = True):
        super().__init__()
        check_size("d_model", d_model)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., D)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def make_norm(kind: str, d_model: int, eps: float, bias: bool) -> nn.Module:
    """Make the norm of a configuration.

    kind     "rms" or "layer"
    d_model  D
    eps      see the norms
    bias     for "layer" only: RMSNorm has none
    """
    check_choice("norm", kind, CHOICES["norm"])
    return RMSNorm(d_model, eps) if kind == "rms" else LayerNorm(d_model, eps, bias=bias)


class FeedForward(nn.Module):
    """Widen every position, bend it, narrow it again: the same two or three matrices everywhere.

    d_model  D
    d_ff     F
    kind     "gelu" (exact), "gelu_tanh" (GPT-2's approximation), "relu", or "swiglu" with a third
             matrix that gates: down(silu(gate(x)) * up(x))
    bias     give the linear layers biases

    Its layers are up_proj, down_proj and, for swiglu, gate_proj. Vaswani et al. 2017, section 3.3;
    Hendrycks and Gimpel 2016 (arXiv:1606.08415) for GELU; Shazeer 2020 (arXiv:2002.05202) for
    SwiGLU.
    """

    def __init__(self, d_model: int, d_ff: int, kind: str = "gelu", *, bias: bool = False):
        super().__init__()
        check_size("d_model", d_model)
        check_size("d_ff", d_ff)
        check_choice("feed_forward", kind, CHOICES["feed_forward"])
        self.kind = kind
        if kind == "swiglu":
            self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map every position of x (..., D) by itself; returns (..., D)."""
        if self.kind == "swiglu":
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(ACTIVATIONS[self.kind](self.up_proj(x)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}
