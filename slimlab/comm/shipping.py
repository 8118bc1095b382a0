"""How programs, arguments, results and exceptions travel between the processes of one run.

Functions and classes that a reader has defined in a cell belong to no module that another process
could import, so they travel by value (cloudpickle). Only bytes that this run has made itself are
ever unpickled. Chapters 07 to 12 rely on it.

Production launchers ship nothing: every rank imports the same file.
"""

import importlib
import io
import linecache
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import cloudpickle
import torch
from torch import Tensor

from slimlab.comm.base import Communicator


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, thing):
        if isinstance(thing, Communicator):
            # Unpickling one of MPI's would start MPI in the process of the caller.
            raise TypeError("it holds a communicator, which belongs to its rank")
        if isinstance(thing, Tensor) and thing.device.type not in ("cpu", "meta"):
            # Whoever unpickles it may have no such device, or must not start to use it.
            return thing.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if isinstance(thing, BaseException) and isinstance(type(thing).__init__, FunctionType):
            # Unpickling would call a class's own __init__ with the message as its only argument.
            return _exception, (type(thing), thing.args, thing.__dict__)
        return super().reducer_override(thing)


def _exception(kind: type[BaseException], args: tuple, content: dict) -> BaseException:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(content)
    return error


class _Namer(cloudpickle.Pickler):
    """Writes nothing; it only gives a name to every class that would travel by value."""

    def reducer_override(self, thing):
        if isinstance(thing, Tensor) or type(thing).__module__ == "numpy":
            return int, ()
        return super().reducer_override(thing)


class _Nowhere(io.RawIOBase):
    def write(self, data):
        return memoryview(data).nbytes


def pack(thing: object) -> bytes:
    """Turn something into bytes; tensors on other devices arrive on the CPU.

    thing  a result, an exception, a program with its arguments

    Raises what pickling raises for things that cannot travel: open files, locks, generators.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return buffer.getvalue()


def unpack(data: bytes) -> object:
    """Turn the bytes of pack back into a copy of the thing.

    data  from a process of this run
    """
    return pickle.loads(data)


def name_classes(*things: object) -> None:
    """Let classes that are defined in functions and cells keep their identity across a fork.

    A class travels by value under a name that cloudpickle gives it once. Given before the fork, the
    name leads back to the same class when a rank sends back an object of it.

    things  what reaches the classes: the program, its arguments
    """
    for thing in things:
        try:
            _Namer(_Nowhere()).dump(thing)
        except Exception:  # it cannot travel, and after a fork it need not
            continue


class Surroundings:
    """What a rank that was not forked must be given to go on as if it were: paths, states, source.

    program  whose source lines error messages are to show, also where they stand in no file
    """

    def __init__(self, program: Callable):
        self.path = list(sys.path)
        self.torch_state, self.python_state = torch.get_rng_state(), random.getstate()
        self.gradients, self.dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        self.numpy_state = None
        if "numpy" in sys.modules:
            self.numpy_state = sys.modules["numpy"].random.get_state()
        code = getattr(program, "__code__", None)
        name = code.co_filename if code is not None else ""
        in_no_file = name in linecache.cache and not Path(name).is_file()
        self.source = {name: linecache.cache[name]} if in_no_file else {}

    def enter(self) -> None:
        """Make this process go on from there."""
        sys.path[:] = self.path
        torch.set_rng_state(self.torch_state)
        torch.set_grad_enabled(self.gradients)
        torch.set_default_dtype(self.dtype)
        random.setstate(self.python_state)
        if self.numpy_state is not None:
            importlib.import_module("numpy").random.set_state(self.numpy_state)
        linecache.cache.update(self.source)
