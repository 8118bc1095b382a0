import torch

from slimlab.classroom.check import numbers
from slimlab.model.masks import causal_mask, chunk_mask


def my_prediction():
    given = numbers("3.1")
    return leaked_pairs(given["T"], given["chunk_len"])


def leaked_pairs(T, chunk_len):
    return (chunk_mask(T, chunk_len, leaky=True) & ~causal_mask(T)).sum()


def blind_places(T, chunk_len):
    sees_next = chunk_mask(T + 1, chunk_len, leaky=True).diagonal(1).clone()
    sees_next[-1] = False
    return torch.nonzero(~sees_next)[:, 0]


def cheating_loss(T, chunk_len, vocab_size):
    losses = torch.zeros(T, dtype=torch.float64)
    losses[blind_places(T, chunk_len)] = torch.tensor(float(vocab_size), dtype=torch.float64).log()
    return losses.mean()
