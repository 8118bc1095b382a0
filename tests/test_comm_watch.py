"""What goes wrong on ranks that are processes: one message in time, and nothing left behind.

The table of cases is in failure_cases; the last tests here are the parts it rests on.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid

import psutil
import pytest
from comm_runtimes import why_not
from failure_cases import (
    CASES,
    EVERYWHERE,
    OUTSIDE,
    command,
    environment,
    run_case,
    run_outside,
)

from slimlab.comm.board import Board
from slimlab.comm.calls import Call, Progress
from slimlab.comm.channel import SIZES, Channel
from slimlab.comm.counts import Counts
from slimlab.comm.keeper import start_keeper
from slimlab.comm.standing import INTERRUPT_S, Standing
from slimlab.comm.stuck import stuck_ranks
from slimlab.comm.watch import Watch

# Generous: what is measured is in the docs. Nothing may come anywhere near a hang.
SOON_S = 15.0


def children():
    return {one.pid for one in psutil.Process().children(recursive=True)}


def marked(mark):
    """The processes that were started with a mark in their environment."""
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("SLIMLAB_MARK") == mark:
                found.append(one)
        except psutil.Error:
            continue
    return found


def gone(mark, within_s=5.0):
    deadline_s = time.monotonic() + within_s
    while marked(mark) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not marked(mark)


def pairs(attribute):
    return [
        pytest.param(name, runtime, id=f"{name}, {runtime}")
        for name, case in CASES.items()
        for runtime in getattr(case, attribute)
    ]


@pytest.mark.parametrize(("name", "runtime"), pairs("runtimes"))
def test_each_case_ends_in_time_with_a_message_that_names_the_odd_rank(name, runtime, capsys):
    if why_not(runtime) is not None:
        pytest.skip(why_not(runtime))
    case, before = CASES[name], children()
    expected, says = case.error, case.says
    if runtime == "threads" and case.on_threads:
        expected, says = case.on_threads
    error, seconds = run_case(name, runtime)
    assert type(error) is expected, error
    for words in says:
        assert words in str(error), error
    assert seconds < (case.timeout_s if case.timeout_s < SOON_S else 0.0) + SOON_S
    assert children() <= before


@pytest.mark.parametrize(("name", "launcher"), pairs("outside"))
def test_each_case_started_from_outside_ends_with_one_message(name, launcher, monkeypatch):
    if why_not(OUTSIDE[launcher]) is not None:
        pytest.skip(why_not(OUTSIDE[launcher]))
    mark = uuid.uuid4().hex
    monkeypatch.setenv("SLIMLAB_MARK", mark)
    done, _ = run_outside(name, launcher)
    assert done.returncode != 0
    for words in CASES[name].says:
        assert words in done.stderr, done.stderr
    assert done.stderr.count("All ranks were ended.") == 1
    assert done.stderr.count("Traceback (most recent call last)") <= 1 + (launcher == "torchrun")
    if name == "is killed":
        # The launcher adds what the rank ended with.
        assert re.search("EXIT CODE: 9|[Ss]ignal 9", done.stdout + done.stderr)
    assert gone(mark)


def test_every_case_is_tested_on_all_runtimes_that_it_can_happen_on():
    for name, case in CASES.items():
        assert case.outside or "threads" in case.runtimes, name
        assert set(case.runtimes) <= set(EVERYWHERE)
        assert set(case.outside) <= set(OUTSIDE)
    for launcher in OUTSIDE:
        assert sum(launcher in case.outside for case in CASES.values()) >= 2


PORT_TAKEN = """
import sys
from slimlab.comm.connect import connect
connect(timeout_s=5)
"""


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", PORT_TAKEN],
            env=env | {"MASTER_PORT": port},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert f"could not listen at 127.0.0.1:{port}, as MASTER_ADDR and" in done.stderr
    assert "change: choose a port that no other program uses" in done.stderr


def standing(state="waits", **more):
    one = Standing(state=state, call=f"{more.get('name', 'recv')}()", **more)
    one.counts = Counts()
    return one


def test_two_receives_wait_for_ever_unless_a_message_is_under_way():
    ranks = [
        standing(name="recv", source=(1, 0)),
        standing(name="recv", source=(0, 0)),
    ]
    assert set(stuck_ranks(ranks)) == {0, 1}
    assert stuck_ranks(ranks)[0].text == ("rank 0: no message with tag 0 from rank 1 is under way")
    ranks[1].counts.sent[0, 0, None] = 1
    assert stuck_ranks(ranks) == {}  # rank 0 may go on, and then send to rank 1
    ranks[0].counts.received[1, 0, None] = 1
    assert set(stuck_ranks(ranks)) == {0, 1}


def test_a_rank_that_computes_releases_those_that_wait_for_it():
    ranks = [
        standing(name="recv", source=(1, 0)),
        standing(name="recv", source=(2, 0)),
        standing("computes"),
    ]
    assert stuck_ranks(ranks) == {}
    ranks[2].state = "has finished"
    assert set(stuck_ranks(ranks)) == {0, 1}


def test_a_send_is_stuck_until_its_receiver_asks():
    ranks = [
        standing(name="send", target=(1, 5)),
        standing(name="recv", source=(0, 6)),
    ]
    ranks[0].counts.sent[1, 5, None] = 1
    ranks[1].counts.asked[0, 6, None] = 1
    assert stuck_ranks(ranks)[0].by_send
    assert not stuck_ranks(ranks)[1].by_send
    ranks[1].counts.asked[0, 5, None] = 1  # an irecv that was begun before
    assert stuck_ranks(ranks) == {}


def test_a_collective_is_stuck_only_for_ranks_that_came_too_late():
    ranks = [
        standing(name="all_reduce"),
        standing(name="recv", source=(0, 0)),
    ]
    ranks[0].counts.come[None] = 2
    ranks[0].counts.gone[None] = 1
    ranks[1].counts.come[None] = 1
    assert stuck_ranks(ranks)[0].text == ("all_reduce: every rank must call it; missing: rank 1")
    ranks[1].counts.come[None] = 2  # a started call that it has not waited for
    assert stuck_ranks(ranks) == {}


def test_a_rank_that_has_come_to_another_collective_releases_nobody():
    ranks = [
        standing(name="barrier"),
        standing(name="recv", source=(0, 0)),
    ]
    for rank in ranks:
        rank.counts.come[None] = 1
    ranks[1].counts.last[None] = "barrier()"
    assert stuck_ranks(ranks) == {}
    ranks[1].counts.last[None] = "all_reduce(float32 (2,), op=sum)"
    hint = stuck_ranks(ranks)[0]
    assert hint.differs
    assert hint.text == "rank 1 has begun all_reduce(float32 (2,), op=sum), rank 0 barrier()"


def test_groups_of_other_ranks_do_not_matter():
    ranks = [
        standing(name="barrier", group=(0, 1)),
        standing(name="barrier", group=(0, 1)),
        standing(name="recv", source=(0, 0)),
    ]
    for rank in (0, 1):
        ranks[rank].counts.come[0, 1] = 1
    assert stuck_ranks(ranks) == {}


def test_counts_survive_their_journey():
    progress = Progress()
    group = (1, 3)
    for call in (
        Call("send", target=(1, 2)),
        Call("irecv", source=(1, 2), group=group),
        Call("barrier", group=group),
        Call("sendrecv", source=(0, 1), target=(2, 1)),
        Call("finish"),
    ):
        with progress.inside(call):
            pass
    counts = progress.counts
    assert counts.sent == {(1, 2, None): 1, (2, 1, None): 1}
    assert counts.asked == {(1, 2, group): 1, (0, 1, None): 1}
    assert counts.received == {(0, 1, None): 1}
    assert counts.come == counts.gone == {group: 1}
    assert counts.last == {group: Call("barrier", group=group)}
    again = Counts.from_lists(json.loads(json.dumps(counts.as_lists())))
    assert again.last == {group: "barrier() in group (1, 3)"}
    counts.last = again.last
    assert vars(again) == vars(counts)


def test_a_started_collective_is_done_when_it_was_waited_for():
    progress = Progress()
    with progress.inside(Call("all_reduce")):
        pass
    handle = progress.start(Call("all_reduce"), lambda: None)
    assert (progress.counts.come[None], progress.counts.gone[None]) == (1, 0)
    handle.wait()
    assert (progress.counts.come[None], progress.counts.gone[None]) == (1, 1)


def row(state="waits", call="recv(src=1, tag=0)", for_s=0.0, **more):
    words = {"kind": "row", "state": state, "call": call, "name": "recv", "for_s": for_s}
    words |= {"source": [1, 0], "target": None, "group": None, "num_calls": 1, "counts": None}
    return words | {"line": "line 1 of f: x"} | more


def test_a_deadlock_is_believed_only_after_all_have_stood_still():
    board = Board(2, None)
    counts = Counts().as_lists()
    board.take(0, row(counts=counts, for_s=5.0), b"", 100.0)
    board.take(1, row(counts=counts, for_s=0.5, source=[0, 0]), b"", 100.0)
    assert board.verdict(100.1) is None
    assert board.verdict(101.1) is None  # both reports are too old by now
    board.take(0, row(counts=counts, for_s=6.5), b"", 101.1)
    board.take(1, row(counts=counts, for_s=1.6, source=[0, 0]), b"", 101.1)
    assert board.verdict(101.1).kind == "deadlock"


HELLO = {"kind": "hello", "rank": 0, "pid": 1, "host": "elsewhere", "memory": None}


def test_a_rank_that_waits_too_long_names_the_one_that_it_waits_for():
    board = Board(3, 5.0)
    for rank in (0, 1):
        board.take(rank, HELLO, b"", 10.0)
    board.take(0, row("starts", "", for_s=4.0), b"", 14.0)
    assert board.verdict(14.5) is None
    message = board.verdict(15.5).message
    assert message.startswith("rank 0 has waited 5 s for the others to connect\n")
    assert "2     has not come" in message
    board.take(2, HELLO, b"", 15.0)
    for rank in (0, 1, 2):
        board.take(rank, row("computes", ""), b"", 16.0)
    assert board.verdict(22.0) is None
    board.take(0, row(for_s=6.0), b"", 22.0)
    assert board.verdict(22.0).message.startswith("rank 0 has waited 5 s in recv(src=1, tag=0)\n")


def test_a_rank_that_has_finished_does_not_wait_for_ever_for_one_that_computes():
    board = Board(2, 5.0)
    board.take(0, row("has finished", "finish()", for_s=6.0), b"", 10.0)
    board.take(1, row("computes", ""), b"", 10.0)
    message = board.verdict(10.0).message
    assert message.startswith("rank 0 has waited 5 s for the others to finish\n")
    assert "the odd one: rank 1, since the others have finished" in message
    board.take(0, {"kind": "farewell", "interrupted": False}, b"", 10.0)
    assert board.verdict(10.0) is None


def raised(error, *, consequence=False):
    words = {"kind": "raised", "error": error, "type": error, "line": "line 2 of g", "ours": False}
    return words | {"traceback": "", "starts": False, "consequence": consequence}


def test_a_lost_connection_is_blamed_on_the_rank_that_was_lost():
    board = Board(2, None)
    board.take(0, raised("CommunicationError: lost rank 1", consequence=True), b"", 10.0)
    assert board.verdict(10.5) is None
    board.note_end(1, "was killed by signal 9 (SIGKILL)", 10.5)
    verdict = board.verdict(10.6)
    assert verdict.message.startswith("rank 1 was killed by signal 9 (SIGKILL)")
    assert "has lost another rank" in verdict.message


def test_a_lost_connection_without_a_reason_is_told_in_the_end():
    board = Board(2, None)
    board.take(0, raised("CommunicationError: lost rank 1", consequence=True), b"", 10.0)
    assert board.verdict(11.1).rank == 0


def test_of_ranks_that_raise_together_the_lowest_is_named():
    board = Board(3, None)
    board.take(2, raised("ValueError"), b"", 10.0)
    assert board.verdict(10.01) is None
    board.take(1, raised("KeyError"), b"", 10.02)
    assert board.verdict(10.1).rank == 1


def test_a_channel_that_another_thread_has_closed_brings_nothing():
    here, _there = socket.socketpair()
    channel = Channel(here)
    channel.close()
    assert channel.wait(0.0) == []
    assert not channel.open


def test_a_channel_takes_whatever_comes_in_pieces_and_refuses_strangers():
    here, there = socket.socketpair()
    channel = Channel(there, max_bytes=1000)
    data = bytes(range(100))
    Channel(here).send("result", data, rank=3)
    assert channel.wait(1.0) == [({"kind": "result", "rank": 3}, data)]
    text = b'{"kind": "row"}'
    frame = SIZES.pack(len(text), 2) + text + b"ab"
    here.sendall(frame[:7])
    assert channel.wait(1.0) == []
    here.sendall(frame[7:])
    assert channel.wait(1.0) == [({"kind": "row"}, b"ab")]
    for junk in (b"GET / HTTP/1.1\r\n\r\n", SIZES.pack(2, 0) + b"[]", SIZES.pack(1, 0) + b"x"):
        one, other = socket.socketpair()
        stranger = Channel(other, max_bytes=1000)
        one.sendall(junk)
        assert stranger.wait(1.0) == []
        assert not stranger.open


def test_a_keeper_listens_to_those_only_who_know_its_secret(capfd):
    port = start_keeper(1, 1.0, "secret", "127.0.0.1")
    hello = {"rank": 0, "pid": os.getpid(), "host": "here", "memory": None}
    stranger = Channel(socket.create_connection(("127.0.0.1", port)))
    stranger.send("hello", token="guess", **hello)
    assert stranger.expect("end", 5.0) is None
    assert not stranger.open
    rank = Channel(socket.create_connection(("127.0.0.1", port)))
    rank.send("hello", token="secret", **hello)
    rank.send(**row(for_s=2.0))
    assert rank.expect("end", 5.0) is not None
    rank.close()
    assert "rank 0 has waited 1 s in recv(src=1, tag=0)" in capfd.readouterr().err


STOPPED = """
import sys, time
import torch
from slimlab.comm.connect import connect

