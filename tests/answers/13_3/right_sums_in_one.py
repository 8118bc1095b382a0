import math

import torch


def between(student_logits, teacher_logits, beta, temperature):
    def logs(logits):
        scaled = logits / temperature
        return scaled - torch.logsumexp(scaled, dim=-1, keepdim=True)

    a, b = logs(teacher_logits), logs(student_logits)
    m = torch.stack((a + math.log(beta), b + math.log1p(-beta))).logsumexp(0)
    p, q = a.exp(), b.exp()
    forward = torch.nan_to_num(p * (a - m), nan=0.0)
    reverse = q * (b - m)
    total = (beta * forward + (1 - beta) * reverse).sum() * temperature**2 / len(p)
    gradient = (reverse - q * reverse.sum(-1, keepdim=True)) * (1 - beta) * temperature
    return total, gradient / len(p)


def largest_loss(beta, temperature):
    share = torch.tensor([beta, 1 - beta], dtype=torch.float64)
    return temperature**2 * torch.special.entr(share).sum()
