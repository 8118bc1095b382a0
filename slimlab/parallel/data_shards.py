"""Shards of the data: which samples each rank sees in each step, and what to do when data ends.

Chapter 08 explains the words. An epoch is one walk through all samples, in an order drawn anew for
each epoch; a batch is what all ranks together see in one step; a shard is one rank's part of it.
A micro-batch is a piece of a shard that is in memory at a time.

All follows from the seed and the number of the step, so the place in the data is one whole number,
and a run may go on with another number of ranks: the batches stay the same, their parts change.

Production (DistributedSampler) deals samples out in turn, forgets to shuffle anew unless set_epoch
is called, pads each epoch so that all ranks have equally many samples, and keeps the place by
skipping what was seen.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import check_choice, check_number, check_size, require

LAST = ("drop", "pad", "short")


class Position(NamedTuple):
    """A place in the data.

    epoch  walks through all samples that are complete
    batch  batches of the present walk that are complete
    """

    epoch: int
    batch: int


class DataShards:
    """One rank's shards: a function from the number of a step to the samples of this rank.

    num_samples  of the whole data set
    batch_size   samples of a batch, all ranks together
    rank         this rank
    world_size   number of ranks
    seed         of the orders
    shuffle      False: every epoch in the order of the data
    last         what becomes of the samples that do not fill the last batch of an epoch. "drop":
                 left out, others in each epoch; "pad": filled up from the beginning of the epoch's
                 order, which then counts twice; "short": a smaller batch

    batches_per_epoch  steps of an epoch

    The shards of a batch are disjoint, their union is the batch. Where batch_size does not divide,
    shards differ by one sample; gradients are weighted by tokens, so that is no error.
    Raises InputError for numbers that do not fit together.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        last: str = "drop",
    ):
        for name, value in (
            ("num_samples", num_samples),
            ("batch_size", batch_size),
            ("world_size", world_size),
        ):
            check_size(name, value)
        check_number("rank", rank, int, 0, world_size - 1)
        check_number("seed", seed, int, 0, float("inf"))
        check_choice("last", last, LAST)
        require(
            batch_size >= world_size,
            "a batch with a sample for each rank at least",
            f"batch_size = {batch_size}, world_size = {world_size}",
            f"give batch_size={world_size}, or start {batch_size} ranks",
        )
        require(
            num_samples >= batch_size or last == "short",
            "as many samples as a batch has",
            f"num_samples = {num_samples}, batch_size = {batch_size}",
            f'give batch_size={num_samples} at most, or last="short"',
        )
        self.num_samples, self.batch_size = num_samples, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.last = seed, shuffle, last
        whole = num_samples // batch_size
        self.batches_per_epoch = whole if last == "drop" else -(-num_samples // batch_size)
        self._order: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> Tensor:
        """Return the samples of this rank in a step.

        step     updates made before, from 0: the place in the data, all that a checkpoint needs
        returns  (n,) int64 numbers of samples, n about batch_size / world_size; empty only in a
                 short batch of fewer samples than ranks

        Raises InputError for a step below 0.
        """
        whole = self.batch(step)
        parts = [len(whole) * rank // self.world_size for rank in (self.rank, self.rank + 1)]
        return whole[slice(*parts)]

    def batch(self, step: int) -> Tensor:
        """Return the samples of all ranks in a step, the same on every rank.

        step  as in the call

        Raises InputError for a step below 0.
        """
        epoch, number = self.position(step)
        order, start = self.order(epoch), number * self.batch_size
        found = order[start : start + self.batch_size]
        if self.last == "pad" and len(found) < self.batch_size:
            found = torch.cat((found, order[: self.batch_size - len(found)]))
        return found

    def position(self, step: int) -> Position:
        """Return the epoch and the batch of a step.

        step  as in the call

        Raises InputError for a step below 0.
        """
        check_number("step", step, int, 0, float("inf"))
        return Position(*divmod(step, self.batches_per_epoch))

    def order(self, epoch: int) -> Tensor:
        """Return all samples in the order of an epoch, the same on every rank.

        epoch    from 0
        returns  (num_samples,) int64
        """
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._draw(epoch)
        return self._order[1]

    def _draw(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.num_samples)
        # Hashed, since seed 0 in epoch 1 must not be seed 1 in epoch 0.
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        return torch.randperm(self.num_samples, generator=generator)


def until_all_end(comm: Communicator, batches: Iterable) -> Iterator[object | None]:
    """Walk through this rank's batches, and go on without any until no rank has one left.

    Without it a rank whose data ends leaves the loop, and the others wait for it in their next
    all_reduce. Pass what comes on to DataParallel.gradients: None takes part with zeros.

    comm     of the ranks that train together
    batches  this rank's; ranks may have different numbers of them
    returns  an iterator of batches, then of None; equally many on every rank

    Communicates: one all_reduce of 8 bytes per step, and one at the end.
    """
    rest, nothing = iter(batches), object()
    while True:
        batch = next(rest, nothing)
        left = torch.tensor([0 if batch is nothing else 1], device=comm.device)
        if not int(comm.all_reduce(left, op="max")):
            return
        yield None if batch is nothing else batch
