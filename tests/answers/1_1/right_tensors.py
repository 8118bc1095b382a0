import math
import torch
from slimlab.classroom.check import numbers

given = numbers("1.1")
query, keys, values = (given["query"], given["keys"], given["values"])
scores = [sum((q * k for q, k in zip(query, key))) / 2 for key in keys[:3]]
e = [math.exp(s) for s in scores]
weights = [x / sum(e) for x in e] + [0.0]
output = [sum((w * v[c] for w, v in zip(weights, values))) for c in range(2)]
output_shifted = output
output_loud = values[scores.index(max(scores))]
q, K, V = (torch.tensor(query).float(), torch.tensor(keys).float(), torch.tensor(values).float())
s = K @ q / 4**0.5
scores = s[:3]
weights = s.masked_fill(torch.arange(4) > 2, -math.inf).softmax(0)
output = weights @ V
output_shifted = (K + torch.tensor(given["shift"]))[:3] @ q
output_shifted = (output_shifted / 2).softmax(0) @ V[:3]
output_loud = V[s[:3].argmax()]
