def best_guess(pairs, seen):
    looks = [(seen(a, b), label) for a, b, label in pairs]
    ones, all_of = {}, {}
    for look, label in looks:
        ones[look] = ones.get(look, 0) + label
        all_of[look] = all_of.get(look, 0) + 1
    return sum(max(ones[look], all_of[look] - ones[look]) for look in all_of) / len(looks)


def mended_pairs(documents, num_pairs, max_words, rng):
    seconds = [(d, i) for d, one in enumerate(documents) for i in range(1, len(one))]
    pairs = []
    for _ in range(num_pairs):
        d, i = rng.choice(seconds)
        first = documents[d][i - 1][:max_words]
        label = rng.randrange(2)
        if not label:
            e, j = rng.choice(seconds)
            while e == d:
                e, j = rng.choice(seconds)
            d, i = e, j
        pairs.append((first, documents[d][i][:max_words], label))
    return pairs
