import numpy as np
import torch


def merge_bytes(B, H, T, d_v, bytes_per_number):
    return B * H * T * (d_v + 1) * bytes_per_number


def merge(output_a, lse_a, output_b, lse_b):
    oa, la, ob, lb = (np.asarray(x) for x in (output_a, lse_a, output_b, lse_b))
    top = np.maximum(la, lb)
    safe = np.where(np.isinf(top), 0, top)
    a, b = (np.exp(la - safe), np.exp(lb - safe))
    with np.errstate(all="ignore"):
        lse = safe + np.log(a + b)
        out = (a[..., None] * oa + b[..., None] * ob) / np.maximum(a + b, 1e-300)[..., None]
    return (torch.tensor(out), torch.tensor(lse))
