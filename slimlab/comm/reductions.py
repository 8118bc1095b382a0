"""Collectives that give every rank the same, or combine what the ranks have.

Chapter 07 explains them; they are part of slimlab.comm.base.Communicator. Production libraries
choose an algorithm by size here; slimlab.comm.collectives shows which there are.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.comm.calls import (
    Handle,
    check_apart,
    check_out,
    check_payload,
    check_reduction,
    kind_of,
)
from slimlab.comm.messages import Messages
from slimlab.comm.parts import check_rows, check_sizes, equal_sizes, short_sizes
from slimlab.config import require


class Reductions(Messages):
    """The collectives barrier, broadcast, reduce, all_reduce and reduce_scatter."""

    def barrier(self) -> None:
        """Wait until every rank has come here.

        Communicates: no payload.
        """
        call = self._call("barrier")
        with self.progress.inside(call):
            self._barrier(call)
        self._note("barrier")

    def broadcast(self, tensor: Tensor, src: int = 0, *, out: Tensor | None = None) -> Tensor:
        """Give every rank the tensor of one.

        tensor   the same shape and dtype on every rank; only that of src counts
        src      the rank whose tensor it is
        out      where to put it; may be tensor itself; None: a new tensor
        returns  the tensor of src, the same on every rank

        Communicates: one broadcast of the tensor.
        """
        check_payload("broadcast", tensor)
        self._check_root("src", src)
        check_out("broadcast", out, tensor.shape, tensor)
        check_apart("broadcast", tensor, out, may_be_same=True)
        call = self._call("broadcast", f"{kind_of(tensor)}, src={src}")
        with self.progress.inside(call):
            result = self._broadcast(call, tensor.detach(), src, out)
        self._note("broadcast", tensor)
        return result

    def reduce(
        self, tensor: Tensor, dst: int = 0, op: str = "sum", *, out: Tensor | None = None
    ) -> Tensor | None:
        """Combine the tensors of all ranks, element by element, for one rank.

        tensor   this rank's part; the same shape and dtype on every rank
        dst      the rank that gets the result
        op       "sum", "mean", "max" or "min"
        out      on dst, where to put it; may be tensor itself; None: a new tensor
        returns  the result on dst, None on the others

        Communicates: one reduce of the tensor.
        """
        check_payload("reduce", tensor)
        self._check_root("dst", dst)
        check_reduction(op, tensor.dtype)
        check_out("reduce", out, tensor.shape, tensor)
        check_apart("reduce", tensor, out, may_be_same=True)
        call = self._call("reduce", f"{kind_of(tensor)}, dst={dst}, op={op}")
        with self.progress.inside(call):
            result = self._reduce(call, tensor.detach(), dst, op, out)
        self._note("reduce", tensor)
        return result

    def all_reduce(
        self,
        tensor: Tensor,
        op: str = "sum",
        *,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> Tensor | Handle:
        """Combine the tensors of all ranks, element by element.

        tensor    this rank's part; the same shape and dtype on every rank
        op        "sum", "mean", "max" or "min"
        out       where to put it; may be tensor itself; None: a new tensor
        async_op  return at once, and a handle whose wait returns the result; until then neither
                  tensor nor out may be used
        returns   the result, the same on every rank

        Communicates: one all_reduce of the tensor.
        """
        check_payload("all_reduce", tensor)
        check_reduction(op, tensor.dtype)
        check_out("all_reduce", out, tensor.shape, tensor)
        check_apart("all_reduce", tensor, out, may_be_same=True)
        call = self._call(
            "all_reduce", f"{kind_of(tensor)}, op={op}" + (", async" if async_op else "")
        )
        with self.progress.inside(call):
            if async_op:
                result = self._all_reduce_async(call, tensor.detach(), op, out)
            else:
                result = self._all_reduce(call, tensor.detach(), op, out)
        if async_op:
            result = self.progress.start(call, result.wait)
        self._note("all_reduce", tensor)
        return result

    def reduce_scatter(
        self,
        tensor: Tensor,
        op: str = "sum",
        *,
        sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Combine the tensors of all ranks, and leave each rank one part of the result.

        tensor   all parts, one behind the other; the same shape and dtype on every rank
        op       "sum", "mean", "max" or "min"
        sizes    rows of each rank's part; None: equal parts
        out      where to put this rank's part; None: a new tensor
        returns  part number `rank` of the result: a shard

        Communicates: one reduce_scatter of the tensor.
        """
        check_payload("reduce_scatter", tensor)
        check_rows("reduce_scatter", tensor)
        check_reduction(op, tensor.dtype)
        sizes = self._sizes("reduce_scatter", sizes, tensor.shape[0])
        check_out("reduce_scatter", out, (sizes[self.rank], *tensor.shape[1:]), tensor)
        check_apart("reduce_scatter", tensor, out, may_be_same=False)
        call = self._call(
            "reduce_scatter", f"{kind_of(tensor)}, op={op}, sizes={short_sizes(sizes)}"
        )
        with self.progress.inside(call):
            result = self._reduce_scatter(call, tensor.detach(), op, sizes, out)
        self._note("reduce_scatter", tensor)
        return result

    @abstractmethod
    def _barrier(self, call): ...

    @abstractmethod
    def _broadcast(self, call, tensor, src, out): ...

    @abstractmethod
    def _reduce(self, call, tensor, dst, op, out): ...

    @abstractmethod
    def _all_reduce(self, call, tensor, op, out): ...

    @abstractmethod
    def _all_reduce_async(self, call, tensor, op, out): ...

    @abstractmethod
    def _reduce_scatter(self, call, tensor, op, sizes, out): ...

    def _sizes(self, name: str, sizes: Sequence[int] | None, total: int | None) -> list[int]:
        if sizes is None:
            return equal_sizes(name, total, self.world_size)
        return check_sizes(name, sizes, self.world_size, total)

    def _check_root(self, name: str, root: int) -> None:
        whole = isinstance(root, int) and not isinstance(root, bool)
        require(
            whole and 0 <= root < self.world_size,
            f"{name}: a rank from 0 to {self.world_size - 1}",
            f"{name} = {root!r} on rank {self.rank} of {self.world_size}",
            "give every rank the same number",
        )


def reduce_in_rank_order(tensors: Sequence[Tensor], op: str, *, may_change: bool = False) -> Tensor:
    """Combine one tensor per rank, in the order of the ranks.

    Floating sums depend on their order; with the order fixed, every run gives the same bits.

    tensors     one per rank, same shape and dtype
    op          "sum", "mean", "max" or "min"
    may_change  nobody needs the tensors any more
    returns     a new tensor; if they may be changed, the first of them
    """
    combine = {"max": torch.maximum, "min": torch.minimum}.get(op, torch.add)
    total = tensors[0]
    if not may_change:
        total = total.clone(memory_format=torch.contiguous_format)
    for tensor in tensors[1:]:
        combine(total, tensor, out=total)
    return total.div_(len(tensors)) if op == "mean" else total
