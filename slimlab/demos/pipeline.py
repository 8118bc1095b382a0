"""Pipeline parallelism: stages of a model, one on each rank, filled by six schedules.

    slimlab demo pipeline --ranks 4 --backend threads
    python -m slimlab.demos.pipeline --ranks 2 --backend gloo --schedule 1f1b --json
    mpirun -n 4 python -m slimlab.demos.pipeline
    torchrun --nproc-per-node 4 -m slimlab.demos.pipeline --schedule zb_h1 --timeline step.svg

Three steps of AdamW in float64 with each schedule, on a model of two layers for each rank. Losses,
gradients and weights of all stages are compared with those of one process; messages with
slimlab.plan.pipeline_messages; how many micro-batches each stage holds, and how long it idles, with
the schedule and its simulation. Idle slots are counted by clocks that go on as each instruction
says and travel with the messages, so they are the same on every machine. A figure as --timeline
shows a step as the machine's clock saw it, above the same without waiting for messages.

Production shows a profiler's timeline, in which a bubble is what is white.
"""

from collections.abc import Sequence
from pathlib import Path

import click

from slimlab.comm.base import Communicator
from slimlab.config import ModelConfig, require
from slimlab.demos.common import demo_command, number
from slimlab.demos.measure import from_all_ranks
from slimlab.demos.report import Report, report_of
from slimlab.demos.training import (
    BOUND,
    EPS,
    FIGURES,
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
from slimlab.demos.training_checks import check_run
from slimlab.parallel.hybrid_stages import from_owners, owners_of
from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.schedules_zero_bubble import SCHEDULES, make_schedule
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.pipeline_messages import predict_step
from slimlab.plan.pipeline_schedule import FORWARD, WEIGHT_GRADIENT, Schedule, peak_activations
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes
from slimlab.plan.step_timeline import StepTimeline
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import make_optimizer

LAYERS_PER_RANK = 2  # two chunks need them
# Of a whole stage, in slots: a forward pass and each gradient take equally long.
SLOTS = StageTimes(2, 2, 2)
NAMES = tuple(SCHEDULES)


def program(
    comm: Communicator,
    size: str,
    batch_size: int,
    micro_batches: int,
    schedule: str,
    seed: int,
    timeline: str | None,
) -> Report:
    """Train on all ranks with each schedule, and compare with one process, plan and simulation.

    comm           the communicator of all ranks, the stages
    size           of the model, a name in slimlab.demos.training.SIZES; its layers follow from comm
    batch_size     sequences of a batch
    micro_batches  into which it is cut
    schedule       one of slimlab.parallel.schedules, or "all"
    seed           of weights and data
    timeline       where to write when each rank was in which call, or computed what; None: nowhere
    returns        the report, the same on every rank

    Communicates: what Pipeline does in five steps of each schedule, and what ranks tell each other.
    """
    config = config_of(size, comm.world_size)
    report, traced = report_of("pipeline", comm), traced_if(comm, timeline)
    batches = make_batches(config, batch_size, seed, comm.device)
    true = train_alone(make_model(config, seed, comm.device), batches)
    rows, runs = [], []
    for name in NAMES if schedule == "all" else (schedule,):
        plan = make_schedule(name, comm.world_size, micro_batches)
        model = make_model(config, seed + comm.rank, comm.device)
        runs.append((plan, *train(traced, model, plan, batches)))
    last = runs[-1]
    if timeline is not None and Path(timeline).suffix in FIGURES:
        write_figure(report, comm, last[0], last[-1], timeline)
    else:
        write_timeline(report, traced, timeline)
    for plan, found, counted, steps, _ in runs:
        what = f"{plan.name}: "
        errors = check_run(report, comm, what, found, true)
        check_counts(report, comm, what, predicted(config, plan, batch_size), counted)
        ideal = simulate(plan, SLOTS.in_chunks(plan.num_chunks))
        report.check(f"{what}idle slots", list(ideal.idle_s), list(steps.idle_s))
        peaks = ", ".join(f"{one / plan.num_chunks:g}" for one in peak_activations(plan))
        fraction = f"{steps.bubble_fraction:.3f}"
        rows.append((plan.name, f"{max(errors):.1e}", f"{steps.step_s:g}", fraction, peaks))
    headers = ("schedule", "largest error", "slots", "bubble", "micro-batches held")
    report.table(f"errors are to be below {BOUND:g}; counted", headers, rows)
    report.numbers |= {"size": size, "batch_size": batch_size, "losses": true.losses}
    return report


def train(
    comm: Communicator, model: object, schedule: Schedule, batches: list[Batch]
) -> tuple[Run, dict[str, int], StepTimeline, StepTimeline]:
    """Train with one schedule.

    comm      the communicator of all ranks
    model     whole, of this rank
    schedule  of the stages
    batches   one per step
    returns   what came of it; payload and calls of this rank in all steps, and most activations
              held; a step in slots, and one in seconds

    Communicates: what Pipeline does, and what puts gradients and weights together.
    """
    shapes = {name: param.shape for name, param in model.named_parameters()}
    owners, found, entries = owners_of(model, schedule), Run([], [], {}), []
    pipeline = Pipeline(model, comm, schedule)
    optimizer = make_optimizer("adamw", pipeline.stage, lr=LR, eps=EPS)
    for batch in batches:
        with counting(comm.ledger, entries):
            loss, _ = pipeline.gradients(batch, causal_objective)
        found.losses.append(float(loss))
        grads = {name: param.grad for name, param in pipeline.stage.named_parameters()}
        found.gradients.append(from_owners(comm, owners, shapes, grads))
        optimizer.step()
    weights = dict(pipeline.stage.named_parameters())
    found.weights.update(from_owners(comm, owners, shapes, weights))
    counted = {
        "calls": len(entries),
        "bytes": sum(entry.n_bytes for entry in entries),
        "micro-batches held": pipeline.peak_passes,
    }
    timelines = []
    for clock in (SLOTS.in_chunks(schedule.num_chunks), "wall"):
        record = pipeline.watch(clock)
        pipeline.gradients(batches[0], causal_objective)
        timelines.append(record.timeline())
    return found, counted, *timelines


def predicted(config: ModelConfig, schedule: Schedule, batch_size: int) -> list[dict[str, int]]:
    """Predict what is counted on every rank.

    config      of the model
    schedule    of the stages
    batch_size  sequences of a batch
    """
    sizes = shard_sizes(batch_size, schedule.num_micro_batches)
    table_bytes = config.vocab_size * config.d_model * ITEM_BYTES
    axes = (config.seq_len, config.d_model, ITEM_BYTES)
    stages = predict_step(schedule, sizes, *axes, table_bytes=table_bytes)
    found = []
    for stage, peak in zip(stages, peak_activations(schedule)):
        received = sum(n_bytes for _, n_bytes in stage.received)
        n_bytes = stage.sent_bytes + received + sum(stage.all_reduces)
        counts = {"calls": stage.num_calls * NUM_STEPS, "bytes": n_bytes * NUM_STEPS}
        found.append(counts | {"micro-batches held": peak})
    return found


def check_counts(
    report: Report,
    comm: Communicator,
    what: str,
    expected: Sequence[dict[str, int]],
    counted: dict[str, int],
) -> None:
    """Compare what was counted on every rank with the prediction.

    report    takes the checks
    comm      the communicator of all ranks
    what      stands before each check
    expected  of each rank
    counted   of this rank

    Communicates: one all_gather.
    """
    names = list(expected[0])
    columns = zip(*from_all_ranks(comm, [counted[name] for name in names]))
    for name, column in zip(names, columns):
        report.check(f"{what}{name}", [one[name] for one in expected], list(column))


def write_figure(
    report: Report, comm: Communicator, schedule: Schedule, measured: StepTimeline, path: str
) -> None:
    """Draw a step as the machine's clock saw it, and the same computing without any waiting.

    report    says where it is
    comm      the communicator of all ranks
    schedule  of the stages
    measured  a step in seconds
    path      of the image

    Raises InputError, on rank 0, if it cannot be written.
    """
    if comm.rank == 0:
        from slimlab.show.schedules import schedule_figure

        ideal = simulate(schedule, times_of(schedule, measured))
        steps = {"measured": measured, "ideal": ideal}
        schedule_figure(steps, f"{schedule.name}, {comm.world_size} stages").savefig(path)
    report.numbers["timeline"] = str(path)


def times_of(schedule: Schedule, measured: StepTimeline) -> StageTimes:
    """Return how long each virtual stage computed, on average; a whole backward pass in halves.

    schedule  of the stages
    measured  a step in seconds
    """
    count = schedule.num_virtual_stages
    spent = {kind: [0.0] * count for kind in ("forward", "input", "weight")}
    for row in measured.slots:
        for one in row:
            place = schedule.virtual_stage(one.stage, one.instruction.chunk)
            seconds = (one.end_s - one.start_s) / schedule.num_micro_batches
            kind = one.instruction.kind
            if kind == FORWARD:
                spent["forward"][place] += seconds
            elif kind == WEIGHT_GRADIENT:
                spent["weight"][place] += seconds
            else:
                spent["input"][place] += seconds
    return StageTimes(spent["forward"], spent["input"], spent["weight"])


def config_of(size: str, world_size: int) -> ModelConfig:
    """Return a model with LAYERS_PER_RANK layers for each rank.

    size        a name in slimlab.demos.training.SIZES
    world_size  number of ranks
    """
    return ModelConfig(**SIZES[size] | {"num_layers": LAYERS_PER_RANK * world_size})


def check(
    world_size: int,
    size: str,
    batch_size: int,
    micro_batches: int,
    schedule: str,
    seed: int,
    timeline: str | None,
) -> None:
    """Refuse more micro-batches than sequences.

    world_size  number of ranks
    size, batch_size, micro_batches, schedule, seed, timeline  as in program

    Raises InputError.
    """
    require(
        micro_batches <= batch_size,
        "a sequence for each micro-batch at least",
        f"--batch {batch_size} --micro-batches {micro_batches}",
        f"give --micro-batches {batch_size}, or --batch {micro_batches}",
    )


main = demo_command(
    program,
    *training_options(),
    number("--micro-batches", click.IntRange(1, 1024), 4, "Into which the batch is cut."),
    click.option("--schedule", type=click.Choice([*NAMES, "all"]), default="all",
                 show_default=True, help="Order of the stages' work; all: one after the other."),
    check=check,
)  # fmt: skip

if __name__ == "__main__":
    main()
