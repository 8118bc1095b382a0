"""One step of a pipeline, simulated or measured: who computed what, and when.

Chapter 10 reads bubbles, idle slots and peaks of activations off it. Profilers (Nsight Systems,
torch.profiler) see each kernel of a step; here a slot is a whole instruction.
"""

from dataclasses import dataclass
from math import inf

from slimlab.config import check_number, require
from slimlab.plan.pipeline_schedule import Instruction, held_activations


@dataclass(frozen=True)
class Slot:
    """When a stage computed an instruction.

    stage        which
    instruction  what
    start_s      seconds after the step began
    end_s        likewise
    """

    stage: int
    instruction: Instruction
    start_s: float
    end_s: float


@dataclass(frozen=True)
class MessageSlot:
    """When a message was on its way.

    src      the stage that sent it
    dst      the stage that it went to
    start_s  seconds after the step began
    end_s    likewise
    """

    src: int
    dst: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StepTimeline:
    """One step of a pipeline: who computed what, and when; simulated or measured.

    name        of the schedule
    slots       for each stage its instructions, in the order of their starts
    num_chunks  of each stage
    messages    those between different stages

    Raises InputError if a stage computed two things at a time.
    """

    name: str
    slots: tuple[tuple[Slot, ...], ...]
    num_chunks: int = 1
    messages: tuple[MessageSlot, ...] = ()

    def __post_init__(self):
        require(any(self.slots), "a step that computes something", "no slot", "give its slots")
        for row in self.slots:
            for one, after in zip(row, row[1:]):
                asked = "slots of a stage one after the other"
                given = f"stage {one.stage}: {one.instruction} ends at {one.end_s:g}, "
                given += f"{after.instruction} starts at {after.start_s:g}"
                require(one.end_s <= after.start_s, asked, given, "give them in their order")

    @property
    def num_stages(self) -> int:
        """Number p of stages."""
        return len(self.slots)

    @property
    def step_s(self) -> float:
        """Seconds from the beginning of the step until the last stage has computed."""
        return max(row[-1].end_s for row in self.slots if row)

    @property
    def computing_s(self) -> tuple[float, ...]:
        """Seconds that each stage computed."""
        return tuple(sum(one.end_s - one.start_s for one in row) for row in self.slots)

    @property
    def idle_s(self) -> tuple[float, ...]:
        """Seconds of the step in which each stage computed nothing: idle, or in messages."""
        return tuple(self.step_s - computing for computing in self.computing_s)

    @property
    def bubble_fraction(self) -> float:
        """Idle time over all time, the share that GPipe's paper states: below 1.

        Huang et al. 2019 (arXiv:1811.06965), section 2.3.
        """
        return sum(self.idle_s) / (self.num_stages * self.step_s)

    @property
    def bubble_ratio(self) -> float:
        """Idle time over the time of computing, as Megatron-LM's paper states it: any number.

        Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
        """
        return sum(self.idle_s) / sum(self.computing_s)

    @property
    def longest_span_s(self) -> float:
        """Seconds from the first start to the last end of the stage where these are longest.

        A stage that starts late may end late, if the optimizer waits for nobody: then steps follow
        each other at this distance.
        """
        return max(row[-1].end_s - row[0].start_s for row in self.slots if row)

    @property
    def span_bubble_fraction(self) -> float:
        """Share of the longest span in which stages compute nothing: the zero-bubble paper's.

        Qi et al. 2024 (arXiv:2401.10241), section 3: their steps follow each other at that span.
        """
        return 1 - sum(self.computing_s) / (self.num_stages * self.longest_span_s)

    def gaps(self, stage: int) -> tuple[tuple[float, float], ...]:
        """List when a stage computed nothing, from the beginning of the step to its end.

        stage    which
        returns  pairs of seconds, start and end
        """
        row = self.slots[stage]
        ends = [0, *(one.end_s for one in row)]
        starts = [*(one.start_s for one in row), self.step_s]
        return tuple((end, start) for end, start in zip(ends, starts) if start > end)

    def idle_slots(self, slot_s: float = 1) -> tuple[int, ...]:
        """Count the idle slots of each stage, for times that are whole numbers of slots.

        slot_s  seconds of a slot

        Raises InputError where the idle time of a stage is no whole number of slots.
        """
        check_number("slot_s", slot_s, float, 0, inf, above=True)
        counts = [idle / slot_s for idle in self.idle_s]
        for stage, count in enumerate(counts):
            whole = abs(count - round(count)) < 1e-6
            asked = f"idle times in whole slots of {slot_s:g} s"
            given, change = f"stage {stage}: {count:.6g} slots", "simulate with times that divide"
            require(whole, asked, given, change)
        return tuple(round(count) for count in counts)

    def held(self, stage: int) -> tuple[tuple[float, int], ...]:
        """List how many activations a stage held, and from when on.

        stage    which
        returns  pairs: the start of an instruction in seconds, activations while it runs, in units
                 of one micro-batch in one chunk
        """
        row = self.slots[stage]
        counts = held_activations([one.instruction for one in row])
        return tuple((one.start_s, count) for one, (_, count) in zip(row, counts))

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """The most activations that each stage held, in units of one micro-batch in one chunk."""
        return tuple(
            max((count for _, count in self.held(stage)), default=0)
            for stage in range(self.num_stages)
        )
