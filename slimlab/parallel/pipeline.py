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

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import check_choice, require
from slimlab.model.transformer import Decoder
from slimlab.parallel.data import LOSS_DIVISOR, DataParallel
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.parallel.pipeline_checks import (
    TABLE,
    check_digests,
    check_recompute,
    check_replica,
    check_same_places,
    check_stages,
    cut_batch,
    digest_of,
    own_square,
    parted_chunks,
)
from slimlab.parallel.pipeline_mail import Mail, table_group
from slimlab.parallel.pipeline_passes import ChunkPass, OnlyReplica
from slimlab.parallel.pipeline_record import HeldTensors, SlotClock, StepRecord, WallClock
from slimlab.parallel.schedule_checks import check_schedule
from slimlab.parallel.stages import stage_of
from slimlab.parallel.tensor_checks import check_max_norm
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Instruction,
    Product,
    Schedule,
)
from slimlab.plan.stage_times import StageTimes
from slimlab.train.accumulate import Objective


class Pipeline:
    """One rank's stage of a model, and its part in the steps of the whole pipeline.

    model      a whole decoder on every rank; it gets the weights of rank 0, and its stage is cut
               from it. Several ranks that are threads need a model each
    comm       of the stages, in their order: all ranks, or the group of a mesh's axis pipeline
    schedule   what each stage does; one of slimlab.parallel.schedules, or your own
    layers     blocks of each virtual stage; None: as even as can be, see stages.balanced_layers
    broadcast  False: the ranks' models are known to be equal already

    stage        this rank's module; make optimizers, or replicas, of it
    schedule     as given
    peak_passes  most activations that were held in the last step, in units of one micro-batch in
                 one chunk, counted
    record       more about the last step, once watch() was called

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
        check_stages(schedule, comm.world_size)
        check_schedule(schedule)
        stage = stage_of(model, schedule, comm.rank, layers)
        check_recompute(schedule, stage.recompute)
        if broadcast:
            broadcast_model(model, comm)
        self.stage, self.comm, self.schedule = stage, comm, schedule
        self._mail = Mail(comm, schedule)
        self._tables = table_group(stage, comm, schedule)
        self._parted = parted_chunks(schedule, comm.rank)
        self._replica: DataParallel | OnlyReplica = OnlyReplica(stage)
        self._passes: dict[tuple[int, int], ChunkPass] = {}
        self.peak_passes, self.record = 0, None

    def join(self, replica: DataParallel) -> None:
        """Let the stage's gradients be those of several replicas of the pipeline.

        replica  made of this rank's stage and the group of the mesh's axis data: DataParallel, or
                 Zero of stage 1

        Raises InputError for another module, and stages 2 and 3 of ZeRO, which would send the
        gradients of every micro-batch.
        """
        check_replica(replica, self.stage)
        self._replica = replica

    def follow(self, schedule: Schedule) -> None:
        """Execute another schedule from now on, such as one of more micro-batches.

        schedule  which puts the virtual stages where they are; a record of steps is left behind

        Raises InputError for one that puts them elsewhere, or cannot be run.
        """
        check_same_places(schedule, self.schedule)
        check_schedule(schedule)
        check_recompute(schedule, self.stage.recompute)
        self.schedule, self.record = schedule, None
        self._mail = Mail(self.comm, schedule)
        self._parted = parted_chunks(schedule, self.comm.rank)

    def watch(self, clock: str | StageTimes = "wall", *, count_bytes: bool = False) -> StepRecord:
        """Record every step from now on: when each stage computes what, and the bytes it keeps.

        clock        "wall": the machine's, in seconds; or what each instruction is said to take, in
                     slots, whatever it really takes
        count_bytes  count what autograd keeps; steps become slower
        returns      the record, also in the attribute record: its timeline() and peak_bytes

        Communicates: with "wall" what align_clocks does; with slots, 8 bytes beside each message.
        Raises InputError for times that do not fit the schedule.
        """
        if isinstance(clock, StageTimes):
            own = SlotClock(clock, self.comm.rank, self.schedule)
        else:
            check_choice("clock", clock, ("wall",))
            own = WallClock(self.comm)
        held = HeldTensors(self.stage) if count_bytes else None
        self.record = StepRecord(self.comm, self.schedule, own, held)
        self._mail.stamp_with(own if own.stamps_messages else None)
        return self.record

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
            for instruction in self.schedule.stages[self.comm.rank]:
                arrived = self._mail.take(self._incoming(instruction))
                with self._computing(instruction):
                    made = self._compute(instruction, arrived, pieces, objective, context)
                if made is not None:
                    self._mail.hand_on(*made)
            self._mail.finish()
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
        self._mail.begin_step()
        if self.record is not None:
            self.record.begin_step()
        self._passes, self.peak_passes = {}, 0
        self._loss_sum, self._num_tokens = torch.zeros((), dtype=torch.float64), 0
        self._replica.begin_passes()

    def _incoming(self, instruction: Instruction) -> Product | None:
        """Return the product of a neighbouring chunk that an instruction works on."""
        place = self.schedule.virtual_stage(self.comm.rank, instruction.chunk)
        if instruction.kind == FORWARD:
            return (FORWARD, place - 1, instruction.micro_batch) if place else None
        last = place == self.schedule.num_virtual_stages - 1
        if instruction.kind == WEIGHT_GRADIENT or last:
            return None
        return INPUT_GRADIENT, place + 1, instruction.micro_batch

    def _computing(self, instruction: Instruction):
        if self.record is None:
            return nullcontext()
        return self.record.computing(instruction, *self._mail.stamps)

    def _compute(
        self,
        instruction: Instruction,
        arrived: Tensor | None,
        pieces: list,
        objective: Objective,
        context: Callable,
    ) -> tuple[Product, Tensor] | None:
        """Execute an instruction; returns what a neighbouring chunk needs of it."""
        key = instruction.chunk, instruction.micro_batch
        place = self.schedule.virtual_stage(self.comm.rank, instruction.chunk)
        if instruction.kind == FORWARD:
            made = self._forward(key, arrived, pieces[instruction.micro_batch], objective, context)
        elif instruction.kind == BACKWARD:
            made = self._passes.pop(key).backward(arrived, self._replica.add_pass)
        elif instruction.kind == INPUT_GRADIENT:
            made = self._passes[key].input_gradient(arrived)
            self._note_held()
        else:
            made = self._passes.pop(key).weight_gradient(self._replica.add_pass)
        kind = FORWARD if instruction.kind == FORWARD else INPUT_GRADIENT
        return None if made is None else ((kind, place, instruction.micro_batch), made)

    def _forward(
        self,
        key: tuple[int, int],
        hidden: Tensor | None,
        piece: object,
        objective: Objective,
        context: Callable,
    ) -> Tensor | None:
        one = ChunkPass(self.stage, key[0], hidden, key[0] in self._parted)
        self._passes[key] = one
        self.peak_passes = max(self.peak_passes, len(self._passes))
        held = self.record.held if self.record is not None else None
        with context(), held.counting(piece) if held is not None else nullcontext():
            made = one.forward(objective, piece, LOSS_DIVISOR)
        self._note_held()
        if one.loss_sum is not None:
            self._loss_sum = self._loss_sum + one.loss_sum.double()
            self._num_tokens += int(one.num_tokens)
        return made

    def _note_held(self) -> None:
        if self.record is not None:
            self.record.note_held(sum(one.owed_bytes for one in self._passes.values()))

    def _finish_step(self, batch: object) -> tuple[Tensor, int]:
        report = torch.zeros(2 + self.comm.world_size, dtype=torch.float64)
        report[0], report[1] = self._loss_sum, self._num_tokens
        report[2 + self.comm.rank] = digest_of(batch)
        report = self.comm.all_reduce(report.to(self.comm.device)).cpu()
        check_digests(report[2:].tolist())
        if self._tables is not None:
            table = self.stage.get_parameter(TABLE)
            if table.requires_grad:
                self._tables.all_reduce(table.grad, out=table.grad)
        return self._replica.finish_passes(report[0], int(report[1]))
