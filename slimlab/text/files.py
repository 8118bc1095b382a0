"""Bytes of files: read in blocks, decompressed and decoded on the way; written all or nothing.

Chapter 00 uses it through `slimlab.text.sources`. Nothing here holds a whole file in memory.

Production differs: readers there fetch from object stores, prefetch in other processes and skip
a damaged shard with an entry in a log; here the first damage stops with its file and place.
"""

import codecs
import gzip
import io
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import zstandard

from slimlab.config import InputError

BLOCK_BYTES = 1 << 16
# A block of zeros grows 30000-fold: 2 KiB of a zstd file become at most about 64 MiB of text.
_ZSTD_BLOCK_BYTES = 1 << 11
COMPRESSED = (".zst", ".gz")


def read_blocks(path: str | os.PathLike) -> Iterator[bytes]:
    """Read the file at `path` in blocks; a name ending in .zst or .gz is decompressed.

    path     an existing file
    returns  non-empty blocks of bytes

    Raises InputError if the file cannot be opened, or its compressed data is damaged or cut off.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if path.suffix.lower() == ".zst":
                yield from _unpack_zstd(file, path)
            elif path.suffix.lower() == ".gz":
                yield from _unpack_gzip(file, path)
            else:
                yield from iter(lambda: file.read(BLOCK_BYTES), b"")
    except OSError as error:
        reason = f"{path}: {error.strerror or error}"
        raise InputError("a file to read", reason, "check the name and its permissions") from error


def _unpack_zstd(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    frame, inside_frame, seen_bytes = None, False, 0
    while block := file.read(_ZSTD_BLOCK_BYTES):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                unpacked = frame.decompress(block)
            except zstandard.ZstdError as error:
                place = f"{path}: {error}, near byte {seen_bytes} of the compressed file"
                raise _damaged("zstd", place) from error
            for at in range(0, len(unpacked), BLOCK_BYTES):
                yield unpacked[at : at + BLOCK_BYTES]
            rest = frame.unused_data if frame.eof else b""
            seen_bytes += len(block) - len(rest)
            inside_frame = not frame.eof
            # A file may hold several frames, one after the other.
            block, frame = rest, None if frame.eof else frame
    if inside_frame or not seen_bytes:
        # The stream reader of zstandard would end here as if the file were complete.
        place = f"{path}: ends after {seen_bytes} bytes, in the middle of a frame"
        raise _damaged("zstd", place)


def _unpack_gzip(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    try:
        if not file.peek(1):  # which gzip takes for an empty text
            raise EOFError("an empty file")
        with gzip.open(file, "rb") as unpacked:
            yield from iter(lambda: unpacked.read(BLOCK_BYTES), b"")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged("gzip", f"{path}: {error}") from error


def _damaged(kind: str, place: str) -> InputError:
    return InputError(
        f"a complete {kind}-compressed file",
        place,
        "the file is damaged, cut off or not of this kind: fetch it again, compare its size",
    )


def decode_utf8(blocks: Iterable[bytes], path: str | os.PathLike) -> Iterator[str]:
    """Decode blocks of bytes that may end inside a character.

    blocks   consecutive blocks of one file; a leading byte-order mark is taken off
    path     its name, for the message
    returns  non-empty pieces of text; line ends become a single newline

    Raises InputError with the file and the offset of the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    start, at_start = 0, True
    for block, final in _with_final(blocks):
        pending_bytes = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final)
        except UnicodeDecodeError as error:
            offset = start - pending_bytes + error.start
            raise _not_utf8(path, offset, error.object[error.start]) from error
        start += len(block)
        if at_start and piece:
            piece, at_start = piece.removeprefix("\ufeff"), False
        if piece := newlines.decode(piece, final):
            yield piece


def _with_final(blocks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    for block in blocks:
        yield block, False
    yield b"", True


def _not_utf8(path: str | os.PathLike, offset: int, byte: int) -> InputError:
    is_utf16 = offset == 0 and byte in (0xFF, 0xFE)
    guess = "UTF-16" if is_utf16 else "ENCODING (often GB18030 or ISO-8859-1)"
    return InputError(
        "text in UTF-8",
        f"{path}: byte 0x{byte:02x} at offset {offset} does not belong to UTF-8",
        f"convert the file: iconv -f {guess} -t UTF-8 {path} > converted.txt",
    )


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` whole or not at all: an old file stays until the new one is complete.

    path  the file, or a link to it; its folder must exist
    data  the bytes

    Raises InputError if it cannot be written (no such folder, no permission, disk full), or if
    something other than a file has that name.
    """
    path = Path(path)
    try:
        target = Path(os.path.realpath(path))
        # os.replace would put a file in the place of a device or a pipe.
        if target.exists() and not target.is_file():
            raise OSError("a folder or a device, no file")
        # Beside the target: os.replace is whole or nothing only inside one file system.
        name = f".{target.name[:40]}.{os.getpid()}.{threading.get_ident()}.tmp"
        temporary = target.with_name(name)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise InputError(
            "a file that can be written",
            f"{str(path)!r}: {getattr(error, 'strerror', None) or error}",
            "check that the folder exists, that you may write there, and the space on the disk",
        ) from error
