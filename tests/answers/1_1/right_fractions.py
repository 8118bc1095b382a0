import math
from slimlab.classroom.check import numbers

given = numbers("1.1")
query, keys, values = (given["query"], given["keys"], given["values"])
scores = [sum((q * k for q, k in zip(query, key))) / 2 for key in keys[:3]]
e = [math.exp(s) for s in scores]
weights = [x / sum(e) for x in e] + [0.0]
output = [sum((w * v[c] for w, v in zip(weights, values))) for c in range(2)]
output_shifted = output
output_loud = values[scores.index(max(scores))]
from fractions import Fraction

scores = [Fraction(sum((q * k for q, k in zip(query, key))), 2) for key in keys[:3]]
