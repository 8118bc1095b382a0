"""Training with the straight-through estimator: same outputs as the integers, and it helps."""

import math

import pytest
import torch
from torch import nn

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.tensor_files import state_of
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_training import train_quantized

SIZES = {"vocab_size": 20, "seq_len": 8, "d_model": 16, "num_layers": 2, "num_heads": 2}


def model_of(**choices):
    torch.manual_seed(0)
    return build_model(ModelConfig(**SIZES | choices))


def text_of(seed, rows=16):
    """Every token is the one before it, plus one or two, modulo 20."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (rows, 9), generator=draw)
    return steps.cumsum(dim=1) % 20


def loss_of(model, text):
    logits = model(text[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def trained(model, num_steps, first_seed=0):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, text_of(first_seed + step)).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("scheme", [QuantScheme(4), QuantScheme(3, False, "group", 8)], ids=str)
@pytest.mark.parametrize("choices", [{}, {"tie_embeddings": False, "bias": True}])
def test_the_model_in_training_computes_what_the_quantized_one_will(scheme, choices):
    model = model_of(**choices)
    names, weights = list(state_of(model)), list(model.parameters())
    train_quantized(model, scheme)
    assert list(state_of(model)) == names
    assert all(one is other for one, other in zip(model.parameters(), weights))
    small, ids = quantize_model(model, scheme), text_of(3)[:, :8]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), small(ids))


def test_rounded_inputs_are_those_of_the_int8_layers():
    model = train_quantized(model_of(), QuantScheme(8), quantize_inputs=True)
    small, ids = quantize_model(model, activations="dynamic"), text_of(3)[:, :8]
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids), small(ids), rtol=1e-3, atol=1e-3)


def test_training_with_rounding_beats_rounding_after_training_at_2_bits():
    scheme, held_out = QuantScheme(2), text_of(1000, rows=64)
    model = trained(model_of(), 120)
    after = quantize_model(trained(model, 60, first_seed=120), scheme)
    aware = trained(train_quantized(trained(model_of(), 120), scheme), 60, first_seed=120)
    with torch.no_grad():
        lost = [float(loss_of(one, held_out)) for one in (after, quantize_model(aware, scheme))]
    least = math.log(2)  # nobody can know whether the next step is one or two
    assert least < lost[1] < least + 0.5 * (lost[0] - least)


def test_what_cannot_be_quantized_is_refused_and_left_alone():
    model = model_of()
    with pytest.raises(InputError, match="nearest that divides is 4"):
        train_quantized(model, QuantScheme(4, True, "group", 5))
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(InputError, match="linear layers or embeddings"):
        train_quantized(nn.LayerNorm(3), QuantScheme(4))
