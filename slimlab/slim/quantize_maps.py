"""Maps from numbers to a few integers and back: x is about scale * (q - zero_point).

QuantScheme (slimlab.plan.quantized_size) says which map; here its scale is found, numbers are
rounded to the nearest integer, and a pass with a gradient pretends to do so in training. Chapter
14 shows one loud row that ruins the scale of a whole tensor, and what granularity does about it.

Production kernels do the same in registers, with the scale beside the block it belongs to; ties
are rounded to the even integer there as here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlab.config import require
from slimlab.plan.quantized_size import QuantScheme


@dataclass(frozen=True)
class Quantized:
    """A tensor as integers.

    integers    of the tensor's shape; int8 if symmetric, else uint8
    scale       float32, of scheme.scale_shape(integers.shape)
    zero_point  uint8, of the same shape; None if symmetric
    scheme      the map
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: QuantScheme

    def dequantize(self) -> Tensor:
        """Return scale * (q - zero_point), float32, of the tensor's shape."""
        return from_integers(self.integers, self.scale, self.zero_point)


def range_of(x: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Find the least and the greatest number of everything that shares a scale.

    x        any shape, at least one dimension; rows are channels
    scheme   its granularity is read
    returns  low, high, float32, of scheme.scale_shape(x.shape)

    Raises InputError for numbers that are not finite, and for groups that do not divide.
    """
    shape = scheme.scale_shape(tuple(x.shape))
    check_finite(x)
    if scheme.granularity == "tensor":
        low, high = torch.aminmax(x.detach())
    else:
        low, high = torch.aminmax(x.detach().unflatten(-1, (shape[-1], -1)), dim=-1)
    return low.float().view(shape), high.float().view(shape)


def check_finite(x: Tensor, name: str = "the tensor") -> None:
    """Refuse NaN and infinity, which have no place between two integers.

    x     any tensor of numbers
    name  what it is called, for the message
    """
    num_bad = x.numel() - int(torch.isfinite(x).sum())
    require(
        num_bad == 0,
        "finite numbers to quantize",
        f"{name}: {num_bad:,} of {x.numel():,} are NaN or infinite",
        "look for the step in which training diverged, and take a checkpoint from before it",
    )


def find_map(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor | None]:
    """Find the scale and the zero point that cover a range.

    low, high  of one shape; the range is widened to hold 0, which so keeps its exact value
    scheme     the map
    returns    scale, float32 and above 0, and zero_point, uint8, or None if symmetric. A range
               that holds 0 alone has the scale 1: zeros stay zeros.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / scheme.highest
    else:
        scale = high / scheme.highest - low / scheme.highest  # the difference could overflow
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where((low == 0) & (high == 0), torch.ones_like(scale), scale.clamp(min=tiny))
    if scheme.scale_dtype == "bfloat16":
        scale = _round_up_to_bfloat16(scale)
    if scheme.symmetric:
        return scale, None
    return scale, torch.round(-low / scale).clamp(0, scheme.highest).to(torch.uint8)


def _round_up_to_bfloat16(scale: Tensor) -> Tensor:
    # A positive bfloat16 is a float32 whose lower 16 bits are 0; rounded up, no number is clipped.
    return ((scale.contiguous().view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def to_integers(x: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Round numbers to the nearest integer of a map, and clip what lies outside.

    x                  any shape
    scale, zero_point  of find_map
    scheme             the map
    returns            int8 if symmetric, else uint8, of the shape of x
    """
    grouped = x.detach().float().unflatten(-1, (scale.shape[-1], -1))
    places = torch.round(grouped / scale[..., None])
    if zero_point is not None:
        places = places + zero_point[..., None]
    kind = torch.int8 if scheme.symmetric else torch.uint8
    return places.clamp_(scheme.lowest, scheme.highest).to(kind).flatten(-2)


def from_integers(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return scale * (q - zero_point).

    integers           any shape
    scale, zero_point  of find_map
    returns            float32, of the same shape
    """
    places = integers.float().unflatten(-1, (scale.shape[-1], -1))
    if zero_point is not None:
        places = places - zero_point[..., None]
    return (places * scale[..., None].float()).flatten(-2)


def quantize(
    x: Tensor, scheme: QuantScheme, low: Tensor | None = None, high: Tensor | None = None
) -> Quantized:
    """Quantize a tensor by rounding every number to the nearest integer.

    x          any shape, at least one dimension; rows are channels
    scheme     the map
    low, high  the range, of scheme.scale_shape(x.shape), as calibration found it; numbers outside
               are clipped. Without it the range of x, and the error is at most half a step.
    returns    a Quantized

    Raises InputError for numbers that are not finite, and for groups that do not divide.
    """
    own_low, own_high = range_of(x, scheme)
    low = own_low if low is None else low.expand_as(own_low)
    high = own_high if high is None else high.expand_as(own_high)
    scale, zero_point = find_map(low, high, scheme)
    return Quantized(to_integers(x, scale, zero_point, scheme), scale, zero_point, scheme)


def fake_quantize(
    x: Tensor, scheme: QuantScheme, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Round to what the integers could hold, and let the gradient through as if nothing happened.

    The straight-through estimator: rounding has the slope 0 nearly everywhere, which teaches
    nothing, so its slope is taken as 1, and as 0 where a number was clipped.

    x          any shape, any type of float
    scheme     the map
    low, high  as in quantize
    returns    of the shape and type of x

    Raises InputError as quantize does. Bengio et al. 2013 (arXiv:1308.3432).
    """
    own_low, own_high = range_of(x, scheme)
    low = own_low if low is None else low.expand_as(own_low)
    high = own_high if high is None else high.expand_as(own_high)
    return _StraightThrough.apply(x, *find_map(low, high, scheme), scheme)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, scheme):
        integers = to_integers(x, scale, zero_point, scheme)
        grouped = x.float().unflatten(-1, (scale.shape[-1], -1))
        places = torch.round(grouped / scale[..., None])
        if zero_point is not None:
            places = places + zero_point[..., None]
        inside = (places >= scheme.lowest) & (places <= scheme.highest)
        ctx.save_for_backward(inside.flatten(-2))
        return from_integers(integers, scale, zero_point).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None
