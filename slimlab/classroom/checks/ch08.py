"""Graders of the exercises of chapter 08, data parallelism.

8.1, which stage of ZeRO fits and what it sends; 8.2, a gradient clipped too early, stands in
ch08_clip.py, 8.3, a ZeRO step within a byte budget, in ch08_zero.py, 8.4, top-k merged on the way,
in ch08_merge.py and 8.5, an outer step, in ch08_outer.py. The oracle of 8.1 reads what travels from
slimlab.plan.zero, whose lists of calls are those that ranks were counted to make, and finds the
largest degree by trying one after the other.

Production launchers ask for the same numbers and leave the arithmetic to whoever fills them in.
"""

from functools import cache

from slimlab.classroom.checks.ch02_forms import form_of, function_of, whole_number
from slimlab.classroom.checks.ch08_clip import clip
from slimlab.classroom.checks.ch08_merge import merge
from slimlab.classroom.checks.ch08_outer import outer
from slimlab.classroom.checks.ch08_zero import zero
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.config import ModelConfig
from slimlab.plan.zero import zero_bytes_per_rank, zero_step_calls
from slimlab.plan.zero_units import zero_units

__all__ = ["clip", "fits", "merge", "outer", "zero"]

NEAR = {"rtol": 1e-9, "reason": "float64 rounding"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
BYTES = {"weight_bytes": 2, "gradient_bytes": 4, "optimizer_bytes": 12}
STAGES = (0, 1, 2, 3)
WIRE_LOOKS = (
    "the two halves of an all_reduce, and what travels in each",
    "what is gathered in stage 1: gradients or weights? How many bytes has each?",
    "what stage 2 does with the gradients of a micro-batch, since it keeps none whole",
    "how often stage 3 gathers weights in a step, and whether new ones are handed round after it",
)


def draw_model(rng) -> dict:
    """Draw a model and ranks for 8.1 with a stage from 1 on that fits; rng is a random.Random."""
    while True:
        given = {
            "params_billion": rng.choice([7, 13, 30, 70]),
            "world_size": rng.choice([8, 16, 32, 64]),
            "free_gb": rng.choice([20, 36, 60, 75]),
            "num_micro_batches": rng.choice([3, 4, 5, 8]),
        }
        needs = [needed_bytes(given["params_billion"], given["world_size"], s) for s in STAGES]
        shares = [one / given["free_gb"] for one in needs]
        if shares[0] > 1 > shares[3] and all(abs(share - 1) > 0.03 for share in shares):
            return given


def needed_bytes(num_params: float, world_size: int, stage: int) -> float:
    """Compute the bytes of model states of 8.1 on each rank.

    num_params, world_size, stage  as in zero_bytes_per_rank
    """
    return zero_bytes_per_rank(num_params, world_size, stage, **BYTES)


def true_stage(num_params: float, world_size: int, free_bytes: float) -> int | None:
    """Find the smallest stage that fits.

    num_params, world_size, free_bytes  as in the exercise
    """
    needs = [needed_bytes(num_params, world_size, stage) for stage in STAGES]
    return next((stage for stage in STAGES if needs[stage] <= free_bytes), None)


@cache
def rows_sent(stage: int, num_micro_batches: int) -> tuple[int, int]:
    """Count how often a step reduces the gradients of all, and gathers the weights of all.

    stage              1, 2 or 3
    num_micro_batches  of the step
    """
    units = zero_units(ModelConfig(8, 8, d_model=64, num_layers=32, num_heads=2))
    calls = zero_step_calls(units, 8, stage, num_pieces=num_micro_batches)
    whole = 4 * sum(unit.trained for unit in units)
    reduced = sum(n_bytes for name, n_bytes in calls if name == "reduce_scatter")
    gathered = sum(8 * n_bytes for name, n_bytes in calls if name == "all_gather")
    return round(reduced / whole), round(gathered / whole)


def true_wire(num_params: float, world_size: int, stage: int, num_micro_batches: int) -> float:
    """Compute the bytes that a rank sends in a step.

    num_params, world_size, stage, num_micro_batches  as in the exercise
    """
    share = num_params * (world_size - 1) / world_size
    if stage == 0:
        return 2 * BYTES["gradient_bytes"] * share
    reduced, gathered = rows_sent(stage, num_micro_batches)
    return (reduced * BYTES["gradient_bytes"] + gathered * BYTES["weight_bytes"]) * share


def true_degree(
    num_params: float,
    batch_tokens: float,
    flop_per_s: float,
    bytes_per_s: float,
    stage: int,
    share: float,
) -> int:
    """Find the largest number of ranks by trying one after the other.

    num_params, batch_tokens, flop_per_s, bytes_per_s, stage, share  as in the exercise
    """
    world_size = 1
    while True:
        arithmetic_s = 6 * num_params * batch_tokens / (world_size + 1) / flop_per_s
        exchange_s = true_wire(num_params, world_size + 1, stage, 1) / bytes_per_s
        if arithmetic_s < share * (arithmetic_s + exchange_s):
            return world_size
        world_size += 1


fits = Exercise(
    "8.1",
    "What fits, and what it costs",
    requires=("my_prediction", "smallest_stage", "wire_bytes", "largest_degree"),
    stars=1,
    instance=draw_model,
    hints=(
        "Bytes per parameter: 2 + 4 + 12. Stage 1 divides which of them by w, stage 2 which ones?",
        "A ring's reduce_scatter sends (w - 1) / w of what it reduces, its all_gather (w - 1) / w "
        "of what it makes. Which call carries gradients, which weights?",
        "Where can gradients be added up over micro-batches? In stages 0 and 1 there is room for "
        "them; in stage 2 a rank keeps its own part alone.",
        "Stage 3, for each micro-batch: weights for the forward pass, weights for the backward "
        "pass, gradients. And the new weights: who needs them before the next forward pass?",
        "largest_degree: write both times, and multiply by w. What do both sides have?",
    ),
)


@fits.property("the smallest stage that fits", points=2)
def _(student, numbers):
    function = function_of(student, "smallest_stage")
    for num_params, world_size in ((7.5e9, 64), (13e9, 8), (2e9, 2), (70e9, 512)):
        for edge in STAGES:
            for factor in (0.999, 1.001):
                free_bytes = factor * needed_bytes(num_params, world_size, edge)
                what = f"smallest_stage({num_params:g}, {world_size}, {free_bytes:.5g})"
                wanted = true_stage(num_params, world_size, free_bytes)
                look = "bytes per parameter in each stage: which of 2, 4 and 12 does it divide?"
                if wanted is None:
                    look = "what to return where not even stage 3 fits"
                saw = function(num_params, world_size, free_bytes)
                if saw is not None:
                    saw = whole_number(saw, what, "the return lines: 0, 1, 2, 3 or None")
                expect_equal(saw, wanted, what, look)
    look = "one rank, which has nobody to share with"
    expect_equal(function(1e9, 1, 18.1e9), 0, "smallest_stage(1e+09, 1, 1.81e+10)", look)


def check_wire(student, micro_batches) -> None:
    """Compare the student's bytes with the oracle's, for these numbers of micro_batches."""
    function = function_of(student, "wire_bytes")
    for num_params, world_size in ((7.5e9, 64), (1e9, 2), (13e9, 5), (1e9, 1)):
        for stage in STAGES:
            for m in micro_batches:
                what = f"wire_bytes({num_params:g}, {world_size}, {stage}, {m})"
                wanted = true_wire(num_params, world_size, stage, m)
                saw = function(num_params, world_size, stage, m)
                expect_close(saw, wanted, what, WIRE_LOOKS[stage], **NEAR)


@fits.property("bytes on the wire, with one micro-batch", points=2)
def _(student, numbers):
    check_wire(student, (1,))


@fits.property("bytes on the wire, with several micro-batches", points=2)
def _(student, numbers):
    check_wire(student, (2, 3, 8))


@fits.property("the largest degree that scales", points=2)
def _(student, numbers):
    function = function_of(student, "largest_degree")
    for stage, batch_tokens, share in ((1, 1e6, 0.8), (0, 3e5, 0.5), (2, 4e6, 0.9), (3, 1e6, 0.8)):
        for flop_per_s, bytes_per_s in ((4.13e14, 2.5e10), (1.21e14, 1e9)):
            given = 7e9, batch_tokens, flop_per_s, bytes_per_s, stage, share
            what = f"largest_degree({', '.join(f'{one:g}' for one in given)})"
            wanted = true_degree(*given)
            look = "the bytes of this stage with one micro-batch, and how they depend on w"
            saw = whole_number(function(*given), what, "the return line: ranks are whole numbers")
            if abs(saw - wanted) == 1:
                look = "the last step: rounding, and whether w or w - 1 was found"
            expect_equal(saw, wanted, what, look)
    given = 1e9, 1e3, 4e14, 1e9, 1, 0.9
    saw = whole_number(function(*given), "largest_degree for a tiny batch", "the return line")
    look = "a batch so small that no second rank is worth it: one rank sends nothing"
    expect_equal(saw, 1, "largest_degree for a tiny batch", look)


@fits.property("your prediction by hand was right", points=1)
def _(student, numbers):
    saw = function_of(student, "my_prediction")()
    keys = ("stage", "gb", "stage_1_gb")
    fine = isinstance(saw, dict) and set(keys) <= set(saw)
    look = "the return line"
    expect(fine, f"my_prediction(): {form_of(saw)}", f"a dictionary with {', '.join(keys)}", look)
    model = numbers["params_billion"], numbers["world_size"]
    stage = true_stage(*model, numbers["free_gb"])
    look = "your pencil calculation for numbers('8.1'); correct it once you know why"
    what = "my_prediction()['stage']"
    expect_equal(whole_number(saw["stage"], what, "the return line"), stage, what, look)
    for key, one in (("gb", stage), ("stage_1_gb", 1)):
        wanted = true_wire(*model, one, numbers["num_micro_batches"])
        expect_close(saw[key], wanted, f"my_prediction()[{key!r}]", look, **BY_HAND)
