"""A report comes back from its JSON as it was; what it counts is what the model has."""

import json

import pytest
import torch

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.measure import count_numbers, measure_quality
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_cast import cast_model
from slimlab.slim.report import Measured, SlimReport, Spread, Stage


def test_a_model_whose_loss_is_no_number_has_no_bits_per_byte():
    torch.manual_seed(0)
    model = build_model(ModelConfig(20, seq_len=8, d_model=16, num_layers=1, num_heads=2))
    ids = torch.arange(18)
    assert measure_quality(model, ids, 18, show=False) > 0
    model.final_norm.weight.data.fill_(3e38)  # finite, and twice of it is not
    with pytest.raises(InputError, match="a loss of (nan|inf)"):
        measure_quality(model, ids, 18, show=False)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_has_as_many_numbers_in_few_bits_as_in_many_its_biases_among_them(tied):
    sizes = {"vocab_size": 20, "seq_len": 8, "d_model": 16, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = build_model(ModelConfig(**sizes, bias=True, tie_embeddings=tied))
    count = sum(one.numel() for one in model.parameters())
    assert count_numbers(model) == count
    for scheme in (QuantScheme(8), QuantScheme(4, False, "group", 8)):
        assert count_numbers(quantize_model(model, scheme)) == count
    assert count_numbers(cast_model(model)) == count


def test_a_report_is_read_back_as_it_was_written():
    speed = Spread.of([1.0, 3.0, 2.0])
    side = Measured(9, 40, 50, 36, 1.5, speed, speed)
    stages = (Stage("original", 9, 40, 1.5, 0.0), Stage("as written", 9, 20, 1.7, 0.1))
    report = SlimReport(
        source="book",
        out="small",
        config={"quantize": "int8"},
        text={"name": "text"},
        original=side,
        slim=Measured(9, 20, 30, 10, 1.7, speed, speed),
        stages=stages,
        reading_ratio=speed,
        writing_ratio=speed,
        machine={"threads": 1},
        notes=("a note",),
    )
    stored = json.loads(json.dumps(report.as_dict()))
    assert SlimReport.from_dict(stored) == report
    assert stored["weights_ratio"] == 0.5
