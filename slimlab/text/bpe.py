"""Byte-pair encoding: learn merges from words and their counts, apply them to bytes.

Chapter 04 explains it. Ids 0 to 255 are the bytes; merge r joins two ids that exist by then into
the id 256 + r (Gage 1994; Sennrich, Haddow and Birch 2016, arXiv:1508.07909; on bytes: Radford
et al. 2019, GPT-2).

Production differs: the same two loops in Rust or C++, over words counted by many processes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

Pair = tuple[int, int]
NUM_BYTES = 256
_INVERTED = bytes(255 - byte for byte in range(NUM_BYTES))


def learn_merges(
    word_counts: Mapping[bytes, int],
    num_merges: int,
    progress: Callable[[Iterable, str, int], Iterable] | None = None,
) -> list[Pair]:
    """Merge the most frequent pair, again and again.

    word_counts  bytes of a word -> how often it occurs; a pair never crosses a word's end
    num_merges   how many merges to learn
    progress     called as progress(iterable, label, total), for a bar; None: silent
    returns      pairs of ids in the order of the merges; of pairs with equal counts the greater
                 pair of byte strings comes first; fewer than num_merges if no pair is left that
                 occurs twice
    """
    pairs = _PairCounts(word_counts)
    merges: list[Pair] = []
    steps: Iterable = range(num_merges)
    for _ in progress(steps, "merging byte pairs", num_merges) if progress else steps:
        best = pairs.most_frequent()
        if best is None:
            break
        merges.append(best)
        pairs.merge(best)
    return merges


class _PairCounts:
    """Counts of neighbouring ids that follow each merge without counting again.

    words   the ids of each word
    counts  how often each word occurs
    totals  pair -> how often it occurs in the text
    owners  pair -> words that hold it, or once did (the inverted index)
    """

    def __init__(self, word_counts: Mapping[bytes, int]):
        self.words = [list(word) for word in word_counts]
        self.counts = list(word_counts.values())
        self.totals: dict[Pair, int] = defaultdict(int)
        self.owners: dict[Pair, set[int]] = defaultdict(set)
        for owner, (word, count) in enumerate(zip(self.words, self.counts)):
            for pair in pairwise(word):
                self.totals[pair] += count
                self.owners[pair].add(owner)
        self.tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
        self.descending = [_descending(token) for token in self.tokens]
        self.heap = [self._entry(pair) for pair in self.totals]
        heapify(self.heap)

    def _entry(self, pair: Pair) -> tuple[int, str, str, Pair]:
        left, right = pair
        return -self.totals[pair], self.descending[left], self.descending[right], pair

    def most_frequent(self) -> Pair | None:
        """Return the pair with the greatest count, None if none occurs twice."""
        while self.heap:
            negative_count, _, _, pair = heappop(self.heap)
            # Each change of a count pushed an entry of its own: those with an old count are void.
            if -negative_count == self.totals.get(pair) and -negative_count >= 2:
                return pair
        return None

    def merge(self, pair: Pair) -> None:
        """Join `pair` into the next id in all words and bring the counts up to date."""
        new_id = len(self.tokens)
        self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])
        self.descending.append(_descending(self.tokens[new_id]))
        changes: dict[Pair, int] = defaultdict(int)
        for owner in self.owners.pop(pair):
            self._merge_in_word(owner, pair, new_id, changes)
        del self.totals[pair]
        changes.pop(pair, None)
        for changed, change in changes.items():
            if change:
                self.totals[changed] += change
                heappush(self.heap, self._entry(changed))

    def _merge_in_word(self, owner: int, pair: Pair, new_id: int, changes: dict[Pair, int]) -> None:
        word, count = self.words[owner], self.counts[owner]
        left, right = pair
        merged: list[int] = []
        at, last = 0, len(word) - 1
        while at <= last:
            if word[at] != left or at == last or word[at + 1] != right:
                merged.append(word[at])
                at += 1
                continue
            if merged:
                changes[merged[-1], left] -= count
                changes[merged[-1], new_id] += count
                self.owners[merged[-1], new_id].add(owner)
            at += 2
            if at <= last:
                changes[right, word[at]] -= count
                changes[new_id, word[at]] += count
                self.owners[new_id, word[at]].add(owner)
            merged.append(new_id)
        self.words[owner] = merged


def _descending(token: bytes) -> str:
    """Return a key that sorts byte strings from the greatest to the least."""
    # The end mark is above all inverted bytes: of two strings the longer is the greater.
    return token.translate(_INVERTED).decode("latin-1") + "\u0100"


def apply_merges(word: bytes, ranks: Mapping[Pair, int]) -> list[int]:
    """Encode one word: merge its lowest-ranked pair, the leftmost first, until none is left.

    word     the bytes of one word
    ranks    pair of ids -> its place in the list of merges
    returns  ids

    A heap over a linked list: n log n steps, so a word of a million bytes is no trap.
    """
    end = len(word)
    ids = [*word, -1]
    following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
    heap = [(ranks[pair], at) for at, pair in enumerate(pairwise(word)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, at = heappop(heap)
        after = following[at]
        if ranks.get((ids[at], ids[after])) != rank:
            continue  # one of the two was merged into something else meanwhile
        ids[at], ids[after] = NUM_BYTES + rank, -1
        following[at] = following[after]
        if following[at] < end:
            previous[following[at]] = at
        for left in (previous[at], at):
            if left >= 0 and (new_rank := ranks.get((ids[left], ids[following[left]]))) is not None:
                heappush(heap, (new_rank, left))
    return [token_id for token_id in ids if token_id >= 0]
