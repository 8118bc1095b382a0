"""What compressed gradients send: calls and payload of a step, exactly, and what arrives.

Chapter 08 predicts with it, and compares with what the ledgers counted. It reads numbers only: the
shapes of the parameters, the size of a bucket, the settings of the compressor.

The payload is what a rank hands to a call. Of an all_reduce that is all that matters; of an
all_gather each rank receives the payload of all others too, so its price grows with their number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimlab.config import check_choice, check_number, check_size, require
from slimlab.plan.data_parallel import REPORT_BYTES

COMPRESSORS = ("none", "float16", "bfloat16", "sign", "top-k", "powersgd")
SCALE_BYTES = 8  # the largest gradient, in float64
PLACE_BYTES = 4  # of an element's number in its bucket; 8 from 2^31 elements on


@dataclass(frozen=True)
class CompressedStep:
    """The calls of each rank in one step, the same on every rank.

    calls  (name of the call, payload in bytes), in order; the last one is the report of
           slimlab.plan.data_parallel
    """

    calls: tuple[tuple[str, int], ...]

    @property
    def num_calls(self) -> int:
        """Every call of the step."""
        return len(self.calls)

    @property
    def payload_bytes(self) -> int:
        """The payload of all of them."""
        return sum(n_bytes for _, n_bytes in self.calls)


def predict_compressed_step(
    compressor: str,
    parameter_shapes: Sequence[Sequence[int]],
    item_bytes: int,
    world_size: int,
    bucket_bytes: int | None,
    *,
    density: float = 0.01,
    rank: int = 2,
    min_compression_rate: float = 1.0,
) -> CompressedStep:
    """Predict the calls of one step of data parallelism with a compressor.

    compressor            one of COMPRESSORS
    parameter_shapes      of each parameter that is trained, in the order of the model; tied ones
                          once
    item_bytes            bytes per element of a gradient
    world_size            number of ranks
    bucket_bytes          a bucket is full when the next gradient, not compressed, would make it
                          larger than this; None: all gradients in one
    density               of top-k: elements sent, as a part of a bucket's
    rank                  of PowerSGD: columns of a factor
    min_compression_rate  of PowerSGD: a matrix is compressed if it has more than this many times
                          the numbers of its factors

    Raises InputError for an unknown compressor, or numbers that are out of range.
    """
    check_choice("compressor", compressor, COMPRESSORS)
    require(
        len(parameter_shapes) > 0,
        "parameter_shapes: at least one",
        "none",
        "give the shapes of the parameters that are trained",
    )
    check_size("item_bytes", item_bytes)
    check_size("world_size", world_size)
    check_size("rank", rank)
    check_number("density", density, float, 0, 1, above=True)
    check_number("min_compression_rate", min_compression_rate, float, 0, math.inf)
    settings = (density, rank, min_compression_rate)
    calls = []
    for shapes in _buckets(parameter_shapes, item_bytes, bucket_bytes):
        calls += _calls_of_bucket(compressor, shapes, item_bytes, *settings)
    report = 2 + len(parameter_shapes) + world_size
    calls.append(("all_reduce", report * REPORT_BYTES))
    return CompressedStep(tuple(calls))


def ring_bytes(calls: Sequence[tuple[str, int]], world_size: int) -> float:
    """Predict what each rank sends, and receives, if every call runs on a ring.

    calls       (name, payload in bytes) of each call, as in CompressedStep
    world_size  w, number of ranks
    returns     bytes: of an all_reduce 2 (w - 1) / w of its payload, of an all_gather w - 1 times

    Raises InputError for a call that is neither.
    """
    check_size("world_size", world_size)
    total = 0.0
    for name, n_bytes in calls:
        check_choice("call", name, ("all_reduce", "all_gather"))
        share = 2 / world_size if name == "all_reduce" else 1
        total += (world_size - 1) * share * n_bytes
    return total


def _buckets(shapes, item_bytes, limit) -> list[list[tuple[int, ...]]]:
    # The last parameters of a model have their gradients first.
    backward = [tuple(shape) for shape in reversed(shapes)]
    if limit is None:
        return [backward]
    check_size("bucket_bytes", limit)
    buckets, held = [[]], 0
    for shape in backward:
        n_bytes = math.prod(shape) * item_bytes
        if held and held + n_bytes > limit:
            buckets.append([])
            held = 0
        buckets[-1].append(shape)
        held += n_bytes
    return buckets


def _calls_of_bucket(
    compressor: str, shapes, item_bytes: int, density: float, rank: int, min_rate: float
) -> list[tuple[str, int]]:
    num_elements = sum(map(math.prod, shapes))
    if compressor == "none":
        return [("all_reduce", num_elements * item_bytes)]
    if compressor == "float16":
        return [("all_reduce", SCALE_BYTES), ("all_reduce", 2 * num_elements)]
    if compressor == "bfloat16":
        return [("all_reduce", 2 * num_elements)]
    if compressor == "sign":
        packed = -(-num_elements // 8)
        return [("all_gather", packed + len(shapes) * item_bytes)]
    if compressor == "top-k":
        num_sent = max(1, round(density * num_elements))
        place_bytes = PLACE_BYTES if num_elements < 2**31 else 2 * PLACE_BYTES
        return [("all_gather", num_sent * (item_bytes + place_bytes))]
    counts = _powersgd_numbers(shapes, rank, min_rate)
    # Factors are never narrower than float32; without a matrix there is no second call.
    return [("all_reduce", count * max(item_bytes, 4)) for count in counts if count]


def _powersgd_numbers(shapes, rank: int, min_compression_rate: float) -> tuple[int, int]:
    """Count the numbers of the first call, with what stays whole, and of the second."""
    first = second = 0
    for shape in shapes:
        size = math.prod(shape)
        if len(shape) < 2:
            first += size
            continue
        short, long = sorted((shape[0], size // shape[0]))
        columns = min(rank, short)
        if columns * (short + long) * min_compression_rate < size:
            first += short * columns
            second += long * columns
        else:
            first += size
    return first, second
