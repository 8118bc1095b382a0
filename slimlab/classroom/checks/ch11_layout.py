"""Grader of exercise 11.3 of chapter 11: what holds layouts back, and a layout for a cluster.

The planner is the judge: rank_bytes says what fits, and a search of all layouts that the exercise
allows says how short a step can be. The cluster is none that the planner has a name for.

Production: whoever hands in a job to a large cluster is asked for these numbers first.
"""

from dataclasses import replace
from functools import cache

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_equal
from slimlab.config import InputError
from slimlab.plan.hardware import Cluster, Constants, find_cluster
from slimlab.plan.known_models import find_model
from slimlab.plan.layout_memory import rank_bytes
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.planner import Candidate, Choices, look_at, plan_layouts

GIGABYTE = 10**9
# model, GPUs, hardware, batch
TASKS = (
    ("llama-33b", 32, "a100-80gb", 256),
    ("llama-65b", 64, "a100-40gb", 128),
    ("gpt3-175b", 128, "a100-80gb", 256),
    ("llama-13b", 16, "v100-32gb", 64),
)
# model, layout, GPUs, batch, limit in gigabytes
READ = (
    ("llama-13b", ParallelConfig(2, 2, 4), 32, 64, 76),
    ("llama-13b", ParallelConfig(1, 1, 16), 16, 64, 76),
    ("llama-13b", ParallelConfig(1, 1, 5), 5, 64, 76),
    ("llama-13b", ParallelConfig(3, 3, 4), 36, 64, 76),
    ("llama-33b", ParallelConfig(2, 8, 2), 32, 64, 76),
    ("llama-33b", ParallelConfig(3, 4, 4), 48, 64, 76),
    ("llama-33b", ParallelConfig(4, 4, 2, 4), 32, 72, 76),
    ("llama-13b", ParallelConfig(16, 1, 1), 16, 64, 76),
    ("llama-13b", ParallelConfig(16, 1, 1, zero_stage=1), 16, 64, 60),
    ("llama-65b", ParallelConfig(2, 8, 4, 4), 64, 128, 76),
    ("llama-65b", ParallelConfig(2, 8, 4, 1, zero_stage=1), 64, 128, 76),
    ("llama-65b", ParallelConfig(2, 8, 4, 1, zero_stage=1, recompute="full"), 64, 128, 20),
    ("gpt3-175b", ParallelConfig(2, 8, 8), 128, 64, 76),
)
BOUND = (
    ("llama-13b", ParallelConfig(16, 1, 1), 64, 120),
    ("llama-65b", ParallelConfig(2, 8, 4, 4), 128, 85),
    ("llama-65b", ParallelConfig(2, 8, 4, 4), 128, 55),
    ("llama-33b", ParallelConfig(4, 4, 2, 2), 64, 76),
    ("llama-33b", ParallelConfig(4, 2, 4, 4, zero_stage=1), 64, 60),
    ("llama-33b", ParallelConfig(4, 2, 4, 4, recompute="full"), 64, 76),
    ("gpt3-175b", ParallelConfig(4, 8, 4, sequence_parallel=True), 64, 76),
    ("llama-65b", ParallelConfig(8, 2, 4, recompute="full"), 128, 60),
)
CHANGES = {
    "micro_batch_size": 1,
    "recompute": "full",
    "sequence_parallel": True,
    "zero_stage": 1,
}

layout = Exercise(
    "11.3",
    "A layout for a cluster, and what binds",
    requires=("what_binds", "what_helps", "my_layout"),
    stars=2,
    instance=lambda rng: dict(
        zip(("model", "num_gpus", "hardware", "batch_size"), rng.choice(TASKS))
    ),
    hints=(
        "what_binds: ask in the order of the table, and return at once. Only the last three "
        "questions need rank_bytes.",
        "Heads are whole: tensor divides their number, and d_ff. One of the two is not enough.",
        "what_helps: dataclasses.replace(parallel, name=value) makes the changed layout; it fits "
        "if the sum of rank_bytes is at most the limit.",
        "my_layout: tensor along one host, ZeRO 1, sequence parallelism, and as few stages as the "
        "memory allows. Then change one thing at a time, with look_at.",
        "Recomputation costs a third of the arithmetic: a stage more may be cheaper.",
    ),
)


def cluster_of(hardware: str) -> Cluster:
    """Make the exercise's cluster: hosts of 4 GPUs, half the network.

    hardware  key of a known cluster
    """
    known = find_cluster(hardware)
    slow = known.network_bytes_per_s / 2
    return replace(known, gpus_per_host=4, network_bytes_per_s=slow)


@cache
def shortest(model: str, num_gpus: int, hardware: str, batch_size: int) -> Candidate:
    """Search all layouts that the exercise allows for the shortest step.

    model, num_gpus, hardware, batch_size  one of TASKS
    """
    choices = Choices(num_chunks=(1,), zero_stage=(0, 1), micro_batch_size=(1, 2, 4, 8))
    config, cluster = find_model(model).config, cluster_of(hardware)
    return plan_layouts(config, cluster, num_gpus, batch_size, choices=choices).best[0]


def binding(config, parallel: ParallelConfig, num_gpus: int, batch_size: int, limit: float) -> str:
    """Say what holds a layout back.

    config, parallel, num_gpus, batch_size, limit  as in the exercise
    """
    heads = (config.num_heads, config.d_ff)
    at_once = parallel.data * parallel.micro_batch_size
    questions = {
        "gpus": parallel.data * parallel.pipeline * parallel.tensor != num_gpus,
        "heads": any(size % parallel.tensor for size in heads),
        "layers": config.num_layers % parallel.pipeline != 0,
        "batch": batch_size % at_once != 0,
    }
    for word, is_so in questions.items():
        if is_so:
            return word
    items = rank_bytes(config, parallel, batch_size)
    if items["weights"] + items["gradients"] + items["optimizer"] > limit:
        return "state"
    return "activations" if sum(items.values()) > limit else "nothing"


