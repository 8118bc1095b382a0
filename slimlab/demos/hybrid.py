"""Hybrid parallelism: replicas, stages and shared layers at once, in every layout.

    slimlab demo hybrid --ranks 4 --backend threads
    python -m slimlab.demos.hybrid --ranks 2 --backend gloo --layers 4 --json
    mpirun -n 4 python -m slimlab.demos.hybrid
    torchrun --nproc-per-node 4 -m slimlab.demos.hybrid --layout 2x1x2 --timeline steps.json

Three steps of AdamW in float64, in every mesh data x pipeline x tensor that has as many ranks, or
in one of them; replicas share the optimizer's state (ZeRO of stage 1). Losses, gradients and
weights, put together from all ranks, are compared with those of one process; what each rank holds,
and the payload that it brings to each axis, with slimlab.plan.hybrid_step. Each layout comes to the
same weights with other bytes.

Production (Megatron-LM, DeepSpeed, torchtitan) takes the layout from a planner or from experience.
"""

import click

from slimlab.comm.base import Communicator
from slimlab.comm.ledger import LedgerEntry
from slimlab.config import InputError, ModelConfig, require
from slimlab.demos.common import demo_command, number
from slimlab.demos.measure import from_all_ranks
from slimlab.demos.report import Report, report_of, size_text
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
from slimlab.demos.training_checks import check_run
from slimlab.parallel.hybrid import Hybrid
from slimlab.parallel.hybrid_stages import schedule_for
from slimlab.parallel.mesh import AXES, Mesh
from slimlab.parallel.stages import even_layers
from slimlab.plan.hybrid_step import hybrid_held_bytes, hybrid_step_bytes, stage_shapes
from slimlab.plan.parallel_config import ParallelConfig, check_parallel, num_micro_batches

HELD = ("weights", "gradients", "optimizer")


