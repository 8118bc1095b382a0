"""A teacher, a student and a batch of each kind, for the tests of distillation."""

import torch
from parallel_cases import SIZES, tiny_model
from parallel_cases import tiny_batch as batch_of

STUDENT = {"positions": "learned", "norm": "layer", "bias": True, "num_layers": 1}
TEXT = torch.tensor([(3 * i + i // 9) % 11 for i in range(64)])
V = SIZES["vocab_size"]

__all__ = ["SIZES", "STUDENT", "TEXT", "V", "batch_of", "numbers", "student", "teacher"]


def teacher(**choices):
    return tiny_model(seed=7, **choices)


def student(seed=1, **changes):
    return tiny_model(seed=seed, **STUDENT | changes)


def numbers(*shape, seed=0, scale=2.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=draw, dtype=torch.float64)
