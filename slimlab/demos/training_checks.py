"""What the demos that train compare: a run with that of one process, calls and bytes with the plan.

Every check has one value per rank. Production test suites compare in the same way, with bounds that
they have found by trying.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from slimlab.comm.base import Communicator
from slimlab.comm.ledger import LedgerEntry
from slimlab.demos.measure import from_all_ranks
from slimlab.demos.report import Report
from slimlab.demos.training import BOUND, LR, NUM_STEPS, Run

Calls = Sequence[tuple[str, int]]


def largest_errors(found: Run, true: Run) -> list[float]:
    """Compare a run with that of one process.

    found    of this rank
    true     of one process
    returns  the largest errors of losses, gradients and weights: relative to the loss; to the
             largest element of the parameter's gradient; to the larger one of its largest weight
             and the number of steps times the learning rate, which is how far AdamW goes
    """
    losses = [abs(mine - loss) / loss for mine, loss in zip(found.losses, true.losses)]
    gradients = [
        float((mine[name] - grad).abs().max() / grad.abs().max())
        for mine, grads in zip(found.gradients, true.gradients)
        for name, grad in grads.items()
    ]
    weights = []
    for name, weight in true.weights.items():
        scale = max(float(weight.abs().max()), len(true.losses) * LR)
        weights.append(float((found.weights[name] - weight).abs().max()) / scale)
    # A maximum would lose what is not a number.
    return [
        max(some, key=lambda one: (math.isnan(one), one)) for some in (losses, gradients, weights)
    ]


def check_run(report: Report, comm: Communicator, what: str, found: Run, true: Run) -> list[float]:
    """Compare losses, gradients and weights of every rank with those of one process.

    report   takes the checks
    comm     the communicator of all ranks
    what     stands before each check; may be empty
    found    of this rank
    true     of one process
    returns  the largest errors on any rank

    Communicates: one all_gather.
    """
    columns = list(zip(*from_all_ranks(comm, largest_errors(found, true))))
    for name, errors in zip(("losses", "gradients", "weights"), columns):
        agrees = all(error < BOUND for error in errors)
        report.check(f"{what}error of {name}", f"< {BOUND:g}", list(errors), agrees=agrees)
    return [_largest(errors) for errors in columns]


def check_calls(
    report: Report, comm: Communicator, what: str, predicted: Calls, entries: list[LedgerEntry]
) -> None:
    """Compare the calls of every rank with the prediction: how many of each, and their payload.

    report     takes a table of rank 0 and the checks
    comm       the communicator of all ranks
    what       stands before each check; may be empty
    predicted  (name of the call, payload in bytes) of each rank
    entries    of this rank

    Communicates: one all_gather.
    """
    counted = [(entry.call, entry.n_bytes) for entry in entries]
    names = sorted({name for name, _ in predicted})
    expected = [_totals(predicted, name) for name in names]
    own = [one for name in names for one in _totals(counted, name)]
    other = sum(name not in names for name, _ in counted)
    unlike = sum((Counter(counted) - Counter(predicted)).values())
    rows = from_all_ranks(comm, [*own, other, unlike])
    table = []
    for place, (name, (calls, n_bytes)) in enumerate(zip(names, expected)):
        found = [row[2 * place : 2 * place + 2] for row in rows]
        all_ranks = [calls] * comm.world_size, [n_bytes] * comm.world_size
        report.check(f"{what}calls of {name}", all_ranks[0], [one for one, _ in found])
        report.check(f"{what}bytes in {name}", all_ranks[1], [one for _, one in found])
        table.append((name, f"{calls:,}", f"{found[0][0]:,}", f"{n_bytes:,}", f"{found[0][1]:,}"))
    report.check(f"{what}calls that differ", [0] * comm.world_size, [a + b for *_, a, b in rows])
    headers = ("call", "calls predicted", "counted", "bytes predicted", "counted")
    report.table(f"{what}{NUM_STEPS} steps of rank 0", headers, table)


def check_held(
    report: Report,
    comm: Communicator,
    what: str,
    predicted: Sequence[Mapping[str, int]],
    counted: Mapping[str, int],
) -> None:
    """Compare the bytes of the tensors that every rank holds with the prediction.

    report     takes a table and the checks
    comm       the communicator of all ranks
    what       stands before each check; may be empty
    predicted  what is held -> bytes, of each rank
    counted    the same of this rank

    Communicates: one all_gather.
    """
    names = list(predicted[0])
    columns = [list(column) for column in zip(*from_all_ranks(comm, [counted[n] for n in names]))]
    rows = []
    for name, found in zip(names, columns):
        expected = [one[name] for one in predicted]
        report.check(f"{what}bytes of {name}", expected, found)
        rows.append((name, f"{expected[0]:,}", f"{found[0]:,}"))
    report.table(f"{what}bytes that rank 0 holds", ("", "predicted", "counted"), rows)


def _largest(errors: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _totals(calls: Calls, name: str) -> tuple[int, int]:
    sizes = [n_bytes for call, n_bytes in calls if call == name]
    return len(sizes), sum(sizes)
