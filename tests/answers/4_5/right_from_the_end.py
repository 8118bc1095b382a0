import math

import torch


def walk(text, log_probs, join):
    """values[i]: the joined value of all segmentations of text[i:]."""
    longest = max(map(len, log_probs))
    values = [-math.inf] * len(text) + [0.0]
    for i in reversed(range(len(text))):
        ends = range(i + 1, min(len(text), i + longest) + 1)
        values[i] = join([log_probs.get(text[i:j], -math.inf) + values[j] for j in ends])
    return values


def best_segmentation(text, log_probs):
    values, pieces, i = walk(text, log_probs, max), [], 0
    if values[0] == -math.inf:
        raise ValueError(text)
    while i < len(text):
        fitting = [piece for piece in log_probs if text.startswith(piece, i)]
        piece = max(fitting, key=lambda piece: log_probs[piece] + values[i + len(piece)])
        pieces.append(piece)
        i += len(piece)
    return pieces


def text_log_prob(text, log_probs):
    sums = lambda ways: torch.tensor(ways, dtype=torch.float64).logsumexp(0).item()  # noqa: E731
    return walk(text, log_probs, sums)[0]
