"""Pairs of sentences: does the second follow the first?

Chapter 04 explains it. Of the pairs, half are two neighbours in a document, in their order; in the
other half the second sentence comes from another document. The question is whether b follows a,
not whether the two are near each other: (b, a) would not count as following.

First sentences of documents (titles, often) are never the second of a pair, in either half. Were
they drawn for the random half alone, a model could tell the halves apart by b without reading a.

Devlin et al. 2018 (arXiv:1810.04805), section 3.1. Liu et al. 2019 (RoBERTa, arXiv:1907.11692)
found that pre-training does as well or slightly better without this objective; later models
have dropped it.

Production fills the whole length with several sentences on each side, and writes pairs to files.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slimlab.config import check_number, check_size, require

RANDOM, FOLLOWS = 0, 1  # the order of an Encoder's two pair logits; BERT's files have the other

Documents = Sequence[Sequence[Sequence[int]]]


class SentencePairs(NamedTuple):
    """Rows [CLS] a [SEP] b [SEP] padding.

    With some of their tokens hidden they are a batch for masked_pair_objective:
    MaskedBatch(*mask_tokens(pairs.ids, ...), *pairs[1:]).

    ids       (N, T) token ids
    lengths   (N,) tokens without padding
    segments  (N, T) 0 up to the first [SEP], 1 from b to the second, 0 in the padding
    labels    (N,) RANDOM (0) or FOLLOWS (1)
    """

    ids: Tensor
    lengths: Tensor
    segments: Tensor
    labels: Tensor


def sentence_pairs(
    documents: Documents,
    *,
    num_pairs: int,
    seq_len: int,
    cls_id: int,
    sep_id: int,
    pad_id: int,
    generator: torch.Generator,
) -> SentencePairs:
    """Draw pairs, half of them neighbours, half strangers.

    documents  lists of sentences, which are lists of token ids; those of one sentence only are
               passed over
    num_pairs  N
    seq_len    T; where a pair is longer, the longer sentence loses its last token, again and again
    cls_id     first token of a row
    sep_id     token behind each sentence
    pad_id     fills the row
    generator  of all random draws
    returns    SentencePairs; the label of each is a coin's, so halves are equal on the average

    Raises InputError for fewer than two documents of two sentences, an empty sentence, sizes that
    do not fit, and ids below 0.
    """
    check_size("num_pairs", num_pairs)
    check_number("seq_len", seq_len, int, 5, float("inf"))
    for name, value in (("cls_id", cls_id), ("sep_id", sep_id), ("pad_id", pad_id)):
        check_number(name, value, int, 0, float("inf"))
    usable = _usable(documents)
    # (document, place) of every sentence that has one before it
    seconds = [(d, i) for d, sentences in enumerate(usable) for i in range(1, len(sentences))]
    rows, lengths, segments, labels = [], [], [], []
    for _ in range(num_pairs):
        document, place = seconds[_below(len(seconds), generator)]
        label = _below(2, generator)
        first = usable[document][place - 1]
        if label == RANDOM:
            document, place = _from_another(document, seconds, generator)
        a, b = shorten(first, usable[document][place], seq_len - 3)
        row = [cls_id, *a, sep_id, *b, sep_id]
        padding = seq_len - len(row)
        rows.append(row + [pad_id] * padding)
        lengths.append(len(row))
        segments.append([0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * padding)
        labels.append(label)
    return SentencePairs(*map(torch.tensor, (rows, lengths, segments, labels)))


def shorten(a: Sequence[int], b: Sequence[int], room: int) -> tuple[list[int], list[int]]:
    """Take tokens off the end of the longer sentence until both fit.

    a, b     token ids
    room     tokens that both may have together, at least 2
    returns  the beginnings of a and b, neither of them empty; of equally long ones b loses first
    """
    a, b = list(a), list(b)
    while len(a) + len(b) > room:
        (a if len(a) > len(b) else b).pop()
    return a, b


def _from_another(
    document: int, seconds: list[tuple[int, int]], generator: torch.Generator
) -> tuple[int, int]:
    while True:
        other, place = seconds[_below(len(seconds), generator)]
        if other != document:
            return other, place


def _below(limit: int, generator: torch.Generator) -> int:
    device = generator.device
    return int(torch.randint(limit, (), generator=generator, device=device))


def _usable(documents: Documents) -> list[Sequence[Sequence[int]]]:
    for d, sentences in enumerate(documents):
        for i, sentence in enumerate(sentences):
            whole = not isinstance(sentence, str | int) and all(
                isinstance(token, int) and token >= 0 for token in sentence
            )
            require(
                whole and len(sentence) > 0,
                "documents: lists of sentences, which are lists of at least one token id",
                f"document {d}, sentence {i}: {sentence!r:.60}",
                "cut each document into sentences and encode each: tokenizer.encode(sentence)",
            )
    usable = [sentences for sentences in documents if len(sentences) >= 2]
    require(
        len(usable) >= 2,
        "at least two documents of two sentences or more",
        f"{len(usable)} such of {len(documents)} documents",
        "cut the text into more documents, at its headings for instance",
    )
    return usable
