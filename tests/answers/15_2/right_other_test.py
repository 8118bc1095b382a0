import torch

from slimlab.classroom.check import numbers


def my_diagnosis():
    given = numbers("15.2")
    weight, velocity, passed = 0.0, given["velocity"], []
    for _ in range(1000):
        velocity = given["momentum"] * velocity
        weight = weight - given["lr"] * velocity
        passed.append(weight)
    return {"first": passed[0], "second": passed[1], "rest": passed[-1]}


def is_right(retrain):
    return all(_agrees(retrain, seed) for seed in range(8))


def _agrees(retrain, seed):
    torch.manual_seed(seed)
    size = 5 + seed
    curve = torch.randn(size, size).double()
    curve = curve @ curve.T / size + torch.eye(size).double()
    best, start = torch.randn(2, size).double()
    mask = torch.rand(size) < 0.6
    mask[0] = True
    calls = []

    def slope(weights):
        calls.append(bool((weights[~mask] == 0).all()))
        return curve @ (weights - best)

    before, after = (3, 4) if seed < 4 else (seed - 5, 3) if seed > 4 else (4, 0)
    given = before, after, 0.07, (0.9, 0.6)[seed % 2], (0.4, 1e6)[seed // 2 % 2]
    found = retrain(start.clone(), mask, slope, *given)
    near = (found - _expected(start, mask, slope, *given)).abs().max() < 1e-9
    return bool(near) and all(calls[before : before + after]) and not bool(found[~mask].any())


def _expected(weights, mask, slope, before, after, lr, momentum, max_norm):
    optimizer_state = torch.zeros_like(weights)
    for step in range(before + after):
        alive = torch.ones_like(mask) if step < before else mask
        weights = torch.where(alive, weights, 0.0)
        gradient = torch.where(alive, slope(weights), 0.0)
        gradient = gradient / max(1.0, gradient.norm().item() / max_norm)
        optimizer_state = torch.where(alive, momentum * optimizer_state + gradient, 0.0)
        weights = weights - lr * optimizer_state
    return torch.where(mask, weights, 0.0)


def mended_retrain(weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm):
    weights = torch.nn.Parameter(weights.detach().clone())
    velocity = torch.zeros_like(weights.data)
    with torch.no_grad():
        for step in range(num_before + num_after):
            if step >= num_before:
                weights.masked_fill_(~mask, 0.0)
            gradient = gradient_of(weights.data.clone()).clone()
            if step >= num_before:
                gradient.masked_fill_(~mask, 0.0)
            length = gradient.norm().item()
            if length > max_norm:
                gradient.mul_(max_norm / length)
            velocity.mul_(momentum).add_(gradient)
            weights.sub_(lr * velocity)
        weights.masked_fill_(~mask, 0.0)
    return weights.data
