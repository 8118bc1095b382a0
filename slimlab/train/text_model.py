"""From a text to a trained model in a folder, and from the folder back to a model that writes.

    runs/mine/tokenizer.json   merges learned from the text
              history.jsonl    a record per step
              step_00000600/   a checkpoint

`slimlab train` and `slimlab generate` are these two functions; chapter 05 uses them.
Production keeps tokenizing and training apart: the ids of a corpus are made once, for many runs.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from slimlab.config import InputError, ModelConfig, TrainingConfig, require
from slimlab.model.build import build_model
from slimlab.model.generation import generate
from slimlab.model.pretrained import from_pretrained
from slimlab.model.transformer import device_of
from slimlab.text.corpus import Corpus
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.checkpoint import load_checkpoint
from slimlab.train.checkpoint_folder import find_checkpoint, read_json
from slimlab.train.device import choose_device
from slimlab.train.history import History
from slimlab.train.loop import train
from slimlab.train.metrics import held_out_loss
from slimlab.train.objectives import bits_per_byte
from slimlab.train.text_start import (
    END_OF_TEXT,
    encode_documents,
    first_model,
    notes_of,
    prepare_text,
)


@dataclass(frozen=True)
class TextModel:
    """A model and the tokenizer that it was trained with.

    model          a Decoder
    tokenizer      its vocabulary is the model's
    source         where both come from
    history        of the training, if it was now
    bits_per_byte  on the held-out text, if it was measured
    """

    model: nn.Module = field(repr=False)
    tokenizer: Tokenizer
    source: str
    history: History = field(default_factory=History, repr=False)
    bits_per_byte: float | None = None


def train_on_text(
    corpus: Corpus,
    folder: str | os.PathLike | None,
    config: TrainingConfig,
    *,
    vocab_size: int,
    sizes: dict,
    residual: str = "scaled",
    resume: bool = True,
    new_settings: bool = False,
    show: bool = True,
    say: Callable[[str], None] = print,
    watch: Callable[[dict], None] | None = None,
) -> TextModel:
    """Learn a vocabulary from a corpus and train a decoder on it; or go on with that.

    corpus      documents to train on and to measure by
    folder      of the run; what it holds must be the same run. None: nothing is written
    config      a TrainingConfig; its seed also draws the first weights
    vocab_size  tokens at most; a small text has fewer pairs to merge
    sizes       d_model, num_layers and what else ModelConfig takes, but vocab_size
    residual    as in slimlab.model.initialise
    resume, new_settings, show, say, watch  as in slimlab.train.loop.train
    returns     a TextModel with bits per byte of the held-out text

    Raises InputError as train does, and for another corpus or vocabulary than the folder's.
    """
    folder = Path(folder) if folder is not None else None
    tokenizer, ids = prepare_text(corpus, folder, config, vocab_size, sizes, show)
    model = first_model(tokenizer, config, sizes, residual)
    history = train(
        model,
        ids,
        config,
        held_out=encode_documents(tokenizer, corpus.held_out) if corpus.held_out else None,
        run_folder=folder,
        resume=resume,
        new_settings=new_settings,
        notes=notes_of(corpus, vocab_size, residual),
        show=show,
        say=say,
        watch=watch,
    )
    measured = held_out_bits_per_byte(model, tokenizer, corpus) if corpus.held_out else None
    return TextModel(model, tokenizer, str(folder or "memory"), history, measured)


def held_out_bits_per_byte(model: nn.Module, tokenizer: Tokenizer, corpus: Corpus) -> float:
    """Measure the bits that the model needs for a byte of the held-out documents, ends included.

    model      a Decoder, trained on encode_documents
    tokenizer  its own
    corpus     with held-out documents
    returns    bits per byte
    """
    ids = encode_documents(tokenizer, corpus.held_out)
    loss = held_out_loss(model, ids, model.config.seq_len, batch_size=16)
    return bits_per_byte(loss * (len(ids) - 1), corpus.held_out_bytes)


def load_text_model(path: str | os.PathLike, device: str | torch.device = "auto") -> TextModel:
    """Load a model and its tokenizer from where `train_on_text` or `save_pretrained` put them.

    path     the folder of a run, of which the newest whole checkpoint is taken; one checkpoint; or
             a folder in the form of `transformers`. A tokenizer.json of this book lies in it, or,
             for a checkpoint, beside it
    device   "auto", or PyTorch's name of one
    returns  a TextModel in evaluation mode

    Raises InputError that says what is missing, damaged or does not fit.
    """
    path = Path(path)
    config = path / "config.json"
    if config.is_file() and "model_type" in read_json(config):
        model, source = from_pretrained(path), path
    else:
        source = find_checkpoint(path)
        model = _model_of(source)
    tokenizer = Tokenizer.load(_tokenizer_beside(source))
    require(
        tokenizer.vocab_size == model.config.vocab_size,
        f"a tokenizer of {model.config.vocab_size} tokens, as many as the model has",
        f"{source}: one of {tokenizer.vocab_size}",
        "put the tokenizer.json beside it with which it was trained",
    )
    return TextModel(model.to(choose_device(device)).eval(), tokenizer, str(source))


def _model_of(checkpoint: Path) -> nn.Module:
    stored = read_json(checkpoint / "config.json").get("model")
    try:
        config = ModelConfig(**stored)
    except TypeError as error:
        raise InputError(
            "the configuration of a model of this book",
            f"{checkpoint / 'config.json'}: {error}",
            "load it with the version of slimlab that wrote it (state.json says which), or into a "
            "model of your own: slimlab.train.checkpoint.load_checkpoint(path, model)",
        ) from error
    with torch.random.fork_rng(devices=[]):
        model = build_model(config)
    load_checkpoint(checkpoint, model)
    return model


def _tokenizer_beside(source: Path) -> Path:
    places = (source, source.resolve().parent)
    found = next(
        (one / "tokenizer.json" for one in places if (one / "tokenizer.json").exists()), None
    )
    require(
        found is not None,
        "a tokenizer.json of this book in the folder of the weights, or beside a checkpoint",
        f"none in {places[0]}, nor in {places[1]}",
        "copy the one of the run that trained the model: tokenizer.save(path) writes it",
    )
    return found


def continue_text(
    trained: TextModel,
    prompt: str,
    max_new_tokens: int = 100,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> str:
    """Let a model continue a text until it ends it or has written enough.

    trained         as load_text_model returns it
    prompt          the beginning; of an empty one the model begins a text of its own
    max_new_tokens  tokens to add at most
    temperature, top_k, top_p, seed  as in slimlab.model.generation.generate
    returns         prompt and continuation

    Raises InputError as generate does.
    """
    tokenizer = trained.tokenizer
    ends = END_OF_TEXT in tokenizer.special_tokens
    stop_id = tokenizer.token_id(END_OF_TEXT) if ends else None
    ids = tokenizer.encode(prompt, allow_special=False)
    require(
        bool(ids) or ends,
        "a prompt of at least one token, since this tokenizer has none that begins a text",
        "an empty prompt",
        'give prompt="The"',
    )
    begun = torch.tensor([ids or [stop_id]], device=device_of(trained.model))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    found = generate(trained.model, begun, max_new_tokens, seed=seed, stop_id=stop_id, **options)
    written = found[0, len(ids or [stop_id]) :].tolist()
    if stop_id in written:
        written = written[: written.index(stop_id)]
    return tokenizer.decode(ids + written)
