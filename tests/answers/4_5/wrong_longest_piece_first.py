import math


def best_segmentation(text, log_probs):
    pieces, start = [], 0
    while start < len(text):
        ends = range(len(text), start, -1)
        end = next((end for end in ends if text[start:end] in log_probs), None)
        if end is None:
            raise ValueError("no segmentation")
        pieces.append(text[start:end])
        start = end
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
