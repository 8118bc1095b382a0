"""Mixed precision: 16 bits where they do no harm, 32 where they are needed.

Chapter 05 explains it. Three things go wrong when float16 replaces float32 throughout, and each
has its remedy:

* gradients below 3e-8 become 0: multiply the loss before back-propagation, divide the gradients
  afterwards (`LossScaler`)
* a weight of 1 stays 1 when less than 5e-4 is added to it: keep a 32-bit master of every weight
  (`MasterWeights`), or keep the weights in 32 bits and let only the matrix products be computed in
  16 (`autocast_for`)
* long sums lose their small terms: add in 32 bits (the loss, clip_gradients, and the gradients
  that MasterWeights gathers)

bfloat16 has as many bits of exponent as float32, so a gradient that float32 can hold does not
become 0 or infinite in it: it needs no loss scaling. It has fewer digits than float16, so it needs
masters all the more.

Bytes per parameter with AdamW: weight and gradient 2 + 2, master and two means 4 + 4 + 4, in all
16, as many as in float32 throughout, and 18 if gradients are summed in 32 bits, as here. What
halves is the activations.

Micikevicius et al. 2018 (arXiv:1710.03740). Production lets the GPU decide whether a step is
skipped, so that the processor need not wait (torch.amp.GradScaler), and holds back the conversion
of weights until their layer needs them (fully sharded training).
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from slimlab.config import check_choice, check_number, check_size, require

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Beyond float32's range the scaled loss would always be infinite; below the smallest float16, loss
# scaling has nothing left to mend.
LEAST_SCALE, GREATEST_SCALE = 2.0**-24, torch.finfo(torch.float32).max


def autocast_for(device: str | torch.device, precision: str) -> AbstractContextManager:
    """Choose the context in which a forward pass is computed in the given precision.

    device     where the model is
    precision  "float32": nothing changes; "bfloat16" or "float16": torch.autocast computes matrix
               products in 16 bits and leaves sums, norms and losses in 32; weights stay as they are
    returns    a context manager for the forward pass and the loss; backward stands outside it

    With "float16" use LossScaler too. Raises InputError for an unknown precision.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    if precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, dtype=PRECISIONS[precision])


