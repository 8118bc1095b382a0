"""Programs that do to their ranks what nobody has planned for."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import types
from contextlib import redirect_stdout

import psutil
import pytest
import torch
from comm_runtimes import started_by, why_not
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from traitlets.config import Config

from slimlab.comm import launch
from slimlab.comm.connect import connect
from slimlab.comm.interrupts import held_interrupts
from slimlab.comm.launch import run_ranks
from slimlab.comm.launchers import launcher_of
from slimlab.comm.outputs import Output
from slimlab.comm.process_ranks import why_no_fork
from slimlab.comm.processes import Run
from slimlab.comm.report import RankError, frames_of, user_line
from slimlab.comm.shipping import Surroundings
from slimlab.config import InputError

TIMEOUT_S = 60.0


def run(program, world_size=2, runtime="gloo"):
    if why_not(runtime) is not None:
        pytest.skip(why_not(runtime))
    with started_by(runtime) as backend:
        return run_ranks(program, world_size, backend=backend, timeout_s=TIMEOUT_S)


def kept(data):
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return Output(read)


def test_a_frame_between_two_lines_is_shown_with_the_first_line_of_its_function():
    found = []
    # Without its table of lines, a function is at none.
    code = (lambda: found.append(sys._getframe())).__code__.replace(co_linetable=b"")
    types.FunctionType(code, globals(), closure=(types.CellType(found),))()
    assert found[0].f_lineno is None
    line = user_line(frames_of(found[0]))
    assert line.startswith(f"line {code.co_firstlineno} of <lambda>: code = (lambda: found.append(")


def test_the_line_named_is_the_programs_and_not_one_of_pythons_library():
    def program(comm):
        subprocess.run(["false"], check=True)

    with pytest.raises(RankError, match=r"of program: subprocess\.run\(\[\"false\"\], check=True"):
        run(program, 1)


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (b"\r  0%\r100%\n", "> 100%\n"),
        (b"\r 50%\r", ">  50%\n"),
        (b"windows\r\nlines\r\n", "> windows\n> lines\n"),
        ("one\N{LINE SEPARATOR}line\n\nlast".encode(), "> one\N{LINE SEPARATOR}line\n> \n> last\n"),
        (b"", ""),
        (b"\n", "> \n"),
    ],
)
def test_only_the_last_state_of_a_line_is_shown(written, shown, capsys):
    output = kept(written)
    output.close()
    output.show("> ", sys.stdout)
    assert capsys.readouterr().out == shown


def test_a_rank_may_close_its_output_or_replace_it_by_nothing(capsys):
    def program(comm):
        print("before")
        if comm.rank == 0:
            sys.stdout.close()
        else:
            sys.stdout = sys.stderr = None
        return comm.rank

    assert run(program) == [0, 1]
    assert capsys.readouterr().out == "[0] before\n[1] before\n"


def test_a_process_that_a_rank_forks_ends_as_it_would_elsewhere(capsys):
    def program(comm):
        ends = []
        for end in (0, 3, None, "words", ValueError):
            pid = os.fork()
            if pid == 0:
                if end is None:
                    return "the child's result"
                raise end("from a fork") if end is ValueError else SystemExit(end)
            ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        comm.barrier()
        return ends

    assert run(program) == [[0, 3, 0, 1, 1]] * 2
    said = capsys.readouterr().err
    assert said.count("words") == 2
    assert said.count("ValueError: from a fork\n") == 2
    assert said.count("Traceback") == 2


def test_a_communicator_does_not_leave_its_rank():
    def program(comm):
        return {"model": torch.nn.Identity(), "comm": comm.split(0)}

    with pytest.raises(RankError, match="it holds a communicator, which belongs to its rank"):
        run(program)


def test_a_rank_can_start_ranks_of_its_own():
    def program(comm):
        reason = why_no_fork("gloo")
        inner = run_ranks(lambda one: one.all_reduce(torch.tensor(comm.rank)).item(), 2)
        return reason, inner

    for rank, (reason, inner) in enumerate(run(program)):
        assert reason.startswith("this process is connected by torch.distributed")
        assert inner == [2 * rank] * 2
    assert why_no_fork("gloo") is None


def test_an_interrupt_stays_deliverable_after_ranks_were_forked():
    def program(comm):
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

    assert run(program) == [False, False]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_interrupts_wait_for_the_end_of_a_block_and_count_as_one():
    steps = []

    def pressed_three_times():
        with held_interrupts():
            for _ in range(3):
                interrupt()
            steps.append("went on")
        steps.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        pressed_three_times()
    assert steps == ["went on"]
    with held_interrupts():
        steps.append("nothing came")
    with pytest.raises(KeyboardInterrupt):
        interrupt()


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_more_interrupts_do_not_keep_the_first_from_ending_all_ranks(runtime, monkeypatch):
    end, ranks = Run.end, []

    def end_under_fire(self, kindly):
        ranks.extend(one.pid for one in self.ranks.values())
        interrupt()
        end(self, kindly)
        interrupt()

    monkeypatch.setattr(Run, "end", end_under_fire)
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyboardInterrupt):
        run(lambda comm: comm.barrier(), runtime=runtime)
    assert len(ranks) == 2
    assert {one.pid for one in psutil.Process().children(recursive=True)} <= before


def test_what_a_logger_of_the_caller_writes_on_a_rank_is_that_ranks_output(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    handler = logging.StreamHandler()
    log = logging.getLogger("attacks")
    log.addHandler(handler)
    try:
        run(lambda comm: log.error("from rank %d", comm.rank))
        log.error("from the caller")
    finally:
        log.removeHandler(handler)
    assert shown.getvalue() == "[0] from rank 0\n[1] from rank 1\nfrom the caller\n"


def test_a_rank_that_was_forked_from_a_notebook_displays_as_text_and_has_no_keyboard(capsys):
    class Browser(DisplayPublisher):
        def publish(self, *args, **more):
            raise AssertionError("only the caller is connected to it")

    def program(comm):
        display({"rank": comm.rank})
        with pytest.raises(EOFError, match="a rank has no keyboard: ask in the caller"):
            input("who are you? ")

    config = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell.instance(config=config, display_pub_class=Browser)
    try:
        run(program)
        assert type(shell.display_pub) is Browser
    finally:
        InteractiveShell.clear_instance()
    assert capsys.readouterr().out == "[0] {'rank': 0}\n[1] {'rank': 1}\n"


def test_what_slurm_has_told_the_caller_does_not_reach_ranks_of_mpi(monkeypatch):
    # As in a shell of `srun --pty`. MPICH ends a process that hears of two launchers.
    for name, text in {
        "PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, text)
    found = run(lambda comm: sorted(os.environ.keys() & {"PMIX_RANK", "PMI_RANK"}), runtime="mpich")
    assert found == [["PMI_RANK"]] * 2
    assert os.environ["PMIX_RANK"] == "0"


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_a_caller_may_have_closed_its_input(runtime):
    kept_open = os.dup(0)
    os.close(0)
    try:
        assert run(lambda comm: comm.all_reduce(torch.ones(())).item(), runtime=runtime) == [2, 2]
    finally:
        os.dup2(kept_open, 0)
        os.close(kept_open)


CLOSED = """
import sys
from slimlab.comm.session import look_after
class Comm:
    def close(self):
        sys.stderr.write("closed\\n")
