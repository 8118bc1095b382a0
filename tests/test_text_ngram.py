"""The n-gram model: Witten-Bell by hand, by exact fractions, and as a lottery."""

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from slimlab.config import InputError
from slimlab.text.ngram import NGram

# 0 a, 1 b, 2 c; 3 never occurs
ABACAB = [0, 1, 0, 2, 0, 1]


def exact(ids, vocab_size, context, token):
    """Witten-Bell from the definition, by searching the text: P(token | context), a Fraction."""
    if context is None:
        return Fraction(1, vocab_size)
    size = len(context)
    shorter = exact(ids, vocab_size, context[1:] if size else None, token)
    windows = range(len(ids) - size)
    after = [ids[at + size] for at in windows if tuple(ids[at : at + size]) == tuple(context)]
    if not after:
        return shorter
    kinds = len(set(after))
    return (after.count(token) + kinds * shorter) / (len(after) + kinds)


def test_unigrams_by_hand():
    # a 3, b 2, c 1 of 6 tokens, 3 kinds; the 3 go to the uniform 1/4: P(a) = (3 + 3/4) / 9
    model = NGram(ABACAB, 4, order=1)
    probs = [math.exp(value) for value in model.log_probs()]
    assert probs == pytest.approx([3.75 / 9, 2.75 / 9, 1.75 / 9, 0.75 / 9], rel=1e-14)


