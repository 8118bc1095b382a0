import torch

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("14.1")
    b, g = given["block"], given["group"]
    top = max(map(abs, given["values"]))
    back = []
    for value in given["values"]:
        distances = {abs(level * top - value): level * top for level in given["levels"]}
        back.append(distances[min(distances)])
    bits = {"bits": (4 * b * g + 8 * g + 32) / (b * g), "plain_bits": (4 * b + 32) / b}
    return {**bits, "values": back}


def normal_levels(num_bits, top):
    half = 2 ** (num_bits - 1)
    normal = torch.distributions.Normal(0.0, torch.tensor(1.0, dtype=torch.float64))
    right = normal.icdf(torch.linspace(0.5, top, half + 1, dtype=torch.float64))
    left = -normal.icdf(torch.linspace(0.5, top, half, dtype=torch.float64))
    levels = torch.cat([left.flip(0)[:-1], right])
    return levels / levels[-1]


def encode(values, levels, block):
    maxima = torch.stack([part.abs().max() for part in values.split(block)]).float()
    spread = maxima.repeat_interleave(block)
    parts = torch.where(spread > 0, values / spread, torch.zeros_like(values))
    middles = ((levels[1:] + levels[:-1]) / 2).float()
    return torch.bucketize(parts, middles).to(torch.uint8), maxima


def decode(codes, maxima, levels):
    block = len(codes) // len(maxima)
    return levels.float()[codes.int()] * maxima.repeat_interleave(block)


def encode_scales(maxima, group):
    mean = maxima.mean()
    count = -(-len(maxima) // group)
    padded = torch.zeros(count * group)
    padded[: len(maxima)] = maxima - mean
    rows = padded.view(count, group)
    scales = rows.abs().amax(dim=1) / 127
    codes = torch.nan_to_num(rows / scales[:, None]).round()
    return codes.to(torch.int8).flatten()[: len(maxima)], scales, mean


def decode_scales(codes, scales, mean, group):
    return torch.cat([part * one for part, one in zip(codes.split(group), scales)]) + mean
