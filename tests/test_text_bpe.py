"""Learning merges against a count from scratch, applying them against one merge at a time."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.text.bpe import apply_merges, learn_merges
from slimlab.text.corpus import reference_corpus
from slimlab.text.presplit import PreSplitter

small_words = st.dictionaries(
    st.lists(st.sampled_from(b"abc"), min_size=1, max_size=12).map(bytes),
    st.integers(1, 5),
    max_size=8,
)


def merge_once(tokens, pair):
    merged = []
    while tokens:
        size = 2 if tuple(tokens[:2]) == pair else 1
        merged.append(b"".join(tokens[:size]))
        tokens = tokens[size:]
    return merged


def recount(word_counts, num_merges):
    """Count all pairs again before each merge; tokens are byte strings, no ids."""
    words = {word: [bytes([byte]) for byte in word] for word in word_counts}
    merges = []
    while len(merges) < num_merges:
        counts = Counter()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                counts[pair] += word_counts[word]
        best = max(counts, key=lambda pair: (counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        words = {word: merge_once(tokens, best) for word, tokens in words.items()}
    return merges


def as_bytes(merges):
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return [(tokens[left], tokens[right]) for left, right in merges]


@settings(max_examples=300, deadline=None)
@given(small_words, st.integers(0, 20))
def test_incremental_counts_give_the_merges_of_a_full_recount(word_counts, num_merges):
    merges = learn_merges(word_counts, num_merges)
    assert as_bytes(merges) == recount(word_counts, num_merges)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.integers(0, 30))
def test_the_same_for_any_text(text, num_merges):
    counts = Counter(word.encode() for word in PreSplitter().split(text))
    assert as_bytes(learn_merges(counts, num_merges)) == recount(counts, num_merges)


@pytest.mark.parametrize("kind", ["english", "code"])
def test_the_same_for_the_beginning_of_the_real_text(kind):
    text = "".join(reference_corpus(kind).train)[:60_000]
    counts = Counter(word.encode() for word in PreSplitter().split(text))
    assert as_bytes(learn_merges(counts, 60)) == recount(counts, 60)


@settings(max_examples=300, deadline=None)
@given(small_words, st.lists(st.sampled_from(b"abcd"), max_size=30).map(bytes))
def test_applying_merges_equals_one_merge_after_the_other_in_their_order(word_counts, word):
    merges = learn_merges(word_counts, 20)
    expected = [bytes([byte]) for byte in word]
    for pair in as_bytes(merges):
        expected = merge_once(expected, pair)
    ids = apply_merges(word, {pair: rank for rank, pair in enumerate(merges)})
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    assert [tokens[i] for i in ids] == expected


@settings(max_examples=300, deadline=None)
@given(small_words)
def test_no_token_is_made_twice(word_counts):
    tokens = [left + right for left, right in as_bytes(learn_merges(word_counts, 40))]
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ({b"ab": 2, b"cd": 2}, (b"c", b"d")),
        ({b"ab": 2, b"ac": 2}, (b"a", b"c")),
        ({b"ab": 3, b"cd": 2}, (b"a", b"b")),
        ({b"\x00\xff": 2, b"\x01\x00": 2}, (b"\x01", b"\x00")),
    ],
)
def test_of_equal_counts_the_greater_pair_of_byte_strings_is_merged(words, first):
    assert as_bytes(learn_merges(words, 1)) == [first]


def test_a_longer_token_is_greater_than_its_beginning():
    # After "ab" is merged, (ab, x) and (a, x) both occur twice.
    words = {b"ab": 5, b"abx": 2, b"ax": 2}
    assert as_bytes(learn_merges(words, 2)) == [(b"a", b"b"), (b"ab", b"x")]


def test_a_pair_that_occurs_once_is_not_merged():
    assert learn_merges({b"abc": 1}, 5) == []
    assert as_bytes(learn_merges({b"abab": 1}, 5)) == [(b"a", b"b")]


def test_a_long_word_costs_no_square():
    # A scan of the word per merge would take 2**18 * 2**18 steps and run into the time limit.
    merges = [(97, 98), *((i, i) for i in range(256, 256 + 17))]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert apply_merges(b"ab" * 2**18, ranks) == [256 + 17] * 2
    assert len(apply_merges(b"ab" * 2**17, {(97, 98): 0})) == 2**17


def test_progress_sees_each_merge():
    seen = []

    def progress(iterable, label, total):
        seen.append((label, total))
        for step in iterable:
            seen.append(step)
            yield step

    learn_merges({b"abab": 2}, 2, progress)
    assert seen == [("merging byte pairs", 2), 0, 1]
