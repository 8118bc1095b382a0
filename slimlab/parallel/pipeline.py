"""Pipeline parallelism: stages of a model on different ranks, and any schedule that fills them.

Chapter 10 explains it. A batch is cut into micro-batches. Each rank works through its stage's list
of instructions: it takes what an instruction needs from the stages beside it, computes, and hands
on what it made. When the lists have ended, every gradient is that of the mean loss over all tokens
of the batch, as in one process: losses are added up and divided once, so micro-batches may have
different sizes and numbers of tokens.

Every rank reads the same batch; the first stage uses its inputs, the last one its targets, and all
of them its lengths and documents. Stages draw dropout from generators of their own.

Each stage may be tensor parallel (cut with tensor_parallel first), and replicas of the whole
pipeline may have different data (slimlab.parallel.data over the axis data of a mesh).

Production: Megatron-LM has a program for each schedule; torch.distributed.pipelining executes lists
as here, but sends gradients of a tied table nowhere: its users add them up. Both want micro-batches
of one size. Huang et al. 2019 (arXiv:1811.06965).
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError, require
from slimlab.model.transformer import Decoder
from slimlab.parallel.data import LOSS_DIVISOR, DataParallel
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.parallel.pipeline_mail import Mail
from slimlab.parallel.pipeline_passes import ChunkPass
from slimlab.parallel.schedule_checks import check_schedule
from slimlab.parallel.stages import Stage, stage_of
from slimlab.parallel.tensor_checks import check_max_norm
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Instruction,
    Schedule,
)
from slimlab.train.accumulate import Objective, map_tensors, split_batch

TABLE = "embedding.tokens.weight"
DIGEST_BITS = 52  # whole numbers that float64 has exactly


class Pipeline:
    """One rank's stage of a model, and its part in the steps of the whole pipeline.

    model      a whole decoder on every rank; it gets the weights of rank 0, and its stage is cut
               from it. Several ranks that are threads need a model each
    comm       of the stages, in their order: all ranks, or the group of a mesh's axis pipeline
    schedule   what each stage does; one of slimlab.parallel.schedules, or your own
    layers     blocks of each virtual stage; None: as even as can be, see stages.balanced_layers
    broadcast  False: the ranks' models are known to be equal already

    stage      this rank's module; make optimizers, or replicas, of it
    schedule   as given
    mail       the messages

    Communicates: what broadcast_model does, and one split if tables are tied over several ranks.
    Raises InputError, on every rank, before it communicates, if the schedule is for another number
    of stages or cannot be run, or layers do not fit.
    """

    def __init__(
        self,
        model: Decoder,
        comm: Communicator,
        schedule: Schedule,
        *,
        layers: Sequence[int] | None = None,
        broadcast: bool = True,
    ):
        require(
            schedule.num_stages == comm.world_size,
            f"a schedule of {comm.world_size} stages, one for each rank",
            f"{schedule.name} of {schedule.num_stages}",
            f"make the schedule for {comm.world_size} stages, or start {schedule.num_stages} ranks",
        )
        check_schedule(schedule)
        stage = stage_of(model, schedule, comm.rank, layers)
        self._splits = _split_chunks(schedule, comm.rank)
        check_recompute(schedule, stage.recompute)
        if broadcast:
            broadcast_model(model, comm)
        self.stage, self.comm, self.schedule = stage, comm, schedule
        self.mail = Mail(comm, schedule)
        self._tables = _table_group(stage, comm, schedule)
        self._replica: DataParallel | _Alone = _Alone(stage)
        self._passes: dict[tuple[int, int], ChunkPass] = {}
        self.peak_passes = 0

    def join(self, replica: DataParallel) -> None:
        """Let the stage's gradients be those of several replicas of the pipeline.

        replica  made of this rank's stage and the group of the mesh's axis data: DataParallel, or
                 Zero of stage 1

        Raises InputError for another module, and stages 2 and 3 of ZeRO, which would send the
        gradients of every micro-batch.
        """
        require(
            replica.model is self.stage,
            "a replica of this pipeline's stage",
            f"one of a {type(replica.model).__name__}",
            "make it with DataParallel(pipeline.stage, mesh.group('data'))",
        )
        zero = getattr(replica, "stage", 0)
        require(
            zero <= 1,
            "gradients that stay whole until a step ends: DataParallel, or Zero with stage=1",
            f"stage = {zero}",
            "take stage=1",
        )
        self._replica = replica

    def gradients(
        self, batch: object, objective: Objective, *, context: Callable = nullcontext
    ) -> tuple[Tensor, int]:
        """Set every gradient to that of the mean loss over all target tokens of the batch.

        batch      of B sequences, the same on every rank of the pipeline; it is cut into the
                   schedule's micro-batches, whose sizes differ by one at most
        objective  as in slimlab.train.objectives; of a stage that is tensor parallel
                   tensor_parallel_objective
        context    makes the context of each forward pass, such as autocast
        returns    () the mean loss per token over the whole batch, of all replicas, in float64, and
                   the number of tokens, both the same on every rank

        Communicates: the schedule's messages; one all_reduce of the table's gradient between first
        and last stage if tables are tied; one all_reduce of a few numbers; what a replica does.
        Raises InputError, on every rank, if there are fewer sequences than micro-batches, the
        batches of ranks differ, or no token is a target.
        """
        pieces = cut_batch(batch, self.schedule.num_micro_batches)
        self._begin_step()
        try:
            for number, instruction in enumerate(self.schedule.stages[self.comm.rank]):
                self.mail.ask_ahead(number)
                with context() if instruction.kind == FORWARD else nullcontext():
                    self._execute(instruction, pieces, objective)
            self.mail.finish()
        except BaseException:
            self._passes = {}
            raise
        return self._finish_step(batch)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Shorten all gradients of the pipeline by one factor if they are too long together.

        max_norm  length that the gradients of the whole model may have together, above 0; infinity
                  only measures
        returns   () their length before clipping, in float64, the same on every rank; equal to that
                  of slimlab.train.optimizer.clip_gradients of the whole model

        Communicates: one all_reduce of 8 bytes over the stages, and one over the tensor group if
        the stage is tensor parallel.
        Raises InputError, on every rank, if the length is not finite; no gradient was changed.
        """
        check_max_norm(max_norm)
        total = own_square(self.stage).to(self.comm.device)
        if hasattr(self.stage, "tensor_parallel"):
            total = self.stage.tensor_parallel.group.all_reduce(total)
        total_norm = self.comm.all_reduce(total)[0].sqrt()
        require(
            bool(total_norm.isfinite()),
            "gradients that are finite numbers on every stage",
            f"a length of {float(total_norm)}",
            "look at the batch, or lower the learning rate. No weight was changed",
        )
        factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
        for param in self.stage.parameters():
            if param.grad is not None:
                param.grad.mul_(factor.to(param.device, param.dtype))
        return total_norm

    def _begin_step(self) -> None:
        self.mail.begin_step()
        self._passes, self.peak_passes = {}, 0
        self._loss_sum, self._num_tokens = torch.zeros((), dtype=torch.float64), 0
        self._replica.begin_passes()

    def _execute(self, instruction: Instruction, pieces: list, objective: Objective) -> None:
        place = self.schedule.virtual_stage(self.comm.rank, instruction.chunk)
        key = instruction.chunk, instruction.micro_batch
        if instruction.kind == FORWARD:
            self._forward(place, *key, pieces, objective)
            return
        one = self._passes[key]
        if instruction.kind == WEIGHT_GRADIENT:
            one.weight_gradient(self._replica.add_pass)
        else:
            last = place == self.schedule.num_virtual_stages - 1
            product = INPUT_GRADIENT, place + 1, instruction.micro_batch
            grad = None if last else self.mail.take(product)
            if instruction.kind == BACKWARD:
                result = one.backward(grad, self._replica.add_pass)
            else:
                result = one.input_gradient(grad)
            if place:
                self.mail.hand_on((INPUT_GRADIENT, place, instruction.micro_batch), result)
        if instruction.kind in (BACKWARD, WEIGHT_GRADIENT):
            del self._passes[key]

    def _forward(
        self, place: int, chunk: int, number: int, pieces: list, objective: Objective
    ) -> None:
        hidden = self.mail.take((FORWARD, place - 1, number)) if place else None
        one = ChunkPass(self.stage, chunk, hidden, chunk in self._splits)
        self._passes[chunk, number] = one
        self.peak_passes = max(self.peak_passes, len(self._passes))
        result = one.forward(objective, pieces[number], LOSS_DIVISOR)
        if result is not None:
            self.mail.hand_on((FORWARD, place, number), result)
        else:
            self._loss_sum = self._loss_sum + one.loss_sum.double()
            self._num_tokens += int(one.num_tokens)

    def _finish_step(self, batch: object) -> tuple[Tensor, int]:
        report = torch.zeros(2 + self.comm.world_size, dtype=torch.float64)
        report[0], report[1] = self._loss_sum, self._num_tokens
        report[2 + self.comm.rank] = _digest(batch)
        report = self.comm.all_reduce(report.to(self.comm.device)).cpu()
        _check_digests(report[2:].tolist())
        if self._tables is not None:
            table = self.stage.embedding.tokens.weight
            if table.requires_grad:
                self._tables.all_reduce(table.grad, out=table.grad)
        return self._replica.finish_passes(report[0], int(report[1]))


