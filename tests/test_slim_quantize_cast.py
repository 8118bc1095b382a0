"""Models in 16 bits: a cast, stored at half the size, and read back bit for bit."""

import pytest
import torch

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.tensor_files import state_of
from slimlab.plan.params import param_shapes
from slimlab.plan.quantized_size import safetensors_bytes
from slimlab.slim.quantize_cast import CASTS, cast_model, cast_of
from slimlab.slim.quantize_file import load_quantized_model, save_quantized_model
from slimlab.slim.quantize_pack import METADATA, TENSORS

SIZES = {"vocab_size": 20, "seq_len": 8, "d_model": 16, "num_layers": 2, "num_heads": 2}
CODES = {"bfloat16": "BF16", "float16": "F16"}


def model_of(**choices):
    torch.manual_seed(0)
    return build_model(ModelConfig(**SIZES | choices))


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("choices", [{}, {"tie_embeddings": False, "positions": "sinusoidal"}])
def test_a_cast_model_is_stored_at_half_the_size_and_comes_back_bit_for_bit(
    dtype, choices, tmp_path
):
    model = model_of(**choices)
    small = cast_model(model, dtype)
    folder = save_quantized_model(tmp_path / "small", small, {"step": 7})
    shapes = param_shapes(model.config)
    predicted = safetensors_bytes({k: (CODES[dtype], v) for k, v in shapes.items()}, METADATA)
    assert (folder / TENSORS).stat().st_size == predicted
    found, extra = load_quantized_model(folder)
    assert extra == {"step": 7}
    assert cast_of(found) == dtype
    wanted = state_of(small)
    assert state_of(found).keys() == wanted.keys() == state_of(model).keys()
    for name, tensor in state_of(found).items():
        assert torch.equal(tensor, state_of(model)[name].to(CASTS[dtype]))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(found(ids), small(ids))


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 7), ("float16", 10)])
def test_no_number_moves_by_more_than_half_a_digit_of_its_fraction(dtype, bits):
    model = model_of()
    small = state_of(cast_model(model, dtype))
    for name, tensor in state_of(model).items():
        normal = tensor.detach().abs() > 1e-4  # below, float16 has fewer digits
        moved = (small[name].float() - tensor).abs() / tensor.abs()
        assert moved[normal].max() <= 2.0 ** -(bits + 1)


def test_numbers_that_float16_cannot_hold_are_refused_and_the_model_stays(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.final_norm.weight[3] = 70_000
    with pytest.raises(InputError, match="1 of 16 are larger"):
        cast_model(model, "float16")
    assert cast_of(cast_model(model)) == "bfloat16"
    assert cast_of(model) is None
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    with pytest.raises(InputError, match="final_norm.weight: 1 of 16 are NaN"):
        cast_model(model)
    with pytest.raises(InputError, match="a model in float32"):
        cast_model(model_of().double())
    with pytest.raises(InputError, match="float8"):
        cast_model(model_of(), "float8")
    with pytest.raises(InputError, match="a quantized model"):
        save_quantized_model(tmp_path / "small", model_of())
