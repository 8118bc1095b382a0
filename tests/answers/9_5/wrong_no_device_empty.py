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
    num = len(layer_bytes)
    up_to = [sum(layer_bytes[:i]) for i in range(num + 1)]
    # best[i]: the least fullest device if the devices so far hold the first i layers
    best, choices = [0.0] + [float("inf")] * num, []
    for room in device_bytes:
        tried = [
            min((max(best[j], (up_to[i] - up_to[j]) / room), j) for j in range(max(i, 1)))
            for i in range(num + 1)
        ]
        best = [fullest for fullest, _ in tried]
        choices.append([start for _, start in tried])
    cut, end = [], num
    for starts in reversed(choices):
        cut.append(end - starts[end])
        end = starts[end]
    return cut[::-1]


def fewest_devices(layer_bytes, one_device_bytes):
    """How many equal devices are enough; 0 if none is."""
    if max(layer_bytes) > one_device_bytes:
        return 0
    num, left = 1, one_device_bytes
    for needed in layer_bytes:  # fill each device as far as it goes: waiting never helps
        if needed > left:
            num, left = num + 1, one_device_bytes
        left -= needed
    return num
