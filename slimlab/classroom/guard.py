"""Keep a student's mistakes away from other people's files, programs and processes.

An audit hook sees every attempt of Python code to write, delete, start or signal something and
refuses what lies outside the check's own folder. It stops `shutil.rmtree("tests")` with a message
that names it. It is a limit, not a sandbox: code that wants to get round it can (ctypes, a C
extension), so grade work that you do not trust in a container. Every exercise is checked under it.
"""

import os
import sys
from collections.abc import Callable

PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn"}
CHANGES = {
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.mkdir": (0,),
    "shutil.rmtree": (0,),
}
# What may be written, but not removed or replaced; other devices hold disks and shared memory.
SINKS = {"/dev/null", b"/dev/null"}
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Refused(PermissionError):
    """The student's code tried something outside its own folder."""


def install(folder: str, may_start_programs: bool) -> None:
    """Refuse from now on, in this process and its forks, what lies outside `folder`.

    folder              the only place where files may be written or deleted; /dev/null takes output
    may_start_programs  whether other programs may be started
    """
    sys.addaudithook(_hook(os.path.realpath(folder), may_start_programs))


def _hook(folder: str, may_start_programs: bool) -> Callable:
    realpath, isdir, getpgid, readlink = os.path.realpath, os.path.isdir, os.getpgid, os.readlink

    def inside(path: object, dir_fd: object = -1) -> bool:
        if isinstance(path, int) or path is None:
            return True  # an open file: it was judged when it was opened
        path = os.fsdecode(path)
        if isinstance(dir_fd, int) and dir_fd >= 0 and not path.startswith("/"):
            try:
                path = f"{readlink(f'/proc/self/fd/{dir_fd}')}/{path}"
            except OSError:
                return True  # not Linux: shutil.rmtree was judged by its own event
        found = realpath(path)
        return found == folder or found.startswith(folder + "/")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITE_FLAGS if isinstance(flags, int) else 0
            if writes and not inside(path) and path not in SINKS:
                raise Refused(f"your code tried to write {_name(path)!r} outside its own folder")
        elif event in CHANGES:
            dir_fd = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
            for place in CHANGES[event]:
                if event == "os.mkdir" and isdir(arguments[place]):
                    continue  # it is there: nothing will change
                if not inside(arguments[place], dir_fd):
                    name = _name(arguments[place])
                    raise Refused(f"your code tried {event}({name!r}) outside its own folder")
        elif event in PROGRAMS and not may_start_programs:
            raise Refused(f"your code tried to start a program with {event}")
        elif event in ("os.kill", "os.killpg"):
            own = arguments[0] == getpgid(0) or (arguments[0] > 0 and _group(arguments[0], getpgid))
            if not own:
                raise Refused("your code tried to signal a process that is not its own")

    return hook


def _group(pid: int, getpgid: Callable) -> bool:
    try:
        return getpgid(pid) == getpgid(0)
    except OSError:
        return False


def _name(path: object) -> str:
    return os.path.basename(os.fsdecode(path).rstrip("/")) if not isinstance(path, int) else "?"
