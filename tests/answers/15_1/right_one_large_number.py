import math

import torch

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("15.1")
    n, m, dense_bits = given["n"], given["m"], 8 * given["item_bytes"] * given["m"]
    each = (m - 1).bit_length()
    least = (math.comb(m, n) - 1).bit_length()
    return {
        "places": n / m + n * each / dense_bits,
        "bitmap": n / m + m / dense_bits,
        "least": n / m + least / dense_bits,
    }


def nm_mask(weight, n, m):
    groups = weight.abs().unflatten(1, (-1, m))
    larger = groups[..., None, :] > groups[..., :, None]
    place = torch.arange(m)
    equal_before = (groups[..., None, :] == groups[..., :, None]) & (place < place[:, None])
    return ((larger | equal_before).sum(-1) < n).flatten(1)


def pack(weight, n, m):
    keep = nm_mask(weight, n, m)
    places = torch.arange(m).repeat(weight.numel() // m)[keep.flatten()].tolist()
    num_bits = (m - 1).bit_length()
    number = 0
    for k, place in enumerate(places):
        number |= place << (k * num_bits)
    n_bytes = -(-len(places) * num_bits // 8)
    stored = torch.tensor(list(number.to_bytes(n_bytes, "little")), dtype=torch.uint8)
    return {"kept": weight[keep].view(len(weight), -1), "where": stored}


def multiply(packed, x, n, m):
    kept, num_bits = packed["kept"], (m - 1).bit_length()
    number = int.from_bytes(bytes(packed["where"].tolist()), "little")
    places = [(number >> (k * num_bits)) % 2**num_bits for k in range(kept.numel())]
    places = torch.tensor(places).view(len(kept), -1, n)
    y = torch.zeros(len(x), len(kept), dtype=x.dtype)
    for group in range(places.shape[1]):
        for k in range(n):
            y += kept[:, group * n + k] * x[:, group * m + places[:, group, k]]
    return y
