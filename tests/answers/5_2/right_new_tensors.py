import torch


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if g is not None:
                    m = self.state[p].get("exp_avg", torch.zeros_like(p))
                    b1, b2 = group["betas"]
                    c = b1 * m + (1 - b1) * g
                    sign = (c > 0).to(p.dtype) - (c < 0).to(p.dtype)
                    p.copy_(p - group["lr"] * (sign + group["weight_decay"] * p))
                    self.state[p]["exp_avg"] = b2 * m + (1 - b2) * g
