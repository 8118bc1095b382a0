"""Closed forms against counts of real tensors and against published figures."""

import dataclasses
import sys

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimlab.config import InputError, ModelConfig
from slimlab.model.attention import MultiHeadAttention, scaled_dot_product_attention
from slimlab.plan import published
from slimlab.plan.flops import (
    SECONDS_PER_HOUR,
    attention_flop,
    attention_params,
    block_params,
    decoder_params,
    dollars,
    feed_forward_params,
    gpu_seconds,
    gpu_years,
    petaflop_s_days,
    rough_decoder_params,
    training_days,
    training_flop,
)
from slimlab.plan.memory import attention_score_bytes, kv_cache_bytes, param_bytes

LAYOUTS = [(4, 4, None), (4, 2, None), (4, 1, None), (4, 2, 5), (1, 1, 3)]


def config(**sizes):
    return ModelConfig(
        **{
            "vocab_size": 11,
            "seq_len": 7,
            "d_model": 8,
            "num_layers": 3,
            "num_heads": 4,
            **sizes,
        }
    )


def config_of(model):
    return ModelConfig(
        model.vocab_size, model.seq_len, model.d_model, model.num_layers, model.num_heads,
        d_ff=model.d_ff,
    )  # fmt: skip


def near(found, printed, relative):
    return abs(found - printed) <= relative * printed


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "d_head"), LAYOUTS)
def test_attention_parameters_are_those_of_the_layer(num_heads, num_kv_heads, d_head):
    layer = MultiHeadAttention(8, num_heads, num_kv_heads, d_head)
    sizes = config(num_heads=num_heads, num_kv_heads=num_kv_heads, d_head=d_head)
    assert attention_params(sizes) == sum(p.numel() for p in layer.parameters())


def test_attention_parameters_do_not_depend_on_the_number_of_heads():
    counts = {attention_params(config(num_heads=h)) for h in (1, 2, 4, 8)}
    assert counts == {4 * 8**2}


def test_the_parts_of_a_decoder_are_counted_by_hand():
    sizes = config(num_kv_heads=2, d_ff=20)
    # W^Q and W^O 8*8 each, W^K and W^V 8*4 each; two matrices of 8*20, or three; two gains of 8.
    attention, plain, gated = 64 + 64 + 32 + 32, 320, 480
    assert feed_forward_params(sizes) == plain
    assert feed_forward_params(sizes, gated=True) == gated
    assert block_params(sizes) == attention + plain + 16
    # Three blocks, a last gain of 8, tables of 11 and of 7 rows of 8.
    assert decoder_params(sizes) == 3 * (attention + plain + 16) + 8 + 88
    assert decoder_params(sizes, tied_embeddings=False) - decoder_params(sizes) == 88
    assert decoder_params(sizes, learned_positions=True) - decoder_params(sizes) == 56
    assert decoder_params(sizes, gated=True) - decoder_params(sizes) == 3 * 160


