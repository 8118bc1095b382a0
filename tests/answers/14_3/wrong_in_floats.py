import torch


class SmallCache:
    def __init__(self, num_heads, d_head, group):
        self.keys, self.values = [], []

    def append(self, key, value):
        self.keys.append(key.clone())
        self.values.append(value.clone())

    def attend(self, query):
        keys, values = torch.stack(self.keys, dim=1), torch.stack(self.values, dim=1)
        scores = keys @ query[..., None] / query.shape[-1] ** 0.5
        return (scores.softmax(dim=1) * values).sum(dim=1)
