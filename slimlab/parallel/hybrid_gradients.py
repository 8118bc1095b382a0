"""Gradients that lie cut on a mesh: their common length, and who has one that is not finite.

Chapter 11 uses it through slimlab.parallel.hybrid. Each parameter must count once: parts that are
cut count on every rank, what several ranks hold counts on one of them, or on each a part.
Production (Megatron-LM) marks parameters as shared or duplicated by hand, and two all_reduces over
different groups add them up.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from slimlab.parallel.data import DataParallel, NotFiniteGradientsError
from slimlab.parallel.mesh import AXES, Mesh
from slimlab.parallel.pipeline import TABLE
from slimlab.parallel.zero import Zero

MOST_NAMED = 8


def square_of_own(replica: DataParallel, mesh: Mesh) -> float:
    """Add up the squares of this rank's gradients, such that the sum over all ranks is right.

    replica  DataParallel or Zero, over the axis data
    mesh     of all ranks
    returns  this rank's summand of the squared length of all gradients of the whole model
    """
    total = torch.zeros((), dtype=torch.float64)
    for name, grad in _parts(replica, mesh):
        square = torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
        total += square.cpu() * share_of_parameter(replica.model, name, mesh)
    return float(total)


def share_of_parameter(model: nn.Module, name: str, mesh: Mesh) -> float:
    """Say what part of a parameter this rank answers for, among those that hold the same elements.

    model    that tensor_parallel has cut
    name     of the parameter
    mesh     of all ranks
    returns  1 for a part that no other rank of the replica has; 0 or 1, or 1 / copies, where others
             have it too
    """
    done, shape = model.tensor_parallel, mesh.shape
    stage = mesh.coordinates[AXES.index("pipeline")]
    if shape.pipeline > 1 and stage > 0 and name == TABLE:
        return 0.0  # of the two copies of a tied table the first stage's counts
    if done.cut_dims[name] is None:
        return float(done.group.rank == 0)
    return 1 / done.num_copies if name in done.copied else 1.0


def all_gradients(replica: DataParallel) -> list[Tensor]:
    """Return every tensor of gradients that this rank's optimizer will read.

    replica  DataParallel or Zero
    """
    if isinstance(replica, Zero):
        return [flat.shard_grad for flat in replica.buckets.flats]
    return [param.grad for param in replica.model.parameters() if param.grad is not None]


def check_all_finite(mesh: Mesh, names: Sequence[str], bad_name: str | None) -> None:
    """Refuse a step in which any rank has met a gradient that is not finite.

    mesh      of all ranks
    names     of the parameters of the whole model, in the same order on every rank
    bad_name  of the first that is not finite here; None: all are

    Communicates: one all_gather of 8 bytes, over all ranks.
    Raises NotFiniteGradientsError, on every rank, naming ranks, coordinates and parameters.
    """
    mine = torch.tensor([0 if bad_name is None else 1 + names.index(bad_name)])
    everyones = mesh.comm.all_gather(mine.to(mesh.comm.device)).tolist()
    found = []
    for rank, one in enumerate(everyones):
        if one:
            places = zip(AXES, mesh.coordinates_of(rank))
            where = ", ".join(f"{axis} {at}" for axis, at in places)
            found.append(f"rank {rank} ({where}): {names[one - 1]}")
    more = f" and {len(found) - MOST_NAMED} more ranks" if len(found) > MOST_NAMED else ""
    if found:
        raise NotFiniteGradientsError(
            "gradients that are finite numbers on every rank",
            f"infinite or NaN first in {'; '.join(found[:MOST_NAMED])}{more}",
            "look at the sequences of these replicas: a division by 0 or the logarithm of 0; if "
            "all have it, lower the learning rate. No weight was changed",
        )


def _parts(replica: DataParallel, mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(replica, Zero):
        if mesh.coordinates[AXES.index("data")] == 0:
            named = replica.model.named_parameters()
            yield from ((name, p.grad) for name, p in named if p.grad is not None)
        return
    for flat in replica.buckets.flats:
        for name, end, size in zip(flat.names, flat.ends, flat.sizes):
            start, stop = max(end - size - flat.start, 0), end - flat.start
            if start < stop:
                yield name, flat.shard_grad[start:stop]
