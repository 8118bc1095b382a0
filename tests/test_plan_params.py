"""Predicted names and shapes of parameters against those of the models themselves."""

import dataclasses
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from plan_cases import CASES, GPT2, model_of

from slimlab.config import ModelConfig
from slimlab.plan import params
from slimlab.plan.flops import block_params, decoder_params
from slimlab.plan.params import num_params, param_shapes, params_by_part


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_names_shapes_and_their_order_are_those_of_the_model(config):
    found = [(name, tuple(p.shape)) for name, p in model_of(config).named_parameters()]
    assert list(param_shapes(config).items()) == found


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_counts_and_parts_add_up(config):
    counted = sum(p.numel() for p in model_of(config).parameters())
    assert num_params(config) == sum(params_by_part(config).values()) == counted


def test_every_choice_that_changes_the_parameters_stands_in_some_case():
    seen = {field.name: set() for field in dataclasses.fields(ModelConfig)}
    for config in CASES.values():
        for name in seen:
            seen[name].add(getattr(config, name))
    for name in ("tie_embeddings", "bias", "norm", "norm_place", "num_segments", "kind"):
        assert len(seen[name]) >= 2, name
    assert seen["positions"] == {"rotary", "learned", "sinusoidal", "none"}
    assert seen["feed_forward"] == {"gelu", "gelu_tanh", "relu", "swiglu"}
    assert any(1 < c.num_kv_heads < c.num_heads for c in CASES.values())
    assert any(c.num_heads * c.d_head != c.d_model for c in CASES.values())


def test_parts_hold_what_their_names_say():
    config = CASES["encoder pairs"]
    D, F, V, L = config.d_model, config.d_ff, config.vocab_size, config.num_layers
    parts = params_by_part(config)
    assert parts["tokens"] == V * D
    assert parts["positions"] == config.seq_len * D
    assert parts["segments"] == 2 * D
    assert parts["attention"] == L * 4 * (D * D + D)
    assert parts["feed_forward"] == L * (2 * D * F + F + D)
    # Two per block, one behind the embedding, one before the logits, each a gain and a bias.
    assert parts["norms"] == (2 * L + 2) * 2 * D
    # Transform, pooler and pair head with biases, a bias per token; the table itself is tied.
    assert parts["heads"] == 2 * (D * D + D) + (2 * D + 2) + V


def test_the_sizes_of_gpt2_are_known_to_the_last_parameter():
    # The released weights hold 124,439,808 parameters.
    assert num_params(GPT2) == 124_439_808


def test_choices_that_are_not_given_are_read_from_the_configuration():
    plain = ModelConfig(11, 7, 8, 3, 4, d_ff=20)
    gated = dataclasses.replace(plain, feed_forward="swiglu", tie_embeddings=False)
    learned = dataclasses.replace(gated, positions="learned")
    assert block_params(gated) == block_params(plain, gated=True)
    assert decoder_params(gated) == decoder_params(plain, gated=True, tied_embeddings=False)
    assert decoder_params(learned) == decoder_params(gated, learned_positions=True)
    assert decoder_params(learned, gated=False, tied_embeddings=True, learned_positions=False) == (
        decoder_params(plain)
    )
    for config in (plain, gated, learned):
        assert decoder_params(config) == num_params(config)


def test_a_block_is_the_share_of_one_layer():
    for config in CASES.values():
        shapes = param_shapes(config)
        first = [prod(s) for name, s in shapes.items() if name.startswith("blocks.0.")]
        cross = [prod(s) for n, s in shapes.items() if n.startswith("blocks.0.cross")]
        assert block_params(config) == sum(first) - sum(cross)


def test_plans_read_configurations_and_nothing_else():
    names = sorted(path.stem for path in Path(params.__file__).parent.glob("[a-z]*.py"))
    assert {"activations", "params", "training_flop", "training_memory"} <= set(names)
    code = "".join(f"import slimlab.plan.{name}; " for name in names) + "import sys; "
    code += "print([m for m in sys.modules if m.startswith(('torch', 'numpy', 'slimlab.model'))])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
