import numpy

from slimlab.classroom.check import numbers

given = numbers("1.1")
query, keys, values = given["query"], given["keys"], given["values"]

values = numpy.array(values, dtype=float)
e = numpy.array(keys[:3]) @ numpy.array(query) * 0.5
scores = e.round(3)
a = numpy.append(numpy.exp(e - e.max()), 0.0)
a /= a.sum()
weights = a.round(3)
output = output_shifted = (a @ values).round(2)
output_loud = values[e.argmax()]
