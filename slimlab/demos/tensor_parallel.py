"""Tensor parallelism: every rank has some heads, features and words of each layer.

    slimlab demo tensor_parallel --ranks 4 --backend threads
    python -m slimlab.demos.tensor_parallel --ranks 2 --backend gloo --sequence-parallel --json
    mpirun -n 4 python -m slimlab.demos.tensor_parallel
    torchrun --nproc-per-node 4 -m slimlab.demos.tensor_parallel --size book --timeline steps.svg

Three steps of AdamW in float64. All ranks work on the same batch, and no rank has a whole layer.
Losses, gradients and weights, put together from the parts, are compared with those of one process;
calls and payload, and what a rank holds, with slimlab.plan.tensor_parallel. Heads, features of the
feed-forward layer and words are cut whole, so the number of ranks must divide them; with
--sequence-parallel the positions too.

Production (Megatron-LM, torch's parallelize_module) keeps such ranks on one host: each of these
calls is waited for.
"""

from math import prod

import click

from slimlab.comm.base import Communicator
from slimlab.config import ModelConfig
from slimlab.demos.common import demo_command
from slimlab.demos.report import Report, report_of
from slimlab.demos.training import (
    EPS,
    ITEM_BYTES,
    LR,
    NUM_STEPS,
    SIZES,
    Run,
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
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.tensor_state import gather_state, gather_whole
from slimlab.plan.tensor_parallel import local_param_shapes, predict_start, predict_step
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.optimizer import make_optimizer


def program(
    comm: Communicator,
    size: str,
    batch_size: int,
    sequence_parallel: bool,
    seed: int,
    timeline: str | None,
) -> Report:
    """Train on all ranks, and compare with one process and with the plan.

    comm               the communicator of all ranks
    size               of the model, a name in slimlab.demos.training.SIZES
    batch_size         sequences, the same for all ranks
    sequence_parallel  cut what flows between the layers along its positions
    seed               of weights and data
    timeline           where to write when each rank was in which call; None: nowhere
    returns            the report, the same on every rank

    Communicates: what a model cut by tensor_parallel does in three steps, and what the ranks tell
    each other.
    """
    config, report = ModelConfig(**SIZES[size]), report_of("tensor_parallel", comm)
    batches = make_batches(config, batch_size, seed, comm.device)
    true = train_alone(make_model(config, seed, comm.device), batches)

    traced, entries = traced_if(comm, timeline), []
    model = make_model(config, seed + comm.rank, comm.device)
    with counting(comm.ledger, entries):
        model = tensor_parallel(model, traced, sequence_parallel=sequence_parallel)
    optimizer = make_optimizer("adamw", model, lr=LR, eps=EPS)
    found = Run([], [], {})
    for batch in batches:
        with counting(comm.ledger, entries):
            loss, _ = accumulate_gradients(model, batch, tensor_parallel_objective)
        found.losses.append(float(loss))
        grads = {name: param.grad for name, param in model.named_parameters()}
        found.gradients.append(gather_whole(model, grads))
        optimizer.step()
    found.weights.update(gather_state(model))
    write_timeline(report, traced, timeline)

    check_run(report, comm, "", found, true)
    calls = predicted_calls(config, batch_size, comm.world_size, sequence_parallel)
    check_calls(report, comm, "", calls, entries)
    counted = {
        "weights": held_bytes(model.parameters()),
        "gradients": held_bytes(param.grad for param in model.parameters()),
        "optimizer": optimizer_bytes(optimizer),
    }
    predicted = predicted_bytes(config, comm.world_size)
    check_held(report, comm, "", [predicted] * comm.world_size, counted)
    report.numbers |= {"size": size, "batch_size": batch_size, "losses": found.losses}
    return report


def predicted_calls(
    config: ModelConfig, batch_size: int, world_size: int, sequence_parallel: bool
) -> list[tuple[str, int]]:
    """Predict the calls of a rank: the models made equal, then three steps.

    config             of the model
    batch_size         sequences of the batch
    world_size         number of ranks
    sequence_parallel  cut what flows between the layers along its positions

    Raises InputError where sizes do not divide.
    """
    step = predict_step(
        config,
        batch_size,
        config.seq_len,
        world_size,
        ITEM_BYTES,
        sequence_parallel=sequence_parallel,
    )
    return [*predict_start(config, ITEM_BYTES), *step.calls * NUM_STEPS]


def predicted_bytes(config: ModelConfig, world_size: int) -> dict[str, int]:
    """Predict what each rank holds: its parts, and norms whole.

    config      of the model
    world_size  number of ranks
    """
    own = sum(map(prod, local_param_shapes(config, world_size).values())) * ITEM_BYTES
    return {"weights": own, "gradients": own, "optimizer": 2 * own}


def check(
    world_size: int,
    size: str,
    batch_size: int,
    sequence_parallel: bool,
    seed: int,
    timeline: str | None,
) -> None:
    """Refuse a number of ranks that does not divide what is cut.

    world_size  number of ranks
    size, batch_size, sequence_parallel, seed, timeline  as in program

    Raises InputError that names the numbers that do.
    """
    predicted_calls(ModelConfig(**SIZES[size]), batch_size, world_size, sequence_parallel)


main = demo_command(
    program,
    *training_options(),
    click.option("--sequence-parallel", is_flag=True,
                 help="Cut what flows between the layers along its positions."),
    check=check,
)  # fmt: skip

if __name__ == "__main__":
    main()
