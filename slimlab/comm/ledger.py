"""The payload ledger: what every call of a rank was handed, in bytes.

Chapter 00 reads it first, chapter 07 explains it. It knows nothing of links: what a collective of
MPI's or NCCL's moves inside, nobody sees from here. slimlab.comm.trace keeps the second ledger, for
collectives that are written in this book. Production profilers (Nsight, Kineto) record times too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from slimlab.comm.report import text_table


class LedgerEntry(NamedTuple):
    """One finished call of one rank.

    call     name of the method
    n_bytes  payload: elements times bytes per element
    dtype    of the payload; None for a barrier
    shape    of the payload; None for a barrier
    peer     rank sent to or received from, in the group; None for a collective
    group    the ranks of the world that the call was among, in the order of their rank in the
             group; None: all
    """

    call: str
    n_bytes: int
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None
    peer: int | None
    group: tuple[int, ...] | None = None


class PayloadLedger:
    """The calls of one rank, in the order in which they finished, with their payload in bytes.

    A send counts what was handed over, a recv what came back: over all ranks a message stands in
    two ledgers, so ask for "send" to count it once. A sendrecv stands as a send and a recv. A
    collective counts this rank's argument once, whatever its algorithm moves; where a rank brings
    nothing (a scatter's receivers), what it gets.
    """

    def __init__(self):
        self.entries: list[LedgerEntry] = []

    def add(
        self,
        call: str,
        tensor: Tensor | None = None,
        peer: int | None = None,
        group: tuple[int, ...] | None = None,
    ) -> None:
        """Note a finished call.

        call    its name
        tensor  its payload
        peer    the other rank, if there is one
        group   the ranks of the world among which it was; None: all
        """
        if tensor is None:
            self.entries.append(LedgerEntry(call, 0, None, None, peer, group))
        else:
            n_bytes = tensor.numel() * tensor.element_size()
            shape = tuple(tensor.shape)
            self.entries.append(LedgerEntry(call, n_bytes, tensor.dtype, shape, peer, group))

    def total_bytes(self, call: str | None = None) -> int:
        """Add up the payload.

        call  only calls of this name; all if not given
        """
        return sum(entry.n_bytes for entry in self._chosen(call))

    def num_calls(self, call: str | None = None) -> int:
        """Count the calls.

        call  only calls of this name; all if not given
        """
        return len(self._chosen(call))

    def table(self) -> str:
        """List the names of the calls with their number and payload, one line each."""
        names = dict.fromkeys(entry.call for entry in self.entries)
        rows = [(name, self.num_calls(name), f"{self.total_bytes(name):,}") for name in names]
        return text_table(("call", "calls", "bytes"), rows)

    def _chosen(self, call: str | None) -> list[LedgerEntry]:
        return [entry for entry in self.entries if call in (None, entry.call)]
