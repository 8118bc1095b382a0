import math


def best_segmentation(text, log_probs):
    def best(start):
        if start not in known:
            ways = [(0.0, [])] if start == len(text) else []
            for piece in log_probs:
                if text.startswith(piece, start):
                    rest = best(start + len(piece))
                    if rest:
                        ways.append((rest[0] + log_probs[piece], [piece, *rest[1]]))
            known[start] = max(ways) if ways else None
        return known[start]

    known = {}
    if best(0) is None:
        raise ValueError("no segmentation")
    return best(0)[1]


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
