"""Work a pipeline schedule through, with given times: when does every instruction start and end?

Chapter 10 simulates schedules before it runs them, and draws the two beside each other. An
instruction starts as soon as its stage is free and all it needs is there; nothing else is decided,
so the result does not depend on the order in which stages are looked at.

Production: torch's schedules are simulated in slots of equal length; Qi et al. search for the best
order with an integer program over the same times.
"""

from collections import deque
from dataclasses import dataclass

from slimlab.config import InputError
from slimlab.plan.pipeline_schedule import Instruction, Product, Schedule
from slimlab.plan.stage_times import StageTimes
from slimlab.plan.step_timeline import MessageSlot, Slot, StepTimeline


@dataclass(frozen=True)
class Waiting:
    """A stage that cannot go on, at which instruction, and whom it waits for.

    stage            which
    instruction      that it cannot start, or whose result it cannot hand over
    for_stage        whom it waits for
    for_instruction  the one of that stage that makes what is needed, None if its list has none; if
                     sending, the one that stage is at, None if it has ended
    sending          it has computed, and waits until its message is taken
    """

    stage: int
    instruction: Instruction
    for_stage: int
    for_instruction: Instruction | None
    sending: bool = False

    def __str__(self):
        start = f"stage {self.stage} at {self.instruction} waits"
        if self.sending:
            at = f"is at {self.for_instruction}" if self.for_instruction else "has ended"
            return f"{start} until stage {self.for_stage}, which {at}, takes its message"
        if self.for_instruction is None:
            return f"{start} for stage {self.for_stage}, whose list does not have what it needs"
        if self.for_stage == self.stage:
            return f"{start} for its own {self.for_instruction}, which stands later"
        return f"{start} for {self.for_instruction} of stage {self.for_stage}"


class ScheduleDeadlockError(InputError):
    """Say which stages wait for each other; a schedule that can never end.

    waiting  every stage that cannot go on
    circle   the stages that wait for one another in a circle; empty if something is missing
    """

    def __init__(self, waiting: tuple[Waiting, ...], circle: tuple[int, ...]):
        around = " -> ".join(map(str, (*circle, *circle[:1])))
        change = f"break the circle {around}: one of them must first do what another waits for"
        if len(circle) == 1:
            change = f"move what stage {circle[0]} waits for to before it"
        if not circle:
            change = "add what is missing"
        given = "; ".join(map(str, waiting))
        super().__init__("a schedule in which some stage can always go on", given, change)
        self.waiting, self.circle = waiting, circle


def simulate(schedule: Schedule, times: StageTimes) -> StepTimeline:
    """Find the start and the end of every instruction.

    schedule  in any order that ends
    times     of each virtual stage, and how messages behave
    returns   the timeline; whole numbers as times give whole numbers, without rounding

    Raises ScheduleDeadlockError, an InputError, if some stage can never go on: it names stages,
    instructions and whom they wait for. Raises InputError for times that do not fit the schedule.
    """
    times.check_for(schedule.num_virtual_stages)
    run = _Run(schedule, times)
    run.go_on()
    waiting = run.waiting()
    if waiting:
        raise ScheduleDeadlockError(waiting, _circle(waiting))
    slots = tuple(map(tuple, run.slots))
    return StepTimeline(schedule.name, slots, schedule.num_chunks, tuple(run.messages))


class _Run:
    """Where each stage is. `made` says when a product was ready, `arrived` when it got there."""

    def __init__(self, schedule: Schedule, times: StageTimes):
        self.schedule, self.times = schedule, times
        stages = range(schedule.num_stages)
        self.position = [0 for _ in stages]
        self.free_s = [0 for _ in stages]
        self.sending: list[Product | None] = [None for _ in stages]
        self.slots: list[list[Slot]] = [[] for _ in stages]
        self.messages: list[MessageSlot] = []
        self.made: dict[Product, float] = {}
        self.arrived: dict[Product, float] = {}
        self.awake = deque(stages)

    def go_on(self) -> None:
        while self.awake:
            stage = self.awake.popleft()
            while self._start_next(stage):
                pass

    def next_of(self, stage: int) -> Instruction | None:
        order = self.schedule.stages[stage]
        return order[self.position[stage]] if self.position[stage] < len(order) else None

    def time_of(self, stage: int, product: Product) -> float | None:
        there = self.arrived if self.schedule.receiver_of(product) == stage else self.made
        return there.get(product)

    def _start_next(self, stage: int) -> bool:
        one = self.next_of(stage)
        if one is None or self.sending[stage] is not None:
            return False
        needs = self.schedule.needs(stage, one)
        for product in needs:
            self._take(stage, product)
        ready = [self.time_of(stage, product) for product in needs]
        if None in ready:
            return False
        start = max([self.free_s[stage], *ready])
        place = self.schedule.virtual_stage(stage, one.chunk)
        end = start + self.times.seconds_of(one, place)
        self.slots[stage].append(Slot(stage, one, start, end))
        self.free_s[stage] = end
        for product in self.schedule.makes(stage, one):
            self.made[product] = end
            self._send(stage, product)
        # A send that waits for its receiver keeps the instruction open.
        self.position[stage] += self.sending[stage] is None
        return True

    def _send(self, src: int, product: Product) -> None:
        dst = self.schedule.receiver_of(product)
        if dst is None:
            return
        self.awake.append(dst)
        if self.times.messages == "rendezvous":
            self.sending[src] = product
            return
        end = self._message(src, dst, product, self.made[product])
        if self.times.messages == "block":
            self.free_s[src] = end

    def _take(self, dst: int, product: Product) -> None:
        """Take a message from a sender that waits for this stage."""
        src = self.schedule.place_of(product[1])[0]
        if self.sending[src] != product or self.schedule.receiver_of(product) != dst:
            return
        end = self._message(src, dst, product, max(self.free_s[src], self.free_s[dst]))
        self.free_s[src] = self.free_s[dst] = end
        self.sending[src] = None
        self.position[src] += 1
        self.awake.append(src)

    def _message(self, src: int, dst: int, product: Product, start: float) -> float:
        end = start + self.times.message_of(product)
        self.arrived[product] = end
        self.messages.append(MessageSlot(src, dst, start, end))
        return end

    def waiting(self) -> tuple[Waiting, ...]:
        """Say of each stage that has not come to its end whom it waits for."""
        found = []
        for stage in range(self.schedule.num_stages):
            one = self.next_of(stage)
            if one is None:
                continue
            product = self.sending[stage]
            if product is not None:
                target = self.schedule.receiver_of(product)
                found.append(Waiting(stage, one, target, self.next_of(target), sending=True))
                continue
            needs = self.schedule.needs(stage, one)
            missing = next(need for need in needs if self.time_of(stage, need) is None)
            source = self.schedule.place_of(missing[1])[0]
            later = self.schedule.stages[source][self.position[source] :]
            makers = (it for it in later if missing in self.schedule.makes(source, it))
            found.append(Waiting(stage, one, source, next(makers, None)))
        return tuple(found)


def _circle(waiting: tuple[Waiting, ...]) -> tuple[int, ...]:
    """Follow who waits for whom until a stage comes again."""
    whom = {one.stage: one.for_stage for one in waiting}
    for start in whom:
        trail = [start]
        while trail[-1] in whom and whom[trail[-1]] not in trail:
            trail.append(whom[trail[-1]])
        if trail[-1] in whom:
            return tuple(trail[trail.index(whom[trail[-1]]) :])
    return ()
