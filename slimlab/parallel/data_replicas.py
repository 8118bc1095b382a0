"""Replicas: models of several ranks that are equal at the start and are looked at later.

Chapter 08 uses it. Every rank must begin with the same weights; after that equal updates keep them
equal, and nothing needs to be sent again. A program that goes wrong there (another seed for a new
layer, a rank that skips a step) trains on, and its loss looks right: so compare now and then.

Production (DistributedDataParallel) broadcasts in the same way, and buffers before every forward
pass; it never compares weights later.
"""

import hashlib

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError
from slimlab.parallel.data_buckets import bucket_layout


@torch.no_grad()
def broadcast_model(
    model: nn.Module, comm: Communicator, src: int = 0, *, bucket_bytes: int | None = None
) -> None:
    """Give every rank's model the parameters and buffers of one rank's.

    model         changed in place, but for src's
    comm          of the ranks that hold replicas
    src           the rank whose weights all get
    bucket_bytes  tensors that travel together, at most, as in data_buckets.bucket_layout

    Communicates: one all_gather of 8 bytes, then one broadcast per bucket.
    Raises InputError, on every rank, if the models differ in names, shapes, dtypes, or in what is
    to be trained.
    """
    state = _state(model)
    described = [(n, tuple(t.shape), str(t.dtype), t.requires_grad) for n, t in state.items()]
    digests = comm.all_gather(_digests([repr(described).encode()], comm.device))
    odd = [rank for rank, one in enumerate(digests.tolist()) if one != int(digests[src])]
    if odd:
        raise InputError(
            "the same model on every rank: names, shapes, dtypes, what is frozen",
            f"another on rank {', '.join(map(str, odd))} than on rank {src}; rank {comm.rank} has "
            f"{sum(t.numel() for t in state.values()):,} elements in {len(state)} tensors",
            "make the model from the same configuration on every rank",
        )
    tensors = list(state.values())
    for numbers in bucket_layout(tensors, bucket_bytes):
        some = [tensors[number] for number in numbers]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in some])
        flat = comm.broadcast(flat, src, out=flat)
        if comm.rank != src:
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some])):
                tensor.copy_(part.view_as(tensor))


def check_replicas(model: nn.Module, comm: Communicator) -> None:
    """Compare the ranks' parameters and buffers, bit by bit.

    model  of the same form on every rank
    comm   of the ranks that hold replicas

    Communicates: one all_gather of 8 bytes per tensor.
    Raises InputError, on every rank, that names the ranks that differ from rank 0, and where first.
    """
    state = _state(model)
    mine = _digests([_bytes(tensor) for tensor in state.values()], comm.device)
    rows = comm.all_gather(mine).view(comm.world_size, -1).cpu()
    found = []
    for rank, row in enumerate(rows):
        differing = [name for name, same in zip(state, (row == rows[0]).tolist()) if not same]
        if differing:
            found.append(f"rank {rank} in {differing[0]} ({len(differing)} of {len(state)})")
    if found:
        raise InputError(
            "replicas whose weights are equal, bit for bit",
            f"other weights than rank 0: {'; '.join(found)}",
            "begin with broadcast_model; let every rank make every update, with the same gradients "
            "and the same learning rate",
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _digests(texts: list[bytes], device: torch.device) -> Tensor:
    # 63 bits each: int64 has a sign.
    numbers = [int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1 for text in texts]
    return torch.tensor(numbers, device=device)
