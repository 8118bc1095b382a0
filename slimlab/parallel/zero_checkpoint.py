"""Sharded checkpoints: every rank writes its shard, and any number of ranks reads them.

    step_00000120/shard_00000_of_00003.safetensors   rows of weights and of the optimizer's state
                  shard_00001_of_00003.safetensors   cut as they lie on the ranks; rank 0's also
                  shard_00002_of_00003.safetensors   what is not cut
                  state.json                         where each parameter lies in the rows; the rest

All ranks write into a folder with a temporary name, which must be the same folder for all; when all
are done rank 0 writes state.json and renames it. Whatever stops them before, the last checkpoint
stays good. What it holds can be loaded by other numbers of ranks, in another stage, and in one
process; Zero loads checkpoints of one process too (slimlab.train.checkpoint). Chapter 08 uses it.

Production writes while training goes on, and each rank its own list of digests; here rank 0 reads
all files once more for their SHA-256.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import check_number, check_size, require
from slimlab.model.tensor_files import check_state, fill, state_of, sync, write_tensors
from slimlab.parallel.together import with_all
from slimlab.parallel.zero_shards import FlatParameter
from slimlab.parallel.zero_source import (
    FORMAT,
    VERSION,
    WEIGHTS,
    Source,
    find_source,
    find_together,
    is_whole,
    shard_name,
)
from slimlab.train.checkpoint_folder import list_files, prune, remove, remove_leftovers, write_json
from slimlab.train.training_state import IMPLEMENTATION, restore_optimizer


class Sharded(Protocol):
    """What is saved and loaded: slimlab.parallel.zero.Zero, of which these attributes are used."""

    model: nn.Module
    comm: Communicator
    stage: int
    rows: list[FlatParameter]
    optimizer: torch.optim.Optimizer
    num_steps: int


def save_shards(
    zero: Sharded, folder: str | os.PathLike, step: int, extra: dict, keep: int
) -> Path:
    """Write a sharded checkpoint; all ranks call it.

    zero    what is saved
    folder  of the run, the same for all ranks, made if missing
    step    updates made so far
    extra   more that the run needs to go on, for JSON
    keep    so many checkpoints stay, of this step and before it
    returns the path of the checkpoint

    Communicates, raises: as slimlab.parallel.zero.Zero.save says.
    """
    check_size("keep", keep)
    check_number("step", step, int, 0, 10**12)
    comm, folder = zero.comm, Path(folder)
    target, temporary = folder / f"step_{step:08d}", folder / f".step_{step:08d}.shards.tmp"
    try:
        with_all(comm, _make_room, comm.rank, target, temporary)
        path = temporary / shard_name(comm.rank, comm.world_size)
        with_all(comm, write_tensors, path, _my_tensors(zero))
        with_all(comm, _finish, comm.rank, temporary, target, _state_of(zero, step, extra), keep)
    finally:
        if comm.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _make_room(rank: int, target: Path, temporary: Path) -> None:
    if rank:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    if target.exists():
        require(
            not is_whole(target),
            "a step that is not saved yet",
            f"{target}, a whole checkpoint",
            "go on from it, or give another folder",
        )
        remove(target)
    temporary.mkdir()


def _finish(rank: int, temporary: Path, target: Path, state: dict, keep: int) -> None:
    if rank:
        return
    write_json(temporary / "state.json", {**state, "files": list_files(temporary)})
    sync(temporary)
    os.rename(temporary, target)
    sync(target.parent)
    prune(target.parent, state["step"], keep)


def _my_tensors(zero: Sharded) -> dict[str, Tensor]:
    tensors, kinds = {}, kept_kinds(zero.optimizer) if zero.num_steps else []
    for number, flat in enumerate(zero.rows):
        tensors[f"{WEIGHTS}/{number}"] = flat.shard
        for kind in kinds if flat.trained else ():
            row = torch.zeros_like(flat.shard)
            for piece, start, end in flat.pieces:
                row[start:end] = zero.optimizer.state[piece][kind]
            tensors[f"{kind}/{number}"] = row
    if zero.comm.rank == 0:
        tensors |= {f"whole/{name}": tensor for name, tensor in _not_cut(zero).items()}
    return tensors


def _not_cut(zero: Sharded) -> dict[str, Tensor]:
    names = {name for flat in zero.rows for name in flat.names}
    return {n: tensor for n, tensor in state_of(zero.model).items() if n not in names}


def _state_of(zero: Sharded, step: int, extra: dict) -> dict:
    places = {
        name: {"row": number, "offset": end - size}
        for number, flat in enumerate(zero.rows)
        for name, end, size in zip(flat.names, flat.ends, flat.sizes)
    }
    tensors = {
        name: places.get(name, {"row": None, "offset": 0})
        | {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in state_of(zero.model).items()
    }
    groups = [
        {"params": names, "settings": _settings(group)}
        for names, group in zip(_group_names(zero), zero.optimizer.param_groups)
        if names
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": zero.comm.world_size,
        "stage": zero.stage,
        "extra": extra,
        "tensors": tensors,
        "shard_sizes": [flat.shard_size for flat in zero.rows],
        "num_steps": zero.num_steps,
        "kinds": kept_kinds(zero.optimizer) if zero.num_steps else [],
        "groups": groups,
    }


def kept_kinds(optimizer: torch.optim.Optimizer) -> list[str]:
    """Name what an optimizer keeps for each element.

    optimizer  of slimlab.train.optimizer.make_optimizer
    """
    settings = optimizer.param_groups[0]
    if "betas" in settings:
        return ["exp_avg", "exp_avg_sq"]
    return ["momentum_buffer"] if settings["momentum"] else []


def _group_names(zero: Sharded) -> list[list[str]]:
    """Name the parameters that decay, and the others, as parameter_groups would."""
    decaying = {
        name
        for flat in zero.rows
        for name, end in zip(flat.names, flat.ends)
        if end <= flat.num_decaying
    }
    trained = [name for name, param in zero.model.named_parameters() if param.requires_grad]
    return [[name for name in trained if (name in decaying) == one] for one in (True, False)]


def _settings(group: dict) -> dict:
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names", *IMPLEMENTATION)
    }


def load_shards(zero: Sharded, path: str | os.PathLike, say: Callable[[str], None]) -> Source:
    """Read a checkpoint into shards; all ranks call it.

    zero     changed in place, but not if the checkpoint is refused
    path     a checkpoint of any number of ranks or of one process, or the folder of a run
    say      told, on rank 0, of damaged checkpoints that are passed over
    returns  what was read

    Communicates, raises: as slimlab.parallel.zero.Zero.load says.
    """
    found = find_together(zero.comm, Path(path), say)
    source = with_all(zero.comm, _open_for, zero, found)
    with_all(zero.comm, fill_shards, zero, source)
    return source


def _open_for(zero: Sharded, path: Path) -> Source:
    source = Source(path)
    check_state(zero.model, source.shapes, str(path))
    if source.groups is not None:
        mine = [names for names in _group_names(zero) if names]
        same = "freeze the same parameters, and give decay_embeddings"
        source.check_optimizer(mine, kept_kinds(zero.optimizer), same)
    return source


@torch.no_grad()
def fill_shards(zero: Sharded, source: Source) -> None:
    """Read weights and the optimizer's state into shards.

    zero    changed in place; in stages 1 and 2 other ranks' parts of its rows are old afterwards
    source  of the same parameters
    """
    has_optimizer = source.groups is not None
    for flat in zero.rows:
        source.read_shard(WEIGHTS, flat, flat.shard)
        rows = {kind: torch.zeros_like(flat.shard) for kind in source.kinds if flat.trained}
        for kind, row in rows.items():
            source.read_shard(kind, flat, row)
        for piece, start, end in flat.pieces if has_optimizer else ():
            state = {kind: row[start:end].clone() for kind, row in rows.items()}
            if "exp_avg" in rows:
                state["step"] = torch.tensor(float(source.num_steps), dtype=torch.float32)
            zero.optimizer.state[piece] = state
    for name, tensor in _not_cut(zero).items():
        tensor.copy_(source.read(WEIGHTS, name, 0, tensor.numel()).view(tensor.shape))
    if has_optimizer:
        zero.num_steps = source.num_steps
        settings = iter([one["settings"] for one in source.groups])
        for names, group in zip(_group_names(zero), zero.optimizer.param_groups):
            _restore_settings(group, next(settings) if names else {})


def _restore_settings(group: dict, stored: dict) -> None:
    for key, value in stored.items():
        if key in group:  # JSON makes lists of tuples, such as betas
            group[key] = tuple(value) if isinstance(group[key], tuple) else value


def load_whole(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    say: Callable[[str], None] = print,
) -> tuple[int, dict]:
    """Read a sharded checkpoint into a model and an optimizer of one process.

    path       a checkpoint, or the folder of a run, of which the newest whole one is taken
    model      filled in place, on whatever device it lies
    optimizer  likewise, over the parameters of `model`, as make_optimizer groups them; None leaves
               its state
    say        told of damaged checkpoints that are passed over
    returns    the step, and what the run added

    Raises InputError for what is no checkpoint, damaged, or of another model, with the names; model
    and optimizer are then as they were.
    """
    source = Source(find_source(Path(path), say))
    check_state(model, source.shapes, str(source.path))
    if optimizer is not None:
        require(
            source.groups is not None,
            "a checkpoint with the state of an optimizer",
            f"{source.path}, which holds the weights alone",
            "load the model without an optimizer",
        )
        tensors = {}
        for name in (name for group in source.groups for name in group["params"]):
            for kind in source.kinds:
                tensors[f"{kind}/{name}"] = source.whole(kind, name)
            if "exp_avg" in source.kinds:
                tensors[f"step/{name}"] = torch.tensor(float(source.num_steps))
        rest = {"groups": source.groups, "values": {}}
        restore_optimizer(optimizer, model, tensors, rest, str(source.path))
    weights = {name: source.whole(WEIGHTS, name) for name in source.shapes}
    fill(model, weights, str(source.path))
    return source.step, source.extra
