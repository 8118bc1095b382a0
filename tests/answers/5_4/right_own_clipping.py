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
    flat = []
    for size in (micro_batch_size, len(batch[0])):
        model, optimizer = make()
        step(model, optimizer, batch, size, clip_norm)
        flat.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.linalg.vector_norm(flat[0] - flat[1], ord=torch.inf).item()


def mended_step(model, optimizer, batch, micro_batch_size, clip_norm):
    """careless_step without its faults."""
    inputs, targets = batch
    total_count = int((targets != -100).sum())
    optimizer.zero_grad()
    mean = torch.zeros((), dtype=torch.float64)
    for x, y in zip(inputs.split(micro_batch_size), targets.split(micro_batch_size)):
        count = int((y != -100).sum())
        if count == 0:
            continue
        loss = F.cross_entropy(model(x).transpose(1, 2), y)
        (loss * count / total_count).backward()
        mean += loss.detach() * count / total_count
    length = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    if length > clip_norm:
        for p in model.parameters():
            p.grad *= clip_norm / length
    optimizer.step()
    return mean.item()
