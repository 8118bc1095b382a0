"""Graders of the exercises of chapter 10, pipeline parallelism.

10.1, how many micro-batches; 10.2, stages of unequal cost, stands in ch10_unequal.py, 10.3, lists
that wait for each other, in ch10_waiting.py and 10.4, a value that passes by, in ch10_context.py.
The oracle of 10.1 simulates every schedule and counts its bubble, peaks and messages.

Production planners measure how a device's speed depends on the size of a micro-batch.
"""

from functools import cache

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch10_context import context
from slimlab.classroom.checks.ch10_unequal import unequal
from slimlab.classroom.checks.ch10_waiting import waiting
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.parallel.schedules import gpipe, one_forward_one_backward
from slimlab.plan.pipeline_schedule import peak_activations
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes

__all__ = ["context", "micro_batches", "unequal", "waiting"]

KEYS = ("micro_batches", "added", "gpipe", "1f1b", "messages")
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
MAKE = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
# stages, batch, largest share of idle time
SHARES = (
    (4, 18, 0.334),
    (4, 24, 0.2),
    (4, 24, 0.25),
    (2, 30, 0.1),
    (5, 16, 0.2),
    (5, 15, 0.2),
    (1, 12, 0.0),
    (6, 12, 0.28),
    (3, 7, 0.5),
)
# stages, batch, seconds of a micro-batch, of a sequence, most sequences on a stage
COSTS = (
    (4, 24, 1.0, 1.0, 24),
    (4, 24, 0.25, 1.0, 24),
    (4, 24, 4.0, 1.0, 24),
    (4, 24, 4.0, 1.0, 12),
    (4, 24, 4.0, 1.0, 3),
    (2, 18, 0.0, 1.0, 18),
    (2, 18, 9.0, 0.5, 11),
    (6, 20, 1.0, 1.0, 5),
    (3, 16, 2.0, 1.0, 8),
    (1, 8, 0.5, 1.0, 2),
)


@cache
def step_of(schedule: str, num_stages: int, num_micro_batches: int):
    """Simulate a step of a schedule, a forward of one second and a backward of two.

    schedule, num_stages, num_micro_batches  which
    """
    return simulate(MAKE[schedule](num_stages, num_micro_batches), StageTimes(1, 1, 1))


