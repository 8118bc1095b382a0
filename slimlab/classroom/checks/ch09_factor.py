"""Grader of exercise 9.2 of chapter 09: a loss that is right, and gradients that are not.

The oracle of the factors runs a program on ranks and on one, and lays the gradients beside each
other. The programs differ from the given one by one fault each, or have none.

torch.distributed.nn.functional.all_gather goes back by a reduce_scatter too: right where each rank
uses the whole in its own way, wrong where the whole is one value.
"""

import torch
from torch.nn import functional as F

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import (
    WORLDS,
    drawn,
    expect_parts,
    part_of,
    payload_of,
    ranks_text,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.comm.launch import run_ranks
from slimlab.parallel.tensor_collectives import (
    copy_to_ranks,
    gather_from_ranks,
    gather_sequence,
    reduce_from_ranks,
)

CUT = {"gain": None, "mix": 1, "up": 1, "down": 0, "bias": None}
NAMES = ("x", *CUT)
SHAPES = {"gain": (12,), "mix": (12, 12), "up": (12, 24), "down": (24, 12), "bias": (12,)}
FAULTS = {
    "join": "the given program",
    "": "a program without a fault",
    "bias": "a program that adds its bias to every summand, divided by the ranks",
    "last": "a program whose last rank doubles one gradient",
    "late": "a program whose sum goes back as a sum",
    "missing": "a program without the second copy_to_ranks",
    "sign": "a program with one gradient turned round",
}

factor = Exercise(
    "9.2",
    "A loss that is right",
    requires=("my_diagnosis", "factors", "mended_step"),
    stars=2,
    instance=lambda rng: {"world_size": rng.choice([3, 4, 6, 12])},
    hints=(
        "Behind JoinColumns every rank has the same y and the same loss. What does each rank's "
        "reduce_scatter bring, and what does their sum come to?",
        "Which weights stand before JoinColumns on the way to the loss, which behind it?",
        "x is reached by two ways: past JoinColumns, and through it.",
        "factors: a gradient that is cut must be joined first; one that is whole must be compared "
        "on every rank. Find one number f from them, then ask whether f fits everywhere.",
        "mended_step: the joined columns are one value, of which every rank has a copy. What does "
        "the table of transposes have for that?",
    ),
)


def given_step(comm, x, parts, target, fault="join"):
    """Do what the program of the exercise does, with its fault, another one or none.

    comm, x, parts, target  as there
    fault                   one of FAULTS
    """
    x = x.clone().requires_grad_()
    own = {name: part.clone().requires_grad_() for name, part in parts.items()}
    join = gather_sequence if fault == "join" else gather_from_ranks
    h = x + join(copy_to_ranks(x * own["gain"], comm) @ own["mix"], comm, 1)
    read = h if fault == "missing" else copy_to_ranks(h, comm)
    summand = F.gelu(read @ own["up"]) @ own["down"]
    if fault == "late":
        summand = copy_to_ranks(summand, comm)
    if fault == "bias":
        y = h + reduce_from_ranks(summand + own["bias"] / comm.world_size, comm)
    else:
        y = h + reduce_from_ranks(summand, comm) + own["bias"]
    loss = (y - target).square().sum() / 2
    loss.backward()
    grads = {"x": x.grad, **{name: part.grad for name, part in own.items()}}
    if fault == "last" and 0 < comm.rank == comm.world_size - 1:
        grads["gain"] = 2 * grads["gain"]
    if fault == "sign" and comm.world_size > 1:
        grads["down"] = -grads["down"]
    return loss.detach(), grads


def case_of(seed: int) -> tuple:
    """Draw x, target and weights, others for each seed."""
    weights = {name: drawn(seed + k, *shape) / 2 for k, (name, shape) in enumerate(SHAPES.items())}
    return drawn(seed + 8, 2, 12), drawn(seed + 9, 2, 12), weights


def program_on(program, comm, case: tuple):
    """Run a `program` with this rank's parts of a `case`; comm as everywhere."""
    x, target, weights = case
    parts = {
        name: part_of(whole, CUT[name], comm.rank, comm.world_size)
        for name, whole in weights.items()
    }
    return program(comm, x.clone(), parts, target.clone())


def true_factors(fault: str, world_size: int) -> dict:
    """Run a program on ranks and on one; return name -> factor or None.

    fault, world_size  which fault it has, and how many ranks
    """

    def program(comm):
        step = program_on(lambda *given: given_step(*given, fault=fault), comm, case_of(90))
        return step[1]

    (true,) = run_ranks(program, 1)
    ranks = run_ranks(program, world_size)
    found = {}
    for name in NAMES:
        wholes = [
            part_of(true[name], CUT.get(name), rank, world_size) for rank in range(world_size)
        ]
        pairs = [(grads[name], whole) for grads, whole in zip(ranks, wholes)]
        scale = sum((own * whole).sum() for own, whole in pairs)
        one = (scale / sum((whole * whole).sum() for _, whole in pairs)).item()
        apart = max((own - one * whole).abs().max().item() for own, whole in pairs)
        found[name] = round(one, 6) if apart < 1e-9 else None
    return found


def check_factors(saw, wanted: dict, what: str, tolerance: dict, look: str) -> None:
    """Compare a dictionary of factors with the oracle's.

    saw, wanted      name -> factor or None
    what, tolerance  what it is, and how near a factor must be
    look             where to look, for the message
    """
    form = "the return line: name -> factor, or None"
    expect(isinstance(saw, dict), f"{what}: {form_of(saw)}", "a dictionary", form)
    for name in NAMES:
        expect(name in saw, f"{what} without {name!r}", f"the keys {', '.join(NAMES)}", form)
        own, label = saw[name], f"{what}, {name!r}"
        if wanted[name] is None or own is None:
            plain = isinstance(own, int | float)
            shown = f"a factor of {own:.4g}" if plain else form_of(own)
            true = "None: no single factor" if wanted[name] is None else f"{wanted[name]:g}"
            near = "; how near is near, as each number is rounded" if own is None else ""
            both = own is None and wanted[name] is None
            expect(both, f"{label}: {shown}", true, look + near)
        else:
            expect_close(own, wanted[name], label, look, **tolerance)


@factor.property("your test finds what the given program does", points=2)
def _(student, numbers):
    function = function_of(student, "factors")
    look = "what is joined, and what is compared on every rank, before a factor is taken"
    near = {"rtol": 1e-5, "reason": "rounding"}
    for world_size in (2, 3, 4, 1):
        saw = function(given_step, world_size)
        what = f"factors(step, {world_size})"
        check_factors(saw, true_factors("join", world_size), what, near, look)


@factor.property("your test tells other programs apart", points=3)
def _(student, numbers):
    function = function_of(student, "factors")
    near = {"rtol": 1e-5, "reason": "rounding"}
    looks = {
        "bias": "factors below 1",
        "last": "whether the factor holds on every rank, not on rank 0 alone",
        "missing": "gradients that differ from rank to rank",
        "late": "what is added to what: no factor may fit",
        "sign": "factors below 0",
    }
    for fault in ("", "bias", "late", "missing", "sign", "last"):
        for world_size in (3, 2):
            saw = function(lambda *given: given_step(*given, fault=fault), world_size)  # noqa: B023
            what = f"factors of {FAULTS[fault]}, {ranks_text(world_size)}"
            look = looks.get(fault, "how far from 1 a factor is that is only rounded")
            check_factors(saw, true_factors(fault, world_size), what, near, look)


@factor.property("your prediction by hand was right", points=2)
def _(student, numbers):
    saw = function_of(student, "my_diagnosis")()
    wanted = true_factors("join", numbers["world_size"])
    by_hand = {"rtol": 0.005, "reason": "you may round"}
    look = "the ways from this weight to the loss: how often does each pass JoinColumns?"
    check_factors(saw, wanted, "my_diagnosis()", by_hand, look)
    look = "which call makes one value of parts, and what comes back to it from each rank"
    expect_equal(saw.get("where"), "JoinColumns", "my_diagnosis()['where']", look)


def mended(student, world_size: int, seed: int = 70):
    """Run the student's mended_step on ranks; return its results, one process's and the case.

    world_size, seed  how many ranks, and which case
    """
    function, case = function_of(student, "mended_step"), case_of(seed)
    what = f"mended_step, {ranks_text(world_size)}"
    results = run(lambda comm: program_on(function, comm, case), world_size, what)
    for rank, one in enumerate(results):
        fits = isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], dict)
        saw = f"{what}: rank {rank} returned {form_of(one)}"
        look = "the return line: the loss and a dictionary of gradients, as step has it"
        expect(fits, saw, "a loss and a dictionary", look)
        missing = [name for name in NAMES if name not in one[1]]
        expect(not missing, f"{what}: no gradient of {missing[:1]}", f"those of {NAMES}", look)
    ((loss, grads),) = run_ranks(
        lambda comm: program_on(lambda *given: given_step(*given, fault=""), comm, case), 1
    )
    return results, loss, grads, what


