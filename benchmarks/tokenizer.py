"""Our tokenizer, in Python, beside Hugging Face's `tokenizers`, in Rust, on the reference text.

    python -m benchmarks.tokenizer --rounds 15

Training: 768 merges by default; each learns its own, which part at the first tie. Encoding and
decoding, document by document: both under our merges, and the ids are compared before the clock
starts. "new" is a tokenizer that has seen no text, "again" one that has encoded this text before:
both keep a cache. `tokenizers` is called by its fastest way to ids, encode_batch_fast, which leaves
out the offsets of the tokens that encode computes.
"""

import os
from collections.abc import Callable, Sequence

from benchmarks.common import Comparison, compare, environment, parser, refuse_without, report
from slimlab.config import require
from slimlab.text.corpus import Corpus, reference_corpus
from slimlab.text.tokenizer import Tokenizer

OURS, THEIRS = "slimlab", "tokenizers"
END = "<|endoftext|>"


def byte_letters() -> dict[int, str]:
    """Return byte -> the letter that GPT-2's files, and `tokenizers`, write for it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def their_trained(documents: Sequence[str], num_merges: int):
    """Train a tokenizer of `tokenizers` on `documents`, as ours is: bytes, then `num_merges`."""
    import tokenizers

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + num_merges + 1,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator(documents, trainer)
    return theirs


def their_copy(ours: Tokenizer):
    """Make a tokenizer of `tokenizers` with the merges of `ours`."""
    import tokenizers

    letters = byte_letters()
    num_plain = 256 + len(ours.merges)
    names = ["".join(letters[byte] for byte in ours.token_bytes(i)) for i in range(num_plain)]
    model = tokenizers.models.BPE(
        vocab={name: i for i, name in enumerate(names)},
        merges=[(names[left], names[right]) for left, right in ours.merges],
    )
    theirs = tokenizers.Tokenizer(model)
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.add_special_tokens([END])
    return theirs


def compare_training(corpus: Corpus, num_merges: int, rounds: int, clock: str) -> list[Comparison]:
    """Time both trainings on corpus.train.

    corpus, num_merges  what is learned from, and how much
    rounds, clock       as in common.take_turns
    """
    rivals = {
        OURS: lambda: lambda: _discard(Tokenizer.train(corpus.train, num_merges)),
        THEIRS: lambda: lambda: _discard(their_trained(corpus.train, num_merges)),
    }
    return compare("train", rivals, rounds, clock=clock)


def compare_encoding(corpus: Corpus, num_merges: int, rounds: int, clock: str) -> list[Comparison]:
    """Time encoding and decoding of all documents under the same merges.

    corpus, num_merges  what the merges are learned from, and how many
    rounds, clock       as in common.take_turns
    """
    documents = [*corpus.train, *corpus.held_out]
    ours = Tokenizer.train(corpus.train, num_merges)
    theirs = their_copy(ours)
    ids = _our_ids(ours, documents)
    same = ids == _their_ids(theirs, documents)
    require(
        same and _our_texts(ours, ids) == theirs.decode_batch(ids) == documents,
        "the same ids and the same text from both",
        "different ones",
        "look for the first difference before any time is compared",
    )

    def new_ours() -> Callable[[], None]:
        fresh = Tokenizer(ours.merges, ours.special_tokens)
        return lambda: _discard(_our_ids(fresh, documents))

    def new_theirs() -> Callable[[], None]:
        fresh = their_copy(ours)
        return lambda: _discard(_their_ids(fresh, documents))

    again = {
        OURS: lambda: lambda: _discard(_our_ids(ours, documents)),
        THEIRS: lambda: lambda: _discard(_their_ids(theirs, documents)),
    }
    back = {
        OURS: lambda: lambda: _discard(_our_texts(ours, ids)),
        THEIRS: lambda: lambda: _discard(theirs.decode_batch(ids)),
    }
    return [
        *compare("encode, new", {OURS: new_ours, THEIRS: new_theirs}, rounds, clock=clock),
        *compare("encode, again", again, rounds, clock=clock),
        *compare("decode", back, rounds, clock=clock),
    ]


def _our_ids(tokenizer: Tokenizer, documents: Sequence[str]) -> list[list[int]]:
    return [tokenizer.encode(document) for document in documents]


def _their_ids(tokenizer, documents: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(documents)]


def _our_texts(tokenizer: Tokenizer, ids: Sequence[list[int]]) -> list[str]:
    return [tokenizer.decode(some) for some in ids]


def _discard(result: object) -> None:
    """Let a result go: what a timed function returns would be taken for times of its parts."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark with command line `arguments`."""
    options = parser(__doc__.splitlines()[0], rounds=15)
    options.add_argument("--merges", type=int, default=768, help="merges (default 768)")
    options.add_argument("--kind", default="english", help="english (default) or code")
    given = options.parse_args(arguments)
    # Read when the first thread pool is made; ours has one thread in any case.
    os.environ["RAYON_NUM_THREADS"] = str(given.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if given.threads > 1 else "false"
    refuse_without("tokenizers")
    import tokenizers

    where = environment(given)
    corpus = reference_corpus(given.kind)
    comparisons = [
        *compare_training(corpus, given.merges, given.rounds, given.clock),
        *compare_encoding(corpus, given.merges, given.rounds, given.clock),
    ]
    settings = {
        "corpus": corpus.name,
        "bytes": corpus.train_bytes + corpus.held_out_bytes,
        "train_bytes": corpus.train_bytes,
        "fingerprint": corpus.fingerprint,
        "merges": given.merges,
        "tokenizers": tokenizers.__version__,
    }
    report("tokenizer", settings, where, comparisons, given.json)


if __name__ == "__main__":
    main()
