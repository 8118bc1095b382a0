from math import prod

import torch


def report(comm, sizes, coordinates, tensors, parts):
    """Name -> (norm, largest absolute value, number of zeros) of every whole tensor."""
    sums = torch.zeros(len(tensors), 2, dtype=torch.float64)
    largest = torch.zeros(len(tensors), dtype=torch.float64)
    for row, (name, (axes, stages)) in enumerate(tensors.items()):
        if name in parts and parts[name].numel():
            part = parts[name]
            copies = [sizes[axis] for axis in ("data", "tensor") if axis not in axes]
            found = torch.stack([part.square().sum(), (part == 0).sum()])
            sums[row] = found / (prod(copies) * len(stages))  # each copy brings its share
            largest[row] = part.abs().max()
    sums = comm.all_reduce(sums)
    largest = comm.all_reduce(largest)
    return {
        name: (sums[row, 0].sqrt().item(), largest[row].item(), round(sums[row, 1].item()))
        for row, name in enumerate(tensors)
    }
