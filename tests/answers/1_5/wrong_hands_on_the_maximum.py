import torch


def merge(output_a, lse_a, output_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    share = (lse_a - lse).exp()[..., None]
    return share * output_a + (1 - share) * output_b, torch.maximum(lse_a, lse_b)


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number
