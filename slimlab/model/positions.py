"""Where a token stands: sinusoidal positions to add, rotary positions to turn with.

Chapter 03 shows that attention without positions cannot tell an order from another, and that
rotary scores depend on distances only. Learned positions need no code: they are a table like the
tokens' own.

Production keeps cosines and sines between calls, fuses the turn into the attention kernel, and
stretches the angles for texts longer than those of the training (YaRN and its kin); neither here.
"""

import torch
from torch import Tensor

from slimlab.config import CHOICES, check_choice, check_divides, check_size, require


def sinusoidal_positions(
    num_positions: int, d_model: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute the table of Vaswani et al.: sines and cosines of geometrically falling frequency.

    num_positions  rows, one per position from 0
    d_model        D, even
    dtype          floating type of the table
    returns        (num_positions, D); columns 2i and 2i+1 are the sine and the cosine of
                   position / 10000^(2i/D)

    Raises InputError for an odd d_model. Vaswani et al. 2017, section 3.5.
    """
    check_size("num_positions", num_positions)
    check_size("d_model", d_model)
    check_divides("two", 2, "d_model", d_model)
    angles = rotary_angles(torch.arange(num_positions), d_model)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(dtype)


def rotary_angles(positions: Tensor, d_head: int, base: float = 10000.0) -> Tensor:
    """Compute by how much each pair of features turns at each position.

    positions  (T,) or (B, T) whole numbers
    d_head     E, even
    base       the slowest pair needs almost 2 pi base positions for a full turn
    returns    (T, E/2) or (B, T, E/2) radians, float32: position * base^(-2i/E) for pair i

    Su et al. 2021 (arXiv:2104.09864), section 3.2.2.
    """
    # float64: a position of 100 000 in float32 would leave an angle wrong in its third decimal.
    pairs = torch.arange(0, d_head, 2, device="cpu", dtype=torch.float64)
    frequencies = (base ** (-pairs / d_head)).to(positions.device, torch.float32)
    return positions[..., None].float() * frequencies


def rotate(x: Tensor, angles: Tensor, layout: str = "half") -> Tensor:
    """Turn every pair of features of x by its angle.

    x        (B, H, T, E) queries or keys
    angles   (T, E/2), or (B, T, E/2) if sequences have positions of their own; from rotary_angles
    layout   "half": pair i is features i and i + E/2 (as in the checkpoints that `transformers`
             reads); "interleaved": features 2i and 2i+1 (as in the paper and in Meta's own files).
             The two differ by an order of the features, so weights of one do not fit the other.
    returns  (B, H, T, E), rows of unchanged length; <rotate(q), rotate(k)> depends on the
             positions of q and k by their difference only

    Raises InputError for an unknown layout or angles of another size.
    """
    check_choice("layout", layout, CHOICES["rotary_layout"])
    require(
        angles.shape[-1] * 2 == x.shape[-1] and angles.shape[-2] == x.shape[-2],
        f"angles ({x.shape[-2]}, {x.shape[-1] // 2}): one per position and pair of features",
        f"angles {tuple(angles.shape)} for x {tuple(x.shape)}",
        "make them with rotary_angles(positions, d_head), a position for every row of x",
    )
    if angles.dim() == 3:
        angles = angles[:, None]  # the same for every head
    return _Turn.apply(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), layout)


class _Turn(torch.autograd.Function):
    """Turn pairs of features; the gradient is turned back, and needs nothing of x.

    The result lies in memory as x does, so that heads cut from one row are merged without a copy.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, layout):
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _turn(x, cos, sin, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.layout), None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    turned = torch.empty_like(x)
    (first, second), (new_first, new_second) = (_pairs(one, layout) for one in (x, turned))
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    return turned


def _pairs(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    if layout == "half":
        return x.chunk(2, dim=-1)
    return x[..., 0::2], x[..., 1::2]
