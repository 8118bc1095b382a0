from slimlab.parallel.schedules_zero_bubble import zb_h1


def rows_for(forward_s, input_gradient_s, weight_gradient_s, num_micro_batches, most_held):
    """A schedule for these times and this memory: a list of rows, one for each stage."""
    schedule = zb_h1(len(forward_s), num_micro_batches)
    return [" ".join(map(str, order)) for order in schedule.stages]
