"""Grader of exercise 10.3 of chapter 10: lists of instructions that wait for each other.

The oracle of the first part tries every move of one instruction. In the second part neighbours have
to list the messages between them in the same order, so all rows are alike; each turn from backwards
to forwards empties the pipeline, and the memory says how many turns there must be.

Production fuses a send with the receive that crosses it (Megatron-LM, torch.distributed.pipelining)
and so has 1F1B on links that wait.
"""

from functools import cache

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_equal
from slimlab.config import InputError
from slimlab.parallel.schedule_checks import find_deadlock, order_problems
from slimlab.plan.pipeline_schedule import Schedule, peak_activations, read_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes

STUCK = (
    (  # a forward too late on the first stage
        "F0 F2 B0 F1 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ),
    (  # a backward too late on the last one
        "F0 F1 F2 B0 B1 B2",
        "F0 F1 B0 F2 B1 B2",
        "F0 F1 B1 F2 B0 B2",
    ),
    (  # a backward too early, where all forwards come first
        "F0 F1 F2 B0 B1 B2",
        "F0 B0 F1 F2 B1 B2",
        "F0 F1 F2 B0 B1 B2",
    ),
    (  # a forward too early on the last one, of two
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 F2 B0 F1 B1 B2 F3 B3",
    ),
)
FINE = ("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2")
# stages, micro-batches, most held
WAITING = ((2, 4, 2), (3, 7, 3), (4, 8, 4), (4, 8, 8), (3, 6, 1), (4, 5, 9), (1, 4, 2), (5, 9, 4))

waiting = Exercise(
    "10.3",
    "Lists that wait for each other",
    requires=("mend", "rows_that_wait"),
    stars=2,
    hints=(
        "find_deadlock names the stages in the circle. A forward that comes too late, or a "
        "backward that comes too early, is in one of their rows.",
        "There are few rows and few places: every move can be tried. simulate says how long a step "
        "is, peak_activations what is held.",
        "rows_that_wait: stage 0 sends F0, F1, ... to stage 1 and gets B0, B1, ... from it. Write "
        "this series as stage 0's row has it, then as stage 1's row has it.",
        "If every two neighbours agree on the series, what do the rows of all stages look like?",
        "Where a row turns from backwards to forwards, the pipeline runs empty. How few turns are "
        "enough, if at most so many forwards may come in one go?",
    ),
)


@cache
def best_move(rows: tuple[str, ...]) -> tuple[float, int]:
    """Try every move; return the shortest step and the fewest micro-batches held with it.

    rows  that deadlock
    """
    found = []
    for stage, row in enumerate(rows):
        words = row.split()
        moved = set()
        for at, word in enumerate(words):
            rest = words[:at] + words[at + 1 :]
            moved |= {" ".join([*rest[:to], word, *rest[to:]]) for to in range(len(words))}
        for one in moved:
            schedule = read_schedule([*rows[:stage], one, *rows[stage + 1 :]])
            if not find_deadlock(schedule):
                found.append((seconds_of(schedule), sum(peak_activations(schedule))))
    return min(found)


def seconds_of(schedule: Schedule) -> float:
    """Return the step of a `schedule`, a forward of one second and a backward of two."""
    return simulate(schedule, StageTimes(1, 1, 1)).step_s


def schedule_of(rows: object, num_stages: int, num_micro_batches: int, what: str) -> Schedule:
    """Read rows; fail unless each stage has everything once, forward before backward.

    rows                           what a function returned
    num_stages, num_micro_batches  that they should have
    what                           what they are, for the message
    """
    look = "its last line: a list of strings, one for each stage"
    found = isinstance(rows, list | tuple) and all(isinstance(row, str) for row in rows)
    expect(found, f"{what}: {form_of(rows)}", f"a list of {num_stages} strings", look)
    expect(len(rows) == num_stages, f"{what}: {len(rows)} rows", f"{num_stages} rows", look)
    try:
        schedule = read_schedule(rows)
    except InputError as error:
        saw = f"{what}: {str(error).splitlines()[1].strip()}"
        raise CheckFailed(saw, "instructions such as F0 and B12", look) from None
    asked = f"each of {num_micro_batches} micro-batches once forward and once backward"
    look = "what was lost or doubled on the way"
    saw = f"{what}: {schedule.num_micro_batches} micro-batches"
    expect(schedule.num_micro_batches == num_micro_batches, saw, asked, look)
    for problem in order_problems(schedule)[:1]:
        raise CheckFailed(f"{what}: {problem}", asked, look)
    return schedule


def moves_between(before: list[str], after: list[str]) -> int:
    """Count the words that are moved between two orders of them: 0, 1, or 2 for more than one.

    before, after  the words of a row
    """
    if before == after:
        return 0
    for word in before:
        if [one for one in before if one != word] == [one for one in after if one != word]:
            return 1
    return 2


def mended(student, rows: tuple[str, ...]) -> Schedule:
    """Return what mend makes of rows; fail unless it ends, with one move.

    student, rows  whose function, and what it is given
    """
    what = f"mend({list(rows)})"
    given = list(rows)
    found = function_of(student, "mend")(given)
    look = "what is changed in place: make new lists"
    expect(given == list(rows), f"{what} changed its argument", "it as it was", look)
    schedule = schedule_of(found, len(rows), read_schedule(rows).num_micro_batches, what)
    moves = sum(moves_between(a.split(), b.split()) for a, b in zip(rows, found))
    look = "all rows but one stay as they are, and in this one a single word changes its place"
    expect(moves <= 1, f"{what}: several instructions moved: {list(found)}", "one at most", look)
    stuck = find_deadlock(schedule)
    if stuck:
        saw = f"{what}: {'; '.join(map(str, stuck[:2]))}"
        raise CheckFailed(saw, "lists that end", "who waits for whom in your rows")
    return schedule


@waiting.property("mend: one instruction moved, and the lists end", points=2)
def _(student, numbers):
    for rows in STUCK:
        mended(student, rows)


@waiting.property("mend: the shortest step, then the fewest held", points=2)
def _(student, numbers):
    for rows in STUCK:
        schedule, (best_s, fewest) = mended(student, rows), best_move(rows)
        what, held = f"mend({list(rows)})", sum(peak_activations(schedule))
        look = "other moves that end the deadlock: compare their steps, then their peaks"
        expect_equal(seconds_of(schedule), best_s, f"{what}: seconds of a step", look)
        expect_equal(held, fewest, f"{what}: peaks of all stages together", look)


@waiting.property("mend: rows that end already stay as they are", points=1)
def _(student, numbers):
    mended(student, STUCK[-1])  # who changes nothing at all has not mended anything
    for rows in (FINE, ("F0 F1 F2 B2 B0 B1",) * 2):
        found = function_of(student, "mend")(list(rows))
        look = "these rows end: ask find_deadlock first"
        expect_equal(found, list(rows), f"mend({list(rows)})", look)


def rows_for(student, case: tuple[int, int, int]) -> Schedule:
    """Return the student's rows for sends that wait; fail unless they end.

    student, case  whose function; stages, micro-batches, most held
    """
    what = f"rows_that_wait{case}"
    found = function_of(student, "rows_that_wait")(*case)
    schedule = schedule_of(found, case[0], case[1], what)
    stuck = find_deadlock(schedule, "rendezvous")
    if stuck:
        saw = f"{what}: {'; '.join(map(str, stuck[:2]))}"
        look = "the messages between these two stages, in the order of either row"
        raise CheckFailed(saw, "lists that end with sends that wait", look)
    return schedule


@waiting.property("rows_that_wait: they end", points=2)
def _(student, numbers):
    for case in WAITING:
        rows_for(student, case)


@waiting.property("rows_that_wait: no stage holds more than it may", points=1)
def _(student, numbers):
    for case in WAITING:
        check_held(case, rows_for(student, case))


def check_held(case: tuple[int, int, int], schedule: Schedule) -> None:
    """Fail if a stage holds more than it may.

    case, schedule  stages, micro-batches and most held; what was written for them
    """
    peak = max(peak_activations(schedule))
    saw = f"rows_that_wait{case}: a stage holds {peak} micro-batches"
    look = "how many forwards come before the backward that frees the first of them"
    expect(peak <= case[2], saw, f"at most {case[2]}", look)


@waiting.property("rows_that_wait: a step as short as that allows", points=2)
def _(student, numbers):
    for case in WAITING:
        num_stages, m, most_held = case
        schedule = rows_for(student, case)
        check_held(case, schedule)
        times = StageTimes(1, 1, 1, messages="rendezvous")
        turns = -(-m // most_held)
        least = 3 * (m + turns * (num_stages - 1))
        saw = f"rows_that_wait{case}: a step of {simulate(schedule, times).step_s} s"
        look = "where rows turn from backwards to forwards: the pipeline runs empty there"
        expect(simulate(schedule, times).step_s <= least, saw, f"at most {least} s", look)
