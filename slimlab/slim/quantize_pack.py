"""Integers of 8, 4, 3 or 2 bits, packed into bytes, and the folder in which they are stored.

    quantized.safetensors  NAME.packed, NAME.scale, NAME.zero_point; other tensors by their name
    quantized.json         which tensor has which map and shape, size and SHA-256 of the file

The folder is written under a temporary name and then renamed, as slimlab.train.checkpoint does;
what is read back is what was written, bit for bit. Chapter 14 weighs the file;
slimlab.plan.quantized_size predicts its bytes.

Production packs in the order of a kernel's loads: here a row is packed from left to right.
"""

import os
import shutil
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path

import torch
from torch import Tensor

from slimlab.config import InputError, require
from slimlab.model.tensor_files import read_tensors, sync, write_tensors
from slimlab.plan.quantized_size import QuantScheme, stored_parts
from slimlab.slim.quantize_maps import Quantized, check_finite
from slimlab.train.checkpoint_folder import list_files, problem_of_file, read_json, write_json

FORMAT, VERSION = "slimlab quantized", 1
TENSORS, TABLE = "quantized.safetensors", "quantized.json"
METADATA = {"format": FORMAT}
_KINDS = {"I8": torch.int8, "U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """What a folder of quantized tensors holds.

    tensors  name -> a Quantized, or a Tensor that was not quantized
    config   what was given to save_quantized
    """

    tensors: dict[str, Quantized | Tensor]
    config: dict


def pack(integers: Tensor, scheme: QuantScheme) -> Tensor:
    """Put integers side by side into bytes, row by row, the first one lowest.

    integers  (..., I), as a Quantized holds them
    scheme    its width, and whether it is symmetric
    returns   (..., ceil(I * num_bits / 8)) uint8; the last byte of a row is filled with zeros. 8
              bits fill a byte already and are returned as they are.
    """
    if scheme.num_bits == 8:
        return integers
    codes = (integers.to(torch.int16) - scheme.lowest).to(torch.uint8)
    width = _field(scheme)
    fields = _split(codes, scheme.num_bits, width)
    per_byte = 8 // width
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[-1] % per_byte))
    places = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
    return (fields.unflatten(-1, (-1, per_byte)) << places).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: Tensor, num_columns: int, scheme: QuantScheme) -> Tensor:
    """Undo pack.

    packed       (..., ceil(I * num_bits / 8))
    num_columns  I
    scheme       the one that was given to pack
    returns      (..., I) int8 if symmetric, else uint8
    """
    if scheme.num_bits == 8:
        return packed
    width = _field(scheme)
    per_code = scheme.num_bits // width
    fields = _split(packed, 8, width)[..., : num_columns * per_code]
    codes = fields
    if per_code > 1:
        places = torch.arange(0, scheme.num_bits, width, dtype=torch.uint8, device=packed.device)
        codes = (fields.unflatten(-1, (-1, per_code)) << places).sum(dim=-1, dtype=torch.uint8)
    if not scheme.symmetric:
        return codes
    return codes.to(torch.int8) + scheme.lowest


def _field(scheme: QuantScheme) -> int:
    """Bits that are moved at once: all of an integer, or one if integers cross bytes."""
    return scheme.num_bits if 8 % scheme.num_bits == 0 else 1


def _split(numbers: Tensor, num_bits: int, width: int) -> Tensor:
    """Cut every number of so many bits into fields of a width, the lowest first."""
    places = torch.arange(0, num_bits, width, dtype=torch.uint8, device=numbers.device)
    return ((numbers[..., None] >> places) & (2**width - 1)).flatten(-2)


def parts_of(quantized: Quantized) -> dict[str, Tensor]:
    """Return the tensors that are stored for a quantized one.

    quantized  any
    returns    "packed", "scale" and, if not symmetric, "zero_point", in the types of the file
    """
    scheme = quantized.scheme
    kind, _ = stored_parts(tuple(quantized.integers.shape), scheme)["scale"]
    parts = {"packed": pack(quantized.integers, scheme), "scale": quantized.scale.to(_KINDS[kind])}
    if quantized.zero_point is not None:
        parts["zero_point"] = quantized.zero_point
    return parts


def from_parts(parts: dict[str, Tensor], shape: tuple[int, ...], scheme: QuantScheme) -> Quantized:
    """Undo parts_of.

    parts    what parts_of returned
    shape    of the tensor
    scheme   its map
    returns  a Quantized

    Raises InputError if the parts are not those of this shape and map, or a scale is not a finite
    number above 0.
    """
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts.items()}
    wanted = {
        name: (_KINDS[kind], tuple(part))
        for name, (kind, part) in stored_parts(tuple(shape), scheme).items()
    }
    change = "the file is damaged or of another map: quantize the original again"
    require(found == wanted, f"the parts {wanted}", f"{found}", change)
    scale = parts["scale"].float()
    check_finite(scale, "the scales")
    lowest = float(scale.min())
    require(lowest > 0, "scales above 0", f"a scale of {lowest:g}", change)
    integers = unpack(parts["packed"], shape[-1], scheme)
    return Quantized(integers, scale, parts.get("zero_point"), scheme)


def save_quantized(
    folder: str | os.PathLike, tensors: dict[str, Quantized | Tensor], config: dict | None = None
) -> Path:
    """Write tensors, quantized or not, into a new folder, whole or not at all.

    folder   made here; its parent must exist
    tensors  by name
    config   more for the table, for JSON
    returns  the folder

    Raises InputError if the folder is there already, or cannot be written.
    """
    folder = Path(folder)
    change = "give a new name, or remove the old folder yourself"
    require(not os.path.lexists(folder), "a folder that does not exist", str(folder), change)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    stored, maps = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantized):
            maps[name] = {"shape": list(tensor.integers.shape), "scheme": asdict(tensor.scheme)}
            stored |= {f"{name}.{part}": one for part, one in parts_of(tensor).items()}
        else:
            stored[name] = tensor
    table = {"format": FORMAT, "version": VERSION, "maps": maps, "config": config or {}}
    try:
        temporary.mkdir()
        write_tensors(temporary / TENSORS, stored, METADATA)
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


def load_quantized(folder: str | os.PathLike) -> Stored:
    """Read what save_quantized wrote.

    folder   its folder
    returns  the tensors, bit for bit, and the config

    Raises InputError for a folder of another form, an ordinary checkpoint among them, and for a
    file that is cut off, changed or of a later version.
    """
    folder = Path(folder)
    asked = f"a folder of quantized weights, with {TABLE}"
    ordinary = any((folder / name).exists() for name in ("state.json", "model.safetensors"))
    change = "slimlab.train.checkpoint reads ordinary ones" if ordinary else "check the path"
    kind = "an ordinary checkpoint" if ordinary else f"no {TABLE} in it"
    require((folder / TABLE).is_file(), asked, f"{folder}: {kind}", change)
    table = read_json(folder / TABLE)
    given = f"{folder}: format {table.get('format')!r}"
    require(table.get("format") == FORMAT, asked, given, "check the path")
    version = table.get("version")
    asked, change = f"version {VERSION} of the form", "update slimlab"
    require(version == VERSION, asked, f"{folder}: version {version!r}", change)
    try:
        written = table["files"][TENSORS]
        problem = problem_of_file(folder / TENSORS, written["bytes"], written["sha256"])
        maps = {
            name: (tuple(index(size) for size in one["shape"]), QuantScheme(**one["scheme"]))
            for name, one in table["maps"].items()
        }
        config = dict(table["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        given = f"{folder}: {TABLE} is damaged: {error}"
        raise InputError("a whole table", given, "copy the folder again") from error
    asked, change = "whole quantized weights", "copy the folder again"
    require(problem is None, asked, f"{folder}: {TENSORS} {problem}", change)
    return Stored(_join(read_tensors(folder / TENSORS), maps, folder), config)


def _join(stored: dict[str, Tensor], maps: dict, folder: Path) -> dict[str, Quantized | Tensor]:
    tensors = {}
    for name, (shape, scheme) in maps.items():
        names = {part: f"{name}.{part}" for part in stored_parts(shape, scheme)}
        missing = [one for one in names.values() if one not in stored]
        asked, change = f"the parts of {name}", "quantize the original again"
        require(not missing, asked, f"{folder}: {', '.join(missing)} missing", change)
        parts = {part: stored.pop(one) for part, one in names.items()}
        tensors[name] = from_parts(parts, shape, scheme)
    return {**tensors, **stored}
