"""The tokenizer: text to ids and back, byte-level byte-pair encoding.

Chapter 04 explains it. Any text can be encoded, and decoding gives it back exactly: what no merge
covers stays single bytes. Ids 0 to 255 are the bytes, then one id per merge, then the special
tokens.

The file that `save` writes is JSON in UTF-8, an object with these keys:
  format          "slimlab byte-pair tokenizer"
  version         1
  pattern         the pre-split pattern; this version reads GPT-2's only
  merges          [[left id, right id], ...]; merge r makes id 256 + r of two smaller ids
  special_tokens  ["<|endoftext|>", ...], the ids behind the merges

Production differs: vocabularies of 32 000 to 256 000 tokens, training on samples of many
gigabytes, and the encoder in Rust (`tokenizers`, `tiktoken`); the ids are the same, as the tests
show with these merges loaded into both.
"""

import json
import operator
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from slimlab.config import InputError, require
from slimlab.text.bpe import NUM_BYTES, Pair, apply_merges, learn_merges
from slimlab.text.files import write_atomically
from slimlab.text.presplit import GPT2_PATTERN, PreSplitter, check_text
from slimlab.text.tokenizer_checks import (
    FORMAT,
    VERSION,
    check_merges,
    check_special_tokens,
    read_tokenizer_file,
)

_CACHED_WORDS = 1 << 16
_CACHED_CHARS = 64
_CHUNK_CHARS = 1 << 16


