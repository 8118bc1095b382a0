"""Local SGD, for contrast: ranks train alone for some steps, then average their weights.

Chapter 08 sets it beside the averaging of gradients. After one step of plain SGD both are the same,
since that update is linear in the gradient; after AdamW, or after more than one step, they are not:
each rank has walked towards the minimum of its own data. In exchange it talks less often.

Production: torch's PostLocalSGDOptimizer, DiLoCo (Douillard et al. 2023, arXiv:2311.08105), which
takes the averaged change for a gradient and keeps the optimizer's state apart. Stich 2019
(arXiv:1805.09767) analyses it.
"""

import torch
from torch import nn

from slimlab.comm.base import Communicator
from slimlab.parallel.data_buckets import bucket_layout


@torch.no_grad()
def average_weights(
    model: nn.Module, comm: Communicator, *, bucket_bytes: int | None = None
) -> None:
    """Replace every floating-point parameter by its mean over the ranks.

    The state of an optimizer (AdamW's averages) stays each rank's own.

    model         of the same form on every rank, changed in place
    comm          of the ranks that hold replicas
    bucket_bytes  parameters that travel together, at most, as in data_buckets.bucket_layout

    Communicates: one all_reduce per bucket.
    """
    params = [param for param in model.parameters() if param.is_floating_point()]
    for numbers in bucket_layout(params, bucket_bytes):
        some = [params[number] for number in numbers]
        flat = torch.cat([param.detach().reshape(-1) for param in some])
        flat = comm.all_reduce(flat, op="mean", out=flat)
        for param, part in zip(some, flat.split([param.numel() for param in some])):
            param.copy_(part.view_as(param))