@cache
def held(schedule: str, num_stages: int, num_micro_batches: int, batch_size: int) -> tuple:
    """Count the sequences that each stage holds; arguments as in the exercise.

    schedule, num_stages, num_micro_batches, batch_size  of the step
    """
    peaks = peak_activations(MAKE[schedule](num_stages, num_micro_batches))
    return tuple(peak * batch_size // num_micro_batches for peak in peaks)


def divisors(number: int) -> list[int]:
    """List what divides a number."""
    return [one for one in range(1, number + 1) if number % one == 0]


def fewest(num_stages: int, batch_size: int, largest_share: float) -> int:
    """Try all numbers of micro-batches; return the smallest that will do, or 0.

    num_stages, batch_size, largest_share  as in the exercise
    """
    for m in divisors(batch_size):
        if step_of("1f1b", num_stages, m).bubble_fraction <= largest_share + 1e-12:
            return m
    return 0


def best(num_stages: int, batch_size: int, fixed_s: float, sequence_s: float, most: int) -> int:
    """Try all numbers of micro-batches; return that of the shortest step, or 0.

    num_stages, batch_size, fixed_s, sequence_s, most  as in the exercise
    """
    found = []
    for m in divisors(batch_size):
        if max(held("1f1b", num_stages, m, batch_size)) <= most:
            one_s = fixed_s + batch_size / m * sequence_s
            found.append((round(step_of("1f1b", num_stages, m).step_s / 3 * one_s, 9), m))
    return min(found)[1] if found else 0


def draw_pipeline(rng) -> dict:
    """Draw a pipeline for 10.1; rng is a random.Random."""
    num_stages, batch_size, largest_share = rng.choice(
        [(8, 96, 0.2), (8, 64, 0.2), (12, 144, 0.25), (6, 60, 0.15), (16, 192, 0.2), (10, 120, 0.1)]
    )
    stage = rng.randint(2, num_stages - 3)
    return {
        "num_stages": num_stages,
        "batch_size": batch_size,
        "largest_share": largest_share,
        "stage": stage,
    }


micro_batches = Exercise(
    "10.1",
    "How many micro-batches",
    requires=("fewest_micro_batches", "held_sequences", "best_micro_batches", "my_prediction"),
    stars=1,
    instance=draw_pipeline,
    hints=(
        "Of m + p - 1 slots, how many is each stage idle? Only divisors of the batch count.",
        "GPipe holds every micro-batch: does the number of sequences depend on m at all?",
        "1F1B: stage s holds p - s micro-batches, but never more than there are. One of them has "
        "B / m sequences.",
        "A step takes m + p - 1 times what one micro-batch takes on a stage. What does that come "
        "to with B / m sequences?",
        "A stage between two others sends one message for each forward, and for each backward?",
    ),
)


@micro_batches.property("the fewest micro-batches for a share of idle time", points=2)
def _(student, numbers):
    function = function_of(student, "fewest_micro_batches")
    for given in SHARES:
        what = f"fewest_micro_batches{given}"
        saw = whole_number(function(*given), what, "its last line: a whole number")
        look = "the share of the whole step, at most; divisors of the batch; 0 if none will do"
        expect_equal(saw, fewest(*given), what, look)


@micro_batches.property("the sequences that a stage holds", points=2)
def _(student, numbers):
    function = function_of(student, "held_sequences")
    for num_stages, m, batch_size in ((4, 8, 24), (4, 2, 24), (6, 6, 12), (1, 5, 10), (3, 1, 7)):
        for name in MAKE:
            for stage in range(num_stages):
                what = f"held_sequences({name!r}, {num_stages}, {m}, {batch_size}, {stage})"
                saw = whole_number(function(name, num_stages, m, batch_size, stage), what, "int")
                look = "how many micro-batches are held there, and how many sequences each has"
                expect_equal(saw, held(name, num_stages, m, batch_size)[stage], what, look)


@micro_batches.property("the shortest step that fits the memory", points=2)
def _(student, numbers):
    function = function_of(student, "best_micro_batches")
    for given in COSTS:
        what = f"best_micro_batches{given}"
        saw = whole_number(function(*given), what, "its last line: a whole number")
        look = "slots in a step times seconds of a slot; memory of stage 0; ties; 0 if none fits"
        expect_equal(saw, best(*given), what, look)


@micro_batches.property("your prediction by hand was right", points=2)
def _(student, numbers):
    p, batch_size, stage = (numbers[key] for key in ("num_stages", "batch_size", "stage"))
    m = fewest(p, batch_size, numbers["largest_share"])
    wanted = {
        "micro_batches": m,
        "added": step_of("1f1b", p, m).bubble_ratio,
        "messages": sum(one.src == stage for one in step_of("1f1b", p, m).messages),
    }
    wanted |= {name: held(name, p, m, batch_size)[stage] for name in MAKE}
    looks = {
        "micro_batches": "(p - 1) / (m + p - 1), and what divides the batch",
        "added": "idle time over the time of computing, not over the step",
        "gpipe": "all micro-batches, in sequences",
        "1f1b": "the stages from this one to the last; sequences of a micro-batch",
        "messages": "one way for activations, the other for gradients",
    }
    saw = function_of(student, "my_prediction")()
    form = f"a dictionary with the keys {', '.join(KEYS)}"
    fits = isinstance(saw, dict) and set(KEYS) <= set(saw)
    expect(fits, f"my_prediction(): {form_of(saw)}", form, "its last line")
    for key in KEYS:
        what = f"my_prediction()[{key!r}]"
        if key == "added":
            expect_close(saw[key], wanted[key], what, looks[key], **BY_HAND)
        else:
            expect_equal(saw[key], wanted[key], what, looks[key])
