"""Optimizers: what becomes of the gradients that back-propagation left behind.

Back-propagation computes gradients and changes no weight; an optimizer reads them and changes the
weights, by the rules in update_rules.py. Chapter 05 explains them.

The state has torch.optim's names and shapes, so a state_dict of SGD or AdamW here loads into
torch's optimizer of that name, and back. Production fuses the loop over parameters into a few
kernels (`make_optimizer` picks torch's fused AdamW), keeps 32-bit state for 16-bit weights
(precision.py) and cuts the state into shards; it also knows variants that are not here: Nesterov's
momentum, AMSGrad, complex and sparse parameters.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slimlab.config import InputError, check_choice, check_number, require
from slimlab.train.optimizer_checks import LEAST, CheckedOptimizer, check_settings
from slimlab.train.update_rules import adamw_update, sgd_update

OPTIMIZERS = ("adamw", "adamw_own", "sgd")


class SGD(CheckedOptimizer):
    """Stochastic gradient descent: step against the gradient, with a memory if momentum > 0.

    params        parameters, or groups (dicts) with settings of their own
    lr            learning rate, above 0
    momentum      share of the last direction that is kept, 0 up to 1
    weight_decay  this share of each weight is added to its gradient (an L2 penalty)

    Raises InputError for settings out of range and parameters that are not floating-point.
    Robbins and Monro 1951; Polyak 1964. Equal to torch.optim.SGD.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ):
        # torch's SGD reads the last two from a checkpoint, though they are constants here.
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "dampening": 0, "nesterov": False})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group, param, grad in self.parameters_with_gradient():
            buffer, momentum = None, group["momentum"]
            if momentum:
                buffer = self.state[param].get("momentum_buffer")
                buffer = torch.zeros_like(param) if buffer is None else buffer
                self.state[param]["momentum_buffer"] = buffer
            sgd_update(param, grad, buffer, group["lr"], momentum, group["weight_decay"])


class AdamW(CheckedOptimizer):
    """Adam with decoupled weight decay: steps of about lr whatever the size of the gradient.

    params        parameters, or groups (dicts) with settings of their own
    lr            learning rate, above 0
    betas         decay of the running mean of gradients and of their squares, each in [0, 1);
                  0.95 for the second is the custom of language models, torch's default is 0.999
    eps           added to the divisor, at least 0
    weight_decay  every step shrinks each weight by the share lr * weight_decay

    Its state per parameter: step, exp_avg and exp_avg_sq, two tensors of the parameter's size.
    Raises InputError for settings out of range and parameters that are not floating-point.
    Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019. Equal to torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient; the others are not decayed either."""
        for group, param, grad in self.parameters_with_gradient():
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
            means = state["exp_avg"], state["exp_avg_sq"]
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            adamw_update(param, grad, *means, int(state["step"]), **settings)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True
) -> list[dict]:
    """Split the parameters into those that weight decay shrinks and those that it leaves alone.

    Matrices decay. Gains and biases (one dim) do not: they are few, they scale or shift whole
    features, and pulling a gain to 0 silences the layer behind it. Embedding tables are matrices
    and decay by default, as in GPT-2's, BERT's and Megatron's recipes, and because a tied table is
    also the output matrix; the rows of rare tokens then shrink between their appearances, for
    which reason OLMo 2 excludes them.

    model             parameters with requires_grad=False are left out; tied ones count once
    weight_decay      of the matrices, at least 0
    decay_embeddings  False: the tables of nn.Embedding, tied or not, do not decay
    returns           one or two groups, as optimizers take them, with their names in param_names

    Raises InputError if the model has nothing to train.
    OLMo 2, 2025 (arXiv:2501.00656), section 3.4.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decaying, others = {}, {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decays = param.dim() >= 2 and (decay_embeddings or id(param) not in tables)
            (decaying if decays else others)[name] = param
    require(
        bool(decaying or others),
        "a model with parameters that require a gradient",
        f"a {type(model).__name__} with none",
        "unfreeze what you want to train: param.requires_grad_(True)",
    )
    groups = [(decaying, weight_decay), (others, 0.0)]
    return [
        {"params": list(named.values()), "param_names": list(named), "weight_decay": decay}
        for named, decay in groups
        if named
    ]


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.9,
    decay_embeddings: bool = True,
) -> torch.optim.Optimizer:
    """Make an optimizer for a model, its parameters grouped by parameter_groups.

    name          "adamw": torch's, fused; "adamw_own": AdamW of this module, the same numbers to
                  rounding; "sgd": SGD of this module
    model         whose parameters are updated
    lr            learning rate, above 0
    weight_decay  of the matrices
    betas, eps    for AdamW
    momentum      for SGD
    decay_embeddings  as in parameter_groups

    Raises InputError for an unknown name and for settings out of range.
    """
    check_choice("name", name, OPTIMIZERS)
    check_settings({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
    groups = parameter_groups(model, weight_decay, decay_embeddings=decay_embeddings)
    return optimizer_of_groups(name, groups, lr=lr, betas=betas, eps=eps, momentum=momentum)


def optimizer_of_groups(
    name: str,
    groups: list[dict],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Make an optimizer for groups of parameters, as make_optimizer does for a model.

    name    as in make_optimizer
    groups  dicts with "params" and "weight_decay", as parameter_groups returns them
    lr, betas, eps, momentum  as in make_optimizer

    Raises InputError as make_optimizer does.
    """
    check_choice("name", name, OPTIMIZERS)
    settings = {"lr": lr, "betas": betas, "eps": eps}
    for group in groups:
        check_settings({**settings, "weight_decay": group["weight_decay"], "momentum": momentum})
    if name == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=_has_fused_kernel(groups))
    if name == "adamw_own":
        return AdamW(groups, **settings)
    return SGD(groups, lr, momentum)


