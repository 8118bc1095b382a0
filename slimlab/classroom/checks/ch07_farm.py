"""Grader of exercise 7.4 of chapter 07: a farm of tasks that hangs, not always.

The oracle is the given program itself, run with a limit above which sends wait: whether it hangs is
what came of it. Work is charged to a computed clock, so that it is seen whether workers work at the
same time.

Production schedulers (Ray, Dask) keep queues and threads for what is under way.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch07_runs import expect_messages_only, run, sends_of, timed
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.comm.launch import run_ranks
from slimlab.comm.links import Network
from slimlab.comm.report import DeadlockError

KEYS = ("num_tasks", "length", "rank_0_in", "rank_1_in", "cause")
CALLS = ("send", "recv")
CAUSES = ("circle", "missing", "order", "count")
ITEM_BYTES = 4  # of float32
INSTANT = Network(0.0)
EXACT = {"rtol": 0.0, "reason": "the same work on the same numbers"}

farm = Exercise(
    "7.4",
    "A farm that hangs, not always",
    requires=("my_diagnosis", "hangs", "mended_farm"),
    stars=2,
    instance=lambda rng: {
        "world_size": rng.choice([3, 4, 5, 6]),
        "eager_bytes": 4 * rng.randint(20, 90),
    },
    hints=(
        "Run it: run_ranks(farm, 3, args=(tasks, len(tasks), work), eager_bytes=64) with more and "
        "more tasks, then with longer ones, and read the table.",
        "When rank 0 hands a worker its second task, what is that worker doing?",
        "hangs: which of the two ranks would have to be held up, and by which message? A message "
        "of just eager_bytes goes through.",
        "When could rank 0 take a result without making the other workers wait?",
        "Either rank 0 takes results between two tasks of a worker, or somebody need not wait "
        "for a send: isend.",
    ),
)


def given_farm(comm, tasks, num_tasks, work):
    """Do what the program of the exercise does.

    comm, tasks, num_tasks, work  as there
    """
    num_workers = comm.world_size - 1
    if comm.rank == 0:
        for number in range(num_tasks):
            comm.send(tasks[number], 1 + number % num_workers)
        return [comm.recv(1 + number % num_workers) for number in range(num_tasks)]
    for _ in range(comm.rank - 1, num_tasks, num_workers):
        comm.send(work(comm.recv(0)), 0)
    return None


def really_hangs(
    world_size: int, num_tasks: int, task_bytes: int, result_bytes: int, eager_bytes: int
) -> bool:
    """Run the given farm and return whether it is a deadlock.

    world_size, num_tasks, task_bytes, result_bytes, eager_bytes  as of hangs, in the exercise
    """
    tasks = [torch.zeros(task_bytes, dtype=torch.uint8)] * num_tasks

    def work(task: Tensor) -> Tensor:
        return torch.zeros(result_bytes, dtype=torch.uint8)

    try:
        arguments = (tasks, num_tasks, work)
        run_ranks(given_farm, world_size, args=arguments, eager_bytes=eager_bytes)
    except DeadlockError:
        return True
    return False


@farm.property("what hangs first, and who waits in which call", points=2)
def _(student, numbers):
    found = function_of(student, "my_diagnosis")()
    look = "the return line of my_diagnosis"
    expect(isinstance(found, dict), f"my_diagnosis() gave {form_of(found)}", "a dict", look)
    expect_equal(sorted(map(str, found)), sorted(KEYS), "the keys of my_diagnosis()", look)
    world_size, eager_bytes = numbers["world_size"], numbers["eager_bytes"]
    num_tasks = whole_number(found["num_tasks"], "num_tasks", look)
    length = whole_number(found["length"], "length", look)
    sure = 4 * ITEM_BYTES * eager_bytes
    fewest = next(k for k in range(99) if really_hangs(world_size, k, sure, sure, eager_bytes))
    for name, value, right, other in (
        ("num_tasks", num_tasks, fewest, "very long tasks"),
        ("length", length, eager_bytes // ITEM_BYTES + 1, f"{fewest} tasks of float32"),
    ):
        look = f"farm with this {name} and with one less: run_ranks(..., eager_bytes={eager_bytes})"
        expect_equal(value, right, f"{name} for {world_size} ranks with {other}", look)
    for key in ("rank_0_in", "rank_1_in"):
        look = "column 'state' of the table that the error shows"
        known = f"{key}: one of {CALLS}"
        expect(found[key] in CALLS, f"{key} = {found[key]!r}", known, look)
        expect_equal(found[key], "send", key, look)


@farm.property("why it hangs", points=1)
def _(student, numbers):
    found = function_of(student, "my_diagnosis")()
    look = "the lines below the table, one for each rank: follow them from rank 0"
    cause = found.get("cause") if isinstance(found, dict) else found
    expect(cause in CAUSES, f"cause = {cause!r}", f"one of {CAUSES}", look)
    if cause != CAUSES[0]:
        raise CheckFailed(f"cause = {cause!r}", "another of the four", look)


@farm.property("hangs says it without running", points=2)
def _(student, numbers):
    function = function_of(student, "hangs")
    cases = [
        (4, 3, 900, 900, 100, "each worker gets one task"),
        (4, 4, 900, 900, 100, "one worker gets a second task"),
        (4, 9, 100, 900, 100, "tasks that just fit: does rank 0 ever wait in send?"),
        (4, 9, 101, 900, 100, "tasks of one byte too many"),
        (4, 9, 900, 100, 100, "results that just fit: does a worker ever wait in send?"),
        (4, 9, 900, 101, 100, "results of one byte too many"),
        (2, 1, 900, 900, 0, "a single task"),
        (2, 2, 900, 900, 0, "two tasks for one worker"),
        (3, 0, 900, 900, 0, "nothing to do"),
        (3, 5, 0, 0, 0, "messages without a byte"),
    ]
    for *case, look in cases:
        names = ("world_size", "num_tasks", "task_bytes", "result_bytes", "eager_bytes")
        shown = ", ".join(f"{name}={value}" for name, value in zip(names, case))
        saw = function(*case)
        expect(isinstance(saw, bool), f"hangs({shown}) gave {form_of(saw)}", "True or False", look)
        expect_equal(saw, really_hangs(*case), f"hangs({shown})", look)


def squares(lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Make tasks of these lengths, and what work makes of them."""
    tasks = [torch.arange(n, dtype=torch.float64) + 10 * k for k, n in enumerate(lengths)]
    return tasks, [one.square().flip(0) for one in tasks]


