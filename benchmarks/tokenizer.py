"""Our tokenizer, in Python, beside Hugging Face's `tokenizers`, in Rust, on the reference text.

    python -m benchmarks.tokenizer --rounds 15

Training: 768 merges by default; each learns its own, which part at the first tie. Encoding and
decoding, document by document: both under our merges, and the ids are compared before the clock
starts. "encode" is by a tokenizer that has encoded this text before, "encode, new" by one that has
seen no text: both keep a cache. `tokenizers` is called by its fastest way to ids,
encode_batch_fast, which leaves out the offsets of the tokens that encode computes.

It becomes slower as the memory of its process is scattered, by other tokenizers for instance (by
half after six of them), so each task has a process of its own, and "encode, new" one per round.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from benchmarks.common import (
    Comparison,
    Prepare,
    compare,
    environment,
    parser,
    refuse_without,
    report,
)
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


def train(corpus: Corpus, num_merges: int) -> dict[str, Prepare]:
    """Learn `num_merges` merges from the training part of `corpus`."""
    return {
        OURS: lambda: lambda: _discard(Tokenizer.train(corpus.train, num_merges)),
        THEIRS: lambda: lambda: _discard(their_trained(corpus.train, num_merges)),
    }


class Pair:
    """Both tokenizers under the same merges, and all documents of a corpus with their ids.

    corpus      whose documents are encoded, and whose training part is learned from
    num_merges  to learn

    Raises InputError if the two do not give the same ids and the same text.
    """

    def __init__(self, corpus: Corpus, num_merges: int):
        self.documents = [*corpus.train, *corpus.held_out]
        self.ours = Tokenizer.train(corpus.train, num_merges)
        self.theirs = their_copy(self.ours)
        self.ids = _our_ids(self.ours, self.documents)
        same = self.ids == _their_ids(self.theirs, self.documents)
        texts = _our_texts(self.ours, self.ids), self.theirs.decode_batch(self.ids)
        require(
            same and texts == (self.documents, self.documents),
            "the same ids and the same text from both",
            "different ones",
            "look for the first difference before any time is compared",
        )


def encode(corpus: Corpus, num_merges: int) -> dict[str, Prepare]:
    """Encode the documents of `corpus` under `num_merges` merges, not for the first time."""
    pair = Pair(corpus, num_merges)
    return {
        OURS: lambda: lambda: _discard(_our_ids(pair.ours, pair.documents)),
        THEIRS: lambda: lambda: _discard(_their_ids(pair.theirs, pair.documents)),
    }


def encode_new(corpus: Corpus, num_merges: int) -> dict[str, Prepare]:
    """Encode the documents of `corpus` under `num_merges` merges, each time for the first time."""
    pair = Pair(corpus, num_merges)

    def new_ours() -> Callable[[], None]:
        fresh = Tokenizer(pair.ours.merges, pair.ours.special_tokens)
        return lambda: _discard(_our_ids(fresh, pair.documents))

    def new_theirs() -> Callable[[], None]:
        fresh = their_copy(pair.ours)
        return lambda: _discard(_their_ids(fresh, pair.documents))

    return {OURS: new_ours, THEIRS: new_theirs}


def decode(corpus: Corpus, num_merges: int) -> dict[str, Prepare]:
    """Decode the documents of `corpus`, encoded under `num_merges` merges."""
    pair = Pair(corpus, num_merges)
    return {
        OURS: lambda: lambda: _discard(_our_texts(pair.ours, pair.ids)),
        THEIRS: lambda: lambda: _discard(pair.theirs.decode_batch(pair.ids)),
    }


TASKS = {"train": train, "encode": encode, "encode, new": encode_new, "decode": decode}


def in_new_process(task: str, given: argparse.Namespace, rounds: int) -> Comparison:
    """Measure a task in a process of its own.

    task    a key of TASKS
    given   the options of this program
    rounds  of measurement there
    """
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--json", "--task", task]
    command += ["--rounds", str(rounds)]
    for name in ("threads", "clock", "merges", "kind"):
        command += [f"--{name}", str(getattr(given, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    (row,) = json.loads(done.stdout)["results"]
    return Comparison(task, OURS, THEIRS, tuple(row["ours_s"]), tuple(row["theirs_s"]))


def measure(task: str, given: argparse.Namespace) -> Comparison:
    """Measure a task in a new process, or in one per round where only the first time counts.

    task   a key of TASKS
    given  the options of this program
    """
    if TASKS[task] is not encode_new:
        return in_new_process(task, given, given.rounds)
    parts = [in_new_process(task, given, 1) for _ in range(given.rounds)]
    ours_s, theirs_s = (
        tuple(seconds for part in parts for seconds in getattr(part, key))
        for key in ("ours_s", "theirs_s")
    )
    return Comparison(task, OURS, THEIRS, ours_s, theirs_s)


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
    options.add_argument("--task", choices=TASKS, help="one task alone (default all)")
    given = options.parse_args(arguments)
    # Read when the first thread pool is made; ours has one thread in any case.
    os.environ["RAYON_NUM_THREADS"] = str(given.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if given.threads > 1 else "false"
    refuse_without("tokenizers")
    import tokenizers

    where = environment(given)
    corpus = reference_corpus(given.kind)
    if given.task:
        rivals = TASKS[given.task](corpus, given.merges)
        comparisons = compare(given.task, rivals, given.rounds, clock=given.clock)
    else:
        comparisons = [measure(task, given) for task in TASKS]
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
