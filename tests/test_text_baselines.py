"""The yardsticks beside the loss: equal to their parts, ordered on the book's text."""

import math

import pytest

from slimlab.config import InputError
from slimlab.text.baselines import baseline_bits_per_byte, encode_documents
from slimlab.text.compress import compression_bits_per_byte
from slimlab.text.corpus import Corpus, reference_corpus
from slimlab.text.tokenizer import Tokenizer


def test_documents_are_followed_by_the_end_token():
    tokenizer = Tokenizer.train(["low lower lowest"], num_merges=3)
    end = tokenizer.token_id("<|endoftext|>")
    ids = encode_documents(tokenizer, ["low", "", "slow"])
    assert ids == [*tokenizer.encode("low"), end, end, *tokenizer.encode("slow"), end]


def test_an_end_token_inside_a_document_is_letters():
    tokenizer = Tokenizer()
    ids = encode_documents(tokenizer, ["a<|endoftext|>"])
    assert ids.count(256) == 1
    assert tokenizer.decode(ids) == "a<|endoftext|><|endoftext|>"


def test_another_end_token_can_be_named_and_must_be_known():
    tokenizer = Tokenizer(special_tokens=["<end>"])
    assert encode_documents(tokenizer, ["a"], end_token="<end>") == [97, 256]
    with pytest.raises(InputError, match="<end>"):
        encode_documents(tokenizer, ["a"])


def test_a_tiny_corpus_by_hand():
    # bytes as tokens: "a" 3 times, "b" once, the end once; 5 tokens of 3 kinds, V = 257
    corpus = Corpus("tiny", ("aaab",), ("ab",), "0")
    bits = baseline_bits_per_byte(corpus, Tokenizer(), orders=(1,))
    uniform = 3 / 257
    probs = [(3 + uniform) / 8, (1 + uniform) / 8, (1 + uniform) / 8]  # a, b and the end
    assert bits["unigram"] == pytest.approx(-sum(map(math.log2, probs)) / 2, rel=1e-13)
    assert bits["gzip"] == compression_bits_per_byte("ab", "gzip")
    assert list(bits) == ["gzip", "xz", "xz primed", "unigram"]


def test_on_the_reference_text_each_yardstick_is_in_its_range():
    pytest.importorskip("pydoc_data.topics")
    corpus = reference_corpus()
    bits = baseline_bits_per_byte(corpus, Tokenizer.train(corpus.train), orders=(1, 2, 3, 5))
    assert list(bits) == ["gzip", "xz", "xz primed", "unigram", "2-gram", "3-gram", "5-gram"]
    # Python 3.11.7: 2.65, 2.52, 1.85, 3.04, 2.05, 1.77, 1.82; the text differs between versions
    assert 2.3 < bits["gzip"] < 2.9
    assert 2.2 < bits["xz"] < bits["gzip"]
    assert 1.6 < bits["xz primed"] < 2.1
    assert 2.8 < bits["unigram"] < 3.3
    assert 1.6 < bits["5-gram"] < 2.1
    assert bits["3-gram"] < bits["2-gram"] < bits["gzip"] < bits["unigram"]


def test_a_corpus_without_held_out_text_is_refused():
    with pytest.raises(InputError, match="held_out_fraction"):
        baseline_bits_per_byte(Corpus("mine", ("text",), (), "0"), Tokenizer())
