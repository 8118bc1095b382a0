"""The Communicator: all that a parallel program may ask of its surroundings.

A parallel program is a function `program(comm, ...)`. Each rank runs it with a communicator of its
own, which knows the rank, the number of ranks, and how to move tensors between them. What carries
the tensors is a runtime's business: threads of one process (slimlab.comm.threads), MPI
(slimlab.comm.mpi), torch.distributed (slimlab.comm.distributed).

A runtime writes the methods that begin with an underscore. Checks and bookkeeping happen here, in
slimlab.comm.messages and in slimlab.comm.reductions, once for all runtimes: every call notes its
payload in the ledger.

Chapter 00 sends the first message, chapter 07 explains every call. Names are torch.distributed's;
unlike there, a collective leaves its argument as it is and returns a new tensor, unless it is given
an `out`, which may be the argument itself.
"""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from slimlab.comm.calls import (
    Call,
    Handle,
    check_apart,
    check_out,
    check_payload,
    dtype_name,
    kind_of,
)
from slimlab.comm.parts import check_rows, check_sizes, short_sizes
from slimlab.comm.reductions import Reductions
from slimlab.config import require


class Communicator(Reductions):
    """One rank's connection to the others.

    Attributes and messages between two ranks: slimlab.comm.messages.Messages. Of all collectives
    holds: all ranks must make the same calls in the same order. "Parts" lie one behind the other
    along dim 0, in rank order. Tensors travel as data: gradients do not flow through a call. An
    out shares no memory with the argument, unless a call says that it may be the argument.
    Raises InputError for arguments that do not fit; MismatchError (slimlab.comm.report) if the
    ranks meet in different calls.
    """

    def all_gather(
        self,
        tensor: Tensor,
        *,
        sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
        async_op: bool = False,
    ) -> Tensor | Handle:
        """Join the parts of all ranks, for every rank.

        tensor    this rank's part, a shard; same dtype and, but for dim 0, same shape on every rank
        sizes     rows of each rank's part, the same list on every rank; None: all as this one
        out       where to put the whole; None: a new tensor
        async_op  return at once, and a handle whose wait returns the whole; until then the part may
                  be read, but neither may be changed, and out not be read
        returns   the parts, one behind the other in rank order, the same on every rank

        Communicates: one all_gather of the part.
        """
        more = ", async" if async_op else ""
        sizes, call = self._call_gather("all_gather", tensor, sizes, more, out)
        gather = self._all_gather_async if async_op else self._all_gather
        with self.progress.inside(call):
            result = gather(call, tensor.detach(), sizes, out)
        if async_op:
            result = self.progress.start(call, result.wait)
        self._note("all_gather", tensor)
        return result

    def gather(
        self,
        tensor: Tensor,
        dst: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Join the parts of all ranks, for one rank.

        tensor   this rank's part; same dtype and, but for dim 0, same shape on every rank
        dst      the rank that gets the whole
        sizes    rows of each rank's part, the same list on every rank; None: all as this one
        out      on dst, where to put the whole; None: a new tensor
        returns  the parts, one behind the other in rank order, on dst; None on the others

        Communicates: one gather of the part.
        """
        self._check_root("dst", dst)
        sizes, call = self._call_gather("gather", tensor, sizes, f", dst={dst}", out)
        with self.progress.inside(call):
            result = self._gather(call, tensor.detach(), dst, sizes, out)
        self._note("gather", tensor)
        return result

    def scatter(
        self,
        tensor: Tensor | None,
        src: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Hand out the parts of one rank's tensor.

        tensor   on src all parts, one behind the other; ignored elsewhere, usually None
        src      the rank whose tensor it is
        sizes    on src, rows of each rank's part; None: equal parts; ignored elsewhere
        out      where to put this rank's part; None: a new tensor
        returns  part number `rank`: a shard

        Communicates: one scatter; the ledger counts the whole on src and the part elsewhere.
        """
        self._check_root("src", src)
        if self.rank == src:
            check_payload("scatter", tensor)
            check_rows("scatter", tensor)
            sizes = self._sizes("scatter", sizes, tensor.shape[0])
            check_out("scatter", out, (sizes[self.rank], *tensor.shape[1:]), tensor)
            check_apart("scatter", tensor, out, may_be_same=False)
            tensor = tensor.detach()
        else:
            tensor = sizes = None
            if out is not None:
                check_out("scatter", out, out.shape, out)
        call = self._call("scatter", f"src={src}")
        with self.progress.inside(call):
            result = self._scatter(call, tensor, src, sizes, out)
        self._note("scatter", tensor if self.rank == src else result)
        return result

    def all_to_all(
        self,
        tensor: Tensor,
        *,
        send_sizes: Sequence[int] | None = None,
        recv_sizes: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Send part j to rank j, and get part number `rank` of every rank.

        tensor      parts for all ranks, one behind the other; same dtype and, but for dim 0, same
                    shape on every rank
        send_sizes  rows for each rank; None: equal parts
        recv_sizes  rows from each rank; None: equal parts. Give both or neither
        out         where to put the result; None: a new tensor
        returns     the parts from all ranks, one behind the other in rank order

        Communicates: one all_to_all of the tensor.
        Raises MismatchError too if a rank expects other rows than another sends it.
        """
        check_payload("all_to_all", tensor)
        check_rows("all_to_all", tensor)
        require(
            (send_sizes is None) == (recv_sizes is None),
            "all_to_all: both send_sizes and recv_sizes, or neither",
            f"send_sizes = {send_sizes}, recv_sizes = {recv_sizes}",
            "tell each rank what it sends and what it gets",
        )
        uneven = send_sizes is not None
        send_sizes = self._sizes("all_to_all", send_sizes, tensor.shape[0])
        recv_sizes = self._sizes("all_to_all", recv_sizes, None if uneven else tensor.shape[0])
        check_out("all_to_all", out, (sum(recv_sizes), *tensor.shape[1:]), tensor)
        check_apart("all_to_all", tensor, out, may_be_same=False)
        rows = f"rows of {tuple(tensor.shape[1:])}, uneven" if uneven else ""
        kind = f"{dtype_name(tensor.dtype)} {rows}" if uneven else kind_of(tensor)
        call = self._call("all_to_all", kind)
        with self.progress.inside(call):
            result = self._all_to_all(call, tensor.detach(), send_sizes, recv_sizes, out)
        self._note("all_to_all", tensor)
        return result

    def split(self, color: int | None, key: int = 0) -> "Communicator | None":
        """Divide the ranks into groups that talk among themselves.

        color    ranks of the same color make a group; None: this rank joins none
        key      the order of ranks in the group, equal keys in the order of their ranks here
        returns  a communicator of the group, with ranks counted from 0 again; None without color.
                 It shares this one's ledger

        Communicates: color and key of every rank.
        """
        for name, value in (("color", color), ("key", key)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole or (name == "color" and value is None),
                f"split: {name}, a whole number" + (" or None" if name == "color" else ""),
                f"{name} = {value!r}",
                "comm.split(comm.rank // 2) makes pairs, comm.split(comm.rank % 2) evens and odds",
            )
        call = self._call("split")
        with self.progress.inside(call):
            return self._split(call, color, key)

    @abstractmethod
    def _all_gather(self, call, tensor, sizes, out): ...

    @abstractmethod
    def _all_gather_async(self, call, tensor, sizes, out): ...

    @abstractmethod
    def _gather(self, call, tensor, dst, sizes, out): ...

    @abstractmethod
    def _scatter(self, call, tensor, src, sizes, out): ...

    @abstractmethod
    def _all_to_all(self, call, tensor, send_sizes, recv_sizes, out): ...

    @abstractmethod
    def _split(self, call, color, key): ...

    def _call_gather(self, name, tensor, sizes, more, out) -> tuple[list[int], Call]:
        check_payload(name, tensor)
        check_rows(name, tensor)
        if sizes is None:
            sizes, kind = [tensor.shape[0]] * self.world_size, kind_of(tensor)
        else:
            sizes = check_sizes(name, sizes, self.world_size, None)
            require(
                sizes[self.rank] == tensor.shape[0],
                f"{name}: a part of sizes[{self.rank}] = {sizes[self.rank]} rows",
                f"{tensor.shape[0]} rows on rank {self.rank}",
                "give every rank the same list, in rank order",
            )
            rows = f"{dtype_name(tensor.dtype)} rows of {tuple(tensor.shape[1:])}"
            kind = f"{rows}, sizes={short_sizes(sizes)}"
        check_out(name, out, (sum(sizes), *tensor.shape[1:]), tensor)
        check_apart(name, tensor, out, may_be_same=False)
        return sizes, self._call(name, kind + more)
