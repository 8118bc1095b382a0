import torch
from torch.nn import functional as F


def careless_step(model, optimizer, batch, micro_batch_size, clip_norm):
    """One update from a batch, micro_batch_size sequences at a time."""
    pieces = list(zip(*(tensor.split(micro_batch_size) for tensor in batch)))
    optimizer.zero_grad()
    total = 0.0
    for inputs, targets in pieces:
        logits = model(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / len(pieces)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        total += loss.item()
    optimizer.step()
    return total


def difference(step, make, batch, micro_batch_size, clip_norm):
    """The greatest difference between weights after an update in pieces and as a whole."""
    after = []
    for size in (micro_batch_size, len(batch[0])):
        model, optimizer = make()
        step(model, optimizer, batch, size, clip_norm)
        after.append(list(model.parameters()))
    return max((one - other).abs().max().item() for one, other in zip(*after))


def mended_step(model, optimizer, batch, micro_batch_size, clip_norm):
    """careless_step without its faults."""
    num_tokens = (batch[1] != -100).sum().item()
    optimizer.zero_grad()
    total = 0.0
    for inputs, targets in zip(*(tensor.split(micro_batch_size) for tensor in batch)):
        logits = model(inputs).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum") / num_tokens
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_value_(model.parameters(), clip_norm)
    optimizer.step()
    return total
