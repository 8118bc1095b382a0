"""Configurations check themselves and say what was asked, given and to be changed."""

import dataclasses
import json

import pytest

from slimlab.config import InputError, ModelConfig, TrainingConfig, check_divides

SIZES = {"vocab_size": 11, "seq_len": 7, "d_model": 12, "num_layers": 2, "num_heads": 3}


def test_sizes_that_are_left_out_follow_from_the_others():
    config = ModelConfig(**SIZES)
    assert (config.num_kv_heads, config.d_head, config.d_ff) == (3, 4, 48)


def test_a_given_head_size_need_not_follow_from_the_width():
    config = ModelConfig(**{**SIZES, "d_model": 10}, d_head=5)
    assert config.d_head * config.num_heads != config.d_model


def test_a_configuration_cannot_be_changed_but_varied_and_is_checked_again():
    config = ModelConfig(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 24
    with pytest.raises(InputError, match="num_layers"):
        dataclasses.replace(config, num_layers=0)


@pytest.mark.parametrize("name", [*SIZES, "num_kv_heads", "d_head", "d_ff"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True])
def test_a_size_that_is_no_positive_whole_number_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=name) as caught:
        ModelConfig(**{**SIZES, name: value})
    assert repr(value) in caught.value.given


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_would():
    with pytest.raises(InputError) as caught:
        ModelConfig(**{**SIZES, "num_heads": 5})
    assert "num_heads = 5, d_model = 12, remainder 2" in caught.value.given
    assert "1, 2, 3, 4, 6, 12" in caught.value.change


def test_key_value_heads_must_divide_the_query_heads():
    with pytest.raises(InputError, match="num_kv_heads"):
        ModelConfig(**SIZES, num_kv_heads=2)


def test_the_message_says_what_was_asked_given_and_to_be_changed():
    text = str(InputError("an even number", "7", "give 6 or 8"))
    assert text == "asked for: an even number\ngiven: 7\nchange: give 6 or 8"


def test_the_fitting_numbers_of_a_huge_size_are_found_at_once():
    # Trying all numbers below 10**12 would take half a day.
    with pytest.raises(InputError) as caught:
        check_divides("num_heads", 3, "d_model", 10**12)
    assert "choose num_heads from 1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, ..." in caught.value.change


def test_three_feed_forward_matrices_cost_about_as_much_as_two():
    gated = ModelConfig(**{**SIZES, "d_model": 96}, feed_forward="swiglu")
    plain = ModelConfig(**{**SIZES, "d_model": 96})
    assert (gated.d_ff, plain.d_ff) == (256, 384)
    assert 3 * gated.d_ff == 2 * plain.d_ff


@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ({"kind": "decoders"}, "encoder_decoder"),
        ({"positions": "rope"}, "sinusoidal"),
        ({"norm": None}, "rms"),
        ({"feed_forward": "gelu_new"}, "gelu_tanh"),
        ({"d_model": 9, "positions": "sinusoidal"}, "even d_model"),
        ({"rotary_base": 1}, "rotary_base"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"bias": 1}, "bias"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_segments": -1}, "num_segments"),
        ({"num_segments": 2}, "encoder only"),
    ],
)
def test_a_choice_that_is_unknown_or_contradicts_another_is_refused(choice, word):
    with pytest.raises(InputError, match=word):
        ModelConfig(**{**SIZES, **choice})


TRAINING = {"num_steps": 60, "batch_size": 6, "seq_len": 9}


def test_a_training_configuration_fills_in_what_is_left_out_and_survives_json():
    config = TrainingConfig(**TRAINING, betas=(0.8, 0.9), micro_batch_size=4)
    assert (config.warmup_steps, config.micro_batch_size) == (3, 4)
    assert TrainingConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert TrainingConfig(**TRAINING, clip_norm=None).clip_norm is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_steps", 0, "at least 1"),
        ("batch_size", 2.0, "whole number"),
        ("seq_len", True, "whole number"),
        ("seq_len", None, "whole number"),
        ("micro_batch_size", 7, "at most 6"),
        ("warmup_steps", 61, "at most 60"),
        ("warmup_steps", -1, "at least 0"),
        ("peak_lr", float("nan"), "number above 0"),
        ("peak_lr", float("inf"), "number above 0"),
        ("peak_lr", "1e-3", "number above 0"),
        ("peak_lr", 0, "number above 0"),
        ("final_lr_fraction", 1.5, "at most 1"),
        ("weight_decay", -0.1, "at least 0"),
        ("betas", (0.9,), "pair"),
        ("betas", (0.9, 1.0), "betas"),
        ("clip_norm", 0, "clip_norm"),
        ("seed", 2**32, "at most 4294967295"),
        ("save_every", 0, "at least 1"),
        ("keep_checkpoints", 0, "at least 1"),
        ("keep_checkpoints", None, "whole number"),
        ("optimizer", "adam", "adamw, adamw_own, sgd"),
        ("precision", "fp16", "float32, bfloat16, float16"),
        ("recompute", True, "none, block"),
        ("device", None, "device"),
    ],
)
def test_a_training_number_out_of_range_is_refused_by_name(name, value, words):
    with pytest.raises(InputError, match=words) as caught:
        TrainingConfig(**{**TRAINING, name: value})
    assert name in str(caught.value)
