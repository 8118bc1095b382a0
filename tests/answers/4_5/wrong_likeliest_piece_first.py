import math


def best_segmentation(text, log_probs):
    pieces, start = [], 0
    while start < len(text):
        fitting = [piece for piece in log_probs if text.startswith(piece, start)]
        if not fitting:
            raise ValueError("no segmentation")
        pieces.append(max(fitting, key=log_probs.get))
        start += len(pieces[-1])
    return pieces


def text_log_prob(text, log_probs):
    n, longest = len(text), max(map(len, log_probs))
    total = [0.0] + [-math.inf] * n
    for start in range(n):
        for end in range(start + 1, min(n, start + longest) + 1):
            if text[start:end] in log_probs and total[start] > -math.inf:
                total[end] = add(total[end], total[start] + log_probs[text[start:end]])
    return total[n]


def add(a, b):
    low, high = min(a, b), max(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
