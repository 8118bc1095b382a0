from dataclasses import replace

import torch

from slimlab.classroom.check import numbers
from slimlab.plan.params import param_shapes


def my_prediction():
    """The bytes that you worked out by hand for your matrix."""
    given = numbers("5.1")  # by hand: rows x columns, blocks rounded up, 2 (numbers + 4 blocks)
    return adam_8bit_bytes([(given["num_rows"], given["num_columns"])], given["block_size"])


def adam_8bit_bytes(shapes, block_size):
    """Bytes of both means and their scales."""
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        if count < 4096:
            total += 2 * 4 * count
        else:
            num_blocks = -(-count // block_size)
            total += 2 * (count + 4 * num_blocks)
    return total


def adafactor_bytes(shapes):
    """Bytes of the row and column sums, and of the vectors' entries."""
    return 4 * sum(sum(shape) for shape in shapes)  # of a vector the only size, of a matrix both


def layers_that_fit(config, memory_gib, kept_bytes):
    """The greatest number of layers whose weights, gradients and state fit."""
    def needed(num_layers):
        shapes = list(param_shapes(replace(config, num_layers=num_layers)).values())
        return 8 * sum(torch.Size(shape).numel() for shape in shapes)

    if needed(1) > memory_gib * 2**30:
        return 0
    per_layer = needed(2) - needed(1)
    return 1 + int((memory_gib * 2**30 - needed(1)) // per_layer)
