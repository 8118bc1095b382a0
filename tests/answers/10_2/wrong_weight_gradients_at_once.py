def rows_for(forward_s, input_gradient_s, weight_gradient_s, num_micro_batches, most_held):
    """A schedule for these times and this memory: a list of rows, one for each stage."""
    seconds = {"W": weight_gradient_s, "I": input_gradient_s, "F": forward_s}  # in this order
    stages = range(len(forward_s))
    rows, free = [[] for _ in stages], [0 for _ in stages]
    ends = {kind: [[] for _ in stages] for kind in seconds}  # of each one, on each stage

    def ready(kind, s):
        """When the next one of this kind could start on stage s; None: not yet known, or never."""
        number = len(ends[kind][s])
        held = len(ends["F"][s]) - len(ends["W"][s])
        if number == num_micro_batches or (kind == "F" and held == most_held[s]):
            return None
        needs = {"F": [("F", s - 1)], "I": [("F", s), ("I", s + 1)], "W": [("I", s)]}[kind]
        needs = [ends[kind][other] for kind, other in needs if other in stages]
        if any(len(one) <= number for one in needs):
            return None
        return max([free[s], *(one[number] for one in needs)])

    while True:
        pairs = [(order, kind, s) for order, kind in enumerate(seconds) for s in stages]
        places = [(ready(kind, s), order, kind, s) for order, kind, s in pairs]
        places = [place for place in places if place[0] is not None]
        if not places:
            return [" ".join(row) for row in rows]
        start, _, kind, s = min(places)  # what can start first; of several I, then F, then W
        rows[s].append(f"{kind}{len(ends[kind][s])}")
        free[s] = start + seconds[kind][s]
        ends[kind][s].append(free[s])
