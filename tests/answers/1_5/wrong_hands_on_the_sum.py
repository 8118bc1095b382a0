import torch


def merge(output_a, lse_a, output_b, lse_b):
    largest = torch.maximum(lse_a, lse_b)
    power_a, power_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    share = (power_a / (power_a + power_b))[..., None]
    return share * output_a + (1 - share) * output_b, lse_a + lse_b


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number