def program(
    comm: Communicator,
    size: str,
    layers: int,
    batch_size: int,
    layout: str,
    zero_stage: int,
    seed: int,
    timeline: str | None,
) -> Report:
    """Train on all ranks in each layout, and compare with one process and with the plan.

    comm        the communicator of all ranks
    size        of the model, a name in slimlab.demos.training.SIZES
    layers      of the model
    batch_size  sequences of all replicas together
    layout      "DATAxPIPELINExTENSOR", such as "2x1x2", or "all"
    zero_stage  0 or 1
    seed        of weights and data
    timeline    where to write when each rank was in which call; None: nowhere
    returns     the report, the same on every rank

    Communicates: what Hybrid does in three steps of each layout, and what ranks tell each other.
    """
    config = ModelConfig(**SIZES[size] | {"num_layers": layers})
    report, traced = report_of("hybrid", comm), traced_if(comm, timeline)
    batches = make_batches(config, batch_size, seed, comm.device)
    true = train_alone(make_model(config, seed, comm.device), batches)
    chosen = layouts(config, comm.world_size, batch_size, layout, zero_stage)
    rows, runs = [], []
    for parallel in chosen:
        model = make_model(config, seed + comm.rank, comm.device)
        runs.append((parallel, *train(traced, model, parallel, batches)))
    write_timeline(report, traced, timeline)
    for parallel, found, payload, held, hybrid in runs:
        what = f"{mesh_text(parallel)}: "
        errors = check_run(report, comm, what, found, true)
        check_bytes(report, comm, what, predicted(hybrid, config, batch_size), payload | held)
        payload_text = (size_text(payload[axis] // NUM_STEPS) for axis in AXES)
        rows.append((what[:-2], f"{max(errors):.1e}", size_text(sum(held.values())), *payload_text))
    headers = ("mesh", "largest error", "rank 0 holds", *(f"a step along {one}" for one in AXES))
    report.table(f"data x pipeline x tensor; errors are to be below {BOUND:g}", headers, rows)
    report.numbers |= {"size": size, "batch_size": batch_size, "losses": true.losses}
    return report


def train(
    comm: Communicator, model: object, parallel: ParallelConfig, batches: list[Batch]
) -> tuple[Run, dict[str, int], dict[str, int], Hybrid]:
    """Train in one layout.

    comm      the communicator of all ranks
    model     of this rank, changed in place
    parallel  the layout
    batches   whole, one per step
    returns   what came of it, the payload of this rank's calls in all steps by axis, the bytes that
              it holds at the end, and what trained

    Communicates: what Hybrid does, and what puts gradients and weights together.
    """
    found, entries = Run([], [], {}), []
    hybrid = Hybrid(model, comm, parallel, lr=LR, eps=EPS)
    for batch in batches:
        with counting(comm.ledger, entries):
            loss, _ = hybrid.gradients(hybrid.share_of(batch))
        found.losses.append(float(loss))
        found.gradients.append(hybrid.full_gradients())
        with counting(comm.ledger, entries):
            hybrid.step()
    found.weights.update(hybrid.full_weights())
    held = hybrid.held_bytes()
    return found, payload_by_axis(hybrid.mesh, entries), {one: held[one] for one in HELD}, hybrid


def payload_by_axis(mesh: Mesh, entries: list[LedgerEntry]) -> dict[str, int]:
    """Add up the payload of calls along each axis, and among all ranks.

    mesh     of all ranks
    entries  of this rank
    """
    payload = dict.fromkeys((*AXES, "all"), 0)
    for entry in entries:
        axis = "all" if entry.group is None else axis_of(mesh, entry.group)
        if axis is not None:
            payload[axis] += entry.n_bytes
    return payload


def axis_of(mesh: Mesh, group: tuple[int, ...]) -> str | None:
    """Return the axis along which some ranks differ; None for one rank alone.

    mesh   of all ranks
    group  the ranks
    """
    places = [set(some) for some in zip(*map(mesh.coordinates_of, group))]
    return next((axis for axis, some in zip(AXES, places) if len(some) > 1), None)


def predicted(hybrid: Hybrid, config: ModelConfig, batch_size: int) -> list[dict[str, int]]:
    """Predict what every rank brings to each axis in all steps, and holds in the end.

    hybrid      of this rank; the layout and the places of the others are read
    config      of the model
    batch_size  sequences of all replicas together
    """
    parallel, found = hybrid.parallel, []
    schedule = schedule_for(parallel, num_micro_batches(parallel, batch_size))
    layers = even_layers(config.num_layers, schedule.num_virtual_stages)
    for rank in range(parallel.world_size):
        replica, stage, _ = hybrid.mesh.coordinates_of(rank)
        step = hybrid_step_bytes(config, parallel, schedule, layers, stage, ITEM_BYTES)
        shapes = stage_shapes(config, parallel.tensor, schedule, layers, stage)
        held = hybrid_held_bytes(shapes, parallel, replica, ITEM_BYTES)
        found.append({key: one * NUM_STEPS for key, one in step.items()} | held)
    return found


def check_bytes(
    report: Report,
    comm: Communicator,
    what: str,
    expected: list[dict[str, int]],
    counted: dict[str, int],
) -> None:
    """Compare bytes of every rank with the prediction.

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
        report.check(f"{what}bytes, {name}", [one[name] for one in expected], list(column))


def layouts(
    config: ModelConfig, world_size: int, batch_size: int, layout: str, zero_stage: int
) -> list[ParallelConfig]:
    """List the layouts that are to be trained in.

    config      of the model
    world_size  number of ranks
    batch_size  sequences of all replicas together
    layout      as in program
    zero_stage  0 or 1; where there are no replicas nothing is shared

    Raises InputError for one that does not fit, or if none does.
    """
    if layout != "all":
        parts = layout.split("x")
        require(
            len(parts) == 3 and all(part.isdigit() and int(part) for part in parts),
            "--layout DATAxPIPELINExTENSOR, or all",
            f"--layout {layout}",
            "give --layout 2x1x2, for instance",
        )
        one = parallel_of(*map(int, parts), batch_size, zero_stage)
        check_parallel(config, one, batch_size, world_size)
        return [one]
    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found = []
    for tensor in sizes:
        for pipeline in (n for n in sizes if world_size % (n * tensor) == 0):
            data = world_size // (tensor * pipeline)
            one = parallel_of(data, pipeline, tensor, batch_size, zero_stage)
            try:
                check_parallel(config, one, batch_size, world_size)
            except InputError as error:
                refused = error
            else:
                found.append(one)
    if not found:
        raise refused
    return found


def parallel_of(
    data: int, pipeline: int, tensor: int, batch_size: int, zero_stage: int
) -> ParallelConfig:
    """Make a layout: two micro-batches, or as many as there are sequences, if stages wait for them.

    data, pipeline, tensor  ranks along the axes
    batch_size              sequences of all replicas together
    zero_stage              0 or 1
    """
    share = max(1, batch_size // data)
    size = share // 2 if pipeline > 1 and share % 2 == 0 else share
    zero = zero_stage if data > 1 else 0
    return ParallelConfig(data, pipeline, tensor, micro_batch_size=size, zero_stage=zero)


def mesh_text(parallel: ParallelConfig) -> str:
    """Write a mesh as it is typed.

    parallel  the layout
    """
    return f"{parallel.data}x{parallel.pipeline}x{parallel.tensor}"


def check(
    world_size: int,
    size: str,
    layers: int,
    batch_size: int,
    layout: str,
    zero_stage: int,
    seed: int,
    timeline: str | None,
) -> None:
    """Refuse what does not fit the number of ranks.

    world_size  number of ranks
    size, layers, batch_size, layout, zero_stage, seed, timeline  as in program

    Raises InputError that names the numbers that do.
    """
    config = ModelConfig(**SIZES[size] | {"num_layers": layers})
    layouts(config, world_size, batch_size, layout, zero_stage)


main = demo_command(
    program,
    *training_options(),
    number("--layers", click.IntRange(1, 64), 2, "Of the model."),
    click.option("--layout", default="all", show_default=True, metavar="DxPxT",
                 help="Replicas x stages x ranks that share a layer, or all that fit."),
    click.option("--zero", "zero_stage", type=click.IntRange(0, 1), default=1, show_default=True,
                 help="1: replicas share the optimizer's state."),
    check=check,
)  # fmt: skip

if __name__ == "__main__":
    main()
