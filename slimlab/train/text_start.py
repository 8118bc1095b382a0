"""The beginning of a run on a text: its vocabulary, its ids, the first weights.

slimlab.train.text_model trains in one process from here, slimlab.parallel.hybrid_text on a mesh.
Production makes tokenizer and ids once, for many runs, and draws the weights on the ranks.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import InputError, ModelConfig, TrainingConfig, require
from slimlab.model.build import build_model
from slimlab.model.initialise import initialise
from slimlab.text.batches import text_ids
from slimlab.text.corpus import Corpus
from slimlab.text.progress import progress
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.checkpoint_folder import SMALLER, checkpoints_in
from slimlab.train.device import choose_device

END_OF_TEXT = "<|endoftext|>"


def prepare_text(
    corpus: Corpus,
    folder: Path | None,
    config: TrainingConfig,
    vocab_size: int,
    sizes: dict,
    show: bool,
) -> tuple[Tokenizer, Tensor]:
    """Learn the vocabulary of a run, or take that of the run that its folder holds.

    corpus, folder, config, vocab_size, sizes, show  as in train_on_text
    returns  the tokenizer, which lies in the folder too, and the ids of the training text

    Raises InputError for what is known to be wrong before anything is learned or written.
    """
    _check_before_work(config, vocab_size, sizes)
    tokenizer = _tokenizer_for(corpus, folder, vocab_size - 257, show)
    ids = text_ids(encode_documents(tokenizer, corpus.train), config.seq_len)
    if folder is not None:
        _keep(tokenizer, folder)
    return tokenizer, ids


def first_model(
    tokenizer: Tokenizer, config: TrainingConfig, sizes: dict, residual: str
) -> nn.Module:
    """Make the model of a run, with its first weights.

    tokenizer  gives vocab_size
    config     gives seq_len and the seed
    sizes, residual  as in train_on_text
    """
    model_config = ModelConfig(vocab_size=tokenizer.vocab_size, seq_len=config.seq_len, **sizes)
    with torch.random.fork_rng(devices=[]):
        return initialise(build_model(model_config), residual=residual, seed=config.seed)


def notes_of(corpus: Corpus, vocab_size: int, residual: str) -> dict:
    """Return what a run's checkpoints say besides: they are refused where it differs.

    corpus, vocab_size, residual  as in train_on_text
    """
    return {"text": corpus.fingerprint, "vocab_size": vocab_size, "residual": residual}


def _check_before_work(config: TrainingConfig, vocab_size: int, sizes: dict) -> None:
    """What is known to be wrong before the merges are learned, and nothing is written."""
    require(
        type(vocab_size) is int and vocab_size > 256,
        "vocab_size of at least 257: 256 bytes and a token that ends a text",
        f"vocab_size = {vocab_size!r}",
        "take 1024",
    )
    choose_device(config.device)
    with torch.device("meta"):  # shapes without numbers
        build_model(ModelConfig(vocab_size=vocab_size, seq_len=config.seq_len, **sizes))


def _tokenizer_for(corpus: Corpus, folder: Path | None, num_merges: int, show: bool) -> Tokenizer:
    path = folder / "tokenizer.json" if folder is not None else None
    smaller = [name for name in SMALLER if folder is not None and (folder / name).exists()]
    asked, given = "a folder of a run, or a new one", f"{folder}, a smaller model: {smaller}"
    require(not smaller, asked, given, "choose another folder")
    there = Tokenizer.load(path) if path is not None and path.exists() else None
    # Beside a checkpoint lies the tokenizer of its ids; train refuses if it is of another text.
    if there is not None and checkpoints_in(folder):
        return there
    bar = progress if show else None
    tokenizer = Tokenizer.train(corpus.train, num_merges, (END_OF_TEXT,), bar)
    require(
        there in (None, tokenizer),
        "a folder without a tokenizer, or with that of this text",
        f"{path}, of another text or vocabulary",
        "choose another folder",
    )
    return tokenizer


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    path = folder / "tokenizer.json"
    if path.exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        given = f"{folder}: {error.strerror}"
        raise InputError("a folder for the run", given, "choose another folder") from error
    tokenizer.save(path)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Tensor:
    """Encode documents into one sequence, with the token that ends a text before and after each.

    tokenizer  has the special token "<|endoftext|>"
    documents  texts; a special token spelled out in one is encoded as the letters that it is
    returns    (N,) int64; every token of a document, and its end, has something to be predicted
               from
    """
    end_id = tokenizer.token_id(END_OF_TEXT)
    ids = [end_id]
    for text in documents:
        ids += [*tokenizer.encode(text, allow_special=False), end_id]
    return torch.tensor(ids)
