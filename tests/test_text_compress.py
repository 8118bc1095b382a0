"""Compressors as a yardstick: sizes of real files, and what a primer adds."""

import bz2
import gzip
import lzma
import random
import shutil
import subprocess

import pytest
import zstandard

from slimlab.config import InputError
from slimlab.text.compress import METHODS, compressed_bytes, compression_bits_per_byte

UNPACK = {
    "gzip": gzip.decompress,
    "bz2": bz2.decompress,
    "zstd": lambda data: zstandard.ZstdDecompressor().decompress(data),
    "xz": lzma.decompress,
}
NAMES = tuple(METHODS)


def random_text(num_chars, seed):
    """Text of 64 equally likely characters, in which there is nothing to find: 6 bits a byte."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.\n"
    return "".join(random.Random(seed).choices(letters, k=num_chars))


def test_the_four_methods_are_those_of_the_table():
    assert set(NAMES) == set(UNPACK)


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("data", [b"", b"a", bytes(range(256)) * 700])
def test_what_is_counted_can_be_unpacked_again(method, data):
    packed = METHODS[method](data)
    assert UNPACK[method](packed) == data
    assert compressed_bytes(data, method) == len(packed)


@pytest.mark.parametrize(
    ("method", "command", "slack_bytes"),
    [
        ("gzip", ["gzip", "-9", "-n"], 80),  # half a percent: zlib and GNU cut blocks differently
        ("bz2", ["bzip2", "-9"], 0),
        ("xz", ["xz", "-9e"], 4),  # its checksum may be longer, by how it was built
    ],
)
def test_sizes_are_those_of_the_programs_of_the_same_name(method, command, slack_bytes):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    data = (random_text(500, 0) * 3 + random_text(20_000, 1)).encode()
    program = subprocess.run([*command, "--stdout"], input=data, capture_output=True, check=True)
    assert abs(compressed_bytes(data, method) - len(program.stdout)) <= slack_bytes


@pytest.mark.parametrize("method", NAMES)
def test_text_without_structure_costs_its_entropy(method):
    text = random_text(100_000, 2)
    # 6 bits a character; what the codes and headers cost above it is below 3 % (xz 2.6 %).
    assert 6 <= compression_bits_per_byte(text, method) < 6 * 1.03


@pytest.mark.parametrize(("method", "reaches"), [("xz", True), ("zstd", True), ("gzip", False)])
def test_a_primer_pays_if_it_is_within_reach(method, reaches):
    text, between = random_text(4_000, 3), random_text(60_000, 4)
    primed = compression_bits_per_byte(text, method, primer=[text, between])
    # 60 000 bytes lie between the text and its copy; gzip looks back over 32 768. A repetition
    # costs a few bytes (zstd cuts it into sequences): below 1 % of 4000.
    assert primed < 0.08 if reaches else 5.9 < primed < 6.2


@pytest.mark.parametrize("method", ["xz", "gzip", "zstd"])
def test_a_primer_of_the_same_kind_of_noise_changes_nothing(method):
    text, primer = random_text(60_000, 5), random_text(90_000, 6)
    plain, primed = (compression_bits_per_byte(text, method, given) for given in (None, primer))
    # The primer teaches xz that there are 64 characters, about 1 % of the text's size.
    assert primed == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("num_bytes", [1, 70_000, 3_000_000])
def test_the_window_of_xz_holds_all_of_the_data(num_bytes):
    packed = METHODS["xz"](bytes(num_bytes))
    # The xz file format: 12 bytes, then size, flags, 0x21 for LZMA2, 1 byte: the window's code
    assert packed[13:16] == b"\x00\x21\x01"
    window_bytes = (2 | packed[16] & 1) << (packed[16] // 2 + 11)
    assert max(num_bytes, 1 << 16) <= window_bytes <= max(2 * num_bytes, 1 << 17)


def test_documents_are_joined_as_they_are_and_bytes_are_utf8():
    documents = ["Grüße, ", "你好", " κόσμε"]
    data = "Grüße, 你好 κόσμε".encode()
    expected = 8 * len(gzip.compress(data, 9)) / len(data)
    assert compression_bits_per_byte(documents, "gzip") == expected
    assert compression_bits_per_byte("".join(documents), "gzip") == expected
    assert compression_bits_per_byte(iter(documents), "gzip") == expected


@pytest.mark.parametrize(
    ("documents", "options", "given"),
    [
        ("", {}, "no text at all in documents"),
        ([], {}, "no text at all in documents"),
        ("a", {"primer": []}, "no text at all in primer"),
        (b"bytes", {}, "a bytes"),
        (["a", 3], {}, "document 1 is a int"),
        (7, {}, "a int"),
        ("a", {"method": "rar"}, "method = 'rar'"),
        (["\ud800"], {}, "half a surrogate pair at character 0"),
    ],
)
def test_what_is_no_text_is_refused(documents, options, given):
    with pytest.raises(InputError) as caught:
        compression_bits_per_byte(documents, **options)
    assert given in caught.value.given


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="gzip, bz2, zstd, xz"):
        compressed_bytes(b"", "zip")
