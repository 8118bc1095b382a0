"""How many messages and collectives a rank has begun and done, and with whom.

Ranks that are threads share one memory, so a deadlock is seen at once. Ranks that are processes
each know only their own calls; put together, these counts tell whether what a rank waits for can
still come (slimlab.comm.stuck). Chapter 07 uses them without naming them.

Production launchers count nothing: a deadlock shows as a time limit that has passed.
"""

from collections import Counter

SENDS = ("send", "isend", "sendrecv")
RECEIVES = ("recv", "irecv", "sendrecv")
# A program that never uses a tag twice would otherwise fill the memory.
MAX_KEYS = 10_000
# A rank, a tag and the group: what tells the messages of one rank apart.
Key = tuple[int, int, tuple[int, ...] | None]
Group = tuple[int, ...] | None


class Counts:
    """What one rank has begun and done. All ranks are those of the world.

    sent      messages begun to send, by dst, tag and group
    asked     receives begun, by src, tag and group
    received  receives done, by src, tag and group
    come      collectives begun, by group
    gone      collectives done, by group
    last      the collective that was begun last, by group
    """

    def __init__(self):
        self.sent: Counter[Key] = Counter()
        self.asked: Counter[Key] = Counter()
        self.received: Counter[Key] = Counter()
        self.come: Counter[Group] = Counter()
        self.gone: Counter[Group] = Counter()
        self.last: dict[Group, object] = {}

    def begin(self, call) -> None:
        """Count what a call begins.

        call  a slimlab.comm.calls.Call
        """
        if call.name in SENDS:
            self.sent[*call.target, call.group] += 1
        if call.name in RECEIVES:
            self.asked[*call.source, call.group] += 1
        if _is_collective(call) and call.name != "wait":
            self.come[call.group] += 1
            self.last[call.group] = call

    def end(self, call) -> None:
        """Count what a call has done.

        call  the same as at its begin
        """
        if call.source is not None and call.name != "irecv":
            self.received[*call.source, call.group] += 1
        if _is_collective(call):
            self.gone[call.group] += 1

    def start(self, call) -> None:
        """Take back that a call is done: it was only started, and a wait will end it.

        call  what was started
        """
        if _is_collective(call):
            self.gone[call.group] -= 1

    def as_lists(self) -> dict[str, list] | None:
        """Return the counts as JSON can hold them; None: there are too many."""
        if sum(map(len, vars(self).values())) > MAX_KEYS:
            return None
        kinds = {name: kind.copy() for name, kind in vars(self).items()}
        kinds["last"] = {group: str(call) for group, call in kinds["last"].items()}
        return {name: [[key, n] for key, n in kind.items()] for name, kind in kinds.items()}

    @classmethod
    def from_lists(cls, lists: dict[str, list]) -> "Counts":
        """Make the counts again that as_lists has written.

        lists  of as_lists, after a journey through JSON
        """
        counts = cls()
        for name in ("sent", "asked", "received"):
            kind = getattr(counts, name)
            for (rank, tag, group), n in lists[name]:
                kind[rank, tag, None if group is None else tuple(group)] = n
        for name in ("come", "gone", "last"):
            kind = getattr(counts, name)
            for group, n in lists[name]:
                kind[None if group is None else tuple(group)] = n
        return counts


def _is_collective(call) -> bool:
    # A rank whose program has returned comes to no other collective.
    return call.source is None and call.target is None and call.name != "finish"
