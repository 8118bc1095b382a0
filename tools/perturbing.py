"""Run a perturbation and the cell that must then fail; see covered.py for what these are.

`try_in_fork` runs inside the kernel of a notebook, in a copy of it that is thrown away, so that the
notebook goes on as if nothing had happened. perturb_plugin.py calls it there, which is why this
module imports nothing but Python's own.
"""

import contextlib
import gc
import io
import linecache
import os
import random
import signal
import sys

DEADLINE_S = 250


def try_to_break(name: str, perturb: str, cell_id: str, source: str, names: dict) -> str:
    """Run the perturbation and the cell, then put all names back; "caught" is what is wanted."""
    torch = sys.modules.get("torch")
    saved, drawn = dict(names), random.getstate()
    generator = torch.get_rng_state() if torch else None
    try:
        run_cell(perturb, f"{name}-perturbation", names)
    except Exception as error:
        return f"the perturbation itself fails: {error!r}"
    else:
        try:
            run_cell(source, cell_id, names)
            return "the cell passes although the quantity is perturbed"
        except AssertionError:
            return "caught"
        except Exception as error:
            return f"{type(error).__name__} instead of AssertionError: {error}"
    finally:
        names.clear()
        names.update(saved)
        if torch:
            torch.set_rng_state(generator)
        random.setstate(drawn)


def run_cell(source: str, name: str, names: dict) -> None:
    """Execute `source` in `names`, without its printed text; tracebacks show its lines."""
    file = f"<cell {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, file, "exec"), names)


def try_in_fork(*arguments) -> str:
    """Do what try_to_break does for the names of the kernel that this runs in, in a copy of it."""
    from IPython import get_ipython
    from IPython.core.displaypub import CapturingDisplayPublisher

    shell, torch = get_ipython(), sys.modules.get("torch")
    if sys.platform != "linux":
        return try_to_break(*arguments, shell.user_ns)
    read_end, write_end = os.pipe()
    gc.collect()  # what is freed in the copy may wait for threads that it lacks
    pid = os.fork()
    if pid == 0:
        gc.freeze()
        text = "the process failed"
        try:
            signal.alarm(DEADLINE_S)
            if torch:
                torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
            sys.stdout = sys.stderr = io.StringIO()
            shell.display_pub = CapturingDisplayPublisher()
            text = try_to_break(*arguments, shell.user_ns)
        finally:
            os.write(write_end, text[:2000].encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    os.waitpid(pid, 0)
    return text or "the process ended before it could tell"
