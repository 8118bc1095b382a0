"""What ZeRO keeps on each rank and what it sends: the paper's formulas, and the bytes to the last.

Chapter 08 predicts with it, and compares with what the ranks hold and what their ledgers counted.
The formulas of the paper divide by the number of ranks; the rows that are really cut have a length
that the ranks divide, so each is longer by a few zeros, and an optimizer keeps a count per tensor.
GB is 1e9 bytes.

Rajbhandari et al. 2020 (arXiv:1910.02054), sections 3.1 and 5, table 1.

Not counted: activations (slimlab.plan.activations), gradients between autograd and their row, what
the runtime copies on the way, and what an allocator rounds up. Production adds these up too, to say
beforehand whether a job fits.
"""

from collections.abc import Collection, Iterator

from slimlab.config import check_choice, check_size, require
from slimlab.plan.data_parallel import REPORT_BYTES
from slimlab.plan.zero_units import ZeroUnit, shard_size

STAGES = (0, 1, 2, 3)
# Tensors of the shard's size that an optimizer keeps, and bytes of its count of steps per tensor.
OPTIMIZERS = {"adamw": (2, 4), "adamw_own": (2, 4), "sgd": (1, 0)}
NUMBER_BYTES = 8  # of a number of micro-batches, and of a squared length


def zero_bytes_per_rank(
    num_params: float,
    world_size: int,
    stage: int,
    *,
    weight_bytes: int = 2,
    gradient_bytes: int = 2,
    optimizer_bytes: int = 12,
) -> float:
    """Compute the bytes of model states on one rank by the formulas of the paper.

    num_params       of the model
    world_size       number of ranks that share it
    stage            0: data parallelism, all whole; 1: the optimizer's state is cut; 2: gradients
                     too; 3: weights too
    weight_bytes     per parameter
    gradient_bytes   per parameter
    optimizer_bytes  per parameter; 12 in mixed precision with Adam: a master and two averages
    returns          bytes, not rounded

    Raises InputError for a stage that there is not, and sizes below 1.
    """
    check_stage(stage, STAGES)
    check_size("world_size", world_size)
    require(num_params > 0, "num_params above 0", f"{num_params!r}", "count the parameters")
    # In the order in which the stages cut them.
    states = (optimizer_bytes, gradient_bytes, weight_bytes)
    cut, whole = sum(states[:stage]), sum(states[stage:])
    return num_params * (whole + cut / world_size)


def zero_held_bytes(
    units: Collection[ZeroUnit],
    world_size: int,
    rank: int,
    stage: int,
    *,
    item_bytes: int = 4,
    optimizer: str = "adamw",
    prefetch: bool = True,
) -> dict[str, int]:
    """Predict the bytes that a rank holds after a step.

    units       of zero_units
    world_size  number of ranks
    rank        this one; the last ones' shards end in zeros, for which no optimizer state is kept
    stage       1, 2 or 3
    item_bytes  per element of weights, gradients and the optimizer's averages
    optimizer   "adamw", "adamw_own" or "sgd" with momentum
    prefetch    in stage 3, ask for the next unit's weights before a unit computes
    returns     as slimlab.parallel.zero.Zero.held_bytes

    Raises InputError for a stage, rank or optimizer that there is not, and sizes below 1.
    """
    check_stage(stage)
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    for name, size in (("world_size", world_size), ("item_bytes", item_bytes)):
        check_size(name, size)
    require(0 <= rank < world_size, f"rank: 0 to {world_size - 1}", f"{rank!r}", "choose one")
    shards = [shard_size(unit.trained, world_size) for unit in units]
    frozen = [shard_size(unit.frozen, world_size) for unit in units]
    pieces = [piece for unit in units for piece in _pieces(unit, world_size, rank) if piece]
    averages, count_bytes = OPTIMIZERS[optimizer]
    whole = sum(shards) * world_size
    weights = sum(shards) + sum(frozen) if stage == 3 else whole + sum(u.frozen for u in units)
    peak = _gathered_peak(tuple(units), world_size, prefetch) if stage == 3 else 0
    return {
        "weights": weights * item_bytes,
        "gradients": (whole if stage == 1 else sum(shards)) * item_bytes,
        "optimizer": averages * sum(pieces) * item_bytes,
        "optimizer_steps": len(pieces) * count_bytes,
        "gathered": 0,
        "gathered_peak": peak * item_bytes,
        "unreduced": 0,
        "unreduced_peak": max(shards) * world_size * item_bytes if stage > 1 else 0,
    }