def helping(config, parallel: ParallelConfig, batch_size: int, limit: float) -> list[str]:
    """List the single changes that make a layout fit.

    config, parallel, batch_size, limit  as in the exercise
    """
    found = []
    for name, value in CHANGES.items():
        changed = replace(parallel, **{name: value})
        fits = sum(rank_bytes(config, changed, batch_size).values()) <= limit
        if changed != parallel and fits:
            found.append(name)
    return found


BIND_LOOKS = {
    "gpus": "the product of the three axes",
    "heads": "heads and d_ff, each divided by tensor",
    "layers": "layers divided by stages",
    "batch": "replicas times the size of a micro-batch",
    "state": "weights, gradients and optimizer added up, before any activation",
    "activations": "everything that rank_bytes lists",
    "nothing": "what fits exactly, fits",
}


def check_reading(student, cases) -> None:
    """Compare the student's what_binds with the oracle.

    student, cases  whose function, and some of READ
    """
    function = function_of(student, "what_binds")
    for model, parallel, num_gpus, batch_size, gigabytes in cases:
        config, limit = find_model(model).config, gigabytes * GIGABYTE
        what = f"what_binds({model}, {parallel}; {num_gpus} GPUs, batch {batch_size}, "
        what += f"{gigabytes} GB)"
        wanted = binding(config, parallel, num_gpus, batch_size, limit)
        saw = function(config, parallel, num_gpus, batch_size, limit)
        expect_equal(saw, wanted, what, BIND_LOOKS[wanted])


@layout.property("what_binds: sizes that do not divide", points=2)
def _(student, numbers):
    check_reading(student, READ[:7])


@layout.property("what_binds: memory", points=2)
def _(student, numbers):
    check_reading(student, READ[7:])
    config, parallel = find_model("llama-13b").config, ParallelConfig(2, 4, 2)
    needed = sum(rank_bytes(config, parallel, 64).values())
    for limit, wanted in ((needed, "nothing"), (needed - 1, "activations")):
        saw = function_of(student, "what_binds")(config, parallel, 16, 64, limit)
        what = f"what_binds(llama-13b, {parallel}), {needed - limit:g} bytes too many"
        expect_equal(saw, wanted, what, BIND_LOOKS[wanted])


@layout.property("what_helps", points=2)
def _(student, numbers):
    function = function_of(student, "what_helps")
    for model, parallel, batch_size, gigabytes in BOUND:
        config, limit = find_model(model).config, gigabytes * GIGABYTE
        saw = function(config, parallel, batch_size, limit)
        what = f"what_helps({model}, {parallel}; batch {batch_size}, {gigabytes} GB)"
        look = "each change by itself, in the order of the task; no change is none"
        expect_equal(saw, helping(config, parallel, batch_size, limit), what, look)


def seen_layout(student, numbers: dict) -> Candidate:
    """Look at the student's layout; fail unless it is legal, allowed, and fits.

    student, numbers  whose layout, for which task
    """
    parallel = function_of(student, "my_layout")()
    made = isinstance(parallel, ParallelConfig)
    look = "its last line: ParallelConfig(data=..., pipeline=..., tensor=...)"
    expect(made, f"my_layout(): {form_of(parallel)}", "a ParallelConfig", look)
    saw, num_gpus = f"my_layout(): {parallel}", numbers["num_gpus"]
    asked = f"{num_gpus} GPUs, 1F1B, one chunk, zero_stage 0 or 1"
    plain = (parallel.schedule, parallel.num_chunks) == ("1f1b", 1) and parallel.zero_stage < 2
    expect(plain and parallel.world_size == num_gpus, saw, asked, "what the task allows")
    config, cluster = find_model(numbers["model"]).config, cluster_of(numbers["hardware"])
    try:
        seen = look_at(config, cluster, parallel, numbers["batch_size"])
    except InputError as error:
        raise CheckFailed(f"{saw}: {error.given}", error.asked, error.change) from None
    limit = cluster.gpu.memory_bytes * Constants().memory_share
    items = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in seen.items.items())
    saw = f"{saw}: {seen.memory_bytes / 1e9:.1f} GB ({items})"
    look = "the largest of these: which axis, or which choice, makes it smaller?"
    expect(seen.memory_bytes <= limit, saw, f"at most {limit / 1e9:.1f} GB", look)
    return seen


def check_step(student, numbers: dict, factor: float) -> None:
    """Fail if the student's step is longer than a factor of the shortest there is.

    student, numbers  whose layout, for which task
    factor            above 1
    """
    seen, best = seen_layout(student, numbers), shortest(**numbers)
    limit = factor * best.time.total_s
    parts = ("compute", "tensor", "message", "bubble", "data", "optimizer")
    listed = ", ".join(f"{part} {getattr(seen.time, f'{part}_s'):.2f}" for part in parts)
    saw = f"my_layout(): {seen.parallel}: {seen.time.total_s:.2f} s ({listed})"
    asked = f"at most {limit:.2f} s, {factor:g} times the best"
    look = "the largest part beside compute, or compute itself if blocks are computed twice"
    expect(seen.time.total_s <= limit, saw, asked, look)


@layout.property("your layout fits", points=1)
def _(student, numbers):
    seen_layout(student, numbers)


@layout.property("its step: at most 1.25 times the best", points=2)
def _(student, numbers):
    check_step(student, numbers, 1.25)


@layout.property("its step: at most 1.05 times the best", points=1)
def _(student, numbers):
    check_step(student, numbers, 1.05)
