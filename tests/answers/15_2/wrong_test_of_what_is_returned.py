import torch

from slimlab.classroom.check import numbers


def retrain(weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm):
    """The weights after num_before steps with all of them and num_after with those that stay."""
    velocity = torch.zeros_like(weights)
    for step in range(num_before + num_after):
        if step == num_before:
            weights = weights * mask
        gradient = gradient_of(weights)
        if step >= num_before:
            gradient = gradient * mask  # what is pruned is not trained
        gradient = gradient * (max_norm / gradient.norm()).clamp(max=1.0)
        velocity = momentum * velocity + gradient
        weights = weights - lr * velocity
    return weights


def my_diagnosis():
    """Where a pruned weight is after one step, after two, and in the end."""
    given = numbers("15.2")
    step = -given["lr"] * given["momentum"] * given["velocity"]  # it rolls on without a gradient
    momentum = given["momentum"]
    return {"first": step, "second": step * (1 + momentum), "rest": step / (1 - momentum)}


def is_right(retrain):
    """Whether pruned weights are gone, and the others go on."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, False])
    seen, start = [], torch.linspace(-1, 2, 6).double()

    def gradient_of(weights):
        seen.append(weights.clone())
        return rows.T @ (rows @ weights - rows.sum(1)) / len(rows)

    for num_before, num_after in ((4, 5), (0, 3), (4, 1), (3, 0)):
        for momentum, max_norm in ((0.9, 1e9), (0.8, 0.5), (0.0, 1.0), (0.9, 2.0)):
            settings = (num_before, num_after, 0.1, momentum, max_norm)
            seen.clear()
            found = retrain(start, mask, gradient_of, *settings)
            zero = bool((found[~mask] == 0).all())
            if not zero:
                return False
    return True


def true_weights(weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm):
    """What the test compares with: the weights that stay, alone; write another one if you like."""
    velocity = torch.zeros_like(weights)
    kept = torch.ones_like(mask)
    for step in range(num_before + num_after + 1):
        if step == num_before:  # from here on shorter tensors
            weights, velocity, kept = weights[mask], velocity[mask], mask
        if step == num_before + num_after:
            return weights
        whole = torch.zeros(mask.shape, dtype=weights.dtype)
        whole[kept] = weights.flatten()
        gradient = gradient_of(whole)[kept].view(weights.shape)
        gradient = gradient * (max_norm / gradient.norm()).clamp(max=1.0)
        velocity = momentum * velocity + gradient
        weights = weights - lr * velocity


def mended_retrain(weights, mask, gradient_of, num_before, num_after, lr, momentum, max_norm):
    """retrain, with the pruned weights gone."""
    velocity, kept = torch.zeros_like(weights), torch.ones_like(mask)
    for step in range(num_before + num_after):
        kept = mask if step >= num_before else kept
        weights, velocity = weights * kept, velocity * kept
        gradient = gradient_of(weights) * kept
        gradient = gradient * (max_norm / gradient.norm()).clamp(max=1.0)
        velocity = momentum * velocity + gradient
        weights = weights - lr * velocity
    return weights * mask
