"""Whether what ranks wait for can still come, from what all of them have begun and done.

A rank is released if everything that its call needs from other ranks has been begun, or if one of
these ranks goes on and may begin it. Ranks that nobody releases are in a deadlock, for certain:
that it is said after a second and not after a time limit is what chapter 07 shows. Unlike ranks
that are threads, these are asked one after the other; slimlab.comm.board makes sure that they all
stood still meanwhile.

What counts as begun errs on the side of silence: then a time limit has the last word.
"""

from dataclasses import dataclass

from slimlab.comm.report import short_group
from slimlab.comm.standing import Standing


@dataclass(frozen=True)
class Hint:
    """Why one rank cannot go on.

    text     as messages show it
    by_send  it waits until its message is taken. A runtime that keeps the message may still let it
             go, so more time must pass before this is believed
    differs  it is in another collective than a rank that has come
    """

    text: str
    by_send: bool = False
    differs: bool = False


def stuck_ranks(standings: list[Standing]) -> dict[int, Hint]:
    """Find the ranks whose calls cannot end any more.

    standings  in rank order; only ranks that wait with their counts known can be stuck
    returns    a reason for each; empty if there is no deadlock
    """
    over = {rank for rank, one in enumerate(standings) if one.state == "has finished"}
    over = {rank for rank in over if standings[rank].counts is not None}
    stuck = {
        rank: Hint("")
        for rank, one in enumerate(standings)
        if one.state == "waits" and one.counts is not None
    }
    released = True
    while released:
        reasons = {rank: _reason(rank, standings, over | set(stuck)) for rank in stuck}
        released = [rank for rank, reason in reasons.items() if reason is None]
        stuck = {rank: reason for rank, reason in reasons.items() if reason is not None}
    return stuck


def mail_hints(rank: int, standings: list[Standing]) -> list[str]:
    """Say which messages lie there for a rank that waits for another one.

    rank       who waits in a receive
    standings  in rank order
    """
    mine, hints = standings[rank], []
    if mine.source is None or mine.counts is None:
        return hints
    for src, other in enumerate(standings):
        sent = other.counts.sent if other.counts is not None else {}
        for (dst, tag, group), number in sent.items():
            left = number - mine.counts.received[src, tag, group]
            if dst == rank and left > 0:
                what = "one message" if left == 1 else f"{left:,} messages"
                hints.append(
                    f"rank {rank}: but {what} with tag {tag} from rank {src}{_within(group)} "
                    f"{'lies' if left == 1 else 'lie'} there"
                )
    return hints


def unreceived(standings: list[Standing]) -> list[str]:
    """List the messages that were sent and never received, after all ranks have finished.

    standings  in rank order
    """
    lines = []
    for src, one in enumerate(standings):
        for (dst, tag, group), number in (one.counts.sent if one.counts else {}).items():
            taker = standings[dst].counts
            left = number - taker.received[src, tag, group] if taker is not None else 0
            if left > 0:
                what = "one message" if left == 1 else f"{left:,} messages"
                lines.append(f"rank {src} to rank {dst}: {what} with tag {tag}{_within(group)}")
    return lines


def _reason(rank: int, standings: list[Standing], still: set[int]) -> Hint | None:
    one = standings[rank]
    if one.source is None and one.target is None:
        return _reason_of_collective(rank, standings, still)
    if one.source is not None and one.source[0] in still:
        (src, tag), group = one.source, one.group
        begun = standings[src].counts.sent[rank, tag, group]
        if begun <= one.counts.received[src, tag, group]:
            what = f"no message with tag {tag} from rank {src}{_within(group)} is under way"
            return Hint(f"rank {rank}: {what}")
    if one.target is not None and one.target[0] in still:
        (dst, tag), group = one.target, one.group
        asked = standings[dst].counts.asked[rank, tag, group]
        if asked <= standings[dst].counts.received[rank, tag, group]:
            what = f"rank {dst} does not receive with tag {tag}{_within(group)}"
            return Hint(f"rank {rank}: {what}", by_send=True)
    return None


def _reason_of_collective(rank: int, standings: list[Standing], still: set[int]) -> Hint | None:
    one = standings[rank]
    members = range(len(standings)) if one.group is None else one.group
    come, done = one.counts.come[one.group], one.counts.gone[one.group]
    others = [member for member in members if member != rank and member in still]
    missing = [str(other) for other in others if standings[other].counts.come[one.group] <= done]
    if missing:
        whose = "" if one.group is None else f" of group {short_group(one.group)}"
        name = one.call.partition("(")[0] if one.name != "wait" else one.call
        return Hint(f"{name}: every rank{whose} must call it; missing: rank {', '.join(missing)}")
    for other in others:
        counts = standings[other].counts
        if one.name != "wait" and counts.come[one.group] == come:
            last = counts.last.get(one.group, one.call)
            if last != one.call:
                return Hint(f"rank {other} has begun {last}, rank {rank} {one.call}", differs=True)
    return None


def _within(group: tuple[int, ...] | None) -> str:
    return "" if group is None else f" in group {short_group(group)}"
