"""Near-duplicate paragraphs: exact Jaccard similarity of word shingles.

Chapter 17 explains it; chapter 00 uses it on the reference text. A shingle is a run of
consecutive words; two paragraphs are near-equal when the sets of their shingles share at least
`threshold` of their union (Broder 1997, "On the resemblance and containment of documents").

Production differs: at the size of SlimPajama nobody compares exact sets. MinHash signatures and
locality-sensitive hashing find candidates, some pairs are missed, and whole connected components
are dropped. Here every pair that can reach the threshold is compared, which a few megabytes
allow, and no kept paragraph is near-equal to another kept one.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil

import regex

from slimlab.config import check_size, require

# Scripts without spaces between words: each character counts as a word of its own there.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORDS = regex.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_BLANK_LINES = regex.compile(r"\n(?:[^\S\n]*\n)+")

Shingles = frozenset[tuple[str, ...]]


def split_paragraphs(text: str) -> list[str]:
    """Cut `text` at blank lines; returns the paragraphs that hold more than white space."""
    return [part.strip("\n") for part in _BLANK_LINES.split(text) if part.strip()]


def shingles(paragraph: str, shingle_words: int = 5) -> Shingles:
    """Collect the runs of consecutive words; case and white space do not count.

    paragraph      the text; a character of an unspaced script (Chinese, Thai) is a word
    shingle_words  words in a run
    returns        a set, never empty: a shorter paragraph is one run by itself
    """
    words = _WORDS.findall(paragraph.casefold())
    if len(words) <= shingle_words:
        return frozenset([tuple(words)])
    runs = range(len(words) - shingle_words + 1)
    return frozenset(tuple(words[at : at + shingle_words]) for at in runs)


def jaccard(a: Shingles, b: Shingles) -> float:
    """Divide the number of shingles that `a` and `b` share by that of their union."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def near_duplicates(
    paragraphs: Sequence[str], threshold: float = 0.8, shingle_words: int = 5
) -> list[int]:
    """Find the paragraphs to drop: each is near-equal to an earlier one that stays.

    paragraphs     texts in the order in which they take precedence
    threshold      least Jaccard similarity, above 0 and at most 1, that counts as near-equal
    shingle_words  words in a shingle; paragraphs shorter than that match only whole
    returns        indices in increasing order; what is left holds no near-equal pair

    A set of n shingles that reaches the threshold t shares with its partner at least one of its
    n - ceil(t n) + 1 rarest shingles, so the inverted index holds only those: rare shingles have
    few owners (Chaudhuri, Ganti and Kaushik 2006, prefix filtering).

    Raises InputError if threshold or shingle_words is out of range, or paragraphs is one string.
    """
    _check_paragraphs(paragraphs)
    _check_limits(threshold, shingle_words)
    sets = [shingles(paragraph, shingle_words) for paragraph in paragraphs]
    owners = Counter(shingle for one in sets for shingle in one)
    index: dict[tuple[str, ...], list[int]] = defaultdict(list)
    dropped: list[int] = []
    for i, current in enumerate(sets):
        # One shingle more than the bound, so that rounding of threshold * n cannot lose a pair.
        prefix_len = len(current) - ceil(threshold * len(current)) + 2
        rarest = sorted(current, key=lambda shingle: (owners[shingle], shingle))[:prefix_len]
        candidates = {j for shingle in rarest for j in index[shingle]}
        if any(jaccard(current, sets[j]) >= threshold for j in candidates):
            dropped.append(i)
            continue
        for shingle in rarest:
            index[shingle].append(i)
    return dropped


def remove_near_duplicates(
    paragraphs: Sequence[str], threshold: float = 0.8, shingle_words: int = 5
) -> list[str]:
    """Return the paragraphs in their order, without the later one of each near-equal pair.

    paragraphs, threshold, shingle_words  as for `near_duplicates`

    Raises InputError as `near_duplicates` does.
    """
    dropped = set(near_duplicates(paragraphs, threshold, shingle_words))
    return [paragraph for i, paragraph in enumerate(paragraphs) if i not in dropped]


def _check_limits(threshold: object, shingle_words: object) -> None:
    check_size("shingle_words", shingle_words)
    require(
        isinstance(threshold, int | float) and 0 < threshold <= 1,
        "threshold, a Jaccard similarity above 0 and at most 1",
        f"threshold = {threshold!r}",
        "take 0.8 for near-equal, 1.0 for equal shingles only",
    )


def _check_paragraphs(paragraphs: object) -> None:
    require(
        isinstance(paragraphs, Sequence) and not isinstance(paragraphs, str | bytes),
        "paragraphs, a list of texts",
        f"one {type(paragraphs).__name__}",
        "cut the text first: split_paragraphs(text)",
    )
    for i, paragraph in enumerate(paragraphs):
        require(
            isinstance(paragraph, str),
            "paragraphs that are text (str)",
            f"paragraph {i} is a {type(paragraph).__name__}",
            "decode bytes first: data.decode('utf-8')",
        )
