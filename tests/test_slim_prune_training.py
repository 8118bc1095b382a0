"""Gradual pruning in the training loop: sparsity as scheduled, pruned weights never come back."""

import pytest
import torch

from slimlab.config import InputError, ModelConfig, TrainingConfig
from slimlab.model.initialise import initialise
from slimlab.model.transformer import Decoder
from slimlab.slim.prune_masks import gradual_sparsity
from slimlab.slim.prune_scores import prunable_weights
from slimlab.slim.prune_training import GradualMasks
from slimlab.train.loop import train

IDS = torch.randint(32, (400,), generator=torch.Generator().manual_seed(0))


def small_decoder():
    return initialise(Decoder(ModelConfig(32, 16, 16, 2, 2)), seed=0)


def zeros_of(model):
    return {name: (weight == 0).clone() for name, weight in prunable_weights(model).items()}


def test_sparsity_rises_as_scheduled_and_nothing_comes_back():
    model, seen = small_decoder(), []
    gradual = GradualMasks(model, final_sparsity=0.8, num_steps=8, every=2)

    def watch(record):
        gradual(record)
        seen.append(zeros_of(model))

    config = TrainingConfig(10, 4, 16, peak_lr=1e-2, device="cpu")
    train(model, IDS, config, show=False, watch=watch)
    for step, zeros in enumerate(seen, 1):
        wanted = gradual_sparsity(step, final_sparsity=0.8, num_steps=8, every=2)
        for mask in zeros.values():
            assert int(mask.sum()) == round(wanted * mask.numel())
    for before, after in zip(seen, seen[1:]):
        assert all((after[name] | ~before[name]).all() for name in before)
    assert gradual.sparsity == 0.8


def test_a_run_goes_on_from_a_checkpoint_that_is_pruned(tmp_path):
    config = TrainingConfig(4, 4, 16, peak_lr=1e-2, device="cpu", save_every=2)
    model = small_decoder()
    gradual = GradualMasks(model, final_sparsity=0.5, num_steps=2, every=1)
    train(model, IDS, config, show=False, watch=gradual, run_folder=tmp_path)
    again = small_decoder()
    train(again, IDS, config, show=False, run_folder=tmp_path, say=lambda _: None)
    assert all(torch.equal(zeros, zeros_of(again)[name]) for name, zeros in zeros_of(model).items())
    assert all(zeros.float().mean() == 0.5 for zeros in zeros_of(again).values())


def test_a_sparsity_that_would_empty_a_layer_is_refused_before_training():
    model = small_decoder()
    before = {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}
    with pytest.raises(InputError, match="would go"):
        GradualMasks(model, final_sparsity=0.99999, num_steps=4)
    with pytest.raises(InputError, match="multiple of every"):
        GradualMasks(model, final_sparsity=0.5, num_steps=5, every=2)
    assert all(torch.equal(before[name], w) for name, w in prunable_weights(model).items())
