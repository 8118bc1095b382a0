"""Cut text into the words that merges never cross: GPT-2's pattern, and special tokens.

Chapter 04 explains it. The pattern is GPT-2's (Radford et al. 2019): a contraction, a run of
letters, digits or other signs with at most one space before it, or a run of white space.

Production differs: GPT-4's pattern also limits digits to three a word and ignores case in
contractions; tokenizers written in Rust or C++ use a hand-written scanner in its place.
"""

from collections.abc import Iterable, Iterator

import regex

from slimlab.config import require

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What follows a word's end can change the word by this many characters and no more: "'" may
# become "'ll", and white space leaves its last character to the word behind it.
LOOKAHEAD_CHARS = 2
_MIN_SCAN_CHARS = 1 << 12
_WORD = regex.compile(GPT2_PATTERN)


class PreSplitter:
    """Cuts text into words and special tokens; joined again they are the text.

    special_tokens  texts that stay whole; of two that begin alike the longer is taken
    """

    def __init__(self, special_tokens: Iterable[str] = ()):
        self.special_tokens = sorted(special_tokens, key=len, reverse=True)
        alternatives = "|".join(regex.escape(token) for token in self.special_tokens)
        self._special = regex.compile(alternatives) if self.special_tokens else None

    def split(self, text: str) -> Iterator[str]:
        """Cut the whole `text`; returns words and special tokens in order."""
        start = 0
        while self._special and (match := self._special.search(text, start)):
            yield from _WORD.findall(text[start : match.start()])
            yield match.group()
            start = match.end()
        yield from _WORD.findall(text[start:] if start else text)

    def split_stream(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut a text that comes in pieces.

        chunks   pieces of text, cut anywhere
        returns  the words and special tokens that `split` gives for the joined text

        Held back is only what the next piece may still change: about one word.
        Raises InputError if a piece is not a str.
        """
        held, waiting, waiting_chars = "", [], 0
        for number, chunk in enumerate(chunks):
            check_text(chunk, f"piece {number} of the stream")
            waiting.append(chunk)
            waiting_chars += len(chunk)
            # Scanning only when the text has doubled keeps a long word from costing its square.
            if waiting_chars >= max(len(held), _MIN_SCAN_CHARS):
                held = "".join([held, *waiting])
                settled = yield from self._split_settled(held)
                held, waiting, waiting_chars = held[settled:], [], 0
        yield from self.split("".join([held, *waiting]))

    def _split_settled(self, text: str) -> Iterator[str]:
        """Yield what no later text can change; return where the rest begins."""
        start = 0
        while True:
            doubtful = self._doubtful_from(text, start)
            match = self._special.search(text, start) if self._special else None
            if match is None or match.start() >= doubtful:
                break
            yield from _WORD.findall(text[start : match.start()])
            yield match.group()
            start = match.end()
        sure = text[start:doubtful]
        for match in _WORD.finditer(sure):
            if match.end() + LOOKAHEAD_CHARS > len(sure):
                return start + match.start()
            yield match.group()
        return doubtful

    def _doubtful_from(self, text: str, start: int) -> int:
        """Find where a special token may begin of which the text holds only the first part."""
        longest = len(self.special_tokens[0]) if self.special_tokens else 0
        for at in range(max(start, len(text) - longest + 1), len(text)):
            rest = text[at:]
            if any(len(rest) < len(s) and s.startswith(rest) for s in self.special_tokens):
                return at
        return len(text)


def check_text(text: object, name: str) -> None:
    """Raise InputError unless `text`, called `name` in the message, is a str."""
    require(
        isinstance(text, str),
        f"{name} as text (str)",
        f"a {type(text).__name__}",
        "decode bytes first: data.decode('utf-8'); read files with read_documents(path)",
    )
