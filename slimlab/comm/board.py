"""What is known of all ranks that are processes, and the one message that is said if it goes wrong.

Whoever watches a run keeps a board: the process that called run_ranks, or the keeper of a program
that was started from outside (slimlab.comm.keeper). Since there is one board, there is one message,
and it names the rank that began. Chapter 07 shows the messages.

PyTorch's ranks each look after themselves and print a message each; MPI's print none.
"""

import math
import socket
from dataclasses import dataclass

from slimlab.comm.channel import Channel
from slimlab.comm.stacks import line_of
from slimlab.comm.standing import SILENT_S, Standing, odd_ranks, standings_table
from slimlab.comm.stuck import mail_hints, stuck_ranks

# Failures that come within this time are one failure: the lowest rank that began it is named.
SETTLE_S = 0.05
# An error that only tells that another rank has gone waits so long for the reason.
CONSEQUENCE_S = 1.0
# So long all ranks of a deadlock must have stood still, longer where a message may be on its way.
STILL_S, STILL_WITH_SENDS_S = 1.0, 2.0
# Reports older than this say nothing about now.
FRESH_S = 0.7
# What a rank that waits too long waits for, by its state.
WAITING = {
    "starts": "for the others to connect",
    "waits": "in {call}",
    "has finished": "for the others to finish",
}


@dataclass(frozen=True)
class Verdict:
    """What went wrong.

    kind     "raised", "ended", "deadlock", "mismatch", "waited" or "timeout"
    message  for the reader
    rank     that began it, if one did
    error    name of the exception's class, if one was raised
    blob     the exception as the rank sent it
    """

    kind: str
    message: str
    rank: int | None = None
    error: str = ""
    blob: bytes = b""


