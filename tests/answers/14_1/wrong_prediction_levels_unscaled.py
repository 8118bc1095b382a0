from statistics import NormalDist

import torch

from slimlab.classroom.check import numbers


def my_prediction():
    """Bits per number, and what four numbers come back as."""
    given = numbers("14.1")
    block, group = given["block"], given["group"]
    levels = given["levels"]
    nearest = [min(levels, key=lambda level: abs(level - one)) for one in given["values"]]
    plain_bits = 4 + 32 / block
    return {
        "bits": 4 + (8 + 32 / group) / block,
        "plain_bits": plain_bits,
        "values": nearest,
    }


def normal_levels(num_bits, top):
    """The levels of a normal-float code, rising."""
    half = 2 ** (num_bits - 1)

    def above(count):
        parts = [0.5 + (top - 0.5) * i / count for i in range(1, count + 1)]
        return [NormalDist().inv_cdf(part) for part in parts]

    levels = [-one for one in above(half - 1)] + [0.0] + above(half)
    return torch.tensor(sorted(levels), dtype=torch.float64) / max(levels)


def encode(values, levels, block):
    """The nearest level of every number, and the greatest absolute value of every block."""
    blocks = values.view(-1, block)
    maxima = blocks.abs().amax(dim=1)
    parts = blocks / torch.where(maxima == 0, 1.0, maxima)[:, None]
    distance = (parts[..., None] - levels.to(parts.dtype)).abs()
    return distance.argmin(dim=-1).to(torch.uint8).flatten(), maxima.float()


def decode(codes, maxima, levels):
    """The numbers that the codes stand for."""
    parts = levels[codes.long()].float().view(len(maxima), -1)
    return (parts * maxima[:, None]).flatten()


def encode_scales(maxima, group):
    """The maxima in 8 bits, less their mean."""
    mean = maxima.mean().item()
    parts = (maxima - mean).split(group)
    scales = torch.stack([part.abs().max() / 127 for part in parts])
    safe = torch.where(scales == 0, 1.0, scales)
    codes = [(part / scale).round().to(torch.int8) for part, scale in zip(parts, safe)]
    return torch.cat(codes), scales, mean


def decode_scales(codes, scales, mean, group):
    """The maxima again."""
    return codes * scales.repeat_interleave(group)[: len(codes)] + mean
