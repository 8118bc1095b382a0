"""Grader of exercise 10.4 of chapter 10: a value that passes by every stage, and its way back.

The oracle is one process with the whole batch and autograd. The given program, whose two faults the
student must find, runs here too, so that the right diagnosis is seen and not believed.

Production: Megatron-LM's pipelines of encoder-decoder models hand the encoder's output from stage
to stage, and the sum of its gradients back.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import drawn, expect_tensor, ranks_text
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.comm.launch import run_ranks
from slimlab.parallel.schedules import gpipe, one_forward_one_backward
from slimlab.plan.pipeline_schedule import Schedule, read_schedule

WIDTH = 3
ROUNDING = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}
# Backwards in another order than forwards, and not the same on all stages.
MIXED = read_schedule(
    ["F0 F1 F2 F3 B1 B0 B3 B2", "F0 F1 F2 B0 B1 F3 B2 B3", "F0 F1 B1 B0 F2 F3 B3 B2"], name="mixed"
)

context = Exercise(
    "10.4",
    "A value that passes by",
    requires=("my_diagnosis", "mended_step"),
    stars=2,
    instance=lambda rng: {"num_stages": rng.choice([3, 4, 5, 6])},
    hints=(
        "kept.pop() takes what was put in last. When is that the micro-batch whose turn it is? "
        "Follow stage 0 and the last stage of 1F1B, then any stage of GPipe.",
        "Under GPipe all stages take the same micro-batch out at the same place of their lists.",
        "Who reads c? To whom does each of these stages send the gradient with respect to c?",
        "mended_step: keep what belongs to a micro-batch under its number. Let h and c come as one "
        "tensor that requires a gradient, and leave as one: then its gradient has both.",
        "The context that a stage hands on is the one that it got: its gradient is its own plus "
        "what comes back from behind. Autograd adds it up if c is a part of what backward starts "
        "from.",
    ),
)


def compute(own: dict, h: Tensor, c: Tensor) -> Tensor:
    """Do what a stage of the exercise does; own, h, c as there."""
    return h + torch.tanh(h @ own["mix"] + c @ own["read"])


def given_step(comm, schedule: Schedule, weights: dict, inputs: Tensor, targets: Tensor) -> tuple:
    """Do what the program of the exercise does, faults and all.

    comm, schedule, weights, inputs, targets  as there
    """
    rank, last, kept, sends, loss = comm.rank, comm.world_size - 1, [], [], 0.0
    own = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    for one in schedule.stages[rank]:
        n = one.micro_batch
        if one.kind == "forward":
            if rank == 0:
                h, c = inputs[n], torch.tanh(inputs[n] @ own["context"])
            else:
                h, c = comm.recv(rank - 1, n).unbind()
                h.requires_grad_()
            y = compute(own, h, c)
            if rank < last:
                sends.append(comm.isend(torch.stack([y, c]).detach(), rank + 1, n))
            kept.append((h, y if rank < last else (y - targets[n]).square().sum() / 2))
        else:
            h, y = kept.pop()
            loss += y.item() if rank == last else 0.0
            y.backward(comm.recv(rank + 1, n) if rank < last else None)
            if rank > 0:
                sends.append(comm.isend(h.grad, rank - 1, n))
    for handle in sends:
        handle.wait()
    return loss, {name: weight.grad for name, weight in own.items()}


def case_of(num_stages: int, num_micro_batches: int, seed: int) -> tuple[list, Tensor, Tensor]:
    """Draw weights for each stage, inputs and targets.

    num_stages, num_micro_batches, seed  of the case
    """
    weights = []
    for stage in range(num_stages):
        names = ("mix", "read", "context") if stage == 0 else ("mix", "read")
        weights.append(
            {n: drawn(seed + 10 * stage + k, WIDTH, WIDTH) / 2 for k, n in enumerate(names)}
        )
    shape = (num_micro_batches, 2, WIDTH)
    return weights, drawn(seed + 5, *shape) / 2, drawn(seed + 6, *shape) / 2


def true_gradients(weights: list, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list]:
    """Compute loss and gradients of each stage's weights in one process.

    weights, inputs, targets  of a case
    """
    leaves = [{n: w.clone().requires_grad_() for n, w in own.items()} for own in weights]
    h, c = inputs, torch.tanh(inputs @ leaves[0]["context"])
    for own in leaves:
        h = compute(own, h, c)
    loss = (h - targets).square().sum() / 2
    loss.backward()
    return loss.detach(), [{n: w.grad for n, w in own.items()} for own in leaves]


def wrong_gradients(schedule: Schedule) -> list[str]:
    """Run the given program; list the gradients that are not those of one process.

    schedule  that it executes
    """
    weights, inputs, targets = case_of(schedule.num_stages, schedule.num_micro_batches, 300)
    results = run_ranks(
        lambda comm: given_step(comm, schedule, weights[comm.rank], inputs, targets),
        schedule.num_stages,
    )
    _, true = true_gradients(weights, inputs, targets)
    return [
        f"{name} {stage}"
        for stage, own in enumerate(true)
        for name, grad in own.items()
        if not torch.allclose(results[stage][1][name], grad, rtol=1e-9, atol=1e-9)
    ]


def check_gradients(student, schedule: Schedule, names: tuple[str, ...], look: str) -> None:
    """Run the student's mended_step, and compare its loss and some gradients with one process.

    student, schedule  whose step, and what it executes
    names              of the weights whose gradients are compared
    look               where to look, for the message
    """
    function = function_of(student, "mended_step")
    weights, inputs, targets = case_of(schedule.num_stages, schedule.num_micro_batches, 100)
    what = f"mended_step, {schedule.name}, {ranks_text(schedule.num_stages)}"

    def program(comm):
        own = {name: weight.clone() for name, weight in weights[comm.rank].items()}
        return function(comm, schedule, own, inputs.clone(), targets.clone())

    results = run(program, schedule.num_stages, what)
    loss, true = true_gradients(weights, inputs, targets)
    for stage, one in enumerate(results):
        fits = isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], dict)
        saw = f"{what}: stage {stage} returned {form_of(one)}"
        form = "the return line: the loss and a dictionary of gradients, as step has it"
        expect(fits, saw, "a loss and a dictionary", form)
    own_loss = results[-1][0]
    label = f"{what}: loss of the last stage"
    expect_close(own_loss, loss, label, "the forward pass: it was right", **ROUNDING)
    for stage, (_, grads) in enumerate(results):
        for name in true[stage]:
            if name not in names:
                continue
            label, whole = f"{what}: gradient of {name} {stage}", true[stage][name]
            missing = grads.get(name)
            if missing is None:
                saw = f"{label}: None"
                raise CheckFailed(saw, f"a tensor of shape {tuple(whole.shape)}", look)
            found = expect_tensor(missing, whole.shape, label, look)
            expect_close(found, whole, label, look, **ROUNDING)
    sent = [sum(one.call == "send" for one in ledger.entries) for ledger in results.ledgers]
    m, last = schedule.num_micro_batches, schedule.num_stages - 1
    for stage, count in enumerate(sent):
        most = m * ((stage > 0) + (stage < last))
        saw = f"{what}: stage {stage} sends {count} messages"
        expect(count <= most, saw, f"at most {most}", "where step sends one message, send one")


KEPT_LOOK = "which micro-batch's pass goes back: what came from stage to stage has a number"
CONTEXT_LOOK = "all stages that read the context: on which way does its gradient come to stage 0?"


@context.property("mended_step: the weights of all stages, under 1F1B", points=2)
def _(student, numbers):
    for num_stages, m in ((3, 5), (1, 2)):
        schedule = one_forward_one_backward(num_stages, m)
        check_gradients(student, schedule, ("mix", "read"), KEPT_LOOK)


@context.property("mended_step: the gradient of the context's weights", points=3)
def _(student, numbers):
    for schedule in (gpipe(2, 3), one_forward_one_backward(4, 4)):
        check_gradients(student, schedule, ("context",), CONTEXT_LOOK)


@context.property("mended_step: backwards in any order", points=1)
def _(student, numbers):
    look = "where the micro-batch of a backward is looked for: by its number"
    check_gradients(student, MIXED, ("mix", "read", "context"), look)


@context.property("your diagnosis was right", points=2)
def _(student, numbers):
    p = numbers["num_stages"]
    saw = function_of(student, "my_diagnosis")()
    fits = isinstance(saw, dict) and {"gpipe", "1f1b"} <= set(saw)
    form = "a dictionary with the keys gpipe, 1f1b"
    expect(fits, f"my_diagnosis(): {form_of(saw)}", form, "its last line")
    for schedule in (gpipe(p, 2 * p), one_forward_one_backward(p, 2 * p)):
        what = f"my_diagnosis()[{schedule.name!r}]"
        own = saw[schedule.name]
        fits = isinstance(own, list | tuple | set) and all(isinstance(one, str) for one in own)
        expect(fits, f"{what}: {form_of(own)}", "a list such as ['mix 2']", "its last line")
        look = "which pass pop() takes on this stage, and who gets the context's gradient"
        expect_equal(sorted(own), sorted(wrong_gradients(schedule)), what, look)
