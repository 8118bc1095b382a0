"""Folders of a model written as `transformers` keeps them, whole or not at all.

Chapter 03 writes one and has `transformers` read it. What is written appears under its name when it
is complete; until then, and if anything fails, what had that name stays as it was.

Production writes from every rank at once, in the background, and into an object store.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch import Tensor

from slimlab.config import InputError, require
from slimlab.model.pretrained_files import CONFIG, INDEX, WEIGHTS, leftovers
from slimlab.model.tensor_files import sync, write_tensors
from slimlab.text.files import write_atomically

# Written anew with every save, so that shards of an older model do not stay.
_OURS = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def write_shards(
    folder: Path,
    names: dict[str, int],
    make: Callable[[str], Tensor],
    limit_bytes: int | None = None,
) -> None:
    """Write tensors to one safetensors file, or to several and their index.

    folder       exists and is empty
    names        names of the tensors and their bytes, in order
    make         called with a name, returns the tensor; one shard at a time is in memory
    limit_bytes  of a shard; a tensor that is larger has a shard of its own. None: one file
    """
    shards, filled_bytes = [[]], 0
    for name, size_bytes in names.items():
        if limit_bytes and shards[-1] and filled_bytes + size_bytes > limit_bytes:
            shards, filled_bytes = [*shards, []], 0
        shards[-1].append(name)
        filled_bytes += size_bytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else WEIGHTS
        # transformers asks which library's tensors these are.
        write_tensors(folder / file, {name: make(name) for name in shard}, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(names.values())}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json_bytes(index))


def json_bytes(content: dict) -> bytes:
    """Return `content` as JSON for people to read."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Let a folder be written under another name, and give it its name when it is complete.

    folder   new, empty, or a folder of a model: its files of other kinds (a tokenizer's) stay
    yields   the empty folder to write to, beside it

    If anything fails, `folder` is as it was. Killed between its last two steps, a save leaves the
    old folder beside under the name .NAME.PID.old.
    Raises InputError for a folder with other things in it, and if it cannot be written.
    """
    target = Path(os.path.realpath(folder))
    check_replaceable(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    for left in leftovers(target, ".tmp"):
        pid = left.stem.rpartition(".")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _put_in_place(temporary, target)
    except OSError as error:
        raise InputError(
            "a folder that can be written",
            f"{folder}: {error.strerror or error}",
            "check that you may write there, and the space on the disk; what was there is intact",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Refuse to write over what is no folder of a model.

    target  the folder
    """
    asked = "a new folder, an empty one, or one of a model to write over"
    change = "give the name of a new folder"
    require(target.is_dir() or not target.exists(), asked, f"{target}: a file", change)
    names = [one.name for one in target.iterdir()] if target.is_dir() else []
    odd = [name for name in names if not (target / name).is_file()]
    fits = not names or (CONFIG in names and not odd)
    held = ", ".join(sorted(odd or names)[:6])
    require(fits, asked, f"{target}: holds {held}", change)


def _put_in_place(temporary: Path, target: Path) -> None:
    old = list(target.iterdir()) if target.is_dir() else []
    for file in old:
        if not _OURS.fullmatch(file.name):
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copy2(file, temporary / file.name)
    sync(temporary)
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    if old:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if old:
            os.rename(aside, target)
        raise
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
