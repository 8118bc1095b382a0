"""Placements: which layer lives on which device, for contrast with layouts."""

import pytest
import torch

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.parallel.layout import Layout
from slimlab.parallel.placement import Placement, even_placement, held_by_device

SIZES = {"vocab_size": 12, "seq_len": 4, "d_model": 8, "num_layers": 5, "num_heads": 2}


def model_of(**choices):
    with torch.device("meta"):
        return build_model(ModelConfig(**SIZES | choices))


@pytest.mark.parametrize("num_devices", [1, 2, 3, 5])
def test_every_parameter_is_whole_on_one_device_and_blocks_are_spread_evenly(num_devices):
    model = model_of(tie_embeddings=False)
    devices = [f"cuda:{number}" for number in range(num_devices)]
    held = held_by_device(model, even_placement(model, devices))
    assert list(held) == devices
    assert [name for names in held.values() for name in names] == [
        name for name, _ in model.named_parameters()
    ]
    blocks = [{name.split(".")[1] for name in names if "blocks" in name} for names in held.values()]
    assert sum(map(len, blocks)) == 5
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_a_tied_table_on_two_devices_is_held_by_both_and_on_one_once():
    model = model_of()
    held = held_by_device(model, even_placement(model, [0, 1]))
    assert "embedding.tokens.weight" in held[0]
    assert "lm_head.weight" in held[1]
    (names,) = held_by_device(model, even_placement(model, [0])).values()
    assert "embedding.tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_longer_name_goes_before_a_shorter_one():
    table = (("embedding", 0), ("blocks", 0), ("blocks.4", 1), ("final_norm", 1), ("lm_head", 0))
    held = held_by_device(model_of(), Placement(table))
    assert {name.rpartition(".")[0].split(".")[0] for name in held[1]} == {"blocks", "final_norm"}
    assert all(name.startswith(("blocks.4.", "final_norm.")) for name in held[1])


def test_rules_of_a_layout_are_no_placement_and_the_reverse():
    with pytest.raises(InputError, match="Layout"):
        held_by_device(model_of(), Placement((("heads", "tensor"),)))
    with pytest.raises(InputError, match="Placement"):
        Layout((("blocks.0", "cuda:0"),))


def test_layers_that_are_missing_twice_or_not_there_are_named():
    for wrong, named in (
        (lambda: held_by_device(model_of(), Placement((("embedding", 0),))), "blocks.0"),
        (lambda: held_by_device(model_of(), Placement((("blocks.5", 0),))), "blocks.5"),
        (lambda: Placement((("blocks.0", 0), ("blocks.0", 1))), "twice"),
        (lambda: Placement((("blocks.0",),)), "pairs"),
        (lambda: even_placement(model_of(), range(6)), "6 devices"),
        (lambda: even_placement(model_of(), []), "give 1 devices"),
        (lambda: even_placement(model_of(kind="encoder_decoder"), [0]), "kind"),
    ):
        with pytest.raises(InputError, match=named):
            wrong()
