"""Checkpoints: all of a training run in one folder, there whole or not at all.

    step_00000120/model.safetensors      parameters and buffers
                  optimizer.safetensors  its state, by the names of the parameters
                  random.safetensors     the states of the random generators
                  config.json            what was trained, and how
                  state.json             step, place in the data, settings, sizes and SHA-256

The folder is written under a temporary name, put on the disk with fsync and then renamed, which the
file system does at once or not at all; older ones are removed only after that. So whenever a run is
killed, the newest folder called step_... is whole. Chapter 05 kills one to show it.

Production writes a shard per rank, from a copy and while training goes on
(torch.distributed.checkpoint); chapter 12 comes back to that.
"""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab import __version__
from slimlab.config import InputError, check_number, check_size, require
from slimlab.model.tensor_files import (
    check_state,
    fill,
    read_tensors,
    state_of,
    sync,
    write_tensors,
)
from slimlab.train.checkpoint_folder import (
    FORMAT,
    VERSION,
    find_checkpoint,
    latest,
    list_files,
    problem_of,
    prune,
    read_json,
    remove,
    remove_leftovers,
    write_json,
)
from slimlab.train.training_state import optimizer_state, restore_optimizer


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says, apart from the tensors of model and optimizer.

    path           its folder
    step           updates that were made
    data_position  where in the data to go on
    config         what config.json holds
    extra          what the run added, for instance the state of a loss scaler
    random_state   states of the generators, by kind of device
    """

    path: Path
    step: int
    data_position: int
    config: dict
    extra: dict
    random_state: dict[str, Tensor] = field(repr=False)


def save_checkpoint(
    folder: str | os.PathLike,
    *,
    model: nn.Module,
    step: int,
    optimizer: torch.optim.Optimizer | None = None,
    data_position: int | None = None,
    random_state: dict[str, Tensor] | None = None,
    config: dict | None = None,
    extra: dict | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint into `folder`, whole, then remove the older ones.

    folder         of one run, to which one process writes; made if missing
    model          any module
    step           updates made so far; gives the checkpoint its name
    optimizer      over the model's parameters; None keeps the weights alone
    data_position  where in the data to go on; defaults to step
    random_state   what training_state.random_state returned
    config         what was trained and how: configurations by name, or anything that JSON holds
    extra          more that the run needs to go on, for JSON
    keep           so many stay, of this step and before it
    returns        the path of the checkpoint

    Raises InputError if a whole checkpoint of this step is there already, and if writing fails (a
    full disk, no permission); it then names the last good checkpoint, which is untouched.
    """
    tensors = {"model": state_of(model), "random": random_state or {}}
    state = {"data_position": step if data_position is None else data_position}
    state["extra"] = extra or {}
    if optimizer is not None:
        tensors["optimizer"], state["optimizer"] = optimizer_state(optimizer, model)
    return write_checkpoint(folder, step, tensors, state, config or {}, keep)


def write_checkpoint(
    folder: str | os.PathLike,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict,
    config: dict,
    keep: int = 2,
) -> Path:
    """Write a checkpoint of tensors that are at hand, as save_checkpoint does.

    folder, step, config, keep  as there
    tensors  "model", "random" and, if it is kept, "optimizer": each of them names and tensors
    state    data_position, extra and, if it is kept, "optimizer": the rest of optimizer_state
    returns  the path of the checkpoint

    Raises InputError as save_checkpoint does.
    """
    check_size("keep", keep)
    check_number("step", step, int, 0, 10**12)
    folder = Path(folder)
    target = folder / f"step_{step:08d}"
    temporary = folder / f".step_{step:08d}.{os.getpid()}.tmp"
    versions = {"slimlab": __version__, "torch": torch.__version__}
    versions["python"] = platform.python_version()
    state = {"format": FORMAT, "version": VERSION, "step": step, **state, "versions": versions}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        _make_room(target)
        temporary.mkdir()
        _write_files(temporary, tensors, state, {"format": FORMAT, **_plain(config)})
        os.rename(temporary, target)
        sync(folder)
    except OSError as error:
        raise _could_not_save(folder, target, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, step, keep)
    return target


def _write_files(folder: Path, tensors: dict, state: dict, config: dict) -> None:
    for name, named in tensors.items():
        write_tensors(folder / f"{name}.safetensors", named, {"format": FORMAT})
    write_json(folder / "config.json", config)
    write_json(folder / "state.json", {**state, "files": list_files(folder)})
    sync(folder)


def _plain(config: dict) -> dict:
    return {key: asdict(one) if is_dataclass(one) else one for key, one in config.items()}


def _make_room(target: Path) -> None:
    if target.exists():
        require(
            problem_of(target) is not None,
            "a step that is not saved yet",
            f"{target}, a whole checkpoint",
            "go on from it, or give another folder",
        )
        remove(target)


def _could_not_save(folder: Path, target: Path, error: OSError) -> InputError:
    good = latest(folder, say=lambda _: None) if folder.is_dir() else None
    kept = f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    return InputError(
        "a checkpoint that can be written",
        f"{target}: {error.strerror or error}; {kept}",
        "make room on the disk, or choose another folder; then go on from the last good one",
    )


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    say: Callable[[str], None] = print,
) -> Checkpoint:
    """Read a checkpoint into a model and an optimizer that were built like those that were saved.

    path       a checkpoint, or the folder of a run, of which the newest whole one is taken
    model      filled in place, on whatever device it lies; None leaves the weights
    optimizer  likewise; over the parameters of `model`
    say        told of damaged checkpoints that are passed over
    returns    a Checkpoint; random states are returned, not set

    Raises InputError for what is no checkpoint, truncated, changed, pickled, of a newer form, or of
    another model; model and optimizer are then as they were.
    """
    path = find_checkpoint(path, say)
    state = read_json(path / "state.json")
    stored = {
        name: read_tensors(path / name) for name in state["files"] if name.endswith("tensors")
    }
    if model is not None:
        check_state(model, stored["model.safetensors"], str(path))
    if optimizer is not None:
        require(
            "optimizer" in state,
            "a checkpoint with the state of an optimizer",
            f"{path}, which holds the weights alone",
            "load the model without an optimizer",
        )
        tensors = stored["optimizer.safetensors"]
        restore_optimizer(optimizer, model, tensors, state["optimizer"], str(path))
    if model is not None:
        fill(model, stored["model.safetensors"], str(path))
    return Checkpoint(
        path=path,
        step=state["step"],
        data_position=state["data_position"],
        config=read_json(path / "config.json"),
        extra=state["extra"],
        random_state=stored["random.safetensors"],
    )
