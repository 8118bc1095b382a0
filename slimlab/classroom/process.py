"""Send a student's work to a process of its own and collect what became of each property.

A `Keeper` is a second Python that has imported torch; it forks a process for every check, so the
first check takes about two seconds and later ones a fraction of one. The notebook, the command line
and the tests of all exercises use it. Production graders start an interpreter or a container for
every notebook.
"""

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from slimlab.classroom.exercise import Exercise
from slimlab.classroom.report import Outcome, Problem, Report, check_hint, nothing_checked
from slimlab.classroom.submission import Submission
from slimlab.config import InputError

START_DEADLINE_S = 120.0
GRACE_S = 15.0
MAX_SHOWN_LINES = 12
PROGRAM = "import sys; sys.path.insert(0, {root!r}); from slimlab.classroom import keeper; "
GONE = (
    "the process that runs the checks ended",
    "code that leaves it alone",
    "os.kill, or a crash",
)
NO_TIME = Problem("no time was left for it", "a quicker answer before it", "the slowest property")


class Keeper:
    """A process that runs checks one after another; use it in a `with` statement.

    It starts when the first check needs it, and again if it was ended.
    """

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None
        self.worker_pid, self.worker_folder = 0, ""
        self.lock = threading.Lock()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.close()

    def check(
        self,
        exercise: Exercise,
        submission: Submission,
        name: str | None = None,
        seed: int = 0,
        hint: int = 0,
        until_failed: bool = False,
    ) -> Report:
        """Run `submission` and return its report.

        exercise      what is checked
        submission    the student's cells
        name          whose numbers are drawn; None takes those of the book
        seed          the seed of the class
        hint          how many hints the report shows
        until_failed  end at the first property that does not hold; the rest counts as not run
        """
        check_hint(exercise, hint)
        if submission.problem is not None:
            return nothing_checked(exercise, submission.problem, hint)
        with self.lock:
            try:
                job = self._job(exercise, submission, name, seed)
                return self._check(exercise, job | {"until_failed": until_failed}, hint)
            except BaseException:
                self.close()
                raise

    def _job(self, exercise: Exercise, submission: Submission, name: str | None, seed: int) -> dict:
        return {
            "number": exercise.number,
            "source": exercise.source if exercise.source.endswith(".py") else exercise.chapter,
            "properties": [one.name for one in exercise.properties],
            "deadlines_s": [one.deadline_s for one in exercise.properties],
            "load_deadline_s": exercise.load_deadline_s,
            "total_deadline_s": exercise.total_deadline_s,
            "memory_mib": exercise.memory_mib,
            "cells": [(cell.label, cell.source) for cell in submission.cells],
            "imports": submission.imports,
            "name": name,
            "seed": seed,
            "first": 0,
        }

    def _check(self, exercise: Exercise, job: dict, hint: int) -> Report:
        self._start()
        self.connection.send_bytes(json.dumps(job).encode())
        found: dict[int, Outcome] = {}
        problem, printed = None, ""
        for content in self._events(exercise.total_deadline_s + GRACE_S):
            if content["event"] == "printed":
                printed += content["text"]
            elif content["event"] == "done":
                found[content["index"]] = _outcome(exercise, content)
            elif content["event"] in ("unloadable", "gone"):
                problem = Problem(*content["problem"])
        if problem is not None and not found:
            rows = nothing_checked(exercise, problem).outcomes
            return Report(exercise, rows, problem, _shown(printed), hint=hint)
        why, kind = problem or NO_TIME, "stopped"
        if job["until_failed"] and any(one.kind != "passed" for one in found.values()):
            why, kind = None, "not run"
        rows = tuple(
            found.get(k, Outcome(one.name, 0, one.points, kind, why))
            for k, one in enumerate(exercise.properties)
        )
        return Report(exercise, rows, None, _shown(printed), hint=hint)

    def _events(self, timeout_s: float) -> Iterator[dict]:
        while True:
            content = self._receive(timeout_s)
            if content["event"] == "forked":
                self.worker_pid, self.worker_folder = content["pid"], content["folder"]
                continue
            if content["event"] == "end":
                self.worker_pid, self.worker_folder = 0, ""
                return
            yield content
            if content["event"] == "gone":
                return

    def _receive(self, timeout_s: float) -> dict:
        with contextlib.suppress(EOFError, OSError):
            if self.connection.poll(timeout_s):
                return json.loads(self.connection.recv_bytes())
        self.close()
        return {"event": "gone", "problem": GONE}

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        root = str(Path(__file__).resolve().parents[2])
        ours, theirs = socket.socketpair()
        program = PROGRAM.format(root=root) + f"keeper.main({theirs.fileno()})"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",
        }
        with ours, theirs, tempfile.TemporaryFile() as errors:
            # -P: a student's file called torch.py or random.py beside the notebook is not imported
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
            self.connection = Connection(ours.detach())
            theirs.close()
            with contextlib.suppress(EOFError, OSError):
                if self.connection.poll(START_DEADLINE_S) and self.connection.recv_bytes():
                    return
            self.close()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["nothing"]
        raise InputError(
            "a process for the check", f"it did not start: {said[-1]}", "run `slimlab doctor`"
        )

    def abort(self) -> None:
        """End the check that another thread waits for; that thread clears up."""
        process = self.process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process and whatever it runs; a later check starts a new one."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.process is not None:
            try:
                self.process.wait(timeout=6)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            if self.worker_pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.worker_pid, signal.SIGKILL)
                shutil.rmtree(self.worker_folder, ignore_errors=True)
            self.process, self.worker_pid, self.worker_folder = None, 0, ""


@functools.cache
def shared_keeper() -> Keeper:
    """Return the keeper that all checks of this process share; it ends with the process."""
    keeper = Keeper()
    atexit.register(keeper.close)
    return keeper


def _outcome(exercise: Exercise, content: dict) -> Outcome:
    one, why = exercise.properties[content["index"]], content["problem"]
    points = one.points if content["kind"] == "passed" else 0
    problem = Problem(*why) if why else None
    return Outcome(one.name, points, one.points, content["kind"], problem)


def _shown(printed: str) -> str:
    lines = printed.splitlines()
    if len(lines) > MAX_SHOWN_LINES:
        lines = [*lines[:MAX_SHOWN_LINES], f"... and {len(lines) - MAX_SHOWN_LINES} lines more"]
    return "\n".join(line[:200] for line in lines)
