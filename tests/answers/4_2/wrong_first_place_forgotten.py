def hide_spans(ids, spans, sentinels):
    if len(spans) >= len(sentinels):
        raise ValueError("too few sentinels")
    owner = [None] * len(ids)
    for number, (start, length) in enumerate(sorted(spans)):
        if length < 1 or start < 0 or start + length > len(ids):
            raise ValueError("a span outside of the text")
        for place in range(start, start + length):
            if owner[place] is not None:
                raise ValueError("spans overlap")
            owner[place] = number
    inputs, targets = [], []
    for place, token in enumerate(ids):
        number = owner[place]
        if number is None:
            inputs.append(token)
            continue
        if place > 0 and owner[place - 1] != number:
            inputs.append(sentinels[number])
            targets.append(sentinels[number])
        targets.append(token)
    targets.append(sentinels[len(spans)])
    return inputs, targets


def put_back(inputs, targets, sentinels):
    ids = []
    for token in inputs:
        if token not in sentinels:
            ids.append(token)
            continue
        place = targets.index(token) + 1
        while targets[place] not in sentinels:
            ids.append(targets[place])
            place += 1
    return ids
