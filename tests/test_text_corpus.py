"""The corpus: deterministic, without near-equal paragraphs, split so that the parts share none."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimlab.config import InputError
from slimlab.text import corpus as corpus_module
from slimlab.text.corpus import Corpus, corpus_from, reference_corpus
from slimlab.text.dedup import near_duplicates, split_paragraphs

topics = pytest.importorskip("pydoc_data.topics").topics


@pytest.fixture(scope="module")
def english():
    return reference_corpus()


def paragraphs_of(documents):
    return [paragraph for text in documents for paragraph in split_paragraphs(text)]


def test_english_is_pythons_reference_in_the_expected_size(english):
    assert english.name == "english"
    # 373 to 414 kB on Python 3.11 to 3.13.
    assert 300_000 < english.train_bytes + english.held_out_bytes < 500_000
    assert 0.08 < english.held_out_bytes / (english.train_bytes + english.held_out_bytes) <= 0.1
    originals = set(paragraphs_of(topics.values()))
    assert set(paragraphs_of(english.train + english.held_out)) <= originals
    assert english.train_bytes == len("".join(english.train).encode())


def test_near_equal_paragraphs_are_gone_and_the_parts_share_none(english):
    train, held_out = paragraphs_of(english.train), paragraphs_of(english.held_out)
    assert near_duplicates(train + held_out) == []
    assert not set(train) & set(held_out)
    dropped = len(paragraphs_of(topics.values())) - len(train) - len(held_out)
    assert dropped > 300


def test_each_document_is_one_topic_in_the_order_of_their_names(english):
    in_order = [set(split_paragraphs(topics[name])) for name in sorted(topics)]
    for part in (english.train, english.held_out):
        at = -1
        for text in part:
            paragraphs = set(split_paragraphs(text))
            later = range(at + 1, len(in_order))
            at = next((i for i in later if paragraphs <= in_order[i]), None)
            assert at is not None, text[:60]


def test_code_is_the_standard_librarys_source():
    code = reference_corpus("code", held_out_fraction=0.2)
    total_bytes = code.train_bytes + code.held_out_bytes
    assert 700_000 < total_bytes < 1_000_000
    assert 0.15 < code.held_out_bytes / total_bytes <= 0.2
    assert any("class ArgumentParser" in text for text in code.train + code.held_out)
    assert not set(paragraphs_of(code.train)) & set(paragraphs_of(code.held_out))


def test_another_process_with_another_hash_seed_builds_the_same(english):
    program = "from slimlab.text.corpus import reference_corpus as r; print(r().describe())"
    root = Path(__file__).parents[1]
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == english.describe()


def test_describe_names_sizes_fingerprint_and_python(english):
    described = english.describe()
    for part in (
        f"{len(english.train)} documents, {english.train_bytes:,} bytes",
        f"{len(english.held_out)} documents, {english.held_out_bytes:,} bytes held out",
        english.fingerprint,
        f"Python {sys.version_info.major}.{sys.version_info.minor}.",
    ):
        assert part in described
    assert Corpus("x", ("Grüße",), (), "0").train_bytes == 7


def documents(number, words=8):
    return [
        f"Document {i} starts.\n\n" + " ".join(f"{i}word{j}" for j in range(words))
        for i in range(number)
    ]


def test_the_fingerprint_changes_with_every_character_and_with_the_split():
    base = corpus_from(documents(20)).fingerprint
    changed = documents(20)
    changed[3] = changed[3].replace("3word5", "3word6")
    assert base == corpus_from(iter(documents(20)), name="other").fingerprint
    assert base != corpus_from(changed).fingerprint
    assert base != corpus_from(documents(20), held_out_fraction=0).fingerprint
    assert len(base) == 12
    assert int(base, 16) >= 0


def test_the_choice_of_a_document_depends_on_its_own_text():
    # All of one size, so the first 3 of 30 in the order of their hashes are taken.
    texts = [f"text number {i:02}" for i in range(30)]
    by_hash = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    corpus = corpus_from(texts[::-1])
    assert set(corpus.held_out) == set(by_hash[:3])
    assert corpus.train == tuple(text for text in texts[::-1] if text not in by_hash[:3])


def test_duplicates_across_documents_go_before_the_split():
    texts = documents(30)
    doubled = corpus_from([*texts, *reversed(texts)])
    assert doubled == corpus_from(texts)


def test_nothing_is_held_out_if_nothing_is_asked_for():
    corpus = corpus_from(["only one paragraph"], held_out_fraction=0)
    assert corpus.train == ("only one paragraph",)
    assert corpus.held_out == ()
    assert corpus.held_out_bytes == 0


def test_of_one_long_document_the_end_is_held_out():
    text = "\n\n".join(f"paragraph {i:02} {'abcdefghij'[i % 10] * 80}" for i in range(50))
    corpus = corpus_from([text])
    assert "\n\n".join(corpus.train + corpus.held_out) == text
    assert len(corpus.train) == len(corpus.held_out) == 1
    # As many paragraphs of 2 % each as reach 10 % without the lines between them.
    assert 0.1 <= corpus.held_out_bytes / len(text) < 0.13
    two = corpus_from([text, text.upper().replace("PARAGRAPH", "another")])
    assert len(two.train) == 2
    assert 0.09 <= two.held_out_bytes / (2 * len(text)) < 0.11


def test_a_path_is_read_and_gives_the_name(tmp_path):
    for i, text in enumerate(documents(12)):
        (tmp_path / f"{i:02}.txt").write_text(text)
    corpus = corpus_from(tmp_path)
    assert corpus.name == tmp_path.name
    assert sorted(corpus.train + corpus.held_out) == sorted(documents(12))
    assert corpus_from(str(tmp_path), name="mine").name == "mine"


def test_max_bytes_takes_the_beginning_up_to_a_line_end():
    def endless():
        for i in range(10**9):
            yield f"first line {i}\nsecond line {i}\nthird line {i}\n"

    corpus = corpus_from(endless(), held_out_fraction=0, max_bytes=70)
    assert corpus.train == (
        "first line 0\nsecond line 0\nthird line 0",
        "first line 1\nsecond line 1",
    )
    one_line = corpus_from(["世" * 50], held_out_fraction=0, max_bytes=10)
    assert one_line.train == ("世" * 3,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference_corpus("french"), "kind = 'french'"),
        (lambda: reference_corpus(held_out_fraction=1), "held_out_fraction = 1"),
        (lambda: reference_corpus(held_out_fraction=-0.1), "held_out_fraction = -0.1"),
        (lambda: reference_corpus(held_out_fraction="10%"), "held_out_fraction = '10%'"),
        (lambda: corpus_from([]), "none with text"),
        (lambda: corpus_from(["", " \n\n "]), "none with text"),
        (lambda: corpus_from(["one paragraph"]), "held_out_fraction=0"),
        (lambda: corpus_from("A text. Not a path."), r"put it in a list"),
        (lambda: corpus_from("text " * 5000), r"put it in a list"),
        (lambda: corpus_from(["a", b"b"]), "document 1 is a bytes"),
        (lambda: corpus_from([{"text": "a"}]), "document 0 is a dict"),
        (lambda: corpus_from({"text": "a"}), "a dict"),
        (lambda: corpus_from(3), "an? int"),
        (lambda: corpus_from(["a\ud800"]), "half a surrogate pair at character 1"),
        (lambda: corpus_from(["a"], max_bytes=0), "max_bytes = 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_an_empty_file_is_an_empty_corpus(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=r"empty\.txt: 0 documents, none with text"):
        corpus_from(tmp_path / "empty.txt")


def test_too_much_text_is_refused_on_the_way(monkeypatch):
    monkeypatch.setattr(corpus_module, "MAX_CORPUS_BYTES", 100)

    def endless():
        while True:
            yield "x" * 30

    with pytest.raises(InputError, match="120 bytes after 4 documents"):
        corpus_from(endless())


def test_a_python_without_the_text_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="libpython3-stdlib"):
        reference_corpus()
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(InputError, match="installation without that text"):
        reference_corpus("code")
