"""Reading of checkpoints in pieces: any part of any tensor, from shards or from a plain checkpoint.

Chapter 08 uses it through slimlab.parallel.zero_checkpoint. A rank that loads asks for the parts of
each parameter that lie in its own shard, wherever they were when they were saved; so the number of
ranks, the stage and the order in the rows may have changed, and no rank reads the whole model.

Production (torch.distributed.checkpoint) plans such reads for all ranks together, so that no byte
is read twice.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import InputError, require
from slimlab.parallel.together import tell, with_all
from slimlab.parallel.zero_shards import FlatParameter
from slimlab.train.checkpoint_folder import (
    checkpoints_in,
    find_checkpoint,
    problem_of_file,
    read_json,
)

FORMAT, VERSION = "slimlab sharded checkpoint", 1
WEIGHTS = "weights"  # the kind of tensor that is no optimizer's
# What state.json must hold, beside format and version.
CONTENT = {
    "step": int, "world_size": int, "num_steps": int, "extra": dict, "tensors": dict,
    "files": dict, "shard_sizes": list, "kinds": list, "groups": list,
}  # fmt: skip


class Source:
    """A checkpoint on the disk, whole, of which parts can be read.

    path   its folder, which find_source returned

    state       what its state.json holds
    shapes      name -> a tensor of its shape and dtype, without memory (device "meta")
    kinds       names of what the optimizer keeps for each element, such as "exp_avg"
    groups      the optimizer's groups: names and settings; None: there is no optimizer's state
    num_steps   updates that the optimizer has made

    Raises InputError for an optimizer that has updated some parameters more often than others.
    """

    def __init__(self, path: Path):
        self.path, self.state = path, read_json(path / "state.json")
        state = self.state
        self.step, self.extra = state["step"], state["extra"]
        self._files: dict[str, safe_open] = {}
        if self.is_sharded:
            self._places = state["tensors"]
            self.kinds, self.groups = state["kinds"], state["groups"]
            listed = {n: (one["shape"], one["dtype"]) for n, one in self._places.items()}
            self.shapes = {
                n: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
                for n, (shape, dtype) in listed.items()
            }
        else:
            file = self._file("model.safetensors")
            names = self._names("model.safetensors")
            self.shapes = {name: file.get_tensor(name).to("meta") for name in names}
            self.groups = state["optimizer"]["groups"] if "optimizer" in state else None
            names = self._names("optimizer.safetensors") if self.groups else []
            self.kinds = sorted({name.partition("/")[0] for name in names} - {"step"})
        self.num_steps = self._count_steps() if self.groups else 0

    @property
    def is_sharded(self) -> bool:
        """Whether ranks wrote it, each its shard."""
        return self.state["format"] == FORMAT

    def check_optimizer(self, mine: list[list[str]], kinds: list[str], same: str) -> None:
        """Refuse an optimizer's state of other parameters, or of another optimizer.

        mine   names of the parameters in each group of the optimizer that is to be filled
        kinds  names of what it keeps for each element
        same   what must be as in the run that saved, so that the groups are equal

        Raises InputError.
        """
        given = [one["params"] for one in self.groups]
        require(
            given == mine,
            f"an optimizer state of {sum(map(len, mine))} parameters in {len(mine)} groups",
            f"{self.path}: {sum(map(len, given))} in {len(given)} groups, or others, or another "
            "order",
            f"{same} as in the run that saved",
        )
        require(
            self.kinds in ([], kinds),
            f"a state of {', '.join(kinds) or 'an optimizer without a memory'}",
            f"{self.path}: {', '.join(self.kinds)}",
            "give the optimizer of the run that saved",
        )

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Read some elements of a parameter, or of what an optimizer keeps for them.

        kind     WEIGHTS, or one of kinds
        name     of the parameter
        start    number of the first element, the parameter taken as one row
        stop     number of the first that is not wanted
        returns  (stop - start,) on the CPU
        """
        if not self.is_sharded:
            is_weights = kind == WEIGHTS
            file = self._file("model.safetensors" if is_weights else "optimizer.safetensors")
            whole = file.get_tensor(name if is_weights else f"{kind}/{name}")
            return whole.reshape(-1)[start:stop].clone()
        place = self._places[name]
        if place["row"] is None:
            whole = self._file(_shard(self.state, 0)).get_tensor(f"whole/{name}")
            return whole.reshape(-1)[start:stop].clone()
        size = self.state["shard_sizes"][place["row"]]
        begin, end, parts = place["offset"] + start, place["offset"] + stop, []
        for rank in range(begin // size, -(-end // size)):
            part = self._file(_shard(self.state, rank)).get_slice(f"{kind}/{place['row']}")
            parts.append(part[max(begin - rank * size, 0) : min(end - rank * size, size)])
        return torch.cat(parts)

    def read_shard(self, kind: str, flat: FlatParameter, shard: Tensor) -> None:
        """Read what lies in this rank's shard of a row.

        kind   as in read
        flat   the row
        shard  (shard_size,) filled in place, but for the zeros behind the last parameter
        """
        first, last = flat.start, flat.start + flat.shard_size
        for name, end, size in zip(flat.names, flat.ends, flat.sizes):
            begin = end - size
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                part = self.read(kind, name, start - begin, stop - begin)
                shard[start - first : stop - first].copy_(part)

    def whole(self, kind: str, name: str) -> Tensor:
        """Read all of a parameter, or of what an optimizer keeps for it, in its shape.

        kind, name  as in read
        """
        shape = self.shapes[name].shape
        return self.read(kind, name, 0, shape.numel()).view(shape)

    def tensors_of(self, file_name: str) -> dict[str, Tensor]:
        """Read all tensors of one file.

        file_name  in the folder
        """
        file = self._file(file_name)
        return {name: file.get_tensor(name).clone() for name in self._names(file_name)}

    def _count_steps(self) -> int:
        if self.is_sharded:
            return self.state["num_steps"]
        if "exp_avg" not in self.kinds:
            return self.step
        file = self._file("optimizer.safetensors")
        names = [n for n in self._names("optimizer.safetensors") if n.startswith("step/")]
        counts = {name: int(file.get_tensor(name)) for name in names}
        trained = [name for group in self.groups for name in group["params"]]
        odd = [n for n in trained if counts.get(f"step/{n}") != max(counts.values())]
        require(
            not odd,
            "an optimizer's state with one count of steps for all parameters",
            f"{self.path}: fewer steps for {', '.join(odd[:4])}",
            "freeze what is not used in every step, or load the model without its optimizer",
        )
        return max(counts.values())

    def _names(self, file_name: str) -> list[str]:
        return list(self._file(file_name).keys())

    def _file(self, name: str) -> safe_open:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.path / name, "pt")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    "a whole safetensors file", f"{self.path / name}: {error}", "copy it again"
                ) from error
        return self._files[name]


