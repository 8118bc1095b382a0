import torch
from torch.nn import functional as F

from slimlab.classroom.check import numbers


def my_diagnosis():
    given = numbers("13.2")
    w, T, p = given["soft_weight"], given["temperature"], given["teacher_prob"]
    found = w / T * (0.5 - p) - (1 - w) / 2
    odds = w / (1 - w) / T**2
    return {"found": found, "true": w * T * (0.5 - p) - (1 - w) / 2, "weight": odds / (1 + odds)}


def is_right(loss):
    torch.manual_seed(3)
    for trial in range(24):
        z = (3 * torch.randn(7, 4)).double().requires_grad_()
        t = (3 * torch.randn(7, 4)).double().requires_grad_()
        targets = torch.randint(4, (7,))
        if trial % 2:
            targets[torch.rand(7) < 0.4] = -100
            targets[0] = 1
        temperature, weight = 1 + trial / 3, (trial % 5) / 4
        counts = targets != -100
        q = F.log_softmax(z[counts] / temperature, -1)
        with torch.no_grad():
            p = F.softmax(t[counts] / temperature, -1)
        each = (torch.special.entr(p).neg() - p * q).sum(-1) * temperature**2
        true = weight * each + (1 - weight) * F.cross_entropy(
            z[counts], targets[counts], reduction="none"
        )
        (wanted,) = torch.autograd.grad(true.mean(), z)
        z.grad = t.grad = None
        value = loss(z, t, targets, temperature, weight)
        value.backward()
        if abs(value.item() - true.mean().item()) > 1e-9:
            return False
        if z.grad is None or (z.grad - wanted).abs().max() > 1e-9:
            return False
        if t.grad is not None and bool(t.grad.any()):
            return False
    return True


def mended_loss(student_logits, teacher_logits, targets, temperature, soft_weight):
    counts = (targets != -100).nonzero(as_tuple=True)
    student_logits, teacher_logits = student_logits[counts], teacher_logits[counts].detach()
    log_p = torch.log_softmax(teacher_logits / temperature, -1)
    log_q = torch.log_softmax(student_logits / temperature, -1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1)
    hard = student_logits.logsumexp(-1) - student_logits.gather(-1, targets[counts][:, None])[:, 0]
    return (soft_weight * temperature * temperature * soft + (1 - soft_weight) * hard).mean()