class Board:
    """Where all ranks of one run stand.

    world_size  number of ranks
    timeout_s   how long a rank may wait in one call; None: for ever
    """

    def __init__(self, world_size: int, timeout_s: float | None):
        self.timeout_s = timeout_s
        self.standings = [Standing() for _ in range(world_size)]
        self.channels: dict[int, Channel] = {}
        self.hellos: dict[int, dict] = {}
        self.results: dict[int, bytes] = {}
        self.farewells: set[int] = set()
        self.interrupted, self.interrupt_s = False, -math.inf
        self.raised: dict[int, tuple[float, dict, bytes]] = {}
        self.ended: dict[int, tuple[float, str]] = {}

    def read(self, rank: int, now_s: float) -> None:
        """Take what has arrived from one rank.

        rank   whose channel has something to read
        now_s  time.monotonic()
        """
        for words, blob in self.channels[rank].read():
            self.take(rank, words, blob, now_s)

    def take(self, rank: int, words: dict, blob: bytes, now_s: float) -> None:
        """Take one frame.

        rank   that sent it
        words  of the frame
        blob   bytes behind them
        now_s  time.monotonic()
        """
        one, kind = self.standings[rank], words["kind"]
        one.heard_s = now_s
        if kind == "hello":
            self.hellos[rank], one.state, one.since_s = words, "starts", now_s
        elif kind == "row" and rank not in self.raised:
            one.take(words, now_s)
        elif kind == "raised":
            one.state = "has lost another rank" if words["consequence"] else "has raised"
            one.line = words["line"]
            self.raised[rank] = now_s, words, blob
        elif kind == "result":
            one.state = "has finished"
            self.results[rank] = blob
        elif kind == "interrupted":
            self.interrupt_s = now_s
        elif kind == "farewell":
            one.state = "has finished"
            self.farewells.add(rank)
            self.interrupted = self.interrupted or words["interrupted"]

    def note_end(self, rank: int, how: str, now_s: float) -> None:
        """Note that a rank's process is gone.

        rank   whose
        how    "was killed by signal 9 (SIGKILL)" and the like
        now_s  time.monotonic()
        """
        if rank in self.ended or rank in self.farewells or rank in self.raised:
            return
        self.ended[rank] = now_s, how
        for channel in self.channels.values():
            channel.send("report")  # the table is to show where the others stand now

    def verdict(self, now_s: float) -> Verdict | None:
        """Say what went wrong, or None as long as all goes well.

        now_s  time.monotonic()
        """
        return (
            self._verdict_of_raised(now_s)
            or self._verdict_of_ended(now_s)
            or self._verdict_of_consequence(now_s)
            or self.deadlock(now_s)
            or self._verdict_of_waiting(now_s)
        )

    def deadlock(self, now_s: float, *, last_chance: bool = False) -> Verdict | None:
        """Say which ranks wait for what can no longer come, or None if none does.

        now_s        time.monotonic()
        last_chance  the run is over anyway, so that sends need not stand still longer
        """
        stuck = stuck_ranks(self.standings)
        if not stuck:
            return None
        sends = any(one.by_send for one in stuck.values()) and not last_chance
        needed_s = STILL_WITH_SENDS_S if sends else STILL_S
        for rank in stuck:
            one = self.standings[rank]
            if now_s - one.heard_s > FRESH_S or now_s - one.since_s < needed_s:
                return None
        going = [rank for rank, one in enumerate(self.standings) if one.going_on]
        kind, which = "deadlock", "deadlock: every rank that has not finished waits"
        if len(stuck) < len(going):
            which = f"deadlock: rank {', '.join(map(str, stuck))} wait{'s' * (len(stuck) == 1)}"
        if any(one.differs for one in stuck.values()):
            kind, which = "mismatch", "the ranks called different collectives, and each waits"
        hints = [one.text for one in stuck.values()]
        hints += [hint for rank in stuck for hint in mail_hints(rank, self.standings)]
        table = standings_table(self.standings, now_s)
        message = f"{which} for what can no longer come\n{table}\n"
        return Verdict(kind, message + "\n".join(dict.fromkeys(hints)))

    def table(self, now_s: float) -> str:
        """Tabulate what every rank does, and name the odd ones.

        now_s  time.monotonic()
        """
        self._ask_the_silent(now_s)
        odd = odd_ranks(self.standings)
        return standings_table(self.standings, now_s) + (f"\n{odd}" if odd else "")

    def _verdict_of_raised(self, now_s: float) -> Verdict | None:
        causes = {rank: one for rank, one in self.raised.items() if not one[1]["consequence"]}
        if not causes or now_s - min(one[0] for one in causes.values()) < SETTLE_S:
            return None
        return self._raised(min(causes))

    def _verdict_of_consequence(self, now_s: float) -> Verdict | None:
        if not self.raised or now_s - min(one[0] for one in self.raised.values()) < CONSEQUENCE_S:
            return None
        return self._raised(min(self.raised, key=lambda rank: self.raised[rank][0]))

    def _raised(self, rank: int) -> Verdict:
        _, words, blob = self.raised[rank]
        message = words["error"] if words["ours"] else f"rank {rank} raised {words['error']}"
        message += "" if words["ours"] else f"\nat {words['line']}"
        return Verdict("raised", message, rank, words["type"], blob)

    def _verdict_of_ended(self, now_s: float) -> Verdict | None:
        if not self.ended or now_s - min(when for when, _ in self.ended.values()) < SETTLE_S:
            return None
        rank = min(self.ended, key=lambda one: self.ended[one][0])
        one, how = self.standings[rank], self.ended[rank][1]
        seen = one.doing(one.heard_s) + (f", {one.line}" if one.state != "starts" else "")
        one.state, one.line = "has ended", ""
        message = f"rank {rank} {how} before its program had finished; last seen: {seen}"
        return Verdict("ended", f"{message}\n{standings_table(self.standings, now_s)}", rank)

    def _verdict_of_waiting(self, now_s: float) -> Verdict | None:
        if self.timeout_s is None:
            return None
        for rank, one in enumerate(self.standings):
            done = rank in self.farewells or rank in self.results
            if done or one.state not in WAITING or now_s - one.since_s <= self.timeout_s:
                continue
            for_what = WAITING[one.state].format(call=one.call)
            message = f"rank {rank} has waited {self.timeout_s:g} s {for_what}"
            change = (
                "change: look at the odd rank's line; give a larger timeout_s if it only "
                "needs more time"
            )
            return Verdict("waited", f"{message}\n{self.table(now_s)}\n{change}", rank)
        return None

    def _ask_the_silent(self, now_s: float) -> None:
        for rank, one in enumerate(self.standings):
            hello = self.hellos.get(rank, {})
            silent = one.reports and now_s - one.heard_s > SILENT_S
            if silent and hello.get("host") == socket.gethostname():
                one.line = line_of(hello["pid"], hello["memory"]) or f"last seen at {one.line}"
