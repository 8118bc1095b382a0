"""Data parallelism: every rank has the model, and its share of each batch.

    slimlab demo data_parallel --ranks 4 --backend threads
    python -m slimlab.demos.data_parallel --ranks 2 --backend mpi --json
    mpirun -n 4 python -m slimlab.demos.data_parallel
    torchrun --nproc-per-node 4 -m slimlab.demos.data_parallel --size book --timeline steps.json

Three steps of AdamW in float64. The ranks begin with different weights and get those of rank 0;
their shares differ in sequences and in tokens, and a batch may be too small for all of them.
Losses, gradients and weights are compared with those of one process that has the whole batch; calls
and payload with slimlab.plan.data_parallel; and what a rank holds with what the parameters need.

Production (DistributedDataParallel) prints none of this unless asked (TORCH_DISTRIBUTED_DEBUG).
"""

from math import prod

import click

from slimlab.comm.base import Communicator
from slimlab.config import ModelConfig
from slimlab.demos.common import demo_command, number
from slimlab.demos.report import Report, report_of
from slimlab.demos.training import (
    EPS,
    ITEM_BYTES,
    LR,
    NUM_STEPS,
    SIZES,
    Run,
    copy_of_weights,
    count_targets,
    counting,
    held_bytes,
    make_batches,
    make_model,
    optimizer_bytes,
    traced_if,
    train_alone,
    training_options,
    write_timeline,
)
from slimlab.demos.training_checks import check_calls, check_held, check_run
from slimlab.parallel.data import DataParallel
from slimlab.plan.data_parallel import predict_broadcast, predict_step, shard_sizes
from slimlab.plan.params import num_params, param_shapes
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import make_optimizer


def program(
    comm: Communicator,
    size: str,
    batch_size: int,
    bucket_bytes: int,
    seed: int,
    timeline: str | None,
) -> Report:
    """Train on all ranks, and compare with one process and with the plan.

    comm          the communicator of all ranks
    size          of the model, a name in slimlab.demos.training.SIZES
    batch_size    sequences of all ranks together
    bucket_bytes  gradients that travel together, at most
    seed          of weights and data
    timeline      where to write when each rank was in which call; None: nowhere
    returns       the report, the same on every rank

    Communicates: what DataParallel does in three steps, and what the ranks tell each other.
    """
    config, report = ModelConfig(**SIZES[size]), report_of("data_parallel", comm)
    batches = make_batches(config, batch_size, seed, comm.device)
    true = train_alone(make_model(config, seed, comm.device), batches)

    traced, entries = traced_if(comm, timeline), []
    model = make_model(config, seed + comm.rank, comm.device)
    with counting(comm.ledger, entries):
        replica = DataParallel(model, traced, bucket_bytes=bucket_bytes)
    optimizer = make_optimizer("adamw", model, lr=LR, eps=EPS)
    found, tokens = Run([], [], {}), []
    sizes = shard_sizes(batch_size, comm.world_size)
    start = sum(sizes[: comm.rank])
    for batch in batches:
        share = tuple(one[start : start + sizes[comm.rank]] for one in batch)
        with counting(comm.ledger, entries):
            loss, num_tokens = replica.gradients(share, causal_objective)
        optimizer.step()
        found.losses.append(float(loss))
        found.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        tokens.append(num_tokens)
    found.weights.update(copy_of_weights(model))
    write_timeline(report, traced, timeline)

    check_run(report, comm, "", found, true)
    report.check("target tokens of each step", [count_targets(one) for one in batches], tokens)
    check_calls(report, comm, "", predicted_calls(config, comm.world_size, bucket_bytes), entries)
    counted = {
        "weights": held_bytes(model.parameters()),
        "gradients": held_bytes(param.grad for param in model.parameters()),
        "optimizer": optimizer_bytes(optimizer),
    }
    check_held(report, comm, "", [predicted_bytes(config)] * comm.world_size, counted)
    report.numbers |= {"size": size, "batch_size": batch_size, "losses": found.losses}
    return report


def predicted_calls(
    config: ModelConfig, world_size: int, bucket_bytes: int
) -> list[tuple[str, int]]:
    """Predict the calls of a rank: the broadcast of the model, then three steps.

    config        of the model
    world_size    number of ranks
    bucket_bytes  gradients that travel together, at most
    """
    sizes = [prod(shape) for shape in param_shapes(config).values()]
    n_bytes = [size * ITEM_BYTES for size in sizes]
    step = predict_step(sizes, ITEM_BYTES, world_size, bucket_bytes)
    reduced = [("all_reduce", one) for one in (*step.bucket_bytes, step.report_bytes)]
    return [*predict_broadcast(n_bytes, world_size, bucket_bytes), *reduced * NUM_STEPS]


def predicted_bytes(config: ModelConfig) -> dict[str, int]:
    """Predict what a rank holds: as much as one process.

    config  of the model
    """
    whole = num_params(config) * ITEM_BYTES
    return {"weights": whole, "gradients": whole, "optimizer": 2 * whole}


main = demo_command(
    program,
    *training_options(),
    number("--bucket-bytes", click.IntRange(1, 2**40), 2**16, "Of gradients that travel together.",
           "bucket_bytes"),
)  # fmt: skip

if __name__ == "__main__":
    main()
