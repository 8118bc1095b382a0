"""The choices of published models, by name."""

import pytest
import torch

from slimlab.config import InputError
from slimlab.model.build import build_model
from slimlab.model.encoder import Encoder
from slimlab.model.families import FAMILIES, family_config
from slimlab.model.seq2seq import EncoderDecoder
from slimlab.model.transformer import Decoder

SIZES = {"vocab_size": 11, "seq_len": 7, "d_model": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("vaswani", EncoderDecoder), ("bert", Encoder), ("gpt2", Decoder), ("llama", Decoder)],
)
def test_each_family_builds_the_model_of_its_kind(name, kind):
    assert type(build_model(family_config(name, **SIZES))) is kind


def test_every_family_is_listed_above():
    assert set(FAMILIES) == {"vaswani", "bert", "gpt2", "llama"}


@pytest.mark.parametrize(
    ("name", "d_ff", "num_params"),
    [
        # Counted by hand from the papers' matrices for V=11, D=8, F=32 or 24, two norms a block.
        ("gpt2", 32, 11 * 8 + 7 * 8 + 4 * (64 + 8) + (2 * 8 * 32 + 40) + 3 * 16),
        ("llama", 24, 2 * 11 * 8 + 4 * 64 + 3 * 8 * 24 + 3 * 8),
    ],
)
def test_decoders_have_the_parameters_of_their_papers(name, d_ff, num_params):
    config = family_config(name, **SIZES)
    assert config.d_ff == d_ff
    assert sum(p.numel() for p in Decoder(config).parameters()) == num_params


def test_a_field_that_is_given_takes_the_place_of_the_choice():
    config = family_config("llama", **SIZES, tie_embeddings=True, num_kv_heads=1)
    assert config.tie_embeddings
    assert config.num_kv_heads == 1
    assert config.norm == "rms"


def test_bert_tells_two_segments_apart():
    model = build_model(family_config("bert", **SIZES)).eval()
    ids = torch.tensor([[3, 1, 4]])
    first, second = (model.encode(ids, segments=torch.full_like(ids, n)) for n in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("gpt3", {}, "vaswani, bert, gpt2, llama"),
        ("gpt2", {"num_head": 2}, "given: num_head\n"),
        ("gpt2", {"d_model": 9}, "remainder 1"),
    ],
)
def test_unknown_names_and_fields_and_wrong_sizes_are_refused(name, change, expected):
    with pytest.raises(InputError, match=expected):
        family_config(name, **{**SIZES, **change})


def test_a_missing_size_is_named():
    with pytest.raises(InputError, match="no seq_len"):
        family_config("bert", **{key: SIZES[key] for key in SIZES if key != "seq_len"})
