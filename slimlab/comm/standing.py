"""Where a rank that is a process stands, as it tells whoever watches it.

slimlab.comm.watch writes these reports in the rank, slimlab.comm.board collects them. The words of
the states are those of the tables that chapter 07 shows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from slimlab.comm.counts import Counts
from slimlab.comm.report import text_table

# A rank reports this often; one that has not for SILENT_S neither computes in Python nor waits in a
# call that lets other threads run.
PERIOD_S = 0.2
SILENT_S = 1.0
# After an interrupt from the keyboard, so long whatever goes wrong is put down to it.
INTERRUPT_S = 10.0


@dataclass
class Standing:
    """What is known of one rank.

    state      "has not come", "starts", "computes", "waits", "has finished", "has raised", "has
               lost another rank" or "has ended"
    call       what it waits in, as tables show it; name, source, target and group as in a
               slimlab.comm.calls.Call
    line       of its program
    since_s    when it went into the call or came out of it, on the watcher's clock
    heard_s    when it last reported, on the watcher's clock
    num_calls  how many calls it has begun
    counts     what it has begun and done; None while it computes
    """

    state: str = "has not come"
    call: str = ""
    name: str = ""
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None
    group: tuple[int, ...] | None = None
    line: str = ""
    since_s: float = 0.0
    heard_s: float = 0.0
    num_calls: int = 0
    counts: Counts | None = field(default=None, repr=False)

    def take(self, words: dict, now_s: float) -> None:
        """Take over what a report says.

        words  of a frame of kind "row"
        now_s  on the watcher's clock
        """
        self.state, self.call, self.name = words["state"], words["call"], words["name"]
        self.source, self.target, self.group = (
            None if words[name] is None else tuple(words[name])
            for name in ("source", "target", "group")
        )
        self.line, self.num_calls = words["line"], words["num_calls"]
        self.since_s, self.heard_s = now_s - words["for_s"], now_s
        counts = words["counts"]
        self.counts = None if counts is None else Counts.from_lists(counts)

    def doing(self, now_s: float) -> str:
        """Say in a few words what the rank does.

        now_s  on the watcher's clock
        """
        if self.reports and now_s - self.heard_s > SILENT_S:
            return f"does not answer since {now_s - self.heard_s:.0f} s"
        return f"waits in {self.call}" if self.state == "waits" else self.state

    @property
    def reports(self) -> bool:
        """Tell whether it should be heard of again."""
        return self.state in ("starts", "computes", "waits")

    @property
    def going_on(self) -> bool:
        """Tell whether its program runs, or is still to run."""
        return self.reports or self.state == "has not come"


def standings_table(standings: Iterable[Standing], now_s: float) -> str:
    """Tabulate what every rank does and at which line of its program.

    standings  in rank order
    now_s      on the watcher's clock
    """
    rows = [(rank, one.doing(now_s), one.line) for rank, one in enumerate(standings)]
    placeless = ("has not come", "starts", "has finished")
    rows = [(rank, doing, "" if doing in placeless else line) for rank, doing, line in rows]
    return text_table(("rank", "state", "at"), rows)


def odd_ranks(standings: list[Standing]) -> str:
    """Name the ranks that do something else than most, in a sentence.

    standings  in rank order
    returns    nothing if no rank is odd
    """
    going = {rank: one for rank, one in enumerate(standings) if one.going_on}
    waiting = {rank: one.call for rank, one in going.items() if one.state == "waits"}
    absent = [rank for rank, one in enumerate(standings) if not one.going_on]
    busy = [rank for rank in going if rank not in waiting]
    finished = all(standings[rank].state == "has finished" for rank in absent)
    if busy and (waiting or (absent and finished)):
        rest = "wait" if waiting else "have finished"
        return f"the odd one{_s(busy)}: rank {_list(busy)}, since the others {rest}"
    if not waiting:
        return ""
    calls = list(waiting.values())
    common = max(dict.fromkeys(calls), key=calls.count)
    others = [rank for rank, call in waiting.items() if call != common]
    if others and len(others) * 2 < len(calls):
        return f"the odd one{_s(others)}: rank {_list(others)}, in another call than the others"
    if absent and not others:
        return f"the odd one{_s(absent)}: rank {_list(absent)}, no longer there"
    return ""


def _s(ranks: list[int]) -> str:
    return "s" if len(ranks) > 1 else ""


def _list(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
