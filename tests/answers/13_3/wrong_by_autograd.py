import math

import torch
from torch.nn import functional as F


def between(student_logits, teacher_logits, beta, temperature):
    z = student_logits.clone().requires_grad_()
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (z / temperature).log_softmax(-1)
    log_m = torch.logaddexp(math.log(beta) + log_p, math.log(1 - beta) + log_q)
    of_p = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    of_q = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    loss = temperature**2 * (beta * of_p + (1 - beta) * of_q)
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), torch.zeros_like(z) if z.grad is None else z.grad


def largest_loss(beta, temperature):
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    return temperature**2 * entropy
