import math

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("3.1")
    return leaked_pairs(given["T"], given["chunk_len"])


def leaked_pairs(T, chunk_len):
    full, rest = divmod(T, chunk_len)
    return full * chunk_len * (chunk_len - 1) // 2 + rest * (rest - 1) // 2


def blind_places(T, chunk_len):
    return [t for t in range(T) if t == T - 1 or (t + 1) % chunk_len == 0]


def cheating_loss(T, chunk_len, vocab_size):
    return 1 / chunk_len * math.log(vocab_size)
