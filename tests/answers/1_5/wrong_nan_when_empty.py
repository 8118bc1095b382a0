import torch


def merge(output_a, lse_a, output_b, lse_b):
    largest = torch.maximum(lse_a, lse_b)
    power_a, power_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    total = power_a + power_b
    output = power_a[..., None] * output_a + power_b[..., None] * output_b
    return output / total[..., None], largest + total.log()


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number
