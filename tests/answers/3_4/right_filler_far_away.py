import torch

from slimlab.model.cache import KVCache


def write_alone(model, prompt, num_new):
    text = list(prompt)
    for _ in range(num_new):
        with torch.no_grad():
            text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    return text[len(prompt) :]


def wrong_prompts(model, prompts, num_new, write):
    written = write(model, prompts, num_new)
    pairs = zip(prompts, written)
    return [n for n, (p, new) in enumerate(pairs) if write_alone(model, p, num_new) != new]


@torch.no_grad()
def mended(model, prompts, num_new):
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    B, T = len(prompts), int(lengths.max())
    filler = T - lengths  # (B,)
    ids = torch.zeros(B, T, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, filler[row] :] = torch.tensor(prompt)
    cache = KVCache(model.config, B, T + num_new, dtype=torch.float64)
    written, start = [], 0
    for step in range(num_new):
        places = torch.arange(start, start + ids.shape[1])
        keys = torch.arange(start + ids.shape[1])
        seen = (keys >= filler[:, None])[:, None] & (keys <= places[:, None])
        seen = seen | (keys == places[:, None])
        positions = (places - filler[:, None]).clamp(min=0)
        logits = model(ids, mask=seen[:, None], positions=positions, causal=False, cache=cache)
        start += ids.shape[1]
        ids = logits[:, -1:].argmax(dim=-1)
        written.append(ids[:, 0])
    return torch.stack(written, dim=1).tolist()
