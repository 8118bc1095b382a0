"""What is said when ranks that are threads cannot go on, or end with something left over.

A part of slimlab.comm.world: here all that the ranks know lies in one process, so that nothing
needs to be asked of them. Chapter 07 shows each of these messages.
"""

import sys
from collections.abc import Sequence

from slimlab.comm.agree import mismatch_message
from slimlab.comm.groups import Group
from slimlab.comm.mail import Address, Letter, Mail
from slimlab.comm.rank_state import Meeting, RankState
from slimlab.comm.report import (
    CommunicationError,
    DeadlockError,
    MismatchError,
    frames_of,
    leavings,
    line_at,
    short_group,
    text_table,
    user_line,
)


def table(ranks: Sequence[RankState], running: int | None = None) -> str:
    """Tabulate what every rank does and at which line of its program.

    ranks    where each stands
    running  the rank that computes, if one does
    """
    frames, rows = sys._current_frames(), []
    for rank, state in enumerate(ranks):
        line = user_line(frames_of(frames.get(state.thread.ident)))
        doing = f"waits in {state.call}" if state.call else "waits for its turn"
        if rank == running:
            doing = "computes"
        rows.append((rank, "has finished", "") if state.finished else (rank, doing, line))
    return text_table(("rank", "state", "at"), rows)


def mismatch(meeting: Meeting) -> MismatchError:
    """Name what the ranks of a collective called, or that they finished without coming.

    meeting  the collective
    """
    texts = []
    for rank in meeting.group.ranks:
        call = meeting.calls.get(rank)
        texts.append(
            ["finish", "", ""]
            if call is None
            else [call.name, str(call), line_at(meeting.lines[rank])]
        )
    return MismatchError(mismatch_message(texts, meeting.group.ranks))


def deadlock(ranks: Sequence[RankState], mail: Mail, groups: Sequence[Group]) -> DeadlockError:
    """Say what each rank waits for, and why it will not come.

    ranks   where each stands
    mail    the messages under way
    groups  all groups of ranks, by their context
    """
    hints = [hint for rank in range(len(ranks)) for hint in _hints(rank, ranks, mail, groups)]
    return DeadlockError(
        "deadlock: every rank that has not finished waits for what can no longer come\n"
        + "\n".join([table(ranks), *dict.fromkeys(hints)])
    )


def left_over(
    mail: Mail, groups: Sequence[Group], unwaited: Sequence[Sequence[str]]
) -> CommunicationError | None:
    """Say what is left after all ranks have finished: messages, and calls not waited for.

    mail      the messages that were never received
    groups    all groups of ranks, by their context
    unwaited  of every rank, what it started and never waited for
    returns   None if nothing is left
    """
    sent = [
        f"rank {address.src} to rank {address.dst}: {what} with tag {address.tag}"
        + _within(address, groups)
        for address, what in mail.left()
    ]
    return leavings(sent, unwaited)


def _hints(rank: int, ranks: Sequence[RankState], mail: Mail, groups: Sequence[Group]) -> list[str]:
    state = ranks[rank]
    if state.finished:
        return []
    if isinstance(state.awaited, Meeting):
        meeting = state.awaited
        name, group = meeting.calls[rank].name, meeting.group
        whose = "" if group.context == 0 else f" of group {short_group(group.ranks)}"
        missing = ", ".join(map(str, meeting.missing()))
        return [f"{name}: every rank{whose} must call it; missing: rank {missing}"]
    address = state.awaited.address
    where = _within(address, groups)
    if address.src == rank:
        return [f"rank {rank}: rank {address.dst} does not receive with tag {address.tag}{where}"]
    what = f"no message with tag {address.tag} from rank {address.src}{where}"
    hints = [f"rank {rank}: {what} is under way"]
    for other, what in mail.left():
        if other.dst == rank:
            taken = ", for an irecv that was begun before" * mail.is_asked_for(Letter(other, 0))
            hints.append(
                f"rank {rank}: but {what} with tag {other.tag} from rank {other.src}"
                f"{_within(other, groups)} lies there{taken}"
            )
    return hints


def _within(address: Address, groups: Sequence[Group]) -> str:
    if address.context == 0:
        return ""
    return f" in group {short_group(groups[address.context].ranks)}"
