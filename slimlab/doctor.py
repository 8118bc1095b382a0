"""Look at this machine: what the book needs, what it can use, and how to mend what is missing.

Chapter 00 shows it. MPI, fonts and kernels are asked in processes of their own with a deadline,
because a broken MPI can hang or end the process that asks. Production checkers (conda doctor,
nvidia-smi) look at one thing each.
"""

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from slimlab.comm.launchers import find_mpirun, mpi_family

GIB = 2**30
ASK_DEADLINE_S = 60.0
CJK_FONTS = (
    "Noto Sans CJK",
    "Source Han Sans",
    "WenQuanYi",
    "SimHei",
    "PingFang",
    "Microsoft YaHei",
)
MPI_PROGRAM = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(mpi4py.__version__, "|", MPI.Get_library_version().split("\\n")[0])
"""
FONT_PROGRAM = """
from matplotlib import font_manager
print("\\n".join(sorted({font.name for font in font_manager.fontManager.ttflist})))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    name    what
    state   "ok", "note" (the book works without it) or "missing" (the book needs it)
    detail  what was found
    mend    the line that mends it, or ""
    """

    name: str
    state: str
    detail: str
    mend: str = ""


def examine() -> list[Finding]:
    """Return all findings, in the order in which they are shown."""
    looks: list[Callable[[], Finding | list[Finding]]] = [
        look_at_python,
        look_at_packages,
        look_at_torch,
        look_at_mpi,
        look_at_cores,
        look_at_memory,
        look_at_disk,
        look_at_folders,
        look_at_network,
        look_at_fonts,
        look_at_kernel,
        look_at_chapters,
    ]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(_careful, looks))
    return [one for answer in answers for one in (answer if isinstance(answer, list) else [answer])]


def is_healthy(findings: list[Finding]) -> bool:
    """Return whether nothing that the book needs is missing among `findings`."""
    return all(one.state != "missing" for one in findings)


def table(findings: list[Finding]) -> str:
    """Return `findings` as text: a line each, and below it what mends it."""
    marks = {"ok": "✓", "note": "·", "missing": "✗"}
    lines = []
    for one in findings:
        lines.append(f"{marks[one.state]} {one.name:<10} {one.detail}")
        lines += [f"{'':<13}mend: {one.mend}"] if one.mend else []
    count = sum(one.state == "missing" for one in findings)
    lines.append(f"{count} missing" if count else "everything that the book needs is there")
    return "\n".join(lines)


def look_at_python() -> Finding:
    """Look at the version of Python."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform == "win32":
        return Finding("python", "missing", found, "wsl --install, then work inside WSL")
    tested = sys.version_info[:2] <= (3, 13)
    return Finding("python", "ok" if tested else "note", found + ("" if tested else ", not tested"))


def look_at_packages() -> Finding:
    """Look whether the packages that slimlab asks for are installed."""
    try:
        asked = metadata.requires("slimlab") or []
    except metadata.PackageNotFoundError:
        mend = 'python -m pip install --editable ".[book,test]"'
        return Finding("packages", "note", "slimlab itself is not installed", mend)
    names = [re.match(r"[\w.-]+", line)[0] for line in asked if "extra ==" not in line]
    absent = [name for name in names if not [*metadata.distributions(name=name)]]
    if absent:
        mend = f"python -m pip install {' '.join(absent)}"
        return Finding("packages", "missing", f"not installed: {', '.join(absent)}", mend)
    return Finding("packages", "ok", f"{len(names)} of {len(names)}")


def look_at_torch() -> Finding:
    """Look at torch and the devices that it sees."""
    code = """
import torch
cuda = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
mps = ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
print(torch.__version__, "|", ", ".join(cuda + mps))
"""
    answer, trouble = _ask([sys.executable, "-c", code])
    if trouble:
        return Finding("torch", "missing", trouble, 'python -m pip install "torch>=2.11,<2.14"')
    version, devices = answer.split(" | ") if " | " in answer else (answer.strip(" |"), "")
    return Finding("torch", "ok", f"{version}, {devices or 'no GPU; none is needed'}")


def look_at_mpi() -> list[Finding]:
    """Look at mpi4py, the MPI library that it loads, and the mpirun that would start it."""
    install = "python -m pip install mpi4py mpich"
    answer, trouble = _ask([sys.executable, "-c", MPI_PROGRAM])
    if trouble:
        return [Finding("mpi", "note", f"{trouble}; thread ranks work without", install)]
    version, library = (" ".join(part.split()) for part in answer.split("|", 1))
    findings = [Finding("mpi", "ok", f"mpi4py {version} with {library[:60]}")]
    launcher = find_mpirun()
    if launcher is None:
        return [*findings, Finding("mpirun", "note", "not found; thread ranks work", install)]
    said, trouble = _ask([launcher, "--version"])
    if trouble:
        return [*findings, Finding("mpirun", "note", f"{launcher}: {trouble}", install)]
    ours, theirs = mpi_family(library), mpi_family(said)
    if ours and theirs and ours != theirs:
        detail = f"{launcher} is {theirs}, mpi4py loads {ours}: every rank would be rank 0 of 1"
        return [*findings, Finding("mpirun", "note", detail, install)]
    root = theirs == "Open MPI" and getattr(os, "geteuid", lambda: 1)() == 0
    mend = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1" if root else ""
    return [*findings, Finding("mpirun", "note" if mend else "ok", f"{launcher} ({theirs})", mend)]


