import torch


def distances(mask, start):
    found, frontier, steps = {start: 0}, [start], 0
    while frontier:
        steps += 1
        frontier = [s for t in frontier for s in range(len(mask)) if mask[t, s] and s not in found]
        found |= {s: steps for s in frontier}
        frontier = list(set(frontier))
    return found


def leaking_places(mask, num_layers):
    places = [distances(mask, t).get(t + 1, 10**9) <= num_layers for t in range(len(mask) - 1)]
    return torch.tensor([*places, False])


def first_leaking_depth(mask):
    every = [distances(mask, t).get(t + 1) for t in range(len(mask) - 1)]
    every = [steps for steps in every if steps is not None]
    return min(every) if every else None
