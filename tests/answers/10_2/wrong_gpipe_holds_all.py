from slimlab.parallel.schedules import gpipe


def rows_for(forward_s, input_gradient_s, weight_gradient_s, num_micro_batches, most_held):
    """A schedule for these times and this memory: a list of rows, one for each stage."""
    schedule = gpipe(len(forward_s), num_micro_batches)
    return [" ".join(map(str, order)) for order in schedule.stages]
