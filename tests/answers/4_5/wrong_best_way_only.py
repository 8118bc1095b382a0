import math


def best_segmentation(text, log_probs):
    n, longest = len(text), max(map(len, log_probs))
    score, back = [0.0] + [-math.inf] * n, [0] * (n + 1)
    for start in range(n):
        if score[start] == -math.inf:
            continue
        for end in range(start + 1, min(n, start + longest) + 1):
            piece = text[start:end]
            if piece in log_probs and score[start] + log_probs[piece] > score[end]:
                score[end], back[end] = score[start] + log_probs[piece], start
    if score[n] == -math.inf:
        raise ValueError("no segmentation")
    pieces = []
    while n > 0:
        pieces.insert(0, text[back[n] : n])
        n = back[n]
    return pieces


def text_log_prob(text, log_probs):
    n, longest = len(text), max(map(len, log_probs))
    total = [0.0] + [-math.inf] * n
    for start in range(n):
        for end in range(start + 1, min(n, start + longest) + 1):
            if text[start:end] in log_probs and total[start] > -math.inf:
                total[end] = max(total[end], total[start] + log_probs[text[start:end]])
    return total[n]


def add(a, b):
    low, high = min(a, b), max(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
