"""The pruning step of slim_checkpoint, with retraining.

Neurons and heads are removed for good, those first that write least on a sample of the text: file,
memory and time shrink. Single weights become zeros,
which only the file need not hold. Chapter 15 measures both.

Production removes a little, retrains, and removes again, for as long as the budget lasts.
"""

import copy
import math

from torch import Tensor

from slimlab.config import require
from slimlab.model.transformer import Decoder
from slimlab.slim.prune_masks import PruneMasks, two_four_mask
from slimlab.slim.prune_scores import magnitude_masks, prunable_weights
from slimlab.slim.prune_structure import (
    head_scores,
    neuron_scores,
    remove_heads,
    remove_neurons,
    weakest,
)
from slimlab.slim.prune_training import GradualMasks
from slimlab.slim.recipe_config import MASKED, SlimConfig
from slimlab.slim.recipe_work import Work, learn, sample_windows

RISING = 2 / 3  # of the retraining in which sparsity rises; the rest is for what stays


def sizes_left(model: Decoder, config: SlimConfig) -> dict[str, int]:
    """Tell what pruning will leave of every layer.

    model    left as it is
    config   its prune, prune_what
    returns  "neurons" and "heads"

    Raises InputError if a layer would be empty, with the largest sparsity that leaves something; if
    nothing would go, with the least that takes something; and for 2:4 if 4 does not divide a width.
    """
    sizes = model.config
    left = {"neurons": sizes.d_ff, "heads": sizes.num_heads}
    if config.prune is None:
        return left
    if config.prune_what in MASKED:
        _check_masks(prunable_weights(model), config)
        return left
    for name, (count, step) in _prunable(model, config).items():
        asked, change = f"more than {step} of the {name} in a layer", 'give prune_what="weights"'
        require(count > step, asked, str(count), change)
        gone = _num_removed(config.prune, count, step)
        left[name] = count - gone
        given = f"prune = {config.prune:g}"
        require(
            left[name] > 0,
            f"a sparsity that leaves something of the {count} {name} of a layer",
            f"{given}, all {count} would go",
            f"give at most {1000 * (count - step) // count / 1000:g}",
        )
        other = ', or prune_what="neurons"' if name == "heads" else ""
        require(
            gone > 0,
            f"a sparsity that takes at least {step} of the {count} {name} of a layer",
            f"{given}, none would go",
            f"give at least {_least(step, count):g}{other}",
        )
    return left


def _check_masks(weights: dict[str, Tensor], config: SlimConfig) -> None:
    if config.prune_what == "weights":
        masks = magnitude_masks(weights, config.prune)
        largest = max(one.numel() for one in masks.values())
        asked = f"a sparsity that takes at least one of the {largest:,} weights of a matrix"
        given, change = f"prune = {config.prune:g}, none would go", _least(1, largest)
        some_go = any(not bool(one.all()) for one in masks.values())
        require(some_go, asked, given, f"give at least {change:g}")
        return
    for name, weight in weights.items():
        asked, given = "widths that 4 divides, for two of every four", tuple(weight.shape)
        require(weight.shape[1] % 4 == 0, asked, f"{name} {given}", 'give prune_what="weights"')


def _least(step: int, count: int) -> float:
    """The least sparsity of few digits that takes `step` of `count`."""
    digits = 1000 * 10 ** max(0, len(str(count)) - 3)
    return math.ceil(digits * step / count) / digits


def prune_step(model: Decoder, work: Work) -> Decoder:
    """Prune a copy of a model and train what is left.

    model    left as it is
    work     its config says what goes
    returns  a model of fewer numbers, or with zeros
    """
    config, smaller = work.config, copy.deepcopy(model)
    if config.prune_what in MASKED:
        return _with_zeros(smaller, work)
    prunable = _prunable(model, config)
    if "heads" in prunable:
        count, step = prunable["heads"]
        gone = _num_removed(config.prune, count, step)
        scores = head_scores(smaller, sample_windows(work))
        smaller = remove_heads(smaller, weakest(scores, gone, num_groups=step))
    if "neurons" in prunable:
        gone = _num_removed(config.prune, *prunable["neurons"])
        scores = neuron_scores(smaller, sample_windows(work))
        smaller = remove_neurons(smaller, weakest(scores, gone))
    return learn(smaller, work, config.prune_steps)


def _with_zeros(model: Decoder, work: Work) -> Decoder:
    config, weights = work.config, prunable_weights(model)
    model.requires_grad_(True)
    rising = int(RISING * config.prune_steps)
    if config.prune_what == "weights" and rising:
        gradual = GradualMasks(model, final_sparsity=config.prune, num_steps=rising)
        learn(model, work, config.prune_steps, watch=gradual)
        gradual.masks.finish()
        return model
    if config.prune_what == "weights":
        found = magnitude_masks(weights, config.prune)
    else:
        found = {name: two_four_mask(weight) for name, weight in weights.items()}
    masks = PruneMasks(model, found)
    learn(model, work, config.prune_steps, watch=lambda _: masks.apply())
    masks.finish()
    return model


def _prunable(model: Decoder, config: SlimConfig) -> dict[str, tuple[int, int]]:
    """What is removed: name -> how many a layer has, and the number that must go together."""
    sizes = model.config
    shared = 1 if sizes.num_kv_heads == sizes.num_heads else sizes.num_kv_heads
    parts = {"neurons": (sizes.d_ff, 1), "heads": (sizes.num_heads, shared)}
    return parts if config.prune_what == "both" else {config.prune_what: parts[config.prune_what]}


def _num_removed(sparsity: float, count: int, step: int) -> int:
    return step * round(sparsity * count / step)