def test_bigrams_by_hand():
    # After a: b twice, c once; two kinds. P(b|a) = (2 + 2 * 2.75/9) / 5; P(d|a) = 2 * 0.75/9 / 5
    model = NGram(ABACAB, 4, order=2)
    probs = [math.exp(value) for value in model.log_probs([0])]
    expected = [2 * 3.75 / 45, (2 + 5.5 / 9) / 5, (1 + 3.5 / 9) / 5, 1.5 / 45]
    assert probs == pytest.approx(expected, rel=1e-14)
    # After b: a once, one kind.
    assert math.exp(model.log_prob(0, [2, 1])) == pytest.approx((1 + 3.75 / 9) / 2, rel=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_those_of_the_definition_and_sum_to_one(order):
    generator = random.Random(order)
    vocab_size = 7
    ids = generator.choices(range(5), k=60)  # 5 and 6 never occur
    model = NGram(ids, vocab_size, order)
    for _ in range(40):
        context = generator.choices(range(vocab_size), k=generator.randrange(7))
        recent = tuple(context[max(0, len(context) - order + 1) :])
        expected = [exact(ids, vocab_size, recent, token) for token in range(vocab_size)]
        assert sum(expected) == 1
        probs = [math.exp(value) for value in model.log_probs(context)]
        # rounding of a few operations in double precision
        assert probs == pytest.approx([float(value) for value in expected], rel=1e-13)
        assert math.fsum(probs) == pytest.approx(1, abs=1e-14)
        for token in range(vocab_size):
            assert model.log_prob(token, context) == pytest.approx(
                math.log(expected[token]), rel=1e-12
            )


def test_a_context_never_seen_falls_back_on_its_newest_part():
    model = NGram(ABACAB, 4, order=4)
    assert model.log_probs([3, 3, 1, 0]) == model.log_probs([1, 0])
    assert model.log_probs([3]) == model.log_probs([])
    # A token that ends the text was seen, but nothing after it.
    assert NGram([0, 1], 3, order=2).log_probs([1]) == NGram([0, 1], 3, order=2).log_probs([])


def test_a_token_never_seen_has_a_probability_in_every_context():
    model = NGram(ABACAB, 4, order=5)
    for context in ([], [0], [0, 1], [0, 1, 0, 2], [3, 3]):
        assert -math.inf < model.log_prob(3, context) < model.log_prob(2, context)


def test_more_tokens_of_context_than_the_order_has_change_nothing():
    ids = random.Random(0).choices(range(4), k=300)
    model = NGram(ids, 4, order=3)
    assert model.log_probs([0, 2, 1, 3]) == model.log_probs([3, 2, 1, 3]) == model.log_probs([1, 3])
    assert model.log_probs([1, 3]) != model.log_probs([2, 3])


def test_the_tokens_of_a_text_are_predicted_from_those_before_them():
    ids = random.Random(1).choices(range(6), k=200)
    model = NGram(ids[:150], 6, order=3)
    text = ids[150:]
    expected = [model.log_prob(token, text[:at]) for at, token in enumerate(text)]
    assert model.token_log_probs(text) == pytest.approx(expected, rel=1e-14)


def test_bits_per_byte_are_the_log2_of_the_texts_probability_over_its_bytes():
    text = [0, 1, 3]
    prob = math.prod(exact(ABACAB, 4, context, token) for context, token in (
        ((), 0), ((0,), 1), ((0, 1), 3),
    ))  # fmt: skip
    model = NGram(ABACAB, 4, order=3)
    assert model.bits_per_byte(text, 11) == pytest.approx(-math.log2(prob) / 11, rel=1e-13)


def test_a_text_of_random_tokens_costs_its_entropy_and_longer_contexts_gain_nothing():
    generator = random.Random(2)
    ids, held_out = (generator.choices(range(8), k=k) for k in (20_000, 4_000))
    bits = [NGram(ids, 8, order).bits_per_byte(held_out, len(held_out)) for order in (1, 2, 3, 5)]
    assert bits[0] == pytest.approx(3, abs=0.01)
    assert bits == sorted(bits)


def test_a_text_that_repeats_costs_almost_nothing_once_the_context_is_long_enough():
    ids = [0, 0, 1, 0, 2] * 2_000
    bits = [NGram(ids, 3, order).bits_per_byte(ids, len(ids)) for order in (1, 2, 3)]
    # a third token is known from the two before it, and never from one
    assert bits[0] > 1.3
    assert bits[1] > 0.5
    assert bits[2] < 0.01


def test_draws_have_the_models_probabilities():
    ids = random.Random(3).choices(range(5), weights=[5, 4, 3, 2, 1], k=80)
    model = NGram(ids, 6, order=3)
    draws = 6_000
    for context in ([], [1], ids[3:5], [5, 0]):
        seen = Counter(model.generate(context, 1, seed=seed)[0] for seed in range(draws))
        for token in range(6):
            prob = math.exp(model.log_prob(token, context))
            # 4.5 standard deviations of a count; 24 counts are compared
            spread = math.sqrt(draws * prob * (1 - prob))
            assert abs(seen[token] - draws * prob) < 4.5 * spread


def test_generation_repeats_with_its_seed_and_follows_the_prompt():
    ids = [0, 1, 2, 3] * 500
    model = NGram(ids, 4, order=4)
    # Of 500 tickets one leads away from the cycle at each step.
    assert model.generate([1, 2], 6, seed=0) == [3, 0, 1, 2, 3, 0]
    noise = NGram(random.Random(4).choices(range(4), k=500), 4, order=2)
    assert noise.generate([], 30, seed=7) == noise.generate([], 30, seed=7)
    assert noise.generate([], 30, seed=7) != noise.generate([], 30, seed=8)
    # A longer draw continues a shorter one.
    assert noise.generate([], 30, seed=7)[:10] == noise.generate([], 10, seed=7)


def test_generation_ends_behind_the_stop_token():
    model = NGram([0, 1, 2, 3] * 500, 4, order=4)
    assert model.generate([1], 6, seed=0, stop_id=0) == [2, 3, 0]
    # one in the prompt does not stop it
    assert model.generate([0], 2, seed=0, stop_id=0) == [1, 2]


def test_arrays_and_tensors_are_sequences_of_ids_too():
    for given in (np.array(ABACAB), torch.tensor(ABACAB), tuple(ABACAB), iter(ABACAB)):
        model = NGram(given, 4, order=2)
        assert model.log_probs([0]) == NGram(ABACAB, 4, order=2).log_probs([0])
    bits = model.bits_per_byte(ABACAB, 6)
    assert model.bits_per_byte(torch.tensor(ABACAB), 6) == bits


@pytest.mark.parametrize(
    ("call", "given"),
    [
        (lambda: NGram([], 4), "no ids at all"),
        (lambda: NGram([0, 4], 4), "4 at position 1"),
        (lambda: NGram([0, -1], 4), "-1 at position 1"),
        (lambda: NGram([0.5], 4), "float"),
        (lambda: NGram("text", 4), "a str"),
        (lambda: NGram(None, 4), "a NoneType"),
        (lambda: NGram(torch.zeros(2, 3, dtype=torch.int64), 4), "a Tensor"),
        (lambda: NGram([0], 0), "vocab_size = 0"),
        (lambda: NGram([0], 4, order=0), "order = 0"),
        (lambda: NGram([0], 4, order=True), "order = True"),
        (lambda: NGram([0], 4).bits_per_byte([], 3), "no ids at all"),
        (lambda: NGram([0], 4).bits_per_byte([0], 0), "num_bytes = 0"),
        (lambda: NGram([0], 4).token_log_probs([9]), "9 at position 0"),
        (lambda: NGram([0], 4).log_prob(4), "4 at position 0"),
        (lambda: NGram([0], 4).log_probs([4]), "4 at position 0"),
        (lambda: NGram([0], 4).generate([], 0), "max_new_tokens = 0"),
        (lambda: NGram([0], 4).generate([], 1, seed="x"), "seed = 'x'"),
    ],
)
def test_bad_input_is_refused(call, given):
    with pytest.raises(InputError) as caught:
        call()
    assert given in caught.value.given
