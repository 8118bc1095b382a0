import torch


def merge(output_a, lse_a, output_b, lse_b):
    sum_a, sum_b = lse_a.exp()[..., None], lse_b.exp()[..., None]
    total = sum_a + sum_b
    return (sum_a * output_a + sum_b * output_b) / total, total.squeeze(-1).log()


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number
