"""Models quantized: equal to the dequantized model, better ways lose less, nothing touched."""

import copy

import pytest
import torch
from torch import nn

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_layers import Int8Linear, QuantizedEmbedding, QuantizedLinear
from slimlab.slim.quantize_maps import quantize
from slimlab.slim.quantize_training import train_quantized

SIZES = {"vocab_size": 20, "seq_len": 8, "d_model": 16, "num_layers": 2, "num_heads": 2}
SCHEMES = [
    QuantScheme(8),
    QuantScheme(4, True, "group", 8, "bfloat16"),
    QuantScheme(3, False, "channel"),
    QuantScheme(2, False, "group", 16),
]


def model_of(**choices):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES | choices))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    return model


def ids_of(seed=0, rows=4):
    return torch.randint(20, (rows, 8), generator=torch.Generator().manual_seed(seed))


def dequantized(model, scheme):
    """The same model, whose weights were rounded in place by hand."""
    rounded = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in {
            id(one.weight): one.weight
            for one in rounded.modules()
            if isinstance(one, nn.Linear | nn.Embedding)
        }.values():
            weight.copy_(quantize(weight, scheme).dequantize())
    return rounded


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"tie_embeddings": False, "bias": True, "norm": "layer", "positions": "learned"},
        {"feed_forward": "swiglu", "num_kv_heads": 1},
    ],
)
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(scheme, choices):
    model, ids = model_of(**choices), ids_of()
    small = quantize_model(model, scheme)
    with torch.no_grad():
        assert torch.equal(small(ids), dequantized(model, scheme)(ids))


def test_an_encoder_decoder_is_quantized_too():
    model = model_of(kind="encoder_decoder")
    small = quantize_model(model)
    with torch.no_grad():
        assert torch.equal(
            small(ids_of(), ids_of(1)), dequantized(model, QuantScheme())(ids_of(), ids_of(1))
        )


def test_tied_tables_are_held_once_and_the_original_is_not_touched():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    small = quantize_model(model)
    assert small.embedding.tokens.table is small.lm_head.table
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert isinstance(model.lm_head, nn.Linear)
    assert model.training
    assert not small.training


def test_a_table_may_have_a_map_of_its_own():
    small = quantize_model(model_of(), QuantScheme(4), table_scheme=QuantScheme(8))
    assert isinstance(small.embedding.tokens, QuantizedEmbedding)
    assert small.lm_head.table.scheme.num_bits == 8
    assert small.blocks[0].feed_forward.up_proj.table.scheme.num_bits == 4


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_a_model_that_multiplies_in_int8_is_close_to_the_original(activations):
    model, ids = model_of().eval(), ids_of(7)
    small = quantize_model(model, activations=activations, batches=[ids_of(1), ids_of(2)])
    assert sum(isinstance(one, Int8Linear) for one in small.modules()) == 2 * 6 + 1
    assert not any(isinstance(one, QuantizedLinear | nn.Linear) for one in small.modules())
    with torch.no_grad():
        exact = model(ids)
        assert (small(ids) - exact).norm() < 0.05 * exact.norm()


def test_compensated_rounding_loses_less_of_a_models_output():
    model = model_of(d_model=32, d_ff=64).eval()
    batches = [ids_of(seed, rows=32) for seed in range(4)]
    scheme, held_out = QuantScheme(3, True, "group", 16), ids_of(9, rows=32)
    lost = {}
    for rounding in ("nearest", "compensated"):
        small = quantize_model(
            model, scheme, table_scheme=QuantScheme(8), rounding=rounding, batches=batches
        )
        with torch.no_grad():
            lost[rounding] = (small(held_out) - model(held_out)).norm().item()
    assert lost["compensated"] < 0.8 * lost["nearest"]


def test_smoothing_and_outliers_rescue_a_model_with_loud_features():
    model = model_of().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward_norm.weight[3] *= 200
            block.feed_forward.up_proj.weight[:, 3] /= 200
    batches, ids, lost = [ids_of(1), ids_of(2)], ids_of(7), {}
    for name, options in {
        "plain": {},
        "smooth": {"smoothing": 0.5},
        "apart": {"outlier_threshold": 20.0},
        "both": {"smoothing": 0.5, "outlier_threshold": 20.0, "rounding": "compensated"},
    }.items():
        small = quantize_model(model, activations="static", batches=batches, **options)
        with torch.no_grad():
            lost[name] = (small(ids) - model(ids)).norm().item()
    assert small.blocks[0].feed_forward.up_proj.smoothing is not None
    assert max(lost["smooth"], lost["apart"], lost["both"]) < 0.5 * lost["plain"]


def test_modules_that_are_skipped_stay_as_they_are():
    small = quantize_model(model_of(tie_embeddings=False), skip=["lm_head", "blocks.0"])
    assert isinstance(small.lm_head, nn.Linear)
    assert isinstance(small.blocks[0].attention.q_proj, nn.Linear)
    assert isinstance(small.blocks[1].attention.q_proj, QuantizedLinear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": QuantScheme(4, True, "group", 5)}, "nearest that divides is 4"),
        ({"scheme": QuantScheme(4), "activations": "dynamic"}, "symmetric weights of 8 bits"),
        ({"activations": "both"}, "one of none, dynamic, static"),
        ({"activations": "static"}, "batches = None"),
        ({"rounding": "compensated"}, "batches = None"),
        ({"rounding": "up"}, "one of nearest, compensated"),
        ({"smoothing": 0.5}, "activations 'none' with smoothing"),
        ({"range_method": "max"}, "one of min_max"),
        ({"skip": ["head"]}, r"\['head'\]"),
        ({"skip": ["blocks", "embedding", "lm_head"]}, "to quantize"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        quantize_model(model_of(), **options)


def test_weights_that_are_not_finite_or_not_float32_are_refused_by_name():
    model = model_of()
    with torch.no_grad():
        model.blocks[1].feed_forward.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="blocks.1.feed_forward.up_proj.weight: 1 of 1,024"):
        quantize_model(model)
    with pytest.raises(InputError, match="float32"):
        quantize_model(model_of().bfloat16())
    with pytest.raises(InputError, match="linear layers or embeddings"):
        quantize_model(nn.LayerNorm(4))


def test_groups_that_do_not_divide_every_layer_are_fitted_if_asked_for():
    model, scheme = model_of(d_ff=12, feed_forward="swiglu"), QuantScheme(4, True, "group", 8)
    with pytest.raises(InputError, match="remainder 4"):
        quantize_model(model, scheme)
    small = quantize_model(model, scheme, fit_groups=True)
    sizes = {one.table.shape[1]: one.table.scheme.quant_group_size for one in layers_of(small)}
    assert sizes == {16: 8, 12: 6}
    pretending = train_quantized(copy.deepcopy(model), scheme, fit_groups=True).eval()
    with torch.no_grad():
        assert torch.equal(pretending(ids_of()), small(ids_of()))


def layers_of(small):
    return [one for one in small.modules() if isinstance(one, QuantizedLinear)]
