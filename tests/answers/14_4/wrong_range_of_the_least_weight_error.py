import torch


def quantize_layer(weight, inputs):
    best = None
    low = weight.amin(dim=1, keepdim=True).clamp(max=0)
    high = weight.amax(dim=1, keepdim=True).clamp(min=0)
    for part in torch.linspace(1, 0.2, 30).tolist():
        scale = (part * (high - low) / 7).clamp(min=1e-6).half()
        zero = (-part * low / scale.float()).round().to(torch.uint8)
        codes = (weight / scale.float() + zero).round().clamp(0, 7)
        error = (scale.float() * (codes - zero) - weight).square().sum(dim=1, keepdim=True)
        new = error, codes, scale, zero
        if best is None:
            best = new
        best = [torch.where(error < best[0], one, old) for one, old in zip(new, best)]
    return best[1].to(torch.uint8), best[2], best[3]
