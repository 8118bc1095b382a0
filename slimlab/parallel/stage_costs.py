"""What the layers of a decoder cost, measured: the numbers that stages are balanced by.

Chapter 10 balances with it. A pipeline is as fast as its slowest stage, and layers are not all that
there is: the last stage has the logits and the loss, for a large vocabulary as dear as several
layers. Each part is timed alone, forward and backward, on the machine as it is.

Production balances by hand or by a profile (PipeDream, Narayanan et al. 2019, section 3.1, which
plans stages from measured times).
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from slimlab.config import check_size
from slimlab.model.block import check_positions
from slimlab.model.transformer import Decoder, run_blocks
from slimlab.parallel.stages import balanced_layers
from slimlab.train.objectives import token_loss


@dataclass(frozen=True)
class LayerCosts:
    """Seconds of the parts of a decoder for one micro-batch, forward and backward together.

    embedding_s  before the first block
    layers_s     of each block
    head_s       final norm, logits and loss
    """

    embedding_s: float
    layers_s: tuple[float, ...]
    head_s: float

    def balanced(self, num_virtual_stages: int) -> list[int]:
        """Divide the layers so that the slowest virtual stage is as fast as can be.

        num_virtual_stages  p v
        returns             how many layers each has

        Raises InputError as balanced_layers does.
        """
        ends = {"first": self.embedding_s, "last": self.head_s}
        return balanced_layers(self.layers_s, num_virtual_stages, **ends)


def measure_costs(model: Decoder, batch: tuple[Tensor, Tensor], num_rounds: int = 3) -> LayerCosts:
    """Time each part of a decoder on a micro-batch.

    model       whole; its gradients are cleared
    batch       inputs (B, T) and targets (B, T)
    num_rounds  of each part the least of one time more than that counts: the first warms up
    returns     seconds

    Raises InputError for num_rounds below 1, and as the model does.
    """
    check_size("num_rounds", num_rounds)
    inputs, targets = batch
    positions = check_positions(None, 0, inputs, model.config)
    found, x = [], None

    def embed(hidden: None) -> Tensor:
        return model.dropout(model.embedding(inputs, positions))

    parts = [embed, *(_through(model, block, positions) for block in model.blocks)]
    for part in [*parts, lambda hidden: token_loss(model.logits(hidden), targets)[0]]:
        found.append(min(_timed(part, x)[0] for _ in range(num_rounds + 1)))
        x = _timed(part, x)[1]
    model.zero_grad(set_to_none=True)
    return LayerCosts(found[0], tuple(found[1:-1]), found[-1])


def _through(model: Decoder, block: torch.nn.Module, positions: Tensor) -> Callable:
    return lambda hidden: run_blocks(model, [block], hidden, positions, causal=True)


def _timed(part: Callable, x: Tensor | None) -> tuple[float, Tensor]:
    given = None if x is None else x.detach().requires_grad_()
    start = perf_counter()
    result = part(given)
    result.backward(torch.ones_like(result))
    return perf_counter() - start, result.detach()
