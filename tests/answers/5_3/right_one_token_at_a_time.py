import torch


def loss_and_gradient(logits, targets, smoothing, z_weight):
    N, V = logits.shape
    counted = [n for n in range(N) if targets[n] != -100]
    loss, gradient = logits.new_zeros(()), torch.zeros_like(logits)
    for n in counted:
        z, target = logits[n], int(targets[n])
        shift = z.max()
        log_z = shift + (z - shift).exp().sum().log()
        p = (z - log_z).exp()
        loss = loss + (1 - smoothing) * (log_z - z[target]) + smoothing * (log_z - z.mean())
        loss = loss + z_weight * log_z * log_z
        gradient[n] = p - smoothing / V + 2 * z_weight * log_z * p
        gradient[n, target] -= 1 - smoothing
    return loss / len(counted), gradient / len(counted)
