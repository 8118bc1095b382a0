import torch


def loss_and_gradient(logits, targets, smoothing, z_weight):
    """Mean loss () over the targets that count, and its gradient (N, V)."""
    counts = targets != -100
    vocab_size = logits.shape[1]
    log_z = torch.logsumexp(logits, dim=1, keepdim=True)  # (N, 1)
    log_p = logits - log_z
    q = torch.full_like(logits, smoothing / vocab_size)
    rows = counts.nonzero()[:, 0]
    q[rows, targets[rows]] += 1 - smoothing
    each = -(q * log_p).sum(1) + z_weight * log_z[:, 0] ** 2
    gradient = log_p.exp() * (1 + 2 * z_weight * log_z) - q
    loss = each * counts / counts.sum()
    return loss, gradient * counts[:, None] / counts.sum()
