import torch


def merge(output_a, lse_a, output_b, lse_b):
    nothing = torch.isneginf(lse_a) & torch.isneginf(lse_b)
    lead = torch.where(nothing, 0.0, lse_b) - torch.where(nothing, 0.0, lse_a)
    share_b = torch.sigmoid(lead)
    output = torch.lerp(output_a, output_b, share_b[..., None])
    return output, torch.logsumexp(torch.stack([lse_a, lse_b]), dim=0)


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number
