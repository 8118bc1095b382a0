"""Folders of a model as `transformers` keeps them: config.json beside safetensors, one or several.

Chapter 03 looks into one: a safetensors file is the length of a table (8 bytes), the table in JSON
(names, types, shapes, places) and the numbers. So shapes are checked before a number is read, and
nothing in the file can run.

Production reads several shards at once, straight to the device that needs each tensor, and fetches
them from an object store.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlab.config import InputError, require
from slimlab.model.tensor_files import check_not_pickled

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """Where a tensor lies, and its shape and type, known without reading it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_config_json(folder: str | os.PathLike) -> dict:
    """Read config.json.

    folder   where it lies
    returns  its content

    Raises InputError if there is no such folder or file, or it holds no JSON object.
    """
    require(
        isinstance(folder, str | os.PathLike) and str(folder) != "",
        "the path of a folder",
        repr(folder),
        "give it as text or as a pathlib.Path",
    )
    folder = Path(folder)
    if not folder.is_dir():
        aside = leftovers(folder, ".old")
        found = f"; a save was interrupted and left the old one at {aside[0]}" if aside else ""
        raise InputError(
            f"a folder with {CONFIG} and {WEIGHTS}",
            f"{folder}, " + ("a file" if folder.is_file() else "which does not exist") + found,
            "give the path of a folder; a model of the Hugging Face Hub is fetched into one by: "
            "hf download OWNER/NAME --local-dir FOLDER",
        )
    return _read_json(folder / CONFIG, f"{CONFIG} in the folder of the weights")


def leftovers(folder: Path, end: str) -> list[Path]:
    """List what an interrupted save left beside a folder.

    folder  the folder that was to be written
    end     ".tmp": not complete; ".old": what had been there
    """
    start = f".{folder.name}."
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return sorted(one for one in beside if one.name.startswith(start) and one.suffix == end)


def _read_json(path: Path, asked: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        names = sorted(one.name for one in path.parent.iterdir())
        given = f"{path}: {error.strerror}; the folder holds {', '.join(names[:8]) or 'nothing'}"
        raise InputError(asked, given, _elsewhere(path.parent)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(asked, f"{path}: no JSON: {error}", _fetch(path)) from error
    require(isinstance(content, dict), asked, f"{path}: no JSON object", _fetch(path))
    return content


def _elsewhere(folder: Path) -> str:
    """In the Hub's cache a model's files lie one level deeper, under the name of a commit."""
    inside = sorted(folder.glob(f"snapshots/*/{CONFIG}"))
    return f"give {inside[-1].parent}" if inside else "fetch the whole folder"


def find_tensors(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """List the tensors in a folder without reading their numbers.

    folder   holds model.safetensors, or model.safetensors.index.json and the shards it names
    returns  name of every tensor, and where it lies

    Raises InputError if there are no weights or only pickled ones, if a file is cut off, damaged or
    no safetensors file, and if the index and the shards do not agree.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():
        return read_table(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    weight_map = _read_json(folder / INDEX, f"{INDEX}, a JSON object").get("weight_map")
    good = isinstance(weight_map, dict) and all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    )
    asked = "an index with weight_map: names of tensors and of files beside it"
    require(good and weight_map, asked, f"{folder / INDEX}: {weight_map!r:.80}", _fetch(INDEX))
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    require(
        not absent,
        f"the {len(shards)} shards that {folder / INDEX} names",
        f"no {', no '.join(absent[:4])} ({len(absent)} absent)",
        "fetch the absent files from where the others came",
    )
    found = {}
    for shard in shards:
        table = read_table(folder / shard)
        listed = {name for name, place in weight_map.items() if place == shard}
        odd = sorted(listed ^ set(table))
        require(
            not odd,
            f"{shard} with the {len(listed)} tensors that the index names",
            f"{len(table)} tensors; in one of the two only: {', '.join(odd[:4])}",
            "index and shards are of different models: fetch the whole folder again",
        )
        found |= table
    return found


def _no_weights(folder: Path) -> InputError:
    names = sorted(one.name for one in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickled:
        return InputError(
            "weights as safetensors, which are data and nothing else",
            f"{folder}: only {', '.join(pickled[:4])}, pickles: reading one runs a program in it",
            "if you trust the source, convert once, elsewhere, with `transformers`: "
            "AutoModel...from_pretrained(folder).save_pretrained(new, safe_serialization=True)",
        )
    asked = f"{WEIGHTS}, or {INDEX} and its shards"
    given = f"{folder}: holds {', '.join(names[:8]) or 'nothing'}"
    return InputError(asked, given, "fetch the weights too")


def read_table(path: Path) -> dict[str, StoredTensor]:
    """Read the table of a safetensors file: the library checks that the numbers are all there.

    path     the file
    returns  name, shape and type of every tensor

    Raises InputError that says what the file is instead.
    """
    require(path.stat().st_size > 0, "a safetensors file", f"{path}: empty", _fetch(path))
    with open(path, "rb") as file:
        start = file.read(1000)
    kinds = {b"version https://git-lfs": "a pointer of Git LFS", b"<": "a web page"}
    for beginning, kind in kinds.items():
        require(
            not start.lstrip().startswith(beginning),
            "a safetensors file",
            f"{path}: {kind}, {path.stat().st_size:,} bytes, not the file itself",
            "fetch the file itself: git lfs pull, or hf download OWNER/NAME --local-dir FOLDER",
        )
    check_not_pickled(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
            return {
                name: StoredTensor(path, tuple(one.get_shape()), one.get_dtype())
                for name, one in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError("a whole safetensors file", _damage(path, error), _fetch(path)) from error


def _damage(path: Path, error: Exception) -> str:
    size_bytes = path.stat().st_size
    said = f"{path}: {str(error).removeprefix('Error while ')}"
    try:
        with open(path, "rb") as file:
            table_bytes = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(table_bytes if table_bytes < size_bytes else 0))
        ends = [one["data_offsets"][1] for name, one in table.items() if name != "__metadata__"]
        return f"{said}: {size_bytes:,} bytes of {8 + table_bytes + max(ends):,}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{said}: {size_bytes:,} bytes without a table of tensors"


def _fetch(name: str | Path) -> str:
    return f"fetch {Path(name).name} again and compare sizes"


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """Read one tensor.

    stored   where it lies
    name     its name in the file
    returns  the tensor on the CPU; it may share memory with the file, so copy what is to stay
    """
    with safe_open(stored.path, framework="pt") as file:
        return file.get_tensor(name)
