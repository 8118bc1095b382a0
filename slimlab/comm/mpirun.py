"""Start ranks with mpirun and connect them with MPI, from a process that goes on living.

A part of slimlab.comm.launch. mpirun starts a stub per rank (slimlab.comm.mpi_stub), which hands
over what makes a process a rank of MPI; then this process forks and the fork is the rank. So four
ranks are there in half a second instead of the eight that importing torch four times takes on two
cores. mpirun only lets the ranks find each other; whether they live is watched here.

Production programs are started by mpirun itself, on many hosts: slimlab.comm.connect.
"""

import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from slimlab.comm import mpi_stub
from slimlab.comm.launchers import CHOICE_VARIABLE, find_mpirun, rank_in
from slimlab.comm.mpi_start import INSTALL, LIBRARY_VARIABLE
from slimlab.comm.process_ranks import packed, rank_variables, spawn_command
from slimlab.comm.processes import Run, close_all
from slimlab.comm.rank_process import Task
from slimlab.comm.report import CommunicationError, RanksTimeoutError
from slimlab.comm.shipping import name_classes

# What another launcher has told this process is not for the ranks that it starts, and they are to
# stay on this machine. Settings of users (..._MCA_...) stay.
FOREIGN = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "HYDI_", "HYDRA_", "MPI_LOCAL", "SLURM_", "PBS_")
# Open MPI refuses to start more ranks than cores, and to start for root, unless told otherwise.
SETTINGS = {
    "HYDRA_LAUNCHER": "fork",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
LIBRARIES = ("libmpi.so.12", "libmpi.so.40", "libmpi.12.dylib", "libmpi.40.dylib")
# mpirun tidies up after itself if it is given the time.
TIDY_S = 1.0
WAIT_S = 0.05
MAX_FOLDER_LETTERS = 80


def why_no_mpi() -> str | None:
    """Tell why MPI cannot be used on this machine, or None if it can."""
    if importlib.util.find_spec("mpi4py") is None:
        return f"mpi4py is not installed; {INSTALL}"
    if find_mpirun() is None:
        chosen = os.environ.get(CHOICE_VARIABLE)
        where = f"{CHOICE_VARIABLE} = {chosen}" if chosen else "beside this Python or on the PATH"
        return f"there is no mpirun {where}; {INSTALL}"
    return None


def fork_ranks(run: Run, task: Task) -> None:
    """Start all ranks as forks of this process that mpirun takes for its own.

    run   takes the ranks
    task  what they are to do

    Raises CommunicationError if mpirun does not start them.
    """
    name_classes(task.program, task.args)
    lines = _start_stubs(run, task)
    # The launcher ends all ranks once it sees the end of one of these, so they stay open here.
    kept = [number for _, _, files in lines for number in files]
    run.after.callback(close_all, kept)
    for _, environment, files in lines:
        rank = rank_in(environment)
        # What its mpirun does not pass on, a fork must not have from here either.
        news: dict[str, str | None] = {name: None for name in os.environ if name not in environment}
        news |= {name: x for name, x in environment.items() if os.environ.get(name) != x}
        news |= rank_variables(rank, task.world_size) | library_variables()
        if files:
            news["PMI_FD"] = str(files[0])
        others = [number for number in kept if number not in files]
        run.fork(task, rank, news, [*others, *(one.fileno() for one, _, _ in lines)])


def spawn_ranks(run: Run, task: Task) -> None:
    """Start all ranks as fresh Pythons that mpirun starts.

    run   takes the ranks
    task  what they are to do

    Raises CommunicationError if mpirun does not start them, and what pickling raises if program or
    args cannot travel.
    """
    with packed(task) as payload:
        for line, environment, files in _start_stubs(run, task):
            close_all(files)
            rank = rank_in(environment)
            _, lines = run.add(rank)
            command = spawn_command([rank, "{0}", "{1}", "{2}", "{3}", 0])
            mpi_stub.send_words(line, command, [*lines.all(), payload.fileno()])
            close_all(lines.all())


def library_variables() -> dict[str, str]:
    """Return what makes mpi4py load the library of the mpirun that was found."""
    prefix = Path(find_mpirun()).resolve().parents[1]
    found = [prefix / "lib" / name for name in LIBRARIES if (prefix / "lib" / name).exists()]
    # Several MPIs may share the system's directory; there mpi4py knows which one it was made for.
    if len(found) != 1 or prefix == Path("/usr"):
        return {}
    return {LIBRARY_VARIABLE: str(found[0])}


def _start_stubs(run: Run, task: Task) -> list[tuple[socket.socket, dict, list[int]]]:
    """Start mpirun, and return every stub's line, environment and open files."""
    environment = {x: y for x, y in os.environ.items() if "_MCA_" in x or not x.startswith(FOREIGN)}
    with (
        tempfile.TemporaryDirectory(prefix="slimlab-", dir=_short_folder()) as folder,
        socket.socket(socket.AF_UNIX) as listener,
        tempfile.TemporaryFile() as said,
    ):
        listener.bind(f"{folder}/stub")
        listener.listen(task.world_size)
        stub = [sys.executable, "-S", "-E", "-I", mpi_stub.__file__, f"{folder}/stub"]
        mpirun = subprocess.Popen(
            [find_mpirun(), "-n", str(task.world_size), *stub],
            env=environment | SETTINGS,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        run.after.callback(_end_mpirun, mpirun)
        deadline_s = time.monotonic() + task.timeout_s
        lines = []
        while len(lines) < task.world_size:
            if select.select([listener], [], [], WAIT_S)[0]:
                line = run.after.enter_context(listener.accept()[0])
                lines.append((line, *mpi_stub.read_words(line)))
            elif mpirun.poll() is not None or time.monotonic() > deadline_s:
                raise _not_started(task, mpirun, said)
        return lines


def _short_folder() -> str:
    # The name of such a socket may have about a hundred letters.
    folder = tempfile.gettempdir()
    return folder if len(folder) <= MAX_FOLDER_LETTERS else "/tmp"


def _not_started(task: Task, mpirun: subprocess.Popen, said: BinaryIO) -> CommunicationError:
    said.seek(0)
    text = said.read().decode(errors="replace").strip()
    if mpirun.returncode is None:
        how = f"had not started {task.world_size} ranks after {task.timeout_s:g} s"
        return RanksTimeoutError(f"{find_mpirun()} {how}\n{text}")
    how = f"ended with exit status {mpirun.returncode} before {task.world_size} ranks had started"
    return CommunicationError(f"{find_mpirun()} {how}\n{text}")


def _end_mpirun(mpirun: subprocess.Popen) -> None:
    # Its stubs have ended with their lines, which were closed before.
    for end in (None, signal.SIGTERM, signal.SIGKILL):
        try:
            if end is not None:
                os.killpg(mpirun.pid, end)
            mpirun.wait(TIDY_S)
            return
        except subprocess.TimeoutExpired:
            continue
