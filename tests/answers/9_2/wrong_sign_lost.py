import torch
from torch.nn import functional as F

from slimlab.classroom.check import numbers
from slimlab.comm.launch import run_ranks
from slimlab.parallel.tensor_collectives import copy_to_ranks, gather_from_ranks, reduce_from_ranks

CUT = {"gain": None, "mix": 1, "up": 1, "down": 0, "bias": None}  # dim; None: whole on each rank


class JoinColumns(torch.autograd.Function):
    """Join the columns of all ranks; backward goes the transposed call."""

    @staticmethod
    def forward(ctx, columns, comm):
        ctx.comm = comm
        return comm.all_gather(columns.T.contiguous()).T

    @staticmethod
    def backward(ctx, grad):
        return ctx.comm.reduce_scatter(grad.T.contiguous()).T, None


def step(comm, x, parts, target):
    """The loss, and the gradients of x and of this rank's parts of the weights."""
    x = x.clone().requires_grad_()
    own = {name: part.clone().requires_grad_() for name, part in parts.items()}
    shared = copy_to_ranks(x * own["gain"], comm)
    h = x + JoinColumns.apply(shared @ own["mix"], comm)
    inner = F.gelu(copy_to_ranks(h, comm) @ own["up"])
    y = h + reduce_from_ranks(inner @ own["down"], comm) + own["bias"]
    loss = (y - target).square().sum() / 2
    loss.backward()
    return loss.detach(), {"x": x.grad, **{name: part.grad for name, part in own.items()}}


def case():
    """x and target (2, 12), the same on every rank, and the whole weights."""
    generator = torch.Generator().manual_seed(9)
    shapes = {"gain": (12,), "mix": (12, 12), "up": (12, 24), "down": (24, 12), "bias": (12,)}
    shapes = {"x": (2, 12), "target": (2, 12), **shapes}
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2
        for name, shape in shapes.items()
    }
    return drawn.pop("x"), drawn.pop("target"), drawn


def parts_for(weights, rank, world_size):
    """What a rank holds: name -> its part, along the dim that CUT names."""
    return {
        name: whole if CUT[name] is None else whole.chunk(world_size, CUT[name])[rank]
        for name, whole in weights.items()
    }


def my_diagnosis():
    """Factor of each gradient on your world_size, or None; and where the fault is."""
    w = numbers("9.2")["world_size"]  # all ranks send back the same gradient, and it is added up
    found = {"x": None, "gain": w, "mix": w, "up": 1, "down": 1, "bias": 1}
    return found | {"where": "JoinColumns"}  # x also has the way past it, where nothing is wrong


def factors(program, world_size):
    """Name -> the factor of the gradient on so many ranks against one, or None."""
    x, target, weights = case()
    found = {}

    def run(comm):
        parts = parts_for(weights, comm.rank, comm.world_size)
        return program(comm, x.clone(), parts, target.clone())[1]

    (true,) = run_ranks(run, 1)
    ranks = run_ranks(run, world_size)
    for name, whole in true.items():
        if CUT.get(name) is None:
            wholes = [grads[name] for grads in ranks]
        else:
            wholes = [torch.cat([grads[name] for grads in ranks], CUT[name])]
        factor = ((wholes[0] * whole).sum() / whole.square().sum()).item()
        same = all(torch.allclose(one, factor * whole, rtol=1e-9, atol=1e-9) for one in wholes)
        found[name] = abs(factor) if same else None
    return found


def mended_step(comm, x, parts, target):
    """step, with gradients that are those of one process."""
    x = x.clone().requires_grad_()
    own = {name: part.clone().requires_grad_() for name, part in parts.items()}
    shared = copy_to_ranks(x * own["gain"], comm)
    h = x + gather_from_ranks(shared @ own["mix"], comm, dim=1)  # one value, copies of it
    inner = F.gelu(copy_to_ranks(h, comm) @ own["up"])
    y = h + reduce_from_ranks(inner @ own["down"], comm) + own["bias"]
    loss = (y - target).square().sum() / 2
    loss.backward()
    return loss.detach(), {"x": x.grad, **{name: part.grad for name, part in own.items()}}
