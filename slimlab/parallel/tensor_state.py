"""The state of a model that is cut: made whole, cut again, and its gradients clipped.

Chapter 09 uses it. A checkpoint of whole weights can be loaded into any number of ranks, so that is
what is saved. The length of all gradients counts every parameter of the whole model once: parts are
added up over the ranks, replicated parameters counted on one of them, copies of key heads shared.
A run with dropout also needs model.tensor_parallel.generator.get_state() of every rank to go on.

Production saves the parts, each rank its own, and cuts anew on loading (torch.distributed's
checkpoint, Megatron-LM's distributed checkpoint). Shoeybi et al. 2019 (arXiv:1909.08053).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimlab.config import InputError, require
from slimlab.parallel.tensor_checks import check_max_norm
from slimlab.parallel.tensor_collectives import join_parts


def gather_whole(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the ranks' parts of tensors that are cut as parameters are.

    model    that tensor_parallel has cut
    named    name of a parameter -> its value, its gradient, or an optimizer's tensor of its shape;
             the same names on every rank
    returns  name -> the whole tensor, the same on every rank

    Communicates: one all_gather for each tensor that is cut.
    """
    done, whole = model.tensor_parallel, {}
    for name, tensor in named.items():
        dim, tensor = done.cut_dims[name], tensor.detach()
        if dim is None or done.group.world_size == 1:
            whole[name] = tensor.clone()
            continue
        joined = join_parts(tensor, done.group, dim)
        if name in done.copied:  # of each head the first copy
            parts = joined.unflatten(dim, (done.group.world_size, -1)).movedim(dim, 0)
            joined = parts[:: done.num_copies].movedim(0, dim).flatten(dim, dim + 1)
        whole[name] = joined
    return whole


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the whole model.

    model    that tensor_parallel has cut
    returns  what state_dict() of the whole model would be, the same on every rank

    Communicates: one all_gather for each parameter that is cut.
    """
    params = dict(model.named_parameters())
    whole = gather_whole(model, params)
    names = {id(param): name for name, param in params.items()}
    return {
        name: whole[names[id(tensor)]] if id(tensor) in names else tensor.detach().clone()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


@torch.no_grad()
def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model that is cut the weights of a whole one, each rank its part.

    model  that tensor_parallel has cut; changed in place
    state  state_dict() of a whole model of the same configuration, the same on every rank

    Communicates: nothing.
    Raises InputError, before a weight is changed, if names or shapes are those of another model.
    """
    own = model.state_dict(keep_vars=True)
    missing, strange = own.keys() - state.keys(), state.keys() - own.keys()
    require(
        not missing and not strange,
        f"the weights of a whole model with {len(own)} tensors",
        f"without {sorted(missing)[:3]}, with {sorted(strange)[:3]} besides",
        "give model.state_dict() of a model made from the same configuration",
    )
    params = dict(model.named_parameters())
    names = {id(param): name for name, param in params.items()}
    parts = {}
    for name, tensor in own.items():
        if id(tensor) in names:  # a tied table has two names here
            parts[name] = part_of(model, names[id(tensor)], state[name])
        else:
            parts[name] = state[name]
    for name, tensor in own.items():
        tensor.copy_(parts[name])


def gather_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Return what an optimizer of a model that is cut would hold of the whole one.

    model      that tensor_parallel has cut
    optimizer  of its parameters, such as one of make_optimizer
    returns    name of a parameter -> name of the state -> the whole tensor, the same on every rank;
               what does not have the parameter's shape, such as the number of steps, as it is

    Communicates: one all_gather for each tensor of state of a parameter that is cut.
    """
    found = {}
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        shaped = {key: one for key, one in state.items() if one.shape == param.shape}
        whole = {key: gather_whole(model, {name: one})[name] for key, one in shaped.items()}
        found[name] = {key: whole.get(key, one.clone()) for key, one in state.items()}
    return found


@torch.no_grad()
def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give an optimizer of a model that is cut its part of what another held of the whole.

    model      that tensor_parallel has cut
    optimizer  of its parameters; changed in place
    state      what gather_optimizer has returned, with any number of ranks

    Communicates: nothing.
    Raises InputError, before anything is changed, if names or shapes are those of another model.
    """
    params = dict(model.named_parameters())
    require(
        params.keys() == state.keys(),
        f"the state of {len(params)} parameters",
        f"without {sorted(params.keys() - state.keys())[:3]}, with "
        f"{sorted(state.keys() - params.keys())[:3]} besides",
        "give the state of a model made from the same configuration",
    )
    parts = {
        param: {
            key: (part_of(model, name, one) if one.dim() else one).clone()
            for key, one in state[name].items()
        }
        for name, param in params.items()
    }
    for param, held in parts.items():
        optimizer.state[param] = held


def part_of(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    """Return a view of this rank's part of a whole tensor.

    model  that tensor_parallel has cut
    name   of a parameter
    whole  its value in the whole model, or a tensor of that shape

    Raises InputError for another shape.
    """
    done, own = model.tensor_parallel, model.get_parameter(name)
    dim, shape = done.cut_dims[name], list(own.shape)
    copies = done.num_copies if name in done.copied else 1
    if dim is not None:
        shape[dim] *= done.group.world_size // copies
    if list(whole.shape) != shape:
        raise InputError(
            f"{name} of the whole model, {tuple(shape)}",
            f"{tuple(whole.shape)}",
            "give the state of a model made from the same configuration, whole, not one part",
        )
    if dim is None:
        return whole
    return whole.narrow(dim, done.group.rank // copies * own.shape[dim], own.shape[dim])


@torch.no_grad()
def clip_whole_gradients(model: nn.Module, max_norm: float, *, check_finite: bool = True) -> Tensor:
    """Shorten all gradients by one factor if the whole model's are longer than max_norm together.

    model         that tensor_parallel has cut, after a backward pass
    max_norm      length that they may have together, above 0; infinity only measures
    check_finite  raise if it is infinite or NaN, before any gradient is changed
    returns       () the length before clipping, in float64, the same on every rank; equal to that
                  of slimlab.train.optimizer.clip_gradients of the whole model

    Communicates: one all_reduce of 8 bytes; if the length is not finite one all_gather of 8 bytes.
    Raises InputError, on every rank, naming the rank and the parameter that is not finite.
    """
    check_max_norm(max_norm)
    done = model.tensor_parallel
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = torch.zeros(1, dtype=torch.float64, device=done.group.device)
    for name, grad in grads.items():
        square = torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2
        if done.cut_dims[name] is None:
            square = square * (done.group.rank == 0)
        total += square / (done.num_copies if name in done.copied else 1)
    total_norm = done.group.all_reduce(total)[0].sqrt()
    if check_finite and not total_norm.isfinite():
        _name_not_finite(grads, float(total_norm), done.group)
    factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for grad in grads.values():
        grad.mul_(factor.to(grad.device, grad.dtype))
    return total_norm


def _name_not_finite(grads: dict[str, Tensor], length: float, group) -> None:
    names = list(grads)
    bad = [i + 1 for i, name in enumerate(names) if not grads[name].isfinite().all()]
    first = torch.tensor([bad[0] if bad else 0], device=group.device)
    found = [
        f"rank {rank}: {names[one - 1]}"
        for rank, one in enumerate(group.all_gather(first).tolist())
        if one
    ]
    raise InputError(
        "gradients that are finite numbers on every rank",
        f"a length of {length}; infinite or NaN first in "
        f"{'; '.join(found) or 'none, but their squares are'}",
        "look at the batch: a division by 0 or the logarithm of 0; lower the learning rate. No "
        "weight was changed",
    )