look_after(Comm(), None, lambda: None, lambda: __import__("os")._exit(7))
sys.stdout.close()
raise ValueError("said to nobody")
"""


def test_a_program_started_from_outside_may_close_its_output_and_fail():
    done = subprocess.run([sys.executable, "-c", CLOSED], capture_output=True, text=True)
    assert done.returncode == 7
    assert done.stderr.endswith("ValueError: said to nobody\n")
    assert "excepthook" not in done.stderr


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_a_default_device_of_the_program_is_not_taken_for_headers_and_comparisons(runtime):
    def program(comm):
        x, large = torch.arange(4.0), torch.ones(2**17)
        torch.set_default_device("meta")
        whole, peer = comm.split(0), 1 - comm.rank
        results = [
            comm.all_reduce(x),
            comm.all_gather(x[: comm.rank + 1], sizes=[1, 2]),
            comm.scatter(x if comm.rank == 0 else None, 0),
            comm.all_to_all(x),
            whole.sendrecv(large, peer, peer),
            comm.sendrecv(x, peer, peer),
        ]
        return {result.device.type for result in results}

    assert run(program, runtime=runtime) == [{"cpu"}, {"cpu"}]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no /dev/shm")
def test_ranks_of_mpi_that_are_killed_leave_no_shared_memory():
    def program(comm):
        comm.barrier()
        with open("/proc/self/maps") as maps:
            print(maps.read())
        if comm.rank == 1:
            raise ValueError("so that both are killed")
        comm.barrier()

    with redirect_stdout(io.StringIO()) as shown, pytest.raises(RankError, match="both are killed"):
        run(program, runtime="mpich")
    segments = set(re.findall(r"/dev/shm/\w+", shown.getvalue()))
    assert segments
    assert not [path for path in segments if os.path.exists(path)]


def test_threads_compute_gradients_only_where_the_caller_does():
    def program(comm):
        return torch.is_grad_enabled()

    with torch.no_grad():
        assert run_ranks(program, 2) == run(program) == [False, False]
    assert run_ranks(program, 2) == run(program) == [True, True]


def test_a_fresh_process_goes_on_with_the_callers_settings_of_torch():
    with torch.no_grad():
        there = Surroundings(run)
    assert torch.is_grad_enabled()
    there.dtype = torch.float64
    try:
        there.enter()
        assert torch.ones(1).dtype == torch.float64
        assert not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


def test_a_forked_rank_keeps_one_thread_since_with_more_it_may_hang():
    def program(comm):
        torch.set_num_threads(1)
        with pytest.warns(UserWarning, match="has one thread for torch's work, not 2") as warned:
            torch.set_num_threads(2)
        return torch.get_num_threads(), len(warned), warned[0].filename

    assert run(program, 1) == [(1, 1, __file__)]


def test_a_shell_that_srun_has_started_runs_programs_alone_and_under_mpirun():
    shell = {"PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert launcher_of(shell).kind == "alone"
    assert launcher_of(shell | {"PMI_SIZE": "2", "PMI_RANK": "1"}).world_size == 2
    # Another launcher with PMIx, in such a shell.
    assert launcher_of(shell | {"PMIX_NAMESPACE": "prterun-host-5@1"}).kind == "mpi"


def test_a_folder_in_the_place_of_mpirun_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMLAB_MPIRUN", str(tmp_path))
    assert str(tmp_path) in (launch.why_not("mpi") or "")


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), 0, -1, "60", None, True])
def test_a_program_started_from_outside_needs_a_time_limit_too(limit):
    with pytest.raises(InputError, match=f"timeout_s = {limit!r}"):
        connect(timeout_s=limit)
