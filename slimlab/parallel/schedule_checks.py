"""Is a schedule one that can be run? Everything once, nothing before what it needs, no deadlock.

Chapter 10 checks the schedules of the book with it, and its exercises those of readers. A pipeline
checks its schedule before the first message, on every rank alike, so that no rank waits in vain.

Production: torch.distributed.pipelining validates schedules that it reads from a file, and finds a
deadlock as a simulation that makes no progress; at run time a deadlock is a timeout.
"""

from collections import Counter
from collections.abc import Iterator

from slimlab.config import check_number, require
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Instruction,
    Product,
    Schedule,
)
from slimlab.plan.pipeline_simulator import ScheduleDeadlockError, Waiting, simulate
from slimlab.plan.stage_times import StageTimes
from slimlab.plan.step_timeline import Slot, StepTimeline

SHOWN = 5


def check_schedule(schedule: Schedule, messages: str = "overlap") -> None:
    """Refuse a schedule that computes something twice or not at all, or that can never end.

    schedule  to look at
    messages  how they behave: "overlap", "block" or "rendezvous", as in StageTimes

    Raises InputError that names stages and instructions; ScheduleDeadlockError, an InputError, if
    every stage that has not ended waits for another one.
    """
    found = order_problems(schedule)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    require(
        not found,
        "each micro-batch once through each chunk: forward, then its gradients",
        "; ".join(found[:SHOWN]) + more,
        "mend the lists of these stages",
    )
    simulate(schedule, StageTimes(1, 1, 1, messages=messages))


def order_problems(schedule: Schedule) -> list[str]:
    """List what is missing, doubled or in the wrong order on a stage by itself.

    schedule  to look at
    returns   sentences that begin with the stage; none if all is well
    """
    return [
        f"stage {stage}: {problem}"
        for stage, order in enumerate(schedule.stages)
        for chunk in range(schedule.num_chunks)
        for micro_batch in range(schedule.num_micro_batches)
        for problem in _problems_of_one(order, micro_batch, chunk)
    ]


def _problems_of_one(order: tuple[Instruction, ...], micro_batch: int, chunk: int) -> Iterator[str]:
    """Look at one micro-batch in one chunk."""
    mine = [one for one in order if (one.micro_batch, one.chunk) == (micro_batch, chunk)]
    counts = Counter(one.kind for one in mine)
    whole = Instruction(BACKWARD, micro_batch, chunk)
    halves = [Instruction(kind, micro_batch, chunk) for kind in (INPUT_GRADIENT, WEIGHT_GRADIENT)]
    split = any(counts[one.kind] for one in halves)
    if split and counts[BACKWARD]:
        yield f"{whole} stands beside {' and '.join(str(o) for o in halves if counts[o.kind])}"
    wanted = [Instruction(FORWARD, micro_batch, chunk), *(halves if split else [whole])]
    for one in wanted:
        if counts[one.kind] != 1:
            yield f"{one} is missing" if not counts[one.kind] else f"{one} stands more than once"
    for earlier, later in zip(wanted, wanted[1:]):
        both = counts[earlier.kind] and counts[later.kind]
        if both and mine.index(earlier) > mine.index(later):
            yield f"{later} stands before {earlier}"


def find_deadlock(schedule: Schedule, messages: str = "overlap") -> tuple[Waiting, ...]:
    """Find the stages that can never go on, with the instruction and whom they wait for.

    schedule  to look at
    messages  "overlap" or "block": a message is kept until it is needed; "rendezvous": a sender
              waits for its receiver, so that an order can deadlock that would not otherwise
    returns   one entry for each stage that is stuck; none if the schedule ends
    """
    try:
        simulate(schedule, StageTimes(1, 1, 1, messages=messages))
    except ScheduleDeadlockError as error:
        return error.waiting
    return ()


def timeline_problems(
    schedule: Schedule, timeline: StepTimeline, *, message_s: float = 0, tolerance_s: float = 0
) -> list[str]:
    """List what a timeline, simulated or measured, has against the schedule that it is said to be.

    schedule     what each stage should have done
    timeline     what it did, and when
    message_s    the least time between an instruction and one on another stage that needs it
    tolerance_s  how far clocks of different stages may be apart
    returns      sentences: another order than the schedule's, or an instruction that starts before
                 what it needs has ended; none if all is well

    Raises InputError for negative times.
    """
    check_number("message_s", message_s, float, 0, float("inf"))
    check_number("tolerance_s", tolerance_s, float, 0, float("inf"))
    orders = [[str(slot.instruction) for slot in row] for row in timeline.slots]
    wanted = [[str(one) for one in order] for order in schedule.stages]
    if orders != wanted:
        stages = range(max(len(orders), len(wanted)))
        other = [n for n in stages if orders[n : n + 1] != wanted[n : n + 1]]
        return [f"stage {stage} did not do what its list says" for stage in other]
    made = _makers(schedule, timeline)
    found = []
    for slot in (slot for row in timeline.slots for slot in row):
        for product in schedule.needs(slot.stage, slot.instruction):
            maker = made[product]
            away = maker.stage != slot.stage
            earliest = maker.end_s + (message_s - tolerance_s if away else 0)
            # Sums of times differ in their last digits with their order.
            if slot.start_s < earliest - 1e-9 * abs(earliest):
                found.append(
                    f"stage {slot.stage} starts {slot.instruction} at {slot.start_s:g} s, but "
                    f"{maker.instruction} of stage {maker.stage} ends at {maker.end_s:g} s"
                )
    return found


def _makers(schedule: Schedule, timeline: StepTimeline) -> dict[Product, Slot]:
    return {
        product: slot
        for row in timeline.slots
        for slot in row
        for product in schedule.makes(slot.stage, slot.instruction)
    }
