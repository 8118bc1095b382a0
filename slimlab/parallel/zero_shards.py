"""Flat shards: the parameters of a unit in one row, cut into one equal part for each rank.

Chapter 08 uses them for ZeRO. The row holds first the parameters that weight decay shrinks, then
the others, then as many zeros as make its length a multiple of the number of ranks. A rank's shard
is its part of the row: it begins and ends anywhere, in the middle of a matrix too, so the shards
are equal to the element whatever the shapes are. AdamW works on each element alone and does not
mind.

A whole row may exist without memory: its storage is resized to 0 bytes and back, while the
parameters, and what autograd has kept of them, go on being views of it. A tensor whose numpy() was
called has a storage that cannot be resized any more.

Production: FullyShardedDataParallel has such flat parameters (Zhao et al. 2023, arXiv:2304.11277,
section 4.2.3); its successor fully_shard cuts each parameter along dim 0, which is easier to save
and to combine with tensor parallelism, and copies when it gathers. ZeroRedundancyOptimizer gives
each rank whole parameters, which are not equally large.
"""

from itertools import accumulate

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.comm.calls import Handle
from slimlab.plan.zero_units import shard_size


class FlatParameter:
    """Parameters of one unit, one dtype and one device as views of one row.

    named       name -> parameter, in the order of the row; their data become views of the row
    num_decays  so many of them, the first ones, are shrunk by weight decay
    comm        of the ranks that share the row
    stage       of ZeRO: 1 and 2 keep the whole row of weights, 3 the shard; 1 keeps the whole row
                of gradients, 2 and 3 the shard

    names, params  of the parameters
    trained        False: they are frozen; there are no gradients
    whole, shard   the weights; the shard is part of the whole, or apart from it in stage 3
    whole_grad, shard_grad  likewise of the gradients; None where there are none
    pieces         (part of the shard that an optimizer updates, its start, its end)
    filled         whether each parameter got a gradient in this step on this rank
    arrived        whether each got one in this backward pass
    sent           the row of gradients was sent in this backward pass
    """

    def __init__(
        self, named: dict[str, nn.Parameter], num_decays: int, comm: Communicator, stage: int
    ):
        self.names, self.params = list(named), list(named.values())
        self.sizes = [param.numel() for param in self.params]
        self.ends = list(accumulate(self.sizes))
        self.num_decaying = sum(self.sizes[:num_decays])
        self.trained = self.params[0].requires_grad
        self._comm, self._stage = comm, stage
        self.shard_size = shard_size(self.ends[-1], comm.world_size)
        self.start = comm.rank * self.shard_size
        self.whole = self._empty_row()
        self._views = self.views(self.whole)
        self._holes = [param.new_full((), torch.nan).expand(param.shape) for param in self.params]
        with torch.no_grad():
            for param, view in zip(self.params, self._views):
                view.copy_(param)
                param.data = view
        self.shard = self.part_of(self.whole).clone() if stage == 3 else self.part_of(self.whole)
        self.whole_bytes = self.whole.untyped_storage().nbytes()
        self.whole_grad = self.shard_grad = None
        if self.trained:
            self.whole_grad = self._empty_row()
            self._grad_views = self.views(self.whole_grad)
            own = self.part_of(self.whole_grad)
            self.shard_grad = own if stage == 1 else own.clone()
            if stage > 1:
                resize(self.whole_grad, 0)
        self.filled, self.arrived = [False] * len(self.params), [False] * len(self.params)
        self.pieces: list[tuple[nn.Parameter, int, int]] = []
        self._handle: Handle | None = None
        self.sent = False
        self.reduced = False  # the shard holds the sum of an earlier pass of this step

    def _empty_row(self) -> Tensor:
        like = self.params[0]
        return like.new_zeros(self.shard_size * self._comm.world_size, requires_grad=False)

    def part_of(self, row: Tensor) -> Tensor:
        """Return this rank's part of a row, as a view.

        row  (world_size * shard_size,) any
        """
        return row[self.start : self.start + self.shard_size]

    def views(self, row: Tensor) -> list[Tensor]:
        """Return the parts of a row that belong to the parameters, in their shapes.

        row  (world_size * shard_size,) any
        """
        parts = row[: self.ends[-1]].split(self.sizes)
        return [part.view(param.shape) for part, param in zip(parts, self.params)]

    def make_pieces(self, decaying: list[nn.Parameter], others: list[nn.Parameter]) -> None:
        """Make what an optimizer updates: the elements of the shard that decay, and the others.

        The zeros behind the last parameter are in neither.

        decaying, others  lists that grow by one flat parameter each, if the shard has elements
        """
        ends = (0, self.num_decaying, self.ends[-1])
        inside = [min(max(end - self.start, 0), self.shard_size) for end in ends]
        for group, start, end in zip((decaying, others), inside, inside[1:]):
            if start < end:
                piece = nn.Parameter(self.shard[start:end])
                piece.grad = self.shard_grad[start:end]
                group.append(piece)
                self.pieces.append((piece, start, end))

    def exchange(self) -> None:
        """Bring the shards, which are parts of the whole row of weights, into every rank's row.

        Communicates: one all_gather of the shard.
        """
        self._comm.all_gather(self.shard.clone(), out=self.whole)

    def start_gather(self, *, wait: bool) -> None:
        """Make the whole row of weights anew, from shards that are apart from it.

        wait  until it is there; False: finish_gather waits

        Communicates: one all_gather of the shard.
        """
        resize(self.whole, self.whole_bytes)
        for param, view in zip(self.params, self._views):
            param.data = view
        gathered = self._comm.all_gather(self.shard, out=self.whole, async_op=not wait)
        self._handle = None if wait else gathered

    def finish_gather(self) -> None:
        """Wait for the whole row of weights, if it was only asked for."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = None

    def free(self) -> None:
        """Give back the memory of the whole row of weights; the shard stays."""
        self.finish_gather()
        # To read a view of a storage without memory ends the process; NaN can be read.
        for param, hole in zip(self.params, self._holes):
            param.data = hole
        resize(self.whole, 0)

    def take(self, number: int) -> None:
        """Bring a gradient into the row, and let the parameter's grad be that view.

        number  of the parameter in the row
        """
        if not self.whole_grad.untyped_storage().nbytes():
            resize(self.whole_grad, self.whole_bytes)
            self.whole_grad[self.ends[-1] :].zero_()
        param, view = self.params[number], self._grad_views[number]
        if param.grad is not view:
            # Autograd keeps a first gradient as it is and adds later ones in place, in the view.
            view.copy_(param.grad)
            param.grad = view
        self.filled[number] = self.arrived[number] = True

    def not_finite(self) -> int | None:
        """Return the number of the first parameter whose gradient is not finite; None: all are."""
        # The sum is one pass; it may be infinite where no term is, so look again.
        if self.whole_grad.sum().isfinite():
            return None
        views = enumerate(self._grad_views)
        return next((number for number, view in views if not view.isfinite().all()), None)

    def fill_up(self) -> None:
        """Let the gradients that are missing on this rank be zeros."""
        present = self.filled if self._stage == 1 else self.arrived
        if not any(present) and self._stage > 1:
            resize(self.whole_grad, self.whole_bytes)
            self.whole_grad.zero_()
            return
        for view, is_there in zip(self._grad_views, present):
            if not is_there:
                view.zero_()

    def reduce(self) -> None:
        """Add up the ranks' rows of gradients; this rank keeps its part of the sum.

        In stages 2 and 3 the whole row is freed, and a later pass of the same step adds to the sum.

        Communicates: one reduce_scatter of the row.
        """
        if self._stage > 1 and not self.reduced:
            self._comm.reduce_scatter(self.whole_grad, out=self.shard_grad)
        else:
            part = self._comm.reduce_scatter(self.whole_grad)
            self.shard_grad.add_(part) if self._stage > 1 else self.shard_grad.copy_(part)
        self.reduced = self.sent = True
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Take the gradients from the parameters, and in stages 2 and 3 free their row."""
        if self._stage > 1:
            resize(self.whole_grad, 0)
        for param in self.params:
            param.grad = None


