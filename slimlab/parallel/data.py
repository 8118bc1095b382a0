"""Data parallelism: every rank has the whole model and its own part of each batch.

Chapter 08 explains it. All ranks begin with the weights of one; in each step gradients are summed
over the ranks and divided by the number of target tokens of all of them, so every rank makes the
same update, and the weights stay equal without being sent again. The model knows nothing of it: the
replica watches the gradients of its parameters.

A rank's share may be larger or smaller than the others', or empty: sums are added and divided once
by the sum of the counts (slimlab.train.objectives), so no mean of means is ever made.

Production (DistributedDataParallel) wraps the model's forward pass and averages gradients over the
ranks as if all had equally many tokens; weights for unequal shares are left to the caller. It
compresses (slimlab.parallel.compression), and finds unused parameters only on request.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError, check_number, require
from slimlab.parallel.compression import Compressor
from slimlab.parallel.data_buckets import GradientBuckets
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.train.accumulate import Objective, map_tensors, split_batch

BUCKET_BYTES = 4 * 2**20
# Sums over thousands of tokens would overflow 16 bits on their way back. Any number does that is
# the same on all ranks in all steps; a power of two costs no rounding.
LOSS_DIVISOR = 1024.0


class NotFiniteGradientsError(InputError):
    """Say on which ranks, and first in which parameters, gradients ceased to be finite."""


class DataParallel:
    """One rank's replica of a model, whose gradients are those of all ranks' data together.

    model         changed in place: it gets the weights and buffers of rank 0. Its parameters'
                  gradients are views of the buckets after each step
    comm          of the ranks that hold replicas: all, or the group of a mesh's axis data
    bucket_bytes  gradients that travel together, at most, unless one parameter has more; None: all
                  gradients in one flat buffer
    overlap       send a bucket while the backward pass goes on; False: all after it
    check_finite  name the rank and the parameter if a gradient is not finite; on a GPU the look
                  costs a wait per bucket. Leave it out where a loss scaler skips such steps
    broadcast     False: the ranks' models are known to be equal already
    compressor    what makes gradients short before they travel (slimlab.parallel.compression); a
                  copy is used, whose residuals are this replica's; None: nothing

    Communicates: what broadcast_model does.
    Raises InputError if the ranks' models differ in names, shapes or dtypes, nothing is to be
    trained, or nothing that the compressor could make shorter.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        bucket_bytes: int | None = BUCKET_BYTES,
        overlap: bool = True,
        check_finite: bool = True,
        broadcast: bool = True,
        compressor: Compressor | None = None,
    ):
        self.compressor = copy.deepcopy(compressor)
        if broadcast:
            broadcast_model(model, comm, bucket_bytes=bucket_bytes)
        buckets = GradientBuckets(
            model,
            comm,
            bucket_bytes=bucket_bytes,
            overlap=overlap,
            check_finite=check_finite,
            compressor=self.compressor,
        )
        self._connect(model, comm, buckets)

    def _connect(self, model: nn.Module, comm: Communicator, buckets: GradientBuckets) -> None:
        # slimlab.parallel.zero brings buckets of its own, with the same methods.
        self.model, self.comm, self.buckets = model, comm, buckets
        self._sync, self._new_step, self._is_closed = True, True, False
        self._loss_sum, self._num_tokens = 0.0, 0

    def close(self) -> None:
        """Leave the model alone from now on; its weights and gradients stay as they are."""
        if not self._is_closed:
            self.buckets.close()
        self._is_closed = True

    def backward(
        self,
        loss_sum: Tensor | None,
        num_tokens: int | Tensor,
        *,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> tuple[Tensor, int] | None:
        """Back-propagate, and make each gradient that of the mean loss over all ranks' tokens.

        The first call after a step replaces the gradients, so nobody needs to set them to zero.

        loss_sum    () the sum of this rank's losses, not their mean; None: this rank has no data
        num_tokens  of this rank's targets; 0 without data
        scale       what is applied to the loss before back-propagation, such as LossScaler.scale
        returns     () the mean loss per token over all ranks, in float64, and the tokens of all
                    ranks, both the same on every rank, of all calls since the last step; None
                    inside no_sync

        Communicates: one all_reduce per bucket, or the calls of the compressor, and one of a few
        numbers; nothing inside no_sync.
        Raises InputError, on every rank, if no rank has a token, or a gradient is not finite; and
        after close().
        """
        self._check_open("backward")
        check_number("num_tokens", int(num_tokens), int, 0, float("inf"))
        if self._new_step:
            self.begin_passes()
        self.buckets.begin_pass(send=self._sync)
        if loss_sum is not None:
            self._num_tokens += int(num_tokens)
            self._loss_sum = self._loss_sum + loss_sum.detach().double()
            scale(loss_sum / LOSS_DIVISOR).backward()
        return self._finish_step() if self._sync else None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let backward add to this rank's gradients and send nothing, for all but the last piece.

        Communicates: nothing.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def begin_passes(self) -> None:
        """Begin a step whose passes somebody else makes, such as a pipeline: forget all gradients.

        Communicates: nothing.
        """
        self._check_open("begin_passes")
        self.buckets.begin_step()
        self._loss_sum, self._num_tokens, self._new_step = 0.0, 0, False

    def add_pass(self, back_propagate: Callable[[], object]) -> None:
        """Let somebody else back-propagate a part of a step; what it adds is kept, nothing is sent.

        back_propagate  adds to the gradients of parameters, to each once at most; of the sum of
                        losses divided by LOSS_DIVISOR

        Communicates: nothing.
        """
        self.buckets.begin_pass(send=False)
        back_propagate()

    def finish_passes(self, loss_sum: Tensor, num_tokens: int) -> tuple[Tensor, int]:
        """End such a step: make each gradient that of the mean loss over all ranks' tokens.

        loss_sum    () of all passes of this rank, or of its pipeline
        num_tokens  likewise
        returns     as backward

        Communicates: what backward does.
        Raises InputError as backward does.
        """
        self._loss_sum, self._num_tokens = loss_sum.double(), num_tokens
        return self.backward(None, 0)

    def gradients(
        self,
        batch: object | None,
        objective: Objective,
        micro_batch_size: int | None = None,
        *,
        context: Callable = nullcontext,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> tuple[Tensor, int]:
        """Set every gradient to that of the mean loss over all target tokens of all ranks.

        batch             this rank's part, as in slimlab.train.accumulate; None, or one of no
                          sequences: it has no data
        objective         as in slimlab.train.objectives
        micro_batch_size  sequences in memory at a time; None: all of this rank's. Ranks may need
                          different numbers of pieces
        context           makes the context of each forward pass, such as autocast
        scale             as in backward
        returns           as backward

        Communicates: what backward does, once.
        Raises InputError as backward does.
        """
        self._check_open("gradients")
        pieces = [] if is_empty(batch) else split_batch(batch, micro_batch_size)
        try:
            for number, piece in enumerate(pieces, start=1):
                with context():
                    loss_sum, num_tokens = objective(self.model, piece)
                with nullcontext() if number == len(pieces) else self.no_sync():
                    result = self.backward(loss_sum, num_tokens, scale=scale)
        except BaseException:
            self._new_step = True  # what was added up belongs to no step
            raise
        return result if pieces else self.backward(None, 0)

    def _check_open(self, what: str) -> None:
        require(
            not self._is_closed,
            f"a {type(self).__name__} for {what}() that is not closed",
            "one after close(), which leaves the model alone",
            "make another of the model",
        )

    def _finish_step(self) -> tuple[Tensor, int]:
        self.buckets.send_rest()
        names, world_size = self.buckets.names, self.comm.world_size
        report = torch.zeros(2 + len(names) + world_size, dtype=torch.float64)
        report[0], report[1] = self._loss_sum, self._num_tokens
        report[2 : 2 + len(names)] = torch.tensor(self.buckets.filled())
        if self.buckets.bad_name is not None:
            report[2 + len(names) + self.comm.rank] = 1 + names.index(self.buckets.bad_name)
        report = self.comm.all_reduce(report.to(self.comm.device)).cpu()
        total, used, bad = int(report[1]), report[2:-world_size] > 0, report[-world_size:]
        accepted = total > 0 and not bool(bad.any())
        self.buckets.finish(LOSS_DIVISOR / max(total, 1), used.tolist(), accepted)
        self._new_step = True
        _check_finite(bad.int().tolist(), names)
        require(
            total > 0,
            "a batch with at least one target token on some rank",
            f"none on any of {world_size} ranks",
            "check what marks the positions that do not count; end with "
            "slimlab.parallel.data_shards.until_all_end where ranks run out of data",
        )
        return report[0] / total, total


def is_empty(batch: object | None) -> bool:
    """Tell whether a rank has no data.

    batch  as in DataParallel.gradients
    """
    rows = []
    map_tensors(lambda tensor: rows.append(len(tensor) if tensor.dim() else 1), batch)
    return batch is None or (bool(rows) and not any(rows))


def _check_finite(bad: list[int], names: list[str]) -> None:
    found = [f"rank {rank}: {names[one - 1]}" for rank, one in enumerate(bad) if one]
    if not found:
        return
    more = f" and {len(found) - 8} more ranks" if len(found) > 8 else ""
    raise NotFiniteGradientsError(
        "gradients that are finite numbers on every rank",
        f"infinite or NaN first in {'; '.join(found[:8])}{more}",
        "look at the batch of that rank: a division by 0 or the logarithm of 0, or ids outside "
        "the vocabulary; if all ranks have it, lower the learning rate. No weight was changed",
    )
