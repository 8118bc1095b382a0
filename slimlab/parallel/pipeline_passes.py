"""One micro-batch in one chunk of a pipeline: forward, and its backward pass whole or in two parts.

Chapter 10 uses it. The graph of the whole model is cut where a micro-batch changes chunks: what
arrives is a leaf, its gradient is what goes back. Of what a chunk gives only the edge into the
graph is kept, so that its memory is free once it was sent (Korthikanti et al. 2022,
arXiv:2205.05198, appendix B).

Zero-bubble schedules part the backward pass. The input gradient goes back through the chunk without
touching a weight; on its way the gradient at the result of every layer with weights is kept. The
weight gradient takes it from there through that one layer. No matrix product is made twice; what a
norm computes going back is, and under sequence parallelism the gradient of a scattered result is
gathered twice. What is held meanwhile, besides the activations, are those gradients.

Production: torch.distributed.pipelining finds the same places by walking the graph
(stage_backward_input); Megatron-LM and the authors' code keep lists inside their linear layers.
Qi et al. 2024 (arXiv:2401.10241), section 2.
"""

from collections.abc import Callable
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from slimlab.config import InputError, require
from slimlab.parallel.data import LOSS_DIVISOR
from slimlab.parallel.stages import Stage
from slimlab.train.accumulate import Objective

BackPropagate = Callable[[Callable[[], object]], object]


class _HandOver(Exception):
    """Leaves an objective where its model would go on in another stage."""


class ChunkPass:
    """A micro-batch in a chunk, from its forward pass until its gradients are there.

    stage   what this rank has of the model
    chunk   which part of that
    hidden  (B, T, D) what came from the virtual stage before; None: the chunk is the first
    splits  the backward pass will come in two parts

    loss_sum, num_tokens  of the objective, where the chunk is the last; else None and 0
    """

    def __init__(self, stage: Stage, chunk: int, hidden: Tensor | None, splits: bool):
        self.stage, self.chunk, self.splits = stage, chunk, splits
        self.hidden = None if hidden is None else hidden.detach().requires_grad_()
        self.loss_sum, self.num_tokens = None, 0
        self._embedded: tuple[GradientEdge, Tensor] | None = None
        self._result: GradientEdge | None = None
        self._layers: list[_Layer] = []
        self._owed: list[tuple[_Layer, Tensor]] = []

    def forward(self, objective: Objective, batch: object, divisor: float) -> Tensor | None:
        """Compute what the next virtual stage needs, or the loss.

        objective  of slimlab.train.objectives; it is left where the chunk ends
        batch      the micro-batch, as the objective wants it
        divisor    what the loss is divided by before it is differentiated
        returns    (B, T, D), without a gradient; None on the last chunk

        Raises InputError as the objective does, and if it does not call its model exactly once.
        """
        model = _Model(self)
        try:
            with _recorded(self.stage, self._layers) if self.splits else _nothing():
                self.loss_sum, self.num_tokens = objective(model, batch)
        except _HandOver:
            self._end_at(model.result)
            return model.result.detach()
        require(
            model.calls == 1,
            "an objective that calls its model once",
            f"{model.calls} calls",
            "a pipeline sends each micro-batch through its stages once",
        )
        self._end_at(self.loss_sum / divisor)
        self.loss_sum = self.loss_sum.detach()
        return None

    def enter(self, ids: Tensor, given: dict) -> Tensor:
        """Send ids, or what came from the stage before, through the chunk.

        ids    (B, T)
        given  mask, causal and positions, as the objective gave them
        """
        hidden = self.hidden
        if hidden is None and self.splits:
            # A graph of its own: a table that is tied is used at both ends of the chunk.
            result = self.stage.embed(ids, given.get("positions"))
            hidden = result.detach().requires_grad_()
            if result.requires_grad:
                self._embedded = get_gradient_edge(result), hidden
        if hidden is not None and hidden.shape[0] != ids.shape[0]:
            raise _other_batch(tuple(hidden.shape), tuple(ids.shape))
        return self.stage(ids, hidden, chunk=self.chunk, **given)

    def backward(self, grad: Tensor | None, back_propagate: BackPropagate) -> Tensor | None:
        """Compute both gradients.

        grad            of what forward gave; None: of the loss
        back_propagate  is handed a function that adds to the gradients of parameters, and calls it
        returns         the gradient of hidden; None on the first chunk
        """
        if self.splits:
            result = self.input_gradient(grad)
            self.weight_gradient(back_propagate)
            return result
        if self._result is not None:
            back_propagate(lambda: torch.autograd.backward([self._result], [grad]))
        return None if self.hidden is None else _or_zeros(self.hidden.grad, self.hidden)

    def input_gradient(self, grad: Tensor | None) -> Tensor | None:
        """Compute the gradient of hidden, and of every layer's result, but of no weight.

        grad     of what forward gave; None: of the loss
        returns  the gradient of hidden; None on the first chunk
        """
        start = self.hidden if self._embedded is None else self._embedded[1]
        targets = [layer.result for layer in self._layers] + ([] if start is None else [start])
        if self._result is None or not targets:
            return None if self.hidden is None else _or_zeros(None, self.hidden)
        *grads, first = torch.autograd.grad(
            [self._result],
            targets if start is not None else [*targets, targets[-1]],
            [grad],
            retain_graph=True,
            allow_unused=True,
        )
        self._owed = [pair for pair in zip(self._layers, grads) if pair[1] is not None]
        if self._embedded is not None and first is not None:
            self._owed.append((_Layer(self._embedded[0], None, -1), first))
        self._layers, self._embedded, self._result = [], None, None
        return None if self.hidden is None else _or_zeros(first, self.hidden)

    def weight_gradient(self, back_propagate: BackPropagate) -> None:
        """Compute the gradients of the weights from those that the input gradient left.

        back_propagate  as in backward
        """
        owed, self._owed = self._owed, []
        if owed:
            back_propagate(lambda: _into_weights(owed))

    @property
    def owed_bytes(self) -> int:
        """Bytes of the gradients that wait for weight_gradient, every storage once."""
        storages = [grad.untyped_storage() for _, grad in self._owed]
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    def _end_at(self, result: Tensor) -> None:
        # Without a gradient where all that went in is frozen.
        self._result = get_gradient_edge(result) if result.requires_grad else None


