"""Predicted FLOP against what torch counts in the models, forward and in a training step."""

from dataclasses import replace

import pytest
import torch
from plan_cases import CASES, GPT2, batch_of, loss_of, model_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from slimlab.config import InputError, ModelConfig
from slimlab.plan import published
from slimlab.plan.flops import training_flop
from slimlab.plan.params import num_params, param_shapes
from slimlab.plan.training_flop import (
    backward_flop,
    forward_flop,
    forward_flop_by_part,
    recomputed_flop,
    training_step_flop,
)

# torch's counter has formulas for the fused attention of GPUs and none for the CPU's, which
# takes its arguments in the same order.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}


def sizes_of(config):
    """A batch for a configuration: sizes that differ from each other and from the model's."""
    return (3, 7, {"source_len": 5} if config.kind == "encoder_decoder" else {})


def count(config, form="explicit", recompute="none"):
    """FLOP of a forward pass and of a whole training step, as torch counts them."""
    model = model_of(config, form, recompute)
    batch_size, seq_len, source = sizes_of(config)
    batch = batch_of(config, batch_size, seq_len, **source)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss = loss_of(model, *batch)
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_flop_of_forward_and_of_a_training_step_are_what_torch_counts(config, recompute):
    batch_size, seq_len, source = sizes_of(config)
    forward, step = count(config, recompute=recompute)
    assert forward_flop(config, batch_size, seq_len, **source) == forward
    predicted = training_step_flop(config, batch_size, seq_len, **source, recompute=recompute)
    assert predicted == step


@pytest.mark.parametrize("form", ["explicit", "tiled", "fused"])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("name", ["decoder llama", "encoder pairs", "both post"])
def test_every_form_of_attention_is_predicted(name, recompute, form):
    config = CASES[name]
    batch_size, seq_len, source = sizes_of(config)
    given = {"form": form, "recompute": recompute}
    _, step = count(config, **given)
    assert training_step_flop(config, batch_size, seq_len, **source, **given) == step


def test_the_parts_are_those_of_the_modules():
    config = CASES["decoder llama"]
    model = model_of(config, "explicit")
    with FlopCounterMode(display=False, depth=4) as counter:
        model(**batch_of(config, 3, 7)[0])
    by_module = {name: sum(c.values()) for name, c in counter.get_flop_counts().items()}

    def counted(*endings):
        return sum(n for name, n in by_module.items() if name.endswith(endings))

    parts = forward_flop_by_part(config, 3, 7)
    projections = counted("q_proj", "k_proj", "v_proj", "out_proj")
    assert parts["projections"] == projections
    assert parts["products"] == counted(".attention") - projections
    assert parts["feed_forward"] == counted(".feed_forward")
    assert parts["logits"] == counted("lm_head")
    assert set(parts) == {"projections", "products", "feed_forward", "logits"}


def test_published_formulas_follow():
    # Their letters, but L for l. Both papers take K = H and F = 4 D.
    B, s, h, L, V = 3, 10, 24, 5, 36
    config = ModelConfig(V, s, h, L, 4)
    per_block = B * L * s * h**2
    model_flop = 72 * per_block * (1 + s / (6 * h) + V / (12 * h * L))
    assert training_step_flop(config, B) == pytest.approx(model_flop, rel=1e-12)
    with_recomputation = 96 * per_block * (1 + s / (6 * h) + V / (16 * L * h))
    found = training_step_flop(config, B, recompute="block")
    assert found == pytest.approx(with_recomputation, rel=1e-12)


def test_six_n_d_is_the_step_of_a_large_model_without_attention_and_tables():
    model = published.GPT3_175B
    config = ModelConfig(
        model.vocab_size, model.seq_len, model.d_model, model.num_layers, model.num_heads
    )
    parts = forward_flop_by_part(config, 1)
    multiplied = 3 * (sum(parts.values()) - parts["products"])
    rule = training_flop(num_params(config), config.seq_len)
    # A tied table multiplies once, as often as it is counted; norms are what the rule has too much.
    assert 0 < rule / multiplied - 1 < 1e-4
    # And attention's products are what it has too little: s / 6h of the blocks.
    assert 0.02 < 3 * parts["products"] / multiplied < 0.03


def test_recomputation_costs_a_third_at_most():
    step = training_step_flop(GPT2, 8)
    extra = recomputed_flop(GPT2, 8)
    assert recomputed_flop(GPT2, 8, recompute="none") == 0
    assert training_step_flop(GPT2, 8, recompute="block") == step + extra
    assert 0.2 < extra / step < 1 / 3
    assert step == forward_flop(GPT2, 8) + backward_flop(GPT2, 8)


def test_lengths_that_are_not_given_are_those_of_the_configuration():
    config = CASES["both llama"]
    full = {"seq_len": config.seq_len, "source_len": config.seq_len}
    assert forward_flop(config, 2) == forward_flop(config, 2, **full)
    assert forward_flop(config, 2, source_len=4) < forward_flop(config, 2)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: forward_flop(CASES["decoder llama"], 0),
        lambda: forward_flop(CASES["decoder llama"], 2, -3),
        lambda: forward_flop(CASES["decoder llama"], 2, 5, source_len=4),
        lambda: forward_flop(CASES["both llama"], 2, 5, source_len=0),
        lambda: forward_flop(replace(CASES["decoder llama"], positions="learned"), 2, 999),
        lambda: forward_flop({"d_model": 8}, 2),
        lambda: param_shapes("gpt2"),
        lambda: backward_flop(CASES["decoder llama"], 2, form="flash"),
        lambda: training_step_flop(CASES["decoder llama"], 2, recompute="all"),
    ],
)
def test_bad_input_is_refused(bad):
    with pytest.raises(InputError, match="given"):
        bad()
