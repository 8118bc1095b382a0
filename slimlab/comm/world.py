"""What the ranks of one run in threads share: turns, mail, and the collective they meet in.

One rank computes at a time. It keeps its turn until it waits in a call or finishes; then the next
rank that can go on gets it. When no rank can go on and some have not finished, that is a deadlock:
no time limit is needed to know it, and the table that names it is the same every time.

Chapter 07 explains how a deadlock is found; slimlab.comm.threads says what real ranks do and these
do not.
"""

import sys
import threading
from collections.abc import Callable

from torch import Tensor

from slimlab.comm import world_report
from slimlab.comm.calls import Call
from slimlab.comm.groups import Group
from slimlab.comm.mail import Address, Letter, Mail
from slimlab.comm.rank_state import Meeting, RandomState, RankState, RankStopped
from slimlab.comm.report import CommunicationError, MismatchError, frames_of, position_of

MAX_STOPS = 100


class World:
    """What the ranks of one run share: whose turn it is, messages under way, the open collectives.

    world_size   number of ranks
    eager_bytes  a send of more than this waits until it is received; None: none waits
    """

    def __init__(self, world_size: int, eager_bytes: int | None = None):
        self.lock = threading.Lock()
        self.ranks = [
            RankState(threading.Condition(self.lock), RandomState()) for _ in range(world_size)
        ]
        self.eager_bytes = eager_bytes
        self.turn = 0
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.mail = Mail()
        self.meetings: dict[tuple[int, int], Meeting] = {}
        self.groups = [Group(0, tuple(range(world_size)))]

    def start(self, rank: int) -> None:
        """Wait for the first turn of `rank`, in its own thread."""
        with self.lock:
            self._await_turn(rank)

    def finish(self, rank: int) -> None:
        """Note that the program of `rank` has returned, and pass its turn on."""
        with self.lock:
            self.ranks[rank].finished = True
            if not self.over.is_set():
                self._pass_turn(rank)

    def stop(self, error: BaseException) -> None:
        """End the run: every rank that waits or calls from now on is stopped.

        error  what run_ranks is to raise; the first one counts
        """
        with self.lock:
            self._stop(error)

    def new_group(self, ranks: tuple[int, ...]) -> Group:
        """Make a group with a context of its own.

        ranks  of the world, in the order of their rank in the group
        """
        self.groups.append(Group(len(self.groups), ranks))
        return self.groups[-1]

    def post(self, address: Address, tensor: Tensor) -> Letter:
        """Put a message into the mail.

        address  where it goes
        tensor   itself, not a copy
        """
        with self.lock:
            self._check_not_over(address.src)
            return self.mail.post(address, tensor)

    def deliver(self, call: Call, letter: Letter, n_bytes: int) -> None:
        """Wait until the sender of a message may go on: at once, or when it was received.

        call     what the sender waits in
        letter   the message
        n_bytes  its payload
        """
        if self.eager_bytes is None or n_bytes <= self.eager_bytes:
            return
        with self.lock:
            self._wait_until(letter.address.src, call, letter, lambda: not self.mail.has(letter))

    def ask(self, address: Address) -> Letter:
        """Begin to receive: from now on the next message with this `address` is the caller's."""
        with self.lock:
            self._check_not_over(address.dst)
            return self.mail.ask(address)

    def fetch(self, call: Call, letter: Letter) -> Tensor:
        """Wait until a message is there, and take it out.

        call    what the receiver waits in
        letter  the message
        """
        with self.lock:
            self._wait_until(letter.address.dst, call, letter, lambda: self.mail.has(letter))
            return self.mail.take(letter)

    def come(
        self, rank: int, group: Group, call: Call, payload: object, combine: Callable
    ) -> Meeting:
        """Come to a collective without waiting for the others; the last to come does the work.

        rank     who comes, in the world
        group    among whom
        call     the collective; must be equal on all ranks
        payload  what the rank brings
        combine  from the list of payloads to the list of results, both in the group's order
        """
        with self.lock:
            self._check_not_over(rank)
            number = self.ranks[rank].num_met[group.context]
            self.ranks[rank].num_met[group.context] += 1
            meeting = self.meetings.setdefault((group.context, number), Meeting(group))
            meeting.calls[rank], meeting.payloads[rank] = call, payload
            meeting.lines[rank] = position_of(frames_of(sys._getframe()))
            if len(meeting.calls) == len(group.ranks):
                del self.meetings[group.context, number]
                self._hold(meeting, combine)
            return meeting

    def attend(self, rank: int, call: Call, meeting: Meeting) -> object:
        """Wait until all ranks have come to a collective.

        rank     who waits, in the world
        call     the collective, as tables show it
        meeting  what come returned
        returns  this rank's result

        Raises what combine raised, the same on every rank.
        """
        with self.lock:
            # The last to come would go on first; giving way keeps the ranks, and so what they
            # print, in the order in which they came.
            self._wait_until(rank, call, meeting, lambda: meeting.held, give_way=True)
            if meeting.error is not None:
                raise meeting.error
            return meeting.results[rank]

    def table(self, running: int) -> str:
        """Tabulate what every rank does and at which line of its program.

        running  the rank that computes
        """
        with self.lock:
            return world_report.table(self.ranks, running)

    def _hold(self, meeting: Meeting, combine: Callable) -> None:
        ranks = meeting.group.ranks
        if len(set(meeting.calls.values())) > 1:
            self._stop(world_report.mismatch(meeting))
            raise RankStopped
        try:
            meeting.results = dict(zip(ranks, combine([meeting.payloads[one] for one in ranks])))
        except MismatchError as error:
            self._stop(error)
            raise RankStopped from error
        except Exception as error:
            meeting.error = error
        meeting.held = True

    def _wait_until(
        self,
        rank: int,
        call: Call,
        awaited: Letter | Meeting,
        ready: Callable[[], bool],
        give_way: bool = False,
    ) -> None:
        self._check_not_over(rank)
        if ready() and not give_way:
            return
        state = self.ranks[rank]
        state.call, state.awaited, state.ready = call, awaited, ready
        state.random = RandomState()
        self._pass_turn(rank)
        self._await_turn(rank)
        state.call, state.ready = None, lambda: True

    def _await_turn(self, rank: int) -> None:
        while self.turn != rank and not self.over.is_set():
            self.ranks[rank].turn_came.wait()
        self._check_not_over(rank)
        self.ranks[rank].random.restore()

    def _pass_turn(self, rank: int) -> None:
        world_size = len(self.ranks)
        for step in range(1, world_size + 1):
            state = self.ranks[(rank + step) % world_size]
            if not state.finished and state.ready():
                self.turn = (rank + step) % world_size
                state.turn_came.notify()
                return
        if all(state.finished for state in self.ranks):
            self.over.set()
        else:
            self._stop(world_report.deadlock(self.ranks, self.mail, self.groups))

    def _stop(self, error: BaseException) -> None:
        if not self.over.is_set():
            self.error = error
            self.over.set()
            for state in self.ranks:
                state.turn_came.notify()

    def _check_not_over(self, rank: int) -> None:
        if not self.over.is_set():
            return
        state = self.ranks[rank]
        if threading.current_thread() is not state.thread:
            raise CommunicationError(
                f"the run is over, and the communicator of rank {rank} was used again\n"
                "change: use it inside of the program only; return a list, no generator"
            )
        state.num_stops += 1
        while state.num_stops > MAX_STOPS:
            # A loop around a bare except would go on for ever and slow down whatever comes next.
            state.turn_came.wait()
        raise RankStopped
