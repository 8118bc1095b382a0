"""The yardsticks beside a language model's loss, in bits per byte of one held-out text.

Chapter 05 shows them: a reader who sees 1.7 bits per byte learns from them what that is worth.

Production differs: held-out text comes from many sources, each with a number of its own, and the
comparison is with earlier models, not with compressors.
"""

from collections.abc import Iterable, Sequence

from slimlab.config import require
from slimlab.text.compress import compression_bits_per_byte
from slimlab.text.corpus import Corpus
from slimlab.text.ngram import NGram
from slimlab.text.tokenizer import Tokenizer


def encode_documents(
    tokenizer: Tokenizer, documents: Iterable[str], end_token: str = "<|endoftext|>"
) -> list[int]:
    """Turn documents into one sequence of ids, each document followed by the end token.

    tokenizer  a Tokenizer that knows the end token
    documents  texts, such as corpus.train; a special token in them is encoded as letters
    end_token  the special token that ends a document
    returns    ids for training or for a measurement

    Raises InputError as `Tokenizer.encode` does, or without that special token.
    """
    end_id = tokenizer.token_id(end_token)
    return [
        token_id
        for document in documents
        for token_id in (*tokenizer.encode(document, allow_special=False), end_id)
    ]


def baseline_bits_per_byte(
    corpus: Corpus, tokenizer: Tokenizer, orders: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Measure the held-out text of a corpus by compressors and n-gram models.

    corpus     a Corpus with held-out text
    tokenizer  the one whose tokens the n-gram models count; train it on corpus.train
    orders     orders of the n-gram models
    returns    name -> bits per byte of the held-out text: "gzip", "xz", "xz primed" (which has
               read the training text), then "unigram", "5-gram" and so on, trained on corpus.train

    All are divided by the same bytes, corpus.held_out_bytes. The n-gram models also pay for the end
    of each document, which is no byte of it, as a language model does.

    Raises InputError if nothing was held out, or an order is not at least 1.
    """
    require(
        bool(corpus.held_out),
        "a corpus with held-out text",
        f"{corpus.name}: none was held out",
        "build it with held_out_fraction=0.1",
    )
    bits = {
        "gzip": compression_bits_per_byte(corpus.held_out, "gzip"),
        "xz": compression_bits_per_byte(corpus.held_out, "xz"),
        "xz primed": compression_bits_per_byte(corpus.held_out, "xz", primer=corpus.train),
    }
    train, held_out = (
        encode_documents(tokenizer, part) for part in (corpus.train, corpus.held_out)
    )
    for order in orders:
        name = "unigram" if order == 1 else f"{order}-gram"
        model = NGram(train, tokenizer.vocab_size, order)
        bits[name] = model.bits_per_byte(held_out, corpus.held_out_bytes)
    return bits
