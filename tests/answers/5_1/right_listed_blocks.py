import math

from slimlab.classroom.check import numbers
from slimlab.config import ModelConfig
from slimlab.plan.params import num_params


def my_prediction():
    given = numbers("5.1")
    count = given["num_rows"] * given["num_columns"]
    return 2 * count + 8 * math.ceil(count / given["block_size"])


def adam_8bit_bytes(shapes, block_size):
    total = 0
    for shape in shapes:
        count = math.prod(shape)
        if count >= 4096:
            blocks = [min(block_size, count - at) for at in range(0, count, block_size)]
            total += 2 * sum(4 + block for block in blocks)
        else:
            total += 8 * count
    return total


def adafactor_bytes(shapes):
    total = 0
    for shape in shapes:
        if len(shape) == 2:
            rows, columns = shape
            total += 4 * rows + 4 * columns
        else:
            total += 4 * shape[0]
    return total


def layers_that_fit(config, memory_gib, kept_bytes):
    from dataclasses import asdict

    from slimlab.plan.params import param_shapes

    sizes = asdict(config)
    layers = 0
    while True:
        sizes["num_layers"] = layers + 1
        larger = ModelConfig(**sizes)
        needed = 8 * num_params(larger) + kept_bytes(list(param_shapes(larger).values()))
        if needed > memory_gib * 2**30:
            return layers
        layers += 1