@pytest.mark.parametrize("model", published.LLAMA, ids=lambda m: m.name)
def test_exact_counts_agree_with_the_sizes_of_llama(model):
    exact = decoder_params(config_of(model), gated=model.gated, tied_embeddings=False)
    # Printed with three digits at most (6.7): half a unit of the last is 0.75 %.
    assert near(exact, model.num_params, 0.0075)
    rough = rough_decoder_params(model.num_layers, model.d_model, model.vocab_size)
    # One table instead of two and F = 8/3 D unrounded: the smallest model loses most.
    assert near(rough, exact, 0.03)
    # In the released code F is 8/3 D, rounded up to a multiple of 256.
    assert model.d_ff == -(-(8 * model.d_model // 3) // 256) * 256


def test_the_seven_billion_are_known_to_the_last_parameter():
    # Counted in the released weights: 6,738,415,616.
    exact = decoder_params(config_of(published.LLAMA[0]), gated=True, tied_embeddings=False)
    assert exact == 6_738_415_616


def test_both_counts_agree_with_the_size_of_gpt3():
    model = published.GPT3_175B
    # 175 is printed with three digits; its biases, left out here, are 0.006 %.
    assert near(decoder_params(config_of(model), learned_positions=True), model.num_params, 0.005)
    rough = rough_decoder_params(model.num_layers, model.d_model, model.vocab_size)
    assert near(rough, model.num_params, 0.005)


def test_six_n_d_agrees_with_the_published_work_of_gpt3():
    model = published.GPT3_175B
    work_flop = training_flop(model.num_params, model.num_tokens)
    # 175.0 and 300 are rounded; the paper counts its own way: half a per cent apart.
    assert near(work_flop, published.GPT3_TRAINING_FLOP.value, 0.005)
    assert near(petaflop_s_days(work_flop), published.GPT3_TRAINING_PF_DAYS.value, 0.005)


def test_gpt3_takes_centuries_of_one_gpu_and_millions_of_dollars():
    work_flop = published.GPT3_TRAINING_FLOP.value
    speed = published.V100_FLOP_PER_S.value
    years = gpu_years(work_flop, speed)
    # The three digits of 3.14e23 leave 0.2 %; the estimate prints 355 years and 4.6 million.
    assert near(years, published.GPT3_GPU_YEARS.value, 0.005)
    hours = gpu_seconds(work_flop, speed) / SECONDS_PER_HOUR
    price = dollars(hours, published.V100_DOLLARS_PER_HOUR.value)
    assert near(price, published.GPT3_DOLLARS.value, 0.02)


def test_llama_65b_takes_three_weeks():
    days = training_days(
        published.LLAMA[3].num_tokens,
        published.LLAMA_65B_TOKENS_PER_S.value,
        published.LLAMA_65B_GPUS.value,
    )
    # "Around 380 tokens" and "approximately 21 days": two digits each, half a unit is 2.4 %.
    assert near(days, published.LLAMA_65B_DAYS.value, 0.024)


def test_every_published_figure_stands_beside_its_source():
    figures = [x for x in vars(published).values() if dataclasses.is_dataclass(x)]
    records = [x for x in figures if not isinstance(x, type)] + list(published.LLAMA)
    assert len(records) >= 13
    for record in records:
        assert "20" in record.source
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.source = ""


@pytest.mark.parametrize(("T", "S"), [(5, 5), (5, 7)])
def test_attention_flop_is_what_torch_counts(T, S):
    query, key, value = (torch.zeros(2, 4, n, 3) for n in (T, S, S))
    with FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(query, key, value, form="explicit")
    assert attention_flop(T, 4 * 3, num_keys=S, batch_size=2) == counter.get_total_flops()


def test_attention_flop_grows_with_the_square_of_the_length():
    assert attention_flop(64, 8) == 4 * 64 * 64 * 8
    assert attention_flop(128, 8) == 4 * attention_flop(64, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bytes_are_those_of_the_tensors(dtype):
    size = dtype.itemsize
    scores = torch.zeros(2, 4, 5, 7, dtype=dtype)
    assert attention_score_bytes(5, 4, size, num_keys=7, batch_size=2) == scores.nbytes
    layer = MultiHeadAttention(8, 4, 2).to(dtype)
    held = sum(p.nbytes for p in layer.parameters())
    assert param_bytes(attention_params(config(num_kv_heads=2)), size) == held
    # Keys and values of three layers: (B, K, T, E).
    cache = [torch.zeros(2, 2, 5, 2, dtype=dtype) for _ in range(2 * 3)]
    found = kv_cache_bytes(config(num_kv_heads=2), 5, 2, size)
    assert found == sum(x.nbytes for x in cache)


def test_grouped_queries_save_the_cache_in_proportion():
    full, grouped, single = (kv_cache_bytes(config(num_kv_heads=k), 5, 2, 2) for k in (4, 2, 1))
    assert (full, grouped) == (4 * single, 2 * single)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: training_flop(0, 1e9),
        lambda: training_flop(1e9, float("inf")),
        lambda: training_flop("7B", 1e9),
        lambda: gpu_seconds(1e9, -1.0),
        lambda: dollars(True, 1.0),
        lambda: petaflop_s_days(-1.0),
        lambda: training_days(1e9, 100.0, 2.5),
        lambda: rough_decoder_params(0, 8, 11),
        lambda: attention_flop(5, 8, batch_size=0),
        lambda: attention_score_bytes(5, 4, 0),
        lambda: kv_cache_bytes(config(), 5, -2, 2),
        lambda: param_bytes(1.5, 2),
    ],
)
def test_a_count_that_is_no_positive_number_is_refused(bad):
    with pytest.raises(InputError, match="given"):
        bad()


def test_a_count_may_come_from_numpy():
    assert training_flop(numpy.int64(3), numpy.float32(2)) == 36


def test_predictions_do_not_import_what_they_predict():
    import subprocess

    code = "import sys, slimlab.plan.flops, slimlab.plan.memory, slimlab.plan.published as p; "
    code += "print([m for m in sys.modules if m.startswith(('torch', 'slimlab.model'))])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
