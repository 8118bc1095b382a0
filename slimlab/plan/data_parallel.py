"""What data parallelism sends: the calls of a step and their payload, exactly; the shards of data.

Chapter 08 predicts with it, and compares with what the ledgers counted. It reads numbers only: how
many elements each parameter has, the size of a bucket, the number of ranks. The payload is what a
rank hands to the calls; what a ring moves of it is in slimlab.plan.messages.

Production predicts the overlap too: which bucket is on its way while the backward pass goes on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slimlab.config import check_size, require

REPORT_BYTES = 8  # of each number in the report that ends a step
DIGEST_BYTES = 8  # of the number that stands for a tensor or a model in comparisons


@dataclass(frozen=True)
class DataParallelStep:
    """The calls of each rank in one step, the same on every rank.

    bucket_bytes  payload of each all_reduce of gradients, in the order of sending
    report_bytes  payload of the last all_reduce: loss, tokens, which parameters have a gradient,
                  which ranks have one that is not finite
    """

    bucket_bytes: tuple[int, ...]
    report_bytes: int

    @property
    def num_calls(self) -> int:
        """Every all_reduce of the step."""
        return len(self.bucket_bytes) + 1

    @property
    def payload_bytes(self) -> int:
        """The payload of all of them."""
        return sum(self.bucket_bytes) + self.report_bytes


def predict_step(
    parameter_sizes: Sequence[int],
    item_bytes: int,
    world_size: int,
    bucket_bytes: int | None,
) -> DataParallelStep:
    """Predict the calls of one step of data parallelism.

    parameter_sizes  elements of each parameter that is trained, in the order of the model; tied
                     ones once
    item_bytes       bytes per element of a gradient
    world_size       number of ranks
    bucket_bytes     a bucket is full when the next parameter would make it larger than this; None:
                     all gradients in one

    Raises InputError for sizes that are not whole numbers of at least 1.
    """
    _check_sizes("parameter_sizes", parameter_sizes)
    check_size("item_bytes", item_bytes)
    check_size("world_size", world_size)
    # The last parameters of a model have their gradients first.
    backward = [size * item_bytes for size in reversed(parameter_sizes)]
    report = 2 + len(parameter_sizes) + world_size
    return DataParallelStep(tuple(_filled(backward, bucket_bytes)), report * REPORT_BYTES)


def predict_broadcast(
    tensor_bytes: Sequence[int], world_size: int, bucket_bytes: int | None
) -> tuple[tuple[str, int], ...]:
    """Predict the calls that give every rank the model of one.

    tensor_bytes  bytes of each parameter and buffer, all of one dtype, in the order of the model
    world_size    number of ranks
    bucket_bytes  as in predict_step
    returns       (name of the call, payload in bytes) of each rank's calls, in order

    Raises InputError for sizes that are not whole numbers of at least 1.
    """
    _check_sizes("tensor_bytes", tensor_bytes)
    check_size("world_size", world_size)
    buckets = _filled(list(tensor_bytes), bucket_bytes)
    return (("all_gather", DIGEST_BYTES), *(("broadcast", size) for size in buckets))


def shard_sizes(num_samples: int, world_size: int) -> tuple[int, ...]:
    """Divide the samples of a batch among ranks so that two shards differ by one at most.

    num_samples  of the whole batch, at least 0
    world_size   number of ranks
    returns      samples of each rank: rank r gets those from num_samples r // w on

    Raises InputError for numbers that do not fit.
    """
    check_size("world_size", world_size)
    whole = isinstance(num_samples, int) and not isinstance(num_samples, bool)
    require(
        whole and num_samples >= 0,
        "num_samples, a whole number of at least 0",
        f"num_samples = {num_samples!r}",
        "give the number of sequences in the batch",
    )
    starts = [num_samples * rank // world_size for rank in range(world_size + 1)]
    return tuple(end - start for start, end in zip(starts, starts[1:]))


def _filled(sizes: list[int], limit: int | None) -> list[int]:
    if limit is None:
        return [sum(sizes)]
    check_size("bucket_bytes", limit)
    buckets = [0]
    for size in sizes:
        if buckets[-1] and buckets[-1] + size > limit:
            buckets.append(0)
        buckets[-1] += size
    return buckets


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    require(
        len(sizes) > 0,
        f"{name}: at least one",
        "none",
        "give the sizes of the parameters that are trained",
    )
    for size in sizes:
        check_size(f"each of {name}", size)
