import copy

import torch
from torch import nn


class Trainer:
    """Teach a small network to add; update() makes one step and returns its loss."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.batches = torch.Generator().manual_seed(seed)
        self.step = 0

    def update(self):
        x = torch.randn(8, 4, generator=self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.02 / (1 + self.step / 10)
        loss = (self.model(x)[:, 0] - x.sum(1)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def same_future(make, num_before, num_after):
    """Whether a trainer that loads the state repeats the next updates to the last bit."""
    first = make()
    for _ in range(num_before):
        first.update()
    state = first.state()
    state = copy.deepcopy(state)
    losses = [first.update() for _ in range(num_after)]
    second = make()
    second.load(state)
    again = [second.update() for _ in range(num_after)]
    pairs = zip(first.model.parameters(), second.model.parameters())
    return losses == again and all(torch.equal(one, other) for one, other in pairs)


class Mended(Trainer):
    """A Trainer that forgets nothing."""

    def state(self):
        state = {
            **super().state(),
            "batches": self.batches.get_state(),
            "dropout": torch.get_rng_state(),
        }
        return copy.deepcopy(state)

    def load(self, state):
        super().load(copy.deepcopy(state))
        self.batches.set_state(state["batches"])
        torch.set_rng_state(state["dropout"])
