"""Models with zeros on disk: each matrix in whichever form of prune_pack is smallest.

    sparse.safetensors  NAME.values, NAME.bits and so on; other tensors by their name
    sparse.json         which matrix has which form and shape, size and SHA-256 of the file

What is read back is an ordinary model, zeros and all: only the file is smaller, neither memory nor
time. Chapter 15 says why. The folder is written whole or not at all.

Production keeps 2:4 packed in memory too, where the processor multiplies it as it is.
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import InputError, ModelConfig, require
from slimlab.model.build import build_model
from slimlab.model.tensor_files import (
    check_state,
    fill,
    read_tensors,
    state_of,
    sync,
    write_tensors,
)
from slimlab.slim.prune_masks import is_two_four
from slimlab.slim.prune_pack import NAMES, counted_bytes, pack_sparse, unpack_sparse
from slimlab.slim.prune_scores import prunable_weights
from slimlab.train.checkpoint_folder import list_files, problem_of_file, read_json, write_json

FORMAT, VERSION = "slimlab sparse", 1
TENSORS, TABLE = "sparse.safetensors", "sparse.json"
METADATA = {"format": FORMAT}
_FIRST = ("dense", "2:4", "bitmap", "csr")


def smallest_form(weight: Tensor) -> tuple[str, dict[str, Tensor]]:
    """Pack a matrix in every form that it fits, and keep the smallest.

    weight   (R, C)
    returns  the form and what pack_sparse makes; of equal ones the first of "dense", "2:4"
    """
    fitting = [form for form in _FIRST if form != "2:4" or is_two_four(weight)]
    packs = {form: pack_sparse(weight, form) for form in fitting}
    form = min(packs, key=lambda one: counted_bytes(packs[one]))  # the first of equal ones
    return form, packs[form]


def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Return what the file of a pruned model holds.

    model    of floats
    returns  its tensors by name, and for each packed matrix its form and shape

    Raises InputError as pack_sparse does.
    """
    tensors, forms, prunable = {}, {}, prunable_weights(model)
    for name, one in state_of(model).items():
        form, packed = smallest_form(one) if name in prunable else ("dense", {})
        if form == "dense":
            tensors[name] = one
        else:
            forms[name] = {"form": form, "shape": list(one.shape)}
            tensors |= {f"{name}.{part}": kept for part, kept in packed.items()}
    return tensors, forms


def save_sparse_model(folder: str | os.PathLike, model: nn.Module, extra: dict | None = None):
    """Write a pruned model, whole or not at all.

    folder   made here; its parent must exist
    model    of floats, with its configuration in model.config
    extra    more to keep beside it, for JSON
    returns  the folder, a Path

    Raises InputError if the folder is there already or cannot be written, for a model without a
    configuration, and as pack_sparse does.
    """
    folder, config = Path(folder), getattr(model, "config", None)
    asked, given = "a model with a configuration", type(model).__name__
    require(isinstance(config, ModelConfig), asked, given, "give one of build_model")
    change = "give a new name, or remove the old folder yourself"
    require(not os.path.lexists(folder), "a folder that does not exist", str(folder), change)
    tensors, forms = packed_state(model)
    table = {"format": FORMAT, "version": VERSION, "forms": forms}
    table |= {"model": asdict(config), "extra": extra or {}}
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        write_tensors(temporary / TENSORS, tensors, METADATA)
        write_json(temporary / TABLE, {**table, "files": list_files(temporary)})
        sync(temporary)
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        given = f"{folder}: {error.strerror or error}"
        change = "make room on the disk, or choose a folder that you may write to"
        raise InputError("a folder that can be written", given, change) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_sparse_model(folder: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Read a model that save_sparse_model wrote.

    folder   its folder
    returns  an ordinary model in eval mode, its zeros in their places, and extra

    Raises InputError for a folder of another form, and for a file that is cut off, changed, of a
    later version, or of another model than its table says.
    """
    folder = Path(folder)
    asked, change = f"a folder of packed weights, with {TABLE}", "check the path"
    require((folder / TABLE).is_file(), asked, f"{folder}: no {TABLE} in it", change)
    table = read_json(folder / TABLE)
    form = (table.get("format"), table.get("version"))
    given = f"{folder}: {form[0]!r}, version {form[1]!r}"
    require(form == (FORMAT, VERSION), f"{FORMAT}, version {VERSION}", given, "update slimlab")
    change = "copy the folder again"
    try:
        written = table["files"][TENSORS]
        problem = problem_of_file(folder / TENSORS, written["bytes"], written["sha256"])
        require(problem is None, "whole weights", f"{folder}: {TENSORS} {problem}", change)
        tensors = read_tensors(folder / TENSORS)
        for name, one in table["forms"].items():
            parts = {part: tensors.pop(f"{name}.{part}") for part in NAMES[one["form"]]}
            tensors[name] = unpack_sparse(parts, one["form"], tuple(one["shape"]))
        config, extra = ModelConfig(**table["model"]), dict(table["extra"])
    except (KeyError, TypeError, AttributeError) as error:
        given = f"{folder}: {TABLE} is damaged: {type(error).__name__}: {error}"
        raise InputError("a whole table", given, change) from error
    with torch.random.fork_rng(devices=[]):  # weights are drawn here, and thrown away
        model = build_model(config)
    check_state(model, tensors, str(folder))
    fill(model, tensors, str(folder))
    return model.eval(), extra
