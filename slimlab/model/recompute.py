"""Recomputation of activations: keep the input of a block, compute its inside again going back.

Chapter 05 predicts what it saves and what it costs: one more forward pass, a third more arithmetic.
Chen et al. 2016 (arXiv:1604.06174).

Production (torch.utils.checkpoint) also handles nested calls, several devices, and recomputes only
cheap parts ("selective", Korthikanti et al. 2022).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slimlab.config import require


def recompute(
    function: Callable[..., Tensor],
    *inputs: Tensor | None,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """Compute function(*inputs) without keeping what its backward pass needs.

    function    tensors to one tensor; may use parameters and dropout
    inputs      its arguments, the only tensors that are kept
    generators  that function draws from, besides torch's global one
    returns     what function returns, bit for bit; gradients of inputs and of parameters too, since
                the random state is put back before the second computation

    Raises InputError if function does not return one tensor. Second derivatives are not defined.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Without an input that needs a gradient autograd would never come back here for the parameters.
    anchor = torch.zeros((), requires_grad=True)
    return _Recompute.apply(function, tuple(generators), anchor, *inputs)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, generators, anchor, *inputs):
        ctx.function, ctx.generators = function, generators
        ctx.states = [generator.get_state() for generator in generators]
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.device_type = tensors[0].device.type if tensors else "cpu"
        ctx.cpu_state = torch.get_rng_state()
        if ctx.device_type == "cuda":
            ctx.device_state = torch.cuda.get_rng_state(tensors[0].device)
        ctx.autocast = {
            "device_type": ctx.device_type,
            "enabled": torch.is_autocast_enabled(ctx.device_type),
            "dtype": torch.get_autocast_dtype(ctx.device_type),
        }
        with torch.no_grad():
            output = function(*inputs)
        require(
            isinstance(output, Tensor),
            "a function that returns one tensor",
            f"a {type(output).__name__}",
            "return the one tensor that the rest of the model needs",
        )
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved) if is_tensor else ctx.others[i] for i, is_tensor in enumerate(ctx.is_tensor)
        ]
        leaves = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for x in inputs
        ]
        devices = [grad.device] if ctx.device_type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.set_rng_state(ctx.cpu_state)
            if devices:
                torch.cuda.set_rng_state(ctx.device_state, grad.device)
            with torch.autocast(**ctx.autocast), _states(ctx.generators, ctx.states):
                output = ctx.function(*leaves)
        if output.requires_grad:  # not so if all that goes into it is frozen
            torch.autograd.backward(output, grad)
        grads = (x.grad if isinstance(x, Tensor) and x.requires_grad else None for x in leaves)
        return (None, None, None, *grads)


@contextmanager
def _states(generators: Sequence[torch.Generator], states: list[Tensor]) -> Iterator[None]:
    """Put generators into earlier states, and back when the with block ends."""
    before = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, states):
        generator.set_state(state)
    try:
        yield
    finally:
        for generator, state in zip(generators, before):
            generator.set_state(state)
