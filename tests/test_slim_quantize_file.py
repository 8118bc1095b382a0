"""Quantized models on disk: the same logits bit for bit, sizes as predicted, bad files refused."""

import json

import pytest
import torch

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.tensor_files import state_of, write_tensors
from slimlab.plan.params import param_shapes
from slimlab.plan.quantized_size import QuantScheme, safetensors_bytes, stored_parts
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_file import load_quantized_model, save_quantized_model
from slimlab.slim.quantize_maps import quantize
from slimlab.slim.quantize_pack import METADATA, TABLE, TENSORS, save_quantized
from slimlab.train.checkpoint import save_checkpoint

SIZES = {"vocab_size": 20, "seq_len": 8, "d_model": 16, "num_layers": 2, "num_heads": 2}


def model_of(**choices):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES | choices))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)
    return model


def ids_of(seed=0):
    return torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("choices", "options"),
    [
        ({}, {}),
        ({}, {"scheme": QuantScheme(3, False, "group", 8, "bfloat16")}),
        ({"tie_embeddings": False, "bias": True, "norm": "layer"}, {"scheme": QuantScheme(2)}),
        ({"positions": "learned"}, {"activations": "dynamic", "skip": ["blocks.0"]}),
        ({"bias": True}, {"activations": "static", "smoothing": 0.5, "outlier_threshold": 2.0}),
    ],
)
def test_a_model_that_is_read_back_gives_the_same_logits_bit_for_bit(choices, options, tmp_path):
    small = quantize_model(model_of(**choices), batches=[ids_of(1)], **options)
    folder = save_quantized_model(tmp_path / "small", small, {"step": 7})
    drawn = torch.get_rng_state()
    found, extra = load_quantized_model(folder)
    assert torch.equal(drawn, torch.get_rng_state())
    assert extra == {"step": 7}
    assert not found.training
    assert state_of(found).keys() == state_of(small).keys()
    with torch.no_grad():
        assert torch.equal(found(ids_of()), small(ids_of()))
    again = save_quantized_model(tmp_path / "again", found, extra)
    assert (folder / TENSORS).read_bytes() == (again / TENSORS).read_bytes()


def test_tied_tables_are_stored_once_and_shared_again(tmp_path):
    folder = save_quantized_model(tmp_path / "small", quantize_model(model_of()))
    found, _ = load_quantized_model(folder)
    assert found.embedding.tokens.table is found.lm_head.table


@pytest.mark.parametrize("table", [None, QuantScheme(8)])
@pytest.mark.parametrize("scheme", [QuantScheme(8), QuantScheme(4, True, "group", 32, "bfloat16")])
def test_the_file_weighs_what_the_configuration_predicts(scheme, table, tmp_path):
    config = ModelConfig(**SIZES | {"vocab_size": 256, "d_model": 128, "bias": True})
    model = build_model(config)
    small = quantize_model(model, scheme, table_scheme=table)
    folder = save_quantized_model(tmp_path / "small", small)
    write_tensors(tmp_path / "whole.safetensors", state_of(model))
    whole = {name: ("F32", shape) for name, shape in param_shapes(config).items()}
    assert (tmp_path / "whole.safetensors").stat().st_size == safetensors_bytes(whole)
    small = {}
    for name, (kind, shape) in whole.items():
        if len(shape) == 1:
            small[name] = kind, shape
        else:
            own = table if table and name.startswith("embedding") else scheme
            parts = stored_parts(shape, own)
            small |= {f"{name}.{part}": one for part, one in parts.items()}
    size = (folder / TENSORS).stat().st_size
    assert size == safetensors_bytes(small, METADATA)
    assert size < (0.27 if scheme.num_bits == 8 else 0.18) * safetensors_bytes(whole)


def test_models_and_folders_of_another_form_are_refused(tmp_path):
    with pytest.raises(InputError, match="a quantized model"):
        save_quantized_model(tmp_path / "small", model_of())
    with pytest.raises(InputError, match="an ordinary checkpoint"):
        load_quantized_model(save_checkpoint(tmp_path, model=model_of(), step=1))
    tensors = {"w": quantize(torch.ones(2, 2), QuantScheme())}
    with pytest.raises(InputError, match="a whole quantized model"):
        load_quantized_model(save_quantized(tmp_path / "loose", tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["model"].update(d_model=32), r"tokens \(20, 32\)"),
        (lambda config: config["model"].update(vocab_size=30), r"tokens \(30, 16\)"),
        (lambda config: config["model"].update(seq_len=-1), "seq_len"),
        (lambda config: config["model"].update(num_layers=3), "missing"),
        (lambda config: config["layers"].pop("blocks.0.attention.q_proj"), "left over"),
        (lambda config: config["layers"]["lm_head"].update(kind="other"), "other"),
        (lambda config: config["layers"]["lm_head"].update(kind="embedding"), "place of Linear"),
        (lambda config: config["layers"]["embedding.tokens"].update(kind="int8"), "of Embedding"),
        (lambda config: config.update(cast="zz"), "'zz'"),
        (lambda config: config.pop("extra"), "extra"),
    ],
)
def test_a_table_that_does_not_fit_its_tensors_is_refused(change, message, tmp_path):
    folder = save_quantized_model(tmp_path / "small", quantize_model(model_of()))
    table = json.loads((folder / TABLE).read_text())
    change(table["config"])
    (folder / TABLE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=message):
        load_quantized_model(folder)
