"""Masks at work: set weights to zero, keep them there while training, make it permanent.

Chapter 15 uses it. A masked model is as large and as slow as before; slimlab.plan.sparse_storage
says what its file costs, slimlab.slim.prune_structure makes a model smaller.

Han et al. 2015 (arXiv:1506.02626, pruning and retraining); Zhu and Gupta 2017 (arXiv:1710.01878,
the gradual schedule); Mishra et al. 2021 (arXiv:2104.08378, two of four).

Production keeps the 2:4 pattern because some accelerators multiply it at up to twice the rate; an
ordinary CPU does not.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimlab.config import check_number, check_size, require
from slimlab.slim.prune_scores import check_sparsity, check_weights


class PruneMasks:
    """Hold the pruned weights of a model at zero, from now until `finish`.

    model  changed in place: weights outside the masks become zero; copy it first to keep it
    masks  name of a parameter -> prune_mask of its shape (bool, True: stays)

    Gradients of pruned weights are set to zero as they are summed up, so that clipping counts only
    what can move. Momentum of earlier steps still moves pruned weights: call `apply` after every
    step of the optimizer.

    Raises InputError for a name the model has not, another shape or dtype, weights that are not
    finite, or a mask that keeps nothing; the model is then as before.
    Han et al. 2015, section 3.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]):
        self.params = dict(model.named_parameters())
        self.masks: dict[str, Tensor] = {}
        self._hooks: list = []
        self.replace(masks)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Go on with other masks, as a gradual schedule does, and apply them.

        masks  as in the constructor; parameters that are not named are free again
        """
        _check_masks(self.params, masks)
        self.finish()
        for name, mask in masks.items():
            self.masks[name] = mask.to(self.params[name].device)
            if self.params[name].requires_grad:
                self._hooks.append(self.params[name].register_hook(self._masked(name)))
        self.apply()

    def apply(self) -> None:
        """Set the pruned weights to zero; call it after every step of the optimizer."""
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.params[name].masked_fill_(~mask, 0.0)

    def finish(self) -> None:
        """Make the zeros permanent: they stay as ordinary weights, no longer held."""
        for hook in self._hooks:
            hook.remove()
        if self.masks:
            self.apply()
        self._hooks, self.masks = [], {}

    def _masked(self, name: str):
        mask = self.masks[name]
        return lambda grad: grad.masked_fill(~mask, 0.0)


def two_four_mask(weight: Tensor) -> Tensor:
    """Keep the two largest of every four neighbours of a row.

    weight   (O, I), 4 divides I; neighbours are input features 0-3, 4-7 and so on
    returns  prune_mask (O, I) with exactly two of every four kept; of equal ones the first two stay

    Raises InputError if 4 does not divide I, or weights are not finite.
    Mishra et al. 2021, section 3.
    """
    check_weights({"weight": weight})
    width = weight.shape[-1] if weight.dim() else 0
    below = 4 * (width // 4)
    nearest = f"{below} or {below + 4}" if below else "4"
    require(
        weight.dim() == 2 and width % 4 == 0,
        "a matrix (O, I) with I a multiple of 4",
        f"weight {tuple(weight.shape)}",
        f"pad it to I = {nearest}, or leave this layer as it is"
        if weight.dim() == 2
        else "give the weight of a linear layer",
    )
    fours = weight.detach().abs().reshape(-1, 4)
    largest = fours.argsort(dim=1, descending=True, stable=True)[:, :2]
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, largest, True)
    return mask.view(weight.shape)


def is_two_four(weight: Tensor) -> bool:
    """Tell whether every four neighbours of a row have at most two that are not zero.

    weight  (O, I)
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).reshape(-1, 4).sum(1) <= 2).all())


def gradual_sparsity(
    step: int,
    *,
    final_sparsity: float,
    num_steps: int,
    start_sparsity: float = 0.0,
    start_step: int = 0,
    every: int = 1,
) -> float:
    """Raise the sparsity fast at first, while there is much to spare, and slowly at the end.

    step            of the training, 0 for the first
    final_sparsity  reached at start_step + num_steps and kept from then on
    num_steps       over which it rises, a multiple of every
    start_sparsity  up to and including start_step
    start_step      from which on it rises
    every           masks change only every so many steps; in between the sparsity stands
    returns         final + (start - final) (1 - (t - start_step) / num_steps)^3, t the last step at
                    which masks changed

    Raises InputError for numbers out of range, or a final sparsity below that of the start.
    Zhu and Gupta 2017, equation 1.
    """
    check_number("step", step, int, 0, math.inf)
    check_number("start_step", start_step, int, 0, math.inf)
    check_size("num_steps", num_steps)
    check_size("every", every)
    check_sparsity(final_sparsity)
    check_sparsity(start_sparsity)
    require(
        start_sparsity <= final_sparsity < 1,
        "start_sparsity of at most final_sparsity, and that below 1",
        f"start_sparsity = {start_sparsity}, final_sparsity = {final_sparsity}",
        "begin at 0 and end at 0.5, for instance",
    )
    nearest = max(every, every * round(num_steps / every))
    require(
        num_steps % every == 0,
        "num_steps, a multiple of every, so that the final sparsity is reached",
        f"num_steps = {num_steps}, every = {every}",
        f"give num_steps = {nearest}",
    )
    done = min(max(step - start_step, 0), num_steps) // every * every
    return final_sparsity + (start_sparsity - final_sparsity) * (1 - done / num_steps) ** 3


def _check_masks(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        require(
            name in params,
            f"masks of parameters of this model, such as {next(iter(params))}",
            f"a mask of {name}",
            "make the masks from prunable_weights(model)",
        )
        shape, is_tensor = tuple(params[name].shape), isinstance(mask, Tensor)
        given = f"{tuple(mask.shape)} of dtype {mask.dtype}" if is_tensor else type(mask).__name__
        require(
            is_tensor and mask.dtype == torch.bool and tuple(mask.shape) == shape,
            f"a mask of {name}: bool, {shape}",
            given,
            "make the masks from prunable_weights(model)",
        )
        require(
            bool(mask.any()),
            f"a mask that keeps something of {name}",
            f"one that prunes all {mask.numel()}",
            "prune less, or remove the layer with slimlab.slim.prune_structure",
        )
    if masks:
        check_weights({name: params[name] for name in masks})
