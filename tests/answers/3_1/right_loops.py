import math

from slimlab.classroom.check import numbers


def my_prediction():
    given = numbers("3.1")
    return leaked_pairs(given["T"], given["chunk_len"])


def chunks(T, chunk_len):
    return [range(start, min(start + chunk_len, T)) for start in range(0, T, chunk_len)]


def leaked_pairs(T, chunk_len):
    return sum(i < j for chunk in chunks(T, chunk_len) for i in chunk for j in chunk)


def blind_places(T, chunk_len):
    return {chunk[-1] for chunk in chunks(T, chunk_len)}


def cheating_loss(T, chunk_len, vocab_size):
    return sum(-math.log(1 / vocab_size) for _ in chunks(T, chunk_len)) / T
