"""Folders of checkpoints: their names, which of them are whole, and how old ones leave.

checkpoint.py writes and reads what is inside; chapter 05 explains both.
Production keeps such lists in an object store, which has no rename: a marker file, written last,
says there that the rest is whole.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from slimlab.config import InputError, require
from slimlab.model.tensor_files import PICKLED_SUFFIXES, check_not_pickled, sync

FORMAT, VERSION = "slimlab checkpoint", 1
SMALLER = ("quantized.json", "sparse.json")  # what slimlab slim wrote holds one of these
_LATER = f"later than {VERSION}: update slimlab"
_NEEDED = {"step": int, "data_position": int, "extra": dict}
_NAME = re.compile(r"step_(\d{8,})")


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """List the checkpoints in a run's folder, whole or damaged, the oldest first.

    folder  of one run
    """
    found = [path for path in Path(folder).glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint.

    path  a folder called step_00000120, for instance
    """
    return int(_NAME.fullmatch(path.name)[1])


def latest(folder: str | os.PathLike, say: Callable[[str], None] = print) -> Path | None:
    """Find the newest checkpoint that is whole.

    folder   of one run
    say      called with a sentence for each damaged one that is newer
    returns  its path, or None

    Raises InputError if one was written by a later version of this book: to go on from an older
    one would write over it.
    """
    for path in reversed(checkpoints_in(folder)):
        problem = problem_of(path)
        if problem is None:
            return path
        require(
            _LATER not in problem,
            f"checkpoints of at most version {VERSION}",
            f"{path}: {problem}",
            "update slimlab; or name an older checkpoint of this run, to read it alone",
        )
        say(f"skipped the damaged checkpoint {path}: {problem}")
    return None


def problem_of(path: Path) -> str | None:
    """Say what is wrong with a checkpoint: a file that is missing, of another size or changed.

    path     its folder
    returns  a few words, or None if it is whole
    """
    try:
        state = read_json(path / "state.json")
    except InputError as error:
        return error.given.removeprefix(f"{path}{os.sep}")
    if state.get("format") != FORMAT:
        return "state.json is not that of a checkpoint"
    if not isinstance(state.get("version"), int):
        return "state.json names no version"
    if state["version"] > VERSION:
        return f"it is of version {state['version']}, {_LATER}"
    try:
        files = {name: (one["bytes"], one["sha256"]) for name, one in state["files"].items()}
    except (KeyError, TypeError, AttributeError):
        return "state.json does not list the files"
    for key, kind in _NEEDED.items():
        if not isinstance(state.get(key), kind):
            return f"state.json has no {key}"
    for name in sorted({"model.safetensors", "random.safetensors", "config.json"} | set(files)):
        if problem := problem_of_file(path / name, *files.get(name, (0, ""))):
            return f"{name} {problem}"
    return None


def problem_of_file(file: Path, size_bytes: int, sha256: str) -> str | None:
    """Say what is wrong with a file of a checkpoint; None: nothing.

    file        that state.json lists
    size_bytes  that it had when it was written
    sha256      likewise
    """
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != size_bytes:
        return f"has {file.stat().st_size:,} bytes instead of {size_bytes:,}"
    return None if _sha256(file) == sha256 else "has the right size, but not its SHA-256"


def find_checkpoint(path: str | os.PathLike, say: Callable[[str], None] = print) -> Path:
    """Find the checkpoint that a person means.

    path     a checkpoint, or the folder of a run, of which the newest whole one is taken
    say      told of damaged ones that are passed over
    returns  the folder of a whole checkpoint

    Raises InputError that says what was found instead.
    """
    path = Path(path)
    asked = "a checkpoint, or the folder of a run that holds some (step_00000100, ...)"
    change = "train first: slimlab train --out FOLDER"
    require(
        os.path.lexists(path),
        asked,
        f"{path}, which does not exist",
        f"check the path, or {change}",
    )
    if not path.is_dir():
        check_not_pickled(path)
        raise InputError(asked, f"{path}, a single file", "give the folder in which it lies")
    if (path / "state.json").exists() or _NAME.fullmatch(path.name):
        problem = problem_of(path)
        change = "take an older checkpoint of the same run, or copy this one again"
        require(problem is None, "a whole checkpoint", f"{path}: {problem}", change)
        return path
    found = latest(path, say)
    names = sorted(one.name for one in path.iterdir() if not one.name.startswith("."))
    pickles = [name for name in names if name.endswith(PICKLED_SUFFIXES)]
    if pickles:
        change = f"{pickles[0]} is a pickle, which is never opened here; look for .safetensors"
    elif {*SMALLER} & set(names):
        change = "it was made smaller: slimlab.slim.load.load_any_model reads it"
    elif "config.json" in names:
        change = "weights of others are read by slimlab.model.pretrained.from_pretrained"
    listed = ", ".join(names[:6]) or "nothing"
    require(found is not None, asked, f"{path}, which holds {listed}", change)
    return found


def list_files(folder: Path) -> dict[str, dict]:
    """Return size in bytes and SHA-256 of every file that lies in `folder` itself, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is on the disk when this returns.

    path     the file, inside a folder that still has its temporary name
    content  what it holds
    """
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync(path)


def read_json(path: Path) -> dict:
    """Read a JSON file that holds one object.

    path  the file

    Raises InputError if it is missing, cut off or something else.
    """
    asked, change = "a JSON file that holds one object", "copy the file again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(asked, f"{path} is missing", change) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(asked, f"{path} cannot be read: {error}", change) from error
    require(isinstance(content, dict), asked, f"{path}: a {type(content).__name__}", change)
    return content


def remove(path: Path) -> None:
    """Remove a checkpoint: by name at once, its files after that.

    path  its folder
    """
    # Renamed first: a kill in the middle leaves no half of a checkpoint under its name.
    doomed = path.with_name(f".{path.name}.removed.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest checkpoints.

    folder  of one run
    step    later ones stay: they are damaged, or will be reached again
    keep    so many stay of those up to `step`
    """
    reached = [path for path in checkpoints_in(folder) if step_of(path) <= step]
    for path in reached[:-keep]:
        remove(path)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove what killed processes left behind under temporary names.

    folder  of one run; no other process may be saving into it
    """
    for path in Path(folder).glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path(folder).glob(".history.jsonl.*.tmp"):
        path.unlink(missing_ok=True)
