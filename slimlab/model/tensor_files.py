"""Tensors in files: written whole or not at all, read without ever running what is in them.

The form is safetensors: a length, a JSON table of names, types, shapes and places, then the bytes.
A file of torch.save is a pickle, and a pickle is a program that runs when it is opened, so those
are refused. Chapter 05 uses it for checkpoints, slimlab.model.pretrained for weights of others.

Production writes each rank's shard to its own file, from a copy in another thread, and into an
object store.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimlab.config import InputError, require

PICKLED_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file that is on the disk, whole, when this returns.

    path      the file; its folder must exist
    tensors   names and tensors, of any device; two that share memory are written twice
    metadata  texts for the file's table

    Raises OSError, as open does, if the file cannot be written (no space, no permission).
    """
    path = Path(path)
    # Contiguous copies of their own, since the library refuses views and shared memory.
    own = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    seen = set()
    for name, tensor in own.items():
        if tensor.untyped_storage().data_ptr() in seen:
            own[name] = tensor.clone()
        seen.add(own[name].untyped_storage().data_ptr())
    mode = _mode_of_new_files(path)
    try:
        save_file(own, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error
    os.chmod(path, mode)  # the library makes files that nobody else may read
    sync(path)


def _mode_of_new_files(path: Path) -> int:
    with open(path, "ab") as file:
        return os.fstat(file.fileno()).st_mode & 0o777


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk.

    path  the file or folder
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    path     the file
    returns  names and tensors on the CPU, in memory of their own

    Raises InputError if there is no such file, or it is cut off, pickled or of another form; it
    says what was found.
    """
    path = Path(path)
    check_not_pickled(path)
    try:
        # Copies: the library's tensors are windows on the file, which may be removed or cut.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError) as error:
        size_bytes = path.stat().st_size if path.is_file() else 0
        raise InputError(
            "a whole safetensors file",
            f"{path}, {size_bytes:,} bytes: {str(error).removeprefix('Error while ')}",
            "the file is cut off, damaged or of another form: copy it again and compare sizes",
        ) from error


def check_not_pickled(path: Path) -> None:
    """Refuse what is no file, and files that could only be read by running them.

    path  the file

    Raises InputError that says which of both it is.
    """
    require(path.is_file(), "a file", f"{path}, no file of that name", "check the path")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        given = f"{path}: {error.strerror}"
        raise InputError("a file that can be read", given, "check its permissions") from error
    pickled = start.startswith(_PICKLE_STARTS) or path.suffix.lower() in PICKLED_SUFFIXES
    require(
        not pickled,
        "weights as safetensors, which are data and nothing else",
        f"{path}, a pickle, as torch.save writes it: reading it would run a program inside it",
        "take the .safetensors file of the same model; if you trust the source, convert it once, "
        "in an environment of its own: torch.load(..., weights_only=True), "
        "safetensors.torch.save_file",
    )


def fill(model: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the parameters and buffers of a model that have their names.

    model    changed in place; stays on its device; tied parameters count once
    tensors  exactly the names, shapes and dtypes of state_of(model)
    source   where they come from, for messages

    Raises InputError as check_state does; the model is then as it was.
    """
    check_state(model, tensors, source)
    with torch.no_grad():
        for name, tensor in state_of(model).items():
            tensor.copy_(tensors[name])


def check_state(model: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Refuse tensors that are not those of a model.

    model    what they are for
    tensors  by name
    source   where they come from, for messages

    Raises InputError that names what is missing, left over, or of another shape or dtype.
    """
    wanted = state_of(model)
    missing = [name for name in wanted if name not in tensors]
    surplus = [name for name in tensors if name not in wanted]
    change = "build the model with the configuration that is stored beside the weights"
    require(
        not missing and not surplus,
        f"the tensors of this {type(model).__name__}, {len(wanted)} names",
        f"{source}: missing {_listed(missing)}; left over {_listed(surplus)}",
        change,
    )
    for name, tensor in wanted.items():
        kinds = [f"{tuple(t.shape)} {t.dtype}" for t in (tensor, tensors[name])]
        require(kinds[0] == kinds[1], f"{name} {kinds[0]}", f"{source}: {kinds[1]}", change)


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model, the tied ones once.

    model  any module
    """
    state, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            state[name] = tensor
            seen.add(id(tensor))
    return state


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
