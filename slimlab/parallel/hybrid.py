"""All axes at once: data, ZeRO, pipeline, tensor and sequence parallelism on one mesh.

Chapter 11 explains it. Ranks stand in a grid (slimlab.parallel.mesh). Along the axis tensor they
share each layer, along the axis pipeline each has some of the layers, along the axis data they have
different sequences, and with ZeRO shards of what the others have too. One configuration says how
long each axis is; losses, gradients and weights are those of one process.

    hybrid = Hybrid(model, comm, ParallelConfig(data=2, tensor=2, zero_stage=1), lr=1e-3)
    loss, num_tokens = hybrid.gradients(hybrid.share_of(batch))
    hybrid.clip(1.0)
    hybrid.step()

What is one number for the whole model must count each parameter once: the length of all gradients
takes parts that are cut from every rank, those that several ranks hold from one of them.

Production: Megatron-LM and DeepSpeed, and torch's DeviceMesh with fully_shard, parallelize_module
and pipelining. There too the axes are composed in this order: tensor inside stages inside replicas.
Narayanan et al. 2021 (arXiv:2104.04473).
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import require
from slimlab.parallel.data import DataParallel, NotFiniteGradientsError
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.parallel.hybrid_checks import RECOMPUTE, check_hybrid, share_bounds
from slimlab.parallel.hybrid_gradients import all_gradients, check_all_finite, square_of_own
from slimlab.parallel.hybrid_stages import (
    check_stages_train,
    from_owners,
    owners_of,
    schedule_for,
    take_micro_batches,
)
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_checks import check_max_norm
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.tensor_state import gather_whole
from slimlab.parallel.zero import Zero
from slimlab.parallel.zero_shards import held_bytes
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.train.accumulate import Objective, map_tensors, split_batch
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import make_optimizer, parameter_groups


class Hybrid:
    """One rank's part of a model in training, on a mesh with any product of axes.

    model         a whole Decoder, of the same form on every rank; it gets the weights of rank 0 and
                  is changed in place: this rank's part of it
    comm          of all ranks
    parallel      how many ranks each axis has, stage of ZeRO, sequence parallelism, micro-batches,
                  recomputation ("none" or "full"). Stages stand next to a tensor group, whatever
                  inner_axis says
    lr, weight_decay, betas, eps, momentum  as in slimlab.train.optimizer.make_optimizer
    optimizer     "adamw", "adamw_own" or "sgd", as there
    seed          of dropout, whose numbers follow from it, the step and the place in the mesh
    check_finite  name the rank and the parameter if a gradient is not finite
    hosts         as in slimlab.parallel.mesh.Mesh

    mesh       the grid and its groups
    optimizer  of torch's form, over what this rank updates; a schedule sets its groups' lr
    model      this rank's part: a decoder whose layers are cut, or a stage of it
    replica    DataParallel or Zero, over the axis data
    pipeline   of slimlab.parallel.pipeline; None: the axis has one rank
    names, shapes  of the whole model's parameters, in their order
    groups     (names, whether weight decay shrinks them) as one process would group them
    num_steps  updates made

    Communicates: what Mesh, broadcast_model and tensor_parallel do.
    Raises InputError, on every rank before it communicates, for a layout that does not fit the
    model or the number of ranks; and if the ranks' models differ.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        parallel: ParallelConfig,
        *,
        lr: float,
        optimizer: str = "adamw",
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.9,
        seed: int = 0,
        check_finite: bool = True,
        hosts: Sequence[object] | None = None,
    ):
        check_hybrid(model, parallel, comm.world_size)
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        settings |= {"momentum": momentum}
        make_optimizer(optimizer, model, **settings)  # refuses wrong settings first
        if parallel.pipeline > 1:
            check_stages_train(model, schedule_for(parallel, num_micro_batches=1))
        self.groups = [
            (group["param_names"], bool(group["weight_decay"]))
            for group in parameter_groups(model, weight_decay=1.0)
        ]
        self.comm, self.parallel = comm, parallel
        self._check_finite, self._seed = check_finite, seed
        shape = MeshShape(parallel.data, parallel.pipeline, parallel.tensor)
        self.mesh = Mesh(comm, shape, hosts=hosts)
        broadcast_model(model, comm)
        self.shapes = {name: param.shape for name, param in model.named_parameters()}
        self.names, tensor = list(self.shapes), self.mesh.group("tensor")
        cut = {"sequence_parallel": parallel.sequence_parallel, "broadcast": False}
        self.model = tensor_parallel(model, tensor, **cut)
        self.model.recompute = RECOMPUTE[parallel.recompute]
        self.pipeline = None
        if parallel.pipeline > 1:
            schedule = schedule_for(parallel, num_micro_batches=1)
            self.owners = owners_of(self.model, schedule)
            group = self.mesh.group("pipeline")
            self.pipeline = Pipeline(self.model, group, schedule, broadcast=False)
            self.model = self.pipeline.stage
        data, choices = self.mesh.group("data"), {"check_finite": check_finite, "broadcast": False}
        if parallel.zero_stage:
            stage = parallel.zero_stage
            choices |= {"stage": stage, "optimizer": optimizer, **settings}
            self.replica = Zero(self.model, data, **choices)
            self.optimizer = self.replica.optimizer
        else:
            self.replica = DataParallel(self.model, data, **choices)
            self.optimizer = make_optimizer(optimizer, self.model, **settings)
        if self.pipeline is not None:
            self.pipeline.join(self.replica)
        self.num_steps, self._has_gradients = 0, False

    @property
    def coordinates(self) -> tuple[int, int, int]:
        """This rank's place along data, pipeline and tensor."""
        return self.mesh.coordinates

    def share_of(self, batch: object) -> object:
        """Return this replica's part of a batch.

        batch    the whole one, as in slimlab.train.accumulate, the same on every rank
        returns  its sequences in the order of the replicas, equally many for each

        Raises InputError, on every rank, if the batch does not divide among the replicas and into
        their micro-batches.
        """
        start, end = share_bounds(self.parallel, batch, self.coordinates[0])
        return map_tensors(lambda tensor: tensor[start:end], batch)

    def gradients(
        self,
        batch: object,
        objective: Objective = causal_objective,
        *,
        context: Callable = nullcontext,
    ) -> tuple[Tensor, int]:
        """Make all gradients those of the mean loss over the tokens of all replicas.

        batch      this replica's part, from share_of; the same on all ranks of a replica
        objective  causal_objective, which is computed on a vocabulary that is cut
        context    makes the context of each forward pass, such as autocast
        returns    () the mean loss per token, in float64, and the tokens of all replicas, both the
                   same on every rank

        Communicates: what the layers and the replica do, and one all_gather of 8 bytes.
        Raises InputError, on every rank, if no rank has a target token or a gradient is not finite,
        naming ranks, their coordinates and the first parameter on each.
        """
        require(
            objective in (causal_objective, tensor_parallel_objective),
            "the objective of a decoder: causal_objective",
            f"{getattr(objective, '__name__', objective)}",
            "other objectives need logits over the whole vocabulary, which no rank has here",
        )
        self._has_gradients, size = False, self.parallel.micro_batch_size
        self._seed_dropout()
        # Ranks of other data groups have finite gradients, perhaps, and must hear of it too.
        with suppress(NotFiniteGradientsError) if self._check_finite else nullcontext():
            if self.pipeline is None:
                step = partial(self.replica.gradients, micro_batch_size=size)
            else:
                count = len(split_batch(batch, size))
                take_micro_batches(self.pipeline, self.parallel, count)
                step = self.pipeline.gradients
            result = step(batch, tensor_parallel_objective, context=context)
        if self._check_finite:
            check_all_finite(self.mesh, self.names, self.replica.buckets.bad_name)
        self._has_gradients = True
        return result

    def clip(self, max_norm: float) -> Tensor:
        """Shorten all gradients by one factor if the whole model's are longer than max_norm.

        max_norm  length that they may have together, above 0; infinity only measures
        returns   () their length before clipping, in float64, the same on every rank

        Communicates: one all_reduce of 8 bytes, over all axes.
        Raises InputError for a max_norm that is not above 0, and if there are no gradients.
        Equal to slimlab.train.optimizer.clip_gradients on the whole model.
        """
        check_max_norm(max_norm)
        self._need_gradients("clip")
        square = torch.tensor([square_of_own(self.replica, self.mesh)], dtype=torch.float64)
        total_norm = self.comm.all_reduce(square.to(self.comm.device))[0].sqrt()
        factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
        for grad in all_gradients(self.replica):
            grad.mul_(factor.to(grad.device, grad.dtype))
        return total_norm

    def step(self) -> None:
        """Update the weights.

        Communicates: with ZeRO what Zero.step does; else nothing.
        Raises InputError if there are no gradients since the last step.
        """
        self._need_gradients("step")
        (self.replica if self.parallel.zero_stage else self.optimizer).step()
        self.num_steps += 1
        self._has_gradients = False

    def forget_gradients(self) -> None:
        """Let the next step need gradients of its own, since weights were changed from outside."""
        self._has_gradients = False

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the whole model, by name, the same on every rank.

        Communicates: all_gathers along the axes that cut parameters.
        Raises InputError if there are no gradients since the last step.
        """
        self._need_gradients("full_gradients")
        if self.parallel.zero_stage:
            return self._whole(self.replica.full_gradients())
        named = self.model.named_parameters()
        return self._whole({name: p.grad for name, p in named if p.grad is not None})

    def full_weights(self) -> dict[str, Tensor]:
        """Return copies of the weights of the whole model, by name, the same on every rank.

        Communicates: all_gathers along the axes that cut parameters.
        """
        if self.parallel.zero_stage:
            return self._whole(self.replica.full_weights())
        return self._whole(dict(self.model.named_parameters()))

    def held_bytes(self) -> dict[str, int]:
        """Count the bytes of the tensors that exist on this rank, from their storages.

        returns  as slimlab.parallel.zero.Zero.held_bytes; without ZeRO nothing is ever gathered or
                 kept unreduced
        """
        if self.parallel.zero_stage:
            return self.replica.held_bytes()
        states = [item for state in self.optimizer.state.values() for item in state.items()]
        found = {
            "weights": held_bytes(list(self.model.parameters())),
            "gradients": held_bytes([param.grad for param in self.model.parameters()]),
            "optimizer": held_bytes([one for key, one in states if key != "step"]),
            "optimizer_steps": held_bytes([one for key, one in states if key == "step"]),
        }
        none = ("gathered", "gathered_peak", "unreduced", "unreduced_peak")
        return found | dict.fromkeys(none, 0)

    def _whole(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = gather_whole(self.model, named)
        if self.pipeline is None:
            return whole
        return from_owners(self.pipeline.comm, self.owners, self.shapes, whole)

    def _seed_dropout(self) -> None:
        # Nothing needs to be kept to go on with the same numbers in the same layout.
        replica, stage, part = self.coordinates
        part = part if self.parallel.sequence_parallel else 0
        text = f"{self._seed} {self.num_steps} {replica} {stage} {part}"
        digest = hashlib.sha256(text.encode()).digest()
        self.model.tensor_parallel.generator.manual_seed(int.from_bytes(digest[:4]))

    def _need_gradients(self, what: str) -> None:
        require(
            self._has_gradients,
            f"gradients before {what}()",
            "none since the last step, or such as were refused",
            "call gradients(batch) first",
        )
