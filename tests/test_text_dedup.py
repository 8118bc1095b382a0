"""Near-duplicate removal against a comparison of all pairs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.config import InputError
from slimlab.text.dedup import (
    jaccard,
    near_duplicates,
    remove_near_duplicates,
    shingles,
    split_paragraphs,
)

FOX = "the quick brown fox jumps over the lazy dog near the old river bank today"


def all_pairs(paragraphs, threshold, shingle_words):
    """Compare every paragraph with every kept one: no index, no bound."""
    kept, dropped = [], []
    for i, paragraph in enumerate(paragraphs):
        words = paragraph.lower().split()
        runs = [tuple(words[at : at + shingle_words]) for at in range(len(words))]
        runs = {run for run in runs if len(run) == shingle_words} or {tuple(words)}
        alike = [len(runs & other) / len(runs | other) >= threshold for other in kept]
        if any(alike):
            dropped.append(i)
        else:
            kept.append(runs)
    return dropped


few_words = st.lists(st.sampled_from(["a", "b", "c", "D"]), max_size=9).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(few_words, max_size=12), st.sampled_from([0.2, 0.5, 0.6, 0.8, 1.0]), st.integers(1, 4)
)
def test_the_index_finds_exactly_what_comparing_all_pairs_finds(paragraphs, threshold, words):
    assert near_duplicates(paragraphs, threshold, words) == all_pairs(paragraphs, threshold, words)


def test_the_later_of_two_near_equal_paragraphs_goes():
    changed_end = FOX.replace("today", "tomorrow")
    # 11 shingles each, 10 shared: 10 / 12 = 0.83.
    assert jaccard(shingles(FOX), shingles(changed_end)) == 10 / 12
    assert near_duplicates([FOX, "something else", changed_end]) == [2]
    assert near_duplicates([FOX, "something else", changed_end], threshold=0.84) == []
    assert remove_near_duplicates([FOX, FOX.upper(), "x"]) == [FOX, "x"]


def test_a_similarity_of_exactly_the_threshold_counts_whatever_the_rounding():
    for total in range(2, 60):
        for shared in range(1, total):
            # Single-word shingles: `shared` in common, `total` in the union.
            first = " ".join(f"w{i}" for i in range(total))
            second = " ".join(f"w{i}" for i in range(shared))
            assert near_duplicates([first, second], shared / total, 1) == [1], (shared, total)


def test_short_and_empty_paragraphs_match_only_whole():
    assert near_duplicates(["See also:", "See  also:", "See", "", " ", "also"]) == [1, 4]


def test_chinese_is_compared_by_character():
    first = "注意力机制让模型在每一步都能看到整个输入序列的所有位置"
    assert near_duplicates([first, first[:-1] + "处", "另外一段完全不同的文字"]) == [1]


def test_paragraphs_are_cut_at_blank_lines_only():
    assert split_paragraphs("a\nb\n\n  c\n \t\n\nd\n") == ["a\nb", "  c", "d"]
    assert split_paragraphs(" \n\n ") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("one text",), "split_paragraphs"),
        ((["a", b"b"],), "paragraph 1 is a bytes"),
        ((["a"], 0.0), "threshold = 0.0"),
        ((["a"], 80), "threshold = 80"),
        ((["a"], float("nan")), "threshold = nan"),
        ((["a"], "0.8"), "threshold = '0.8'"),
        ((["a"], 0.8, 0), "shingle_words = 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        near_duplicates(*arguments)
