"""The same training by torch's own tensor parallelism: DTensor and parallelize_module."""

import torch
from parallel_cases import LR, NUM_STEPS, tiny_model
from tensor_cases import INPUT, batch_of, watch_input

from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import parameter_groups


def train_dtensor(comm, choices, sequence_parallel):
    """What the ranks find together, made whole, as tensor_cases.train; the logits are gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    model = tiny_model(**choices)
    mesh = init_device_mesh("cpu", (comm.world_size,))
    cut_by_dtensor(model, mesh, sequence_parallel)
    found, losses, grads = watch_input(model), [], []
    groups = parameter_groups(model, 0.1)
    # Its fused and its foreach kernels refuse lists of which some tensors are cut.
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), foreach=False)

    def whole(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    for step in range(NUM_STEPS):
        loss, _ = accumulate_gradients(model, batch_of(step), causal_objective)
        losses.append(float(loss))
        grads.append({name: whole(p.grad).clone() for name, p in model.named_parameters()})
        grad = found[step]
        if sequence_parallel:
            grad = comm.all_gather(grad.movedim(1, 0).contiguous()).movedim(0, 1)
        grads[-1][INPUT] = grad
        optimizer.step()
    weights = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    return losses, grads, weights


def cut_by_dtensor(model, mesh, sequence_parallel):
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    stream = Shard(1) if sequence_parallel else Replicate()
    rows = {"input_layouts": Replicate(), "output_layouts": Replicate()}
    plan = {
        "embedding.tokens": RowwiseParallel(**rows),
        "lm_head": ColwiseParallel(input_layouts=stream, output_layouts=Replicate()),
    }
    for name, _ in model.named_modules():
        layer = name.rpartition(".")[2]
        if layer in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            plan[name] = ColwiseParallel()
        elif layer in ("out_proj", "down_proj"):
            plan[name] = RowwiseParallel(output_layouts=stream)
        elif sequence_parallel and layer.endswith("norm"):
            plan[name] = SequenceParallel(use_local_output=True)
        elif sequence_parallel and layer in ("attention", "feed_forward"):
            plan[name] = PrepareModuleInput(
                input_layouts=(Shard(1),),
                desired_input_layouts=(Replicate(),),
                use_local_output=True,
            )
    tied = model.lm_head.weight is model.embedding.tokens.weight
    parallelize_module(model, mesh, plan)
    if tied:
        model.lm_head.weight = model.embedding.tokens.weight

    def split(module, inputs, x):
        x = DTensor.from_local(x, mesh, [Replicate()])
        return x.redistribute(mesh, [Shard(1)]).to_local()

    if sequence_parallel:
        model.embedding.register_forward_hook(split)
