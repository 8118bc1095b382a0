import copy

from torch import nn


class Parallel(nn.Module):
    def __init__(self, norm, attention, feed_forward):
        super().__init__()
        parts = copy.deepcopy([norm, attention, feed_forward])
        self.norm, self.attention, self.feed_forward = parts

    def forward(self, x, mask=None):
        n = self.norm(x)
        return x + self.attention(n, mask=mask) + self.feed_forward(n)
