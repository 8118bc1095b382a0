import torch

from slimlab.model.cache import KVCache
from slimlab.model.generation import generate


def wrong_prompts(model, prompts, num_new, write):
    wrong = []
    for number, new in enumerate(write(model, prompts, num_new)):
        alone = generate(model, torch.tensor([prompts[number]]), num_new)[0]
        if alone[len(prompts[number]) :].tolist() != list(new):
            wrong.append(number + 1)
    return wrong


def mended(model, prompts, num_new):
    T = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (T - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[t >= T - len(prompt) for t in range(T)] for prompt in prompts])
    positions = (real.cumsum(dim=1) - 1).clamp(min=0)
    mask = real[:, None, None, :] | torch.eye(T, dtype=torch.bool)
    dtype = model.embedding.tokens.weight.dtype
    cache = KVCache(model.config, len(prompts), T + num_new, dtype=dtype)
    new = []
    with torch.no_grad():
        logits = model(ids, mask=mask, positions=positions, cache=cache)
        for _ in range(num_new):
            new.append(logits[:, -1].argmax(dim=-1, keepdim=True))
            real = torch.cat([real, torch.ones_like(real[:, :1])], dim=1)
            positions = positions[:, -1:] + 1
            logits = model(
                new[-1], mask=real[:, None, None, :], positions=positions, cache=cache
            )
    return torch.cat(new, dim=1).tolist()
