import math

import torch

from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_maps import quantize


class SmallCache:
    """Keys and values in four bits; the last few tokens in float32."""

    def __init__(self, num_heads, d_head, group):
        self.scheme = QuantScheme(4, symmetric=False, scale_dtype="bfloat16")
        self.shape, self.group = (num_heads, d_head), group
        self.keys, self.values, self.waiting = [], [], []

    def append(self, key, value):
        """Add a token; key and value (H, E)."""
        self.waiting.append((key.clone(), value.clone()))
        if len(self.waiting) == self.group:
            keys, values = (torch.stack(some, dim=1) for some in zip(*self.waiting))
            # a row shares a scale: a channel of all tokens (H, E, g), a token's value (H, g, E)
            self.keys.append(quantize(keys.mT, self.scheme))
            self.values.append(quantize(values, self.scheme))
            self.waiting = []

    def attend(self, query):
        """Attend with query (H, E) to all tokens so far; returns (H, E)."""
        E = self.shape[1]
        keys, values = [], []
        for key_parts, value_parts in zip(self.keys, self.values):
            keys.append(key_parts.dequantize().mT)
            values.append(value_parts.dequantize())
        keys += [key[:, None] for key, _ in self.waiting]
        values += [value[:, None] for _, value in self.waiting]
        scores = torch.cat(keys, dim=1) @ query[..., None] / math.sqrt(E)
        return (torch.softmax(scores, dim=1).mT @ torch.cat(values, dim=1))[:, 0]