def _has_fused_kernel(groups: list[dict]) -> bool:
    devices = {param.device.type for group in groups for param in group["params"]}
    return devices <= {"cpu", "cuda", "mps"}


@torch.no_grad()
def clip_gradients(
    params: Iterable, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Shorten all gradients by one factor if their common length is above max_norm.

    The direction stays, since all are scaled alike. 16-bit gradients are squared in 32 bits.

    params              parameters, or (name, parameter) pairs such as model.named_parameters()
    max_norm            length that the gradients may have together, above 0; infinity only measures
    error_if_nonfinite  raise if the length is infinite or NaN, before any gradient is changed;
                        else the gradients become NaN or 0, as in torch, for a loss scaler to skip
    returns             () their length before clipping

    Raises InputError for no parameters, a max_norm that is not above 0, and on request for
    gradients that are not finite, naming them.
    Pascanu, Mikolov and Bengio 2013; equal to torch.nn.utils.clip_grad_norm_.
    """
    named = [(p if isinstance(p, tuple) else (f"parameter {i}", p)) for i, p in enumerate(params)]
    require(
        bool(named),
        "parameters whose gradients are clipped",
        "none",
        "give model.named_parameters() anew: a generator can be walked through only once",
    )
    if max_norm != math.inf:
        check_number("max_norm", max_norm, float, LEAST, math.inf)
    grads = {name: param.grad for name, param in named if param.grad is not None}
    if not grads:
        return torch.zeros(())
    norms = [_length(grad) for grad in grads.values()]
    total_norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    if error_if_nonfinite and not total_norm.isfinite():
        raise _not_finite(grads, float(total_norm))
    # No "if": on a GPU, looking at the norm would make the processor wait for it.
    factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(factor.to(grad.device))
    return total_norm


def _length(grad: Tensor) -> Tensor:
    dtype = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype
    return torch.linalg.vector_norm(grad, dtype=dtype)


def _not_finite(grads: dict[str, Tensor], total_norm: float) -> InputError:
    counts = {name: int((~grad.isfinite()).sum()) for name, grad in grads.items()}
    bad = [f"{name} ({count} of {grads[name].numel()})" for name, count in counts.items() if count]
    given = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    return InputError(
        "gradients that are finite numbers",
        f"a length of {total_norm}; infinite or NaN in {given or 'none, but their squares are'}",
        "lower the learning rate or lengthen the warm-up; look for a division by 0 or the "
        "logarithm of 0 in the loss; with float16 use LossScaler, which skips such steps",
    )
