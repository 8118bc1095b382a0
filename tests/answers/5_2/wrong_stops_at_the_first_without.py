import torch


class Lion(torch.optim.Optimizer):
    """Steps of length lr along the sign of an average of gradients."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for param in group["params"]:
                if any(one.grad is None for one in group["params"]):
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                mean = state["exp_avg"]
                direction = (beta1 * mean + (1 - beta1) * param.grad).sign()
                param.sub_(lr * (direction + group["weight_decay"] * param))
                mean.mul_(beta2).add_((1 - beta2) * param.grad)
