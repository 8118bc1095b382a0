"""The model of the book: trained once in about 75 seconds on two cores, then loaded.

Chapter 05 trains it and shows the evidence for its recipe (recipe.py); chapters 06 to 17 spread it,
make it small and let it write. It is a small LLaMA: rotary positions, RMSNorm before each
sub-layer, SwiGLU, no biases, one table for both ends.

It is measured in bits per byte of the held-out documents: every token once, in windows that lie
side by side, the token that ends a document counted too, so that a code of that length could
restore the text. It reaches 1.65 to 1.68 bits per byte on the text of Python 3.11, where gzip needs
2.65, xz primed with the training text 1.85 and a 5-gram of the same tokens 1.81.

Production trains such a model to find a recipe, and a thousand times larger ones with it.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from slimlab.config import InputError, ModelConfig, TrainingConfig, require
from slimlab.model.transformer import Decoder
from slimlab.text.cache import cache_folder
from slimlab.text.corpus import Corpus, reference_corpus
from slimlab.text.progress import is_silent
from slimlab.train.objectives import mean_loss
from slimlab.train.recipe import RECIPE, Recipe
from slimlab.train.reference_cache import one_at_a_time, read_entry, write_entry
from slimlab.train.text_model import TextModel, encode_documents, train_on_text
from slimlab.train.threads import fastest_threads

EVIDENCE = Path(__file__).with_name("reference_evidence.json")


@dataclass(frozen=True)
class ReferenceModel(TextModel):
    """The model of the book with the text that it learned from.

    model          a Decoder on the processor, in evaluation mode
    tokenizer      learned from corpus.train
    source         the folder in which it is kept, or "memory"
    history        of its training, with the loss on held-out text every few steps
    bits_per_byte  of corpus.held_out
    corpus         training and held-out documents
    seed           of weights and batches
    training_s     wall time of the training if it was now; None if the model was kept
    """

    corpus: Corpus | None = field(default=None, repr=False)
    seed: int = 0
    training_s: float | None = None

    @property
    def validation_bits_per_byte(self) -> list[tuple[int, float]]:
        """Steps at which the held-out text was measured, and its bits per byte."""
        num_tokens = len(encode_documents(self.tokenizer, self.corpus.held_out)) - 1
        per_nat = num_tokens / math.log(2) / self.corpus.held_out_bytes
        return [(step, loss * per_nat) for step, loss in self.history.validation]


def reference_model(
    seed: int = 0,
    *,
    progress: bool = True,
    recipe: Recipe = RECIPE,
    corpus: Corpus | None = None,
    say: Callable[[str], None] | None = None,
) -> ReferenceModel:
    """Load the model of the book from the cache, or train it and keep it.

    seed      another seed, another model of the same recipe
    progress  draw a bar while it trains
    recipe    how it is trained
    corpus    what it reads; the English reference text if not given
    say       told of a damaged cache, or of one that cannot be written; by default this is printed
              to stderr, except where SLIMLAB_BATCH=1
    returns   a ReferenceModel, a new one each time: changing it changes nothing kept

    The training makes a fixed number of steps, so that a slower machine waits longer for the same
    model. Processes that ask at the same time wait for the first; a kept model is found by the
    fingerprint of recipe and text. Raises InputError for a seed that is no whole number.
    """
    require(
        isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 32,
        "seed, a whole number from 0 to 2**32 - 1",
        f"seed = {seed!r}",
        "give seed=0",
    )
    say = _tell if say is None else say
    corpus = (
        reference_corpus(held_out_fraction=recipe.held_out_fraction) if corpus is None else corpus
    )
    name = f"{recipe.fingerprint(corpus.fingerprint)}-seed{seed}"
    entry = cache_folder() / "reference" / name
    found, training_s = read_entry(entry, say), None
    if found is None:
        with one_at_a_time(entry, say):
            found = read_entry(entry, lambda _: None)
            if found is None:
                start_s = time.perf_counter()
                found = _train_and_keep(entry, recipe, corpus, seed, progress, say)
                training_s = time.perf_counter() - start_s
    return ReferenceModel(**vars(found), corpus=corpus, seed=seed, training_s=training_s)


def _train_and_keep(
    entry: Path, recipe: Recipe, corpus: Corpus, seed: int, progress: bool, say: Callable
) -> TextModel:
    config = training_config(recipe, seed)
    trained = train_reference(recipe, corpus, config, progress)
    kept = {"model": trained.model.config, "training": config, "text": corpus.fingerprint}
    try:
        write_entry(entry, trained, kept)
    except (InputError, OSError) as error:
        reason = error.given if isinstance(error, InputError) else error
        say(
            f"the model cannot be kept ({reason}), so it will be trained again next time; "
            "SLIMLAB_CACHE=FOLDER names a folder that can be written"
        )
        return trained
    return TextModel(
        trained.model, trained.tokenizer, str(entry), trained.history, trained.bits_per_byte
    )


def train_reference(
    recipe: Recipe, corpus: Corpus, config: TrainingConfig, progress: bool = True
) -> TextModel:
    """Train by the recipe, keeping nothing.

    recipe    vocabulary, sizes and choices
    corpus    what it reads, and is measured by
    config    from training_config
    progress  draw a bar
    returns   a TextModel in evaluation mode
    """
    sizes = {name: value for name, value in recipe.model.items() if name != "seq_len"}
    with fastest_threads(_one_step(recipe, config)):
        trained = train_on_text(
            corpus,
            None,
            config,
            vocab_size=recipe.vocab_size,
            sizes=sizes,
            residual=recipe.residual,
            show=progress,
        )
    trained.model.eval()
    return trained


def _one_step(recipe: Recipe, config: TrainingConfig) -> Callable[[], None]:
    """The arithmetic of a training step of the recipe, on a model of its own."""
    with torch.random.fork_rng():
        model = Decoder(ModelConfig(recipe.vocab_size, **recipe.model))
        ids = torch.randint(recipe.vocab_size, (config.batch_size, config.seq_len))

    def step() -> None:
        model.zero_grad()
        mean_loss(model(ids), ids).backward()

    return step


def training_config(recipe: Recipe, seed: int = 0) -> TrainingConfig:
    """Return the settings of the training loop.

    recipe  its numbers
    seed    of weights and batches
    """
    # On the processor everywhere: so small a model gains little from an accelerator.
    settings = {"device": "cpu", **recipe.training, "seed": seed}
    return TrainingConfig(
        seq_len=recipe.model["seq_len"], validate_every=recipe.validate_every, **settings
    )


def reference_evidence() -> dict:
    """Read what was measured for the recipe: each choice and its alternatives, three seeds, times.

    returns  recipe_fingerprint, environment, full_runs (one per seed) and ablations, each with
             bits per byte and processor seconds, as benchmarks/reference_recipe.py writes them
    """
    return json.loads(EVIDENCE.read_text(encoding="utf-8"))


def _tell(text: str) -> None:
    if not is_silent():
        print(text, file=sys.stderr)