def check_results(results, wanted: list[Tensor], what: str) -> None:
    """Compare what rank 0 returned with the results in the order of their tasks.

    results  of all ranks
    wanted   one per task
    what     what was run, for the message
    """
    look = "what rank 0 returns: a list with one result for each task"
    listed = isinstance(results[0], list | tuple)
    expect(listed, f"{what}: rank 0 returned {form_of(results[0])}", "a list", look)
    expect_equal(len(results[0]), len(wanted), f"{what}: the number of results", look)
    for number, (one, right) in enumerate(zip(results[0], wanted)):
        look = "the order: results[k] belongs to tasks[k]"
        expect_close(one, right, f"{what}: result {number}", look, **EXACT)


def check_farm(student, world_size: int, lengths: list[int], eager_bytes: int | None):
    """Run the student's farm on tasks of these lengths, compare, and return the results.

    world_size, eager_bytes  of the run
    """
    function = function_of(student, "mended_farm")
    tasks, wanted = squares(lengths)

    def program(comm):
        held = tasks if comm.rank == 0 else None
        return function(comm, held, len(tasks), lambda task: task.square().flip(0))

    kept = "no buffer" if eager_bytes == 0 else "short messages buffered"
    what = f"{world_size} ranks, {len(tasks)} tasks, {kept}"
    results = run(program, world_size, what, eager_bytes=eager_bytes)
    check_results(results, wanted, what)
    return results, what


@farm.property("the mended farm ends, also without any buffer, with the right results", points=3)
def _(student, numbers):
    for world_size in (3, 2, 4, 5):
        for num_tasks in (5, 4, 1, 0):
            check_farm(student, world_size, [3 + k for k in range(num_tasks)], 0)
    check_farm(student, 3, [40, 1, 90, 0, 7, 64], 64)


@farm.property("the workers work at the same time", points=2)
def _(student, numbers):
    function = function_of(student, "mended_farm")
    for world_size, num_tasks in ((4, 6), (3, 5), (5, 4), (2, 3)):
        tasks, wanted = squares([4] * num_tasks)
        worked = []

        def program(comm):
            def work(task):
                worked.append(comm.rank)  # noqa: B023
                comm.compute(1.0)
                return task.square().flip(0)

            held = tasks if comm.rank == 0 else None  # noqa: B023
            return function(comm, held, len(held or range(num_tasks)), work)  # noqa: B023

        what = f"{world_size} ranks, {num_tasks} tasks of 1 s"
        results, last_s = timed(program, world_size, what, INSTANT)
        check_results(results, wanted, what)
        look = "who calls work: the workers, rank 0 only hands out and collects"
        expect(0 not in worked, f"{what}: rank 0 works itself", "work on the other ranks", look)
        fastest = -(-num_tasks // (world_size - 1))
        saw = f"{what}: done after {last_s:g} s"
        look = "whether a worker gets its task only when another one has finished"
        expect(last_s <= fastest, saw, f"{fastest} s, as all workers together can", look)


@farm.property("every task and every result travels once", points=1)
def _(student, numbers):
    for world_size, num_tasks in ((4, 7), (3, 2), (2, 3)):
        lengths = [2 + k for k in range(num_tasks)]
        results, what = check_farm(student, world_size, lengths, None)
        expect_messages_only(results.ledgers, what)
        sent = [sends_of(ledger) for ledger in results.ledgers]
        look = "what each rank sends: tasks go out once, results come back once"
        saw = f"{what}: rank 0 sends {sum(sent[0])} bytes, the others {sum(map(sum, sent[1:]))}"
        n_bytes = 8 * sum(lengths)
        right = (sum(sent[0]), sum(map(sum, sent[1:]))) == (n_bytes, n_bytes)
        expect(right, saw, f"{n_bytes} each way", look)
        num_sent = sum(map(len, sent))
        saw = f"{what}: {num_sent} messages in all"
        expect(num_sent <= 2 * num_tasks, saw, f"at most {2 * num_tasks}", look)
