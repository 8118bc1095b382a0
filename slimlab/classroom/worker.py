"""Run a student's cells and the properties of one exercise, in the process made for them.

The process was forked from one that had imported torch (see slimlab.classroom.keeper). It tells
its keeper line by line what it begins and what came of it, each line with a number that only the
two know, so that what the student's code prints is never taken for a result. Chapters' exercises
use it. Production graders restart an interpreter for every notebook; this one forks in
milliseconds, which is what lets tests try hundreds of answers.
"""

import contextlib
import importlib
import json
import linecache
import os
import random
import re
import sys
import traceback
import types
from collections.abc import Callable

import torch

from slimlab.classroom import guard
from slimlab.classroom.exercise import Property, find_exercise
from slimlab.classroom.grading import CheckFailed, clean, comparison_is_sound
from slimlab.classroom.session import SESSION

CHANGED = (
    "the comparison itself was changed",
    "the comparisons of torch and Python as they are",
    "what your cells replace in torch, builtins or the grader",
)
# What torch imports at the first use of an optimizer or of shapes without numbers: 0.5 s and 1.5 s.
LATE_MODULES = ("sympy", "torch._dynamo")


class Student:
    """What the student's cells define, by attribute.

    namespace  the names after the cells ran
    """

    def __init__(self, namespace: dict):
        self.__dict__["_namespace"] = namespace

    def __getattr__(self, name: str):
        if name not in self._namespace:
            raise CheckFailed(f"no name {name!r}", f"your cell to define {name}", "its spelling")
        return self._namespace[name]


class Lines:
    """The way back to the keeper.

    descriptor  an open pipe
    nonce       put on every line
    """

    def __init__(self, descriptor: int, nonce: str):
        self._write, self._dumps, self._exit = os.write, json.dumps, os._exit
        self._flush, self._getpid = sys.stdout.flush, os.getpid
        self._descriptor, self._nonce, self._pid = descriptor, nonce, os.getpid()

    def send(self, event: str, **content: object) -> None:
        """Write one line: the `event` and its `content`, which must be plain."""
        if self._getpid() != self._pid:
            self._exit(0)  # a copy that the student's code forked: it has nothing to say
        with contextlib.suppress(Exception):
            self._flush()
        line = self._dumps({"nonce": self._nonce, "event": event, **content}) + "\n"
        self._write(self._descriptor, line.encode())


def run(job: dict, lines: Lines, folder: str) -> None:
    """Run the job's cells, then its properties from number job["first"] on.

    job     exercise, cells, student and what is to be run, as slimlab.classroom.process sends it
    lines   where results go
    folder  the temporary folder that the process stands in
    """
    exercise = find_exercise(job["number"], job["source"])
    properties = tuple(exercise.properties)
    if [one.name for one in properties] != job["properties"]:
        problem = ("another list of properties on disk", "the grader that was loaded")
        lines.send("unloadable", problem=(*problem, "restart the kernel"), kind="stopped")
        return
    numbers = exercise.numbers_for(job["name"], job["seed"])
    SESSION.begin(job["name"], job["seed"], grading=True)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    module.__dict__["display"] = print
    settle()
    sys.dont_write_bytecode = True
    guard.install(folder, exercise.may_start_programs)
    run_one, is_as_it_was = run_property, watched_parts(properties)
    lines.send("ready")
    try:
        execute_cells(job, module.__dict__)
    except BaseException as error:
        kind, problem = describe(error)
        lines.send("unloadable", problem=problem, kind=kind)
        return
    if not any(name in module.__dict__ for name in exercise.requires):
        wanted = ", ".join(exercise.requires)
        problem = (f"your cells do not define {wanted}", "these names", "their spelling")
        lines.send("unloadable", problem=problem, kind="failed")
        return
    lines.send("loaded")
    student = Student(module.__dict__)
    for place in range(job["first"], len(properties)):
        lines.send("start", index=place)
        kind, problem = run_one(properties[place], student, numbers)
        if kind == "passed" and not is_as_it_was():
            kind, problem = "failed", CHANGED
        late = [name for name in LATE_MODULES if name in sys.modules]
        lines.send("done", index=place, kind=kind, problem=problem, late=late)
        if job["until_failed"] and kind != "passed":
            return


