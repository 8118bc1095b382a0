from collections import Counter, defaultdict


def best_guess(pairs, seen):
    by_look = defaultdict(Counter)
    for a, b, label in pairs:
        by_look[seen(a, b)][label] += 1
    right = sum(max(counts.values()) for counts in by_look.values())
    return right / len(pairs)


def mended_pairs(documents, num_pairs, max_words, rng):
    pairs = []
    for _ in range(num_pairs):
        document = rng.choice(documents)
        place = rng.randrange(len(document) - 1)
        a, b = document[place], document[place + 1]
        label = int(rng.random() < 0.5)
        if label == 0:
            other = rng.choice([one for one in documents if one is not document])
            b = other[-1]
        pairs.append((a[:max_words], b[:max_words], label))
    return pairs
