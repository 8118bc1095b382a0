"""What the ranks of one run in threads share: turns, mail, and the collective they meet in.

One rank computes at a time. It keeps its turn until it waits in a call or finishes; then the next
rank that can go on gets it. When no rank can go on and some have not finished, that is a deadlock:
no time limit is needed to know it, and the table that names it is the same every time.

Chapter 07 explains how a deadlock is found; slimlab.comm.threads says what real ranks do and these
do not.
"""

import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable

from torch import Tensor

from slimlab.comm.calls import Call
from slimlab.comm.groups import Group
from slimlab.comm.rank_state import Meeting, RandomState, RankState, RankStopped
from slimlab.comm.report import (
    CommunicationError,
    DeadlockError,
    MismatchError,
    described,
    frames_of,
    text_table,
    user_line,
)

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
        self.mail: dict[tuple[int, int, int, int], deque[Tensor]] = defaultdict(deque)
        self.meetings: dict[tuple[int, int], Meeting] = {}
        self.num_contexts = 1

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

    def new_context(self) -> int:
        """Return a number for a group that no other group has."""
        self.num_contexts += 1
        return self.num_contexts - 1

    def post(self, call: Call, address: tuple[int, int, int, int], tensor: Tensor) -> Callable:
        """Put a message into the mail.

        call     what the sender asks for
        address  context, and ranks of the world: src, dst, then the tag
        tensor   itself, not a copy
        returns  what waits until the sender may go on: at once, or when it was received
        """
        with self.lock:
            src = address[1]
            self._check_not_over(src)
            letters = self.mail[address]
            letters.append(tensor)
        n_bytes = tensor.numel() * tensor.element_size()
        if self.eager_bytes is None or n_bytes <= self.eager_bytes:
            return lambda: None

        def wait() -> None:
            with self.lock:
                self._wait_until(src, call, lambda: all(one is not tensor for one in letters))

        return wait

    def fetch(self, call: Call, address: tuple[int, int, int, int]) -> Tensor:
        """Wait until a message with this address is there, and take it out.

        call     what the receiver asks for
        address  context, and ranks of the world: src, dst, then the tag
        """
        with self.lock:
            letters = self.mail[address]
            self._wait_until(address[2], call, lambda: bool(letters))
            return letters.popleft()

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
            if len(meeting.calls) == len(group.ranks):
                self._check_calls_agree(meeting, rank)
                del self.meetings[group.context, number]
                results = combine([meeting.payloads[one] for one in group.ranks])
                meeting.results = dict(zip(group.ranks, results))
            return meeting

    def attend(self, rank: int, call: Call, meeting: Meeting) -> object:
        """Wait until all ranks have come to a collective.

        rank     who waits, in the world
        call     the collective, as tables show it
        meeting  what come returned
        returns  this rank's result
        """
        with self.lock:
            self.ranks[rank].meeting = meeting
            # The last to come would go on first; giving way keeps the ranks, and so what they
            # print, in the order in which they came.
            self._wait_until(rank, call, lambda: meeting.results is not None, give_way=True)
            return meeting.results[rank]

    def unreceived(self) -> list[tuple[int, int, int, str]]:
        """List what lies in the mail: src, dst, tag, and the number and shape of the messages."""
        return [
            (*address[1:], described([tuple(letter.shape) for letter in self.mail[address]]))
            for address in sorted(self.mail)
            if self.mail[address]
        ]

    def table(self, running: int) -> str:
        """Tabulate what every rank does and at which line of its program.

        running  the rank that computes
        """
        with self.lock:
            return self._table(running)

    def _wait_until(
        self, rank: int, call: Call, ready: Callable[[], bool], give_way: bool = False
    ) -> None:
        self._check_not_over(rank)
        if ready() and not give_way:
            return
        state = self.ranks[rank]
        state.call, state.ready, state.random = call, ready, RandomState()
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
            self._stop(self._deadlock())

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

    def _check_calls_agree(self, meeting: Meeting, rank: int) -> None:
        if len(set(meeting.calls.values())) == 1:
            return
        self.ranks[rank].call = meeting.calls[rank]
        different = len({call.name for call in meeting.calls.values()}) > 1
        what = "different collectives" if different else "a collective with different arguments"
        self._stop(
            MismatchError(
                f"the ranks called {what}:\n{self._table()}\n"
                "change: let every rank make the same collective calls in the same order, with "
                "equal shapes, dtypes and operations"
            )
        )
        raise RankStopped

    def _deadlock(self) -> DeadlockError:
        hints = [hint for r, state in enumerate(self.ranks) for hint in self._hints(r, state)]
        return DeadlockError(
            "deadlock: every rank that has not finished waits for what can no longer come\n"
            + "\n".join([self._table(), *dict.fromkeys(hints)])
        )

    def _hints(self, rank: int, state: RankState) -> list[str]:
        if state.finished:
            return []
        if state.call.source is None and state.call.target is None:
            come, expected = state.meeting.calls, state.meeting.group.ranks
            missing = ", ".join(str(one) for one in expected if one not in come)
            return [f"{state.call.name}: every rank must call it; missing: rank {missing}"]
        if state.call.source is None:
            dst, tag = state.call.target
            return [f"rank {rank}: rank {dst} does not receive with tag {tag}"]
        src, tag = state.call.source
        hints = [f"rank {rank}: no message with tag {tag} from rank {src} is under way"]
        for other_src, dst, other_tag, what in self.unreceived():
            if dst == rank:
                hints.append(
                    f"rank {rank}: but {what} with tag {other_tag} from rank {other_src} lies there"
                )
        return hints

    def _table(self, running: int | None = None) -> str:
        frames, rows = sys._current_frames(), []
        for rank, state in enumerate(self.ranks):
            line = user_line(frames_of(frames.get(state.thread.ident)))
            doing = f"waits in {state.call}" if state.call else "waits for its turn"
            if rank == running:
                doing = "computes"
            rows.append((rank, "has finished", "") if state.finished else (rank, doing, line))
        return text_table(("rank", "state", "at"), rows)
