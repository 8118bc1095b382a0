def hide_spans(ids, spans, sentinels):
    ordered = sorted(spans)
    starts = [start for start, _ in ordered]
    ends = [start + length for start, length in ordered]
    bad = any(length < 1 for _, length in ordered)
    bad = bad or any(start < 0 for start in starts) or any(end > len(ids) for end in ends)
    bad = bad or any(end > start for end, start in zip(ends, starts[1:]))
    if bad or len(sentinels) < len(spans) + 1:
        raise ValueError("these spans cannot be hidden")
    inputs, targets = list(ids), [sentinels[len(spans)]]
    for start, end, sentinel in zip(starts[::-1], ends[::-1], sentinels[: len(spans)][::-1]):
        targets = [sentinel, *inputs[start:end], *targets]
        inputs[start:end] = [sentinel]
    return inputs, targets


def put_back(inputs, targets, sentinels):
    places = [i for i, token in enumerate(targets) if token in sentinels]
    hidden = {targets[i]: targets[i + 1 : j] for i, j in zip(places, places[1:])}
    return [one for token in inputs for one in hidden.get(token, [token])]
