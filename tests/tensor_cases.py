"""Programs of the tests of tensor parallelism: a decoder that is cut, beside one process."""

from collections import Counter

import torch
from parallel_cases import NUM_STEPS, copy_of_grads, optimizer_of, serial_run, tiny_model

from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_collectives import (
    add_once,
    copy_to_ranks,
    gather_from_ranks,
    gather_sequence,
    join_parts,
    reduce_from_ranks,
    scatter_sequence,
    split_to_ranks,
)
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.tensor_state import gather_whole
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import IGNORE

# 1, 2, 3 and 4 ranks divide all of it.
SIZES = {
    "vocab_size": 12,
    "seq_len": 12,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 12,
    "d_ff": 24,
}
GPT = {**SIZES, "positions": "learned", "norm": "layer", "bias": True}
LLAMA = {**SIZES, "feed_forward": "swiglu", "num_kv_heads": 2}
MULTI_QUERY = {**LLAMA, "num_kv_heads": 1, "bias": True}
FIRST = {
    **SIZES,
    "positions": "sinusoidal",
    "norm": "layer",
    "norm_place": "post",
    "feed_forward": "relu",
    "tie_embeddings": False,
}
INPUT = "output of the embedding"  # stands among the gradients under this name


def batch_of(step, batch_size=5):
    """Inputs and targets; padding of different lengths, so that samples differ in their tokens."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(SIZES["vocab_size"], (batch_size, 13), generator=generator)
    inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    for row in range(batch_size):
        targets[row, 2 + (5 * row + step) % 11 :] = IGNORE
    return inputs, targets


def watch_input(model):
    """Keep the gradient of what the embedding gives; the list is filled in each backward pass."""
    found = []

    def watch(module, inputs, x):
        if x.requires_grad and torch.is_grad_enabled():
            x.register_hook(lambda grad: found.append(grad.clone()))

    model.embedding.register_forward_hook(watch)
    return found


def serial(choices):
    """What one process finds: losses, gradients with that of the input, weights."""
    model = tiny_model(**choices)
    found = watch_input(model)
    losses, grads, weights = serial_run(model, batch_of=batch_of)
    for step, one in enumerate(grads):
        one[INPUT] = found[step]
    return losses, grads, weights


def train(group, choices, options, recompute="none", micro_batch_size=None):
    """What the ranks of a group find together, made whole."""
    model = tiny_model(seed=group.rank, **choices)  # other weights than rank 0 has, until it says
    model.recompute = recompute
    tensor_parallel(model, group, **options)
    found, optimizer = watch_input(model), optimizer_of(model)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        loss, _ = accumulate_gradients(
            model, batch_of(step), tensor_parallel_objective, micro_batch_size
        )
        losses.append(float(loss))
        whole = gather_whole(model, copy_of_grads(model))
        grad = found[step] if micro_batch_size is None else torch.ones(1)
        cut = model.tensor_parallel.sequence_parallel and group.world_size > 1
        grads.append({**whole, INPUT: join_parts(grad, group, 1) if cut else grad})
        optimizer.step()
    return losses, grads, gather_whole(model, dict(model.named_parameters()))


def one_step(comm, choices, options, recompute="none"):
    """The calls of a step in order, and the bytes of all tensors that are held after it."""
    model = tiny_model(**choices)
    model.recompute = recompute
    tensor_parallel(model, comm, **options)
    optimizer = optimizer_of(model)
    before = len(comm.ledger.entries)
    inputs, targets = batch_of(0)
    loss_sum, num_tokens = tensor_parallel_objective(model, (inputs, targets))
    middle = len(comm.ledger.entries)
    (loss_sum / num_tokens).backward()
    calls = [(entry.call, entry.n_bytes) for entry in comm.ledger.entries]
    optimizer.step()
    return calls[:before], calls[before:middle], calls[middle:], held_bytes(model, optimizer)


def held_bytes(model, optimizer):
    params = list(model.parameters())
    state = [one for held in optimizer.state.values() for one in held.items()]
    return {
        "weights": storage_bytes(params),
        "gradients": storage_bytes([p.grad for p in params]),
        "optimizer": storage_bytes([one for name, one in state if name != "step"]),
        "optimizer_steps": storage_bytes([one for name, one in state if name == "step"]),
    }


def storage_bytes(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def reduced_with_bias(x, group, dim):
    """The last column stands for the bias: one linear map of both."""
    return reduce_from_ranks(add_once(x[..., :-1].clone(), x[0, 0, -1:], group), group)


# A replicated value is one value, so its inner product is counted once; of a rank's own values all
# are added up.
ADJOINTS = {
    "copy_to_ranks": (lambda x, group, dim: copy_to_ranks(x, group), "replicated", "own"),
    "reduce_from_ranks": (lambda x, group, dim: reduce_from_ranks(x, group), "own", "replicated"),
    "split_to_ranks": (split_to_ranks, "replicated", "own"),
    "gather_from_ranks": (gather_from_ranks, "own", "replicated"),
    "gather_sequence": (gather_sequence, "own", "own"),
    "scatter_sequence": (scatter_sequence, "own", "own"),
}


def adjoint_errors(group):
    """|<Ax, y> - <x, A'y>| of every collective, along every dim, relative to the larger one."""
    return {
        (name, dim): adjoint_error(group, *case, dim)
        for name, case in ADJOINTS.items()
        for dim in (0, 1, -1)
    }


def adjoint_error(group, function, kind_of_x, kind_of_y, dim):
    x = drawn(group, kind_of_x, (12, 24, 12), seed=1).requires_grad_()
    result = function(x, group, dim)
    y = drawn(group, kind_of_y, result.shape, seed=100)
    result.backward(y)
    left = inner(group, kind_of_y, result.detach(), y)
    right = inner(group, kind_of_x, x.detach(), x.grad)
    return abs(left - right) / max(abs(left), abs(right))


def drawn(group, kind, shape, seed):
    seed += group.rank if kind == "own" else 0
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner(group, kind, one, other):
    product = (one * other).sum()[None]
    return float(group.all_reduce(product) if kind == "own" else product)


def counted(calls):
    return Counter(tuple(call) for call in calls)
