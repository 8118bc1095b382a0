import torch


class SmallCache:
    def __init__(self, num_heads, d_head, group):
        self.group = group
        self.full, self.waiting = [], []
        self.values = None

    def append(self, key, value):
        coded = self.code(value)
        if self.values is not None:
            coded = [torch.cat([old, new[None]]) for old, new in zip(self.values, coded)]
        else:
            coded = [new[None] for new in coded]
        self.values = coded
        self.waiting.append(key.clone())
        if len(self.waiting) == self.group:
            self.full.append(self.code(torch.stack(self.waiting).permute(1, 2, 0)))
            self.waiting.clear()

    def attend(self, query):
        parts = [self.numbers(*one).permute(2, 0, 1) for one in self.full]
        keys = torch.cat([*parts, *[one[None] for one in self.waiting]])
        scores = torch.einsum("the,he->ht", keys, query) / query.shape[1] ** 0.5
        weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
        weights = weights / weights.sum(dim=1, keepdim=True)
        return torch.einsum("ht,the->he", weights, self.numbers(*self.values))

    @staticmethod
    def code(rows):
        low = rows.amin(dim=-1, keepdim=True).bfloat16()
        step = ((rows.amax(dim=-1, keepdim=True) - low) / 15).bfloat16()
        safe = torch.where(step == 0, torch.ones_like(step), step)
        codes = ((rows - low.float()) / safe.float()).round().clamp(0, 15).to(torch.uint8)
        return codes[..., 0::2] + 16 * codes[..., 1::2], low, step

    @staticmethod
    def numbers(packed, low, step):
        codes = torch.stack([packed % 16, packed // 16], dim=-1).flatten(-2)
        return low.float() + step.float() * codes
