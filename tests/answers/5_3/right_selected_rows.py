import torch
from torch.nn import functional as F


def loss_and_gradient(logits, targets, smoothing, z_weight):
    keep = targets != -100
    z, y = logits[keep], targets[keep]
    plain = F.cross_entropy(z, y, label_smoothing=smoothing)
    log_z = torch.logsumexp(z, 1)
    loss = plain + z_weight * log_z.square().mean()
    q = (1 - smoothing) * F.one_hot(y, z.shape[1]) + smoothing / z.shape[1]
    p = z.softmax(1)
    gradient = torch.zeros_like(logits)
    gradient[keep] = (p - q + 2 * z_weight * log_z[:, None] * p) / len(y)
    return loss, gradient
