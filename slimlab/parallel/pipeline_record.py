"""What a step of a pipeline was: who computed when, by the clock or in slots, and what was held.

Chapter 10 draws it beside the simulated step. On a laptop seconds say little about stages that
share its cores. So a record can count slots instead: each stage has a clock that moves by the slots
an instruction is said to take; each message carries its sender's clock, and an instruction starts
when its stage is free and its message has arrived (Lamport's rule, 1978, Communications of the
ACM 21:7). The order and the messages are those of the real run.

Production: profilers record kernels with the machine's clock (torch.profiler, Nsight Systems).
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.clocks import align_clocks
from slimlab.config import require
from slimlab.parallel.stages import Stage
from slimlab.plan.pipeline_schedule import Instruction, Product, Schedule
from slimlab.plan.stage_times import StageTimes
from slimlab.plan.step_timeline import MessageSlot, Slot, StepTimeline
from slimlab.train.accumulate import map_tensors


class SlotClock:
    """One stage's clock, which computing and messages move by what they are said to take.

    times  of all virtual stages; their messages overlap
    stage  whose clock it is
    schedule  what each stage does

    now_s  where it stands

    Raises InputError for messages that block, and lists that do not fit.
    """

    stamps_messages = True

    def __init__(self, times: StageTimes, stage: int, schedule: Schedule):
        require(
            times.messages == "overlap",
            'messages = "overlap": what a clock on each stage can count',
            f'messages = "{times.messages}"',
            "simulate such messages (slimlab.plan.pipeline_simulator)",
        )
        times.check_for(schedule.num_virtual_stages)
        self._times, self._stage, self._schedule = times, stage, schedule
        self.now_s = 0.0

    def begin_step(self) -> None:
        """Show 0 again."""
        self.now_s = 0.0

    def start(self, arrived_s: float | None) -> float:
        """Return when an instruction starts.

        arrived_s  when its message came; None: it needs none
        """
        self.now_s = max(self.now_s, arrived_s or 0.0)
        return self.now_s

    def end(self, instruction: Instruction) -> float:
        """Move by what an instruction takes, and return when it ends.

        instruction  that was computed
        """
        place = self._schedule.virtual_stage(self._stage, instruction.chunk)
        self.now_s += self._times.seconds_of(instruction, place)
        return self.now_s

    def arrival(self, product: Product, sent_s: float) -> float:
        """Return when a message arrives.

        product  that it carries
        sent_s   when its stage had made it
        """
        return sent_s + self._times.message_of(product)


class WallClock:
    """One stage's clock of the machine, in the time of stage 0.

    comm  of the stages

    Communicates: what align_clocks does.
    """

    stamps_messages = False

    def __init__(self, comm: Communicator):
        offset = align_clocks(comm, time.perf_counter)
        # Processes of one host have one clock: what was measured there is noise.
        known = abs(offset.offset_s) > offset.uncertainty_s
        self._offset_s = offset.offset_s if known else 0.0

    def begin_step(self) -> None:
        """Go on."""

    def start(self, arrived_s: float | None) -> float:
        """Return the time.

        arrived_s  is not needed: the message is there
        """
        return time.perf_counter() + self._offset_s

    def end(self, instruction: Instruction) -> float:
        """Return the time.

        instruction  that was computed
        """
        return time.perf_counter() + self._offset_s


class StepRecord:
    """What the last step of a pipeline was.

    comm         of the stages
    schedule     what each stage does
    clock        this stage's
    held         counts bytes; None: they are not counted

    peak_bytes   most that was kept for backward passes, after any instruction; 0 if not counted
    """

    def __init__(
        self,
        comm: Communicator,
        schedule: Schedule,
        clock: SlotClock | WallClock,
        held: "HeldTensors | None",
    ):
        self.comm, self.schedule, self.clock, self.held = comm, schedule, clock, held
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the step before."""
        self.peak_bytes = 0
        self._rows: list[tuple[float, float, float, float]] = []
        self.clock.begin_step()

    @contextmanager
    def computing(
        self, instruction: Instruction, sent_s: float | None, arrived_s: float | None
    ) -> Iterator[None]:
        """Note when an instruction is computed.

        instruction  which
        sent_s       when the message that it needs was sent, arrived_s when it came; None: unknown
        arrived_s    see sent_s
        """
        start_s = self.clock.start(arrived_s)
        yield
        end_s = self.clock.end(instruction)
        message = (sent_s, arrived_s) if sent_s is not None else (torch.nan, torch.nan)
        self._rows.append((start_s, end_s, *message))

    def note_held(self, owed_bytes: int) -> None:
        """Look how much is kept.

        owed_bytes  of gradients that wait for weight gradients
        """
        if self.held is not None:
            self.peak_bytes = max(self.peak_bytes, self.held.live_bytes() + owed_bytes)

    def timeline(self) -> StepTimeline:
        """Return the whole pipeline's last step, the same on every rank, in seconds or slots.

        Communicates: one all_gather of four numbers for each instruction of the longest list.
        """
        length = max(map(len, self.schedule.stages))
        mine = torch.full((length, 4), torch.nan, dtype=torch.float64)
        mine[: len(self._rows)] = torch.tensor(self._rows, dtype=torch.float64)
        whole = self.comm.all_gather(mine.to(self.comm.device)).cpu().view(-1, length, 4)
        slots, messages = [], []
        zero_s = 0.0 if self.clock.stamps_messages else float(whole[:, 0, 0].min())
        for stage, order in enumerate(self.schedule.stages):
            row = (whole[stage, : len(order)] - zero_s).tolist()
            slots.append(tuple(Slot(stage, one, *at[:2]) for one, at in zip(order, row)))
            for one, (_, _, sent_s, arrived_s) in zip(order, row):
                src = source_of(self.schedule, stage, one)
                if src is not None and sent_s == sent_s:  # not a number: it was not recorded
                    messages.append(MessageSlot(src, stage, sent_s, arrived_s))
        return StepTimeline(
            self.schedule.name, tuple(slots), self.schedule.num_chunks, tuple(messages)
        )


def source_of(schedule: Schedule, stage: int, instruction: Instruction) -> int | None:
    """Return the stage whose message an instruction needs; None: it needs none.

    schedule     what each stage does
    stage        whose instruction
    instruction  one of its
    """
    for product in schedule.needs(stage, instruction):
        if schedule.receiver_of(product) == stage:
            return schedule.place_of(product[1])[0]
    return None


class HeldTensors:
    """Count what autograd keeps of forward passes: every storage once, while something needs it.

    stage  whose weights and buffers do not count
    """

    def __init__(self, stage: Stage):
        self._own = {_address(x) for x in (*stage.parameters(), *stage.buffers())}
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    @contextmanager
    def counting(self, batch: object) -> Iterator[None]:
        """Count what is saved in a with block.

        batch  given by the caller; its tensors do not count
        """
        given = set(self._own)
        map_tensors(lambda one: given.add(_address(one)), batch)

        def pack(tensor: Tensor) -> _Kept:
            # Detached: an operation's own result would keep the operation, and that this.
            kept = _Kept(tensor.detach())
            if _address(tensor) not in given:
                self._kept.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield

    def live_bytes(self) -> int:
        """Add up what is kept now."""
        storages = [kept.tensor.untyped_storage() for kept in self._kept]
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


class _Kept:
    """What autograd holds instead of a tensor: it goes when autograd lets go."""

    __slots__ = ("tensor", "__weakref__")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
