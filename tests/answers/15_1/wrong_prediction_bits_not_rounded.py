import math

import torch

from slimlab.classroom.check import numbers


def my_prediction():
    """Three shares of the dense matrix's bytes."""
    given = numbers("15.1")
    n, m, dense_bits = given["n"], given["m"], 8 * given["item_bytes"] * given["m"]
    values = 8 * given["item_bytes"] * n
    bits = {
        "places": n * math.ceil(math.log2(m)),
        "bitmap": m,
        "least": n * math.log2(m / n),
    }
    return {name: (values + one) / dense_bits for name, one in bits.items()}


def nm_mask(weight, n, m):
    """A mask with exactly n of every m neighbours."""
    groups = weight.abs().reshape(-1, m)
    largest = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(1, largest, True)
    return mask.reshape(weight.shape)


def pack(weight, n, m):
    """What is stored of a pruned matrix: name -> tensor."""
    groups = weight.reshape(-1, m)
    places = nm_mask(weight, n, m).reshape(-1, m).nonzero()[:, 1]  # ascending in each group
    values = groups.gather(1, places.view(-1, n)).view(len(weight), -1)
    num_bits = (m - 1).bit_length()
    bits = (places[:, None] >> torch.arange(num_bits)) & 1
    bits = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return {"values": values, "places": (bits << torch.arange(8)).sum(1).to(torch.uint8)}


def multiply(packed, x, n, m):
    """x (B, C) times the stored matrix, transposed: (B, R)."""
    values, num_bits = packed["values"], (m - 1).bit_length()
    bits = (packed["places"][:, None] >> torch.arange(8)) & 1
    bits = bits.flatten()[: values.numel() * num_bits].view(-1, num_bits).long()
    places = (bits << torch.arange(num_bits)).sum(1).view(values.shape)
    columns = places + torch.arange(values.shape[1]) // n * m  # where the group begins
    return torch.stack([(values * row[columns]).sum(1) for row in x])
