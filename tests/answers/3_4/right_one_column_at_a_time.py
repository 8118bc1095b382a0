import torch

from slimlab.model.cache import KVCache


def alone(model, prompt, num_new):
    text = torch.tensor([prompt])
    for _ in range(num_new):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    return text[0, len(prompt) :].tolist()


def wrong_prompts(model, prompts, num_new, write):
    written = write(model, prompts, num_new)
    pairs = enumerate(zip(prompts, written))
    return {k for k, (prompt, new) in pairs if alone(model, prompt, num_new) != list(new)}


def mended(model, prompts, num_new):
    T = max(map(len, prompts))
    dtype = model.embedding.tokens.weight.dtype
    cache = KVCache(model.config, len(prompts), T + num_new, dtype=dtype)
    rows = [[0] * (T - len(prompt)) + prompt for prompt in prompts]
    real = [[False] * (T - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    with torch.no_grad():
        for t in range(T + num_new - 1):
            mask = torch.tensor([[[[*row[:t], True]]] for row in real])
            places = torch.tensor([[sum(row[:t])] for row in real])
            ids = torch.tensor([[row[t]] for row in rows])
            logits = model(ids, mask=mask, positions=places, cache=cache)
            if t >= T - 1:
                for b in range(len(rows)):
                    rows[b].append(int(logits[b, -1].argmax()))
                    real[b].append(True)
    return tuple(tuple(row[T:]) for row in rows)
