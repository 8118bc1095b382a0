"""Grader of exercise 8.4 of chapter 08: the largest k numbers of all ranks, merged over a tree.

Numbers are whole, so that sums are exact and nothing lost is nothing at all. Where the tree decides
what falls out, only what every tree must keep to is asked: at most k places, the same on all ranks,
and update and residuals that add up. Where it cannot, the oracle has the one right answer.

Shi et al. 2019 (arXiv:1901.04359), gTop-k; production libraries gather, which is simpler and needs
no second choice.
"""

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch07_runs import num_doublings, run, timed
from slimlab.classroom.checks.ch09_runs import ranks_text
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close
from slimlab.comm.links import Network

WORLDS = (2, 4, 3, 8, 5, 6, 7, 1)
EXACT = {"rtol": 0.0, "reason": "sums of whole numbers are exact"}
PAIR_BYTES = 16
ROUNDS = 4

merge = Exercise(
    "8.4",
    "Top-k merged on the way",
    requires=("merged_top_k",),
    stars=3,
    hints=(
        "On one rank: which k numbers are the update, and what is the residual? On two: who "
        "merges, and what do both of them keep?",
        "Only the rank that merges knows what falls out there. Nobody else can put it anywhere.",
        "A merge may be done with a tensor of n zeros on which both ranks' pairs are added.",
        "Ranks 1, 3, 5, ... send to their left neighbour; then 2, 6, ... to the rank two to the "
        "left. A rank that has sent waits for the broadcast.",
        "A place that fell out here may come in by another branch. So what a rank has sent is gone "
        "for it, whether or not its place is in the update.",
    ),
)


def run_rounds(student, world_size: int, inputs: list[list[Tensor]], k: int, what: str):
    """Run rounds of merged_top_k, each with the residual of the last; check forms and places.

    student     what the student's cells define
    world_size  number of ranks
    inputs      gradients of each round, of each rank
    k           as in the exercise
    what        what runs, for the message
    returns     per round: the updates and residuals of all ranks; and the ledgers
    """
    function = function_of(student, "merged_top_k")

    def program(comm):
        residual, rounds = torch.zeros_like(inputs[0][0]), []
        for gradients in inputs:
            gradient = gradients[comm.rank].clone()
            before = residual.clone()
            result = function(comm, gradient, residual, k)
            where = f"{what}: rank {comm.rank}"
            check_form(result, gradient, where)
            same = torch.equal(gradient, gradients[comm.rank]) and torch.equal(residual, before)
            look = "what works in place: +=, zero_, an index on the left"
            expect(same, f"{where}: an argument was changed", "it as it was", look)
            residual = result[1].detach().clone()
            rounds.append((result[0].detach().clone(), residual))
        return rounds

    results = run(program, world_size, what)
    return [list(zip(*one)) for one in zip(*results)], results.ledgers


def check_form(result, gradient: Tensor, where: str) -> None:
    """Fail unless `result` is a pair of tensors like the `gradient`; `where` for the message."""
    look = "the return line: update and residual"
    fits = isinstance(result, tuple | list) and len(result) == 2
    expect(fits, f"{where} returned {form_of(result)}", "an update and a residual", look)
    for one, name in zip(result, ("update", "residual")):
        same = isinstance(one, Tensor) and one.shape == gradient.shape
        asked = f"a tensor of shape {tuple(gradient.shape)}"
        expect(same, f"{where}: {name} is {form_of(one)}", asked, look)


def check_updates(updates, k: int, what: str) -> None:
    """Fail unless all ranks have the same update, with at most k places.

    updates, k, what  of all ranks; as in run_rounds
    """
    for rank, one in enumerate(updates):
        look = "how the other ranks get what the root has"
        expect_close(one, updates[0], f"{what}: update of rank {rank} beside rank 0", look, **EXACT)
        num_places = int((one != 0).sum())
        look = "how many pairs are kept after each merge"
        saw = f"{what}: an update with {num_places} places"
        expect(num_places <= k, saw, f"at most {k}", look)


