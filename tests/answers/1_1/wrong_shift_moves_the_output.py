import math

from slimlab.classroom.check import numbers

given = numbers("1.1")
query, keys, values = given["query"], given["keys"], given["values"]

scores = [sum(q * k for q, k in zip(query, key)) / 2 for key in keys[:3]]
exponentials = [math.exp(e) for e in scores]
weights = [e / sum(exponentials) for e in exponentials] + [0.0]
output = [sum(w * v[c] for w, v in zip(weights, values)) for c in range(2)]
output_shifted = [x + sum(q * s for q, s in zip(query, given["shift"])) / 2 for x in output]
output_loud = values[scores.index(max(scores))]
