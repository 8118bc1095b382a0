import torch

from slimlab.model.cache import KVCache
from slimlab.model.generation import generate


def wrong_prompts(model, prompts, num_new, write):
    right = [
        generate(model, torch.tensor([prompt]), num_new, use_cache=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    found = write(model, prompts, num_new)
    return [k for k in range(len(prompts)) if not torch.equal(right[k], torch.tensor(found[k]))]


def mended(model, prompts, num_new):
    T = max(map(len, prompts))
    before = torch.tensor([T - len(prompt) for prompt in prompts])[:, None]
    ids = torch.tensor([[9] * (T - len(prompt)) + prompt for prompt in prompts])
    cache = KVCache(model.config, len(prompts), T + num_new, dtype=torch.float64)
    hidden = torch.zeros(len(prompts), 1, 1, T + num_new, dtype=torch.float64)
    hidden[torch.arange(T + num_new).expand(len(prompts), 1, 1, -1) < before[:, None, None]] = (
        -torch.inf
    )
    mask = hidden[..., :T].expand(-1, 1, T, -1).clone()
    mask.diagonal(dim1=-2, dim2=-1).fill_(0.0)
    new = torch.empty(len(prompts), 0, dtype=torch.int64)
    with torch.no_grad():
        place = torch.arange(T) - before
        logits = model(ids, mask=mask, positions=place.clamp(min=0), cache=cache)
        for step in range(num_new):
            new = torch.cat([new, logits[:, -1:].argmax(-1)], dim=1)
            end = T + step + 1
            if step + 1 < num_new:
                logits = model(
                    new[:, -1:], mask=hidden[..., :end], positions=end - 1 - before, cache=cache
                )
    return new
