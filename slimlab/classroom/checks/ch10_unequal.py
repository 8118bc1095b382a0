"""Grader of exercise 10.2 of chapter 10: a schedule for stages of unequal cost.

The simulator scores the student's rows by their peaks and their step. The measure is 1F1B in the
same memory: with as many forwards ahead as it has elsewhere, if the memory of this stage and of all
before it allows. No step is shorter than a stage's own work behind the forwards that lead to it.

Qi et al. 2024 (arXiv:2401.10241), section 5, search such schedules with a heuristic or an integer
program over measured times.
"""

from dataclasses import dataclass
from functools import cache

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect
from slimlab.config import InputError
from slimlab.parallel.schedule_checks import check_schedule
from slimlab.parallel.schedules import alternate
from slimlab.plan.pipeline_schedule import (
    BACKWARD,
    FORWARD,
    Instruction,
    Schedule,
    peak_activations,
    read_schedule,
)
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes

LEFT = 0.5  # of the idle time that 1F1B has above the least there can be


@dataclass(frozen=True)
class Case:
    """A pipeline: what it is called, seconds and memory of each stage.

    name               in a message
    forward, inputs, weights  whole seconds of each stage: forward, input and weight gradient
    num_micro_batches  m
    most_held          of each stage
    """

    name: str
    forward: tuple
    inputs: tuple
    weights: tuple
    num_micro_batches: int
    most_held: tuple

    @property
    def times(self) -> StageTimes:
        """As the simulator takes them."""
        return StageTimes(self.forward, self.inputs, self.weights)


SHOWN = (
    Case("slow at the end", (2, 2, 2, 4), (2, 2, 2, 4), (2, 2, 2, 3), 8, (4, 4, 3, 3)),
    Case("slow in the middle", (2, 4, 2, 2), (2, 4, 2, 2), (2, 4, 2, 2), 8, (4, 3, 2, 1)),
    Case("slow at the beginning", (5, 3, 3, 3), (5, 3, 3, 3), (4, 3, 3, 3), 6, (4, 4, 3, 2)),
    Case("little memory", (3, 2, 2, 5), (3, 2, 2, 5), (3, 2, 2, 4), 8, (2, 3, 2, 2)),
    Case("recomputation", (2, 2, 3, 2), (4, 4, 5, 4), (2, 2, 3, 2), 7, (5, 4, 3, 2)),
)
OTHERS = (
    Case("one stage", (3,), (2,), (4,), 5, (1,)),
    Case("two stages", (3, 5), (3, 6), (2, 4), 6, (2, 1)),
    Case(
        "fewer micro-batches than stages", (2, 3, 2, 4, 2), (2, 3, 2, 4, 2), (1,) * 5, 3, (3,) * 5
    ),
    Case("room for one in a late stage", (3, 2, 4), (3, 3, 4), (2, 2, 3), 6, (4, 4, 1)),
    Case("room for one in the first", (2, 2, 2), (2, 3, 2), (2, 2, 2), 4, (1, 3, 3)),
)

unequal = Exercise(
    "10.2",
    "Stages of unequal cost",
    requires=("rows_for",),
    stars=3,
    hints=(
        "Play the pipeline yourself: at each moment, some stages are free. What may each of them "
        "do next? Write down what it does, and when it ends.",
        "A stage that could do several things: which of them is somebody else waiting for? Which "
        "can wait until the stage would be idle?",
        "W lets go of the activations, I does not. A stage whose memory is full may have to do W "
        "although a forward could start.",
        "The three kinds come in the order of the micro-batches on each stage, so a count for each "
        "says what is next. Who made what it needs, and when?",
        "Take the instruction that can start first of all stages; if several can, I before F "
        "before W. Then write it down, with its end, and look again.",
    ),
)


@cache
def least_s(case: Case) -> int:
    """Return what no schedule can be shorter than.

    case  the pipeline
    """
    each = zip(case.forward, case.inputs, case.weights)
    work = [case.num_micro_batches * sum(one) for one in each]
    return max(sum(case.forward[:stage]) + own for stage, own in enumerate(work))


