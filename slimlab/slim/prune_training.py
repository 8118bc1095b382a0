"""Sparsity that rises while a model trains.

Chapter 15 uses it. Masks change in small steps, and what stays can make up for each of them before
the next; what is pruned once never comes back.

Zhu and Gupta 2017 (arXiv:1710.01878).

Production schedules run over a good part of the training, not over a few steps after it.
"""

from torch import nn

from slimlab.slim.prune_masks import PruneMasks, gradual_sparsity
from slimlab.slim.prune_scores import magnitude_masks, prunable_weights


class GradualMasks:
    """Prune the linear layers of a model more and more; called after every step of training.

    model           changed in place
    final_sparsity  reached after num_steps and kept from then on
    num_steps       over which it rises, a multiple of every
    every           masks change only every so many steps
    start_sparsity  before the first step
    scope           as in slimlab.slim.prune_scores.magnitude_masks

    `masks` holds the PruneMasks; a weight that is pruned stays so. Give the object to
    slimlab.train.loop.train as `watch`: what is saved after a step is then pruned already. (Text
    held out in the middle of a training is read before that, by weights which momentum has moved.)

    Raises InputError as gradual_sparsity and magnitude_masks do.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        final_sparsity: float,
        num_steps: int,
        every: int = 1,
        start_sparsity: float = 0.0,
        scope: str = "layer",
    ):
        self.weights, self.scope = prunable_weights(model), scope
        self.schedule = {
            "final_sparsity": final_sparsity,
            "num_steps": num_steps,
            "every": every,
            "start_sparsity": start_sparsity,
        }
        self.sparsity = gradual_sparsity(0, **self.schedule)
        magnitude_masks(self.weights, final_sparsity, scope=scope)  # refuses now, not at the end
        self.masks = PruneMasks(model, self._choose())

    def __call__(self, record: dict) -> None:
        """Choose other masks if it is time, and set what they prune to zero.

        record  of the step that was made; its "step" is read
        """
        self.masks.apply()  # so that what was pruned is smallest, whatever momentum did
        sparsity = gradual_sparsity(record["step"], **self.schedule)
        if sparsity > self.sparsity:
            self.sparsity = sparsity
            self.masks.replace(self._choose())

    def _choose(self) -> dict:
        return magnitude_masks(self.weights, self.sparsity, scope=self.scope)
