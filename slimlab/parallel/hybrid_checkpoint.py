"""Checkpoints of a model that lies cut on a mesh, in the form that one process writes and reads.

Chapter 11 uses them. What is saved is the whole model and the whole state of its optimizer, by the
names of the parameters, in the files of slimlab.train.checkpoint; so a run goes on in any layout,
and in one process, which cannot tell the difference. Each rank that loads takes its part of each
parameter, one parameter at a time; shards that slimlab.parallel.zero has saved can be loaded too.

Rank 0 has to hold it all for a moment, on its processor's side. Production (Megatron-LM's
distributed checkpoint, torch.distributed.checkpoint) lets each rank write what it has, as
slimlab.parallel.zero_checkpoint does for shards, and cuts anew on loading.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from slimlab.config import require
from slimlab.model.build import build_model
from slimlab.model.tensor_files import check_state
from slimlab.parallel.hybrid import Hybrid
from slimlab.parallel.tensor_state import gather_whole, part_of
from slimlab.parallel.together import with_all
from slimlab.parallel.zero_checkpoint import fill_shards, kept_kinds
from slimlab.parallel.zero_source import WEIGHTS, Source, find_together
from slimlab.train.checkpoint import Checkpoint, write_checkpoint
from slimlab.train.checkpoint_folder import read_json
from slimlab.train.training_state import IMPLEMENTATION


def save_hybrid(
    hybrid: Hybrid,
    folder: str | os.PathLike,
    step: int,
    *,
    data_position: int | None = None,
    random_state: dict[str, Tensor] | None = None,
    config: dict | None = None,
    extra: dict | None = None,
    keep: int = 2,
) -> Path:
    """Write a checkpoint of the whole model; all ranks call it.

    hybrid   what is saved
    folder   of the run; rank 0 alone writes into it
    step     updates made so far
    data_position, random_state, config, extra, keep  as in slimlab.train.checkpoint.save_checkpoint
    returns  the path of the checkpoint, on every rank

    Communicates: for each tensor all_gathers along the axes that cut it, and a message to rank 0;
    then one all_gather of a text.
    Raises InputError, on every rank, as save_checkpoint does; the last checkpoint is untouched.
    """
    kinds = kept_kinds(hybrid.optimizer) if hybrid.num_steps else []
    tensors = {"model": _on_first(hybrid, WEIGHTS), "random": random_state or {}, "optimizer": {}}
    for kind in kinds:
        named = _on_first(hybrid, kind)
        tensors["optimizer"] |= {f"{kind}/{name}": one for name, one in named.items()}
    trained = [name for names, _ in hybrid.groups for name in names]
    if "exp_avg" in kinds:
        count = float(hybrid.num_steps)
        tensors["optimizer"] |= {f"step/{name}": torch.tensor(count) for name in trained}
    state = {
        "data_position": step if data_position is None else data_position,
        "extra": extra or {},
        "optimizer": {"groups": _group_states(hybrid), "values": {}},
    }
    args = (Path(folder), step, tensors, state, config or {}, keep)
    with_all(hybrid.comm, _write_on_first, hybrid.comm.rank, args)
    return Path(folder) / f"step_{step:08d}"


def load_hybrid(
    hybrid: Hybrid, path: str | os.PathLike, say: Callable[[str], None] = print
) -> Checkpoint:
    """Go on from a checkpoint of any layout, of one process or of ZeRO; all ranks call it.

    hybrid   changed in place, but not if the checkpoint is refused
    path     a checkpoint, or the folder of a run, of which the newest whole one is taken; the same
             files on every rank
    say      told, on rank 0, of damaged checkpoints that are passed over
    returns  what the checkpoint says; the random states are returned, not set

    Communicates: three all_gathers and a broadcast of a text; with ZeRO 1 and 2 one all_gather per
    flat parameter.
    Raises InputError, on every rank, for what is no checkpoint, damaged, or of another model, with
    the names; nothing is then changed.
    """
    found = find_together(hybrid.comm, Path(path), say)
    source = with_all(hybrid.comm, _open_for, hybrid, found)
    with_all(hybrid.comm, _read_into, hybrid, source)
    if hybrid.parallel.zero_stage:
        hybrid.replica.buckets.renew_weights()
    hybrid.num_steps = source.num_steps
    hybrid.forget_gradients()
    state, random = source.state, {}
    if not source.is_sharded:
        random = source.tensors_of("random.safetensors")
    config = found / "config.json"
    return Checkpoint(
        path=found,
        step=source.step,
        data_position=state.get("data_position", source.step),
        config=read_json(config) if config.exists() else {},
        extra=source.extra,
        random_state=random,
    )


class PartSource(Source):
    """A checkpoint of whole parameters, of which a rank reads its part.

    path    of the checkpoint
    hybrid  what it is read for

    Raises InputError as Source does.
    """

    def __init__(self, path: Path, hybrid: Hybrid):
        super().__init__(path)
        self._model = hybrid.model

    def part(self, kind: str, name: str) -> Tensor:
        """Read this rank's part of a parameter, or of what an optimizer keeps for it.

        kind, name  as in Source.read
        """
        shape = self.shapes[name].shape
        whole = super().read(kind, name, 0, shape.numel()).view(shape)
        return part_of(self._model, name, whole)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Read some elements of this rank's part.

        kind, name, start, stop  as in Source.read, but the part is taken as one row
        """
        return self.part(kind, name).reshape(-1)[start:stop].clone()


