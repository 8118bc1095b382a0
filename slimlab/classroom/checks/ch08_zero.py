"""Grader of exercise 8.3 of chapter 08: a step of ZeRO's first stage within a byte budget.

The oracle is one process that keeps the whole master and both averages in float64. Gradients are
whole numbers divided by 64, so the order of their additions changes no bit. A step's eps is large,
so that AdamW does not hide a gradient of wrong length.

DeepSpeed and torch's ZeroRedundancyOptimizer keep masters so, for bfloat16 and in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import run
from slimlab.classroom.checks.ch09_runs import drawn, ranks_text
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import CheckFailed, expect, expect_close, expect_equal
from slimlab.train.update_rules import adamw_update

EVEN = ((2, 8), (4, 12), (1, 5), (3, 6))
UNEVEN = ((3, 7), (4, 10), (5, 11), (4, 5))
SETTINGS = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 0.3, "weight_decay": 0.1}
NEAR = {"atol": 2e-7, "rtol": 3e-7, "reason": "the last bit of float32"}
NEVER = 1e9
SLACK_BYTES = 64

zero = Exercise(
    "8.3",
    "A ZeRO step within a byte budget",
    requires=("begin", "zero_step"),
    stars=2,
    hints=(
        "Which numbers does a rank need of the whole gradient, to update its own part?",
        "weights[a:b] is a view. Which operation makes a copy, and which only if it must?",
        "The length of the whole gradient: what does each rank know of it, and what must be added "
        "up? Two numbers go into one all_reduce.",
        "float32 is what is sent, float64 what is updated. Where does each begin and end?",
        "divmod(n, w): the first ranks get one more. With fewer weights than ranks the last parts "
        "are empty, and every call must stand that.",
    ),
)


@dataclass(frozen=True)
class Case:
    """What is trained for some steps, and how.

    world_size, num_weights  w and n
    max_norm                 of each step
    settings                 of adamw_update
    same                     the gradients of every step are those of the first
    """

    world_size: int
    num_weights: int
    max_norm: Sequence[float] = (NEVER,) * 3
    settings: tuple = tuple(SETTINGS.items())
    same: bool = False

    def __str__(self) -> str:
        return f"{ranks_text(self.world_size)}, n = {self.num_weights}"

    def weights(self) -> Tensor:
        """Draw the weights that all begin with."""
        return drawn(self.num_weights, self.num_weights).float()

    def gradients(self, step: int) -> list[tuple[Tensor, int]]:
        """Draw each rank's gradient, summed over its tokens, and the number of these.

        step  from 0 on
        """
        step = 0 if self.same else step
        generator = torch.Generator().manual_seed(100 * step + self.world_size)
        found = []
        for rank in range(self.world_size):
            num_tokens = (3, 17, 0, 8, 5)[(rank + step) % 5] if self.world_size > 1 else 7
            size = (self.num_weights,)
            whole = torch.randint(-400, 400, size, generator=generator) * num_tokens
            found.append((whole.float() / 64, num_tokens))
        return found

    def serial_weights(self) -> list[Tensor]:
        """Train in one process; return the weights after each step."""
        master, settings = self.weights().double(), dict(self.settings)
        averages, found = [torch.zeros_like(master), torch.zeros_like(master)], []
        for step, max_norm in enumerate(self.max_norm):
            parts = self.gradients(step)
            mean = sum(one.double() for one, _ in parts) / sum(count for _, count in parts)
            mean = mean * (max_norm / mean.norm()).clamp(max=1.0)
            adamw_update(master, mean, *averages, step + 1, **settings)
            found.append(master.float())
        return found


def train_checked(student, case: Case, look: str):
    """Run the student's steps, compare all weights; return ledgers of the steps and states.

    case  what is trained
    look  where to look, for the message
    """
    begin, step = function_of(student, "begin"), function_of(student, "zero_step")

    def program(comm):
        start = case.weights()
        state = begin(comm, start)
        if not torch.equal(start, case.weights()):
            saw = f"{case}: begin changed the weights of rank {comm.rank}"
            raise CheckFailed(saw, "them as they were", "what works in place: -=, mul_, out=")
        begun, held, found = len(comm.ledger.entries), [held_bytes(state)], []
        for number, max_norm in enumerate(case.max_norm):
            gradient, num_tokens = case.gradients(number)[comm.rank]
            own = step(comm, state, gradient, num_tokens, max_norm, **dict(case.settings))
            if not torch.equal(gradient, case.gradients(number)[comm.rank][0]):
                saw = f"{case}: rank {comm.rank}'s gradient_sum was changed"
                raise CheckFailed(saw, "it as it was", "what works in place: /=, mul_, out=")
            found.append(own.clone() if isinstance(own, Tensor) else own)
            held.append(held_bytes(state))
        return state, found, comm.ledger.entries[begun:], max(held)

    results = run(program, case.world_size, str(case))
    true = case.serial_weights()
    for rank, (_, found, _, _) in enumerate(results):
        for number, (one, wanted) in enumerate(zip(found, true), start=1):
            what = f"{case}: rank {rank}'s weights after step {number}"
            form = "the return line of zero_step"
            expect(isinstance(one, Tensor), f"{what}: {form_of(one)}", "a tensor", form)
            expect_close(one, wanted, what, look, form=form, **NEAR)
            expect_equal(one.dtype, torch.float32, f"{what}: dtype", form)
    for rank, (_, found, _, _) in enumerate(results):
        same = torch.equal(found[-1], results[0][1][-1])
        look = "what is sent: all ranks must get the same bits"
        expect(same, f"{case}: ranks 0 and {rank} differ in a bit", "equal weights", look)
    return results


def held_bytes(state: object) -> int:
    """Count the bytes of the memory that the tensors in `state` look into, each once."""
    storages, seen, left = {}, {}, [state]
    while left:
        one = left.pop()
        if id(one) in seen or type(one).__module__.startswith("slimlab."):
            continue
        seen[id(one)] = one
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple | set):
            left += one
        elif hasattr(one, "__dict__") and not callable(one):
            left += vars(one).values()
    return sum(storages.values())


@zero.property("the weights of one process, where lengths divide and nothing is clipped", points=2)
def _(student, numbers):
    for size in EVEN:
        look = "what the gradient is divided by, which step it is, and what the update is made in"
        train_checked(student, Case(*size), look)


@zero.property("lengths that do not divide", points=1)
def _(student, numbers):
    for size in UNEVEN:
        look = "where each rank's part begins and ends, in every call"
        train_checked(student, Case(*size), look)


@zero.property("fewer weights than ranks", points=1)
def _(student, numbers):
    for size in ((5, 3), (4, 1), (3, 2)):
        train_checked(student, Case(*size), "ranks whose part is empty, or all filling")


@zero.property("clipped by the length of the whole mean gradient", points=2)
def _(student, numbers):
    for size in EVEN[:2] + UNEVEN[:2]:
        for max_norm in ((2.0, 4.0, 1.0), (3.0, 30.0, 6.0)):
            look = "whose length is compared with max_norm: of all parts, and of the mean"
            train_checked(student, Case(*size, max_norm=max_norm), look)


@zero.property("steps too small for float32 add up", points=2)
def _(student, numbers):
    for size in ((2, 6), (3, 7)):
        settings = {**SETTINGS, "lr": 3e-8, "weight_decay": 0.0, "eps": 1e-8}
        case = Case(*size, max_norm=(NEVER,) * 30, settings=tuple(settings.items()), same=True)
        train_checked(student, case, "the dtype of what is updated, from step to step")


@zero.property("held: three numbers of float64 for each weight of the own part", points=2)
def _(student, numbers):
    for world_size, num_weights in ((4, 240), (3, 100), (2, 64), (5, 203)):
        case = Case(world_size, num_weights)
        results = train_checked(student, case, "the weights, before memory is saved")
        most = 24 * -(-num_weights // world_size) + SLACK_BYTES
        for rank, (*_, held) in enumerate(results):
            look = "what else stays alive between steps, and whether a tensor is a view of a longer"
            saw = f"{case}: rank {rank} holds {held} bytes"
            expect(held <= most, saw, f"at most {most}", look)
        total, least = sum(held for *_, held in results), 24 * num_weights
        look = "the state: everything that lasts from step to step belongs into it"
        expect(total >= least, f"{case}: {total} bytes on all ranks", f"at least {least}", look)


@zero.property("sent: one reduce_scatter, one all_reduce and one all_gather a step", points=2)
def _(student, numbers):
    for world_size, num_weights in ((4, 240), (3, 100), (2, 64), (5, 203)):
        case = Case(world_size, num_weights, max_norm=(5.0, NEVER, 2.0))
        part = -(-num_weights // world_size)
        results = train_checked(student, case, "the weights, before bytes are saved")
        most = {"reduce_scatter": 4 * world_size * part, "all_reduce": 16, "all_gather": 4 * part}
        for rank, (_, found, entries, _) in enumerate(results):
            look = "which half of the exchange is about gradients, and which about weights"
            for entry in entries:
                saw = f"{case}: rank {rank} calls {entry.call} of {entry.n_bytes} bytes"
                allowed = most.get(entry.call)
                expect(allowed is not None, saw, f"only {', '.join(most)}", look)
                dtype = str(entry.dtype).removeprefix("torch.")
                expect(entry.n_bytes <= allowed, f"{saw}, {dtype}", f"at most {allowed}", look)
            for call in most:
                count = sum(entry.call == call for entry in entries)
                saw = f"{case}: rank {rank} makes {count} calls of {call} in {len(found)} steps"
                expect(count <= len(found), saw, f"at most {len(found)}", look)
