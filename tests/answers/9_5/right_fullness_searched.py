from slimlab.classroom.check import numbers


def my_cut():
    """How many layers of yours each device gets."""
    given = numbers("9.5")
    sizes, rooms = given["layer_gb"], given["device_gb"]
    cuts = [(i, j - i, len(sizes) - j) for j in range(len(sizes) + 1) for i in range(j + 1)]

    def fullness(cut):
        ends = [0, cut[0], cut[0] + cut[1], len(sizes)]
        return max(sum(sizes[a:b]) / room for a, b, room in zip(ends, ends[1:], rooms))

    return list(min(cuts, key=fullness))


def best_cut(layer_bytes, device_bytes):
    """A list with the number of layers on each device; the fullest is as little full as can be."""
    sums = {sum(layer_bytes[i:j]) for j in range(len(layer_bytes) + 1) for i in range(j)}
    found = sorted({held / room for held in sums for room in device_bytes})
    low, high, cut = 0, len(found) - 1, None
    while low <= high:
        middle = (low + high) // 2
        at, counts = 0, []
        for room in device_bytes:
            start, held = at, 0
            while at < len(layer_bytes) and (held + layer_bytes[at]) / room <= found[middle]:
                held += layer_bytes[at]
                at += 1
            counts.append(at - start)
        if at == len(layer_bytes):
            cut, high = counts, middle - 1
        else:
            low = middle + 1
    return cut


def fewest_devices(layer_bytes, one_device_bytes):
    """How many equal devices are enough; 0 if none is."""
    if any(needed > one_device_bytes for needed in layer_bytes):
        return 0
    for num in range(1, len(layer_bytes) + 1):
        cut = best_cut(layer_bytes, [one_device_bytes] * num)
        ends = [sum(cut[:k]) for k in range(num + 1)]
        if all(sum(layer_bytes[a:b]) <= one_device_bytes for a, b in zip(ends, ends[1:])):
            return num
