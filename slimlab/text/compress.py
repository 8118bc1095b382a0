"""What compressors need for a text: bits per byte, the yardstick that needs no training.

Chapter 05 puts them beside the loss of a language model. A model that gives each next token a
probability is a compressor (an arithmetic coder spends -log2 p bits on it), so both are measured
in bits per byte of the same text. A compressor that has just read the training text ("primed") is
the fair rival of a model that was trained on it: neither the text nor the weights are counted.

Production differs: the best compressors mix the predictions of many small models and come closer
to language models than these four; records are kept with the size of the decompressor counted in.
"""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterable

import zstandard

from slimlab.config import InputError, check_choice, require


def compressed_bytes(data: bytes, method: str = "xz") -> int:
    """Count the bytes that a compressor leaves of `data`, at its most thorough setting.

    data     any bytes
    method   "gzip" (repetitions within 32 KiB), "bz2" (blocks of 900 kB), "zstd" (level 22) or
             "xz" (LZMA, preset 9 extreme); the last two with a window that holds all of `data`
    returns  bytes, the format's own header and checksum included

    Raises InputError for an unknown method.
    """
    check_choice("method", method, tuple(METHODS))
    return len(METHODS[method](data))


def compression_bits_per_byte(
    documents: str | Iterable[str], method: str = "xz", primer: str | Iterable[str] | None = None
) -> float:
    """Measure the bits that a compressor spends per byte of a text.

    documents  the text to judge by, one or several documents, which are joined as they are
    method     as for `compressed_bytes`
    primer     text that the compressor has read before, such as corpus.train; None for nothing
    returns    bits per UTF-8 byte of `documents`

    With a primer: bytes of primer and documents compressed together, minus bytes of the primer
    compressed alone. Headers cancel. It helps as far as the compressor reaches back: xz and zstd
    get a window over everything (xz's presets stop at 64 MiB), gzip sees the last 32 KiB, bz2 what
    shares a block. What is left of error is the end of the primer, which alone is rounded up to
    whole bytes (xz: to four): a few bytes in all. xz, gzip and zstd read from left to right, so
    their difference is a message that a receiver of the primer could decode; bz2 sorts a whole
    block at once, and its difference is not.

    Raises InputError for an unknown method, or if there is no text.
    """
    data = _joined(documents, "documents")
    before = b"" if primer is None else _joined(primer, "primer")
    size_bytes = compressed_bytes(before + data, method)
    if before:
        size_bytes -= compressed_bytes(before, method)
    return 8 * size_bytes / len(data)


def _joined(documents: str | Iterable[str], name: str) -> bytes:
    texts = [documents] if isinstance(documents, str) else documents
    asked = f"{name}, a text or an iterable of texts"
    change = "of a corpus take a part: corpus.held_out, corpus.train"
    # Bytes are iterable, but what they yield is numbers.
    iterable = isinstance(texts, Iterable) and not isinstance(texts, bytes)
    require(iterable, asked, f"a {type(texts).__name__}", change)
    texts = list(texts)
    for number, text in enumerate(texts):
        given = f"document {number} is a {type(text).__name__}"
        require(isinstance(text, str), asked, given, change)
    try:
        data = "".join(texts).encode()
    except UnicodeEncodeError as error:
        given = f"half a surrogate pair at character {error.start} of {name}"
        raise InputError("text of whole characters", given, "delete the half") from error
    require(bool(data), asked, f"no text at all in {name}", change)
    return data


def _window_log(data: bytes) -> int:
    return max(len(data), 1 << 16).bit_length()


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=9, mtime=0)


def _zstd(data: bytes) -> bytes:
    window_log = min(_window_log(data), zstandard.WINDOWLOG_MAX)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        22, source_size=len(data), window_log=window_log
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def _xz(data: bytes) -> bytes:
    dict_size = min(1 << _window_log(data), (1 << 30) + (1 << 29))  # liblzma's limit: 1.5 GiB
    preset = 9 | lzma.PRESET_EXTREME
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dict_size}]
    return lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters)


METHODS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": _gzip,
    "bz2": bz2.compress,
    "zstd": _zstd,
    "xz": _xz,
}
