"""The corpus: real text that every machine has, near-equal paragraphs removed, then split.

Chapter 00 explains it. The reference text is Python's own: the topics of its reference manual
(English, about half a megabyte) and the source of its standard library (code). It differs between
Python versions, so a corpus carries a fingerprint and numbers that depend on it are ranges.

Production differs: a training set is trillions of tokens drawn from many sources in chosen
proportions and never in memory; the held-out text is checked for overlap with the training text
and with every benchmark. Here near-equal paragraphs are removed from the whole before the split,
so no paragraph of the one part is near-equal to one of the other.
"""

import hashlib
import importlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slimlab.config import InputError, check_size, require
from slimlab.text.dedup import near_duplicates, split_paragraphs
from slimlab.text.sources import read_documents

CODE_BYTES = 1_000_000
MAX_CORPUS_BYTES = 20_000_000


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to judge by; no paragraph is near-equal to another.

    name         where the text comes from
    train        the documents to train on
    held_out     the documents that training never sees; empty if none were asked for
    fingerprint  12 hexadecimal digits of the SHA-256 of all texts: equal texts, equal digits
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    fingerprint: str

    @property
    def train_bytes(self) -> int:
        """Size of the training text in UTF-8."""
        return sum(len(text.encode()) for text in self.train)

    @property
    def held_out_bytes(self) -> int:
        """Size of the held-out text in UTF-8."""
        return sum(len(text.encode()) for text in self.held_out)

    def describe(self) -> str:
        """Return name, sizes, fingerprint and the Python version on one line."""
        return (
            f"{self.name}: {len(self.train)} documents, {self.train_bytes:,} bytes to train on; "
            f"{len(self.held_out)} documents, {self.held_out_bytes:,} bytes held out; "
            f"fingerprint {self.fingerprint} (Python {platform.python_version()})"
        )


def reference_corpus(kind: str = "english", held_out_fraction: float = 0.1) -> Corpus:
    """Build the corpus that every Python brings along; the same on every call.

    kind               "english", the topics of Python's reference (`pydoc_data.topics`), or
                       "code", modules of the standard library, about 1 MB
    held_out_fraction  part of the bytes to hold out, whole documents at a time
    returns            a Corpus; it differs between Python's versions and builds, as its
                       fingerprint shows

    Raises InputError for another kind or fraction, or if this Python lacks the text.
    """
    readers = {"english": _english_documents, "code": _code_documents}
    require(
        kind in readers,
        "a reference corpus",
        f"kind = {kind!r}",
        "choose 'english' or 'code'; for a text of your own: corpus_from(path)",
    )
    named = dict(readers[kind]())
    require(
        bool(named),
        f"the reference corpus {kind!r}",
        "a Python installation without that text",
        "install the full Python (on Debian: libpython3-stdlib), or use corpus_from(path)",
    )
    return _build(kind, list(named), list(named.values()), held_out_fraction)


