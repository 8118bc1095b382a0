def rows_for(forward_s, input_gradient_s, weight_gradient_s, num_micro_batches, most_held):
    """A schedule for these times and this memory: a list of rows, one for each stage."""
    p, m = len(forward_s), num_micro_batches
    rows, busy_until = [[] for _ in range(p)], [0] * p
    did = [{"F": 0, "I": 0, "W": 0} for _ in range(p)]
    done = {}
    now = 0
    while any(one["W"] < m for one in did):
        for s in range(p):
            if busy_until[s] > now:
                continue
            f, i, w = did[s]["F"], did[s]["I"], did[s]["W"]
            back = s == p - 1 or done.get(("I", s + 1, i), now + 1) <= now
            down = s == 0 or done.get(("F", s - 1, f), now + 1) <= now
            if i < f and back:
                kind, seconds = "I", input_gradient_s[s]
            elif f < m and f - w < most_held[s] and down:
                kind, seconds = "F", forward_s[s]
            elif w < i:
                kind, seconds = "W", weight_gradient_s[s]
            else:
                continue
            number = did[s][kind]
            rows[s].append(f"{kind}{number}")
            did[s][kind] += 1
            busy_until[s] = done[kind, s, number] = now + seconds
        now += 1
    return [" ".join(row) for row in rows]
