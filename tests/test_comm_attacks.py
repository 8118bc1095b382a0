"""Programs that do to their ranks what nobody has planned for."""

import os
import signal
import subprocess
import sys
import types

import pytest
import torch

from slimlab.comm.launch import run_ranks
from slimlab.comm.outputs import Output
from slimlab.comm.process_ranks import why_no_fork
from slimlab.comm.report import RankError, frames_of, user_line

TIMEOUT_S = 60.0


def run(program, world_size=2, **options):
    return run_ranks(program, world_size, backend="gloo", timeout_s=TIMEOUT_S, **options)


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
