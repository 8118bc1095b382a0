"""What a dialled network is like: latency and bandwidth between every two ranks.

slimlab.comm.network says how long messages then take. Chapter 07 dials. Real machines have more
levels (cores, sockets, hosts, racks); links can say any of them, hosts and inside the most common.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from slimlab.config import check_number, check_size, require


class Wire(NamedTuple):
    """What joins two ranks, in one direction.

    latency_s    seconds that a message is on its way, while others may follow
    bytes_per_s  bandwidth; math.inf: bytes take no time
    overhead_s   seconds per message for which both ends are busy, besides its bytes
    """

    latency_s: float
    bytes_per_s: float = inf
    overhead_s: float = 0.0

    def busy_s(self, n_bytes: int) -> float:
        """Return the seconds for which a message keeps either end busy.

        n_bytes  its payload
        """
        return self.overhead_s + n_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Network:
    """What a message costs between every two ranks of the world.

    latency_s    seconds that a message is on its way, while others may follow
    bytes_per_s  bandwidth; math.inf: bytes take no time
    overhead_s   seconds per message for which both ends are busy, besides its bytes
    links        (src, dst) -> Wire of what differs, each direction for itself
    hosts        how many ranks a host has, or the host of each rank: (0, 0, 1, 1)
    inside       Wire between ranks of the same host; belongs to hosts

    Network(50e-6, 1e9, hosts=4, inside=Wire(1e-6, 2e10)) is a cluster with four ranks per host. A
    wire may be given as a tuple. Raises InputError for negative seconds or a bandwidth that is not
    above 0.
    """

    latency_s: float
    bytes_per_s: float = inf
    overhead_s: float = 0.0
    links: Mapping[tuple[int, int], Wire] = field(default_factory=dict)
    hosts: int | Sequence | None = None
    inside: Wire | None = None

    def __post_init__(self):
        require(
            (self.hosts is None) == (self.inside is None),
            "both hosts and inside, or neither",
            f"hosts = {self.hosts!r}, inside = {self.inside!r}",
            "write Network(50e-6, 1e9, hosts=4, inside=Wire(1e-6, 2e10))",
        )
        named = {f" of link {link}": wire for link, wire in self.links.items()}
        named |= {" of inside": self.inside} if self.inside is not None else {}
        for name, wire in named.items():
            require(
                isinstance(wire, tuple) and 1 <= len(wire) <= 3,
                f"the wire{name}: (latency_s, bytes_per_s)",
                f"{wire!r}",
                "write Wire(50e-6, 1e9)",
            )
        for name, wire in [
            ("", self._plain),
            *((name, Wire(*wire)) for name, wire in named.items()),
        ]:
            _check_wire(name, wire)
        if isinstance(self.hosts, int):
            check_size("hosts", self.hosts)

    def wire(self, src: int, dst: int) -> Wire:
        """Return what joins two ranks.

        src  rank of the world that sends
        dst  rank of the world that receives
        """
        if (src, dst) in self.links:
            return Wire(*self.links[src, dst])
        if self.hosts is not None and self.host_of(src) == self.host_of(dst):
            return Wire(*self.inside)
        return self._plain

    @property
    def _plain(self) -> Wire:
        return Wire(self.latency_s, self.bytes_per_s, self.overhead_s)

    def host_of(self, rank: int) -> object:
        """Return the host of a rank: its number or, where hosts lists them, what stands there.

        rank  of the world
        """
        return rank // self.hosts if isinstance(self.hosts, int) else self.hosts[rank]

    def check(self, world_size: int) -> None:
        """Refuse a world that this network does not fit.

        world_size  number of ranks

        Raises InputError.
        """
        beyond = [link for link in self.links if not all(0 <= end < world_size for end in link)]
        require(
            not beyond,
            f"links between ranks 0 to {world_size - 1}",
            f"{beyond}",
            "links={(0, 1): Wire(50e-6, 1e9)} is the way from rank 0 to rank 1",
        )
        listed = None if isinstance(self.hosts, int | None) else len(self.hosts)
        require(
            listed in (None, world_size),
            f"hosts: the host of each of {world_size} ranks",
            f"{listed} hosts",
            "list one for each rank, or give the number of ranks per host",
        )


def _check_wire(name: str, wire: Wire) -> None:
    check_number(f"latency_s{name}", wire.latency_s, float, 0.0, inf)
    check_number(f"overhead_s{name}", wire.overhead_s, float, 0.0, inf)
    require(
        isinstance(wire.bytes_per_s, int | float) and wire.bytes_per_s > 0,
        f"bytes_per_s{name}: a bandwidth above 0",
        f"{wire.bytes_per_s!r}",
        "1e9 is a gigabyte per second; math.inf takes no time",
    )
