"""What the ranks of one run in threads share: turns, mail, and the collective they meet in.

One rank computes at a time. It keeps its turn until it waits in a call or finishes; then the next
rank that can go on gets it. When no rank can go on and some have not finished, that is a deadlock:
no time limit is needed to know it, and the table that names it is the same every time.

Chapter 07 explains how a deadlock is found; slimlab.comm.threads says what real ranks do and these
do not.
"""

import random
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


class RankStopped(BaseException):
    """End a rank because the run is over; not an Exception, so that no program catches it."""


class RandomState:
    """The states of torch's and Python's own random generators, for one rank to keep.

    numpy's are left out: saving them costs more than all the rest of a turn.
    """

    def __init__(self):
        self.torch_state, self.python_state = torch.get_rng_state(), random.getstate()

    def restore(self) -> None:
        """Put the states back as they were."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)


@dataclass
class Call:
    """What a rank asks for; two ranks fit together in a collective if theirs are equal.

    name       of the method
    arguments  as they stand in tables
    source     (src, tag) of a recv
    """

    name: str
    arguments: str = ""
    source: tuple[int, int] | None = None

    def __str__(self) -> str:
        return f"{self.name}({self.arguments})"


@dataclass
class RankState:
    """Where one rank stands.

    turn_came  wakes the rank's thread
    random     its random states while another rank runs
    call       what it waits in, if it waits
    ready      whether it could go on
    finished   its program has returned
    thread     the thread that runs it
    num_stops  how often it was told that the run is over
    """

    turn_came: threading.Condition
    random: RandomState
    call: Call | None = None
    ready: Callable[[], bool] = lambda: True
    finished: bool = False
    thread: threading.Thread | None = None
    num_stops: int = 0


@dataclass
class Meeting:
    """One collective call: who has come, with what, and what each gets once all are there.

    calls     by rank
    payloads  by rank
    results   by rank, None until all have come
    """

    calls: dict[int, Call] = field(default_factory=dict)
    payloads: dict[int, Tensor | None] = field(default_factory=dict)
    results: list | None = None


class World:
    """What the ranks of one run share: whose turn it is, messages under way, the open collective.

    world_size  number of ranks
    """

    def __init__(self, world_size: int):
        self.lock = threading.Lock()
        self.ranks = [
            RankState(threading.Condition(self.lock), RandomState()) for _ in range(world_size)
        ]
        self.turn = 0
        self.over = threading.Event()
        self.error: BaseException | None = None
        self.mail: dict[tuple[int, int, int], deque[Tensor]] = defaultdict(deque)
        self.meeting = Meeting()

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

    def post(self, src: int, dst: int, tag: int, tensor: Tensor) -> None:
        """Put a message of `src` into the mail for `dst`, under `tag`: the `tensor` itself."""
        with self.lock:
            self._check_not_over(src)
            self.mail[src, dst, tag].append(tensor)

    def fetch(self, src: int, dst: int, tag: int) -> Tensor:
        """Wait until a message of `src` for `dst` with this `tag` is there, and take it out."""
        with self.lock:
            letters = self.mail[src, dst, tag]
            call = Call("recv", f"src={src}, tag={tag}", (src, tag))
            self._wait_until(dst, call, lambda: bool(letters))
            return letters.popleft()

    def meet(self, rank: int, call: Call, payload: Tensor | None, combine: Callable) -> object:
        """Wait until all ranks have come to the same collective; the last one does the work.

        rank     who comes
        call     the collective; must be equal on all ranks
        payload  what the rank brings
        combine  from the list of payloads to the list of results, both in rank order
        returns  this rank's result
        """
        with self.lock:
            self._check_not_over(rank)
            meeting = self.meeting
            meeting.calls[rank], meeting.payloads[rank] = call, payload
            if len(meeting.calls) == len(self.ranks):
                self._check_calls_agree(meeting, rank)
                self.meeting = Meeting()
                meeting.results = combine([meeting.payloads[r] for r in range(len(self.ranks))])
            # The last to come would go on first; giving way keeps the ranks, and so what they
            # print, in the order in which they came.
            self._wait_until(rank, call, lambda: meeting.results is not None, give_way=True)
            return meeting.results[rank]

    def unreceived(self) -> list[tuple[int, int, int, str]]:
        """List what lies in the mail: src, dst, tag, and the number and shape of the messages."""
        return [
            (*address, described([tuple(letter.shape) for letter in self.mail[address]]))
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
        if all(call == meeting.calls[0] for call in meeting.calls.values()):
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
        if state.call.source is None:
            missing = [str(r) for r in range(len(self.ranks)) if r not in self.meeting.calls]
            return [
                f"{state.call.name}: every rank must call it; missing: rank {', '.join(missing)}"
            ]
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
