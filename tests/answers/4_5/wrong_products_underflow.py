import math


def best_segmentation(text, log_probs):
    n, longest = len(text), max(map(len, log_probs))
    score, back = [1.0] + [0.0] * n, [0] * (n + 1)
    for end in range(1, n + 1):
        for start in range(max(0, end - longest), end):
            chance = score[start] * math.exp(log_probs.get(text[start:end], -math.inf))
            if chance > score[end]:
                score[end], back[end] = chance, start
    if score[n] == 0 and n < 100:
        raise ValueError("no segmentation")
    pieces = []
    while n > 0:
        start = max(back[n], 0) if score[n] else n - 1
        pieces.insert(0, text[start:n])
        n = start
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
