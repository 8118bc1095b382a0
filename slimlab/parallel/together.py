"""What succeeds on all ranks or fails on all: reading and writing files, checks of what they hold.

Chapter 08 uses it for sharded checkpoints. A rank that meets a full disk, and raises, leaves the
others waiting in the next call. So each tells the others first whether it can go on, and all raise
the same message, with the number of the rank that met it.

Production writes such checks around every file, or lets the launcher end all ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import InputError

TEXT_BYTES = 400  # of each part of a message; longer ones are cut


def with_all(comm: Communicator, function: Callable, *args: object) -> object:
    """Call a function, and fail if it fails on any rank.

    comm      of the ranks that do it; all must call this
    function  its InputError and OSError are told to all ranks
    args      of the function
    returns   what it returned on this rank

    Communicates: one all_gather of three texts of TEXT_BYTES.
    Raises InputError, the same on every rank, that names the first rank on which it failed.
    """
    result, failure = None, None
    try:
        result = function(*args)
    except InputError as error:
        failure = error
    except OSError as error:
        failure = InputError(
            "a file that can be written and read",
            f"{error.filename or 'a file'}: {error.strerror or error}",
            "make room, check the permissions, or choose another folder",
        )
    parts = ["", "", ""] if failure is None else [failure.asked, failure.given, failure.change]
    everyones = comm.all_gather(torch.stack([_coded(part) for part in parts]).to(comm.device))
    for rank, rows in enumerate(everyones.cpu().split(3)):
        asked, given, change = map(_text, rows)
        if asked:
            raise InputError(asked, f"{given} (rank {rank})", change) from failure
    return result


def tell(comm: Communicator, text: str, src: int = 0) -> str:
    """Give every rank the text of one.

    comm  of the ranks
    text  at most TEXT_BYTES in UTF-8; only that of src counts
    src   the rank whose text it is

    Communicates: one broadcast of TEXT_BYTES.
    """
    return _text(comm.broadcast(_coded(text).to(comm.device), src).cpu())


def _coded(text: str) -> Tensor:
    data = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    return torch.tensor(list(data), dtype=torch.uint8)


def _text(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore")
