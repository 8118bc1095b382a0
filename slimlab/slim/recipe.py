"""One call that makes a model smaller: distil, prune, quantize, in this order, and a report.

`slimlab slim` calls slim_checkpoint, and so does the end of chapter 15. Integers come last, since
what is rounded can no longer learn; layers go first, since what is left is then trained longest.
The original is the teacher in every training step (Hinton et al. 2015, arXiv:1503.02531).

    out/quantized.safetensors  quantized.json  tokenizer.json     after quantization, or
        step_00000600/model.safetensors ...    tokenizer.json     without: a checkpoint as any other
        report.json  report.txt

The folder is written under a temporary name and renamed when it is whole. Nothing is written into
the original's folder.

Production searches for the sizes, per layer, and trains as many steps again as the original had.
"""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from slimlab.config import InputError, require
from slimlab.model.tensor_files import sync
from slimlab.slim.load import BOOK, Original, load_any_model, read_original, weight_files
from slimlab.slim.measure import measure_quality, measure_speed, measured
from slimlab.slim.recipe_config import SlimConfig
from slimlab.slim.recipe_steps import Work, check_steps, run_steps, write_model
from slimlab.slim.report import SlimReport, Stage
from slimlab.text.corpus import Corpus, reference_corpus
from slimlab.train.checkpoint_folder import write_json
from slimlab.train.text_model import encode_documents


def slim_checkpoint(
    source: str | os.PathLike,
    out: str | os.PathLike,
    config: SlimConfig,
    *,
    corpus: Corpus | None = None,
    show: bool = True,
    say: Callable[[str], None] = print,
) -> SlimReport:
    """Make a model smaller and write it into a new folder, whole or not at all.

    source   "book" for the model of the book, or what load_text_model reads: the folder of a run,
             a checkpoint, a folder in the form of `transformers`; it is only read
    out      the new folder, made here
    config   what to do
    corpus   text to learn from, with held-out text to measure by; None: the text of the book
    show     draw bars
    say      told what is being done
    returns  a SlimReport, which lies in the folder too

    Everything is computed on the processor, with the threads that PyTorch has. The random numbers
    of the caller stay as they were.
    Raises InputError for a source that is not there, holds integers, is no decoder or holds numbers
    that are not finite; for an out that is there already, lies in the source, is named like a
    checkpoint or cannot be written; for sizes that the model has not; if training diverges; and if
    the disk is full. There is no out then.
    """
    out = Path(out)
    _check_out(out)
    if source != BOOK:
        _check_outside(out, source)
    original = read_original(source, show)
    for folder in (original.trained.source, original.folder):
        _check_outside(out, folder)
    _check_room(original, out)
    corpus = corpus or original.corpus or reference_corpus()
    change = "give a text of which a part is held out: held_out_fraction=0.1"
    require(bool(corpus.held_out), "held-out text to measure by", "none", change)
    train_ids, held_out_ids = (
        encode_documents(original.trained.tokenizer, part)
        for part in (corpus.train, corpus.held_out)
    )
    work = Work(
        original.trained.model,
        train_ids,
        held_out_ids,
        lambda model: measure_quality(model, held_out_ids, corpus.held_out_bytes, show),
        config,
        show,
        say,
    )
    check_steps(original.trained.model, config)
    stages, small = run_steps(work)
    try:
        return _write(source, out, original, corpus, work, stages, small)
    except (OSError, InputError) as error:
        raise _not_written(out, error) from error


