"""Run a student's parallel program on ranks, and say in a verdict what became of it.

The graders of chapter 07's exercises use it. Ranks are threads that take turns, so a program does
the same every time, a deadlock is found at once, and its table can stand in the verdict, shortened.

Production graders of parallel programs start processes and have a time limit alone.
"""

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from slimlab.classroom.grading import CheckFailed, expect
from slimlab.classroom.guard import Refused
from slimlab.comm.launch import RankResults, run_ranks
from slimlab.comm.ledger import PayloadLedger
from slimlab.comm.links import Network
from slimlab.comm.network import dialled
from slimlab.comm.report import CommunicationError, DeadlockError, RankError, RanksTimeoutError

MESSAGE_TIMES = Network(0.0, overhead_s=1.0)
MAX_ROWS, MAX_HINTS, MAX_LINE = 4, 2, 104
ENDED = "every rank to end, with nothing left over"


def run(program: Callable, world_size: int, what: str, *, eager_bytes: int | None = None):
    """Run program(comm) on ranks and return RankResults; fail with what went wrong.

    program      a function of the communicator alone
    world_size   number of ranks
    what         what was run, for the message: "4 ranks with 3 numbers each"
    eager_bytes  longer sends wait for their receiver; None: none waits
    """
    try:
        return run_ranks(program, world_size, timeout_s=5.0, eager_bytes=eager_bytes)
    except RankError as error:
        cause = error.__cause__
        if isinstance(cause, CheckFailed | NotImplementedError | Refused):
            raise cause from None
        *said, line = str(error).splitlines()
        shown = " / ".join(_short(one) for one in said[:3])
        raise CheckFailed(f"{what}: {shown}", "code that runs to its end", line[3:]) from None
    except DeadlockError as error:
        saw = "\n".join([f"{what}: a deadlock", *_rows_of(str(error))])
        look = "the lines in this table: who waits for whom?"
        raise CheckFailed(saw, ENDED, look) from None
    except CommunicationError as error:
        *lines, change = str(error).splitlines()
        shown = [_short(re.sub(" {2,}", "  ", one)) for one in lines[: MAX_ROWS + 1]]
        saw = "\n".join([f"{what}: {shown[0]}", *shown[1:]])
        look = change.removeprefix("change: ")
        if isinstance(error, RanksTimeoutError):
            look = "a loop without an end, at the line of the rank that computes"
        raise CheckFailed(saw, ENDED, look) from None


def on_ranks(
    function: Callable, inputs: Sequence[Tensor], what: str, *, eager_bytes: int | None = None
) -> RankResults:
    """Run function(comm, inputs[rank]) on len(inputs) ranks, as `run` does.

    function, inputs   what is run, one tensor for each rank
    what, eager_bytes  as in run
    """
    return run(
        lambda comm: function(comm, inputs[comm.rank]), len(inputs), what, eager_bytes=eager_bytes
    )


def timed(program: Callable, world_size: int, what: str, network: Network = MESSAGE_TIMES):
    """Run program(comm) on a dialled network; return results with ledgers, and the last clock.

    program, world_size, what  as in run
    network                    by default every message takes one second at both ends
    """
    results = run(dialled(program, network), world_size, what)
    last_s = max(one.clock_s for one in results)
    return RankResults([one.result for one in results], results.ledgers), last_s


def num_doublings(world_size: int) -> int:
    """Count how often 1 must be doubled to reach world_size."""
    steps = 0
    while 2**steps < world_size:
        steps += 1
    return steps


def sends_of(ledger: PayloadLedger) -> list[int]:
    """List the bytes of each message that a rank sent, from its `ledger`."""
    return [entry.n_bytes for entry in ledger.entries if entry.call == "send"]


def expect_messages_only(ledgers: Sequence[PayloadLedger], what: str) -> None:
    """Fail if a rank called anything but sends and receives.

    ledgers  of all ranks
    what     what was run, for the message
    """
    for rank, ledger in enumerate(ledgers):
        for entry in ledger.entries:
            if entry.call not in ("send", "recv"):
                saw = (
                    f"{what}: the ledger of rank {rank} holds {entry.call} of {entry.n_bytes} bytes"
                )
                look = "what the task allows: messages between two ranks, no collective"
                raise CheckFailed(saw, "send, recv, isend, irecv and sendrecv only", look)


def expect_untouched(
    inputs: Sequence[Tensor], before: Sequence[Tensor], results: Sequence, what: str
) -> None:
    """Fail if an argument changed, or a result shares its memory.

    inputs, before  the arguments of all ranks, and copies made before the run
    results         what the ranks returned
    what            what was run, for the message
    """
    for rank, (given, copy, result) in enumerate(zip(inputs, before, results)):
        same = given.shape == copy.shape and bool((given == copy).all())
        look = "what works in place: +=, add_, an index on the left, out="
        expect(same, f"{what}: rank {rank}'s argument was changed", "it as it was", look)
        own = result.numel() == 0 or result.data_ptr() != given.data_ptr()
        look = "what is returned where nothing was left to do: a copy is asked for"
        expect(
            own, f"{what}: rank {rank} returned its argument itself", "a tensor of its own", look
        )


def _rows_of(message: str) -> list[str]:
    """Return the rows of a deadlock's table and the first reasons, each cut to a line."""
    lines = message.splitlines()[2:]
    rows = [line for line in lines if re.match(r"\d+ ", line)]
    hints = [line for line in lines if line not in rows]
    shown = ["  ".join(re.split(" {2,}", f"rank {row}")) for row in rows[:MAX_ROWS]]
    shown = [
        re.sub(r"^(rank \d+)  (.*?)  line (\d+) of ", r"\1 \2, line \3 of ", one) for one in shown
    ]
    more = len(rows) - MAX_ROWS
    shown += [f"... and {more} more rank{'s' * (more > 1)}"] if more > 0 else []
    return [_short(one) for one in [*shown, *hints[:MAX_HINTS]]]


def _short(line: str) -> str:
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 4] + " ..."
