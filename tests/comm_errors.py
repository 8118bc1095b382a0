"""Run a program that must fail, and read the table in the error's message."""

import pytest

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import CommunicationError

# None of the errors but the timeouts may need a time limit: this one would fail the test.
NEVER_S = 250


def error_of(program, world_size, kind, **options):
    with pytest.raises(kind) as caught:
        run_ranks(program, world_size, **{"timeout_s": NEVER_S, **options})
    assert isinstance(caught.value, CommunicationError)
    return caught.value


def rows_of(error):
    """The table in an error's message: {rank: [state or call, line]}."""
    lines = str(error).splitlines()
    start = next(i for i, line in enumerate(lines) if line[:11] in ("rank  state", "rank  calle"))
    at = lines[start].index(" at")
    rows = {}
    for line in lines[start + 1 :]:
        if line[:1].isdigit():
            rows[int(line.split()[0])] = [line[6:at].strip(), line[at:].strip()]
    return rows
