"""Ranks that are processes compare their calls before a collective moves data.

MPI does not compare: with another shape it may cut a message short, with another root every rank
may go on with wrong numbers, with another collective all wait for ever. Here each rank turns its
call into a number; the smallest and the largest are found in one small collective that all calls
begin with, so that ranks in different calls still meet. Only if numbers differ, the calls
themselves are exchanged, and every rank raises the same error.

PyTorch does this with TORCH_DISTRIBUTED_DEBUG=DETAIL. It costs one small all_reduce per call:
`check=False` leaves it out.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimlab.comm.calls import Call
from slimlab.comm.report import (
    MismatchError,
    Position,
    frames_of,
    line_at,
    position_of,
    text_table,
)


class Agreement:
    """The comparison of calls within one group.

    smallest  all_reduce with min of an int64 tensor of shape (2,), over a channel of its own
    gather    from this rank's text to the texts of all ranks, in rank order
    """

    def __init__(self, smallest: Callable[[Tensor], Tensor], gather: Callable[[str], list[str]]):
        self._smallest, self._gather = smallest, gather

    def check(self, call: Call) -> None:
        """Wait until every rank has come to a collective, and compare what it asks for.

        call  of this rank

        Communicates: one all_reduce of 16 bytes; if calls differ, one gather of texts.
        Raises MismatchError, the same on every rank, if the calls differ.
        """
        low, high = self._smallest(digests(call)).tolist()
        if low != -high:
            self.explain(call)

    def explain(self, call: Call, where: Position | None = None) -> None:
        """Exchange the calls and raise the error that names them all.

        call   of this rank
        where  the line that made it; None: the one that led here

        Communicates: one gather of texts.
        Raises MismatchError, the same on every rank.
        """
        line = line_at(where or position_of(frames_of(sys._getframe())))
        texts = [text.split("\0") for text in self._gather(f"{call.name}\0{call}\0{line}")]
        raise MismatchError(mismatch_message(texts, call.group))


def digest(call: Call) -> int:
    """Return a whole number below 2^62 that equal calls share.

    call  any
    """
    return int.from_bytes(hashlib.blake2b(str(call).encode(), digest_size=8).digest(), "big") >> 2


def digests(call: Call) -> Tensor:
    """Return int64 (2,), whose smallest values over all ranks add up to 0 if all calls are equal.

    call  of this rank
    """
    number = digest(call)
    return torch.tensor([number, -number], device="cpu")


def mismatch_message(texts: list[list[str]], ranks: Sequence[int] | None = None) -> str:
    """Say which rank called what, and which is the odd one.

    texts  of every rank: name of the call, the call as tables show it, the line
    ranks  their ranks in the world; None: all
    """
    ranks = range(len(texts)) if ranks is None else ranks
    shown = [text[1] for text in texts]
    common = max(dict.fromkeys(shown), key=shown.count)
    odd = [str(rank) for rank, text in zip(ranks, shown) if text != common]
    names = {text[0] for text in texts}
    what = "different collectives" if len(names) > 1 else "a collective with different arguments"
    if "finish" in names:
        what = "unequal numbers of collectives: some have finished, others are still in a call"
    table = text_table(
        ("rank", "called", "at"),
        [
            (rank, "has finished" if name == "finish" else text, "" if name == "finish" else line)
            for rank, (name, text, line) in zip(ranks, texts)
        ],
    )
    fewer = shown.count(common) * 2 > len(shown)
    which = f"\nthe odd one{'s' if len(odd) > 1 else ''}: rank {', '.join(odd)}" if fewer else ""
    return (
        f"the ranks called {what}:\n{table}{which}\n"
        "change: let every rank make the same collective calls in the same order, with equal "
        "shapes, dtypes, roots and operations"
    )
