"""Programs of the tests of hybrid parallelism: one model, many layouts, beside one process."""

from parallel_cases import LR, NUM_STEPS, tiny_model, zero_gradient_names
from tensor_cases import FIRST, GPT, LLAMA, batch_of

from slimlab.parallel.hybrid import Hybrid
from slimlab.plan.parallel_config import ParallelConfig

__all__ = ["FIRST", "GPT", "LLAMA"]
BATCH_SIZE = 8


def whole_batch(step):
    return batch_of(step, BATCH_SIZE)


def make_hybrid(comm, parallel, choices=GPT, **settings):
    # Every rank begins with other weights: those of rank 0 must reach all.
    model = tiny_model(seed=comm.rank, **choices)
    return Hybrid(model, comm, ParallelConfig(**parallel), **{"lr": LR} | settings)


def train(comm, parallel, choices=GPT, num_steps=NUM_STEPS):
    """What every rank finds: losses, gradients and weights, put together."""
    hybrid = make_hybrid(comm, parallel, choices)
    losses, grads = [], []
    for step in range(num_steps):
        loss, _ = hybrid.gradients(hybrid.share_of(whole_batch(step)))
        losses.append(float(loss))
        grads.append(hybrid.full_gradients())
        hybrid.step()
    return losses, grads, hybrid.full_weights()


def zero_names(choices=GPT):
    return zero_gradient_names(tiny_model(**choices))
