"""Generation: with and without a cache, greedy and drawn, against loops and counted draws."""

import pytest
import torch

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.cache import KVCache
from slimlab.model.generation import choose, generate

SIZES = {"vocab_size": 13, "seq_len": 12, "d_model": 12, "num_layers": 2, "num_heads": 2}


def model_of(kind="decoder", **choices):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**{**SIZES, "kind": kind, **choices})).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def prompt(*shape):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_likeliest_token_each_time(positions, use_cache):
    model, ids = model_of(positions=positions), prompt(3, 2)
    expected = ids
    for _ in range(9):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generate(model, ids, 9, use_cache=use_cache), expected)
    assert model.training  # as it was before


def test_drawn_text_is_the_same_with_and_without_cache_and_another_with_another_seed():
    model, ids = model_of(), prompt(2, 3)
    draws = {"temperature": 1.0, "top_k": 7, "top_p": 0.95}
    texts = [generate(model, ids, 9, **draws, seed=s, use_cache=c) for s, c in
             ((4, True), (4, False), (5, True))]  # fmt: skip
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_an_encoder_decoder_writes_from_its_memory():
    model, source = model_of("encoder_decoder"), prompt(2, 5)
    with torch.no_grad():
        memory = model.encode(source)
        expected = prompt(2, 1)
        for _ in range(6):
            new = model(source, expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, new), 1)
    for use_cache in (True, False):
        found = generate(model, prompt(2, 1), 6, memory=memory, use_cache=use_cache)
        assert torch.equal(found, expected)


def test_a_text_that_reached_its_stop_is_filled_with_it_and_the_others_go_on():
    model, ids = model_of(), prompt(4, 2)
    free = generate(model, ids, 8)
    stop = int(free[0, 4])
    stopped = generate(model, ids, 8, stop_id=stop)
    for row, text in zip(stopped.tolist(), free.tolist()):
        end = text.index(stop, 2) + 1 if stop in text[2:] else len(text)
        end = min(end, len(row))
        assert row[:end] == text[:end]
        assert set(row[end:]) <= {stop}
    alone = generate(model, ids[:1], 8, stop_id=stop)
    assert alone.shape[1] <= 5


def test_draws_follow_the_distribution_that_the_options_leave():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        return choose(logits, generator=generator, **options).bincount(minlength=4) / 40_000

    # Four standard deviations of a share near one half over 40 000 draws: 0.01.
    for options, expected in {
        (("temperature", 1.0),): [0.5, 0.3, 0.15, 0.05],
        (("temperature", 0.5),): [0.6849, 0.2466, 0.0616, 0.0068],
        (("temperature", 1.0), ("top_k", 2)): [0.625, 0.375, 0, 0],
        (("temperature", 1.0), ("top_p", 0.6)): [0.625, 0.375, 0, 0],
        (("temperature", 1.0), ("top_p", 0.4)): [1, 0, 0, 0],
        (("temperature", 1.0), ("top_k", 9), ("top_p", 1.0)): [0.5, 0.3, 0.15, 0.05],
    }.items():
        torch.testing.assert_close(
            shares(**dict(options)), torch.tensor(expected).float(), rtol=0, atol=0.01
        )
    assert choose(logits[:2]).tolist() == [0, 0]


def test_equal_scores_beside_the_kth_do_not_hide_the_best():
    tied = torch.zeros(200, 5)
    drawn = choose(tied, 1.0, top_k=2, generator=torch.Generator().manual_seed(0))
    assert drawn.max() <= 4


BAD = {
    "an encoder": ({"kind": "encoder"}, {}, "Decoder"),
    "no tokens": ({}, {"max_new_tokens": 0}, "max_new_tokens"),
    "too long": ({"positions": "learned"}, {"max_new_tokens": 11}, "at most 10"),
    "temperature": ({}, {"temperature": -1.0}, "temperature"),
    "top_k alone": ({}, {"top_k": 3}, "temperature above 0"),
    "top_k": ({}, {"top_k": 0, "temperature": 1.0}, "top_k"),
    "top_p": ({}, {"top_p": 0.0, "temperature": 1.0}, "top_p"),
    "top_p in words": ({}, {"top_p": "0.5", "temperature": 1.0}, "top_p = '0.5'"),
    "seed": ({}, {"seed": 2**64, "temperature": 1.0}, "seed, a whole number"),
    "no room": ({"positions": "learned", "seq_len": 2}, {}, "change: cut the beginning"),
    "memory": ({}, {"memory": torch.zeros(1, 2, 8)}, "'decoder' with memory"),
    "no memory": ({"kind": "encoder_decoder"}, {}, "'encoder_decoder' without memory"),
}


@pytest.mark.parametrize(("choices", "options", "words"), BAD.values(), ids=BAD)
def test_bad_options_are_named(choices, options, words):
    model = model_of(**choices)
    with pytest.raises(InputError, match=words):
        generate(model, prompt(1, 3), **{"max_new_tokens": 2, **options})


def test_a_model_of_another_making_is_refused():
    with pytest.raises(InputError, match="a model of kind 'Linear'"):
        generate(torch.nn.Linear(2, 2), prompt(1, 3), 2)


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-320])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [60.0, -80.0, 59.0], [-torch.inf, -2.0, -9.0]])
    assert choose(logits, temperature).tolist() == [1, 0, 1]
    assert choose(logits, temperature, top_k=2, top_p=0.9).tolist() == [1, 0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers_are_not_drawn_from(temperature):
    model = model_of()
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(InputError, match="that are not .NaN."):
        generate(model, prompt(1, 3), 2, temperature=temperature)


def test_a_cache_that_an_error_left_half_written_is_refused():
    model = model_of()
    cache = KVCache(model.config, 1, dtype=torch.float64)
    with torch.no_grad():
        model(prompt(1, 3), cache=cache)
        with pytest.raises(InputError, match="a mask of shape"):
            model(prompt(1, 2), cache=cache, mask=torch.ones(7, 7, dtype=torch.bool))
        with pytest.raises(InputError, match="3 to 5: a forward pass .* half-way"):
            model(prompt(1, 2), cache=cache)


def test_a_cache_is_for_models_that_write():
    for config in (model_of(kind="encoder").config, model_of()):
        with pytest.raises(InputError, match="give model.config"):
            KVCache(config)


def test_the_last_position_of_a_table_is_used_and_none_beyond_it():
    model = model_of(positions="learned")
    assert generate(model, prompt(1, 3), 10).shape == (1, 13)


def test_progress_is_told_of_every_token():
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    generate(model_of(), prompt(1, 2), 4, progress=progress)
    assert seen == [0, 1, 2, 3]
