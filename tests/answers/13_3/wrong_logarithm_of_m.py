import math

import torch


def between(student_logits, teacher_logits, beta, temperature):
    """The loss () and its gradient (N, V)."""
    log_p = (teacher_logits / temperature).log_softmax(-1)
    log_q = (student_logits / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    of_p = torch.where(p > 0, p * (log_p - log_m), 0.0).sum(-1)
    ratio = log_q - log_m
    of_q = (q * ratio).sum(-1)
    loss = temperature**2 * (beta * of_p + (1 - beta) * of_q).mean()
    gradient = temperature * (1 - beta) * q * (ratio - of_q[:, None])
    return loss, gradient / len(q)


def largest_loss(beta, temperature):
    """What no loss reaches."""
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)  # of whose token it is
    return temperature**2 * entropy
