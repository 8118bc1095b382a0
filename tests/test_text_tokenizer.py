"""The tokenizer against `tokenizers` and `tiktoken`, as a stream, and as a file."""

import json
import os
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.config import InputError
from slimlab.text import presplit, tokenizer_checks
from slimlab.text.corpus import corpus_from, reference_corpus
from slimlab.text.presplit import GPT2_PATTERN, PreSplitter
from slimlab.text.tokenizer import Tokenizer

END = "<|endoftext|>"
SPECIALS = (END, "<|end", "<<", "<<<a")
ODD_TEXTS = [
    "",
    " ",
    "\n\n  \t x  y   ",
    "I'll we've they're don't 'tis 'S it'sn't ''ll 'l 'll",
    "½ ² ٣ ⅷ 12345,678.9 x²+y",
    "世界，你好。人工智能 2024年",
    "Ünïcödé ne\u0301e \u200dA\u200b \ufeffx",
    "🙂👩‍👩‍👧‍👦🇩🇪 🏳️‍🌈",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f\x85\xa0 \u2028\u2029\u3000\u180e.",
    "a\r\nb\r\n\r\n  c",
    "ا لعربية हिन्दी ไทย 한국어 עברית",
    "\U0010ffff\ue000\ufffd",
]
# The characters at which the pattern and the special tokens take decisions.
decisive = st.text(st.sampled_from(" \n\ta'slver<|>endofx1½世.\u0301"), max_size=40)
with_specials = st.lists(
    st.one_of(decisive, st.sampled_from([*SPECIALS, "<|endo", "<", "'ll", "   "])), max_size=6
).map("".join)


@pytest.fixture(scope="module")
def corpus():
    return reference_corpus()


@pytest.fixture(scope="module")
def trained(corpus):
    return Tokenizer.train(corpus.train)


@pytest.fixture(scope="module")
def several(trained):
    return Tokenizer(trained.merges, SPECIALS)