class OnlyReplica:
    """The only replica of a stage; it has of DataParallel what a pipeline calls.

    stage  whose gradients these are
    """

    def __init__(self, stage: Stage):
        self._params = [param for param in stage.parameters() if param.requires_grad]

    def begin_passes(self) -> None:
        """Forget all gradients."""
        for param in self._params:
            param.grad = None

    def add_pass(self, back_propagate: Callable[[], object]) -> None:
        """Add to the gradients.

        back_propagate  does it
        """
        back_propagate()

    def finish_passes(self, loss_sum: Tensor, num_tokens: int) -> tuple[Tensor, int]:
        """Make each gradient that of the mean loss.

        loss_sum    () of the whole batch
        num_tokens  likewise
        returns     () the mean loss, and num_tokens

        Raises InputError if there is no token.
        """
        require(
            num_tokens > 0,
            "a batch with at least one target token",
            "none",
            "check what marks the positions that do not count",
        )
        grads = [param.grad for param in self._params if param.grad is not None]
        if grads:
            torch._foreach_mul_(grads, LOSS_DIVISOR / num_tokens)
        return loss_sum / num_tokens, num_tokens


class _Model:
    """What an objective is given as its model: one chunk, which answers as the whole model would.

    It answers once, and only the last chunk does; others raise _HandOver with their result kept.
    """

    def __init__(self, chunk_pass: ChunkPass):
        self._pass, self.calls, self.result = chunk_pass, 0, None

    def __getattr__(self, name: str):
        return getattr(self._pass.stage, name)

    def __call__(self, ids: Tensor, **given) -> Tensor:
        self.calls += 1
        self.result = self._pass.enter(ids, given)
        if self._pass.stage.is_last(self._pass.chunk):
            return self.result
        raise _HandOver


class _Layer(NamedTuple):
    """A layer with weights in one forward pass; layers of one number read the same input."""

    result: GradientEdge
    params: list[nn.Parameter] | None
    number: int


@contextmanager
def _recorded(stage: Stage, layers: list[_Layer]):
    """Note the results of all layers with weights of their own that a forward pass goes through."""
    last = [None]

    def note(module, inputs, result):
        params = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if params and result.requires_grad:
            number = layers[-1].number + (inputs[0] is not last[0]) if layers else 0
            layers.append(_Layer(get_gradient_edge(result), params, number))
            last[0] = inputs[0]

    tables = set(stage.embedding.modules()) if hasattr(stage, "embedding") else set()
    hooks = [
        module.register_forward_hook(note)
        for module in stage.modules()
        if module not in tables and next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _nothing():
    yield


def _into_weights(owed: list[tuple[_Layer, Tensor]]) -> None:
    # Together only what reads the same input: no layer of these stands behind another, so autograd
    # goes through each of them and no farther.
    for _, same in groupby(owed, key=lambda pair: pair[0].number):
        layers, grads = zip(*same)
        params = None
        if layers[0].params is not None:
            params = [param for layer in layers for param in layer.params]
        torch.autograd.backward([layer.result for layer in layers], grads, inputs=params)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _other_batch(found: tuple, wanted: tuple):
    return InputError(
        "the same batch on every stage of a pipeline",
        f"activations {found} from the stage before, for ids {wanted}",
        "cut the data over the axis data alone",
    )