def rows_of(
    params: dict[str, nn.Parameter],
    decaying: set[nn.Parameter],
    comm: Communicator,
    stage: int,
) -> list[FlatParameter]:
    """Put the parameters of a unit into rows, one for each dtype and device, and for frozen ones.

    params    name -> parameter
    decaying  those that weight decay shrinks
    comm      of the ranks that share the rows
    stage     of ZeRO; 1 and 2 leave frozen parameters as they are
    """
    rows: dict[tuple, dict[str, nn.Parameter]] = {}
    for name, param in sorted(params.items(), key=lambda item: item[1] not in decaying):
        if param.requires_grad or stage == 3:
            kind = param.requires_grad, param.dtype, param.device
            rows.setdefault(kind, {})[name] = param
    return [
        FlatParameter(named, sum(param in decaying for param in named.values()), comm, stage)
        for named in rows.values()
    ]


def resize(row: Tensor, n_bytes: int) -> None:
    """Give a tensor's memory back, or get it anew; views of it go on.

    row      that owns its storage
    n_bytes  0, or as many as the row has; the content is then any
    """
    row.untyped_storage().resize_(n_bytes)


def held_bytes(tensors: list[Tensor | None]) -> int:
    """Add up the bytes of the storages of tensors, each storage once.

    tensors  any; None counts nothing
    """
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())