def _not_written(out: Path, error: OSError | InputError) -> InputError:
    asked, change = "a folder that can be written", "make room on the disk, or choose another place"
    if isinstance(error, InputError):  # by those who know the temporary name alone
        asked, change = error.asked, error.change
        given = error.given.replace(str(_temporary(out)), str(out))
    else:
        given = f"{out}: {error.strerror or error}"
    return InputError(asked, f"{given}; the original is as it was", change)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write(source, out: Path, original: Original, corpus, work: Work, stages, small) -> SlimReport:
    """Write, read back and measure under a temporary name; then give it its own."""
    temporary = _temporary(out)
    tokenizer = original.trained.tokenizer
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        folder = write_model(temporary, small, tokenizer, work.config, corpus.fingerprint)
        report = _report(source, out, work, corpus, original, temporary, folder, stages)
        write_json(temporary / "report.json", report.as_dict())
        (temporary / "report.txt").write_text(report.as_text() + "\n", encoding="utf-8")
        sync(temporary)
        os.rename(temporary, out)
        sync(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return report


def _report(
    source: str | os.PathLike,
    out: Path,
    work: Work,
    corpus: Corpus,
    original: Original,
    temporary: Path,
    folder: Path,
    stages: list[Stage],
) -> SlimReport:
    """Measure both models, the small one as it is read back from the disk."""
    read = load_any_model(temporary, "cpu")
    before = original.trained.model
    speed = measure_speed(before, read.model, work.held_out_ids, work.show)
    found = work.measure(read.model)
    sides = []
    for place, (model, at, bits) in enumerate(
        ((before, original.folder, stages[0].bits_per_byte), (read.model, folder, found))
    ):
        times = (speed[name][place] for name in ("reading", "writing"))
        sides.append(measured(model, at, bits, *times))
    stages = [*stages, Stage("as written", sides[1].num_params, sides[1].weights_bytes, found, 0.0)]
    return SlimReport(
        source=str(source),
        out=str(out),
        config=asdict(work.config),
        text={"name": corpus.name, "fingerprint": corpus.fingerprint},
        original=sides[0],
        slim=sides[1],
        stages=tuple(stages),
        reading_ratio=speed["reading"][2],
        writing_ratio=speed["writing"][2],
        machine={
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "system": platform.machine(),
            "date": date.today().isoformat(),
        },
        notes=tuple(_notes(original, corpus)),
    )


def _notes(original: Original, corpus: Corpus) -> list[str]:
    if original.text == corpus.fingerprint:
        return []
    known = "another text" if original.text else "a text that its folder does not name"
    return [f"the original learned from {known}, which may hold parts of the held-out text"]


def _check_out(out: Path) -> None:
    asked, change = "a name that can be made, in UTF-8", "give another name"
    fine = "\0" not in str(out) and out.name not in ("", "..")
    require(fine and _is_utf_8(str(out)), asked, repr(str(out)), change)
    change = "give a new name, or remove the old folder yourself"
    require(not os.path.lexists(out), "a folder that does not exist", str(out), change)
    # A run removes its older checkpoints by their names, and what was left under temporary ones.
    asked, change = "a name that no checkpoint has", "give a name that does not begin with step_"
    require(not out.name.lstrip(".").startswith("step_"), asked, str(out), change)


def _is_utf_8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _check_outside(out: Path, folder: str | os.PathLike) -> None:
    """Refuse an out that is the original's folder or lies in it."""
    own, new = (Path(os.path.realpath(one)) for one in (folder, out))
    given = f"original {folder}, out {out}"
    change = "give a folder outside the original, which is never written to"
    inside = own == new or own in new.parents
    require(not inside, "a folder of its own for the small model", given, change)


def _check_room(original: Original, out: Path) -> None:
    """Refuse a disk that is known to be full, or a place that is closed, before any work."""
    try:
        above = _try_place(out)
    except OSError as error:
        given, change = f"{out}: {error.strerror or error}", "choose another place or name"
        raise InputError("a folder that can be written", given, change) from error
    needed = sum(one.stat().st_size for one in weight_files(original.folder))
    free = shutil.disk_usage(above).free
    asked, given = f"{needed:,} bytes of room, what the original takes", f"{free:,} in {above}"
    require(free >= needed, asked, given, "make room on the disk, or choose another place")


def _try_place(out: Path) -> Path:
    """Make a folder of the longest name that the work needs, remove it, and return what stays."""
    new = []
    try:
        for one in (*reversed(out.absolute().parents), _temporary(_temporary(out))):
            if not one.is_dir():
                one.mkdir()
                new.append(one)
    finally:
        for one in reversed(new):
            one.rmdir()
    return new[0].parent
