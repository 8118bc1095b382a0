import torch


def merge(output_a, lse_a, output_b, lse_b):
    return (output_a + output_b) / 2, torch.logaddexp(lse_a, lse_b)


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number
