"""Models read from where they lie: whole ones to be made smaller, and what became of them.

`slimlab slim` reads the original with read_original; `slimlab generate` reads either kind with
load_any_model. Chapter 15 uses both.

Production registries keep the kind of a model beside its name, so that nobody has to look inside.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slimlab.config import InputError, require
from slimlab.model.transformer import Decoder
from slimlab.slim import prune_file, quantize_pack
from slimlab.slim.prune_file import load_sparse_model
from slimlab.slim.quantize_file import load_quantized_model
from slimlab.text.corpus import Corpus
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.checkpoint_folder import read_json
from slimlab.train.device import choose_device
from slimlab.train.reference import reference_model
from slimlab.train.text_model import TextModel, load_text_model

BOOK = "book"
TOKENIZER = "tokenizer.json"
_PACKED = {"numbers of fewer bits": quantize_pack.TABLE, "packed zeros": prune_file.TABLE}
# What a run needs to go on, and a model does not need to speak.
_OF_TRAINING = ("optimizer.safetensors", "random.safetensors")


@dataclass(frozen=True)
class Original:
    """A model that is to be made smaller.

    trained  model and tokenizer
    folder   of its weights
    corpus   the text of the book for the model of the book; None for others
    text     fingerprint of the text that it learned from, if its folder says so
    """

    trained: TextModel = field(repr=False)
    folder: Path
    corpus: Corpus | None = field(repr=False)
    text: str | None


def read_original(source: str | os.PathLike, show: bool = True) -> Original:
    """Read a model of 32 bits that can be made smaller.

    source   "book" for the model of the book, or what load_text_model reads; a folder called book
             is "./book"
    show     draw a bar if the model of the book has to be trained first
    returns  an Original on the processor, in evaluation mode

    Raises InputError for a folder that holds integers or packed zeros already, for what is no
    decoder, for weights that are not finite, and as load_text_model does.
    """
    corpus = None
    if source == BOOK:
        trained = reference_model(progress=show)
        corpus = trained.corpus
        kept = Path(trained.source).is_dir()
        change = "name a folder that can be written: SLIMLAB_CACHE=FOLDER"
        require(kept, "the model of the book on the disk", "one in memory alone", change)
    else:
        for holds, one in _PACKED.items():
            require(
                not (Path(source) / one).is_file(),
                "a model that is whole, to be made smaller",
                f"{source}, which holds {holds}",
                "give the original: its report.json says under source which it was",
            )
        trained = load_text_model(source, device="cpu")
    change = "give a model that scores next tokens: slimlab train makes such"
    given = f"{source}: a {type(trained.model).__name__}"
    require(isinstance(trained.model, Decoder), "a decoder", given, change)
    for name, param in trained.model.named_parameters():
        num_bad = int((~torch.isfinite(param)).sum())
        given = f"{source}: {name}: {num_bad:,} of {param.numel():,} are NaN or infinite"
        change = "take a checkpoint from before the step in which training diverged"
        require(num_bad == 0, "an original of finite numbers", given, change)
    folder = _weights_folder(Path(trained.source))
    return Original(trained, folder, corpus, _text_of(folder))


def load_any_model(path: str | os.PathLike, device: str | torch.device = "auto") -> TextModel:
    """Load a model and its tokenizer, of floats or of integers.

    path     what load_text_model reads, or what slim_checkpoint wrote
    device   "auto", or PyTorch's name of one; integers stay on the processor if "auto"
    returns  a TextModel in evaluation mode

    Raises InputError that says what is missing, damaged or does not fit.
    """
    path, place = Path(path), device
    if (path / quantize_pack.TABLE).is_file():
        model, _ = load_quantized_model(path)
        place = "cpu" if device == "auto" else device
    elif (path / prune_file.TABLE).is_file():
        model, _ = load_sparse_model(path)
    else:
        return load_text_model(path, device)
    tokenizer = Tokenizer.load(path / TOKENIZER)
    require(
        tokenizer.vocab_size == model.config.vocab_size,
        f"a tokenizer of {model.config.vocab_size} tokens, as many as the model has",
        f"{path}: one of {tokenizer.vocab_size}",
        "put the tokenizer.json of the original beside it",
    )
    return TextModel(model.to(choose_device(place)).eval(), tokenizer, str(path))


def weight_files(folder: Path) -> list[Path]:
    """List the files of a model's weights.

    folder  a checkpoint, or a folder in the form of `transformers` or of quantized weights
    returns  paths; what only training needs is left out
    """
    return [one for one in sorted(folder.glob("*.safetensors")) if one.name not in _OF_TRAINING]


def folder_bytes(folder: Path) -> int:
    """Add up what a model needs on the disk to be loaded: weights, JSON, tokenizer.

    folder   as in weight_files; the tokenizer may lie beside a checkpoint
    returns  bytes, without the state of a training and without reports
    """
    files = weight_files(folder)
    files += [one for one in folder.glob("*.json") if one.name not in (TOKENIZER, "report.json")]
    files += [one for one in (folder / TOKENIZER, folder.parent / TOKENIZER) if one.is_file()][:1]
    return sum(one.stat().st_size for one in files)


def _weights_folder(source: Path) -> Path:
    """The folder of the weights: a kept model names the folder of its run."""
    inner = sorted(source.glob("step_*"))
    return inner[-1] if inner and not weight_files(source) else source


def _text_of(folder: Path) -> str | None:
    try:
        config = read_json(folder / "config.json")
    except InputError:
        return None
    notes = config.get("notes")
    found = notes.get("text") if isinstance(notes, dict) else config.get("text")
    return found if isinstance(found, str) else None
