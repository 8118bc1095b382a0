import torch


def merge(output_a, lse_a, output_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    shares = [(part - lse).exp().nan_to_num(0.0)[..., None] for part in (lse_a, lse_b)]
    return shares[0] * output_a + shares[1] * output_b, lse


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * d_v * bytes_per_number