def _pieces(unit: ZeroUnit, world_size: int, rank: int) -> list[int]:
    size = shard_size(unit.trained, world_size)
    ends = (0, unit.decaying, unit.trained)
    inside = [min(max(end - rank * size, 0), size) for end in ends]
    return [end - start for start, end in zip(inside, inside[1:])]


def zero_step_calls(
    units: Collection[ZeroUnit],
    world_size: int,
    stage: int,
    *,
    item_bytes: int = 4,
    num_pieces: int | None = None,
    clip: bool = False,
    prefetch: bool = True,
) -> tuple[tuple[str, int], ...]:
    """Predict the calls of each rank in one step, the same on every rank.

    units       of zero_units
    world_size  number of ranks
    stage       1, 2 or 3
    item_bytes  per element
    num_pieces  micro-batches of the rank that has most; None: no micro_batch_size was given
    clip        gradients are clipped
    prefetch    as in zero_held_bytes
    returns     (name of the call, payload in bytes), in order

    Raises InputError as zero_held_bytes does.
    """
    check_stage(stage)
    check_size("world_size", world_size)
    units = tuple(units)
    shards = {n: shard_size(u.trained, world_size) for n, u in enumerate(units) if u.trained}
    reduces = [("reduce_scatter", shards[n] * world_size) for n in sorted(shards, reverse=True)]
    one_pass = _pass_calls(units, world_size, prefetch) if stage == 3 else reduces
    num_passes = 1 if stage == 1 or num_pieces is None else num_pieces
    calls = [(name, size * item_bytes) for name, size in one_pass] * num_passes
    if stage > 1 and num_pieces is not None:
        calls.insert(0, ("all_reduce", NUMBER_BYTES))
    report = 2 + sum(unit.num_trained for unit in units) + world_size
    calls.append(("all_reduce", report * REPORT_BYTES))
    if clip:
        calls.append(("all_reduce", NUMBER_BYTES))
    if stage < 3:
        calls += [("all_gather", size * item_bytes) for size in shards.values()]
    return tuple(calls)


def _pass_calls(
    units: tuple[ZeroUnit, ...], world_size: int, prefetch: bool
) -> list[tuple[str, int]]:
    calls = []
    for name, number in _pass_events(units, prefetch):
        if name == "gather":
            rows = units[number].rows
            calls += [("all_gather", shard_size(size, world_size)) for size in rows]
        elif name == "reduce" and units[number].trained:
            row = shard_size(units[number].trained, world_size) * world_size
            calls.append(("reduce_scatter", row))
    return calls


def _gathered_peak(units: tuple[ZeroUnit, ...], world_size: int, prefetch: bool) -> int:
    now = peak = 0
    for name, number in _pass_events(units, prefetch):
        rows = units[number].rows
        size = sum(shard_size(row, world_size) * world_size for row in rows)
        now += {"gather": size, "free": -size}.get(name, 0)
        peak = max(peak, now)
    return peak


def _pass_events(units: tuple[ZeroUnit, ...], prefetch: bool) -> Iterator[tuple[str, int]]:
    """Walk through a forward and a backward pass of stage 3: what is gathered, freed and sent."""
    trained = [any(units[n].trained for n in unit.needs) for unit in units]
    forward = [set(unit.needs) for unit in units]
    # Backwards, from the last unit to the first that is trained.
    places = range(len(units) - 1, trained.index(True) - 1, -1)
    backward = [forward[n] - {n} if units[n].lookup_only else forward[n] for n in places]
    uses, there = forward + backward, set()
    for step in range(len(uses)):
        later = uses[step : len(units)] if step < len(units) else uses[step:]
        if step > len(units):
            yield "reduce", places[step - len(units)] + 1  # what stands behind is complete
        yield from (("free", n) for n in there - set().union(*later))
        there &= set().union(*later)
        for wanted in later[: 2 if prefetch else 1]:
            yield from (("gather", n) for n in sorted(wanted - there))
            there |= wanted
    yield from (("reduce", n) for n in range(places[-1], -1, -1))


def check_stage(stage: int, stages: tuple[int, ...] = STAGES[1:]) -> None:
    """Refuse a stage that there is not.

    stage   of ZeRO
    stages  that there are

    Raises InputError.
    """
    require(
        stage in stages and not isinstance(stage, bool),
        f"stage: {', '.join(map(str, stages))}",
        f"stage = {stage!r}",
        "1 cuts the optimizer's state, 2 gradients too, 3 weights too; for none of them take "
        "slimlab.parallel.data.DataParallel",
    )
