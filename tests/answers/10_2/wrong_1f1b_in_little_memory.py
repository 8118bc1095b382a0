def rows_for(forward_s, input_gradient_s, weight_gradient_s, num_micro_batches, most_held):
    """A schedule for these times and this memory: a list of rows, one for each stage."""
    p, m, rows = len(forward_s), num_micro_batches, []
    for s in range(p):
        ahead = min(p - s, min(most_held[: s + 1]), m)
        words = [f"F{n}" for n in range(ahead)]
        for n in range(m):
            words.append(f"B{n}")
            if ahead + n < m:
                words.append(f"F{ahead + n}")
        rows.append(" ".join(words))
    return rows
