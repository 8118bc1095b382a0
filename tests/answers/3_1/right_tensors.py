import torch

from slimlab.classroom.check import numbers


def rule(T, chunk_len):
    chunk = torch.arange(T) // chunk_len
    return chunk[:, None] >= chunk


def my_prediction():
    full, rest = divmod(numbers("3.1")["T"], numbers("3.1")["chunk_len"])
    return full * numbers("3.1")["chunk_len"] * (numbers("3.1")["chunk_len"] - 1) / 2 + (
        rest * (rest - 1) / 2
    )


def leaked_pairs(T, chunk_len):
    return rule(T, chunk_len).triu(1).sum()


def blind_places(T, chunk_len):
    hidden = ~rule(T, chunk_len).diagonal(1)
    return torch.cat([hidden.nonzero()[:, 0], torch.tensor([T - 1])])


def cheating_loss(T, chunk_len, vocab_size):
    return len(blind_places(T, chunk_len)) / T * torch.log(torch.tensor(float(vocab_size)))