def _on_first(hybrid: Hybrid, kind: str) -> dict[str, Tensor]:
    """Bring the whole of a kind of tensor to rank 0, parameter by parameter; others get nothing.

    The replica with coordinate 0 does it; with ZeRO every replica has parts of the rows.
    """
    local, found = _local(hybrid, kind), {}
    replica, stage, part = hybrid.coordinates
    if replica:
        return found
    stages = hybrid.mesh.group("pipeline")
    for name in hybrid.names:
        owner = hybrid.owners[name] if hybrid.pipeline else 0
        tensor = local.pop(name, None) if owner == stage else None
        if tensor is not None:
            tensor = gather_whole(hybrid.model, {name: tensor})[name]
        if owner and part == 0 and name in _kept_names(hybrid, kind):
            if stage == owner:
                stages.send(tensor, 0)
            elif stage == 0:
                tensor = stages.recv(owner)
        if tensor is not None and hybrid.comm.rank == 0:
            found[name] = tensor.cpu()
    return found


def _kept_names(hybrid: Hybrid, kind: str) -> set[str]:
    """Name the parameters that have such a tensor, on whatever stage."""
    if kind == WEIGHTS:
        return set(hybrid.names)
    return {name for names, _ in hybrid.groups for name in names}


def _local(hybrid: Hybrid, kind: str) -> dict[str, Tensor]:
    """Return what this rank's tensor group shares, whole along the axis data."""
    if not hybrid.parallel.zero_stage:
        named, state = dict(hybrid.model.named_parameters()), hybrid.optimizer.state
        if kind == WEIGHTS:
            return named
        return {name: state[param][kind] for name, param in named.items() if param in state}
    zero, found = hybrid.replica, {}
    if kind == WEIGHTS:
        return zero.full_weights()
    for flat in zero.rows:
        row = torch.zeros_like(flat.shard)
        for piece, start, end in flat.pieces:
            row[start:end] = zero.optimizer.state[piece][kind]
        if flat.trained:
            found |= dict(zip(flat.names, flat.views(zero.comm.all_gather(row))))
    return found


def _group_states(hybrid: Hybrid) -> list[dict]:
    """Describe the groups that one process would have, with the settings of this rank's."""
    settings = {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in hybrid.optimizer.param_groups[0].items()
        if key not in ("params", "param_names", *IMPLEMENTATION)
    }
    no_decay = {**settings, "weight_decay": 0.0}
    return [
        {"params": names, "settings": settings if decays else no_decay}
        for names, decays in hybrid.groups
    ]


def _write_on_first(rank: int, args: tuple) -> None:
    if rank == 0:
        write_checkpoint(*args)


def _open_for(hybrid: Hybrid, path: Path) -> PartSource:
    source = PartSource(path, hybrid)
    with torch.device("meta"):
        whole = build_model(hybrid.model.config)
    whole.to(next(iter(hybrid.model.parameters())).dtype)
    check_state(whole, source.shapes, str(path))
    require(
        source.groups is not None,
        "a checkpoint with the state of an optimizer",
        f"{path}, which holds the weights alone",
        "load the weights into the model before it is cut",
    )
    mine = [names for names, _ in hybrid.groups]
    source.check_optimizer(mine, kept_kinds(hybrid.optimizer), "freeze the same parameters")
    return source


@torch.no_grad()
def _read_into(hybrid: Hybrid, source: PartSource) -> None:
    if hybrid.parallel.zero_stage:
        fill_shards(hybrid.replica, source)
        return
    optimizer = hybrid.optimizer
    trained = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in hybrid.model.named_parameters():
        param.copy_(source.part(WEIGHTS, name))
        if param not in trained or not source.kinds:
            continue
        state = {kind: torch.empty_like(param) for kind in source.kinds}
        for kind, tensor in state.items():
            tensor.copy_(source.part(kind, name))
        if "exp_avg" in state:
            state["step"] = torch.tensor(float(source.num_steps), dtype=torch.float32)
        optimizer.state[param] = state
    for group in optimizer.param_groups:
        name = group["param_names"][0]
        stored = next(one["settings"] for one in source.groups if name in one["params"])
        group |= {key: _like(group[key], one) for key, one in stored.items() if key in group}


def _like(now: object, stored: object) -> object:
    """JSON makes lists of tuples, such as betas."""
    return tuple(stored) if isinstance(now, tuple) else stored