class _Alone:
    """The only replica of a stage: no gradients but its own."""

    def __init__(self, stage: Stage):
        self.params = [param for param in stage.parameters() if param.requires_grad]

    def begin_passes(self) -> None:
        for param in self.params:
            param.grad = None

    def add_pass(self, back_propagate: Callable[[], object]) -> None:
        back_propagate()

    def finish_passes(self, loss_sum: Tensor, num_tokens: int) -> tuple[Tensor, int]:
        require(
            num_tokens > 0,
            "a batch with at least one target token",
            "none",
            "check what marks the positions that do not count",
        )
        grads = [param.grad for param in self.params if param.grad is not None]
        if grads:
            torch._foreach_mul_(grads, LOSS_DIVISOR / num_tokens)
        return loss_sum / num_tokens, num_tokens


def own_square(stage: Stage) -> Tensor:
    """Add up the squares of a stage's gradients so that the ranks' sums are those of the model.

    stage    whose gradients are there
    returns  (1,) in float64: a tied table counts on the first stage, what is replicated over a
             tensor group on its first rank, a copy of key heads by its share
    """
    done = getattr(stage, "tensor_parallel", None)
    total = torch.zeros(1, dtype=torch.float64)
    for name, param in stage.named_parameters():
        elsewhere = stage.tied and name == TABLE and 0 not in stage.virtual_stages
        if done is not None and done.cut_dims[name] is None and done.group.rank:
            elsewhere = True
        if param.grad is None or elsewhere:
            continue
        square = torch.linalg.vector_norm(param.grad, dtype=torch.float64).cpu() ** 2
        total += square / (done.num_copies if done and name in done.copied else 1)
    return total


