"""Documents from where a reader has them: a file, a folder, JSON lines, a dataset of the hub.

Chapter 00 explains it. A document is one str. Everything is a stream: a line of a file of many
gigabytes is read when it is asked for, and a file of plain text above MAX_DOCUMENT_CHARS is
cut at blank lines. SlimPajama's files are JSON lines, `{"text": ..., "meta": {...}}`, compressed
with zstd (the data card of cerebras/SlimPajama-627B).

Production differs: it tokenizes once, stores the ids in large binary files and reads those
through memory maps, in a shuffled order that survives a restart.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from slimlab.config import InputError, require
from slimlab.text.files import COMPRESSED, decode_utf8, read_blocks

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
MAX_DOCUMENT_CHARS = 1 << 23
MAX_LINE_CHARS = 1 << 26


def read_documents(path: str | os.PathLike, text_key: str = "text") -> Iterator[str]:
    """Stream the documents at `path`.

    path      a text file (.txt, .md, .rst, .py): one document, or several, cut at blank lines,
              if it is longer than 8 Mi characters; JSON lines (.jsonl, .ndjson): one document a
              line; either with .zst or .gz behind it, a bare .zst is JSON lines; a folder: all
              such files below it, hidden ones left out, in the order of their names
    text_key  the key of a JSON object that holds its text
    returns   an iterator of non-empty texts; the path is checked at once, contents on the way

    Raises InputError: no such path, a kind of file that is not read here, a folder without any;
    while reading: text that is not UTF-8, a broken line, a damaged or cut-off file.
    """
    files = _list_files(_existing(path))
    return (text for file in files for text in _documents_of(file, text_key) if text)


def read_records(path: str | os.PathLike, text_key: str = "text") -> Iterator[dict]:
    """Stream the JSON objects of one file of JSON lines, with their "meta" and all other keys.

    path      a file of JSON lines (.jsonl, .ndjson; .zst or .gz behind it)
    text_key  the key that every object must have, with a text
    returns   an iterator of dicts

    Raises InputError as `read_documents` does.
    """
    file = _existing(path)
    require(
        file.is_file() and _kind(file) == "json lines",
        "one file of JSON lines (.jsonl or .jsonl.zst)",
        str(path),
        "for texts and folders use read_documents, which gives texts without their meta",
    )
    return _records_of(file, text_key)


def _existing(path: str | os.PathLike) -> Path:
    require(
        isinstance(path, str | os.PathLike),
        "the path of a file or folder",
        f"a {type(path).__name__}",
        "give a str or pathlib.Path",
    )
    shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
    # os.path.exists, unlike Path.exists, also answers for a name that is too long.
    require(
        bool(str(path)) and os.path.exists(path),
        "the path of a file or folder",
        f"{shown!r}, which does not exist",
        f"check the spelling; relative paths start at {Path.cwd().name}/, the working folder",
    )
    return Path(path)


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        is_bare = not set(suffixes[:-1]) & {*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES}
        if suffixes.pop() == ".zst" and is_bare:
            return "json lines"
    last = suffixes[-1] if suffixes else ""
    if last in JSON_LINES_SUFFIXES:
        return "json lines"
    return "text" if last in TEXT_SUFFIXES else None


def _list_files(path: Path) -> list[Path]:
    known = ", ".join((*TEXT_SUFFIXES, *JSON_LINES_SUFFIXES))
    if not path.is_dir():
        require(
            _kind(path) is not None,
            f"a file of text or JSON lines ({known}; .zst or .gz may follow)",
            f"{path}, whose suffix is {path.suffix!r}",
            "rename plain text to .txt; write JSON with one object per line and call it .jsonl",
        )
        require(
            path.is_file(), "a file", f"{path}, a device or a pipe", "copy its text into a file"
        )
        return [path]
    files = []
    for folder, subfolders, names in os.walk(path, onerror=_refuse_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        visible = (Path(folder, name) for name in names if not name.startswith("."))
        files += [file for file in visible if _kind(file) and file.is_file()]
    require(
        bool(files), f"a folder with files ({known})", f"{path}, which has none", "add some text"
    )
    return sorted(files, key=lambda file: file.relative_to(path).parts)


def _refuse_folder(error: OSError) -> None:
    given = f"{error.filename}: {error.strerror}"
    raise InputError("a folder that can be read", given, "check its permissions") from error


def _documents_of(file: Path, text_key: str) -> Iterator[str]:
    if _kind(file) == "json lines":
        return (record[text_key] for record in _records_of(file, text_key))
    return _cut_long(decode_utf8(read_blocks(file), file))


def _cut_long(pieces: Iterable[str]) -> Iterator[str]:
    """Join pieces into documents of at most MAX_DOCUMENT_CHARS plus one piece."""
    held, held_chars = [], 0
    for piece in pieces:
        held.append(piece)
        held_chars += len(piece)
        if held_chars > MAX_DOCUMENT_CHARS:
            text = "".join(held)
            ends = (text.rfind(mark) + len(mark) for mark in ("\n\n", "\n"))
            cut = next((end for end in ends if end > 2), len(text))
            yield text[:cut]
            held, held_chars = [text[cut:]], len(text) - cut
    yield "".join(held)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    number, held, held_chars = 1, [], 0
    for piece in decode_utf8(read_blocks(file), file):
        first, *others = piece.split("\n")
        held.append(first)
        held_chars += len(first)
        for other in others:
            yield number, "".join(held)
            number, held, held_chars = number + 1, [other], len(other)
        require(
            held_chars <= MAX_LINE_CHARS,
            f"JSON lines of at most {MAX_LINE_CHARS} characters",
            f"{file}, line {number}, which is longer",
            "is it JSON lines at all? each object ends with a line end",
        )
    yield number, "".join(held)


def _records_of(file: Path, text_key: str) -> Iterator[dict]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{place}: {error}; it begins {line[:60]!r}"
            raise InputError(
                "one JSON object per line", reason, "mend or delete the line"
            ) from error
        _check_record(record, text_key, place)
        yield record


def _check_record(record: object, text_key: str, place: str) -> None:
    asked = f'a JSON object with a text under "{text_key}"'
    require(
        isinstance(record, dict),
        asked,
        f"{place}: a {type(record).__name__}",
        'write each line as {"text": "..."}',
    )
    keys = ", ".join(map(repr, list(record)[:12])) or "none"
    require(
        text_key in record,
        asked,
        f"{place}: its keys are {keys}",
        "name the key that holds the text: text_key='...'",
    )
    text = record[text_key]
    require(isinstance(text, str), asked, f"{place}: a {type(text).__name__}", "put a text there")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{place}: half a surrogate pair at character {error.start}"
        raise InputError(asked, half, "write the whole character, or delete the half") from error


def hub_documents(
    name: str, split: str = "train", config: str | None = None, text_key: str = "text"
) -> Iterator[str]:
    """Stream the documents of a dataset of the Hugging Face hub; only what is read is fetched.

    name      the dataset, such as "DKYoon/SlimPajama-6B"
    split     "train", "validation" or "test"
    config    the part of a dataset that has several
    text_key  the column that holds the text
    returns   an iterator of non-empty texts

    Raises InputError without the `datasets` package, without a network, for an unknown name,
    split or column.
    """
    require(
        isinstance(name, str) and bool(name.strip()),
        "the name of a dataset of the hub",
        f"{name!r}",
        "give owner and name, such as 'DKYoon/SlimPajama-6B'",
    )
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"the dataset {name!r} of the hub",
            f"a Python without the package `datasets` ({error})",
            "install it: pip install 'slimlab[hub]'; or read a file of yours: read_documents",
        ) from error
    rows = _from_hub(
        lambda: datasets.load_dataset(name, name=config, split=split, streaming=True), name
    )
    return _hub_texts(rows, name, text_key)


def _hub_texts(rows: Iterable[dict], name: str, text_key: str) -> Iterator[str]:
    rows = iter(rows)
    number = 0
    while (row := _from_hub(lambda: next(rows, None), name)) is not None:
        _check_record(row, text_key, f"{name}, row {number}")
        number += 1
        if row[text_key]:
            yield row[text_key]


def _from_hub(fetch, name: str):
    try:
        return fetch()
    except InputError:
        raise
    # The hub's client raises the errors of whichever library it uses for the network.
    except Exception as error:
        known = isinstance(error, ValueError) or "NotFound" in type(error).__name__
        change = "check the name, the split and the config on the dataset's page of the hub"
        if not known:
            change = "a network is needed here; without one, read a file of yours: read_documents"
        first_line = (str(error).strip().splitlines() or [""])[0]
        given = f"{type(error).__name__}: {first_line}"
        raise InputError(f"the dataset {name!r} of the hub", given, change) from error
