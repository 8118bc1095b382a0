"""A tiny model in float64, its data, and three steps in one process, to compare ranks with."""

import torch

# Each forked rank would import it at its first optimizer, for 1.5 seconds; here it is done once.
import torch._dynamo

from slimlab.config import ModelConfig
from slimlab.model.build import build_model
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import IGNORE, causal_objective
from slimlab.train.optimizer import make_optimizer

SIZES = {"vocab_size": 11, "seq_len": 5, "d_model": 8, "num_layers": 2, "num_heads": 2}
# With biases, so that one of them, the key bias, has a gradient of zero.
CHOICES = {"positions": "learned", "norm": "layer", "bias": True}
LR, NUM_STEPS, BATCH_SIZE = 1e-2, 3, 7
# Products and sums of a few hundred terms round at about 1e-16 each, and AdamW's division by a root
# of squares carries that on unchanged in relative size.
BOUND = 1e-12


def tiny_model(seed=0, **choices):
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**SIZES | (choices or CHOICES))).double()
    # No weight stays at zero, as output projections begin: all gradients are to be compared.
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, dtype=param.dtype), alpha=0.1)
    return model


def tiny_batch(step):
    """Inputs and targets; padding of different lengths, so that samples differ in their tokens."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(11, (BATCH_SIZE, 6), generator=generator)
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    for row in range(BATCH_SIZE):
        targets[row, 1 + (row + step) % 5 :] = IGNORE
    return inputs, targets


def optimizer_of(model):
    return make_optimizer("adamw", model, lr=LR)


def serial_run(model, num_steps=NUM_STEPS, batch_of=tiny_batch):
    """Train in one process; returns losses and the gradients of each step, by name."""
    optimizer, losses, grads = optimizer_of(model), [], []
    for step in range(num_steps):
        loss, _ = accumulate_gradients(model, batch_of(step), causal_objective)
        losses.append(float(loss))
        grads.append(copy_of_grads(model))
        optimizer.step()
    return losses, grads, copy_of_weights(model)


def copy_of_grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def copy_of_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def zero_gradient_names(model):
    """Parameters whose true gradient is zero: a key bias adds one number to all scores of a row.

    Softmax does not see it (with rotary positions it does, since they turn with the place).
    """
    if model.config.positions == "rotary":
        return []
    return [name for name, _ in model.named_parameters() if name.endswith("k_proj.bias")]


def check_same_run(found, expected, zero_names=(), bound=BOUND):
    """Compare losses, gradients and weights with those of one process, as the bound allows."""
    losses, grads, weights = found
    true_losses, true_grads, true_weights = expected
    for mine, true in zip(losses, true_losses, strict=True):
        assert abs(mine - true) < bound * true
    largest = max(float(grad.abs().max()) for grad in true_grads[0].values())
    for step, (mine, true) in enumerate(zip(grads, true_grads, strict=True)):
        assert mine.keys() == true.keys()
        for name in true:
            scale = largest if name in zero_names else float(true[name].abs().max())
            assert scale > 1e-9, f"{name} has no gradient to compare"
            error = float((mine[name] - true[name]).abs().max()) / scale
            assert error < bound, (step, name, error)
    for name, true in true_weights.items():
        if name in zero_names:
            # AdamW divides rounding noise by its own size: only the length of the steps is known.
            moved = (weights[name] - true).abs().max()
            assert moved <= 2 * len(true_grads) * LR
            continue
        scale = max(float(true.abs().max()), len(true_grads) * LR)
        error = float((weights[name] - true).abs().max()) / scale
        assert error < bound, (name, error)