def cut_batch(batch: object, num_micro_batches: int) -> list:
    """Cut a batch into so many micro-batches, of sizes that differ by one at most.

    batch              as in slimlab.train.accumulate
    num_micro_batches  m
    returns            pieces of the same form

    Raises InputError if there are fewer sequences than micro-batches.
    """
    sizes = []
    map_tensors(
        lambda tensor: sizes.append(len(tensor) if tensor.dim() else 0), split_batch(batch, None)[0]
    )
    require(
        sizes[0] >= num_micro_batches,
        f"at least one sequence for each of {num_micro_batches} micro-batches",
        f"a batch of {sizes[0]}",
        f"make the schedule for at most {sizes[0]} micro-batches, or give {num_micro_batches} "
        "sequences",
    )
    shares = shard_sizes(sizes[0], num_micro_batches)
    starts = [sum(shares[:number]) for number in range(num_micro_batches)]
    return [
        map_tensors(lambda tensor, at=at, size=size: tensor[at : at + size], batch)
        for at, size in zip(starts, shares)
    ]


def check_recompute(schedule: Schedule, recompute: str) -> None:
    """Refuse recomputation where the backward pass is parted.

    schedule   what the stages do
    recompute  as in Decoder

    Raises InputError.
    """
    parted = any(_split_chunks(schedule, stage) for stage in range(schedule.num_stages))
    require(
        not parted or recompute == "none",
        'recompute = "none" where input and weight gradients are computed apart',
        f'recompute = "{recompute}" with the schedule {schedule.name}',
        "recomputation would have to happen twice: take 1f1b or interleaved",
    )


def _split_chunks(schedule: Schedule, stage: int) -> frozenset[int]:
    """Find the chunks of a stage whose backward pass comes in two parts, at least once."""
    order = schedule.stages[stage]
    return frozenset(one.chunk for one in order if one.kind == WEIGHT_GRADIENT)


def _table_group(stage: Stage, comm: Communicator, schedule: Schedule) -> Communicator | None:
    """Return the group of the two ranks that hold a tied table; None: there are no two."""
    ends = schedule.place_of(0)[0], schedule.place_of(schedule.num_virtual_stages - 1)[0]
    if not stage.config.tie_embeddings or ends[0] == ends[1]:
        return None
    return comm.split(0 if comm.rank in ends else None, key=comm.rank)


def _digest(batch: object) -> int:
    """Return a number that stands for the contents of a batch."""
    digest = hashlib.sha256()
    map_tensors(lambda one: digest.update(one.cpu().contiguous().numpy().tobytes()), batch)
    return int.from_bytes(digest.digest()[:8]) >> (64 - DIGEST_BITS)


def _check_digests(found: list[float]) -> None:
    odd = [str(rank) for rank, one in enumerate(found) if one != found[0]]
    if odd:
        raise InputError(
            "the same batch on every stage of a pipeline",
            f"another on stage {', '.join(odd)} than on stage 0",
            "cut the data over the axis data alone. No weight was changed",
        )