@factor.property("the mended step: the loss, and the gradients that were right", points=1)
def _(student, numbers):
    for world_size in WORLDS:
        results, loss, grads, what = mended(student, world_size)
        look = "the forward pass: it was right"
        expect_parts([one[0] for one in results], loss, None, f"{what}: loss", look)
        for name in ("up", "down", "bias"):
            found = [one[1][name] for one in results]
            look = "what was right before: these gradients stand behind the fault"
            expect_parts(found, grads[name], CUT[name], f"{what}: gradient of {name}", look)


@factor.property("the mended step: the gradients of all weights", points=2)
def _(student, numbers):
    for world_size in WORLDS:
        results, _, grads, what = mended(student, world_size)
        for name in CUT:
            found = [one[1][name] for one in results]
            look = "what comes back through the join on this number of ranks"
            expect_parts(found, grads[name], CUT[name], f"{what}: gradient of {name}", look)


@factor.property("the mended step: the gradient of its input", points=1)
def _(student, numbers):
    for world_size in WORLDS:
        results, _, grads, what = mended(student, world_size)
        look = "both ways to x: past the join, where nothing was wrong, and through it"
        found = [one[1]["x"] for one in results]
        expect_parts(found, grads["x"], None, f"{what}: gradient of x", look)


@factor.property("the mended step: no more calls and bytes, arguments as they were", points=1)
def _(student, numbers):
    function, case = function_of(student, "mended_step"), case_of(50)
    for world_size in (4, 2, 3):
        what = f"mended_step, {ranks_text(world_size)}"
        given = run_ranks(lambda comm: program_on(given_step, comm, case), world_size)
        results, _, grads, _ = mended(student, world_size, 50)
        for name in ("x", "mix"):  # right gradients first: a step that sends nothing is not mended
            look = "the gradients, before anything is saved"
            found = [one[1][name] for one in results]
            expect_parts(found, grads[name], CUT.get(name), f"{what}: gradient of {name}", look)
        for own, its in zip(results.ledgers, given.ledgers):
            look = "what the given step sends: it was enough"
            for much, limit, unit in (
                (len(own.entries), len(its.entries), "calls"),
                (payload_of(own), payload_of(its), "bytes"),
            ):
                expect(much <= limit, f"{what}: {much} {unit} on a rank", f"at most {limit}", look)

        def changed(comm):
            x, target, weights = (case[0].clone(), case[1].clone(), case[2])
            parts = {n: part_of(t, CUT[n], comm.rank, comm.world_size) for n, t in weights.items()}
            before = {n: t.clone() for n, t in parts.items()}
            function(comm, x, parts, target)
            pairs = [(x, case[0], "x"), (target, case[1], "target")]
            pairs += [(parts[name], old, name) for name, old in before.items()]
            return [n for t, old, n in pairs if t.requires_grad or not torch.equal(t, old)]

        for names in run(changed, world_size, what):
            if names:
                look = "what is made a leaf or changed: clone() it first, as step does"
                saw = f"{what}: {names[0]} is not as it was"
                raise CheckFailed(saw, "arguments as they were", look)