def _english_documents() -> Iterator[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    yield from sorted(topics.items())


def _code_documents() -> Iterator[tuple[str, str]]:
    size_bytes = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        text = "".join(read_documents(file))
        size_bytes += len(text.encode())
        if size_bytes > CODE_BYTES:
            return
        yield file.name, text


def corpus_from(
    source: str | os.PathLike | Iterable[str],
    name: str | None = None,
    held_out_fraction: float = 0.1,
    max_bytes: int | None = None,
) -> Corpus:
    """Build a corpus from a small text of your own.

    source             a path, as `read_documents` takes it, or an iterable of documents
    name               what to call it; the path's last part, or "documents"
    held_out_fraction  part of the bytes to hold out; 0 for none. Whole documents are held out,
                       or the end of one where all documents are too long for that
    max_bytes          take so much from the front, the last document up to the end of a line;
                       None: everything
    returns            a Corpus; it is held in memory

    Raises InputError as `read_documents` does, if there is no text, or more than 20 MB of it.
    """
    if isinstance(source, str | os.PathLike):
        require(
            os.path.exists(source),
            "the path of a file or folder, or a list of documents",
            f"{str(source)[:100]!r}, which does not exist",
            "check the spelling; to give a text itself, put it in a list: corpus_from([text])",
        )
        name, source = name or Path(source).name, read_documents(source)
    require(
        isinstance(source, Iterable) and not isinstance(source, bytes | dict),
        "a path or an iterable of documents",
        f"a {type(source).__name__}",
        "give a path, or a list of texts",
    )
    if max_bytes is not None:
        check_size("max_bytes", max_bytes)
    documents = list(_take(source, max_bytes))
    return _build(name or "documents", documents, documents, held_out_fraction)


def _take(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    size_bytes = 0
    for number, text in enumerate(documents):
        require(
            isinstance(text, str),
            "documents that are text (str)",
            f"document {number} is a {type(text).__name__}",
            "decode bytes first; of a record take its text: record['text']",
        )
        try:
            size_bytes += len(text.encode())
        except UnicodeEncodeError as error:
            given = f"document {number}: half a surrogate pair at character {error.start}"
            raise InputError("documents of whole characters", given, "delete the half") from error
        if max_bytes is not None and size_bytes >= max_bytes:
            room_bytes = max_bytes - (size_bytes - len(text.encode()))
            yield _beginning(text, room_bytes)
            return
        require(
            size_bytes <= MAX_CORPUS_BYTES,
            f"a corpus of at most {MAX_CORPUS_BYTES:,} bytes, since it is held in memory",
            f"{size_bytes:,} bytes after {number + 1} documents",
            "take its beginning with max_bytes=1_000_000, or stream it with read_documents",
        )
        yield text


def _beginning(text: str, num_bytes: int) -> str:
    if len(text.encode()) <= num_bytes:
        return text
    beginning = text.encode()[:num_bytes].decode(errors="ignore")
    return beginning[: beginning.rfind("\n") + 1] or beginning


def _build(name: str, keys: list[str], documents: list[str], fraction: float) -> Corpus:
    require(
        isinstance(fraction, int | float) and 0 <= fraction < 1,
        "held_out_fraction, at least 0 and below 1",
        f"held_out_fraction = {fraction!r}",
        "take 0.1",
    )
    distinct = _remove_near_duplicates(keys, documents)
    require(
        bool(distinct),
        "a corpus with some text",
        f"{name}: {len(documents)} documents, none with text",
        "give at least one document that is more than white space",
    )
    train, held_out = _split(name, distinct, fraction)
    digest = hashlib.sha256()
    for part in (train, held_out):
        digest.update(f"{len(part)} documents".encode())
        for text in part:
            digest.update(f" {len(text)} characters: {text}".encode())
    return Corpus(name, tuple(train), tuple(held_out), digest.hexdigest()[:12])


def _remove_near_duplicates(keys: list[str], documents: list[str]) -> list[tuple[str, str]]:
    """Return (key, text) of the documents that keep a paragraph."""
    cut = [split_paragraphs(text) for text in documents]
    dropped = set(near_duplicates([paragraph for part in cut for paragraph in part]))
    distinct, at = [], 0
    for key, part in zip(keys, cut):
        kept = [paragraph for i, paragraph in enumerate(part, start=at) if i not in dropped]
        at += len(part)
        if kept:
            distinct.append((key, "\n\n".join(kept)))
    return distinct


def _split(name: str, named: list[tuple[str, str]], fraction: float) -> tuple[list[str], list[str]]:
    """Hold out whole documents in the order of the hashes of their keys, while they fit."""
    documents = [text for _, text in named]
    sizes = [len(text.encode()) for text in documents]
    wanted_bytes = fraction * sum(sizes)
    chosen, chosen_bytes = set(), 0
    # A hash and not random(): the choice depends on the document alone, not on its neighbours.
    for i in sorted(range(len(named)), key=lambda i: hashlib.sha256(named[i][0].encode()).digest()):
        if chosen_bytes + sizes[i] <= wanted_bytes:
            chosen.add(i)
            chosen_bytes += sizes[i]
    train = [text for i, text in enumerate(documents) if i not in chosen]
    held_out = [text for i, text in enumerate(documents) if i in chosen]
    if chosen_bytes < wanted_bytes / 2:
        longest = max(range(len(train)), key=lambda i: len(train[i]))
        head, tail = _cut_end(name, train[longest], wanted_bytes - chosen_bytes)
        train[longest] = head
        held_out.append(tail)
    return train, held_out


def _cut_end(name: str, text: str, wanted_bytes: float) -> tuple[str, str]:
    head = split_paragraphs(text)
    tail = [head.pop()]
    tail_bytes = len(tail[0].encode())
    while len(head) > 1 and tail_bytes < wanted_bytes:
        tail.append(head.pop())
        tail_bytes += len(tail[-1].encode()) + 2
    require(
        bool(head),
        "a corpus that can be split, so at least two different paragraphs in its longest document",
        f"{name}: one paragraph of {len(text)} characters",
        "add text, cut it with blank lines, or take held_out_fraction=0",
    )
    return "\n\n".join(head), "\n\n".join(reversed(tail))