class LossScaler:
    """Keep float16 gradients from vanishing: enlarge the loss, shrink the gradients again.

    scale            first factor
    growth_factor    the factor is multiplied by it after growth_interval good steps, above 1
    backoff_factor   and by this after a step with infinite or NaN gradients, between 0 and 1
    growth_interval  good steps in a row until the factor grows
    enabled          False: every call passes through, so that one loop serves all precisions

    For each update, in this order, of one optimizer:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)      only if something looks at the gradients, such as clipping
        scaler.step(optimizer)
        scaler.update()

    The names, the arithmetic and the state_dict are those of torch.amp.GradScaler. Raises
    InputError for factors out of range.
    Micikevicius et al. 2018, section 3.2.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        check_number("scale", scale, float, LEAST_SCALE, GREATEST_SCALE)
        check_number("growth_factor", growth_factor, float, 1 + 1e-9, GREATEST_SCALE)
        check_number("backoff_factor", backoff_factor, float, 1e-9, 1 - 1e-9)
        check_size("growth_interval", growth_interval)
        self._scale, self.enabled = float(scale), enabled
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self._good_steps = growth_interval, 0
        self._stage, self._found_inf = "ready", False

    def get_scale(self) -> float:
        """Return the present factor, 1.0 if not enabled."""
        return self._scale if self.enabled else 1.0

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply the loss, so that every gradient is multiplied.

        loss     () or any shape
        returns  the same shape; call backward on it
        """
        return loss * self.get_scale()

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor and remember whether one is infinite or NaN.

        optimizer  whose parameters' gradients are divided, in place

        Raises InputError if called twice for one update, without a gradient, or for float16
        gradients, which would vanish after all when divided.
        """
        if not self.enabled:
            return
        _in_order(self._stage == "ready", "unscale_ once for each update", self._stage)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        grads = [param.grad for param in params if param.grad is not None]
        _in_order(bool(grads), "scale(loss).backward() before unscale_ or step", "no gradient")
        require(
            all(grad.dtype != torch.float16 for grad in grads),
            "gradients of float32",
            "gradients of float16",
            "keep the weights in float32 under autocast_for, or optimize MasterWeights(model)",
        )
        for grad in grads:
            grad.mul_(1 / self._scale)
        self._found_inf = not all(bool(grad.isfinite().all()) for grad in grads)
        self._stage = "unscaled"

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let the optimizer update the weights, unless a gradient is infinite or NaN.

        optimizer  of the same parameters as in unscale_, which is called here if it was not
        returns    whether the weights were updated

        Raises InputError if called twice without update, and as unscale_ does.
        """
        if not self.enabled:
            optimizer.step()
            return True
        _in_order(self._stage != "stepped", "update between two steps", "step twice")
        if self._stage == "ready":
            self.unscale_(optimizer)
        if not self._found_inf:
            optimizer.step()
        self._stage = "stepped"
        return not self._found_inf

    def update(self) -> None:
        """Shrink the factor after a skipped step, enlarge it after enough good ones.

        Raises InputError if no step was taken before, or if the factor has become so small that
        the loss itself must be infinite or NaN.
        """
        if not self.enabled:
            return
        _in_order(self._stage != "ready", "step before update", "update alone")
        if self._found_inf:
            self._scale, self._good_steps = self._scale * self.backoff_factor, 0
            self._check_scale()
        else:
            self._good_steps += 1
            if self._good_steps == self.growth_interval:
                grown = self._scale * self.growth_factor
                self._scale = grown if grown <= GREATEST_SCALE else self._scale
                self._good_steps = 0
        self._stage, self._found_inf = "ready", False

    def _check_scale(self) -> None:
        require(
            self._scale >= LEAST_SCALE,
            "gradients that are finite at some scale",
            f"infinite or NaN gradients at every scale down to {self._scale:g}",
            "the loss itself is infinite or NaN: look for a batch without targets, a learning "
            "rate that is too high, and go on from the last good checkpoint",
        )

    def state_dict(self) -> dict:
        """Return factor, counter and settings, under the names of torch.amp.GradScaler."""
        if not self.enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self._good_steps,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on with a saved factor.

        state_dict  of a LossScaler or a torch.amp.GradScaler

        Raises InputError if it was saved by a scaler that was not enabled.
        """
        if not self.enabled:
            return
        names = self.state_dict().keys()
        require(
            names <= state_dict.keys(),
            f"the state of a scaler that was enabled: {', '.join(names)}",
            f"a state with {', '.join(state_dict) or 'nothing in it'}",
            "make the scaler anew: it finds its factor in a few steps",
        )
        self._scale, self._good_steps = state_dict["scale"], state_dict["_growth_tracker"]
        for name in ("growth_factor", "backoff_factor", "growth_interval"):
            setattr(self, name, state_dict[name])


class MasterWeights:
    """Train a 16-bit model through a copy of its weights in 32 bits.

    model  its weights are taken over as masters, then it is converted to dtype in place
    dtype  torch.bfloat16, or torch.float16 together with LossScaler

    `masters` is the same model in float32: make the optimizer and save checkpoints from it. For
    each update:
        objective of the 16-bit model, backward, gather_gradients(), as often as there are
        micro-batches; then the optimizer's step, and write_back()

    Raises InputError for a model that is not in float32 or finer, whose low bits are lost already,
    and for another dtype.
    Micikevicius et al. 2018, section 3.1.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16):
        require(
            dtype in (torch.bfloat16, torch.float16),
            "dtype: torch.bfloat16 or torch.float16",
            f"dtype = {dtype}",
            "in float32 a model is its own master",
        )
        narrow = [n for n, p in model.named_parameters() if torch.finfo(p.dtype).bits < 32]
        require(
            not narrow,
            "a model in float32, so that the masters have all its digits",
            f"16 bits or fewer in {', '.join(narrow[:3])}",
            "load or make it in float32 and give it then; MasterWeights converts it",
        )
        self.masters = copy.deepcopy(model).float()
        self.model = model.to(dtype)

    @torch.no_grad()
    def gather_gradients(self) -> None:
        """Add the model's gradients to the masters' in 32 bits and take them off the model.

        Micro-batches are so summed in 32 bits, as production does it.
        """
        for param, master in zip(self.model.parameters(), self.masters.parameters()):
            if param.grad is not None:
                grad = param.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad + grad
                param.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters to 16 bits and give them to the model."""
        for param, master in zip(self.model.parameters(), self.masters.parameters()):
            param.copy_(master)


def _in_order(condition: bool, asked: str, given: str) -> None:
    require(condition, asked, given, "call scale, backward, unscale_ if needed, step, update")
