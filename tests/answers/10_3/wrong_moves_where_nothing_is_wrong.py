from slimlab.parallel.schedule_checks import find_deadlock
from slimlab.plan.pipeline_schedule import peak_activations, read_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes


def mend(rows):
    """The same rows, but for one instruction that stands elsewhere in its row."""
    stuck = find_deadlock(read_schedule(rows))
    if not stuck:
        return [" ".join(sorted(row.split(), key=lambda word: word[0] == "B")) for row in rows]
    found = []
    for s, row in enumerate(rows):
        words = row.split()
        for at in range(len(words)):
            rest = words[:at] + words[at + 1 :]
            for to in range(len(words)):
                moved = [*rest[:to], words[at], *rest[to:]]
                schedule = read_schedule([*rows[:s], " ".join(moved), *rows[s + 1 :]])
                if not find_deadlock(schedule):
                    step_s = simulate(schedule, StageTimes(1, 1, 1)).step_s
                    held = sum(peak_activations(schedule))
                    found.append((step_s, held, [*rows[:s], " ".join(moved), *rows[s + 1 :]]))
    return min(found)[2]


def rows_that_wait(num_stages, num_micro_batches, most_held):
    """Rows that end although each send waits for its receiver."""
    # Both ends of a link must list its messages in one order, so all rows are alike. Each turn from
    # backwards to forwards empties the pipeline: as few turns as the memory allows.
    words = []
    for start in range(0, num_micro_batches, most_held):
        group = range(start, min(start + most_held, num_micro_batches))
        words += [f"F{n}" for n in group] + [f"B{n}" for n in group]
    return [" ".join(words)] * num_stages
