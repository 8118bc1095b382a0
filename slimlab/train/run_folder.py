"""The folder of one run: who writes into it, and whether what lies there is the same run.

Chapter 05 continues a run from its folder. Production also records the code's version and keeps the
configuration in a service where runs can be compared.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimlab.config import InputError, require

# These may change when a run goes on: they choose the place, the pace of reports, and how much is
# in memory at a time, which changes no more than rounding.
FREE = (
    "device", "validate_every", "save_every", "keep_checkpoints", "recompute", "micro_batch_size",
)  # fmt: skip
# These decide the result, but weights and optimizer fit others: they may change when asked for.
NEW_SETTINGS = tuple(
    f"training.{name}"
    for name in (
        "num_steps",
        "batch_size",
        "peak_lr",
        "warmup_steps",
        "final_lr_fraction",
        "weight_decay",
        "clip_norm",
    )  # fmt: skip
)


def check_same_run(
    stored: dict, current: dict, folder: Path, new_settings: bool = False
) -> list[str]:
    """Refuse to go on with a run of another configuration.

    stored        config.json of its checkpoint
    current       what is asked for now, in the same form
    folder        of the run, for the message
    new_settings  let those of NEW_SETTINGS differ
    returns       what differs and may

    Raises InputError that lists each field with both values.
    """
    stored, current = _flat(stored), _flat(current)
    stored.pop("format", None)
    absent = "(absent)"
    names = [name for name in {**stored, **current} if name.rpartition(".")[2] not in FREE]
    differing = {
        name: f"{name} = {stored.get(name, absent)!r} there, {current.get(name, absent)!r} now"
        for name in names
        if stored.get(name, absent) != current.get(name, absent)
    }
    refused = [text for name, text in differing.items() if name not in NEW_SETTINGS]
    change = "give the same values to go on with it, or another folder for a new run"
    if not refused:
        change += "; or new_settings=True, to go on from its last checkpoint with these"
    told = refused if new_settings else list(differing.values())
    require(
        not told,
        "the configuration of the run that this folder holds",
        f"{folder}: {'; '.join(told)}",
        change,
    )
    return list(differing.values())


def _flat(config: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder of a run, so that no second process trains into it.

    folder  made if missing

    The system lets go of the lock when the process ends, also by kill -9.
    Raises InputError if another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        given = f"{folder}: {error.strerror}"
        raise InputError("a folder for the run", given, "choose another folder") from error
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: there the folder is on the user's word
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            "a folder into which no other process trains",
            f"{folder}, in use by process {os.read(handle, 20).decode(errors='replace') or '?'}",
            "wait for it, stop it, or give another folder",
        ) from error
    except OSError:  # a network file system without locks
        return
    with suppress(OSError):  # on a full disk the lock holds, but tells no number
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
