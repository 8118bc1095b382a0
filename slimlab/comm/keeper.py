"""The process that keeps the board of a program that mpirun, srun or torchrun has started.

The first rank starts it (slimlab.comm.connect). It is a process of its own, so it outlives a rank
that is killed and prints the one message before the launcher, which ends all ranks at once, can
keep them from saying anything. It ends when the last rank has gone. It imports no torch.

MPI's launchers print which process died, not which rank; torchrun prints what it knows of one host.
"""

import hmac
import os
import selectors
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from slimlab.comm.board import Board, Verdict
from slimlab.comm.channel import Channel
from slimlab.comm.standing import INTERRUPT_S
from slimlab.comm.voice import find_voice

ROOT = Path(__file__).resolve().parents[2]
ENTRY = "import sys; sys.path.insert(0, {root!r}); from slimlab.comm.keeper import main; main()"
# A rank's report is far smaller; whoever sends more is none.
MAX_BYTES = 2**24
# Ranks that never come, or do not end when they are told to, are not waited for longer.
START_S, END_S = 120.0, 5.0
WAIT_S, FIRST_S = 0.1, 0.2


def start_keeper(world_size: int, timeout_s: float, token: str, host: str) -> int:
    """Start a keeper for the ranks of this program.

    world_size  number of ranks
    timeout_s   how long a rank may wait in one call
    token       a secret that ranks must name
    host        address to listen at; "": all of this machine
    returns     the port at which it listens, a free one
    """
    keeper = subprocess.Popen(
        [sys.executable, "-S", "-E", "-I", "-c", ENTRY.format(root=str(ROOT))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    # Not on the command line, which everybody on the machine can read.
    keeper.stdin.write(f"{world_size} {timeout_s!r} {token} {host}\n")
    keeper.stdin.close()
    with keeper.stdout as said:
        return int(said.readline())


def main() -> None:
    """Keep the board until the last rank has gone; stdin says for whom."""
    world_size, timeout_s, token, *host = sys.stdin.readline().split()
    listener = _listen(host[0] if host else "")
    print(listener.getsockname()[1], flush=True)
    for number in (0, 1):  # who has started this waits for the end of its output
        os.close(number)
    _Keeper(listener, int(world_size), float(timeout_s), token).run()


def _listen(host: str) -> socket.socket:
    if host:
        return socket.create_server((host, 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


class _Keeper:
    def __init__(self, listener: socket.socket, world_size: int, timeout_s: float, token: str):
        self.board, self.token = Board(world_size, timeout_s), token
        self.selector, self.listener = selectors.DefaultSelector(), listener
        self.selector.register(listener, selectors.EVENT_READ)
        self.ranks: dict[Channel, int] = {}
        self.voice = find_voice()

    def run(self) -> None:
        deadline_s, verdict = time.monotonic() + START_S, None
        while time.monotonic() < deadline_s:
            for key, _ in self.selector.select(WAIT_S):
                self._take(key.fileobj)
            if verdict is None:
                verdict = self._verdict()
                if verdict is not None:
                    self._end(verdict)
                    deadline_s = time.monotonic() + END_S
            if any(channel.open for channel in self.ranks):
                deadline_s = deadline_s if verdict is not None else time.monotonic() + START_S
            elif verdict is not None or self._all_is_well():
                return

    def _take(self, one: socket.socket | Channel) -> None:
        if one is self.listener:
            channel = Channel(self.listener.accept()[0], MAX_BYTES)
            self.selector.register(channel, selectors.EVENT_READ)
            return
        now_s = time.monotonic()
        for words, blob in one.read():
            if one in self.ranks:
                self.board.take(self.ranks[one], words, blob, now_s)
            elif not self._introduced(one, words):
                one.close()
                break
        if not one.open:
            self.selector.unregister(one)
            one.close()
            if one in self.ranks:
                self._note_end(self.ranks[one], now_s)

    def _introduced(self, channel: Channel, words: dict) -> bool:
        rank, token = words.get("rank"), words.get("token")
        known = words["kind"] == "hello" and rank in range(len(self.board.standings))
        known = known and isinstance(token, str) and hmac.compare_digest(token, self.token)
        if known and rank not in self.board.channels:
            self.ranks[channel], self.board.channels[rank] = rank, channel
            self.board.take(rank, words, b"", time.monotonic())
            return True
        return False

    def _note_end(self, rank: int, now_s: float) -> None:
        hello = self.board.hellos[rank]
        where = f"process {hello['pid']} on {hello['host']}"
        self.board.note_end(rank, f"({where}) ended without a word", now_s)

    def _all_is_well(self) -> bool:
        if self.board.interrupted:
            return True
        all_came = len(self.board.channels) == len(self.board.standings)
        return all_came and not (self.board.ended or self.board.raised)

    def _verdict(self) -> Verdict | None:
        # An interrupt from the keyboard ends all ranks, in any order.
        now_s = time.monotonic()
        of_late = now_s - self.board.interrupt_s < INTERRUPT_S
        return None if self.board.interrupted or of_late else self.board.verdict(now_s)

    def _end(self, verdict: Verdict) -> None:
        self._say(self._text(verdict).encode(errors="replace"))
        first = self.board.channels.get(verdict.rank) if verdict.kind == "raised" else None
        if first is not None:
            # Launchers name the rank that ends first as the one to blame.
            first.send("end")
            first.wait(FIRST_S)
            time.sleep(FIRST_S)
        for channel in self.ranks:
            channel.send("end")

    def _say(self, text: bytes) -> None:
        for voice in (self.voice, 2):
            with suppress(OSError):
                while text:
                    text = text[os.write(voice, text) :]
                return

    def _text(self, verdict: Verdict) -> str:
        lines = [verdict.message]
        if verdict.kind == "raised":
            words = self.board.raised[verdict.rank][1]
            lines = [verdict.message] if words["ours"] else [words["traceback"], verdict.message]
        if verdict.kind == "ended":
            lines.append("what it ended with is in the launcher's own message")
        return "\n".join([*lines, "All ranks were ended.\n"])
