"""From a text to a trained model in a folder, on a mesh of ranks.

`slimlab train --dp 2 --tp 2` is this function; chapter 11 uses it. What lies in the folder in the
end is what slimlab.train.text_model leaves there: `slimlab generate` reads it, and a run in one
process goes on with it. Production makes the ids once and lets each replica read its part.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import TrainingConfig
from slimlab.parallel.hybrid_loop import train_on_mesh
from slimlab.parallel.hybrid_run import MeshRun
from slimlab.parallel.together import with_all
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.text.corpus import Corpus
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.objectives import bits_per_byte
from slimlab.train.text_start import encode_documents, first_model, notes_of, prepare_text

WINDOWS = 16  # at a time, where the result is measured; as in slimlab.train.text_model


def train_text_on_mesh(
    comm: Communicator,
    parallel: ParallelConfig,
    corpus: Corpus,
    folder: Path,
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
) -> dict:
    """Learn a vocabulary from a corpus and train a decoder on it, on all ranks; or go on with that.

    comm      of all ranks
    parallel  the layout
    corpus    the same on every rank
    folder    of the run, the same for all ranks
    config, vocab_size, sizes, residual, resume, new_settings  as in train_on_text of
              slimlab.train.text_model
    show, say, watch  likewise, of rank 0 alone
    returns   steps, num_params, vocab_size, device, loss, held_out_loss and held_out_bits_per_byte
              (None without held-out text); loss on rank 0 also of a run that had ended before

    Communicates: what train_on_mesh does; rank 0 learns the vocabulary meanwhile.
    Raises InputError, on every rank, as train_on_mesh and train_on_text do.
    """
    args = (corpus, folder, config, vocab_size, sizes)
    found = with_all(comm, _prepare, comm.rank == 0, *args, show)
    tokenizer, ids = with_all(comm, _ids_of, found, folder, corpus)
    run, history = train_on_mesh(
        first_model(tokenizer, config, sizes, residual),
        ids,
        config,
        comm,
        parallel,
        held_out=encode_documents(tokenizer, corpus.held_out) if corpus.held_out else None,
        run_folder=folder,
        resume=resume,
        new_settings=new_settings,
        notes=notes_of(corpus, vocab_size, residual),
        show=show,
        say=say,
        watch=watch,
    )
    return {
        "steps": run.step,
        "num_params": sum(shape.numel() for shape in run.hybrid.shapes.values()),
        "vocab_size": tokenizer.vocab_size,
        "device": str(run.device),
        "loss": history.losses[-1] if history.losses else None,
        "held_out_loss": history.validation[-1][1] if history.validation else None,
        "held_out_bits_per_byte": _bits_per_byte(run, tokenizer, corpus),
    }


def _bits_per_byte(run: MeshRun, tokenizer: Tokenizer, corpus: Corpus) -> float | None:
    """Measure as held_out_bits_per_byte of slimlab.train.text_model does, on all ranks together."""
    if not corpus.held_out:
        return None
    ids = encode_documents(tokenizer, corpus.held_out)
    loss = run.measure(ids, run.config.seq_len, WINDOWS)
    return bits_per_byte(loss * (len(ids) - 1), corpus.held_out_bytes)


def _prepare(first: bool, *args: object) -> tuple[Tokenizer, Tensor] | None:
    return prepare_text(*args) if first else None


def _ids_of(
    found: tuple[Tokenizer, Tensor] | None, folder: Path, corpus: Corpus
) -> tuple[Tokenizer, Tensor]:
    if found is not None:
        return found
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return tokenizer, encode_documents(tokenizer, corpus.train)