def look_at_cores() -> Finding:
    """Look at cores and at the variables that say how many threads to use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    given = {name: os.environ[name] for name in names if name in os.environ}
    shown = ", ".join(f"{name}={value}" for name, value in given.items()) or "no thread variables"
    too_many = [k for k, v in given.items() if v.isdigit() and int(v) > usable]
    mend = f"export {too_many[0]}={usable}" if too_many else ""
    return Finding("cores", "note" if mend else "ok", f"{usable} usable, {shown}", mend)


def look_at_memory() -> Finding:
    """Look at the memory that is free for programs."""
    found = psutil.virtual_memory()
    text = f"{found.available / GIB:.1f} GiB free of {found.total / GIB:.1f}"
    mend = "close other programs" if found.available < 2 * GIB else ""
    return Finding("memory", "note" if mend else "ok", text, mend)


def look_at_disk() -> Finding:
    """Look at the free space where the book lies."""
    free_bytes = shutil.disk_usage(Path.cwd()).free
    mend = "make clean, or move the book to another disk" if free_bytes < GIB else ""
    return Finding("disk", "note" if mend else "ok", f"{free_bytes / GIB:.1f} GiB free here", mend)


def look_at_folders() -> list[Finding]:
    """Look whether the home and the temporary folder can be written; say nothing if they can."""
    home, other = 'export HOME="$(mktemp -d)"', 'mkdir -p tmp && export TMPDIR="$PWD/tmp"'
    findings = []
    for folder, mend in ((Path.home(), home), (os.environ.get("TMPDIR", "/tmp"), other)):
        try:
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                file.write(bytes(2**16))
        except OSError as error:
            text = f"{folder} cannot be written: {error.strerror or error}"
            findings.append(Finding("folder", "missing", text, mend))
    return findings


def look_at_network() -> Finding:
    """Look whether this host knows its own name and can open a port, as gloo needs."""
    try:
        with socket.socket() as port:
            port.bind(("127.0.0.1", 0))
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError as error:
        mend = "export GLOO_SOCKET_IFNAME=lo   (lo0 on macOS)"
        return Finding("network", "note", f"this host's name does not resolve: {error}", mend)
    return Finding("network", "ok", "this host's name resolves, ports open on 127.0.0.1")


def look_at_fonts() -> Finding:
    """Look at matplotlib's fonts; one with Chinese is welcome."""
    answer, trouble = _ask([sys.executable, "-c", FONT_PROGRAM])
    if trouble:
        return Finding("fonts", "missing", trouble, "python -m pip install matplotlib")
    fonts = answer.splitlines()
    chinese = [name for name in fonts if name.startswith(CJK_FONTS)]
    if chinese:
        return Finding("fonts", "ok", f"{len(fonts)}, Chinese: {chinese[0]}")
    mend = "sudo apt-get install fonts-noto-cjk   (or any font with Chinese)"
    text = f"{len(fonts)}, none with Chinese: figures do not need it"
    return Finding("fonts", "note", text, mend)


def look_at_kernel() -> Finding:
    """Look whether Jupyter has a Python kernel, and whether it is this Python."""
    program = [sys.executable, "-m", "jupyter", "kernelspec", "list", "--json"]
    install = "python -m ipykernel install --sys-prefix"
    answer, trouble = _ask(program)
    if re.match(r"(FileNotFound|Permission|OS)Error", trouble):
        return Finding("jupyter", "missing", trouble, 'export HOME="$(mktemp -d)"')
    if trouble:
        return Finding("jupyter", "missing", trouble, "python -m pip install jupyterlab ipykernel")
    try:
        kernels = json.loads(answer[answer.index("{") :])["kernelspecs"]
    except (ValueError, KeyError):
        return Finding("jupyter", "missing", "kernels cannot be listed", install)
    if "python3" not in kernels:
        return Finding("jupyter", "missing", "no kernel python3", install)
    program = kernels["python3"]["spec"]["argv"][0]
    if program in ("python", "python3", sys.executable):
        return Finding("jupyter", "ok", "kernel python3")
    return Finding("jupyter", "note", f"kernel python3 is another Python: {program}", install)


def look_at_chapters() -> Finding:
    """Look for the book's chapters here and above."""
    from slimlab.classroom.runner import find_root
    from slimlab.config import InputError

    try:
        root = find_root()
    except InputError as error:
        return Finding("chapters", "note", "none found from here", error.change)
    folder = root / "chapters"
    return Finding("chapters", "ok", f"{len(list(folder.glob('*.ipynb')))} in {folder}")


def _careful(look: Callable) -> Finding | list[Finding]:
    try:
        return look()
    except Exception as error:
        # One look that fails on an unusual machine must not hide the others.
        name = look.__name__.removeprefix("look_at_")
        return Finding(name, "note", f"could not be looked at: {type(error).__name__}: {error}")


def _ask(command: list[str]) -> tuple[str, str]:
    """Return what `command` prints, and what went wrong or nothing."""
    try:
        quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, timeout=ASK_DEADLINE_S, **quiet)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {ASK_DEADLINE_S:.0f} s"
    except OSError as error:
        return "", str(error)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return "", lines[-1][:160] if lines else f"exit code {done.returncode}"
    return done.stdout.strip(), ""
