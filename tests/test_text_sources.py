"""Documents from files, folders, JSON lines and the hub: what is read, and what is refused."""

import gzip
import json
import os
import sys
import tracemalloc
from types import ModuleType

import pytest
import zstandard

from slimlab.config import InputError
from slimlab.text import files, sources
from slimlab.text.files import decode_utf8, read_blocks, write_atomically
from slimlab.text.sources import hub_documents, read_documents, read_records

RECORDS = [
    {"text": "Grüße, 世界\nsecond line", "meta": {"redpajama_set_name": "RedPajamaC4"}},
    {"text": "a line separator \u2028 inside", "meta": {}},
    {"meta": {}, "text": "emoji 🙂"},
]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in RECORDS).encode()


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.rstrip(b"\n")),
        ("a.JSONL", b"\xef\xbb\xbf" + LINES),
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl.zst", zstd(LINES)),
        ("bare.zst", zstd(LINES)),
        ("train_0.part.zst", zstd(LINES)),
        ("frames.jsonl.zst", zstd(LINES[:50]) + zstd(b"") + zstd(LINES[50:])),
        ("a.jsonl.gz", gzip.compress(LINES)),
    ],
)
def test_json_lines_give_their_texts_however_they_are_packed(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(read_documents(tmp_path / name)) == TEXTS
    assert list(read_records(str(tmp_path / name))) == RECORDS


def test_another_key_can_hold_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 3}\n\n{"content": ""}')
    assert list(read_documents(tmp_path / "a.jsonl", text_key="content")) == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.TXT", "a.txt.zst", "a.txt.gz"])
def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path, name):
    data = "\ufeffone\r\ntwo\rthree\n\n\ufefffour".encode()
    pack = {"zst": zstd, "gz": gzip.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack(data))
    assert list(read_documents(tmp_path / name)) == ["one\ntwo\nthree\n\n\ufefffour"]


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 5, 7, 1000])
def test_decoding_does_not_depend_on_where_blocks_end(block_bytes):
    data = "\ufeffa\r\nü世🙂\r\r\nb\r".encode()
    blocks = [data[at : at + block_bytes] for at in range(0, len(data), block_bytes)]
    assert "".join(decode_utf8(blocks, "x")) == "a\nü世🙂\n\nb\n"


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path):
    for name in ["b.txt", "a/z.md", "a/c.jsonl", ".git/x.txt", ".hidden.txt", "image.png", "a0.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a/c.jsonl"}' if "jsonl" in name else name)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert list(read_documents(tmp_path)) == ["a/c.jsonl", "a/z.md", "a0.py", "b.txt"]


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 2000)
    monkeypatch.setattr(files, "BLOCK_BYTES", 512)
    text = "\n\n".join(f"paragraph {i} " + "x" * (i % 90) for i in range(300))
    (tmp_path / "long.txt").write_text(text)
    documents = list(read_documents(tmp_path / "long.txt"))
    assert "".join(documents) == text
    assert len(documents) > 5
    assert all(one.endswith("\n\n") and len(one) <= 2512 for one in documents[:-1])
    for separator in ("\n", ""):
        (tmp_path / "dense.txt").write_text(text.replace("\n\n", separator))
        dense = list(read_documents(tmp_path / "dense.txt"))
        assert "".join(dense) == text.replace("\n\n", separator)
        assert all(one.endswith(separator) and len(one) <= 2512 for one in dense[:-1])


def test_a_large_compressed_file_is_never_whole_in_memory(tmp_path):
    compressor = zstandard.ZstdCompressor(level=1)
    num_lines, padding = 30_000, "lorem ipsum " * 80
    with open(tmp_path / "big.jsonl.zst", "wb") as file, compressor.stream_writer(file) as packed:
        for i in range(num_lines):
            packed.write(json.dumps({"text": f"{i} {padding}", "meta": {}}).encode() + b"\n")
    tracemalloc.start()
    try:
        total = sum(len(text) for text in read_documents(tmp_path / "big.jsonl.zst"))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 28_000_000
    # 2 KiB of the file hold about 0.5 MB of this text: one such block and its pieces, not all.
    assert peak_bytes < 4_000_000


def test_only_what_is_asked_for_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    documents = read_documents(tmp_path)
    assert next(documents) == "fine"
    with pytest.raises(InputError, match=r"b\.txt"):
        next(documents)


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        list(read_documents(path, **options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "offset"),
    [
        ("latin.txt", b"gr" + "üße".encode("latin-1"), 2),
        ("bom.txt", b"\xef\xbb\xbfab\xff", 5),
        ("cut.txt", "ab世".encode()[:-1], 2),
        ("far.txt", b"x" * 200_000 + b"\xe9 y", 200_000),
        ("split.txt", b"x" * (files.BLOCK_BYTES - 1) + b"\xe4\xff", files.BLOCK_BYTES - 1),
        ("lines.jsonl", LINES + b'{"text": "\x80"}\n', len(LINES) + 10),
        ("packed.jsonl.zst", zstd(LINES + b'{"text": "\x80"}\n'), len(LINES) + 10),
    ],
)
def test_text_that_is_not_utf8_names_file_and_byte(tmp_path, name, data, offset):
    (tmp_path / name).write_bytes(data)
    message = refusal(tmp_path / name)
    assert name in message
    assert f"at offset {offset} " in message
    assert "iconv -f" in message


