import math
from fractions import Fraction

from slimlab.classroom.check import numbers


def room(memory_gib, num_params, bytes_per_element, **_):
    return Fraction(memory_gib * 2**30, bytes_per_element) - num_params


def row(num_layers, num_kv_heads, d_head, **_):
    return 2 * num_layers * num_kv_heads * d_head


def sequences_that_fit(seq_len, **model):
    return max(math.floor(room(**model) / row(**model) / seq_len), 0)


def longest_context(batch_size, **model):
    return max(math.floor(room(**model) / row(**model) / batch_size), 0)


def my_prediction():
    return sequences_that_fit(**numbers("2.1"))
