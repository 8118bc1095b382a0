"""ZeRO: data parallelism with optimizer state, gradients and weights in shards.

    slimlab demo zero --ranks 4 --backend threads
    python -m slimlab.demos.zero --ranks 2 --backend gloo --stage 3 --json
    mpirun -n 4 python -m slimlab.demos.zero
    torchrun --nproc-per-node 4 -m slimlab.demos.zero --size book --stage 3 --timeline steps.json

Three steps of AdamW in float64, for each stage: 1 cuts the optimizer's state, 2 gradients too, 3
weights too. Losses, gradients and weights, put together from the shards, are compared with those of
one process that has the whole batch; calls, payload, and the bytes that each rank holds, at their
peak too, with slimlab.plan.zero. What is held shrinks with every stage, what is sent grows with the
third.

Production (fully_shard, DeepSpeed) shows such bytes only as what the allocator has handed out.
"""

from math import prod

import click

from slimlab.comm.base import Communicator
from slimlab.comm.ledger import LedgerEntry
from slimlab.config import ModelConfig
from slimlab.demos.common import demo_command
from slimlab.demos.report import Report, report_of
from slimlab.demos.training import (
    BOUND,
    EPS,
    ITEM_BYTES,
    LR,
    NUM_STEPS,
    SIZES,
    Batch,
    Run,
    counting,
    make_batches,
    make_model,
    traced_if,
    train_alone,
    training_options,
    write_timeline,
)
from slimlab.demos.training_checks import check_calls, check_held, check_run
from slimlab.parallel.zero import Zero
from slimlab.plan.data_parallel import predict_broadcast, shard_sizes
from slimlab.plan.params import param_shapes
from slimlab.plan.zero import zero_held_bytes, zero_step_calls
from slimlab.plan.zero_units import zero_units
from slimlab.train.objectives import causal_objective

STAGES = (1, 2, 3)
HELD = ("weights", "gradients", "optimizer", "gathered_peak", "unreduced_peak")


def program(
    comm: Communicator, size: str, batch_size: int, stage: str, seed: int, timeline: str | None
) -> Report:
    """Train on all ranks with each stage, and compare with one process and with the plan.

    comm        the communicator of all ranks
    size        of the model, a name in slimlab.demos.training.SIZES
    batch_size  sequences of all ranks together
    stage       "1", "2", "3" or "all"
    seed        of weights and data
    timeline    where to write when each rank was in which call; None: nowhere
    returns     the report, the same on every rank

    Communicates: what Zero does in three steps of each stage, and what the ranks tell each other.
    """
    config, report = ModelConfig(**SIZES[size]), report_of("zero", comm)
    batches = make_batches(config, batch_size, seed, comm.device)
    true = train_alone(make_model(config, seed, comm.device), batches)
    traced, runs = traced_if(comm, timeline), {}
    for number in STAGES if stage == "all" else (int(stage),):
        model = make_model(config, seed + comm.rank, comm.device)
        runs[number] = train(traced, model, number, batches)
    write_timeline(report, traced, timeline)
    errors = []
    for number, (found, entries, counted) in runs.items():
        what = f"stage {number}: "
        largest = check_run(report, comm, what, found, true)
        errors.append((number, *(f"{one:.1e}" for one in largest)))
        calls = predicted_calls(config, comm.world_size, number)
        check_calls(report, comm, what, calls, entries)
        predicted = [
            predicted_bytes(config, comm.world_size, rank, number)
            for rank in range(comm.world_size)
        ]
        check_held(report, comm, what, predicted, counted)
    headers = ("stage", "losses", "gradients", "weights")
    report.table(f"largest errors on any rank, to be below {BOUND:g}", headers, errors)
    report.numbers |= {"size": size, "batch_size": batch_size, "losses": true.losses}
    return report


def train(
    comm: Communicator, model: object, stage: int, batches: list[Batch]
) -> tuple[Run, list[LedgerEntry], dict[str, int]]:
    """Train with one stage.

    comm     the communicator of all ranks
    model    of this rank, changed in place
    stage    1, 2 or 3
    batches  whole, one per step
    returns  what came of it, this rank's calls, and the bytes that it holds at the end

    Communicates: what Zero does, and all_gathers that put gradients and weights together, which do
    not stand in the list.
    """
    found, entries = Run([], [], {}), []
    with counting(comm.ledger, entries):
        zero = Zero(model, comm, stage=stage, lr=LR, eps=EPS)
    sizes = shard_sizes(len(batches[0][0]), comm.world_size)
    start = sum(sizes[: comm.rank])
    for batch in batches:
        share = tuple(one[start : start + sizes[comm.rank]] for one in batch)
        with counting(comm.ledger, entries):
            loss, _ = zero.gradients(share, causal_objective)
        found.losses.append(float(loss))
        found.gradients.append(zero.full_gradients())
        with counting(comm.ledger, entries):
            zero.step()
    held = zero.held_bytes()
    found.weights.update(zero.full_weights())
    zero.close()
    return found, entries, {name: held[name] for name in HELD}


def predicted_calls(config: ModelConfig, world_size: int, stage: int) -> list[tuple[str, int]]:
    """Predict the calls of a rank: the broadcast of the model, then three steps.

    config      of the model
    world_size  number of ranks
    stage       1, 2 or 3
    """
    n_bytes = [prod(shape) * ITEM_BYTES for shape in param_shapes(config).values()]
    step = zero_step_calls(zero_units(config), world_size, stage, item_bytes=ITEM_BYTES)
    return [*predict_broadcast(n_bytes, world_size, None), *step * NUM_STEPS]


def predicted_bytes(config: ModelConfig, world_size: int, rank: int, stage: int) -> dict[str, int]:
    """Predict what a rank holds between steps, and the most that it has whole at one time.

    config      of the model
    world_size  number of ranks
    rank        this one
    stage       1, 2 or 3
    """
    held = zero_held_bytes(zero_units(config), world_size, rank, stage, item_bytes=ITEM_BYTES)
    return {name: held[name] for name in HELD}


main = demo_command(
    program,
    *training_options(),
    click.option("--stage", type=click.Choice([*map(str, STAGES), "all"]), default="all",
                 show_default=True, help="What is cut; all: one after the other."),
)  # fmt: skip

if __name__ == "__main__":
    main()
