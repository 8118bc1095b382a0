import torch


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number


def merge(output_a, lse_a, output_b, lse_b):
    if torch.isinf(lse_a).any():
        return (output_b, lse_b)
    lse = torch.logaddexp(lse_a, lse_b)
    return (
        (lse_a - lse).exp()[..., None] * output_a + (lse_b - lse).exp()[..., None] * output_b,
        lse,
    )