def import_grader(job: dict) -> None:
    """Import the grader of `job` before the fork if it is slimlab's own, not a file that changes.

    job  what is to be run
    """
    if not job["source"].endswith(".py"):
        with contextlib.suppress(Exception):  # the forked process meets it again and tells
            find_exercise(job["number"], job["source"])


def import_late(names: str) -> None:
    """Import in the keeper what a check had to wait for, so that the next one need not.

    names  what the forked process said; only what LATE_MODULES names is imported
    """
    for name in LATE_MODULES:
        if name in names:
            importlib.import_module(name)


def watched_parts(properties: tuple[Property, ...]) -> Callable[[], bool]:
    """Return a function that says whether the grader's own parts are still what they are now.

    properties  those of the exercise

    A cell that means to cheat can undo this too: it shares the process.
    """
    names = [name for name in sys.modules if name.startswith("slimlab.classroom.")]
    places = [vars(sys.modules[name]) for name in names]
    places += [one.function.__globals__ for one in properties] + [vars(one) for one in properties]
    kept = [
        (place, name, value, getattr(value, "__code__", None))
        for place in places
        for name, value in place.items()
        if callable(value)
    ]

    def as_it_was() -> bool:
        return all(
            place.get(name) is value and getattr(value, "__code__", None) is code
            for place, name, value, code in kept
        )

    return as_it_was


def settle() -> None:
    """Put seeds, threads and torch's defaults where they belong."""
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)


def execute_cells(job: dict, namespace: dict) -> None:
    """Run the imports and then each cell of `job` in `namespace`."""
    exec(compile(job["imports"], "<imports>", "exec", dont_inherit=True), namespace)
    for label, source in job["cells"]:
        filename = f"<{label}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        exec(compile(source, filename, "exec", dont_inherit=True), namespace)


def run_property(one: Property, student: Student, numbers: dict) -> tuple[str, tuple | None]:
    """Return how the property `one` ended for `student` and `numbers`: kind, and why not."""
    try:
        settle()
        one.function(student, dict(numbers))
    except BaseException as error:
        return describe(error)
    with contextlib.suppress(Exception):
        if comparison_is_sound():
            return "passed", None
    return "failed", CHANGED


def describe(error: BaseException) -> tuple[str, tuple[str, str, str]]:
    """Return kind and (saw, expected, look) for whatever the student's code raised.

    error  the exception; its innermost line inside the student's cells is named
    """
    if isinstance(error, CheckFailed):
        return "failed", (error.saw, error.expected, error.look)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_student(f.filename)]
    where = "what your function takes and returns"
    if frames:
        label = frames[-1].filename.strip("<>")
        where = f"line {frames[-1].lineno} of {label}: {(frames[-1].line or '').strip()}"
    if isinstance(error, NotImplementedError) and ": raise NotImplementedError" in where:
        return "raised", ("a part that is not written yet", "your own code there", where)
    if isinstance(error, SystemExit):
        return "raised", ("your code ends the program", "code that returns", where)
    if isinstance(error, EOFError):
        return "raised", ("your code waits for input()", "values from arguments", where)
    text = clean(f"{type(error).__name__}: {error}", 400)
    if isinstance(error, SyntaxError) and _is_student(str(error.filename)):
        where = f"line {error.lineno} of {error.filename.strip('<>')}"
    asked = re.search(r"tried to allocate (\d+) bytes", str(error))
    if isinstance(error, MemoryError) or asked:
        size = f"{int(asked[1]) / 1e9:.3g} GB" if asked else "more memory than there is"
        return "raised", (f"your code asks for {size} at once", "less memory", where)
    if isinstance(error, guard.Refused):
        return "raised", (clean(error), "work with arguments and results only", where)
    if isinstance(error, ModuleNotFoundError) and frames and "imports" in where:
        return "raised", (text, "packages that come with slimlab", "the imports of the notebook")
    return "raised", (text, "code that runs to its end", where)


def _is_student(filename: str) -> bool:
    return filename.startswith(("<cell ", "<In ", "<imports"))
