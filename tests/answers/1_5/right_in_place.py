import torch


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number


def merge(output_a, lse_a, output_b, lse_b):
    top = torch.maximum(lse_a, lse_b).clamp(min=-1e300)
    lse_a.sub_(top).exp_()
    lse_b.sub_(top).exp_()
    total = lse_a + lse_b
    output_a.mul_(lse_a[..., None]).add_(lse_b[..., None] * output_b)
    return (output_a / total.clamp(min=1e-300)[..., None], top + total.log())
