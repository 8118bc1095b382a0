"""Ranks that are processes: how they are started, what they know and print, how they end."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from dataclasses import dataclass
from datetime import timedelta

import psutil
import pytest
import torch
from comm_runtimes import MPIRUN, started_by, why_not

from slimlab.comm import launch, mpirun, process_ranks
from slimlab.comm.launch import backend_or_threads, run_ranks
from slimlab.comm.launchers import launcher_of, mpi_family, rank_in
from slimlab.comm.outputs import HEAD_BYTES, TAIL_BYTES, Output
from slimlab.comm.report import CommunicationError, RankError, RanksTimeoutError
from slimlab.config import InputError

TIMEOUT_S = 60.0
SOON_S = 15.0


@pytest.fixture(params=["gloo", "mpich", "openmpi"])
def backend(request):
    if why_not(request.param) is not None:
        pytest.skip(why_not(request.param))
    with started_by(request.param) as name:
        yield name


def children():
    return {one.pid for one in psutil.Process().children(recursive=True)}


def run(program, world_size=2, backend="gloo", **options):
    before = children()
    try:
        return run_ranks(program, world_size, backend=backend, timeout_s=TIMEOUT_S, **options)
    finally:
        assert children() <= before


def test_results_come_in_rank_order_with_their_ledgers_and_output(backend, capsys):
    @dataclass
    class Found:
        rank: int
        total: torch.Tensor

    def program(comm, factor):
        print("rank", comm.rank)
        print(f"of {comm.world_size}\n", file=sys.stderr)
        total = comm.all_reduce(torch.full((3,), comm.rank * factor))
        return Found(comm.rank, total), comm.backend, torch.rand(2), random.random()

    torch.manual_seed(7)
    random.seed(8)
    expected = torch.rand(2), random.random()
    torch.manual_seed(7)
    random.seed(8)
    results = run(program, 3, backend, args=(2.0,))
    for rank, (found, name, drawn, drawn_too) in enumerate(results):
        # A class that only this test knows is the same on its way back.
        assert type(found) is Found
        assert found.rank == rank
        assert torch.equal(found.total, torch.full((3,), 6.0))
        assert name == backend
        assert torch.equal(drawn, expected[0])
        assert drawn_too == expected[1]
    # What the ranks have drawn, the caller has not.
    assert torch.equal(torch.rand(2), expected[0])
    assert [ledger.num_calls("all_reduce") for ledger in results.ledgers] == [1, 1, 1]
    assert [ledger.total_bytes() for ledger in results.ledgers] == [12, 12, 12]
    printed = capsys.readouterr()
    assert printed.out == "[0] rank 0\n[1] rank 1\n[2] rank 2\n"
    assert printed.err == "".join(f"[{rank}] of 3\n[{rank}] \n" for rank in range(3))


def test_large_results_arrive_from_all_ranks_at_once():
    def program(comm):
        return torch.full((2**22,), comm.rank, dtype=torch.float32)

    for rank, result in enumerate(run(program, 3)):
        assert result.shape == (2**22,)
        assert result[0] == result[-1] == rank


def test_a_result_that_cannot_travel_is_said_to():
    with pytest.raises(RankError, match="rank 0 cannot travel to the caller") as caught:
        run(lambda comm: (number for number in range(3)))
    assert isinstance(caught.value.__cause__, TypeError)
    assert "change: return tensors, numbers, texts" in str(caught.value)
    assert str(caught.value).endswith("at the end of its program")


def test_an_exception_of_ones_own_arrives_with_its_content_and_its_traceback():
    class BoomError(Exception):
        def __init__(self, first, second):
            super().__init__(f"{first} and {second}")
            self.first = first

    def explode(rank):
        if rank == 1:
            raise BoomError(torch.ones(2), "fire")

    with pytest.raises(RankError, match="rank 1 raised BoomError: tensor") as caught:
        run(lambda comm: explode(comm.rank))
    cause = caught.value.__cause__
    assert type(cause) is BoomError
    assert torch.equal(cause.first, torch.ones(2))
    assert "On rank 1:\nTraceback" in cause.__notes__[0]
    assert "in explode" in cause.__notes__[0]


def test_an_exception_that_cannot_travel_is_told_in_words():
    class Sticky(Exception):
        def __reduce__(self):
            raise TypeError("never")

    def program(comm):
        raise Sticky("here")

    with pytest.raises(RankError, match="rank 0 raised Sticky: here\nat line") as caught:
        run(program)
    assert caught.value.__cause__ is None
    assert 'raise Sticky("here")' in str(caught.value)


def test_much_output_is_cut_in_the_middle_and_says_so(capsys):
    def program(comm):
        if comm.rank == 1:
            print("first")
            for _ in range(1000):
                print("x" * 1023)
            print("\rbar 1\rbar 2")
            print("last")

    run(program)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1] first"
    assert lines[-2:] == ["[1] bar 2", "[1] last"]
    (note,) = [line for line in lines if "left out" in line]
    printed = 1000 * 1024 + len("first\n\rbar 1\rbar 2\nlast\n")
    assert note == f"[1] ... {printed - HEAD_BYTES - TAIL_BYTES:,} bytes left out ..."


def test_output_of_programs_that_a_rank_starts_is_kept_too(capsys):
    def program(comm):
        if comm.rank == 0:
            subprocess.run(["echo", "from outside"], check=True)
        else:
            os.write(1, b"no line\xff")

    run(program)
    assert capsys.readouterr().out == "[0] from outside\n[1] no line\N{REPLACEMENT CHARACTER}\n"


def test_output_that_never_ends_holds_up_nobody():
    read, write = os.pipe()
    os.set_blocking(write, False)
    output = Output(read)
    try:
        while True:
            os.write(write, b"x" * 65536)
    except BlockingIOError:
        pass
    output.read(limit=1)
    assert output.open
    os.close(write)
    output.read(limit=1000)
    assert not output.open
    output.close()


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_rank_has_started_ends_with_it():
    def program(comm):
        child = subprocess.Popen(["sleep", "600"])
        comm.barrier()
        return child.pid

    pids = run(program)
    deadline_s = time.monotonic() + SOON_S
    while any(map(runs, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not any(map(runs, pids))


def test_ranks_see_the_callers_memory_and_change_only_their_own():
    seen = [1]

    def program(comm):
        seen.append(comm.rank)
        return list(seen)

    assert run(program) == [[1, 0], [1, 1]]
    assert seen == [1]


class Kept:
    """Something that only the garbage collector frees, with what it holds."""

    def __init__(self, held):
        self.held, self.me = held, self


@pytest.mark.parametrize("kind", ["store", "group"])
def test_a_rank_does_not_collect_what_its_caller_has_left(kind):
    # Either waits, when it is freed, for threads that only the caller's process has.
    def program(comm):
        mine = weakref.ref(Kept(None))
        gc.collect()
        return mine() is None

    gc.collect()
    gc.disable()
    if kind == "store":
        Kept(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    else:
        alone = torch.distributed.HashStore(), 0, 1, timedelta(seconds=TIMEOUT_S)
        Kept(torch.distributed.ProcessGroupGloo(*alone))
    try:
        assert run(program) == [True, True]
        assert run(lambda comm: gc.isenabled()) == [False, False]
    finally:
        gc.enable()
    assert run(lambda comm: gc.isenabled()) == [True, True]
    assert gc.isenabled()


def test_a_rank_hears_no_interrupt_and_reads_nothing():
    def program(comm):
        os.kill(os.getpid(), signal.SIGINT)
        return sys.stdin.read(), int(os.environ["RANK"]), os.environ["WORLD_SIZE"]

    assert run(program) == [("", 0, "2"), ("", 1, "2")]


def test_run_ranks_works_in_a_thread_and_at_the_same_time_as_another():
    def program(comm, number):
        return comm.all_reduce(torch.tensor(number)).item()

    results = {}

    def start(number):
        results[number] = run_ranks(program, 2, backend="gloo", args=(number,), timeout_s=30)

    threads = [threading.Thread(target=start, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {1: [2, 2], 2: [4, 4]}


def test_calls_are_not_compared_on_request():
    def program(comm):
        return comm.broadcast(torch.ones(2), src=0)

    for result in run(program, check=False):
        assert torch.equal(result, torch.ones(2))


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_where_a_fork_is_not_safe_fresh_processes_go_on_from_the_caller(runtime, monkeypatch):
    if why_not(runtime) is not None:
        pytest.skip(why_not(runtime))
    monkeypatch.setattr(process_ranks, "why_no_fork", lambda backend: "for this test")

    @dataclass
    class Found:
        drawn: torch.Tensor

    def program(comm, number):
        comm.barrier()
        if number == comm.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.barrier()
        return Found(torch.rand(2)), threading.active_count()

    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with started_by(runtime) as backend:
        results = run(program, backend=backend, args=(2,))
        assert [torch.equal(found.drawn, expected) for found, _ in results] == [True, True]
        assert {type(found) for found, _ in results} == {Found}
        with pytest.raises(RankError, match="rank 1 (was killed by signal 9|ended without a word)"):
            run(program, backend=backend, args=(1,))


INTERRUPTED = """
import os, sys, time
import torch
from slimlab.comm.launch import run_ranks