def find_source(path: Path, say: Callable[[str], None]) -> Path:
    """Find the checkpoint that a person means, one that ranks wrote or one of slimlab.train.

    path     a checkpoint, or the folder of a run, of which the newest whole one that ranks wrote is
             taken, or else the newest of one process
    say      told of damaged ones that are passed over
    returns  the folder of a whole checkpoint

    Raises InputError that says what was found instead.
    """
    is_named = (path / "state.json").exists()
    for one in [path] if is_named else checkpoints_in(path)[::-1]:
        state = _sharded_state(one)
        problem = None if state is None else _problem_of(one, state)
        if state is not None and problem is None:
            return one
        change = "take an older checkpoint of the same run, or copy this one again"
        require(not (is_named and problem), "a whole checkpoint", f"{one}: {problem}", change)
        if problem:
            say(f"skipped the damaged checkpoint {one}: {problem}")
    return find_checkpoint(path, say)


def find_together(comm: Communicator, path: Path, say: Callable[[str], None]) -> Path:
    """Find the same checkpoint on all ranks, as find_source does.

    comm       of the ranks that load it
    path, say  as there; rank 0 looks

    Communicates: one all_gather and one broadcast of a text.
    """
    return path / tell(comm, with_all(comm, _find, comm.rank, path, say))


def _find(rank: int, path: Path, say: Callable[[str], None]) -> str:
    return "" if rank else str(find_source(path, say).relative_to(path))


def is_whole(path: Path) -> bool:
    """Tell whether a folder is a sharded checkpoint without damage.

    path  a folder
    """
    state = _sharded_state(path)
    return state is not None and _problem_of(path, state) is None


def _problem_of(path: Path, state: dict) -> str | None:
    if state.get("version") != VERSION:
        return f"it is of version {state.get('version')}, this program knows {VERSION}"
    for key, kind in CONTENT.items():
        if not isinstance(state.get(key), kind):
            return f"state.json has no {key}"
    files, world_size = state["files"], state["world_size"]
    for rank in range(max(1, world_size)):
        name = shard_name(rank, world_size)
        one = files.get(name)
        if not (isinstance(one, dict) and {"bytes", "sha256"} <= one.keys()):
            return f"state.json does not list {name}"
        if problem := problem_of_file(path / name, one["bytes"], one["sha256"]):
            return f"{name} {problem}"
    return None


def _sharded_state(path: Path) -> dict | None:
    try:
        state = read_json(path / "state.json")
    except InputError:
        return None
    return state if state.get("format") == FORMAT else None


def _shard(state: dict, rank: int) -> str:
    return shard_name(rank, state["world_size"])


def shard_name(rank: int, world_size: int) -> str:
    """Name the file of a rank's shard.

    rank        that wrote it
    world_size  number of ranks that did
    """
    return f"shard_{rank:05d}_of_{world_size:05d}.safetensors"
