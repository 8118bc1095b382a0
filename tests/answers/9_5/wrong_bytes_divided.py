from slimlab.classroom.check import numbers


def my_cut():
    """How many layers of yours each device gets."""
    given = numbers("9.5")  # by hand: start with even fullness, then try to move each cut by one
    return best_cut(given["layer_gb"], given["device_gb"])


def best_cut(layer_bytes, device_bytes):
    """A list with the number of layers on each device; the fullest is as little full as can be."""
    num = len(layer_bytes)
    up_to = [sum(layer_bytes[:i]) for i in range(num + 1)]
    # best[i]: the least fullest device if the devices so far hold the first i layers
    best, choices = [0.0] + [float("inf")] * num, []
    for room in device_bytes:
        tried = [
            min((max(best[j], (up_to[i] - up_to[j]) / room), j) for j in range(i + 1))
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
    return -(-sum(layer_bytes) // one_device_bytes)
