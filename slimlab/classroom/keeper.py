"""The process that runs checks: it imports torch once and forks a fresh process for each.

It watches wall-clock time, resident memory and output of what it forked, ends it with everything
that it started, and tells slimlab.classroom.process property by property. When a property is ended
by a limit, a fresh process goes on with the next one, so that the rest still earns points.
Graders, and what torch imports late, are imported here, so that only one check waits for them.
Chapters' exercises use it. It is a limit, not a sandbox; production services grade in containers.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import secrets
import selectors
import shutil
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection

import psutil

MAX_OUTPUT_BYTES = 64_000
MAX_FILE_BYTES = 256 << 20
MAX_PROCESSES = 64
TICK_S = 0.02
TREE_EVERY_S = 0.25
PR_SET_CHILD_SUBREAPER = 36
MIB = 1 << 20
EXIT = os._exit  # bound here: a student's code may replace it


def main(descriptor: int) -> None:
    """Serve jobs until the other side of the socket `descriptor` closes."""
    import torch

    from slimlab.classroom import worker  # noqa: F401 - imported once, before any fork

    # A parent that has used OpenMP makes forked children hang in libgomp.
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # What a student's code leaves behind becomes a child of this process and can be found.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    connection = Connection(descriptor)
    connection.send_bytes(b"ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            serve(json.loads(connection.recv_bytes()), connection)


def serve(job: dict, connection: Connection) -> None:
    """Run one `job` in as many processes as it takes; tell its results over `connection`."""

    def tell(**content: object) -> None:
        connection.send_bytes(json.dumps(content).encode())

    from slimlab.classroom import worker

    worker.import_grader(job)
    end_at = time.monotonic() + job["total_deadline_s"]
    late = ""
    while job["first"] < len(job["properties"]):
        run = Watched(job, connection, end_at)
        for result in run.results():
            late += str(result.pop("late", ""))
            tell(**result)
            if is_last(result, job):
                job["first"] = len(job["properties"])
            elif result["event"] == "done":
                job["first"] = result["index"] + 1
        if run.printed:
            tell(event="printed", text=run.printed.decode(errors="replace"))
        if not run.any_result or time.monotonic() > end_at:
            break
    tell(event="end")
    worker.import_late(late)


def is_last(result: dict, job: dict) -> bool:
    """Return whether nothing more of `job` is to be run after `result`."""
    if result["event"] == "done":
        failed = job["until_failed"] and result["kind"] != "passed"
        return failed or result["index"] == len(job["properties"]) - 1
    return result["event"] == "unloadable"


class Watched:
    """One forked process, from its start until nothing of it is left.

    job         what to run
    connection  the way to the process that asked; if that ends, this ends
    end_at      when everything must be over, on the monotonic clock
    """

    def __init__(self, job: dict, connection: Connection, end_at: float):
        self.job, self.connection, self.end_at = job, connection, end_at
        self.nonce = secrets.token_hex(8)
        self.printed = bytearray()
        self.any_result = False
        self.stage, self.stage_end = "load", time.monotonic() + job["load_deadline_s"]
        self.rest = b""
        self.baseline_bytes = psutil.Process().memory_info().rss
        self.tree: list[psutil.Process] = []
        self.tree_at = time.monotonic() + TREE_EVERY_S

    def results(self):
        """Fork, watch, end and clear away; yield each result as it comes."""
        folder = tempfile.mkdtemp(prefix="slimlab-check-")
        self.results_in, results_out = os.pipe()
        self.output_in, output_out = os.pipe()
        pid = os.fork()
        if pid == 0:
            become_worker(self, folder, results_out, output_out)
        os.close(results_out)
        os.close(output_out)
        self.process = psutil.Process(pid)
        try:
            forked = {"event": "forked", "pid": pid, "folder": folder}
            self.connection.send_bytes(json.dumps(forked).encode())
            yield from self.watch(pid)
        finally:
            end_everything(pid)
            os.close(self.results_in)
            os.close(self.output_in)
            shutil.rmtree(folder, ignore_errors=True)

    def watch(self, pid: int):
        """Yield the results of process `pid` until it ends or a limit ends it."""
        for descriptor in (self.results_in, self.output_in):
            os.set_blocking(descriptor, False)
        with selectors.DefaultSelector() as selector:
            selector.register(self.results_in, selectors.EVENT_READ)
            selector.register(self.output_in, selectors.EVENT_READ)
            selector.register(self.connection, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select(TICK_S)]
                if self.connection in ready:
                    raise EOFError("the process that asked is gone")
                gone = os.waitpid(pid, os.WNOHANG)[0] == pid
                for descriptor in (self.output_in, self.results_in):
                    if descriptor in ready or gone:
                        more = self.read(descriptor)
                        if not more and not gone:
                            selector.unregister(descriptor)
                yield from self.take_results()
                problem = ENDED if gone else self.over_limit()
                if self.stage == "over":
                    self.read(self.output_in)  # it may have come since the select
                    return
                if problem is not None:
                    yield self.stopped(problem)
                    return

    def read(self, descriptor: int) -> bool:
        """Read what `descriptor` holds; return whether it is still open."""
        with contextlib.suppress(BlockingIOError):
            while True:
                chunk = os.read(descriptor, 65_536)
                if descriptor == self.results_in:
                    self.rest += chunk
                else:
                    self.printed += chunk
                if not chunk:
                    return False
                if len(self.printed) > MAX_OUTPUT_BYTES:
                    return True
        return True

    def take_results(self):
        """Yield the results among the lines that came; lines without the nonce are ignored."""
        *lines, self.rest = self.rest.split(b"\n")
        for line in lines:
            try:
                content = json.loads(line)
                genuine = content.pop("nonce") == self.nonce
            except (ValueError, KeyError, AttributeError, TypeError):
                continue
            if not genuine:
                continue
            event, now = content["event"], time.monotonic()
            if event == "ready":
                self.stage_end = now + self.job["load_deadline_s"]
            elif event == "start":
                self.stage = content["index"]
                self.stage_end = now + self.job["deadlines_s"][self.stage]
            elif event in ("done", "unloadable"):
                self.any_result = True
                self.stage = "over" if is_last(content, self.job) else "between"
                yield content

    def over_limit(self) -> tuple[str, str, str] | None:
        """Return what limit was passed, as (saw, expected, look), or None."""
        now = time.monotonic()
        if len(self.printed) > MAX_OUTPUT_BYTES:
            limit = f"at most {MAX_OUTPUT_BYTES // 1000} kB"
            return "a flood of output", limit, "a print inside a loop"
        if now > self.end_at:
            total_s = self.job["total_deadline_s"]
            return f"no end within {total_s:g} s for all properties", "a quicker answer", LOOPS
        if now > self.stage_end and self.stage not in ("between", "over"):
            limit_s = self.job["load_deadline_s"]
            if self.stage != "load":
                limit_s = self.job["deadlines_s"][self.stage]
            return f"did not finish within {limit_s:g} s", "an answer in time", LOOPS
        if now > self.tree_at:
            self.tree = psutil.Process().children(recursive=True)
            self.tree_at = time.monotonic() + TREE_EVERY_S
            if len(self.tree) > MAX_PROCESSES:
                return "more than 64 processes", "a few at most", "what starts processes"
        used_bytes = sum(self.above_baseline(one) for one in {self.process, *self.tree})
        if used_bytes > self.job["memory_mib"] * MIB:
            saw = f"{math.ceil(used_bytes / MIB)} MiB of memory used"
            return saw, f"at most {self.job['memory_mib']} MiB", "the largest tensor or list"
        return None

    def above_baseline(self, one: psutil.Process) -> int:
        """Return the resident bytes of `one` above those of this process when it forked."""
        try:
            return max(0, one.memory_info().rss - self.baseline_bytes)
        except psutil.Error:
            return 0

    def stopped(self, problem: tuple[str, str, str]) -> dict:
        """Return the result of the stage that was ended by `problem`."""
        self.any_result = True
        if self.stage == "load":
            return {"event": "unloadable", "problem": problem, "kind": "stopped"}
        place = self.stage
        if place == "between":
            place = self.job["first"]
        return {"event": "done", "index": place, "problem": problem, "kind": "stopped"}


LOOPS = "a loop that never ends, or one that does far too much"
ENDED = ("the process ended before the check did", "code that returns", "os._exit, or a crash")


def become_worker(watched: Watched, folder: str, results_out: int, output_out: int) -> None:
    """Turn the forked process into the worker: own session, folder, output and limits.

    watched      job and nonce
    folder       where it stands and may write
    results_out  its end of the pipe for results
    output_out   its end of the pipe for what the student's code prints
    """
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(output_out, 1)
        os.dup2(output_out, 2)
        for descriptor in (output_out, watched.output_in, watched.results_in):
            os.close(descriptor)
        watched.connection.close()
        os.environ.update(TMPDIR=folder, MPLBACKEND="Agg")
        tempfile.tempdir = folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the whole process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the whole process
        from slimlab.classroom import worker

        worker.run(watched.job, worker.Lines(results_out, watched.nonce), folder)
        code = 0
    except OSError:
        pass  # the student's code closed the pipe: the keeper sees that nothing came
    except BaseException:
        traceback.print_exc()
    finally:
        EXIT(code)


def end_everything(pid: int) -> None:
    """Kill the process group of `pid` and every process that this one still has below it."""
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        left = psutil.Process().children(recursive=True)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not left:
            return
        time.sleep(0.005)