def test_utf16_is_recognised(tmp_path):
    (tmp_path / "w.txt").write_bytes("hello".encode("utf-16"))
    assert "iconv -f UTF-16" in refusal(tmp_path / "w.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "line 5: Expecting ',' delimiter"),
        (b"plain words", "begins 'plain words'"),
        (b'["text"]', "line 5: a list"),
        (b'{"body": "x", "meta": 1}', "its keys are 'body', 'meta'"),
        (b"{}", "its keys are none"),
        (b'{"text": null}', "line 5: a NoneType"),
        (b'{"text": "a\\ud83d"}', "half a surrogate pair at character 1"),
        (b"[" * 100_000, "line 5: "),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + LINES + line + b"\n" + LINES)
    documents = read_documents(tmp_path / "a.jsonl")
    assert [next(documents) for _ in TEXTS] == TEXTS
    with pytest.raises(InputError) as caught:
        next(documents)
    assert "a.jsonl, line 5" in str(caught.value)
    assert message in str(caught.value)


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_CHARS", 200_000)
    (tmp_path / "a.jsonl").write_bytes(LINES + b"x" * 1_000_000)
    assert "line 4, which is longer" in refusal(tmp_path / "a.jsonl")


def test_every_truncation_of_a_compressed_file_is_noticed(tmp_path):
    for name, data in [("a.jsonl.zst", zstd(LINES)), ("a.jsonl.gz", gzip.compress(LINES))]:
        for length in range(len(data)):
            (tmp_path / name).write_bytes(data[:length])
            assert f"{name}: " in refusal(tmp_path / name), length


def test_a_file_cut_between_large_blocks_is_noticed_after_its_good_lines(tmp_path):
    data = zstd(b"".join(b'{"text": "%d"}\n' % i for i in range(50_000)))
    (tmp_path / "a.jsonl.zst").write_bytes(data[: len(data) * 3 // 4])
    message = refusal(tmp_path / "a.jsonl.zst")
    assert "cut off" in message
    assert "in the middle of a frame" in message


def test_other_data_called_zst_or_gz_is_refused(tmp_path):
    for name in ("a.zst", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(LINES)
        assert "damaged" in refusal(tmp_path / name)
    (tmp_path / "tail.zst").write_bytes(zstd(LINES) + b"garbage after the frame")
    assert "tail.zst" in refusal(tmp_path / "tail.zst")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.txt", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("a\0b", "does not exist"),
        ("", "does not exist"),
        (b"a.txt", "a bytes"),
        (3, "an? int"),
    ],
)
def test_a_path_that_is_none_is_refused_at_once(path, message):
    with pytest.raises(InputError, match=message):
        read_documents(path)


def test_kinds_that_are_not_read_are_refused_at_once(tmp_path):
    for name in ("a.pdf", "a.json", "a.tar.gz", "README"):
        (tmp_path / name).write_text("x")
        with pytest.raises(InputError, match="suffix"):
            read_documents(tmp_path / name)
    with pytest.raises(InputError, match="which has none"):
        read_documents(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(InputError, match="use read_documents"):
            read_records(path)


def test_blocks_of_a_missing_file_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: No such file"):
        list(read_blocks(tmp_path / "gone.txt"))


def test_a_pipe_with_the_name_of_a_text_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "a device or a pipe" in refusal(tmp_path / "pipe.txt")


def test_writing_keeps_a_link_and_never_takes_the_place_of_a_pipe(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "there" / "target.json"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path / "there") == ["target.json"]
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a folder or a device"):
        write_atomically(tmp_path / "pipe", b"data")
    assert (tmp_path / "pipe").is_fifo()


def test_writing_replaces_a_file_whole_or_leaves_it(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomically(target, b"old")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"

    def disk_is_full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_is_full)
    with pytest.raises(InputError, match=r"a\.json': No space left on device"):
        write_atomically(target, b"newer")
    assert target.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_writing_where_nothing_can_be_written_is_refused(tmp_path):
    for path in (tmp_path / "no" / "a.json", tmp_path, "", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="a file that can be written"):
            write_atomically(path, b"data")
    assert list(tmp_path.iterdir()) == []


def hub(monkeypatch, load_dataset):
    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return iter([{"text": "a"}, {"text": ""}, {"text": "b"}])

    hub(monkeypatch, load_dataset)
    assert list(hub_documents("some/set", split="test", config="en")) == ["a", "b"]
    assert asked == [("some/set", {"name": "en", "split": "test", "streaming": True})]


def test_without_the_package_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'slimlab\[hub\]'"):
        hub_documents("some/set")


class DatasetNotFoundError(FileNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'some/set' on the Hub"), "a network is needed"),
        (TimeoutError(), "a network is needed"),
        (DatasetNotFoundError("Dataset 'some/set' doesn't exist"), "check the name"),
        (ValueError("Bad split: tain"), "check the name, the split"),
    ],
)
def test_what_the_hub_answers_becomes_a_message(monkeypatch, error, message):
    def fails(*_, **__):
        raise error

    hub(monkeypatch, fails)
    with pytest.raises(InputError, match=message) as caught:
        hub_documents("some/set")
    assert caught.value.__cause__ is error
    assert type(error).__name__ in str(caught.value)


def test_a_network_that_breaks_on_the_way_and_a_missing_column_are_named(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("reset")

    hub(monkeypatch, lambda *_, **__: rows())
    documents = hub_documents("some/set")
    assert next(documents) == "a"
    with pytest.raises(InputError, match="ConnectionError: reset"):
        next(documents)
    with pytest.raises(InputError, match="row 0: its keys are 'text'"):
        next(hub_documents("some/set", text_key="content"))


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(InputError, match="the name of a dataset"):
        hub_documents(name)
