"""A slim model on all ranks: pruned, taught by the whole one, quantized, run.

    slimlab demo slim --ranks 4 --backend threads
    python -m slimlab.demos.slim --ranks 2 --backend mpi --json
    mpirun -n 4 python -m slimlab.demos.slim
    torchrun --nproc-per-node 4 -m slimlab.demos.slim --size book --timeline steps.json

A student with half of the heads and neurons learns from the whole model for three steps in float64:
by replicas that divide the batch, and by ranks that divide the layers of both models. What comes
out is quantized, to 8 bits with activations and to 4 bits in groups, and runs on all ranks. Losses,
gradients, weights and logits are compared with those of one process, where all is integers to the
last bit; calls and bytes with slimlab.plan, beside those of the whole model. As many heads stay as
the ranks can divide.

Production (vLLM, TensorRT-LLM) does the steps in programs of their own, with files between them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.comm.ledger import LedgerEntry
from slimlab.config import ModelConfig
from slimlab.demos.common import demo_command
from slimlab.demos.report import Report, report_of
from slimlab.demos.slim_checks import beside, check_quantized, data_calls
from slimlab.demos.training import (
    EPS,
    ITEM_BYTES,
    LR,
    NUM_STEPS,
    SIZES,
    Batch,
    Run,
    copy_of_weights,
    counting,
    make_batches,
    make_model,
    traced_if,
    train_alone,
    training_options,
    write_timeline,
)
from slimlab.demos.training_checks import check_calls, check_run
from slimlab.parallel.data import DataParallel
from slimlab.parallel.tensor import tensor_parallel
from slimlab.parallel.tensor_state import gather_state, gather_whole
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.quantized_parallel import predict_distillation
from slimlab.plan.tensor_parallel import local_param_shapes, predict_start
from slimlab.slim.distill import DistillationObjective
from slimlab.slim.prune_structure import (
    head_scores,
    neuron_scores,
    remove_heads,
    remove_neurons,
    weakest,
)
from slimlab.train.accumulate import Objective, accumulate_gradients
from slimlab.train.optimizer import make_optimizer

SETTINGS = {"distill_temperature": 2.0, "soft_weight": 0.5}
NEURONS = 8  # so many at least on each rank, that groups of 4 bits are whole


def program(
    comm: Communicator, size: str, batch_size: int, seed: int, timeline: str | None
) -> Report:
    """Train a student on all ranks, quantize it and run it, and compare with one process.

    comm        the communicator of all ranks
    size        of the whole model, a name in slimlab.demos.training.SIZES
    batch_size  sequences of all ranks together
    seed        of weights and data
    timeline    where to write when each rank was in which call; None: nowhere
    returns     the report, the same on every rank

    Communicates: what DataParallel and models that are cut do, and what ranks tell each other.
    """
    config, report = ModelConfig(**SIZES[size]), report_of("slim", comm)
    small = smaller(config, comm.world_size)
    batches = make_batches(config, batch_size, seed, comm.device)
    taught = DistillationObjective(make_model(config, seed, comm.device), **SETTINGS)
    student = pruned(config, small, seed, comm.device)
    true = train_alone(student, batches, taught)

    traced, w = traced_if(comm, timeline), comm.world_size
    model = pruned(config, small, seed + comm.rank, comm.device)
    found, entries = by_replicas(traced, model, batches, taught)
    check_run(report, comm, "data parallel: ", found, true)
    check_calls(report, comm, "data parallel: ", data_calls(small, w, NUM_STEPS), entries)

    model = pruned(config, small, seed + comm.rank, comm.device)
    teacher = make_model(config, seed + comm.rank, comm.device)
    found, entries = by_parts(traced, model, teacher, batches)
    write_timeline(report, traced, timeline)
    check_run(report, comm, "tensor parallel: ", found, true)
    shape = (batch_size, config.seq_len, w)
    step = predict_distillation(config, small, *shape, ITEM_BYTES)
    starts = (*predict_start(small, ITEM_BYTES), *predict_start(config, ITEM_BYTES))
    check_calls(report, comm, "tensor parallel: ", [*starts, *step.calls * NUM_STEPS], entries)

    beside(report, comm, batches[0], {"whole model": config, "student": small})
    check_quantized(report, comm, student.float(), batches[0][0])
    report.numbers |= {"size": size, "batch_size": batch_size, "losses": true.losses}
    return report


def smaller(config: ModelConfig, world_size: int) -> ModelConfig:
    """Choose half of the heads and neurons, or what comes next to it and the ranks divide.

    config      of the whole model
    world_size  number of ranks
    """
    heads = max(1, config.num_heads // 2 // world_size) * world_size
    part = NEURONS * world_size
    d_ff = max(1, config.d_ff // 2 // part) * part
    return replace(config, num_heads=heads, num_kv_heads=heads, d_ff=d_ff)


def pruned(config: ModelConfig, small: ModelConfig, seed: int, device: torch.device) -> nn.Module:
    """Make a model and remove its weakest heads and neurons.

    config  of the whole model
    small   of what is left
    seed    of the weights
    device  where they lie
    """
    model = make_model(config, seed, device)
    heads = weakest(head_scores(model), config.num_heads - small.num_heads)
    neurons = weakest(neuron_scores(model), config.d_ff - small.d_ff)
    return remove_neurons(remove_heads(model, heads), neurons)


def by_replicas(
    comm: Communicator, model: nn.Module, batches: list[Batch], objective: Objective
) -> tuple[Run, list[LedgerEntry]]:
    """Train replicas, each on its share of the batch.

    comm       the communicator of all ranks
    model      of this rank, changed in place
    batches    whole, one per step
    objective  what is to be learned
    returns    what came of it, and the calls

    Communicates: what DataParallel does.
    """
    entries: list[LedgerEntry] = []
    with counting(comm.ledger, entries):
        replica = DataParallel(model, comm)
    sizes = shard_sizes(len(batches[0][0]), comm.world_size)
    rows = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))

    def gradients(batch: Batch) -> tuple[Tensor, int]:
        return replica.gradients(tuple(one[rows] for one in batch), objective)

    found = steps(model, batches, partial(counting, comm.ledger, entries), gradients, copies)
    found.weights.update(copy_of_weights(model))
    return found, entries


def by_parts(
    comm: Communicator, model: nn.Module, teacher: nn.Module, batches: list[Batch]
) -> tuple[Run, list[LedgerEntry]]:
    """Train a student whose layers are divided, and its teacher's too.

    comm     the communicator of all ranks
    model    of this rank, changed in place
    teacher  of this rank, changed in place
    batches  whole, one per step
    returns  what came of it, and the calls

    Communicates: what models cut by tensor_parallel do.
    """
    entries: list[LedgerEntry] = []
    with counting(comm.ledger, entries):
        tensor_parallel(model, comm)
        objective = DistillationObjective(tensor_parallel(teacher, comm), **SETTINGS)

    def gradients(batch: Batch) -> tuple[Tensor, int]:
        return accumulate_gradients(model, batch, objective)

    counted, whole = partial(counting, comm.ledger, entries), partial(gather_whole, model)
    found = steps(model, batches, counted, gradients, whole)
    found.weights.update(gather_state(model))
    return found, entries


def steps(
    model: nn.Module,
    batches: list[Batch],
    counted: Callable[[], object],
    gradients: Callable[[Batch], tuple[Tensor, int]],
    whole: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Run:
    """Make the steps of a training.

    model      changed in place
    batches    one per step
    counted    makes a with block whose calls are counted
    gradients  batch -> loss, number of targets; leaves gradients behind
    whole      puts gradients together

    Communicates: what gradients and whole do.
    """
    optimizer, found = make_optimizer("adamw", model, lr=LR, eps=EPS), Run([], [], {})
    for batch in batches:
        with counted():
            loss, _ = gradients(batch)
        found.losses.append(float(loss))
        found.gradients.append(whole({name: p.grad for name, p in model.named_parameters()}))
        optimizer.step()
    return found


def copies(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are changed later.

    named  by name
    """
    return {name: one.clone() for name, one in named.items()}


def check(world_size: int, size: str, batch_size: int, seed: int, timeline: str | None) -> None:
    """Refuse a number of ranks that does not divide what is cut.

    world_size  number of ranks
    size, batch_size, seed, timeline  as in program

    Raises InputError that names the numbers that do.
    """
    config = ModelConfig(**SIZES[size])
    local_param_shapes(config, world_size)
    local_param_shapes(smaller(config, world_size), world_size)


main = demo_command(program, *training_options(), check=check)

if __name__ == "__main__":
    main()