class Tokenizer:
    """Byte-level byte-pair encoding with GPT-2's pre-split; unchangeable once made.

    merges          pairs of ids in the order in which they were learned
    special_tokens  texts with an id of their own, which merges never cross

    Raises InputError if a merge names an id that does not exist yet, or tokens are not distinct.
    """

    def __init__(
        self, merges: Sequence[Pair] = (), special_tokens: Sequence[str] = ("<|endoftext|>",)
    ):
        check_special_tokens(special_tokens)
        check_merges(merges)
        self.merges: tuple[Pair, ...] = tuple((left, right) for left, right in merges)
        self.special_tokens: tuple[str, ...] = tuple(special_tokens)
        tokens = [bytes([byte]) for byte in range(NUM_BYTES)]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        self._special_ids = {text: len(tokens) + i for i, text in enumerate(special_tokens)}
        self._ids = {token: token_id for token_id, token in enumerate(tokens)}
        self._tokens = tokens + [text.encode() for text in special_tokens]
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._splitter, self._plain_splitter = PreSplitter(special_tokens), PreSplitter()
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        num_merges: int = 768,
        special_tokens: Sequence[str] = ("<|endoftext|>",),
        progress: Callable[[Iterable, str, int], Iterable] | None = None,
    ) -> "Tokenizer":
        """Learn the merges of a corpus.

        texts           documents, such as corpus.train; a stream is read once and not kept
        num_merges      merges to learn; fewer if no pair is left that occurs twice
        special_tokens  texts that get ids of their own; they cut the documents
        progress        called as progress(iterable, label, total), for a bar; None: silent
        returns         a Tokenizer with vocab_size = 256 + merges + special tokens

        Of pairs with equal counts the greater pair of byte strings is merged first.
        Raises InputError if there is no text, or a document is not a str.
        Sennrich, Haddow and Birch 2016 (arXiv:1508.07909), algorithm 1, on bytes.
        """
        check_special_tokens(special_tokens)
        require(
            type(num_merges) is int and num_merges >= 0,
            "num_merges, a whole number, 0 or more",
            f"num_merges = {num_merges!r}",
            "take 768 for a vocabulary of 1024 tokens and one special token",
        )
        counts = _count_words(texts, special_tokens)
        word_counts = {_to_bytes(word): count for word, count in counts.items()}
        return cls(learn_merges(word_counts, num_merges, progress), special_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of ids: bytes, merges and special tokens."""
        return len(self._tokens)

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """Turn `text` into ids.

        text           any text
        allow_special  True: a special token in the text becomes its one id; False, for text of
                       strangers: its letters are encoded like any others
        returns        ids; decode gives the text back

        Raises InputError if text is not a str, or holds half a surrogate pair.
        """
        check_text(text, "text")
        splitter = self._splitter if allow_special else self._plain_splitter
        return list(self._encode_words(splitter.split(text), allow_special))

    def encode_stream(self, chunks: Iterable[str], allow_special: bool = True) -> Iterator[int]:
        """Turn a text that comes in pieces into ids, equal to `encode` of the joined text.

        chunks         pieces of text, cut anywhere: an open text file, a generator
        allow_special  as for `encode`
        returns        an iterator of ids; held back is about one word, never the whole text

        Documents are texts of their own: between them put the special token.
        Raises InputError as `encode` does.
        """
        require(
            isinstance(chunks, Iterable),
            "chunks, an iterable of pieces of text",
            f"a {type(chunks).__name__}",
            "give an open text file or a list of texts; of a path: read_documents(path)",
        )
        splitter = self._splitter if allow_special else self._plain_splitter
        return self._encode_words(splitter.split_stream(chunks), allow_special)

    def _encode_words(self, words: Iterable[str], allow_special: bool) -> Iterator[int]:
        special_ids = self._special_ids if allow_special else {}
        cache = self._cache
        for word in words:
            ids = cache.get(word)
            # Both can hold the same text: encoded as plain before, special now.
            if word in special_ids:
                ids = [special_ids[word]]
            elif ids is None:
                ids = apply_merges(_to_bytes(word), self._ranks)
                if len(word) <= _CACHED_CHARS:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = ids
            yield from ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn `ids` into text; bytes that are no UTF-8, such as half a character, become U+FFFD.

        Raises InputError if an id is out of range; it names id, position and vocab_size.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Turn `ids`, whole numbers in a list or a one-dimensional tensor, into bytes.

        Raises InputError as `decode` does.
        """
        require(
            isinstance(ids, Iterable) and not isinstance(ids, str),
            "a sequence of token ids",
            f"a {type(ids).__name__}",
            "put a single id in a list: decode([id])",
        )
        require(
            getattr(ids, "ndim", 1) == 1,
            "a sequence of token ids, one dimension",
            f"{getattr(ids, 'ndim', 1)} dimensions",
            "decode one row at a time: decode(ids[0])",
        )
        ids, size = list(ids), self.vocab_size
        if all(type(i) is int and 0 <= i < size for i in ids):
            return b"".join([self._tokens[i] for i in ids])
        return b"".join(self.token_bytes(i, f" at position {at}") for at, i in enumerate(ids))

    def token_bytes(self, token_id: int, place: str = "") -> bytes:
        """Return the bytes that one id stands for.

        token_id  from 0 to vocab_size - 1
        place     where it was found, for the message

        Raises InputError if it is out of range or no whole number.
        """
        try:
            index = operator.index(token_id)
        except TypeError:
            index = -1
        require(
            0 <= index < self.vocab_size,
            f"a token id from 0 to {self.vocab_size - 1}",
            f"{token_id!r}{place}; vocab_size = {self.vocab_size}",
            "decode with the tokenizer that encoded; a model's output may be wider than it",
        )
        return self._tokens[index]

    def token_id(self, token: str | bytes) -> int:
        """Return the id of a special token (str), or of a token given by its text or bytes.

        token  such as "<|endoftext|>" or b" the"

        Raises InputError if it is not one token.
        """
        if isinstance(token, str) and token in self._special_ids:
            return self._special_ids[token]
        data = _to_bytes(token) if isinstance(token, str) else token
        require(
            isinstance(data, bytes) and data in self._ids,
            "the text or bytes of one token",
            f"{token!r}; special tokens: {', '.join(self.special_tokens) or 'none'}",
            "encode(text) cuts any text into tokens",
        )
        return self._ids[data]

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to `path` as JSON; an old file stays until the new one is complete.

        Raises InputError if the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "pattern": GPT2_PATTERN,
            "merges": self.merges,
            "special_tokens": self.special_tokens,
        }
        write_atomically(path, (json.dumps(content, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a tokenizer that `save` wrote to `path`.

        Raises InputError if the file is missing, cut off, of another kind, or contradicts itself.
        """
        content = read_tokenizer_file(path)
        try:
            return cls(content["merges"], content["special_tokens"])
        except InputError as error:
            raise InputError(error.asked, f"{path}: {error.given}", error.change) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        special = ", ".join(map(repr, self.special_tokens)) or "no special tokens"
        return f"<Tokenizer of {self.vocab_size} ids: bytes, {len(self.merges)} merges, {special}>"

    @property
    def _identity(self) -> tuple:
        return self.merges, self.special_tokens


def _count_words(texts: Iterable[str], special_tokens: Sequence[str]) -> Counter:
    require(
        isinstance(texts, Iterable) and not isinstance(texts, bytes),
        "texts, an iterable of documents",
        f"a {type(texts).__name__}",
        "of a corpus take its training documents: Tokenizer.train(corpus.train)",
    )
    splitter, counts = PreSplitter(special_tokens), Counter()
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        check_text(text, f"document {number}")
        chunks = (text[at : at + _CHUNK_CHARS] for at in range(0, len(text), _CHUNK_CHARS))
        counts.update(splitter.split_stream(chunks))
    for token in special_tokens:
        counts.pop(token, None)
    require(bool(counts), "a corpus with some text", "no text at all", "give documents with text")
    return counts


def _to_bytes(word: str) -> bytes:
    try:
        return word.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "text of whole characters",
            f"{word[:40]!r}: half a surrogate pair at character {error.start}",
            "mend it: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')",
        ) from error
