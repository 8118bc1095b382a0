"""Messages under way between ranks that are threads.

A part of slimlab.comm.world, which chapter 07 explains. Messages and receives of one address are
numbered, each kind in its own order: the first receive that was begun gets the first message that
was sent, whichever is waited for first. MPI promises the same.
"""

from collections import Counter, defaultdict
from typing import NamedTuple

from torch import Tensor

from slimlab.comm.report import described


class Address(NamedTuple):
    """Where a message goes.

    context  of the group (slimlab.comm.groups.Group) that it is sent in
    src      the rank of the world that sends
    dst      the rank of the world that receives
    tag      of the message
    """

    context: int
    src: int
    dst: int
    tag: int


class Letter(NamedTuple):
    """One message: where it goes, and its number among those that go there, from 0."""

    address: Address
    number: int


class Mail:
    """The messages that were sent and not yet received, and who has asked for which."""

    def __init__(self):
        self._there: dict[Address, dict[int, Tensor]] = defaultdict(dict)
        self._num_sent: Counter[Address] = Counter()
        self._num_asked: Counter[Address] = Counter()

    def post(self, address: Address, tensor: Tensor) -> Letter:
        """Put a message in.

        address  where it goes
        tensor   itself, not a copy
        """
        letter = Letter(address, self._num_sent[address])
        self._num_sent[address] += 1
        self._there[address][letter.number] = tensor
        return letter

    def ask(self, address: Address) -> Letter:
        """Begin to receive: from now on the next message with this `address` is the caller's."""
        letter = Letter(address, self._num_asked[address])
        self._num_asked[address] += 1
        return letter

    def has(self, letter: Letter) -> bool:
        """Tell whether a `letter` is there."""
        return letter.number in self._there[letter.address]

    def take(self, letter: Letter) -> Tensor:
        """Take a `letter` out that is there."""
        return self._there[letter.address].pop(letter.number)

    def is_asked_for(self, letter: Letter) -> bool:
        """Tell whether a receive was begun that is to get this `letter`."""
        return letter.number < self._num_asked[letter.address]

    def left(self) -> list[tuple[Address, str]]:
        """List the addresses of what is there, with number and shape of the messages."""
        return [
            (address, described([tuple(tensor.shape) for tensor in self._there[address].values()]))
            for address in sorted(self._there)
            if self._there[address]
        ]