@cache
def baseline_s(case: Case) -> int:
    """Return the step of 1F1B in the memory that there is.

    case  the pipeline
    """
    numbers = range(case.num_micro_batches)
    lists = [[Instruction(kind, n) for n in numbers] for kind in (FORWARD, BACKWARD)]
    num_stages, orders = len(case.forward), []
    for stage in range(num_stages):
        room = min(case.most_held[: stage + 1]) - 1
        orders.append(alternate(*lists, warmup=min(num_stages - 1 - stage, room)))
    return simulate(Schedule("1f1b", len(numbers), tuple(orders)), case.times).step_s


def schedule_for(student, case: Case) -> Schedule:
    """Read the rows that the student writes for a case; fail unless they are a schedule that ends.

    student, case  whose rows, for which pipeline
    """
    rows = function_of(student, "rows_for")(
        list(case.forward), list(case.inputs), list(case.weights), case.num_micro_batches,
        list(case.most_held),
    )  # fmt: skip
    what, num_stages = f"rows_for, {case.name}", len(case.forward)
    found = isinstance(rows, list | tuple) and all(isinstance(row, str) for row in rows)
    look = "its last line: for each stage a string such as 'F0 F1 B0 B1'"
    expect(found, f"{what}: {form_of(rows)}", f"a list of {num_stages} strings", look)
    expect(len(rows) == num_stages, f"{what}: {len(rows)} rows", f"{num_stages} rows", look)
    asked = f"each of {case.num_micro_batches} micro-batches once through every stage"
    try:
        schedule = read_schedule(rows)
        if schedule.num_micro_batches == case.num_micro_batches:
            check_schedule(schedule)
    except InputError as error:
        *_, given, change = str(error).splitlines()
        saw = f"{what}: {given.strip().removeprefix('given:').strip()}"
        look = change.strip().removeprefix("change:").strip()
        raise CheckFailed(saw, f"{asked}, and lists that end", look) from None
    saw = f"{what}: rows with {schedule.num_micro_batches} micro-batches"
    look = "the loop over micro-batches: from 0 to num_micro_batches - 1"
    expect(schedule.num_micro_batches == case.num_micro_batches, saw, asked, look)
    return schedule


def step_of(student, case: Case) -> int:
    """Return the seconds of the student's step; fail if a stage holds more than it may.

    student, case  whose rows, for which pipeline
    """
    schedule = schedule_for(student, case)
    for stage, peak in enumerate(peak_activations(schedule)):
        saw = f"rows_for, {case.name}: stage {stage} holds {peak} micro-batches"
        look = f"row {stage}: W, or B, lets go of what F takes hold of; I does not"
        expect(peak <= case.most_held[stage], saw, f"at most {case.most_held[stage]}", look)
    return simulate(schedule, case.times).step_s


def expect_step(student, case: Case, limit_s: float, asked: str, look: str) -> None:
    """Fail if the student's step is longer than a limit, or holds too much.

    student, case  whose rows, for which pipeline
    limit_s        the longest step
    asked, look    what the limit is, and where to look, for the message
    """
    step_s = step_of(student, case)
    saw = f"rows_for, {case.name}: a step of {step_s:g} s"
    expect(step_s <= limit_s, saw, f"at most {limit_s:g} s, {asked}", look)


IDLE_LOOK = "draw it with show.schedule_figure: which stage is idle, and whom does it wait for?"


@unequal.property("rows that are a schedule and end", points=2)
def _(student, numbers):
    for case in SHOWN:
        schedule_for(student, case)


@unequal.property("no stage holds more than it may", points=1)
def _(student, numbers):
    for case in SHOWN:
        step_of(student, case)


@unequal.property("no longer than 1F1B in the same memory", points=2)
def _(student, numbers):
    for case in SHOWN:
        expect_step(student, case, baseline_s(case), "1F1B in the same memory", IDLE_LOOK)


@unequal.property("half of 1F1B's bubble is gone", points=3)
def _(student, numbers):
    for case in SHOWN:
        most = least_s(case) + LEFT * (baseline_s(case) - least_s(case))
        asked = f"half way from 1F1B, {baseline_s(case):g} s, to the least, {least_s(case)} s"
        look = "what fills the end of a step: which part of a backward does nobody wait for?"
        expect_step(student, case, most, asked, look)


@unequal.property("other pipelines: as short as 1F1B, in the memory there is", points=2)
def _(student, numbers):
    for case in OTHERS:
        expect_step(student, case, baseline_s(case), "1F1B in the same memory", IDLE_LOOK)
