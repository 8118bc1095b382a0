from slimlab.parallel.schedule_checks import find_deadlock
from slimlab.plan.pipeline_schedule import peak_activations, read_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes


def ways(words):
    for at, word in enumerate(words):
        rest = [one for one in words if one is not word]
        for to in range(at):
            yield [*rest[:to], word, *rest[to:]]


def mend(rows):
    """A single word moved to the front of where it stands: moving others back is the same."""
    if not find_deadlock(read_schedule(rows)):
        return list(rows)
    best = None
    for s in range(len(rows)):
        words = rows[s].split()
        tried = [*ways(words), *(one[::-1] for one in ways(words[::-1]))]
        for moved in tried:
            new = list(rows)
            new[s] = " ".join(moved)
            schedule = read_schedule(new)
            if find_deadlock(schedule):
                continue
            score = (
                simulate(schedule, StageTimes(1, 1, 1)).step_s,
                sum(peak_activations(schedule)),
            )
            if best is None or score < best[0]:
                best = score, new
    return best[1]


def rows_that_wait(num_stages, num_micro_batches, most_held):
    """As few groups as the memory allows, and these as even as can be."""
    count = -(-num_micro_batches // most_held)
    size, longer = divmod(num_micro_batches, count)
    row, start = "", 0
    for group in range(count):
        end = start + size + (group < longer)
        row += "".join(f"F{n} " for n in range(start, end))
        row += "".join(f"B{n} " for n in range(start, end))
        start = end
    return [row.strip() for _ in range(num_stages)]