def program(comm):
    comm.barrier()
    if comm.rank == 0:
        print("ready", flush=True)
        os.write({ready}, b"x")
    while True:
        time.sleep(0.01)

try:
    run_ranks(program, 2, backend={backend!r}, timeout_s=100)
except KeyboardInterrupt:
    print("interrupted")
"""


def start_marked(backend):
    """Start a program whose ranks run for ever; returns it, its mark, once the ranks run."""
    read, write = os.pipe()
    mark = uuid.uuid4().hex
    started = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED.format(ready=write, backend=backend)],
        env=os.environ | {"SLIMLAB_MARK": mark, "TMPDIR": os.environ.get("TMPDIR", "/tmp")},
        pass_fds=[write],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    return started, mark


def marked(mark):
    found = []
    for one in psutil.process_iter():
        try:
            if one.environ().get("SLIMLAB_MARK") == mark:
                found.append(one)
        except psutil.Error:
            continue
    return found


def gone(mark):
    deadline_s = time.monotonic() + SOON_S
    while marked(mark) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not marked(mark)


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_nothing_is_left_after_an_interrupt_from_the_keyboard(runtime, tmp_path, monkeypatch):
    if why_not(runtime) is not None:
        pytest.skip(why_not(runtime))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started_by(runtime) as backend:
        started, mark = start_marked(backend)
    assert len(marked(mark)) >= 3
    started.send_signal(signal.SIGINT)
    said, _ = started.communicate(timeout=SOON_S)
    assert said == "[0] ready\ninterrupted\n"
    assert gone(mark)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_nothing_is_left_after_the_caller_was_killed(runtime, tmp_path, monkeypatch):
    if why_not(runtime) is not None:
        pytest.skip(why_not(runtime))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started_by(runtime) as backend:
        started, mark = start_marked(backend)
    assert len(marked(mark)) >= 3
    started.kill()
    started.communicate(timeout=SOON_S)
    assert gone(mark)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "smoke"}, "backend: one of threads, mpi, gloo, nccl"),
        ({"backend": "gloo", "world_size": 65}, "at most 64 ranks"),
        ({"backend": "gloo", "eager_bytes": 3}, "eager_bytes with threads only"),
        ({"backend": "gloo", "timeout_s": 0}, "timeout_s = 0"),
        ({"backend": "gloo", "args": 5}, r"args=\(x,\)"),
    ],
)
def test_bad_arguments_are_refused_before_a_process_starts(arguments, message):
    with pytest.raises(InputError, match=message):
        run_ranks(**{"program": lambda comm: None, "world_size": 2, **arguments})


def test_without_mpi_a_chapter_falls_back_and_a_run_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("SLIMLAB_MPIRUN", "/nowhere/mpirun")
    with pytest.raises(InputError, match="no mpirun SLIMLAB_MPIRUN = /nowhere/mpirun") as caught:
        run_ranks(lambda comm: None, 2, backend="mpi")
    assert "python -m pip install mpi4py mpich" in str(caught.value)
    assert backend_or_threads("mpi") == "threads"
    assert capsys.readouterr().out.startswith("mpi cannot be used here (there is no mpirun")
    monkeypatch.setattr(mpirun.importlib.util, "find_spec", lambda name: None)
    assert launch.why_not("mpi").startswith("mpi4py is not installed")
    assert backend_or_threads("gloo") == "gloo"
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_nccl_is_refused_without_a_gpu_for_each_rank():
    with pytest.raises(InputError, match="backend = 'nccl': "):
        run_ranks(lambda comm: None, 2, backend="nccl")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_what_mpirun_says_is_passed_on_if_it_does_not_start_the_ranks(tmp_path, monkeypatch):
    mpirun_of = script(tmp_path / "mpirun", "echo no slots are left >&2; exit 3")
    monkeypatch.setenv("SLIMLAB_MPIRUN", mpirun_of)
    with pytest.raises(CommunicationError, match="exit status 3 before 2 ranks") as caught:
        run_ranks(lambda comm: None, 2, backend="mpi")
    assert str(caught.value).endswith("no slots are left")
    monkeypatch.setenv("SLIMLAB_MPIRUN", script(tmp_path / "mpirun", "exec sleep 600"))
    with pytest.raises(RanksTimeoutError, match="had not started 2 ranks after 0.3 s"):
        run_ranks(lambda comm: None, 2, backend="mpi", timeout_s=0.3)
    assert not [one for one in psutil.Process().children() if one.name() == "sleep"]


@pytest.mark.skipif(why_not("openmpi") is not None, reason="Open MPI is not installed")
@pytest.mark.parametrize(("launcher", "family"), [("openmpi", "MPICH"), ("mpich", "Open MPI")])
def test_the_library_of_another_mpi_than_the_launchers_is_refused(launcher, family, monkeypatch):
    other = {"openmpi": "mpich", "mpich": "openmpi"}[launcher]
    library = next((MPIRUN[other].parents[1] / "lib").glob("libmpi.so.?[02]"))
    variables = {mpirun.LIBRARY_VARIABLE: str(library)}
    monkeypatch.setattr(mpirun, "library_variables", lambda: variables)
    with started_by(launcher) as backend, pytest.raises(InputError, match=family) as caught:
        run(lambda comm: None, backend=backend)
    assert "change: start the program with" in str(caught.value)


def test_more_ranks_than_cores_start_also_as_root():
    # Open MPI refuses both unless told otherwise.
    for runtime in ("mpich", "openmpi"):
        if why_not(runtime) is None:
            with started_by(runtime) as backend:
                ranks = len(os.sched_getaffinity(0)) + 1
                assert run(lambda comm: comm.world_size, ranks, backend) == [ranks] * ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("alone", 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ("alone", 1)),  # a batch script itself
        ({"OMPI_COMM_WORLD_SIZE": "3", "PMIX_RANK": "1"}, ("mpi", 3)),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "PMI_FD": "7"}, ("mpi", 2)),
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, ("mpi", 4)),  # mpirun in an allocation
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "4"}, ("mpi", 4)),
        ({"PMIX_RANK": "1"}, ("mpi", None)),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, ("mpi", 4)),
        ({"SLURM_STEP_NUM_TASKS": "1"}, ("alone", 1)),
        (
            {
                "RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            ("torch", 8),
        ),
        ({"RANK": "0", "WORLD_SIZE": "8"}, ("alone", 1)),
    ],
)  # fmt: skip
def test_who_has_started_a_process_is_told_by_its_environment(environment, expected):
    launcher = launcher_of(environment)
    assert (launcher.kind, launcher.world_size) == expected


def test_ranks_and_families_are_read():
    assert rank_in({"OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "9"}) == 3
    assert rank_in({"PMI_RANK": "2", "SLURM_PROCID": "0"}) == 2
    assert mpi_family("Open MPI v5.0.11, package: x") == "Open MPI"
    assert mpi_family("MPICH Version: 5.0.2") == "MPICH"
    assert mpi_family("something") == ""


ALONE = """
import torch
from slimlab.comm.connect import connect
comm = connect()
assert connect() is comm
comm.barrier()
print(comm, comm.all_reduce(torch.ones(2)).tolist())
"""


def test_a_program_that_nobody_has_started_with_others_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.stdout == "ThreadCommunicator(rank=0, world_size=1) [1.0, 1.0]\n", done.stderr


def test_a_world_of_one_is_refused_where_more_were_started(monkeypatch):
    # srun --mpi=none tells its ranks nothing, and each is rank 0 of 1.
    env = os.environ | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}
    program = "from slimlab.comm.connect import connect; connect()"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "asked for: a world of 4 ranks, as srun has started" in done.stderr
    assert "srun --mpi=pmi2" in done.stderr
