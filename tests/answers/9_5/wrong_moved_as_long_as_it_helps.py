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
    cut = [len(layer_bytes) // len(device_bytes)] * len(device_bytes)
    cut[-1] += len(layer_bytes) - sum(cut)

    def fullness(cut):
        ends = [sum(cut[:k]) for k in range(len(cut) + 1)]
        return max(sum(layer_bytes[a:b]) / room for a, b, room in zip(ends, ends[1:], device_bytes))

    better = True
    while better:  # move a layer over a border as long as that helps
        better = False
        for k in range(len(cut) - 1):
            for step in (1, -1):
                moved = list(cut)
                moved[k], moved[k + 1] = cut[k] + step, cut[k + 1] - step
                if min(moved) >= 0 and fullness(moved) < fullness(cut):
                    cut, better = moved, True
    return cut


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
