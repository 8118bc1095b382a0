import torch

from slimlab.classroom.check import numbers


def my_diagnosis():
    given = numbers("14.2")
    x, weight = given["x"], given["weight"]
    true = [sum(x[j] * row[j] for j in range(2)) for row in weight]
    size = [max(abs(weight[0][j]), abs(weight[1][j])) for j in range(2)]
    found = [size[i] * sum(x[j] * weight[i][j] / size[j] for j in range(2)) for i in range(2)]
    return {"true": true, "found": found, "where": 2}


def by_rows(x, weight):
    result = torch.zeros(len(x), len(weight), dtype=x.dtype)
    for n, token in enumerate(x):
        for o, row in enumerate(weight):
            sizes = token.abs().max().item(), row.abs().max().item()
            if min(sizes) > 0:
                one, other = (v * (127 / s) for v, s in zip((token, row), sizes))
                total = (one.round().long() * other.round().long()).sum()
                result[n, o] = total.item() * (sizes[0] / 127) * (sizes[1] / 127)
    return result


def is_right(linear):
    torch.manual_seed(1)
    x = torch.randn(4, 5).double() * torch.tensor([1.0, 20.0, 0.3, 4.0])[:, None]
    weight = torch.randn(5, 5).double() * torch.tensor([3.0, 0.1, 9.0, 1.0, 0.5])
    weight = weight * torch.tensor([1.0, 7.0, 0.2, 2.0, 5.0])[:, None]
    x[1, 2], weight[2, 3] = -90.0, -80.0
    long = torch.ones(2, 30).double(), torch.ones(30, 30).double()
    some, others = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 1, 1, 0, 1])
    silent = x * some[:, None], weight * others[:, None]
    for case in ((x, weight), long, silent):
        wanted, saw = by_rows(*case), linear(*case)
        if not bool(((saw - wanted).abs() <= 1e-9 * (1 + wanted.abs())).all()):
            return False
    return True


mended_linear = by_rows