def test_the_vocabulary_is_bytes_then_merges_then_special_tokens(trained):
    assert trained.vocab_size == 256 + 768 + 1
    assert [trained.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    for rank, (left, right) in enumerate(trained.merges):
        joined = trained.token_bytes(left) + trained.token_bytes(right)
        assert trained.token_bytes(256 + rank) == joined
        assert trained.token_id(joined) == 256 + rank
    assert trained.token_id(END) == 1024
    assert trained.token_id(" the") == trained.token_id(b" the")
    assert "1025 ids" in repr(trained)


def test_what_was_encoded_is_decoded_again(trained, corpus):
    for text in [*ODD_TEXTS, *corpus.held_out, END, f"a{END}{END} b"]:
        for allow_special in (True, False):
            assert trained.decode(trained.encode(text, allow_special)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(), st.booleans())
def test_any_text_is_decoded_again(trained, text, allow_special):
    assert trained.decode(trained.encode(text, allow_special)) == text


def test_merges_shorten_the_text(trained, corpus):
    text = "\n\n".join(corpus.held_out)
    # 2.7 to 2.8 bytes a token on Python 3.11 to 3.13.
    assert 2.4 < len(text.encode()) / len(trained.encode(text)) < 3.2


def byte_letters():
    """Map bytes to the letters that GPT-2's files write for them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


@pytest.fixture(scope="module")
def hugging_face(trained):
    tokenizers = pytest.importorskip("tokenizers")
    letters = byte_letters()
    named = ["".join(letters[byte] for byte in trained.token_bytes(i)) for i in range(256 + 768)]
    model = tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(named)},
        merges=[(named[left], named[right]) for left, right in trained.merges],
    )
    other = tokenizers.Tokenizer(model)
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = tokenizers.decoders.ByteLevel()
    other.add_special_tokens([END])
    return other


@pytest.fixture(scope="module")
def open_ai(trained):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "slimlab",
        pat_str=GPT2_PATTERN,
        mergeable_ranks={trained.token_bytes(i): i for i in range(256 + 768)},
        special_tokens={END: 1024},
    )


def test_the_reference_text_is_encoded_as_by_tokenizers_and_tiktoken(
    trained, hugging_face, open_ai, corpus
):
    text = END.join([*corpus.held_out, *corpus.train])
    ids = trained.encode(text)
    assert ids.count(1024) == len(corpus.held_out + corpus.train) - 1
    assert ids == hugging_face.encode(text).ids
    assert ids == open_ai.encode(text, allowed_special="all")
    code = "\n".join(reference_corpus("code").held_out)
    assert trained.encode(code) == hugging_face.encode(code).ids == open_ai.encode(code)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_text_is_encoded_as_by_tokenizers_and_tiktoken(trained, hugging_face, open_ai, text):
    assert trained.encode(text) == hugging_face.encode(text).ids
    assert trained.encode(text) == open_ai.encode(text, allowed_special="all")
    assert trained.encode(text + END, False) == open_ai.encode(text + END, disallowed_special=())


# Characters of Unicode 12 and older: the libraries carry tables of different ages.
@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        with_specials,
        st.text(st.characters(max_codepoint=0x2FFF, categories=["L", "N", "P", "S", "Z", "Cc"])),
    )
)
def test_any_text_is_encoded_as_by_tiktoken(trained, open_ai, text):
    assert trained.encode(text) == open_ai.encode(text, allowed_special="all")


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:])]


@pytest.mark.parametrize("scan_chars", [1, 7, 4096])
def test_a_stream_is_encoded_as_the_whole_wherever_it_is_cut(several, monkeypatch, scan_chars):
    monkeypatch.setattr(presplit, "_MIN_SCAN_CHARS", scan_chars)

    @settings(max_examples=400, deadline=None)
    @given(with_specials, st.lists(st.integers(0, 500), max_size=8), st.booleans())
    def holds(text, places, allow_special):
        whole = several.encode(text, allow_special)
        assert list(several.encode_stream(cut(text, places), allow_special)) == whole
        assert list(several.encode_stream(text, allow_special)) == whole

    holds()


def test_each_cut_of_a_text_of_traps_is_harmless(several, monkeypatch):
    monkeypatch.setattr(presplit, "_MIN_SCAN_CHARS", 1)
    traps = "a'll 'l 've'   \n\n  x<|endoftext|><|end<|endo <<<a<<<< 12½ it's  世界🙂"
    whole = several.encode(traps)
    for first in range(len(traps) + 1):
        for second in range(first, len(traps) + 1):
            pieces = [traps[:first], traps[first:second], traps[second:]]
            assert list(several.encode_stream(pieces)) == whole


def test_a_stream_of_the_real_text_equals_the_whole(trained, corpus):
    text = END.join(corpus.train)
    pieces = [text[at : at + 1000] for at in range(0, len(text), 1000)]
    assert list(trained.encode_stream(pieces)) == trained.encode(text)


def test_a_file_is_encoded_by_lines(trained, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two\nthree" * 50)
    with open(tmp_path / "a.txt") as file:
        assert list(trained.encode_stream(file)) == trained.encode("one\n\n  two\nthree" * 50)


def test_a_stream_is_never_whole_in_memory(trained):
    def pieces():
        for i in range(6_000):
            yield f"{i % 100} lines of text, {END} one after the other\n" * 2

    tracemalloc.start()
    try:
        total = sum(1 for _ in trained.encode_stream(pieces()))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 100_000
    # The stream has 560 kB; held are 4096 characters, their words and the cached ones.
    assert peak_bytes < 400_000


def test_training_on_a_stream_keeps_words_and_not_the_text():
    def texts():
        for i in range(4_000):
            yield f"document {i % 50} of a long stream, with words that come again\n" * 3

    tracemalloc.start()
    try:
        tokenizer = Tokenizer.train(texts(), 40)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(tokenizer.merges) == 40
    # The texts have 700 kB together.
    assert peak_bytes < 400_000


def test_merges_never_cross_special_tokens_or_documents():
    text = f"ab{END}cd" * 50
    tokenizer = Tokenizer.train([text], 50, (END,))
    tokens = {tokenizer.token_bytes(i) for i in range(256, tokenizer.vocab_size - 1)}
    assert tokens == {b"ab", b"cd", b"cdab"}
    end = tokenizer.token_id(END)
    ab, cdab = tokenizer.token_id("ab"), tokenizer.token_id("cdab")
    assert tokenizer.encode(f"ab{END}cdab{END}") == [ab, end, cdab, end]
    assert Tokenizer.train(["ab", "cd"] * 9, 50).merges == ((99, 100), (97, 98))


def test_a_special_token_in_plain_text_can_be_encoded_by_its_letters(several):
    plain = several.encode(f"x {END}", allow_special=False)
    assert several.token_id(END) not in plain
    assert several.decode(plain) == f"x {END}"
    assert several.encode(f"x {END}")[-1] == several.token_id(END)
    # A cached plain word must not hide a special token of the same text, nor the reverse.
    words = Tokenizer([], ("hello",))
    for _ in range(2):
        assert words.encode("hello", allow_special=False) == list(b"hello")
        assert words.encode("hello") == [256]


def test_of_special_tokens_that_begin_alike_the_longer_is_taken(several):
    for text, parts in [("<|endoftext|>", [END]), ("<|end<<", ["<|end", "<<"]), ("<<<a", ["<<<a"])]:
        assert several.encode(text) == [several.token_id(part) for part in parts]
    assert several.encode("<<<") == [several.token_id("<<"), ord("<")]
    assert list(PreSplitter(SPECIALS).split("a<<<a b")) == ["a", "<<<a", " b"]


def test_training_is_the_same_for_a_document_in_one_piece_or_as_a_string(corpus):
    text = corpus.train[0] * 3
    assert Tokenizer.train(text, 20) == Tokenizer.train([text], 20)
    assert hash(Tokenizer.train(text, 20)) == hash(Tokenizer.train([text], 20))
    assert Tokenizer.train(text, 20) != Tokenizer.train([text], 21)


def test_a_long_document_is_counted_as_one(monkeypatch):
    text = "it's 'll   spaces\n\n and words " * 40
    whole = Tokenizer.train([text], 60)
    monkeypatch.setattr("slimlab.text.tokenizer._CHUNK_CHARS", 7)
    monkeypatch.setattr(presplit, "_MIN_SCAN_CHARS", 1)
    assert Tokenizer.train([text], 60) == whole


def test_no_merges_is_a_tokenizer_of_bytes():
    tokenizer = Tokenizer.train(["some text"], num_merges=0, special_tokens=())
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("é<") == [0xC3, 0xA9, ord("<")]


def test_a_small_cache_changes_nothing(trained, corpus, monkeypatch):
    text = corpus.held_out[0]
    monkeypatch.setattr("slimlab.text.tokenizer._CACHED_WORDS", 3)
    assert Tokenizer(trained.merges).encode(text) == trained.encode(text)


def test_threads_can_share_a_tokenizer(trained, corpus, monkeypatch):
    monkeypatch.setattr("slimlab.text.tokenizer._CACHED_WORDS", 50)
    shared, results = Tokenizer(trained.merges), {}
    texts = corpus.train[:8]

    def encode(i):
        results[i] = shared.encode(texts[i])

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(len(texts))] == [trained.encode(text) for text in texts]


def test_bytes_that_are_no_characters_are_shown_as_replacements(trained):
    assert trained.decode([0xE4, 0xB8]) == "\ufffd"
    assert trained.decode_bytes([0xE4, 0xB8]) == b"\xe4\xb8"


def test_ids_may_come_from_lists_arrays_and_tensors(trained):
    ids = trained.encode("some text")
    for sequence in (ids, tuple(ids), iter(ids), np.array(ids), torch.tensor(ids)):
        assert trained.decode(sequence) == "some text"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 1025], "1025 at position 1; vocab_size = 1025"),
        ([-1], "-1 at position 0; vocab_size = 1025"),
        ([1, 2, 3.0], "3.0 at position 2"),
        (["a"], "'a' at position 0"),
        ([None], "None at position 0"),
        (torch.tensor([1.0]), "at position 0"),
        (torch.tensor([[1, 2]]), "2 dimensions"),
        (torch.tensor(5), "0 dimensions"),
        (5, r"decode\(\[id\]\)"),
        ("text", "a str"),
    ],
)
def test_an_id_out_of_range_is_named_with_its_place(trained, ids, message):
    with pytest.raises(InputError, match=message):
        trained.decode(ids)
    with pytest.raises(InputError, match=message):
        trained.decode_bytes(ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(b"bytes"), "a bytes"),
        (lambda t: t.encode(None), "a NoneType"),
        (lambda t: t.encode(["a"]), "a list"),
        (lambda t: t.encode("ab\ud800"), "half a surrogate pair"),
        (lambda t: list(t.encode_stream(["a", b"b"])), "piece 1 of the stream"),
        (lambda t: t.encode_stream(3), "chunks, an iterable of pieces"),
        (lambda t: Tokenizer.train(["a"], True), "num_merges = True"),
        (lambda t: t.token_id("no such token"), "'no such token'; special tokens: <|endoftext|>"),
        (lambda t: t.token_id(3), "3; special"),
        (lambda t: t.token_id("\ud800"), "half a surrogate pair"),
        (lambda t: t.token_bytes(9999), "9999; vocab_size = 1025"),
        (lambda t: Tokenizer.train([]), "no text at all"),
        (lambda t: Tokenizer.train(["", ""]), "no text at all"),
        (lambda t: Tokenizer.train([END, END]), "no text at all"),
        (lambda t: Tokenizer.train(["a", b"b"]), "document 1 as text"),
        (lambda t: Tokenizer.train(b"bytes"), "a bytes"),
        (lambda t: Tokenizer.train(corpus_from(["a"], held_out_fraction=0)), "corpus.train"),
        (lambda t: Tokenizer.train(["a\ud800"]), "half a surrogate pair"),
        (lambda t: Tokenizer.train(["a"], -1), "num_merges = -1"),
        (lambda t: Tokenizer.train(["a"], 2.0), "num_merges = 2.0"),
        (lambda t: Tokenizer.train(["a"], 2, END), "in a tuple"),
        (lambda t: Tokenizer.train(["a"], 2, (END, END)), "more than once"),
        (lambda t: Tokenizer.train(["a"], 2, ("",)), "''"),
        (lambda t: Tokenizer.train(["a"], 2, (b"<s>",)), "b'<s>'"),
        (lambda t: Tokenizer([(97, 256)]), "only ids below 256"),
    ],
)
def test_bad_input_is_named(trained, call, message):
    with pytest.raises(InputError, match=message):
        call(trained)


def test_a_saved_tokenizer_is_loaded_equal(several, tmp_path):
    path = tmp_path / "tokenizer.json"
    several.save(path)
    loaded = Tokenizer.load(str(path))
    assert loaded == several
    assert loaded.encode(f"the text{END}<<") == several.encode(f"the text{END}<<")
    assert json.loads(path.read_text())["version"] == 1
    unusual = Tokenizer([], ("🙂", '"\\', "\n", "世界"))
    unusual.save(path)
    assert Tokenizer.load(path) == unusual
    assert os.listdir(tmp_path) == ["tokenizer.json"]


def test_every_cut_of_the_file_is_refused(several, tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(several.merges[:20], SPECIALS).save(path)
    data = path.read_bytes().rstrip()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="no complete JSON"):
            Tokenizer.load(path)


GOOD = {
    "format": tokenizer_checks.FORMAT,
    "version": 1,
    "pattern": GPT2_PATTERN,
    "merges": [[97, 98], [256, 99]],
    "special_tokens": [END],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"format": ["x"] * 10**5}, "format"),
        ({"version": 2}, "version 2"),
        ({"version": True}, "version True"),
        ({"pattern": "(a+)+b"}, "pattern"),
        ({"merges": None}, 'a list under "merges"'),
        ({"merges": {"0": [1, 2]}}, 'a list under "merges"'),
        ({"merges": [[97, 98], [256, 258]]}, "merge 1 is .256, 258., and only ids below 257"),
        ({"merges": [[97, -1]]}, "only ids below 256"),
        ({"merges": [[97, 98.0]]}, "merge 0 is"),
        ({"merges": [[97, True]]}, "merge 0 is"),
        ({"merges": [[97, 98, 99]]}, "merge 0 is"),
        ({"merges": ["ab"]}, "merge 0 is 'ab'"),
        ({"merges": [7]}, "merge 0 is 7"),
        ({"merges": [[97, 10**400]]}, "merge 0 is"),
        ({"merges": [[97, 98], [97, 98]]}, "makes a token a second time"),
        ({"merges": [[97, 98], [98, 99], [256, 99], [97, 257]]}, "merge 3 .* a second time"),
        ({"merges": [[97, 97], *([i, i] for i in range(256, 300))]}, "bytes together"),
        ({"special_tokens": "x"}, 'a list under "special_tokens"'),
        ({"special_tokens": [1]}, "given: .*: 1"),
        ({"special_tokens": [["x"]]}, "'x'"),
        ({"special_tokens": [""]}, "''"),
        ({"special_tokens": ["\ud800"]}, "whole characters"),
        ({"special_tokens": ["x", "x"]}, "more than once"),
        ({"special_tokens": ["x" * 10**6]}, "at most 200 characters"),
        ({"special_tokens": [str(i) for i in range(10**5)]}, "at most 1000 special tokens"),
    ],
)
def test_a_hostile_file_is_refused_with_its_name(tmp_path, changes, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(GOOD))
    assert Tokenizer.load(path).vocab_size == 259
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(path)
    assert "tokenizer.json" in caught.value.given or "version" in caught.value.asked
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04K\x01.", b"PK\x03\x04", b"[]", b"3", b"null", b"[" * 10**5, b'"x"', b"{}"],
)
def test_a_foreign_file_is_refused(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_each_missing_key_is_refused(tmp_path):
    for key in GOOD:
        (tmp_path / "t.json").write_text(json.dumps({k: v for k, v in GOOD.items() if k != key}))
        with pytest.raises(InputError, match=key):
            Tokenizer.load(tmp_path / "t.json")


def test_a_missing_file_a_folder_and_a_giant_are_refused(tmp_path, monkeypatch):
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(InputError, match=r"No such file|Is a directory"):
            Tokenizer.load(path)
    (tmp_path / "t.json").write_text(json.dumps(GOOD))
    monkeypatch.setattr(tokenizer_checks, "MAX_FILE_BYTES", 100)
    with pytest.raises(InputError, match="bytes"):
        Tokenizer.load(tmp_path / "t.json")


def test_saving_into_a_folder_that_does_not_exist_is_refused(several, tmp_path):
    with pytest.raises(InputError, match="a file that can be written"):
        several.save(tmp_path / "no_such_folder" / "t.json")
