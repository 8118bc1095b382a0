"""Training steps that are split over ranks: the book's, and those of torch.distributed.

Each rival is a function of no argument that makes one update and returns the mean loss over all
ranks' tokens before it. All begin with the same weights and see the same batches, so their losses
must stay alike. The optimizer is PyTorch's fused AdamW on every side, with one learning rate and no
weight decay; ZeRO-3 here updates one flat shard per unit, fully_shard a DTensor per parameter.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from slimlab.comm.base import Communicator
from slimlab.config import ModelConfig
from slimlab.model.transformer import Decoder
from slimlab.parallel.data import DataParallel
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.zero import Zero
from slimlab.train.objectives import causal_objective

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
# The model of the book, and one whose steps are longer than what a call costs.
SHAPES = {
    "tiny": {"d_model": 32, "num_layers": 2, "num_heads": 4},
    "small": {"d_model": 128, "num_layers": 4, "num_heads": 4},
    "middle": {"d_model": 256, "num_layers": 4, "num_heads": 4},
}
Step = Callable[[], Tensor]


class Task:
    """What all rivals train: a shape, a batch for each rank, and how ranks reach each other.

    shape       a key of SHAPES
    batch_size  sequences of all ranks together, divided evenly
    seq_len     T
    vocab_size  V
    """

    def __init__(self, shape: str, batch_size: int, seq_len: int, vocab_size: int):
        # Tables that are not tied: DTensor's plans would part them.
        self.config = ModelConfig(
            vocab_size, seq_len, **SHAPES[shape], feed_forward="swiglu", tie_embeddings=False
        )
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator)
        self.whole = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def model(self) -> Decoder:
        """Make the model, with the same weights on every call and every rank."""
        torch.manual_seed(0)
        return Decoder(self.config)

    def part(self, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets that rank `rank` of `world_size` sees."""
        inputs, targets = self.whole
        size = len(inputs) // world_size
        here = slice(rank * size, (rank + 1) * size)
        return inputs[here], targets[here]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of every rival that has a parameter per tensor.

    One kernel updates a whole group, and takes DTensors or plain tensors, not both.
    """
    params = list(model.parameters())
    groups = [
        [one for one in params if isinstance(one, DTensor) == split] for split in (True, False)
    ]
    return torch.optim.AdamW([{"params": group} for group in groups if group], **SETTINGS)


def our_data(task: Task, comm: Communicator) -> Step:
    """Return a step of slimlab.parallel.data on a communicator."""
    model, batch = task.model(), task.part(comm.rank, comm.world_size)
    replica, optimizer = DataParallel(model, comm), optimizer_of(model)

    def step() -> Tensor:
        loss, _ = replica.gradients(batch, causal_objective)
        optimizer.step()
        return loss

    return step


def their_data(task: Task) -> Step:
    """Return a step of DistributedDataParallel, its gradients views of its buckets."""
    inputs, targets = task.part(dist.get_rank(), dist.get_world_size())
    model = nn.parallel.DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    return _their_step(model, inputs, targets, optimizer_of(model))


def our_zero(task: Task, comm: Communicator) -> Step:
    """Return a step of slimlab.parallel.zero, stage 3, on a communicator."""
    batch = task.part(comm.rank, comm.world_size)
    zero = Zero(task.model(), comm, stage=3, optimizer="adamw", lr=SETTINGS["lr"], weight_decay=0.0)

    def step() -> Tensor:
        loss, _ = zero.gradients(batch, causal_objective)
        zero.step()
        return loss

    return step


def their_zero(task: Task) -> Step:
    """Return a step of fully_shard, a unit for every block and one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inputs, targets = task.part(dist.get_rank(), dist.get_world_size())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = task.model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _their_step(model, inputs, targets, optimizer_of(model))


def our_tensor(task: Task, comm: Communicator) -> Step:
    """Return a step of slimlab.parallel.tensor on a communicator; every rank sees the batch."""
    model = tensor_parallel(task.model(), comm)
    optimizer = optimizer_of(model)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss_sum, num_tokens = tensor_parallel_objective(model, task.whole)
        loss = loss_sum / num_tokens
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def their_tensor(task: Task, plan: str) -> Step:
    """Return a step of DTensor's parallelize_module; every rank sees the batch.

    task  what is trained
    plan  "linears": every linear layer of a block, column or row; "shared": their common input is
          made a DTensor once; "vocabulary": embedding, output and loss too
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    mesh, model = init_device_mesh("cpu", (dist.get_world_size(),)), task.model()
    styles = dict.fromkeys(
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"), ColwiseParallel()
    ) | {"attention.out_proj": RowwiseParallel()}
    styles |= dict.fromkeys(("feed_forward.up_proj", "feed_forward.gate_proj"), ColwiseParallel())
    styles |= {"feed_forward.down_proj": RowwiseParallel()}
    if plan != "linears":
        once = {"input_layouts": (Replicate(),), "desired_input_layouts": (Replicate(),)}
        styles |= dict.fromkeys(("attention", "feed_forward"), PrepareModuleInput(**once))
    for block in model.blocks:
        parallelize_module(block, mesh, dict(styles))
    inputs, targets = task.whole
    if plan != "vocabulary":
        return _their_step(model, inputs, targets, optimizer_of(model))
    parallelize_module(model, mesh, {
        "embedding.tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    })  # fmt: skip
    return _their_step(model, inputs, targets, optimizer_of(model), loss_parallel)


def _their_step(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    context: Callable | None = None,
) -> Step:
    def step() -> Tensor:
        optimizer.zero_grad()
        logits = model(inputs)
        if context is None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
        else:
            with context():
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
                loss.backward()
            loss = loss.full_tensor()
        optimizer.step()
        return loss.detach()

    return step