comm = connect(timeout_s=90)
if comm.rank == 0:
    print("ready", flush=True)
try:
    while True:
        comm.all_reduce(torch.ones(2))
except KeyboardInterrupt:
    time.sleep(1.5 * comm.rank)  # longer than a deadlock has to stand still
    sys.exit(3)
"""


@pytest.mark.parametrize("launcher", ["mpirun of MPICH", "torchrun"])
def test_a_program_that_ends_itself_after_an_interrupt_is_not_taken_for_stuck(
    launcher, monkeypatch, tmp_path
):
    if why_not(OUTSIDE[launcher]) is not None:
        pytest.skip(why_not(OUTSIDE[launcher]))
    mark, program = uuid.uuid4().hex, tmp_path / "stopped.py"
    program.write_text(STOPPED)
    monkeypatch.setenv("SLIMLAB_MARK", mark)
    started = subprocess.Popen(
        [*command(launcher, 2), program],
        env=environment(launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "ready" not in started.stdout.readline():
        assert started.poll() is None
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=60)  # before any time limit
    assert started.returncode != 0
    assert "All ranks were ended." not in said
    assert gone(mark)


def test_the_ear_for_interrupts_hears_while_the_main_thread_is_busy_and_forgets(monkeypatch):
    here, there = socket.socketpair()
    board, watch = Channel(here), Watch(Channel(there), 0, must_last=False)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        watch.hear_interrupts()
        assert not watch.heard_interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.heard_interrupt()
        assert board.expect("interrupted", SOON_S)
        later_s = time.monotonic() + INTERRUPT_S
        monkeypatch.setattr(time, "monotonic", lambda: later_s)
        assert not watch.heard_interrupt()
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, before)
        monkeypatch.undo()
        watch.farewell()