def whole_numbers(world_size: int, n: int, seed: int, rounds: int = 1) -> list[list[Tensor]]:
    """Draw whole numbers of different absolute values for each rank and round.

    world_size, n, seed, rounds  how many ranks, numbers and rounds, and which draw
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rounds):
        some = []
        for _ in range(world_size):
            sizes = 1 + torch.randperm(50 * n, generator=generator)[:n]
            signs = 2 * torch.randint(2, (n,), generator=generator) - 1
            some.append((sizes * signs).double())
        found.append(some)
    return found


def largest(tensor: Tensor, k: int) -> Tensor:
    """Return `tensor` with 0 but for the k numbers of largest absolute value."""
    places = tensor.abs().topk(k).indices
    return torch.zeros_like(tensor).index_put((places,), tensor[places])


@merge.property("one rank and two: the update and both residuals", points=2)
def _(student, numbers):
    for world_size in (1, 2):
        for n, k in ((8, 2), (20, 5), (6, 6), (9, 1), (12, 4)):
            what = f"{ranks_text(world_size)}, n = {n}, k = {k}"
            inputs = whole_numbers(world_size, n, n + k)
            ((updates, residuals),), _ = run_rounds(student, world_size, inputs, k, what)
            sent = [largest(one, k) for one in inputs[0]]
            check_updates(updates, k, what)
            look = "equal places added, then the k largest by absolute value"
            wanted = largest(sum(sent), k)
            expect_close(updates[0], wanted, f"{what}: update", look, **EXACT)
            total = sum(residuals) + updates[0]
            look = "what a rank does not send, and what falls out of the merge"
            expect_close(total, sum(inputs[0]), f"{what}: all added up", look, **EXACT)


@merge.property("where places differ, the k largest of all ranks", points=2)
def _(student, numbers):
    for world_size in WORLDS:
        for each, k in ((4, 3), (2, 2)):
            n = world_size * each
            (first, *_), *_ = whole_numbers(1, n, 7 * world_size + k)
            place = torch.arange(n).roll(3) % world_size
            inputs = [[first * (place == rank) for rank in range(world_size)]]
            what = f"{ranks_text(world_size)} with places of their own, n = {n}, k = {k}"
            ((updates, _),), _ = run_rounds(student, world_size, inputs, k, what)
            check_updates(updates, k, what)
            look = "which ranks take part in which merge, also where w is no power of two"
            expect_close(updates[0], largest(first, k), f"{what}: update", look, **EXACT)


@merge.property("numbers at the same places are added, at every level", points=1)
def _(student, numbers):
    for world_size in WORLDS:
        n, k = 15, 3
        (inputs,) = whole_numbers(world_size, n, 30 + world_size)
        for rank, one in enumerate(inputs):
            one[[1, 7, 12]] = torch.tensor([2000.0, 3000.0, -4000.0]).double() + rank
        wanted = largest(sum(inputs), k)
        what = f"{ranks_text(world_size)} whose largest numbers share their places, k = {k}"
        ((updates, _),), _ = run_rounds(student, world_size, [inputs], k, what)
        check_updates(updates, k, what)
        look = "what happens to two numbers at one place, and whether a sum or a mean is asked for"
        expect_close(updates[0], wanted, f"{what}: update", look, **EXACT)


@merge.property("nothing is lost, over several rounds", points=3)
def _(student, numbers):
    for world_size in WORLDS:
        for n, k in ((10, 2), (16, 5)):
            what = f"{ranks_text(world_size)}, n = {n}, k = {k}"
            inputs = whole_numbers(world_size, n, n + world_size, ROUNDS)
            rounds, _ = run_rounds(student, world_size, inputs, k, what)
            before = torch.zeros(n).double()
            for number, (updates, residuals) in enumerate(rounds, start=1):
                label = f"{what}, round {number}"
                check_updates(updates, k, label)
                brought = sum(inputs[number - 1]) + before
                before = sum(residuals)
                look = "whose residual takes what falls out of a merge, and what a sender keeps"
                saw = updates[0] + before
                expect_close(saw, brought, f"{label}: update and residuals", look, **EXACT)
                expect(bool((updates[0] != 0).any()), f"{label}: an update of 0", "numbers", look)


def true_first(student, world_size: int, n: int, k: int, what: str):
    """Run one round whose update is known, and fail unless it is right; return the ledgers.

    student, world_size, n, k, what  as in run_rounds
    """
    (first, *_), *_ = whole_numbers(1, n, world_size)
    place = torch.arange(n) % world_size
    inputs = [[first * (place == rank) for rank in range(world_size)]]
    ((updates, _),), ledgers = run_rounds(student, world_size, inputs, k, what)
    check_updates(updates, k, what)
    look = "the update, before messages are saved"
    expect_close(updates[0], largest(first, k), f"{what}: update", look, **EXACT)
    return ledgers


@merge.property("messages of k pairs, two for each rank but one", points=2)
def _(student, numbers):
    for world_size in WORLDS:
        n, k = 40, 3
        what = f"{ranks_text(world_size)}, n = {n}, k = {k}"
        ledgers = true_first(student, world_size, n, k, what)
        num_bytes = 0
        for rank, ledger in enumerate(ledgers):
            for entry in ledger.entries:
                saw = f"{what}: rank {rank} calls {entry.call} of {entry.n_bytes} bytes"
                look = "what the task allows: messages between two ranks, and one broadcast"
                allowed = entry.call in ("send", "recv", "broadcast")
                expect(allowed, saw, "send, recv and broadcast only", look)
            num_bytes += sum(one.n_bytes for one in ledger.entries if one.call == "send")
        shared = [one.n_bytes for one in ledgers[0].entries if one.call == "broadcast"]
        look = "who sends what to whom: k pairs up, k pairs down"
        expect(len(shared) <= 2, f"{what}: {len(shared)} broadcasts", "one, or two halves", look)
        num_bytes += (world_size - 1) * sum(shared)
        most = 2 * (world_size - 1) * k * PAIR_BYTES
        saw = f"{what}: {num_bytes} bytes in all"
        expect(num_bytes <= most, saw, f"at most {most}", look)


@merge.property("done after log2 w messages up and log2 w down", points=1)
def _(student, numbers):
    function = function_of(student, "merged_top_k")
    for world_size in WORLDS:
        n, k = 40, 4
        what = f"{ranks_text(world_size)}, n = {n}, k = {k}"
        true_first(student, world_size, n, k, what)
        (inputs,) = whole_numbers(world_size, n, world_size)
        network = Network(0.0, bytes_per_s=float(k * PAIR_BYTES))

        def program(comm, inputs=inputs, n=n, k=k):
            return function(comm, inputs[comm.rank], torch.zeros(n).double(), k)

        _, last_s = timed(program, world_size, what, network)
        most = 2 * num_doublings(world_size)
        look = "who waits for whom: merges of different pairs of ranks can go on at the same time"
        saw = f"{what}: the last rank is done after {last_s:g} seconds"
        expect(last_s <= most + 1e-9, saw, f"at most {most}", look)


@merge.property("it ends where every send waits for its receiver", points=1)
def _(student, numbers):
    function = function_of(student, "merged_top_k")
    for world_size in WORLDS:
        n, k = 12, 2
        what = f"{ranks_text(world_size)}, no buffer"
        (inputs,) = whole_numbers(world_size, n, world_size)
        results = run(
            lambda comm: function(comm, inputs[comm.rank], torch.zeros(n).double(), k),  # noqa: B023
            world_size,
            what,
            eager_bytes=0,
        )
        for rank, one in enumerate(results):
            check_form(one, inputs[rank], f"{what}: rank {rank}")
        check_updates([one[0] for one in results], k, what)
        look = "the update, before buffers are thought of"
        expect(bool((results[0][0] != 0).any()), f"{what}: an update of 0", "numbers", look)
        total = results[0][0] + sum(one[1] for one in results)
        look = "nothing that is lost here either"
        expect_close(total, sum(inputs), f"{what}: all added up", look, **EXACT)
