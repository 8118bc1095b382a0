from slimlab.parallel.schedule_checks import find_deadlock
from slimlab.plan.pipeline_schedule import peak_activations, read_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes


def mend(rows):
    """The same rows, but for one instruction that stands elsewhere in its row."""
    stuck = find_deadlock(read_schedule(rows))
    if not stuck:
        return rows
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
    ahead = min(most_held, num_micro_batches)
    words = [f"F{n}" for n in range(ahead)]
    for n in range(num_micro_batches):
        words += [f"B{n}"] + [f"F{n + ahead}"] * (n + ahead < num_micro_batches)
    return [" ".join(words)] * num_stages
