"""Where the model of the book is kept between chapters, and how it is known to be whole.

    ~/.cache/slimlab/reference/0123456789ab-seed0/      (macOS: ~/Library/Caches/slimlab)
        tokenizer.json  history.jsonl  step_00001000/

slimlab.text.cache tells the folder. An entry is written under a name of its own, then renamed, and
one that is whole is never written again: a reader finds all of it or nothing. Sizes and SHA-256
tell a damaged one. `slimlab generate` reads an entry like the folder of any run. Chapter 05 uses
it.

Production keeps weights in a store where the name of a file is the hash of its content.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from slimlab.config import InputError, require
from slimlab.train.checkpoint import save_checkpoint
from slimlab.train.checkpoint_folder import find_checkpoint, list_files, read_json
from slimlab.train.history import HistoryFile, read_history
from slimlab.train.text_model import TextModel, load_text_model


@contextmanager
def one_at_a_time(entry: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time make an entry; the others wait, and then find it.

    entry  its folder
    say    told that another process is waited for

    Two processes that train at once on two cores take far longer than one after the other. Where
    the system has no locks or the folder cannot be written, nobody waits: entries stay whole, since
    they are renamed into place.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            entry.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(entry.with_name(f".{entry.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another process is training the same model; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read_entry(entry: Path, say: Callable[[str], None] = print) -> TextModel | None:
    """Load a model that is kept.

    entry    its folder
    say      told what is damaged, if anything is
    returns  a TextModel on the processor, with its history; None if there is no whole one
    """
    try:
        if not entry.is_dir():
            return None
        found = load_text_model(entry, device="cpu")
        kept = read_json(find_checkpoint(entry, say) / "state.json")["extra"]
        now = list_files(entry)
        changed = [name for name, one in kept["files"].items() if now.get(name) != one]
        asked, change = "the files as they were written", "remove the folder"
        require(not changed, asked, f"{', '.join(changed)} changed", change)
        measured = float(kept["bits_per_byte"])
    except (InputError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        say(f"the model kept in {entry} is damaged and will be trained again: {_reason(error)}")
        return None
    return replace(found, source=str(entry), history=read_history(entry), bits_per_byte=measured)


def write_entry(entry: Path, trained: TextModel, config: dict) -> None:
    """Keep a model, whole or not at all; a whole entry that is there already stays.

    entry    its folder, made here
    trained  the model, its tokenizer, its history and what it reached
    config   configurations by name, for the checkpoint's config.json

    Raises InputError or OSError if it cannot be written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    own = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.tmp")
    try:
        own.mkdir()
        _write_files(own, trained, config)
        try:
            os.rename(own, entry)
        except OSError:
            if read_entry(entry, say=lambda _: None) is None:  # else another process was first
                _replace(entry, own)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _write_files(folder: Path, trained: TextModel, config: dict) -> None:
    trained.tokenizer.save(folder / "tokenizer.json")
    file = HistoryFile(folder / "history.jsonl", 0)
    for record in trained.history.records:
        file.append(record)
    file.sync()
    file.close()
    # The checkpoint lists its own files.
    extra = {"bits_per_byte": trained.bits_per_byte, "files": list_files(folder)}
    step = trained.history.steps[-1]
    save_checkpoint(folder, model=trained.model, step=step, config=config, extra=extra)


def _replace(entry: Path, own: Path) -> None:
    damaged = own.with_suffix(".damaged")
    os.rename(entry, damaged)
    try:
        os.rename(own, entry)
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _reason(error: Exception) -> str:
    return error.given if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
