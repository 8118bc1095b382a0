"""The two rules by which a gradient changes a weight: SGD and AdamW.

They work on plain tensors, one parameter at a time, and know no model and no state. Chapter 05
explains them; optimizer.py keeps their state.

Robbins and Monro 1951 (SGD); Polyak 1964 (momentum); Kingma and Ba 2015 (arXiv:1412.6980, Adam);
Loshchilov and Hutter 2019 (arXiv:1711.05101, AdamW).

Production computes the same numbers in one pass over memory; here every line makes a tensor.
"""

from torch import Tensor


def sgd_update(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Change one parameter, and its momentum buffer, in place.

    param         any shape
    grad          its gradient, left as it is
    buffer        sum of all directions so far, older ones fading; None without momentum
    lr, momentum, weight_decay  as in SGD
    """
    direction = grad + weight_decay * param
    if buffer is not None:
        direction = buffer.mul_(momentum).add_(direction)
    param.sub_(lr * direction)


def adamw_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Change one parameter and its two running means in place.

    param       any shape
    grad        its gradient, left as it is
    exp_avg     running mean of the gradients, zeros before the first step
    exp_avg_sq  running mean of their squares, zeros before the first step
    step        1 in the first update of this parameter
    lr, betas, eps, weight_decay  as in AdamW
    """
    beta1, beta2 = betas
    exp_avg.mul_(beta1).add_((1 - beta1) * grad)
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * grad**2)
    # Both means began at 0; after n steps they hold only the share 1 - beta**n of a true mean.
    mean = exp_avg / (1 - beta1**step)
    mean_square = exp_avg_sq / (1 - beta2**step)
    param.mul_(1 - lr * weight_decay)
    param.sub_(lr * mean / (mean_square.sqrt() + eps))
